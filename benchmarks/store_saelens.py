"""Collection to disk against SAELens' `CacheActivationsRunner`: the same model, the same tokens,
the same sites.

    python -m benchmarks.store_saelens --peers FOLDER [--layers 14] [--contexts 64] [--pairs 5]
    [--threads 2]

SAELens runs in its own environment (`make peers`) in a process that has loaded the same weights in
the same dtype before the clock starts; it caches one site a run, so several sites cost it several
runs. Both stop after the layer. Ours stores what the model computes, bfloat16, with checksums and
statistics, flushed to disk; SAELens stores float32. Before anything is timed, the values both
stored are compared, in both dtypes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.__main__ import head
from benchmarks.store_collection import planted_tokens
from benchmarks.store_measure import compare
from data.model.language_model import LanguageModel
from data.model.sources import folder_of
from data.model.spec import Packaged
from data.store import ActivationStore, SiteLayout, StoreLayout, StoreWriter, TokenTable
from data.store.collection import collect_shards
from data.store.foreign import find_foreign
from featureflow.progress import silent
from featureflow.sites import Site, parse_site

HERE = Path(__file__).parent
_FLOAT32_ROUNDING = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True, help="the folder of `make peers`")
    parser.add_argument("--layers", type=int, nargs="+", default=[14])
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(head()), flush=True)
    folder = Path(tempfile.mkdtemp())
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    model = LanguageModel.open(Packaged())
    tokens = planted_tokens(options.contexts * options.length, options.length, model.d_vocab)
    np.save(folder / "tokens.npy", tokens.id.astype(np.int64).reshape(-1, options.length))
    sites = [parse_site(f"blocks.{layer}.hook_resid_post") for layer in options.layers]
    compare_values(options, folder, tokens, sites)
    with peer(options, folder, "bfloat16") as saelens:

        def theirs() -> None:
            for site in sites:
                saelens.cache(site, fresh(folder / "theirs" / site.name))

        def ours() -> None:
            collect(model, tokens, sites, fresh(folder / "ours"), options)

        compare(
            "collection to disk / SAELens' CacheActivationsRunner",
            control=theirs,
            candidate=ours,
            units=len(tokens) * len(sites),
            unit="tokens x sites",
            n_pairs=options.pairs,
            cpu_ratio=None,  # SAELens' seconds of CPU are another process'
            model=model.name,
            layers=options.layers,
            n_tokens=len(tokens),
            batch=f"{options.batch}x{options.length}",
            n_threads=options.threads,
            saelens=saelens.version,
        )


def compare_values(
    options: argparse.Namespace, folder: Path, tokens: TokenTable, sites: list[Site]
) -> None:
    """What both store, in float32 and in bfloat16: one JSON line a site. In float32 they must agree
    to its rounding; in bfloat16 each tool's distance from its own float32 values says how much of
    the difference is rounding."""
    stored: dict[tuple[str, str, Site], np.ndarray] = {}
    for dtype in ("float32", "bfloat16"):
        collect(
            LanguageModel.open(Packaged(), dtype=dtype),
            tokens,
            sites,
            fresh(folder / "ours"),
            options,
        )
        store = ActivationStore.open(folder / "ours")
        with peer(options, folder, dtype) as saelens:
            for site in sites:
                saelens.cache(site, fresh(folder / "theirs"))
                cached = find_foreign(folder / "theirs", {name_there(site): site.name})[0]
                stored["theirs", dtype, site] = np.asarray(cached.read(0, cached.n_rows))
                stored["ours", dtype, site] = store.read(site, 0, store.n_rows)
    for site in sites:
        apart = {
            f"{mine} {dtype} - {other} {other_dtype}": distance(
                stored[mine, dtype, site], stored[other, other_dtype, site]
            )
            for mine, dtype, other, other_dtype in (
                ("ours", "float32", "theirs", "float32"),
                ("ours", "bfloat16", "theirs", "bfloat16"),
                ("ours", "bfloat16", "ours", "float32"),
                ("theirs", "bfloat16", "theirs", "float32"),
            )
        }
        print(
            json.dumps({"stored values, median distance over norm": site.short, **apart}),
            flush=True,
        )
        if apart["ours float32 - theirs float32"] > _FLOAT32_ROUNDING:
            raise SystemExit(f"the two tools stored different activations at {site.short}")


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The median over rows of |one - other| / |other|."""
    return float(
        f"{np.median(np.linalg.norm(one - other, axis=1) / np.linalg.norm(other, axis=1)):.3g}"
    )


class SaeLens:
    """The process in SAELens' environment."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.version = self._answer()["ready"]

    def cache(self, site: Site, out: Path) -> None:
        """Cache one site; returns when it is on disk."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"site": name_there(site), "out": str(out)}) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("SAELens stopped; its messages are above")
        return json.loads(line)


@contextmanager
def peer(options: argparse.Namespace, folder: Path, dtype: str) -> Iterator[SaeLens]:
    command = [options.peers / "saelens" / "bin" / "python", HERE / "peers" / "collect_saelens.py"]
    model = folder_of(Packaged(), silent)
    choices = [
        "--model",
        model,
        "--tokens",
        folder / "tokens.npy",
        "--batch",
        options.batch,
        "--dtype",
        dtype,
    ]
    process = subprocess.Popen(
        [str(each) for each in [*command, *choices, "--threads", options.threads]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield SaeLens(process)
    finally:
        process.communicate()


def collect(
    model: LanguageModel,
    tokens: TokenTable,
    sites: list[Site],
    out: Path,
    options: argparse.Namespace,
) -> None:
    """A whole store in the model's dtype, from its metadata to its completion record."""
    layout = StoreLayout(
        sites=tuple(SiteLayout(name=site.name, width=model.width(site)) for site in sites),
        dtype="float32" if model.dtype == torch.float32 else "bfloat16",
        n_rows=len(tokens),
        n_context=options.length,
        shard_rows=-(-len(tokens) // 1024) * 1024,
        chunk_rows=1024,
    )
    writer = StoreWriter.create(out, layout)
    batch_rows = options.batch * options.length
    collect_shards(
        model, writer, [(0, tokens)], sites, batch_rows=batch_rows, rows_done=lambda n: None
    )
    writer.finish()


def name_there(site: Site) -> str:
    return f"model.layers.{site.layer}"


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


if __name__ == "__main__":
    main()
