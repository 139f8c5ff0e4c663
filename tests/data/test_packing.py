"""Packing: contexts start with BOS, documents stay whole and in order, validation shares none; by a
slow reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.text.bundled import bundled_records
from data.text.corpus import BundledText
from data.text.documents import Document
from data.text.packing import PackedTokens, pack_corpus, pack_documents
from data.text.tokenizer import SEPARATOR, Tokenizer, byte_level_tokenizer
from data.tokens import FLAG_BOS, FLAG_SPECIAL
from featureflow.errors import UserError

TOKENIZER = byte_level_tokenizer(300, [record["text"] for record in bundled_records()])


def documents_of(texts: list[str]) -> list[Document]:
    return [
        Document(text=text, source="test", title=str(i), label="even" if i % 2 == 0 else "odd")
        for i, text in enumerate(texts)
    ]


def packed_slowly(
    texts: list[str], tokenizer: Tokenizer, n_context: int, n_contexts: int
) -> list[list[int]]:
    """One token at a time."""
    contexts: list[list[int]] = [[]]
    for text in dict.fromkeys(texts):
        for i, id_ in enumerate(tokenizer.encode(text)):
            if len(contexts[-1]) == n_context:
                contexts.append([])
            if i == 0 and contexts[-1]:
                contexts[-1].append(tokenizer.bos_id)
                if len(contexts[-1]) == n_context:
                    contexts.append([])
            if not contexts[-1]:
                contexts[-1].append(tokenizer.bos_id)
            contexts[-1].append(id_)
    return [context for context in contexts if len(context) == n_context][:n_contexts]


@settings(max_examples=60, deadline=None)
@example(texts=["a", "aa"], n_context=5)  # too little without its separator, enough with it
@given(
    texts=st.lists(
        st.text(alphabet="abc de\né雪", min_size=1, max_size=40), min_size=1, max_size=12
    ),
    n_context=st.integers(2, 9),
)
def test_contexts_are_those_of_the_slow_reference(texts: list[str], n_context: int) -> None:
    expected = packed_slowly(texts, TOKENIZER, n_context, 10**6)
    n_tokens = len(expected) * n_context
    if n_tokens == 0:
        return
    # the request is met up to the separators, which are not counted beforehand when the text runs
    # out
    try:
        packed = pack_documents(
            documents_of(texts), TOKENIZER, n_context=n_context, n_tokens=n_tokens, seed=None
        )
    except UserError:
        if len(expected) > len(texts):
            raise
        return
    assert packed.contexts().tolist() == expected[: packed.n_contexts]
    assert packed.n_contexts >= len(expected) - len(texts)
    assert packed.position.tolist() == list(range(n_context)) * packed.n_contexts
    assert (packed.flags[packed.position == 0] == FLAG_BOS | FLAG_SPECIAL).all()
    assert ((packed.flags & FLAG_SPECIAL > 0) == (packed.id == TOKENIZER.bos_id)).all()


def rows_of_document(packed: PackedTokens, number: int) -> list[int]:
    chosen = (packed.document == number) & (packed.flags == 0)
    return packed.id[chosen].tolist()


def test_every_row_belongs_to_the_document_whose_text_it_is() -> None:
    packed = pack_corpus(BundledText(), TOKENIZER, n_context=64, n_tokens=8000, seed=3)
    text_of = {record["title"]: record["text"] for record in bundled_records()}
    assert packed.n_rows == 8000
    for number, record in enumerate(packed.documents):
        ids = rows_of_document(packed, number)
        assert record.n_tokens == len(ids)
        assert TOKENIZER.encode(text_of[record.title])[: len(ids)] == ids
    assert packed.table().documents[0].label == packed.documents[0].label


def test_validation_shares_no_document_with_training() -> None:
    packed = pack_corpus(
        BundledText(), TOKENIZER, n_context=32, n_tokens=16_000, seed=0, validation_fraction=0.25
    )
    train = set(packed.document[: packed.validation_start].tolist())
    validation = set(packed.document[packed.validation_start :].tolist())
    assert packed.n_rows == 16_000
    assert packed.validation_start == 12_000
    assert not train & validation
    hashes = [record.sha256 for record in packed.documents]
    assert len(set(hashes)) == len(hashes)


def test_the_seed_decides_the_order_and_nothing_else_does() -> None:
    def ids(seed: int) -> np.ndarray:
        return pack_corpus(BundledText(), TOKENIZER, n_context=32, n_tokens=6400, seed=seed).id

    assert np.array_equal(ids(0), ids(0))
    assert not np.array_equal(ids(0), ids(1))
    texts = documents_of([f"number {i} of the texts" for i in range(30)])
    shuffled = pack_documents(texts, TOKENIZER, n_context=8, n_tokens=400, seed=1)
    again = pack_documents(texts, TOKENIZER, n_context=8, n_tokens=400, seed=1)
    in_order = pack_documents(texts, TOKENIZER, n_context=8, n_tokens=400, seed=None)
    assert np.array_equal(shuffled.id, again.id)
    assert [d.title for d in shuffled.documents] != [d.title for d in in_order.documents]


def test_a_repeated_text_is_used_once() -> None:
    packed = pack_documents(
        documents_of(["the same words again"] * 5), TOKENIZER, n_context=4, n_tokens=400, seed=None
    )
    assert len(packed.documents) == 1


def test_long_documents_are_cut_when_asked() -> None:
    texts = ["first document " * 30, "second document " * 30]
    packed = pack_documents(
        documents_of(texts),
        TOKENIZER,
        n_context=6,
        n_tokens=10**6,
        seed=None,
        max_document_tokens=11,
    )
    assert [rows_of_document(packed, number) for number in (0, 1)] == [
        TOKENIZER.encode(texts[0])[:11],
        TOKENIZER.encode(texts[1])[: packed.documents[1].n_tokens],
    ]
    assert 5 <= packed.documents[1].n_tokens <= 11


def test_a_special_token_written_in_the_text_is_plain_text() -> None:
    packed = pack_documents(
        documents_of(["a<|endoftext|>b" * 9]), TOKENIZER, n_context=4, n_tokens=40, seed=None
    )
    assert (packed.flags[packed.position > 0] == 0).all()


def test_special_tokens_in_the_text_are_kept_when_asked() -> None:
    documents = [Document(text="x" * 40 + SEPARATOR + "y" * 40, source="s")]
    options = {"n_context": 12, "n_tokens": 60, "seed": None}
    split = pack_documents(documents, TOKENIZER, **options)
    kept = pack_documents(documents, TOKENIZER, keep_special=True, **options)
    inside = kept.position > 0
    assert (kept.id[inside] == TOKENIZER.bos_id).sum() == 1
    assert not (split.id[split.position > 0] == TOKENIZER.bos_id).any()
    assert (kept.flags[inside & (kept.id == TOKENIZER.bos_id)] & FLAG_SPECIAL).all()


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    messages = ({"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"})
    document = Document(text="hi there yes", source="s", messages=messages)
    with pytest.raises(UserError, match="no chat template"):
        pack_documents([document], tokenizer, n_context=4, n_tokens=8, seed=None)
    tokenizer.hf.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    packed = pack_documents([document], tokenizer, n_context=8, n_tokens=8, seed=None)
    expected = tokenizer.encode("[user]hi there\n[assistant]yes\n")
    assert packed.id.tolist() == [tokenizer.bos_id, *expected[:7]]


def test_half_a_surrogate_pair_in_a_text_names_its_document() -> None:
    documents = [Document(text="bad \ud800", source="mine", title="the third")]
    with pytest.raises(UserError, match="the third"):
        pack_documents(documents, TOKENIZER, n_context=4, n_tokens=8, seed=None)


def test_too_little_text_says_how_much_is_missing() -> None:
    with pytest.raises(UserError, match="too little text") as error:
        pack_documents(documents_of(["short"]), TOKENIZER, n_context=64, n_tokens=640, seed=None)
    assert "at least 64 tokens" in str(error.value)
    with pytest.raises(UserError, match="no document is left for validation") as error:
        pack_documents(
            documents_of(["one long text. " * 50]),
            TOKENIZER,
            n_context=16,
            n_tokens=160,
            seed=None,
            validation_fraction=0.1,
        )
    n_tokens = len(TOKENIZER.encode("one long text. " * 50))
    assert f"1 documents of {n_tokens} tokens, the longest of {n_tokens}" in str(error.value)
    with pytest.raises(UserError, match="fewer tokens"):
        pack_documents(
            documents_of(["text " * 50]), TOKENIZER, n_context=16, n_tokens=10, seed=None
        )
    with pytest.raises(UserError, match="two tokens"):
        pack_documents(documents_of(["text " * 50]), TOKENIZER, n_context=1, n_tokens=10, seed=None)
