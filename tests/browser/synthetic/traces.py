"""A planted trace: two supernodes that matter, one whose prediction is wrong, one that breaks the
text, a name and a token that are hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.browser.synthetic.shards import write_shard
from tests.browser.synthetic.world import HOSTILE_TEXTS, World

NAME = "planted-0a1b2c"


def write_traces(folder: Path, world: World) -> None:
    hostile = HOSTILE_TEXTS if world.sizes.hostile else ("calm",) * len(HOSTILE_TEXTS)
    write_shard(folder, f"traces/{NAME}", trace(hostile))


def entries(hostile: tuple[str, ...] = HOSTILE_TEXTS) -> list[dict[str, str]]:
    return [{"name": NAME, "prompt": f"The {hostile[0]}", "headline": f"y {hostile[1]}"}]


def trace(hostile: tuple[str, ...]) -> dict[str, Any]:
    def node(number: int, token: int, layers: tuple[int, int], real: float, **more: Any) -> dict:
        usual = {
            "id": number,
            "name": f"name {number} {hostile[number]}",
            "label": f"label {hostile[2]}",
            "promotes": [hostile[3], " Paris"],
            "flow": number,
            "token": token,
            "first_layer": layers[0],
            "last_layer": layers[1],
            "peak": f"L{layers[1]}",
            "predicted": real,
            "removed": real,
            "control": 0.1,
            "kl": 0.5,
            "top": [[hostile[4], 0.25], [" London", 0.125]],
            "differs": False,
            "breaks": False,
            "doses": [[0.0, 4.0 - real], [0.5, 4.0 - real / 2], [1.0, 4.0], [2.0, 4.0 + real]],
            "members": [{"feature": f"L{k}/30", "z": 2.0, "score": real / 2} for k in layers],
            "heads": [
                {"layer": 1, "head": 3, "part": 0.75, "source": 1, "source_part": 0.5,
                 "heads": 0.8, "mlps": 0.4}
            ],
        }  # fmt: skip
        return usual | more

    return {
        "version": 1,
        "prompt": f"The {hostile[0]}",
        "chat": False,
        "tokens": [0, 5, 6, 7],
        "pieces": ["<s>", "The", hostile[0], " is"],
        "target": {
            "answer": {"id": 1, "text": " Paris", "probability": 0.8},
            "foil": {"id": 2, "text": hostile[5], "probability": 0.01},
        },
        "y": 4.0,
        "top": [[" Paris", 0.8], [hostile[6], 0.05]],
        "cuts": ["L0", "L2", "L4"],
        "options": {"n_shown": 3},
        "n_groups": 20,
        "share_removed": 0.5,
        "supernodes": [
            node(0, 2, (0, 2), 3.0),
            node(1, 3, (2, 4), 2.0, predicted=0.25, differs=True),
            node(2, 2, (0, 4), -1.0, breaks=True),
            node(3, 1, (0, 0), 0.5),
        ],
        "edges": [
            {"source": 0, "target": 1, "predicted": 0.5, "removed": 1.5, "drawn": True},
            {"source": 3, "target": 0, "predicted": None, "removed": 0.25, "drawn": False},
        ],
        "rest": [
            {"cut": cut, "kind": "error", "score": [None, 0.1, -0.4, 0.2]}
            for cut in ("L0", "L2", "L4")
        ]
        + [{"cut": "L0", "kind": "sink", "score": [1.0, None, None, None]}],
        "checks": [{"check": f"identity {hostile[7]}", "value": 1e-5, "note": hostile[8]}],
        "flip": {
            "supernodes": [0, 2],
            "factors": [0.0, 2.0],
            "flips": True,
            "y": -1.0,
            "p_answer": 0.1,
            "p_foil": 0.6,
            "kl_rest": 0.2,
            "kl_rest_largest": 0.4,
            "random_flips": 0.05,
            "n_tried": 70,
        },
    }
