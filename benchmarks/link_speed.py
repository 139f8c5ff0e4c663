"""How fast and in how much memory dictionaries are linked. Prints one JSON line a measurement.

    python benchmarks/link_speed.py rate --n 16384 --d 2304          matching against the bare
    matrix product
    python benchmarks/link_speed.py graph --layers 30 --n 16384      a whole graph: links, nulls,
    tables; peak memory

`rate` alternates the two and gives the ratio of medians with its spread. `graph` writes random
dictionaries to a folder (half of each layer's directions carried on) and links them from there, as
the stage does.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from featureflow.sites import Site
from pipeline.flow.directions import directions_of
from pipeline.flow.link import link_dictionaries
from pipeline.flow.match import full_precision, match
from pipeline.flow.options import LinkOptions, Rotation
from pipeline.flow.tables import write_tables
from pipeline.saes import Saes
from sae import Sae, TopKActivation, save_sae


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rate", "graph"])
    parser.add_argument("--n", type=int, default=16384, help="latents of each dictionary")
    parser.add_argument("--d", type=int, default=576, help="dimension of the residual stream")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = rate(options) if options.what == "rate" else graph(options)
    facts = {
        "benchmark": f"link_{options.what}",
        **vars(options),
        "threads": torch.get_num_threads(),
        **found,
    }
    print(json.dumps(facts))


def rate(options: argparse.Namespace) -> dict[str, float | list[float]]:
    """Seconds of the matcher and of one matrix product of the same sizes, alternating."""
    generator = torch.Generator().manual_seed(0)
    source, target = (
        directions_of(
            torch.randn(options.n, options.d, generator=generator), name=name, device=options.device
        )
        for name in ("source", "target")
    )

    def product() -> None:
        with full_precision():
            for rows in target.unit.split(
                4096
            ):  # in stripes, so that 65k × 65k does not have to fit
                rows @ source.unit.T

    def both_ways() -> None:
        match(source, target, k=options.k)

    pairs = [
        (_seconds(product, options.device), _seconds(both_ways, options.device))
        for _ in range(options.repeats + 1)
    ]
    ratios = [plain / ours for plain, ours in pairs[1:]]
    return {
        "product_seconds": round(statistics.median(plain for plain, _ in pairs[1:]), 3),
        "match_seconds": round(statistics.median(ours for _, ours in pairs[1:]), 3),
        "ratio_of_product_rate": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def graph(options: argparse.Namespace) -> dict[str, float | int]:
    """Seconds and peak memory of a whole graph, tables included."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_dictionaries(root / "dictionaries", options)
        before = _peak_mib()
        started = time.perf_counter()
        links = link_dictionaries(
            Saes(root / "dictionaries", n_kept=0),
            options=LinkOptions(null=Rotation()),
            device=options.device,
        )
        linked = time.perf_counter() - started
        write_tables(
            root, {"nodes": links.nodes, "edges": links.edges, "pairs": links.pairs}, links.warnings
        )
        size = sum(path.stat().st_size for path in root.glob("*.parquet")) / 2**20
    return {
        "link_seconds": round(linked, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "n_pairs": len(links.pairs),
        "n_edges": len(links.edges),
        "peak_mib": round(_peak_mib()),
        "peak_mib_before": round(before),
        "tables_mib": round(size, 1),
    }


def _write_dictionaries(folder: Path, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(options.n, options.d, generator=generator)
    for layer in range(options.layers):
        fresh = torch.randn(options.n, options.d, generator=generator)
        keep = torch.rand(options.n, 1, generator=generator) < 0.5
        rows = torch.nn.functional.normalize(torch.where(keep, rows + 0.02 * fresh, fresh), dim=1)
        sae = Sae(
            W_enc=rows,
            b_enc=torch.zeros(options.n),
            W_dec=rows.clone(),
            b_dec=torch.zeros(options.d),
            b_in=torch.zeros(options.d),
            activation=TopKActivation(k=32),
        )
        save_sae(sae, folder / Site(layer, "resid_post").short)


def _seconds(work: Callable[[], None], device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
