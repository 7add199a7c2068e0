# SPDX-License-Identifier: MIT
"""Vocabularies of language models: text to token numbers and back.

A run folder keeps its own as ``vocabulary.json``, and a tokenizer's file beside it as
``tokenizer.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lrnnx_nn.files import read_json, write_atomically, write_json
from lrnnx_nn.optional import require

VOCABULARY, TOKENIZER = "vocabulary.json", "tokenizer.json"

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CODE_POINTS = 0x110000 - 0x800  # Unicode without surrogates


@runtime_checkable
class Vocabulary(Protocol):
    """Text to numbers 0 ... size - 1 and back."""

    kind: str
    """``byte``, ``char`` or ``tokenizer``."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, (n,) int64."""
        ...

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of tokens."""
        ...

    def unknown_bits(self, ids: Tensor) -> float:
        """Return the bits that it takes to spell out what `encode` could not represent."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return what ``vocabulary.json`` holds."""
        ...


class ByteVocabulary:
    """The 256 bytes of UTF-8: every text can be written, and no text is unknown."""

    kind = "byte"
    size = 256

    def encode(self, text: str) -> Tensor:
        """Return the UTF-8 bytes of a text, (n,) int64."""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of bytes; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: a number outside 0 ... 255.
        """
        return bytes(_checked(ids, self.size, "ByteVocabulary")).decode(errors="replace")

    def unknown_bits(self, ids: Tensor) -> float:
        """Return 0: every byte has its own token."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what ``vocabulary.json`` holds."""
        return {"kind": self.kind, "size": self.size}


class CharacterVocabulary:
    """The characters of a text, one token each, in the order of their code points.

    Args:
        characters: the characters, all different; `from_text` collects them.
        unknown: add a last token for every other character; without it those are an error.

    Raises:
        ValueError: no characters, or one that comes twice.
    """

    kind = "char"

    def __init__(self, characters: str, *, unknown: bool = False) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError(
                f"CharacterVocabulary: {len(characters)} characters, {len(set(characters))} of "
                "them different; expected at least one, and each once"
            )
        self.characters, self.unknown = characters, unknown
        points = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
        self._table = np.full(int(points.max()) + 2, -1, dtype=np.int64)
        self._table[points] = np.arange(len(points))

    @classmethod
    def from_text(cls, text: str, *, unknown: bool = False) -> CharacterVocabulary:
        """Make the vocabulary of the characters that occur in a text."""
        return cls("".join(sorted(set(text))), unknown=unknown)

    @property
    def size(self) -> int:
        """Number of characters, and one more with ``unknown``."""
        return len(self.characters) + self.unknown

    def encode(self, text: str) -> Tensor:
        """Return the numbers of a text's characters, (n,) int64.

        Raises:
            ValueError: a character that the vocabulary lacks, without ``unknown``.
        """
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        absent = ids < 0
        if absent.any():
            if not self.unknown:
                place = int(absent.argmax())
                raise ValueError(
                    f"character {text[place]!r} (U+{ord(text[place]):04X}) at position {place} is "
                    f"not in the vocabulary of {len(self.characters)} characters; allow an unknown "
                    "token (--unknown-characters), or take bytes"
                )
            ids = np.where(absent, len(self.characters), ids)
        return torch.from_numpy(ids)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of tokens; the unknown one becomes U+FFFD.

        Raises:
            ValueError: a number outside 0 ... size - 1.
        """
        known = self.characters + (_REPLACEMENT if self.unknown else "")
        return "".join(known[i] for i in _checked(ids, self.size, "CharacterVocabulary"))

    def unknown_bits(self, ids: Tensor) -> float:
        """Return log2 of the number of other characters, times how many tokens are unknown."""
        if not self.unknown:
            return 0.0
        absent = int((ids == len(self.characters)).sum())
        return absent * math.log2(_CODE_POINTS - len(self.characters))

    def to_dict(self) -> dict[str, Any]:
        """Return what ``vocabulary.json`` holds."""
        return {
            "kind": self.kind,
            "size": self.size,
            "characters": self.characters,
            "unknown": self.unknown,
        }


class TokenizerVocabulary:
    """The tokens of a JSON file of the `tokenizers` package (``tokenizer.json``).

    No special tokens are added. Token numbers run to ``size - 1``; a file may leave gaps.

    Args:
        path: the file.

    Raises:
        ValueError: the file is missing, or is no tokenizer.
        MissingDependencyError: tokenizers is not installed.
    """

    kind = "tokenizer"

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        tokenizers = require("tokenizers")
        try:
            self.json = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"{path}: not a JSON file of the tokenizers package ({error})"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not numbers:
            raise ValueError(f"{path}: a tokenizer without tokens")
        self.size = max(numbers) + 1

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, (n,) int64, without special ones."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of tokens, special ones included.

        Raises:
            ValueError: a number outside 0 ... size - 1.
        """
        return self._tokenizer.decode(
            _checked(ids, self.size, "TokenizerVocabulary"), skip_special_tokens=False
        )

    def unknown_bits(self, ids: Tensor) -> float:
        """Return 0: what a tokenizer normalises away is not counted, see `is_lossless`."""
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what ``vocabulary.json`` holds."""
        return {"kind": self.kind, "size": self.size, "file": TOKENIZER}


def is_lossless(vocabulary: Vocabulary, text: str) -> bool:
    """Return whether the text can be read back from its tokens.

    Only then are bits per byte a code length. A tokenizer that lowers case or drops blanks, and an
    unknown token, lose something.
    """
    return vocabulary.decode(vocabulary.encode(text)) == text


def make_vocabulary(name: str | Path, text: str, *, unknown: bool = False) -> Vocabulary:
    """Return the vocabulary of that name.

    Args:
        name: ``byte``, ``char``, or the path of a tokenizer's JSON file.
        text: the training text, of whose characters ``char`` is made.
        unknown: for ``char``, a token for characters that the training text lacks.

    Raises:
        ValueError: ``unknown`` with another vocabulary, no such file, or a file of another kind.
        MissingDependencyError: tokenizers is not installed.
    """
    if unknown and name != "char":
        raise ValueError(f"an unknown token is for the vocabulary char alone, not for {name}")
    if name == "byte":
        return ByteVocabulary()
    if name == "char":
        return CharacterVocabulary.from_text(text, unknown=unknown)
    if Path(name).suffix.lower() != ".json":
        raise ValueError(
            f"vocabulary {str(name)!r}, expected byte, char or the .json file of a tokenizer"
        )
    return TokenizerVocabulary(name)


def save_vocabulary(folder: Path | str, vocabulary: Vocabulary) -> None:
    """Write ``vocabulary.json`` (and ``tokenizer.json``) into a folder, each atomically."""
    folder = Path(folder)
    if isinstance(vocabulary, TokenizerVocabulary):
        write_atomically(folder / TOKENIZER, vocabulary.json)
    write_json(folder / VOCABULARY, vocabulary.to_dict())


def load_vocabulary(folder: Path | str) -> Vocabulary:
    """Read what `save_vocabulary` wrote.

    Raises:
        ValueError: a missing or damaged file; the message names it.
        MissingDependencyError: tokenizers is not installed, and the vocabulary is one of its.
    """
    path = Path(folder) / VOCABULARY
    values = read_json(path)
    try:
        vocabulary = _from_dict(values, Path(folder))
        size = values["size"]
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing, not a vocabulary") from error
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    if vocabulary.size != size:
        raise ValueError(f"{path}: size {size}, but the vocabulary has {vocabulary.size} tokens")
    return vocabulary


def _from_dict(values: Mapping[str, Any], folder: Path) -> Vocabulary:
    kind = values["kind"]
    if kind == "byte":
        return ByteVocabulary()
    if kind == "char":
        if not isinstance(values["characters"], str) or not isinstance(values["unknown"], bool):
            raise ValueError(
                f"{folder / VOCABULARY}: characters and unknown, expected a string and a bool"
            )
        return CharacterVocabulary(values["characters"], unknown=values["unknown"])
    if kind == "tokenizer":
        return TokenizerVocabulary(folder / TOKENIZER)
    raise ValueError(f"{folder / VOCABULARY}: kind {kind!r}, expected byte, char or tokenizer")


def _checked(ids: Tensor | Sequence[int], size: int, where: str) -> list[int]:
    numbers: list[Any] = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else list(ids)
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < size:
            raise ValueError(f"{where}.decode: token {number}, expected 0 ... {size - 1}")
    return numbers
