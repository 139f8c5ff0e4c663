"""A file is the old one or the new one; a folder is replaced by a rename that survives a kill."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from featureflow.files import (
    digest_of_file,
    recover_interrupted_replace,
    replace_folder,
    write_text_atomically,
    written_atomically,
)


def test_an_exception_leaves_the_earlier_file_and_nothing_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "file.txt"
    write_text_atomically(place, "earlier")
    with pytest.raises(RuntimeError), written_atomically(place) as beside:
        beside.write_text("half")
        assert place.read_text() == "earlier"
        raise RuntimeError
    assert place.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [place]
    assert digest_of_file(place) == hashlib.sha256(b"earlier").hexdigest()


def test_a_folder_is_replaced_whole_and_a_link_to_one_is_not_followed(tmp_path: Path) -> None:
    shared, new, place = tmp_path / "shared", tmp_path / "new", tmp_path / "place"
    for folder in (shared, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    place.symlink_to(shared, target_is_directory=True)
    replace_folder(new, place)
    assert (place / "name").read_text() == "new"
    assert (shared / "name").read_text() == "shared"
    assert not (tmp_path / "place.old").exists()


def test_a_kill_between_the_two_renames_is_put_right(tmp_path: Path) -> None:
    old, place = tmp_path / "place.old", tmp_path / "place"
    old.mkdir()
    recover_interrupted_replace(place)
    assert place.is_dir()
    assert not old.exists()
