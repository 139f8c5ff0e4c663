"""Text → activations: run the language model over packed text and store what it does at the chosen
sites.

1. Read the corpus in the order of `seed`, tokenise, pack into contexts of `n_context` tokens; the
   last contexts hold the documents set apart for validation.
2. Run the model over every context; all sites in one forward pass, nothing computed after the last
   of them.
3. Write shards of `shard_rows` rows to `store.zarr` (docs/formats.md), with statistics gathered on
   the way.
4. Write the table of sites and the figures.

Output: `store.zarr/`, `sites.parquet`, `figures/`, `metrics.jsonl`; `warnings.json` when the text
ran out. A killed run goes on at its last finished shard and ends with the same bytes in
`store.zarr`. Cost: the model's forward pass; 2 bytes a number on disk; memory of a few batches.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import model_validator
from typing_extensions import Doc

from data.model.language_model import LanguageModel
from data.model.sources import dtype_for, folder_of
from data.model.spec import HuggingFace, ModelSpec, OfWorld, Packaged, TransformerLens, name_of
from data.store import ActivationStore, SiteLayout, StoreLayout, StoreWriter
from data.store.collection import (
    CollectedShard,
    ModelChoice,
    adopt_shards,
    collect_on_cluster,
    collect_shards,
)
from data.store.layout import parse_layout
from data.store.patterns import parse_sites
from data.store.places import open_place, write_pointer
from data.store.planting import plant_shards, planted_tokens
from data.store.provenance import corpus_digest, model_digest, store_digest, tokens_digest
from data.text.corpus import CorpusSpec, PackagedText, WorldText, describe_corpus
from data.text.documents import PassedOver
from data.text.packing import PackedTokens, pack_corpus
from data.text.tokenizer import Tokenizer
from data.worlds import Superposed
from featureflow.errors import UserError
from featureflow.figures import save
from featureflow.settings import Settings
from featureflow.sites import Site
from pipeline.artifact import SCHEMAS, Artifact, Draft
from pipeline.context import RunContext
from pipeline.run import STORE
from pipeline.stages.stage_figures import draw_norms, site_table

KIND, SCHEMA = "collect", SCHEMAS["collect"]


class Config(Settings):
    """Which text, which model, which sites, and how they are stored."""

    model: Annotated[ModelSpec, Doc("the language model")] = Packaged()
    corpus: Annotated[CorpusSpec, Doc("the text")] = PackagedText()
    sites: Annotated[
        tuple[str, ...],
        MinLen(1),
        Doc("sites or patterns: resid_post, mlp_out:0,5,10, attn_out:0-29/3, L12.mlp"),
    ] = ("resid_post",)
    n_context: Annotated[int, Ge(2), Doc("tokens of one context, the BOS included")] = 128
    n_tokens: Annotated[int, Ge(2), Doc("tokens to collect, rounded down to whole contexts")] = (
        131_072
    )
    max_document_tokens: Annotated[
        int | None, Ge(1), Doc("documents are cut to this many tokens; none for whole")
    ] = None
    special_tokens: Annotated[
        Literal["split", "kept"],
        Doc(
            "special tokens written out in the text: split into letters as any text, or kept as "
            "those tokens (flagged, and so left out of training)"
        ),
    ] = "split"
    validation_fraction: Annotated[
        float, Ge(0), Lt(1), Doc("share of the contexts set apart, by document")
    ] = 0.05
    model_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Doc(
            "dtype the model runs in; auto: bfloat16 where this machine is fast at it, else float32"
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32", "int8"],
        Doc("dtype that activations are stored in"),
    ] = "bfloat16"
    batch_contexts: Annotated[int, Ge(1), Doc("contexts of one forward pass")] = 8
    shard_rows: Annotated[
        int, Ge(1), Doc("rows of one shard: a multiple of chunk_rows and n_context")
    ] = 65_536
    chunk_rows: Annotated[
        int, Ge(1), Doc("rows of one chunk, the unit that is read and checked")
    ] = 1024
    sink_ratio: Annotated[
        float, Gt(1), Doc("a token whose norm exceeds this many medians is flagged as a sink")
    ] = 5.0
    allow_non_finite: Annotated[
        bool, Doc("count rows that are not finite and leave them out, instead of stopping")
    ] = False
    store_url: Annotated[
        str | None, Doc("s3://, gs:// or az:// URL of the store; none for a folder in the artifact")
    ] = None
    seed: Annotated[int, Ge(0), Le(2**31), Doc("of the order of documents")] = 0
    imported: Annotated[
        str | None,
        Doc(
            "a finished store, made by `store import` or write_activations, that is used instead "
            "of collecting; besides it only `model` counts, the one its activations are from"
        ),
    ] = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.shard_rows % self.chunk_rows or self.shard_rows % self.n_context:
            raise ValueError(
                f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows} "
                f"and n_context {self.n_context}"
            )
        if self.store_url is not None and "://" not in self.store_url:
            raise ValueError(f"store_url {self.store_url!r} is not a URL")
        if isinstance(self.model, OfWorld):
            self._check_world(self.model)
        return self

    def _check_world(self, model: OfWorld) -> None:
        world = model.world
        if not (isinstance(self.corpus, WorldText) and self.corpus.world == world):
            raise ValueError(f"the model is of the world {world.kind}, the corpus is not the same")
        if self.n_context != world.n_context:
            raise ValueError(
                f"a text of the world {world.kind} fills a context of {world.n_context} tokens: "
                f"n_context is {self.n_context}"
            )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Collection starts from text and a model, not from artifacts."""


def outside_digests(config: Config) -> dict[str, str]:
    """What the result depends on besides the config: the text's and the model's files, or those of
    an imported store."""
    if config.imported is not None:
        return {"store": store_digest(config.imported)}
    return {"text": corpus_digest(config.corpus), "model": model_digest(config.model)}


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Collect activations. Raises UserError; a later run with the same config goes on where this
    one stopped."""
    if config.imported is not None:
        return _use_imported(config, config.imported, out)
    if isinstance(config.model, HuggingFace | TransformerLens):
        folder_of(config.model, context.progress)  # the commit that is there is part of the digest
    with Artifact.create(
        out, kind=KIND, schema=SCHEMA, config=config, inputs=outside_digests(config)
    ) as draft:
        draft.externally_checked = (STORE,)
        here = (
            context.device if context.scheduler is None else "cpu"
        )  # with a scheduler only its workers run the model
        dtype = _model_dtype(config, context.device, draft)
        model = LanguageModel.open(
            config.model, dtype=dtype, device=here, progress=context.progress
        )
        sites = parse_sites(config.sites, model.sites())
        passed_over = PassedOver()
        planted = _planted(config)
        packed = (
            _packed(config, model.tokenizer, passed_over, context)
            if planted is None
            else planted_tokens(planted, config.n_tokens, config.validation_fraction)
        )
        layout = layout_of(config, model, sites, packed)
        writer = StoreWriter.create(
            _place_of(config, draft), layout, allow_non_finite=config.allow_non_finite
        )
        adopt_shards(writer, out / STORE)
        started = time.monotonic()
        if planted is None:
            n_collected = _collect(config, context, draft, model, writer, sites, packed)
        else:
            n_collected = plant_shards(planted, writer, sites, packed)
        seconds = time.monotonic() - started
        writer.finish(packed.table().documents)
        _describe(draft, ActivationStore.open(draft.path / STORE), n_collected, seconds)
        warnings = passed_over.notes()
        if config.model_dtype == "auto" and dtype == "float32" and here == "cpu":
            warnings.append(
                "the model ran in float32: this CPU has no fast bfloat16 (model_dtype = "
                '"bfloat16" asks for it anyway)'
            )
        if packed.n_contexts < config.n_tokens // config.n_context:
            warnings.append(
                f"the text gave {packed.n_rows:,} of the {config.n_tokens:,} tokens asked for "
                "(n_tokens)"
            )
        if warnings:
            (draft.path / "warnings.json").write_text(json.dumps(warnings), encoding="utf-8")
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _planted(config: Config) -> Superposed | None:
    """The world whose activations are planted, where it is one."""
    world = config.model.world if isinstance(config.model, OfWorld) else None
    return world if isinstance(world, Superposed) else None


def _packed(
    config: Config, tokenizer: Tokenizer, passed_over: PassedOver, context: RunContext
) -> PackedTokens:
    return pack_corpus(
        config.corpus,
        tokenizer,
        n_context=config.n_context,
        n_tokens=config.n_tokens,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        max_document_tokens=config.max_document_tokens,
        keep_special=config.special_tokens == "kept",
        passed_over=passed_over,
        progress=context.progress,
    )


def _use_imported(config: Config, url: str, out: Path) -> Artifact:
    """The artifact of a store that others filled: it points there."""
    digests = outside_digests(config)
    store = ActivationStore.open(url)
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        draft.externally_checked = (STORE,)
        write_pointer(draft.path / STORE, url if "://" in url else Path(url).resolve().as_uri())
        _describe(draft, store, 0, 0.0)
        if "model_fingerprint" not in store.provenance and not store.is_of_any_module:
            note = f"the store does not say its model; taken for {name_of(config.model)} (model)"
            (draft.path / "warnings.json").write_text(json.dumps([note]), encoding="utf-8")
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _model_dtype(config: Config, device: str, draft: Draft) -> str:
    """What `auto` means here; a collection that was begun goes on in the dtype it was begun in."""
    if config.model_dtype != "auto":
        return config.model_dtype
    with suppress(OSError, UserError):
        begun = open_place(config.store_url or (draft.path / STORE).resolve())
        layout = parse_layout(begun.read("zarr.json"), where=begun.url)
        return str(layout.provenance["model_dtype"])
    return dtype_for(device)


def _place_of(config: Config, draft: Draft) -> str | Path:
    """The store's own place: in the artifact, or at `store_url`, and then a small file in the
    artifact points there."""
    if config.store_url is None:
        return (draft.path / STORE).resolve()
    write_pointer(draft.path / STORE, config.store_url)
    return config.store_url


def layout_of(
    config: Config, model: LanguageModel, sites: tuple[Site, ...], packed: PackedTokens
) -> StoreLayout:
    """The layout of the store that this collection fills."""
    return StoreLayout(
        sites=tuple(SiteLayout(name=site.name, width=model.width(site)) for site in sites),
        dtype=config.dtype,
        n_rows=packed.n_rows,
        n_context=config.n_context,
        shard_rows=config.shard_rows,
        chunk_rows=config.chunk_rows,
        validation_start=packed.validation_start,
        sink_ratio=config.sink_ratio,
        provenance={
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "tokenizer_fingerprint": model.tokenizer.fingerprint,
            "corpus": describe_corpus(config.corpus),
            "tokens": tokens_digest(packed),
            "batch_contexts": config.batch_contexts,
            "seed": config.seed,
        },
    )


def _collect(
    config: Config,
    context: RunContext,
    draft: Draft,
    model: LanguageModel,
    writer: StoreWriter,
    sites: tuple[Site, ...],
    packed: PackedTokens,
) -> int:
    """Collect the shards that are missing, here or on a cluster; returns how many rows that
    were."""
    table = packed.table()
    parts = [
        (shard, table.part(*writer.layout.rows_of_shard(shard)))
        for shard in writer.missing_shards()
    ]
    n_missing = sum(len(part) for _, part in parts)
    done = packed.n_rows - n_missing

    def rows_done(n: int) -> None:
        nonlocal done
        done += n
        context.progress("collect", done, packed.n_rows)

    def shard_done(shard: CollectedShard) -> None:
        record = {
            "shard": shard.shard,
            "rows": shard.n_rows,
            "rows_per_second": round(shard.n_rows / shard.seconds, 1),
        }
        draft.write_metrics(record)
        context.metrics(record)

    batch_rows = config.batch_contexts * config.n_context
    if context.scheduler is None:
        collect_shards(
            model,
            writer,
            parts,
            sites,
            batch_rows=batch_rows,
            rows_done=rows_done,
            shard_done=shard_done,
        )
        return n_missing
    choice = ModelChoice(
        spec=config.model,
        dtype=str(model.dtype).removeprefix("torch."),
        device=context.device,
        fingerprint=model.fingerprint,
    )
    for shard in collect_on_cluster(
        writer, parts, model=choice, sites=sites, batch_rows=batch_rows, machines=context
    ):
        rows_done(shard.n_rows)
        shard_done(shard)
    return n_missing


def _describe(draft: Draft, store: ActivationStore, n_collected: int, seconds: float) -> None:
    """The table of sites, the figure, and the headline numbers."""
    table = site_table(store)
    table.to_parquet(draft.path / "sites.parquet", index=False)
    (draft.path / "figures").mkdir(exist_ok=True)
    save(draw_norms(table), draft.path / "figures" / "norm_by_layer")
    size = sum(each.size for record in store.records for each in record.files.values())
    n_train, n_validation = len(store.kept_rows("train")), len(store.kept_rows("validation"))
    draft.summary.update(
        {
            "n_tokens": store.n_rows,
            "model_dtype": store.provenance.get("model_dtype", "unknown"),
            "n_documents": len(store.tokens().documents),
            "n_sites": len(store.sites),
            "n_train_rows": n_train,
            "n_validation_rows": n_validation,
            "gigabytes": round(size / 1e9, 3),
            "n_non_finite": int(table["n_non_finite"].sum()),
        }
    )
    if n_collected:
        draft.summary["tokens_per_second"] = round(n_collected / seconds, 1)
