"""An artifact is complete or refused; what went wrong in between loses nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.artifact
from featureflow.errors import UserError
from pipeline.artifact import Artifact, canonical_json, digest_of


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
    assert (
        digest_of("toy", 1, Config(), {"above": "d1"}) == hashlib.sha256(text.encode()).hexdigest()
    )


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.booleans(), max_size=5)
)
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


def test_a_failure_leaves_the_previous_artifact_whole_and_the_draft_resumable(
    tmp_path: Path,
) -> None:
    make(tmp_path / "toy", "old")
    with (
        pytest.raises(RuntimeError),
        Artifact.create(
            tmp_path / "toy", kind="toy", schema=1, config=Config(steps=4), inputs={}
        ) as draft,
    ):
        (draft.path / "half.txt").write_text("half")
        raise RuntimeError("killed")
    assert (
        Artifact.open(tmp_path / "toy", kind="toy", schema=1).file("sub/data.txt").read_text()
        == "old"
    )
    with Artifact.create(
        tmp_path / "toy", kind="toy", schema=1, config=Config(steps=4), inputs={}
    ) as draft:
        assert (draft.path / "half.txt").read_text() == "half", (
            "same digest: what was done is there"
        )
    with Artifact.create(
        tmp_path / "toy", kind="toy", schema=1, config=Config(steps=5), inputs={}
    ) as draft:
        assert not (draft.path / "half.txt").exists(), "another digest: swept"


def test_a_kill_between_the_two_renames_is_recovered(tmp_path: Path) -> None:
    make(tmp_path / "toy")
    (tmp_path / "toy").rename(tmp_path / "toy.old")
    assert (
        Artifact.open(tmp_path / "toy", kind="toy", schema=1).file("sub/data.txt").read_text()
        == "hello"
    )


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    artifact = make(tmp_path / "toy")
    (artifact.path / "sub" / "data.txt").unlink()
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["schema"] = 7
    manifest["files"]["../outside.txt"] = {"size": 1, "sha256": None}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        Artifact.open(artifact.path, kind="toy", schema=1, fix="make toy")
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


def killed(out: Path, *, text: str = "half") -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Artifact.create(
            out, kind="toy", schema=1, config=Config(), inputs={"above": "d1"}
        ) as draft,
    ):
        (draft.path / "half.txt").write_text(text)
        raise KeyboardInterrupt


def test_a_kill_just_before_the_rename_loses_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(new: Path, place: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.artifact, "replace_folder", kill)
        make(tmp_path / "toy", "long work")
    with Artifact.create(
        tmp_path / "toy", kind="toy", schema=1, config=Config(), inputs={"above": "d1"}
    ) as draft:
        assert (draft.path / "sub" / "data.txt").read_text() == "long work"
    artifact = Artifact.open(tmp_path / "toy", kind="toy", schema=1)
    assert sorted(artifact.files) == ["sub/data.txt"]
    assert not (artifact.path / ".digest").exists()


def test_two_processes_cannot_make_one_artifact_at_once(tmp_path: Path) -> None:
    other = (
        "from tests.pipeline.test_artifact import make; from pathlib import Path; import sys; "
        "make(Path(sys.argv[1]))"
    )
    with Artifact.create(
        tmp_path / "toy", kind="toy", schema=1, config=Config(steps=9), inputs={}
    ) as draft:
        (draft.path / "mine.txt").write_text("mine")
        done = subprocess.run(
            [sys.executable, "-c", other, str(tmp_path / "toy")],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
        assert "another process is making this artifact" in done.stderr
        assert (draft.path / "mine.txt").read_text() == "mine"
    make(tmp_path / "toy")


def test_the_manifest_says_which_other_code_a_resumed_artifact_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.artifact, "code_digest", lambda: "old")
    killed(tmp_path / "toy")
    monkeypatch.setattr(pipeline.artifact, "code_digest", lambda: "new")
    assert make(tmp_path / "toy").made_by["resumed_from"] == ["old"]
    killed(tmp_path / "toy")
    assert make(tmp_path / "toy").made_by["resumed_from"] == []


def test_a_discarded_draft_is_not_resumed(tmp_path: Path) -> None:
    killed(tmp_path / "toy")
    Artifact.discard_partial(tmp_path / "toy")
    assert sorted(make(tmp_path / "toy").files) == ["sub/data.txt"]


@pytest.mark.parametrize("files", [[], {"a": 3}, None])
def test_is_current_says_no_to_a_manifest_of_another_shape(tmp_path: Path, files: object) -> None:
    artifact = make(tmp_path / "toy")
    manifest = json.loads((artifact.path / "manifest.json").read_text()) | {"files": files}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    assert not Artifact.is_current(artifact.path, artifact.digest)
