"""The scorecard on a world whose dictionaries are the planted directions: everything is right by
construction, and what is broken on purpose is seen where it is broken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from data.worlds import Compiled
from data.worlds.compiling import directions_of
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.artifact import Artifact
from pipeline.cli import run_command
from pipeline.context import RunContext
from pipeline.lenses.world_score import Config, look
from pipeline.run import Run
from pipeline.stages import collect, link
from sae import Sae, Threshold, save_sae

WORLD = Compiled(length=16, max_depth=2)
CONTEXT = RunContext(n_threads=1)
KNOWN = tuple(variable.name for variable in WORLD.truth(torch.zeros(1, 16, dtype=int).numpy()))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = {"kind": "world", "world": {"kind": "compiled", "length": 16, "max_depth": 2}}
    raw = {"model": model, "corpus": model | {"n_documents": 600}, "n_context": 16}
    raw |= {"n_tokens": 8192, "shard_rows": 8192, "chunk_rows": 1024, "dtype": "float32"}
    raw |= {"model_dtype": "float32", "validation_fraction": 0.5}
    config = collect.Config.read(raw, "collect", [])
    assert config is not None
    out = tmp_path_factory.mktemp("world") / "collect"
    return collect.run(config, collect.Inputs(), out, CONTEXT)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A run whose SAEs are the world's own directions, but for `without` at the sites where the
    variable is known."""

    collected: Artifact
    folder: Path

    def run(self, *, without: str = "") -> Run:
        inputs = {"collect": self.collected.digest}
        out = self.folder / "train"
        with Artifact.create(out, kind="train", schema=1, config={}, inputs=inputs) as draft:
            for layer in range(6):
                place = draft.path / "dictionaries" / f"L{layer}"
                save_sae(_planted(layer, without), place)
        trained = Artifact.open(out, kind="train", schema=1)
        made = {"collect": self.collected, "train": trained}
        config = link.Config(n_null=500, functional_tokens=2048)
        linked = link.run(config, link.Inputs(**made), self.folder / "link", CONTEXT)
        return Run.of({**made, "link": linked}, context=CONTEXT)


def _planted(layer: int, without: str) -> Sae:
    directions = directions_of(WORLD)
    known = {v.name for v in WORLD.truth(torch.zeros(1, 16, dtype=int).numpy())}
    truth = {v.name: v for v in WORLD.truth(torch.zeros(1, 16, dtype=int).numpy())}
    rows = torch.cat(
        [directions[name] for name in sorted(known - {without}) if truth[name].known_at(layer)]
    )
    zero = torch.zeros(rows.shape[1])
    theta = torch.full((len(rows),), 0.5)
    return Sae(
        W_enc=rows,
        b_enc=torch.zeros(len(rows)),
        W_dec=rows,
        b_dec=zero,
        b_in=zero,
        activation=Threshold(theta=theta),
        metadata={"site": Site(layer, "resid_post").name},
    )


def test_planted_directions_are_scored_as_right(collected: Artifact, tmp_path: Path) -> None:
    found = look(Planted(collected=collected, folder=tmp_path).run(), Config(n_cases=24))
    facts = found.tables["facts"]
    assert set(facts["variable"]) == set(KNOWN)
    assert (facts["f1"] == 1.0).all()
    assert (facts["mcc"] > 0.999).all()
    assert found.headline["unexplained"] == 0
    assert found.headline["f1_permuted"] < 0.35
    assert found.tables["probes"]["right"].all()
    lives = found.tables["lives"]
    assert not lives["too_early"].any()
    second = facts[facts["variable"] == "second"]
    assert set(second["layer"]) == {3, 4, 5}
    steering = found.tables["steering"]
    assert (steering["legal"] == 1.0).all()
    assert (steering["control"] < 0.4).all()
    edits = found.tables["edits"].set_index(["site", "way"])
    assert (edits.loc[(slice(None), "exchange"), "own"] == 1.0).all()
    assert edits.loc[("L5", "remove"), "others"] == 0.0
    assert edits.loc[("L1", "exchange"), "downstream"] > edits.loc[("L1", "exchange"), "others"]
    false = found.tables["links"]["false_share"]
    assert (false <= 0.06).all()


def test_what_a_dictionary_lacks_is_seen_there_only(collected: Artifact, tmp_path: Path) -> None:
    run = Planted(collected=collected, folder=tmp_path).run(without="depth")
    found = look(run, Config(n_cases=0))
    f1 = found.tables["facts"].groupby("variable")["f1"].min()
    assert f1["depth"] < 0.9
    assert (f1.drop("depth") == 1.0).all()
    assert "edits" not in found.tables
    assert set(found.columns["means"].str.partition("=")[0]) >= {"token", "moved"}


def test_bad_input_is_told(collected: Artifact, tmp_path: Path) -> None:
    run = Planted(collected=collected, folder=tmp_path).run()
    with pytest.raises(UserError, match="no such variable") as caught:
        look(run, Config(variables=("depht",)))
    assert "depth" in str(caught.value)
    assert run_command(["world", "train", "compiled", "-q"]) == 2
    assert run_command(["world", "train", "nowhere", "-q"]) == 2


def test_a_run_of_no_world_finds_nothing(run: Run) -> None:
    found = look(run, Config())
    assert not found.headline
    assert isinstance(found.tables["dictionary"], pd.DataFrame)
    assert not len(found.tables["dictionary"])
