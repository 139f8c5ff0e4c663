"""A dictionary, text and activations small enough for a test, which SAEDashboard and our atlas both
describe.

Left out on both sides: padding in the first six and last five places of each context, where
SAEDashboard shows no examples. Every context is a document of its own. `record_saedashboard`
(benchmarks/peers) writes what SAEDashboard finds to `saedashboard.json` beside this file, with a
checksum of these inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.store import FLAG_SPECIAL, DocumentRow, RowFilters, TokenTable
from pipeline.describe.columns import Columns, describe_site
from pipeline.describe.corpus import Corpus, corpus_of
from pipeline.describe.encoder import Encoder
from pipeline.describe.examples import PROFILES
from pipeline.describe.projection import Unembedding, project
from pipeline.describe.survey import SurveyOptions, survey_site
from pipeline.describe.vocabulary import Vocabulary
from sae import Sae
from sae.activations import TopKActivation
from sae.formats.saelens import write_saelens

RECORDED = Path(__file__).with_name("saedashboard.json")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "peers" / "dashboard_saedashboard.py"
_DIGITS = 5  # of activations, which SAEDashboard rounds to four
N_TOKENS, D, N_LATENTS, K = 60, 8, 12, 3
CONTEXTS, LENGTH, PADDED = 40, 32, (6, 5)
HOOK = "blocks.0.hook_resid_post"
WORDS = ("<pad>", *(f"word{i}" for i in range(1, N_TOKENS)))


class Case:
    """The inputs, drawn from one seed; the last latent is never active."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.tokens = rng.integers(1, N_TOKENS, size=(CONTEXTS, LENGTH))
        self.tokens[:, : PADDED[0]] = 0
        self.tokens[:, -PADDED[1] :] = 0
        embedding = rng.standard_normal((N_TOKENS, D))
        noise = rng.standard_normal((CONTEXTS, LENGTH, D))
        self.x = (embedding[self.tokens] + 0.3 * noise).astype(np.float32)
        rows = rng.standard_normal((N_LATENTS, D))
        self.W = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        self.gain = rng.uniform(0.5, 2.0, D).astype(np.float32)
        self.W_U = rng.standard_normal((N_TOKENS, D)).astype(np.float32)

    def checksum(self) -> str:
        arrays = (self.tokens, self.x, self.W, self.gain, self.W_U)
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
        ).hexdigest()

    def dictionary(self) -> Sae:
        W, zero = torch.from_numpy(self.W), torch.zeros(D)
        b_enc = torch.zeros(N_LATENTS)
        b_enc[-1] = -1e6
        return Sae(
            W_enc=W, b_enc=b_enc, W_dec=W, b_dec=zero, b_in=zero, activation=TopKActivation(k=K)
        )

    def corpus(self) -> Corpus:
        flat = self.tokens.ravel()
        table = TokenTable(
            id=flat.astype(np.uint32),
            document=np.repeat(np.arange(CONTEXTS), LENGTH).astype(np.uint32),
            position=np.tile(np.arange(LENGTH), CONTEXTS).astype(np.uint32),
            flags=np.where(flat == 0, FLAG_SPECIAL, 0).astype(np.uint8),
            documents=[DocumentRow(source="text") for _ in range(CONTEXTS)],
        )
        vocabulary = Vocabulary(tokens=[word.encode() for word in WORDS], special=frozenset({0}))
        return corpus_of(table, vocabulary, filters=RowFilters(), holdout=0.33, choice=0.17, seed=0)

    def unembedding(self) -> Unembedding:
        W_U, gain = torch.from_numpy(self.W_U), torch.from_numpy(self.gain)
        return Unembedding.of(W_U, gain, hidden=[0], precision="float32")

    def ours(self) -> tuple[Corpus, Columns]:
        """What the atlas finds: the columns of its cards."""
        corpus, sae, profile = self.corpus(), self.dictionary(), PROFILES["full"]
        options = SurveyOptions(
            n_top=profile.n_top, n_near=profile.n_near, n_uniform=profile.n_reservoir
        )
        x = self.x.reshape(-1, D)
        survey = survey_site(lambda a, b: x[a:b], Encoder.of(sae, "float32"), corpus, options)
        return corpus, describe_site(
            survey, sae, corpus, project(sae.W_dec, self.unembedding()), profile
        )

    def write(self, folder: Path) -> None:
        """The folder that benchmarks/peers/dashboard_saedashboard.py reads."""
        folder.mkdir(parents=True, exist_ok=True)
        write_saelens(self.dictionary(), folder / "sae", model_name="none", hook_name=HOOK)
        (folder / "cache").mkdir()
        torch.save({HOOK: torch.from_numpy(self.x)}, folder / "cache" / "model_activations_0.pt")
        folded = self.W_U * self.gain
        W_U = np.ascontiguousarray(
            (folded - folded.mean(axis=0)).T
        )  # as TransformerLens folds and centres it
        np.savez(folder / "arrays.npz", tokens=self.tokens, W_U=W_U, ignored=np.array([0]))
        (folder / "tokenizer").mkdir()
        model = {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(WORDS)},
            "unk_token": WORDS[0],
        }
        (folder / "tokenizer" / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "model": model})
        )
        facts = {
            "hook": HOOK,
            "contexts_per_file": CONTEXTS,
            "tokenizer": str(folder / "tokenizer"),
        }
        (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")


def ask(case: Case, peers: Path, folder: Path) -> dict[str, Any]:
    """What SAEDashboard finds on a case written to `folder`."""
    case.write(folder)
    python = peers / "saedashboard" / "bin" / "python"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [str(python), str(SCRIPT), str(folder), "--features", str(N_LATENTS)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=280,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    version = subprocess.run(
        [str(python), "-c", "import importlib.metadata as m; print(m.version('sae_dashboard'))"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout.strip()
    with np.load(folder / "found.npz") as arrays:
        features = [
            _feature({name: arrays[name][f] for name in arrays.files}) for f in range(N_LATENTS)
        ]
    return {"made_by": f"SAEDashboard {version}", "inputs": case.checksum(), "features": features}


def _feature(found: dict[str, np.ndarray]) -> dict[str, Any]:
    examples = zip(
        found["shown_context"], found["shown_position"], found["shown_value"], strict=True
    )
    return {
        "density": round(float(found["density"]), 7),
        "largest": round(float(found["largest"]), _DIGITS),
        "promotes": found["top_token"].tolist(),
        "suppresses": found["bottom_token"].tolist(),
        "top": [[int(c), int(p), round(float(v), _DIGITS)] for c, p, v in examples if c >= 0],
    }
