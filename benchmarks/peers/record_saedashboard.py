"""Run SAEDashboard on the case of tests/pipeline/describe/dashboard_case.py and record what it
finds for the tests.

    python -m benchmarks.peers.record_saedashboard FOLDER      writes
    tests/pipeline/describe/saedashboard.json

FOLDER holds the peers' environments (benchmarks/peers/make_environments.sh). Cost: some ten
seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.pipeline.describe.dashboard_case import RECORDED, Case, ask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = ask(Case(), options.peers, Path(scratch) / "case")
    lines = ",\n".join(json.dumps(feature) for feature in found.pop("features"))
    head = json.dumps(found, indent=1).removesuffix("\n}")
    RECORDED.write_text(f'{head},\n "features": [\n{lines}\n]}}\n', encoding="utf-8")
    print(RECORDED)


if __name__ == "__main__":
    main()
