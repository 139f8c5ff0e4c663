"""How long does one dictionary's atlas take, ours against SAEDashboard, and do both say the same of
its features?

    python -m benchmarks.atlas_peer --artifacts artifacts/laptop --site L12 --peers FOLDER

1. make a case from stored artifacts: the dictionary in SAELens' format, the store's activations as
   SAEDashboard's cache (so that neither runs the model), tokens, and the unembedding as
   TransformerLens has it (norm folded in, centred);
2. `--rounds` times in turn, one thread each: ours, the stage's own two jobs for the site
   (statistics, examples, rules, labels, projection, shards, tables; every latent), and
   SAEDashboard's runner and page for `--features` latents, at most one batch of its default 256.
   Its time for all latents is that of encoding once a batch, and of each latent;
3. compare what both define alike: density, largest activation, promoted tokens.

JSON lines: each run, the ratio of each round, the agreement. FOLDER:
benchmarks/peers/make_environments.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from data.model.sources import folder_of
from data.model.spec import ModelSpec
from data.store import ActivationStore, RowFilters
from featureflow.progress import silent
from featureflow.sites import parse_site
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.describe.features import Features
from pipeline.describe.jobs import Config, Job, corpus_for, label_job, survey_job, unembedding_for
from pipeline.run import STORE, Run
from pipeline.saes import FOLDER
from pipeline.site.pages import Job as PagesJob
from pipeline.site.pages import write_site
from pipeline.stages.describe import finish, prepare
from sae import load_sae
from sae.formats.saelens import write_saelens

ROOT = Path(__file__).parents[1]
CONTEXTS_PER_FILE, PEER_BATCH = 64, 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--site", default="L12")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--ours", type=Path, help="only our side, on a case made before (used by itself)"
    )
    options = parser.parse_args()
    if options.ours:
        ours(options.ours, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        case = Path(scratch)
        facts = make_case(case, options)
        print(json.dumps(facts), flush=True)
        for number in range(options.rounds):
            mine = started(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.atlas_peer",
                    "--ours",
                    str(case),
                    *_passed(options),
                ]
            )
            peer = started(
                [
                    str(options.peers / "saedashboard" / "bin" / "python"),
                    str(ROOT / "benchmarks" / "peers" / "dashboard_saedashboard.py"),
                    str(case),
                    "--features",
                    str(options.features),
                ]
            )
            for name, record in (("featureflow", mine), ("saedashboard", peer)):
                print(json.dumps({"contestant": name, "round": number, **record}), flush=True)
            each = (peer["run_s"] - peer["batch_s"] + peer["page_s"]) / options.features
            theirs = -(-facts["latents"] // PEER_BATCH) * peer["batch_s"] + facts["latents"] * each
            print(
                json.dumps(
                    {
                        "round": number,
                        "saedashboard_all_latents_s": round(theirs, 1),
                        "times_faster": round(theirs / mine["seconds"], 1),
                    }
                ),
                flush=True,
            )
        print(json.dumps(agreement(case, options)), flush=True)


def make_case(case: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write what either side reads; returns what it is."""
    collect = Artifact.open(
        options.artifacts / "collect", kind="collect", schema=SCHEMAS["collect"]
    )
    store, site = ActivationStore.open(collect.path / "store.zarr"), parse_site(options.site)
    sae = load_sae(options.artifacts / "train" / "dictionaries" / options.site)
    job = job_of(case / "ours", options)
    prepare(job, Run.of({"collect": collect}).model)
    write_saelens(sae, case / "sae", model_name="smollm2-135m", hook_name=site.name)
    (case / "cache").mkdir()
    n, width = store.n_context, store.width(site)
    tokens = store.tokens().id.astype(np.int64).reshape(-1, n)
    for i, start in enumerate(range(0, len(tokens), CONTEXTS_PER_FILE)):
        stop = min(start + CONTEXTS_PER_FILE, len(tokens))
        x = torch.from_numpy(store.read(site, start * n, stop * n)).view(stop - start, n, width)
        torch.save({site.name: x}, case / "cache" / f"model_activations_{i}.pt")
    unembedding = unembedding_for(job)
    if unembedding is None:
        raise SystemExit("the model has no unembedding that reads the residual stream")
    left_out = np.unique(tokens.ravel()[~corpus_for(job).kept])
    np.savez(case / "arrays.npz", tokens=tokens, W_U=unembedding.matrix.T.numpy(), ignored=left_out)
    facts = {
        "hook": site.name,
        "contexts_per_file": CONTEXTS_PER_FILE,
        "tokenizer": str(_tokenizer_folder(collect)),
    }
    (case / "case.json").write_text(json.dumps(facts), encoding="utf-8")
    return {
        "site": options.site,
        "latents": sae.n_latents,
        "tokens": tokens.size,
        "features": options.features,
        "precision": options.precision,
    }


def job_of(folder: Path, options: argparse.Namespace) -> Job:
    """The describe stage's job for one site without a flow graph, with filters that both sides
    have."""
    own = folder / FOLDER
    if not own.is_dir():
        own.mkdir(parents=True)
        theirs = options.artifacts / "train" / FOLDER / options.site
        (own / options.site).symlink_to(theirs.resolve())
    config = Config(filters=RowFilters(drop_sinks=False), precision=options.precision)
    return Job(
        store=(options.artifacts / "collect" / STORE).resolve(),
        dictionaries=own,
        graph=None,
        work=folder / "work",
        config=config,
    )


def ours(case: Path, options: argparse.Namespace) -> None:
    """Our side, timed: both jobs of the describe stage, tables and pages."""
    torch.set_num_threads(1)
    folder, short = case / "ours", options.site
    job = job_of(folder, options)
    for earlier in (job.work / short, folder / "site", folder / "sites", folder / "tables"):
        shutil.rmtree(earlier, ignore_errors=True)
    corpus_for(job), unembedding_for(job)  # shared by all sites, like loading the model
    started = time.perf_counter()
    survey_job(job, short)
    surveyed = time.perf_counter()
    label_job(job, short)
    finish(job, [short], folder)
    pages = PagesJob(features=folder, graph=None, site_folder=folder / "site")
    _, numbers = write_site(pages, short)
    ended = time.perf_counter()
    size = sum(path.stat().st_size for path in pages.site_folder.rglob("*.js"))
    record = {
        "seconds": round(ended - started, 2),
        "survey_s": round(surveyed - started, 2),
        "write_s": round(ended - surveyed, 2),
        "bytes_per_feature": round(size / numbers["n_latents"]),
        "load_after": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(record), flush=True)


def agreement(case: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What both define alike, of the features that SAEDashboard described."""
    corpus = corpus_for(job_of(case / "ours", options))
    columns = Features(case / "ours").columns(options.site)
    with np.load(case / "found.npz") as arrays:
        theirs = {name: arrays[name] for name in arrays.files}
    n = options.features
    density = columns["count"][:n] / len(
        corpus
    )  # SAEDashboard divides by all tokens, those left out included
    largest, alive = columns["max"][:n], columns["count"][:n] > 0
    used = np.bincount(corpus.token, minlength=len(corpus.vocabulary)) > 0
    listed = [[t for t in tokens if t < len(used) and used[t]] for tokens in theirs["top_token"]]
    shared = [
        len(set(a) & set(b.tolist())) for a, b in zip(listed, columns["promotes"][:n], strict=True)
    ]
    return {
        "density_difference_max": float(np.abs(density - theirs["density"]).max()),
        "density_printed_to": 0.00001,
        "largest_relative_difference_median": float(
            np.median(np.abs(theirs["largest"] / largest - 1)[alive])
        ),
        "largest_relative_difference_max": float(
            np.abs(theirs["largest"] / largest - 1)[alive].max()
        ),
        "promoted_tokens_shared": round(sum(shared) / max(1, sum(map(len, listed))), 4),
    }


def started(command: list[str]) -> dict[str, Any]:
    """A contestant in a process of its own; its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if "saedashboard" in command[0]:
        environment.pop("PYTHONPATH")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _passed(options: argparse.Namespace) -> list[str]:
    return [
        "--artifacts",
        str(options.artifacts),
        "--site",
        options.site,
        "--precision",
        options.precision,
    ]


def _tokenizer_folder(collect: Artifact) -> Path:
    return folder_of(TypeAdapter(ModelSpec).validate_python(collect.config["model"]), silent)


if __name__ == "__main__":
    main()
