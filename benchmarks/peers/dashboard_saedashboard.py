"""SAEDashboard on given activations. Runs in SAEDashboard's environment, imports nothing of
featureflow.

    python dashboard_saedashboard.py CASE --features 256 --threads 1

CASE is a folder that benchmarks/atlas_peer.py makes: `sae/` in SAELens' format, `arrays.npz`
(tokens, unembedding, tokens left out) and `cache/`, the activations in the form of SAEDashboard's
own cache, so that it never runs the model. Only what would load the model from a hub is replaced: a
stand-in carries the unembedding, the tokenizer and the name of the hook. Prints one JSON line:
seconds of the run and of writing its page; `found.npz` holds what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.feature_data_generator import FeatureDataGenerator
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerFast


class StandIn(torch.nn.Module):
    """What SAEDashboard asks of the model when the activations are cached."""

    def __init__(self, hook: str, W_U: torch.Tensor, tokenizer: object) -> None:
        super().__init__()
        self.hook_dict = {hook: HookPoint()}
        self.W_U = W_U
        self.tokenizer = tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", type=Path)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = json.loads((options.case / "case.json").read_text())
    with np.load(options.case / "arrays.npz") as arrays:
        tokens, W_U = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["W_U"])
        ignored = {int(t) for t in arrays["ignored"]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(facts["tokenizer"]) / "tokenizer.json")
    )
    model = StandIn(facts["hook"], W_U, tokenizer)
    sae = SAE.load_from_disk(options.case / "sae")
    sae.fold_W_dec_norm = lambda: (
        None
    )  # its rows are of unit length; SAELens refuses the call for TopK
    config = SaeVisConfig(
        hook_point=facts["hook"],
        features=list(range(options.features)),
        minibatch_size_features=256,
        minibatch_size_tokens=facts["contexts_per_file"],
        ignore_tokens=ignored,
        cache_dir=options.case / "cache",
    )
    batch_s = time_of_batches()
    started = time.perf_counter()
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    ran = time.perf_counter()
    page = options.case / "dashboard.html"
    save_feature_centric_vis(data, filename=page)
    written = time.perf_counter()
    keep(data, options.case / "found.npz")
    record = {
        "run_s": round(ran - started, 2),
        "batch_s": round(sum(batch_s), 2),
        "page_s": round(written - ran, 2),
        "features": options.features,
        "bytes_per_feature": round(page.stat().st_size / options.features),
        "load_after": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(record), flush=True)


def time_of_batches() -> list[float]:
    """Filled with the seconds that each batch of features takes before its features are looked at
    one by one: reading the cache and encoding all tokens."""
    seconds: list[float] = []
    plain = FeatureDataGenerator.get_feature_data

    def timed(self: FeatureDataGenerator, *arguments: object) -> object:
        started = time.perf_counter()
        found = plain(self, *arguments)
        seconds.append(time.perf_counter() - started)
        return found

    FeatureDataGenerator.get_feature_data = timed
    return seconds


def keep(data: SaeVisData, path: Path) -> None:
    """Density (from the title, where alone it is; it is empty for a latent that never fired), the
    upper end of the histogram, the first group of examples (the strongest, both ends of a context
    left out) with the largest activation among them, and the logit tables."""
    features = [data.feature_data_dict[f] for f in sorted(data.feature_data_dict)]
    titles = [f.acts_histogram_data.title or "" for f in features]
    bars = [f.acts_histogram_data.bar_values for f in features]
    top = [f.sequence_data.seq_group_data[0].seq_data for f in features]
    width = max(map(len, top), default=0)
    np.savez(
        path,
        shown_context=padded([[s.original_index for s in group] for group in top], width, -1),
        shown_position=padded(
            [[s.qualifying_token_index for s in group] for group in top], width, -1
        ),
        shown_value=padded(
            [[s.feat_acts[len(s.feat_acts) // 2] for s in group] for group in top], width, 0.0
        ),
        density=np.array(
            [
                float(title.split("=")[1].strip(" %")) / 100 if "=" in title else 0.0
                for title in titles
            ]
        ),
        largest=np.array([x[-1] + (x[-1] - x[-2]) / 2 if len(x) > 1 else 0.0 for x in bars]),
        strongest_shown=np.array(
            [max((max(s.feat_acts) for s in group), default=0.0) for group in top]
        ),
        top_token=np.array([f.logits_table_data.top_token_ids for f in features]),
        top_logit=np.array([f.logits_table_data.top_logits for f in features]),
        bottom_token=np.array([f.logits_table_data.bottom_token_ids for f in features]),
    )


def padded(rows: list[list[float]], width: int, empty: float) -> np.ndarray:
    return np.array([row + [empty] * (width - len(row)) for row in rows])


if __name__ == "__main__":
    main()
