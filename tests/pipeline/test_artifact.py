"""An artifact is complete or refused; what went wrong in between loses nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact import Artifact, canonical_json, digest_of
from sae.errors import UserError


@dataclass(frozen=True)
class Config:
    steps: int = 3
    path: Path = Path("a/b")


def make(out: Path, text: str = "hello", config: object = Config()) -> Artifact:
    with Artifact.create(out, kind="toy", schema=1, config=config, inputs={"above": "d1"}) as draft:
        (draft.path / "sub").mkdir(exist_ok=True)
        (draft.path / "sub" / "data.txt").write_text(text)
        draft.summary["n"] = 1
    return Artifact.open(out, kind="toy", schema=1)


def test_digest_is_the_sha256_of_the_canonical_json_worked_by_hand() -> None:
    text = '{"config":{"path":"a/b","steps":3},"inputs":{"above":"d1"},"kind":"toy","schema":1}'
    assert digest_of("toy", 1, Config(), {"above": "d1"}) == hashlib.sha256(text.encode()).hexdigest()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.booleans(), max_size=5))
def test_canonical_json_does_not_depend_on_order_and_reads_back(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(backwards)
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_refuses_what_json_lacks() -> None:
    with pytest.raises(TypeError):
        canonical_json({"f": object()})
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_created_artifact_opens_with_its_files_and_summary(tmp_path: Path) -> None:
    artifact = make(tmp_path / "toy")
    assert artifact.file("sub/data.txt").read_text() == "hello"
    assert artifact.summary == {"n": 1}
    assert artifact.digest == digest_of("toy", 1, Config(), {"above": "d1"})
    assert not (tmp_path / "toy.partial").exists()


def test_a_failure_leaves_the_previous_artifact_whole_and_the_draft_resumable(tmp_path: Path) -> None:
    make(tmp_path / "toy", "old")
    with (
        pytest.raises(RuntimeError),
        Artifact.create(tmp_path / "toy", kind="toy", schema=1, config=Config(steps=4), inputs={}) as draft,
    ):
        (draft.path / "half.txt").write_text("half")
        raise RuntimeError("killed")
    assert Artifact.open(tmp_path / "toy", kind="toy", schema=1).file("sub/data.txt").read_text() == "old"
    with Artifact.create(tmp_path / "toy", kind="toy", schema=1, config=Config(steps=4), inputs={}) as draft:
        assert (draft.path / "half.txt").read_text() == "half", "same digest: what was done is there"
    with Artifact.create(tmp_path / "toy", kind="toy", schema=1, config=Config(steps=5), inputs={}) as draft:
        assert not (draft.path / "half.txt").exists(), "another digest: swept"


def test_a_kill_between_the_two_renames_is_recovered(tmp_path: Path) -> None:
    make(tmp_path / "toy")
    (tmp_path / "toy").rename(tmp_path / "toy.old")
    assert Artifact.open(tmp_path / "toy", kind="toy", schema=1).file("sub/data.txt").read_text() == "hello"


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    artifact = make(tmp_path / "toy")
    (artifact.path / "sub" / "data.txt").unlink()
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["schema"] = 7
    manifest["files"]["../outside.txt"] = {"size": 1, "sha256": None}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        Artifact.open(artifact.path, kind="toy", schema=1, mend="make toy")
    text = str(caught.value)
    for expected in ("schema 7", "file missing", "leaves the artifact", "make toy"):
        assert expected in text


@pytest.mark.parametrize("damage", ["kind", "not json", "list", "no manifest", "nothing"])
def test_what_is_not_this_artifact_is_refused(tmp_path: Path, damage: str) -> None:
    artifact = make(tmp_path / "toy")
    manifest = artifact.path / "manifest.json"
    if damage == "kind":
        manifest.write_text(manifest.read_text().replace('"toy"', '"other"'))
    elif damage == "not json":
        manifest.write_text("{")
    elif damage == "list":
        manifest.write_text("[]")
    elif damage == "no manifest":
        manifest.unlink()
    path = artifact.path if damage != "nothing" else tmp_path / "absent"
    with pytest.raises(UserError):
        Artifact.open(path, kind="toy", schema=1)
    assert not Artifact.is_current(path, artifact.digest) or damage == "kind"


def test_truncation_is_found_on_opening_and_a_flipped_byte_by_verify(tmp_path: Path) -> None:
    artifact = make(tmp_path / "toy")
    data = artifact.path / "sub" / "data.txt"
    data.write_text("jello")
    reopened = Artifact.open(artifact.path, kind="toy", schema=1)
    with pytest.raises(UserError, match="damaged"):
        reopened.verify()
    data.write_text("hell")
    with pytest.raises(UserError, match="not a usable"):
        Artifact.open(artifact.path, kind="toy", schema=1)


def test_a_file_that_was_not_recorded_cannot_be_asked_for(tmp_path: Path) -> None:
    artifact = make(tmp_path / "toy")
    with pytest.raises(UserError):
        artifact.file("../../etc/passwd")


def test_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "file" / "toy")
