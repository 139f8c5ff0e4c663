"""Tokens: decoding by bytes gives back every text, exactly, for byte-level and SentencePiece
vocabularies."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.text.bundled import bundled_records
from data.text.tokenizer import SEPARATOR, Tokenizer, byte_level_tokenizer
from featureflow.errors import UserError

TEXTS = [record["text"] for record in bundled_records()]
BYTE_LEVEL = byte_level_tokenizer(600, TEXTS)


def sentencepiece_like() -> Tokenizer:
    """A vocabulary in the form of Gemma and Llama 2: `▁` for a space, `<0xNN>` for bytes without a
    piece."""
    pieces = [
        "<unk>",
        "<bos>",
        "<eos>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "a",
        "t",
        "h",
        "e",
        "▁t",
        "he",
    ]
    merges = [("▁", "t"), ("h", "e")]
    backend = RustTokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )
    )


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_decoding_gives_back_any_text(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(id_) for id_ in ids) == text.encode()


SENTENCEPIECE = sentencepiece_like()


def test_every_byte_has_its_token() -> None:
    singles = {BYTE_LEVEL.token_bytes(id_) for id_ in range(BYTE_LEVEL.n_tokens)}
    assert {bytes([byte]) for byte in range(256)} <= singles


def test_a_character_split_over_tokens_is_shown_by_its_bytes() -> None:
    snow = BYTE_LEVEL.encode("雪")
    assert len(snow) == 3
    assert [BYTE_LEVEL.token_text(id_) for id_ in snow] == [r"\xe9", r"\x9b", r"\xaa"]
    assert BYTE_LEVEL.decode(snow[:2]) == "\ufffd"


def test_many_at_once_is_the_same_as_one_by_one() -> None:
    assert BYTE_LEVEL.encode_many(TEXTS[:5]) == [BYTE_LEVEL.encode(text) for text in TEXTS[:5]]


def test_a_special_token_in_a_text_is_text() -> None:
    assert BYTE_LEVEL.bos_id not in BYTE_LEVEL.encode(f"a{SEPARATOR}b")
    assert BYTE_LEVEL.decode([BYTE_LEVEL.bos_id]) == SEPARATOR


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        ("<s>", "</s>", "<s>"),  # Llama 2
        (
            "<|im_start|>",
            "<|im_end|>",
            SEPARATOR,
        ),  # SmolLM2-Instruct: BOS is a marker of chat turns
        (None, "<|im_end|>", SEPARATOR),  # Qwen
        (SEPARATOR, SEPARATOR, SEPARATOR),  # GPT-2
    ],
)
def test_contexts_begin_as_documents_did_in_training(
    bos: str | None, eos: str, expected: str
) -> None:
    vocabulary = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", SEPARATOR, "a"]
    backend = RustTokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="a")
    )
    tokenizer = Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    )
    assert tokenizer.bos_id == vocabulary.index(expected)


def test_a_tokenizer_without_a_beginning_is_refused() -> None:
    backend = RustTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="neither a beginning"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="no such token"):
        BYTE_LEVEL.token_bytes(BYTE_LEVEL.n_tokens)
    with pytest.raises(UserError, match="no such token"):
        BYTE_LEVEL.token_bytes(-1)


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from data.text.tokenizer import byte_level_tokenizer;"
        "from data.text.bundled import bundled_records as records;"
        "print(byte_level_tokenizer(600, [r['text'] for r in records()]).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == BYTE_LEVEL.fingerprint
    assert byte_level_tokenizer(500, TEXTS).fingerprint != BYTE_LEVEL.fingerprint
