"""Realised false-discovery rate and recall of links on planted dictionaries, siblings null beside
the rotation null, on the same plants.

    python -m benchmarks.link_rates      one JSON line a cell, then a Markdown table

The plants are those of tests/pipeline/flow/test_siblings.py: 768 sources, of 768 targets a share
is carried (turned to a cosine of 0.75 to 0.98) and the rest is new; noise 0.3 on both sides.
Nominal rate 5 %; all best links of all seeds are pooled.
"""

from __future__ import annotations

import argparse
import json

from pipeline.flow.options import Rotation, Siblings
from tests.pipeline.flow.conftest import dictionary
from tests.pipeline.flow.test_siblings import SPACES, rates

CARRIED = (0.5, 0.1)


def main() -> None:
    """Print every cell, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    lines = ["| space | carried | " + " | ".join(f"d = {d}" for d in options.dimensions) + " |"]
    lines.append("|---" * (len(options.dimensions) + 2) + "|")
    for name, space in SPACES.items():
        for carried in CARRIED:
            cells = [_cell(name, space, d, carried, options.seeds) for d in options.dimensions]
            lines.append(f"| {name} | {carried:.0%} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


def _cell(name: str, space: dict, d: int, carried: float, n_seeds: int) -> str:
    """`siblings: rate (recall); rotation: rate (recall)`."""
    found = {}
    for null in (Siblings(), Rotation()):
        false, recall = rates(dictionary, null, space, d=d, seeds=range(n_seeds), carried=carried)
        found[null.kind] = {"false_discovery_rate": round(false, 4), "recall": round(recall, 4)}
    print(json.dumps({"space": name, "d": d, "carried": carried} | found), flush=True)
    return "; ".join(
        f"{each['false_discovery_rate']:.3f} ({each['recall']:.2f})" for each in found.values()
    )


if __name__ == "__main__":
    main()
