"""How large an atlas of a real model's size gets, and what making it takes: folder, seconds, peak
memory.

    python -m benchmarks.atlas_sizes --artifacts artifacts/laptop --layers 30 --latents 16384
    --profile standard

1. dictionaries of the wanted size without training: the rows of layer l are the centred
   activations, at layer l, of the same `--latents` tokens of the store (no token twice before all
   have had their turn), tied, TopK of 32;
2. the flow graph between them, from directions alone, as `link_dictionaries` makes it;
3. the own steps of the stages describe and atlas over the store's real text, one process, one
   thread: survey, label and tables, then the pages; they are checked byte by byte at the end.

JSON lines: seconds and peak memory of every step, then the folder by part and in bytes a feature,
and what a site adds (`mb_a_site`; the rest is shared). `--layers 4` takes four layers spread over
the store's; `--site` instead only tells the parts of a finished site. Features are real directions
of real text but not trained ones, so their labels say nothing. `--folder` keeps everything, and a
run that was cut off goes on there; the seconds are then those of the rest. Cost: about a minute a
layer of 16,384; 75 MB a layer for dictionaries beside the atlas.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64

from benchmarks.__main__ import head
from data.store import ActivationStore, RowFilters
from featureflow.sites import Site, residual_sites
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.context import RunContext
from pipeline.describe.examples import PROFILES
from pipeline.describe.features import Features
from pipeline.describe.jobs import Config, Job, label_job, survey_job
from pipeline.flow.graph import FlowGraph
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import LinkOptions, Rotation
from pipeline.flow.tables import write_tables
from pipeline.run import STORE, Run
from pipeline.saes import Saes
from pipeline.site.build import Shown, build_site
from pipeline.site.pages import Job as PagesJob
from pipeline.site.shards import read_shard
from pipeline.site.validate import validate_atlas
from pipeline.stages.describe import finish, prepare, write_about
from sae import Sae, TopKActivation, save_sae

T = TypeVar("T")
PER_SITE = ("cards", "overview", "labels", "links", "search")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifacts", type=Path, help="folder with a collect artifact")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--profile", choices=tuple(PROFILES), default="standard")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    parser.add_argument("--site", type=Path, help="only tell the parts of this finished site")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(head()), flush=True)
    if options.site:
        print(json.dumps({"atlas": "given", **parts(options.site)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(options, options.folder or Path(scratch))


def make(options: argparse.Namespace, folder: Path) -> None:
    """Every step with its line; the sizes come last."""
    facts = {"layers": options.layers, "latents": options.latents, "profile": options.profile}

    def timed(step: str, work: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        record = {
            "step": step,
            **facts,
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "peak_mib": round(_peak_mib()),
        }
        print(json.dumps(record), flush=True)
        return made

    collect = Artifact.open(
        options.artifacts / "collect", kind="collect", schema=SCHEMAS["collect"]
    )
    store = Run.of({"collect": collect}).store
    sites = spread_sites(store, options.layers)
    made, graph = folder / f"dictionaries-{options.layers}", folder / f"graph-{options.layers}"
    timed("dictionaries", lambda: write_dictionaries(store, sites, options.latents, made))
    timed("link", lambda: link(made, graph))
    out = folder / options.profile
    config = Config(profile=options.profile, precision=options.precision)
    job = Job(
        store=collect.path / STORE, dictionaries=made, graph=graph, work=out / "work", config=config
    )
    model, names = Run.of({"collect": collect}).model, [site.short for site in sites]
    timed("prepare", lambda: prepare(job, model))
    timed("survey", lambda: [survey_job(job, name) for name in names])
    timed("label", lambda: [label_job(job, name) for name in names])
    timed("tables", lambda: finish(job, names, out))
    write_about(job, model, out)
    shutil.rmtree(job.work)
    shown = Shown(title="untrained dictionaries", described=config.model_dump())
    pages = PagesJob(features=out, graph=graph, site_folder=out / "site")
    opened = Features(out), FlowGraph.open(graph)
    timed("pages", lambda: build_site(*opened, shown, pages, RunContext(n_threads=1)))
    timed("validate", lambda: validate_atlas(out))
    tables = sum(path.stat().st_size for path in (out / "tables").iterdir())
    print(
        json.dumps(
            {
                "atlas": options.profile,
                **parts(pages.site_folder),
                "tables_mb": round(tables / 1e6, 1),
            }
        )
    )


def spread_sites(store: ActivationStore, n: int) -> list[Site]:
    """`n` of the store's residual sites, evenly spread."""
    sites = residual_sites(store.sites)
    if n > len(sites):
        raise SystemExit(f"the store has {len(sites)} layers")
    return [sites[i] for i in np.linspace(0, len(sites) - 1, n).round().astype(int)]


def write_dictionaries(
    store: ActivationStore, sites: list[Site], n_latents: int, folder: Path
) -> None:
    """A dictionary a site whose rows are the activations of the same tokens; those there already
    are kept."""
    rows = exemplar_rows(store, n_latents)
    for site in sites:
        if (folder / site.short / "sae.json").is_file():
            continue
        x = np.concatenate(
            [
                store.read(site, a, min(a + 8192, store.n_rows))[
                    rows[(rows >= a) & (rows < a + 8192)] - a
                ]
                for a in range(0, store.n_rows, 8192)
            ]
        )
        mean = torch.from_numpy(np.asarray(store.statistics(site).mean, dtype=np.float32))
        W = torch.nn.functional.normalize(torch.from_numpy(x) - mean, dim=1)
        zero = torch.zeros(n_latents)
        sae = Sae(
            W_enc=W,
            b_enc=zero,
            W_dec=W.clone(),
            b_dec=mean,
            b_in=mean,
            activation=TopKActivation(k=32),
        )
        save_sae(sae, folder / site.short)


def exemplar_rows(store: ActivationStore, n: int) -> Int64[np.ndarray, "latent"]:
    """Rows that training may read, the first occurrence of every token before any second;
    ascending."""
    kept = store.kept_rows("train", RowFilters())
    token = store.tokens().id[kept]
    order = np.argsort(token, kind="stable")
    first = np.searchsorted(token[order], token[order])
    occurrence = np.empty(len(kept), dtype=np.int64)
    occurrence[order] = np.arange(len(kept)) - first
    if len(kept) < n:
        raise SystemExit(f"the store has {len(kept)} rows for {n} latents")
    return np.sort(kept[np.lexsort((kept, occurrence))[:n]])


def link(dictionaries: Path, graph: Path) -> None:
    """The graph from directions alone, unless it is there."""
    if (graph / "edges.parquet").is_file():
        return
    found = link_dictionaries(Saes(dictionaries, n_kept=0), options=LinkOptions(null=Rotation()))
    graph.mkdir(parents=True, exist_ok=True)
    write_tables(
        graph, {"nodes": found.nodes, "edges": found.edges, "pairs": found.pairs}, found.warnings
    )


def parts(site: Path) -> dict[str, Any]:
    """The folder's size: whole, by part in MB, and bytes a feature."""
    manifest = read_shard(site, "manifest").json
    n = sum(entry["n_latents"] for entry in manifest["sites"])
    names = [entry["short"] for entry in manifest["sites"]]
    size: Counter[str] = Counter()
    files = [path for path in site.rglob("*") if path.is_file()]
    for path in files:
        where = path.relative_to(site).parts
        if where[0] == "sites":
            name = where[2].removesuffix(".js") if len(where) == 3 else where[2]
            size["links" if name == "flow" else name] += path.stat().st_size
        else:
            size[
                "app and manifest" if len(where) == 1 and where[0] != "vocab.js" else where[0]
            ] += path.stat().st_size
    total = sum(size.values())
    return {
        "features": n,
        "site_mb": round(total / 1e6, 1),
        "bytes_per_feature": round(total / n),
        "files": len(files),
        "mb_a_site": round(sum(size[name] for name in PER_SITE) / len(names) / 1e6, 2),
        **{
            f"{name.removesuffix('.js').replace(' ', '_')}_mb": round(b / 1e6, 1)
            for name, b in sorted(size.items())
        },
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
