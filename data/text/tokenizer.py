"""Text ⇄ token ids, exactly by bytes; and documents packed into contexts of one length.

Tokens. `Tokenizer` wraps a fast Hugging Face tokenizer. `token_bytes(id)` is what a token stands
for in UTF-8, found from the vocabulary piece: byte-level pieces (GPT-2, Llama 3, SmolLM2, Qwen) map
character by character to bytes, SentencePiece pieces (Gemma, Llama 2) map `▁` to a space and
`<0xE2>` to that byte. Decoding joins bytes first and only then reads UTF-8, so that a character
split over tokens survives.

Packing (`data/text/packing.py`) starts every context with `bos_id` and puts the same token between
documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from featureflow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes text adding nothing; decodes by bytes. `bos_id` starts contexts and separates
    documents."""

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self.hf = hf
        self.special_ids: frozenset[int] = frozenset(hf.all_special_ids) | frozenset(
            id_ for id_, token in hf.added_tokens_decoder.items() if token.special
        )
        self.bos_id: int = _bos_id(hf)

    @property
    def n_tokens(self) -> int:
        """Entries of the vocabulary, added tokens included (the model's own vocabulary may be
        padded beyond)."""
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. Special tokens written out in the text are read as plain
        text."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], *, keep_special: bool = False) -> list[list[int]]:
        """Ids of several texts, nothing added; faster than one by one. Special tokens written out
        in a text are plain text, or, with `keep_special`, those tokens."""
        if self._backend is None:
            split = {"add_special_tokens": False, "split_special_tokens": not keep_special}
            return [list(self.hf.encode(text, **split)) for text in texts]
        self._backend.encode_special_tokens = not keep_special
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        self._backend.encode_special_tokens = True
        return [encoding.ids for encoding in encoded]

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, name: str = "this model", reply: bool = True
    ) -> list[int]:
        """Ids of a conversation (role and content each) as the model's own template writes it, up
        to where the reply begins; without `reply`, to the end of the last message. Raises UserError
        without a template, and for what it refuses."""
        if not getattr(self.hf, "chat_template", None):
            raise UserError(
                f"{name} has no chat template",
                expected="an instruct model, whose tokenizer has a chat_template",
                fix="ask for a completion instead of a chat",
            )
        try:
            text = self.hf.apply_chat_template(
                [dict(each) for each in messages], add_generation_prompt=reply, tokenize=False
            )
        except Exception as error:  # templates are programs of their own
            raise UserError(
                "the model's chat template refuses these messages",
                expected="system (if any), then user and assistant in turn",
                found=f"{type(error).__name__}: {error}"[:300],
            ) from error
        return list(self.hf.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are written as they are named, broken UTF-8 as
        U+FFFD."""
        return b"".join(self.token_bytes(int(id_)) for id_ in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id_: int) -> bytes:
        """The UTF-8 bytes the token stands for. Raises UserError for an id outside the
        vocabulary."""
        if not 0 <= id_ < len(self._bytes):
            raise UserError(
                "no such token", found=str(id_), expected=f"an id from 0 to {len(self._bytes) - 1}"
            )
        return self._bytes[id_]

    def token_text(self, id_: int) -> str:
        """For showing: the token's text, with the bytes of an incomplete character as `\\xNN`."""
        return self.token_bytes(id_).decode("utf-8", errors="backslashreplace")

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(folder)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides which ids a text becomes."""
        hasher = hashlib.sha256()
        if self._backend is not None:
            hasher.update(json.dumps(json.loads(self._backend.to_str()), sort_keys=True).encode())
        else:
            hasher.update(json.dumps(self.hf.get_vocab(), sort_keys=True).encode())
        hasher.update(str(self.bos_id).encode())
        return hasher.hexdigest()

    @cached_property
    def _backend(self) -> Any:
        """A copy of the Rust tokenizer that reads special tokens in text as plain text; None for a
        slow tokenizer."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = RustTokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _bytes(self) -> list[bytes]:
        pieces = self.hf.convert_ids_to_tokens(list(range(self.n_tokens)))
        added = {id_: token.content for id_, token in self.hf.added_tokens_decoder.items()}
        to_bytes = _byte_level_piece if _is_byte_level(self.hf) else _sentencepiece_piece
        return [
            added[id_].encode() if id_ in added else b"" if piece is None else to_bytes(piece)
            for id_, piece in enumerate(pieces)
        ]


def _bos_id(hf: PreTrainedTokenizerBase) -> int:
    """What documents began with in pre-training: the BOS token, unless that is a marker of chat
    turns; then the separator `<|endoftext|>`, then EOS."""
    vocabulary = hf.get_vocab()
    candidates = [
        hf.bos_token if hf.bos_token and "im_start" not in hf.bos_token else None,
        SEPARATOR,
        hf.eos_token,
        hf.bos_token,
    ]
    for token in candidates:
        if token is not None and token in vocabulary:
            return int(vocabulary[token])
    raise UserError(
        "the tokenizer has neither a beginning-of-text nor an end-of-text token",
        where=Path(str(hf.name_or_path)).name,
        expected=f"bos_token, eos_token or {SEPARATOR} in tokenizer_config.json",
    )


def _is_byte_level(hf: PreTrainedTokenizerBase) -> bool:
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        return "Ġ" in "".join(list(hf.get_vocab())[:2000])
    steps = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([steps.get("pre_tokenizer"), steps.get("decoder")])


def _byte_level_piece(piece: str) -> bytes:
    if all(character in _BYTE_OF_CHARACTER for character in piece):
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    return piece.encode()


def _sentencepiece_piece(piece: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable alphabet for bytes: printable Latin-1 stands for itself, the others follow
    from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


_BYTE_OF_CHARACTER = _byte_of_character()


def byte_level_tokenizer(n_tokens: int, texts: Iterable[str]) -> Tokenizer:
    """A small byte-level BPE made here: id 0 is the separator, 1..256 the bytes, the rest merges
    learned from `texts` (fewer when the texts have fewer pairs). The same texts give the same
    tokenizer."""
    from transformers import PreTrainedTokenizerFast

    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=SEPARATOR, eos_token=SEPARATOR)
    )
