"""AxBench's concept detection with the run's SAEs, as far as it can be had offline, and an export
in AxBench's layout for its own scripts.

1. Concepts: the bundled topics. Their WordNet definitions ("Torte:" + "rich cake …") are the texts;
   those of other topics are the negatives. Detectors are fitted on one split, judged on another.
2. Detectors of a layer, as AxBench has them: the latent whose mean activation differs most
   (`GemmaScopeSAEMaxDiff`), the difference of means, a logistic probe; beside them a random living
   latent. The score of a text is the largest over its tokens.
3. Reported: AUROC by layer and detector, mean over topics. One layer is chosen on the fitted split.
4. `export`: metadata, training and evaluation data, the chosen latents as the pruned SAE that
   AxBench's `GemmaScopeSAE` reads, and their largest activations. Steering there needs a judge.

What it is not: AxBench's 500 concepts, its instructions and its judge need services. Its scores
are not comparable with these. Cost: one pass over about 800 short texts. Source: Wu et al. 2025,
AxBench (arXiv 2501.17148), repository stanfordnlp/axbench at e9b8cd4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from typing_extensions import Doc

from data.concepts.topics import Split, read_topics
from featureflow.errors import UserError
from featureflow.files import remove_folder, replace_folder
from featureflow.sites import Site
from featureflow.statistics import bootstrap_mean
from pipeline.findings import Finding
from pipeline.lenses.base import LensConfig
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.layers import Seed, spread
from pipeline.run import Run
from pipeline.training.reading import read_rows
from sae import Sae
from sae.activations import Relu, Threshold, TopKActivation
from sae.calibration import with_threshold
from steering.sequences import arriving, device_of, encoded, forward, in_batches, padded

TITLE = "AxBench's concept detection on topics that are had offline"
NEEDS = ("collect", "train")
FIT: Split = "discover"
REPORT: Split = "test"
_BATCH, _N_ROWS = 32, 8192


class Config(LensConfig):
    """How many texts, at how many layers."""

    n_layers: Annotated[int, Ge(1), Doc("residual sites, spread over the depth")] = 6
    n_fit: Annotated[int, Ge(2), Doc("definitions of each topic that detectors are fitted on")] = 32
    n_report: Annotated[int, Ge(2), Doc("definitions of each topic that are reported on")] = 24
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Text:
    """A definition: of which topic, what is given and how it goes on."""

    topic: str
    input: str
    output: str

    @property
    def whole(self) -> str:
        return f"{self.input} {self.output}"


def look(run: Run, config: Config) -> Finding:
    """AUROC by layer, detector and topic."""
    sites = spread(list(run.steering.saes), config.n_layers)
    fit, report = texts_of(FIT, config.n_fit), texts_of(REPORT, config.n_report)
    states = token_states(run, sites, [*fit, *report])
    rows: list[dict[str, Any]] = []
    for site in sites:
        run.context.progress(f"detect concepts at {site.short}", 0, 1)
        parts = states[site][: len(fit)], states[site][len(fit) :]
        rows += _of_site(run.saes[site], site, (fit, report), parts, config.seed)
    by_topic = pd.DataFrame(rows)
    summary = _summary(by_topic, config.seed)
    latents = summary[summary["detector"] == "SAE latent"].set_index("layer")
    chosen = int(latents["auroc_fit"].idxmax())
    headline: dict[str, Any] = {"layer": chosen, "n_topics": int(by_topic["topic"].nunique())}
    for row in summary[summary["layer"] == chosen].to_dict(orient="records"):
        headline[row["detector"].replace(" ", "_")] = round(float(row["auroc"]), 4)
    return Finding(
        tables={"detection": summary, "by_topic": by_topic},
        text=_text(headline, summary, config),
        headline=headline,
        figure=lambda: lines(summary, x="layer", line="detector", columns={"auroc": "AUROC"}),
    )


def texts_of(split: Split, n: int) -> list[Text]:
    """The first `n` definitions of every topic."""
    return [
        Text(
            topic=name,
            input=f"{each.word[:1].upper()}{each.word[1:]}:",
            output=f"{each.definition}.",
        )
        for name, topic in read_topics().items()
        for each in [d for d in topic.definitions if d.split == split][:n]
    ]


def token_states(
    run: Run, sites: Sequence[Site], texts: Sequence[Text]
) -> dict[Site, list[Float[Tensor, "token d_model"]]]:
    """Of every text the activations at its tokens, without the first."""
    model = run.steering.model
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for block in in_batches(texts, _BATCH):
        batch = padded([encoded(model, text.whole) for text in block], device=device_of(model))
        kept = batch.real & (batch.positions() > 0)
        with arriving(model, sites) as seen:
            forward(model, batch)
        for site in sites:
            found[site] += [h[k].float().cpu() for h, k in zip(seen[site], kept, strict=True)]
    return found


def export(run: Run, site: Site, out: Path, *, model_id: str, config: Config) -> list[Path]:
    """Write AxBench's files for one layer, all or none; returns their paths. Raises UserError for
    a folder that is there already and for a SAE whose activation AxBench has not."""
    if out.exists():
        raise UserError("there is something in the way", where=str(out), fix="choose another OUT")
    sae, theta = _with_thresholds(run, site)
    beside = out.with_name(f"{out.name}.partial")
    remove_folder(beside)
    fit, report = texts_of(FIT, config.n_fit), texts_of(REPORT, config.n_report)
    states = token_states(run, [site], fit)[site]
    topics, codes = list(read_topics()), [sae.encode(h) for h in states]
    latents = [_max_diff(codes, _labels(fit, topic)) for topic in topics]
    source = f"{site.layer}-featureflow-res-{sae.n_latents}"
    link = f"https://www.neuronpedia.org/{model_id}/{source}"
    concepts = [
        {
            "concept_id": k,
            "concept": topic,
            "ref": f"{link}/{latent}",
            "concept_genres_map": {topic: ["text"]},
        }
        for k, (topic, latent) in enumerate(zip(topics, latents, strict=True))
    ]
    for folder in ("generate", "inference", "train", "data"):
        (beside / folder).mkdir(parents=True)
    largest = {n: max(float(z[:, n].max()) for z in codes) for n in latents}
    weights = {
        "b_dec": sae.b_dec,
        "W_dec": sae.W_dec[latents],
        "W_enc": sae.W_enc[latents].T.contiguous(),
        "b_enc": (sae.b_enc - sae.W_enc @ sae.b_in)[latents],
        "threshold": theta[latents],
    }
    paths = {
        name: beside / name
        for name in (
            "generate/metadata.jsonl",
            "generate/train_data.parquet",
            "inference/latent_eval_data.parquet",
            "train/GemmaScopeSAE.pt",
            "train/config.json",
            f"data/{model_id}_{source}_max_activations.json",
        )
    }
    metadata, train, evaluation, weight_file, settings, most = paths.values()
    metadata.write_text("".join(json.dumps(each) + "\n" for each in concepts), encoding="utf-8")
    train_table(fit).to_parquet(train, index=False)
    evaluation_table(report, [f"{link}/{n}" for n in latents]).to_parquet(evaluation, index=False)
    torch.save({name: value.float().cpu() for name, value in weights.items()}, weight_file)
    settings.write_text(json.dumps({"model_name": run.model.name, "layer": site.layer}))
    most.write_text(json.dumps({str(n): round(value, 4) for n, value in largest.items()}))
    replace_folder(beside, out)
    return [out / name for name in paths]


def train_table(texts: Sequence[Text]) -> pd.DataFrame:
    """AxBench's training data: of every concept its own texts; those of others are shared
    negatives, concept −1."""
    topics = list(read_topics())
    rows = [_row(text, text.topic, "positive", topics.index(text.topic)) for text in texts]
    shared = [_row(text, "EEEEE", "negative", -1) for text in texts[:: len(topics)]]
    return pd.DataFrame([*shared, *rows])


def evaluation_table(texts: Sequence[Text], links: Sequence[str]) -> pd.DataFrame:
    """AxBench's evaluation data: of every concept its texts and as many of others."""
    rows = []
    for k, (topic, link) in enumerate(zip(read_topics(), links, strict=True)):
        own = [text for text in texts if text.topic == topic]
        rest = [text for text in texts if text.topic != topic]
        other = rest[:: max(1, len(rest) // len(own))][: len(own)]
        for category, part in (("positive", own), ("negative", other)):
            for text in part:
                more = {"sae_link": link, "sae_id": int(link.rsplit("/", 1)[1])}
                rows.append(_row(text, topic, category, k) | more)
    return pd.DataFrame(rows)


def _row(text: Text, concept: str, category: str, concept_id: int) -> dict[str, Any]:
    return {
        "input": text.input,
        "output": text.output,
        "output_concept": concept,
        "concept_genre": "text",
        "category": category,
        "dataset_category": "continuation",
        "concept_id": concept_id,
    }


def _of_site(
    sae: Sae,
    site: Site,
    texts: tuple[Sequence[Text], Sequence[Text]],
    states: tuple[list[Tensor], list[Tensor]],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """AUROC of every topic and detector, on the texts of the fit and on the others."""
    codes = tuple([sae.encode(h) for h in part] for part in states)
    means = torch.stack([h.mean(0) for h in states[0]])
    alive = np.flatnonzero(torch.stack([z.amax(0) for z in codes[0]]).amax(0).cpu().numpy() > 0)
    generator = np.random.default_rng([seed, site.layer])
    for topic in read_topics():
        labels = [_labels(part, topic) for part in texts]
        own = torch.from_numpy(labels[0])
        difference = means[own].mean(0) - means[~own].mean(0)
        detectors: dict[str, tuple[tuple[list[Tensor], ...], Callable[[Tensor], Tensor]]] = {
            "SAE latent": (codes, _column(_max_diff(codes[0], labels[0]))),
            "difference of means": (states, _along(difference)),
            "probe": (states, _along(_probe(means, labels[0]))),
            "random latent": (codes, _column(int(generator.choice(alive)))),
        }
        for name, (parts, read) in detectors.items():
            scores = [[float(read(text).max()) for text in part] for part in parts]
            aurocs = [float(roc_auc_score(y, s)) for y, s in zip(labels, scores, strict=True)]
            yield {
                "layer": site.layer,
                "topic": topic,
                "detector": name,
                "auroc_fit": aurocs[0],
                "auroc": aurocs[1],
            }


def _column(latent: int) -> Callable[[Tensor], Tensor]:
    return lambda z: z[:, latent]


def _along(direction: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: h @ direction


def _labels(texts: Sequence[Text], topic: str) -> np.ndarray:
    return np.array([text.topic == topic for text in texts])


def _max_diff(codes: Sequence[Float[Tensor, "token latent"]], own: np.ndarray) -> int:
    """The latent whose mean activation differs most between texts of the concept and others."""
    means = torch.stack([z.mean(0) for z in codes])
    mask = torch.from_numpy(own)
    return int((means[mask].mean(0) - means[~mask].mean(0)).argmax())


def _probe(means: Float[Tensor, "text d_model"], own: np.ndarray) -> Tensor:
    """The direction of a logistic regression on standardised means over tokens."""
    x = means.numpy()
    spread_ = x.std(0) + 1e-6
    fitted = LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3)
    fitted.fit((x - x.mean(0)) / spread_, own)
    return torch.from_numpy((fitted.coef_[0] / spread_).astype(np.float32))


def _with_thresholds(run: Run, site: Site) -> tuple[Sae, Float[Tensor, "latent"]]:
    """The SAE and its thresholds; a TopK gets those that leave k latents active on training
    rows."""
    sae = run.saes[site]
    if isinstance(sae.activation, TopKActivation):
        rows = run.store.kept_rows("train")[:_N_ROWS]
        sae = with_threshold(sae, read_rows(run.store, site, rows))
    if isinstance(sae.activation, Threshold):
        return sae, sae.activation.theta
    if isinstance(sae.activation, Relu):
        return sae, torch.zeros(sae.n_latents)
    raise UserError(
        f"AxBench reads ReLU with thresholds, {site.short} has the activation "
        f"{sae.activation.kind}",
        expected="relu, topk or threshold",
        found=sae.activation.kind,
    )


def _summary(by_topic: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (layer, detector), group in by_topic.groupby(["layer", "detector"], sort=False):
        found = bootstrap_mean(group["auroc"].tolist(), seed=seed)
        rows.append(
            {
                "layer": layer,
                "detector": detector,
                "auroc": found.mean,
                "auroc_low": found.low,
                "auroc_high": found.high,
                "auroc_fit": float(group["auroc_fit"].mean()),
            }
        )
    return pd.DataFrame(rows)


def _text(headline: dict[str, Any], summary: pd.DataFrame, config: Config) -> str:
    here = summary[summary["layer"] == headline["layer"]]
    said = "; ".join(
        f"{row.detector} {row.auroc:.2f} [{row.auroc_low:.2f}, {row.auroc_high:.2f}]"
        for row in here.itertuples()
    )
    return (
        f"AUROC of {headline['n_topics']} topics at layer {headline['layer']} (of those read the "
        f"best for SAE latents on the fitted texts): {said}. A text's score is the largest over "
        f"its tokens; {config.n_fit} definitions a topic to fit, {config.n_report} to report. "
        "These are not AxBench's concepts: its own numbers are not comparable. `featureflow steer "
        "axbench` writes the run's SAE in AxBench's layout."
    )
