"""Which labelled concept does a feature mark token by token, and how many features does a concept
take?

1. Concepts are masks over held-out tokens: the user's own `spans`, and (`packaged`) token classes,
   words of fourteen topics, sources of the corpus. A line of the spans' JSONL is {"document": title
   or number, "start": 0, "end": 12, "label": "date"}, in characters of the document's text.
2. IoU of a feature's active tokens with a concept's; precision and recall beside it. Null: masks
   rolled along the text by at least a context, which keeps density and bursts; p against the null
   of all features with that concept, Benjamini and Hochberg.
3. A feature is a detector at q ≤ `rate` and IoU > 0.04. Baseline: as many random directions of the
   stream, each cut at the density of a feature.
4. Set IoU: a logistic probe of all features, fitted on half of the documents and judged on the
   others; F80: the fewest features (by weight) with 80 % of it.

Cost: one product of active tokens and masks a site and roll; one probe a concept. Sources: Bau et
al. 2017, Network Dissection (arXiv 1704.05796); Fong and Vedaldi 2018, Net2Vec (arXiv 1801.03454);
abstracts only: units beat rotated bases; several filters code a concept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.sparse as sparse
import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import SGDClassifier
from typing_extensions import Doc

from data.concepts.topics import read_topics
from data.tokens import FLAG_BOS, FLAG_PADDING, FLAG_SPECIAL, TokenTable
from featureflow.errors import Problem, UserError
from featureflow.files import digest_of_file
from featureflow.statistics import bootstrap_ratio, named, p_values, q_values, ranged
from pipeline.findings import Finding
from pipeline.flow.functional import encode_tokens
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import spread
from pipeline.run import Run

TITLE = "which labelled concept each feature marks token by token: packaged ones, or your own spans"
NEEDS = ("collect", "train")
LEAST, F_SHARE = 0.04, 0.8
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Config(Seeded):
    """Which concepts, where, and how strictly."""

    spans: Annotated[str, Doc("a JSONL file of your own labelled spans; empty for none")] = ""
    packaged: Annotated[bool, Doc("also look at the packaged concepts")] = True
    n_tokens: Annotated[int, Ge(16), Doc("held-out tokens")] = 12288
    n_sites: Annotated[int, Ge(1), Doc("sites, spread over the depth")] = 4
    n_rolls: Annotated[int, Ge(1), Doc("rolls of the masks that make the null")] = 4
    few: Annotated[int, Ge(1), Doc("tokens a concept needs")] = 20
    rate: Annotated[float, Gt(0), Lt(1), Doc("false-discovery rate of detectors")] = 0.05


def outside_digests(config: Config) -> dict[str, str]:
    """The file of spans: the result depends on it."""
    if not config.spans or not Path(config.spans).is_file():
        return {}
    return {"spans": digest_of_file(Path(config.spans))}


def look(run: Run, config: Config) -> Finding:
    """IoU of features and concepts, detectors, and how many features a concept takes. Raises
    UserError with the number of every wrong line of `spans`."""
    held_out = run.held_out(config.n_tokens)
    rows, tokens = held_out.rows, run.tokens
    masks = _packaged(run, rows) if config.packaged else {}
    if config.spans:
        masks |= read_spans(Path(config.spans), run, rows)
    names = [name for name, mask in masks.items() if mask.sum() >= config.few]
    if not names:
        raise UserError(
            "no concept has enough held-out tokens",
            expected=f"{config.few} or more",
            found=", ".join(f"{n} {int(m.sum())}" for n, m in masks.items()) or "no concepts",
            fix="label more of the held-out text, or raise n_tokens",
        )
    labels = np.stack([masks[name] for name in names], 1)
    document = tokens.document[rows].astype(np.int64)
    sites = spread(list(run.saes), config.n_sites)
    found, concepts = [], []
    for site in run.each("dissect", sites):
        codes = encode_tokens(run.saes[site], held_out(site)).codes.tocsr()
        x = torch.cat([*held_out(site)])
        table = dissected(codes != 0, labels, names, config)
        rotated = dissected(_random(codes, x, config.seed), labels, names, config)
        table.insert(0, "feature", [f"{site.short}/{i}" for i in table.pop("latent")])
        found.append(table)
        for place, name in enumerate(names):
            own = table[table["concept"] == name]
            best = own.sort_values("iou").iloc[-1]
            active = (codes[:, int(best["feature"].rpartition("/")[2])] != 0).toarray()[:, 0]
            row: dict[str, Any] = {"site": site.short, "concept": name, "feature": best["feature"]}
            row |= named("iou", _interval(active, labels[:, place], document, config.seed))
            row["detectors"] = int(own["detector"].sum())
            row["rotated"] = int(rotated[rotated["concept"] == name]["detector"].sum())
            concepts.append(row | set_iou(codes, labels[:, place], document, config.seed))
    features, table = pd.concat(found, ignore_index=True), pd.DataFrame(concepts)
    best = features[features["detector"]].sort_values("iou", ascending=False)
    best = best.drop_duplicates("feature")
    summary = table.groupby("site", sort=False, as_index=False).agg(
        unique=("detectors", lambda n: int((n > 0).sum())),
        rotated=("rotated", lambda n: int((n > 0).sum())),
        detectors=("detectors", "sum"),
        rotated_detectors=("rotated", "sum"),
    )
    return Finding(
        tables={"sites": summary, "concepts": table, "features": features[features["detector"]]},
        figure=lambda: bars(
            summary, by=["site"], columns={"unique": "concepts detected", "rotated": "by random"}
        ),
        text=_text(table, summary, len(names)),
        headline={
            "detectors": int(summary["detectors"].sum()),
            "random directions": int(summary["rotated_detectors"].sum()),
            "concepts": len(names),
        },
        columns=pd.DataFrame(
            {
                "feature": best["feature"],
                "marks tokens of": best["concept"] + best["iou"].map(" (IoU {:.2f})".format),
            }
        ),
    )


def dissected(
    active: sparse.spmatrix,
    labels: Bool[np.ndarray, "token concept"],
    names: list[str],
    config: Config,
) -> pd.DataFrame:
    """IoU of every active latent and concept, with q and whether it is a detector."""
    active = sparse.csr_matrix(active, dtype=np.float32)
    living = np.flatnonzero(np.asarray(active.sum(0)).ravel() > 0)
    active = active[:, living]
    own, precision, recall = overlap(active, labels)
    rng = np.random.default_rng(config.seed)
    least = min(128, len(labels) // 4)
    null = [
        overlap(active, np.roll(labels, int(rng.integers(least, len(labels) - least)), 0))[0]
        for _ in range(config.n_rolls)
    ]
    frames = []
    for place, name in enumerate(names):
        p = p_values(own[:, place], np.concatenate([each[:, place] for each in null]))
        q = q_values(p)
        frames.append(
            pd.DataFrame(
                {
                    "latent": living,
                    "concept": name,
                    "iou": own[:, place],
                    "precision": precision[:, place],
                    "recall": recall[:, place],
                    "q": q,
                    "detector": (q <= config.rate) & (own[:, place] > LEAST),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def overlap(
    active: sparse.csr_matrix, labels: Bool[np.ndarray, "token concept"]
) -> tuple[Float[np.ndarray, "latent concept"], np.ndarray, np.ndarray]:
    """IoU, precision and recall of every pair."""
    both = np.asarray(active.T @ labels.astype(np.float32))
    n, m = np.asarray(active.sum(0)).ravel()[:, None], labels.sum(0)[None]
    return both / np.maximum(n + m - both, 1), both / np.maximum(n, 1), both / np.maximum(m, 1)


def _random(codes: sparse.csr_matrix, x: torch.Tensor, seed: int) -> sparse.csr_matrix:
    """Random directions of the stream, each active on as many tokens as a latent."""
    count = np.asarray((codes != 0).sum(0)).ravel()
    count = count[count > 0]
    r = torch.randn(x.shape[1], len(count), generator=torch.Generator().manual_seed(seed))
    along = (x - x.mean(0)) @ r
    cut = along.sort(0, descending=True).values[count - 1, torch.arange(len(count))]
    return sparse.csr_matrix((along >= cut).numpy())


def set_iou(
    codes: sparse.csr_matrix,
    label: Bool[np.ndarray, "token"],
    document: Int[np.ndarray, "token"],
    seed: int,
) -> dict[str, Any]:
    """IoU of a probe of all latents on documents that it was not fitted on, and the fewest latents
    with 80 % of it."""
    names = np.random.default_rng(seed).permutation(np.unique(document))
    fit = np.isin(document, names[: len(names) // 2])
    if label[fit].sum() < 3 or label[~fit].sum() < 3:
        return {"set_iou": np.nan, "f80": np.nan}
    scale = np.sqrt(np.asarray(codes.multiply(codes).mean(0)).ravel()) + 1e-6
    x = sparse.csr_matrix(codes.multiply(1 / scale[None]))

    def judged(columns: np.ndarray) -> tuple[float, np.ndarray]:
        probe = SGDClassifier(loss="log_loss", alpha=1e-4, max_iter=10, tol=None, random_state=0)
        probe.fit(x[fit][:, columns], label[fit])
        score = probe.decision_function(x[:, columns])
        cuts = np.quantile(
            score[fit], 1 - label[fit].mean() * np.array([0.5, 0.75, 1, 1.5, 2]).clip(0, 1)
        )
        best = max(cuts, key=lambda cut: _iou(score[fit] > cut, label[fit]))
        return _iou(score[~fit] > best, label[~fit]), probe.coef_[0]

    whole, weight = judged(np.arange(x.shape[1]))
    order = np.argsort(-weight)
    f80 = next((k for k in SIZES if judged(order[:k])[0] >= F_SHARE * whole), np.nan)
    return {"set_iou": whole, "f80": f80}


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _interval(active: np.ndarray, label: np.ndarray, document: np.ndarray, seed: int) -> Any:
    _, unit = np.unique(document, return_inverse=True)
    both, either = np.bincount(unit, active & label), np.bincount(unit, active | label)
    return bootstrap_ratio(both.astype(float), either.astype(float), seed=seed, n=200)


def _packaged(run: Run, rows: Int[np.ndarray, "row"]) -> dict[str, np.ndarray]:
    """Token classes, words of topics, sources of documents."""
    tokens, text = run.tokens, run.model.tokenizer.token_text
    ids, place = np.unique(tokens.id[rows], return_inverse=True)
    words = [text(int(i)) for i in ids]
    bare = [word.strip() for word in words]
    classes = {
        "digits": [word.isdigit() for word in bare],
        "capitalised": [word[:1].isupper() for word in bare],
        "punctuation": [bool(word) and not any(c.isalnum() for c in word) for word in bare],
        "inside a word": [
            bool(b) and b[0].isalpha() and w == b for w, b in zip(words, bare, strict=True)
        ],
    }
    classes |= {
        f"word of {topic.name}": [word.lower() in topic.lexicon for word in bare]
        for topic in read_topics().values()
    }
    masks = {name: np.array(each, dtype=bool)[place] for name, each in classes.items()}
    source = np.array([row.source for row in tokens.documents] or [""])
    if len(np.unique(source)) > 1:
        of_row = source[tokens.document[rows]]
        masks |= {f"from {name}": of_row == name for name in np.unique(source)}
    return masks


def read_spans(path: Path, run: Run, rows: Int[np.ndarray, "row"]) -> dict[str, np.ndarray]:
    """Masks over rows by label. Raises UserError with the number of every wrong line."""
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), fix="name a JSONL file of spans")
    tokens = run.tokens
    titles: dict[str, int] = {}
    for number, each in enumerate(tokens.documents):
        titles.setdefault(each.title, number)
    problems, spans = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                spans.append(_span(line, titles, len(tokens.documents)))
            except ValueError as error:
                problems.append(Problem(what=str(error), where=f"{path}, line {number}"))
    if problems:
        raise UserError(
            "spans that cannot be used",
            problems=tuple(problems),
            fix='a line is {"document": title or number, "start": 0, "end": 12, "label": "date"}',
        )
    return masks_of(spans, tokens, rows, run.model.tokenizer.token_bytes)


def _span(line: str, titles: Mapping[str, int], n_documents: int) -> tuple[int, int, int, str]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg}") from error
    keys = ("document", "start", "end", "label")
    if lacking := [key for key in keys if not isinstance(found, dict) or key not in found]:
        raise ValueError(f"lacks {', '.join(lacking)}")
    document, start, end, label = (found[key] for key in keys)
    if isinstance(document, str):
        if document not in titles:
            raise ValueError(f"no document is called {document!r}")
        document = titles[document]
    if type(document) is not int or not 0 <= document < max(n_documents, 1):
        raise ValueError(f"document is a title or a number below {n_documents}, not {document!r}")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise ValueError(
            f"start and end are characters with 0 ≤ start < end, not {start!r}, {end!r}"
        )
    if not isinstance(label, str) or not label:
        raise ValueError(f"label is a text, not {label!r}")
    return document, start, end, label


def masks_of(
    spans: Sequence[tuple[int, int, int, str]],
    tokens: TokenTable,
    rows: Int[np.ndarray, "row"],
    token_bytes: Any,
) -> dict[str, np.ndarray]:
    """Rows whose token touches a span, by label. A document's text is that of its ordinary tokens,
    one after the other."""
    masks = {label: np.zeros(len(rows), dtype=bool) for *_, label in spans}
    flags = FLAG_BOS | FLAG_SPECIAL | FLAG_PADDING
    for document in {span[0] for span in spans}:
        own = np.flatnonzero((tokens.document == document) & ((tokens.flags & flags) == 0))
        sizes = [sum(byte & 0xC0 != 0x80 for byte in token_bytes(int(i))) for i in tokens.id[own]]
        end = np.cumsum(sizes)
        begin = end - sizes
        for _, start, stop, label in (span for span in spans if span[0] == document):
            inside = own[(begin < stop) & (end > start)]
            masks[label] |= np.isin(rows, inside)
    return masks


def _text(table: pd.DataFrame, summary: pd.DataFrame, n: int) -> str:
    said = [
        f"  {row.site}: {row.unique} of {n} concepts have a detector ({row.detectors} in all); "
        f"random directions: {row.rotated} ({row.rotated_detectors})"
        for row in summary.itertuples()
    ]
    best = table.sort_values("iou").drop_duplicates("concept", keep="last")
    each = [
        f"  {row.concept}: {row.feature}, IoU {ranged(row, 'iou')}, "
        f"all features {row.set_iou:.2f}, F80 {row.f80:.0f}"
        for row in best.itertuples()
    ]
    return (
        "What the papers saw (abstracts only): units detect more concepts than rotated bases; "
        "several filters code one concept.\n\nWhat this model shows:\n"
        + "\n".join(said)
        + "\nBest feature of each concept (95 % intervals over documents):\n"
        + "\n".join(each)
    )
