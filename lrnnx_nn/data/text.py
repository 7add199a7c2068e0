# SPDX-License-Identifier: MIT
"""Text for language models: reading files, the split by position, and the vocabularies.

Vocabularies turn text into numbers and back: `ByteVocabulary`, `CharacterVocabulary` and
`TokenizerVocabulary` (any JSON file of the `tokenizers` package).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lrnnx_nn.data.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    TokenizerVocabulary,
    Vocabulary,
    is_lossless,
    load_vocabulary,
    make_vocabulary,
    save_vocabulary,
)

__all__ = [
    "ByteVocabulary",
    "CharacterVocabulary",
    "Texts",
    "TokenizerVocabulary",
    "Vocabulary",
    "is_lossless",
    "load_vocabulary",
    "make_vocabulary",
    "read_text",
    "save_vocabulary",
    "split_text",
    "text_files",
]

SUFFIXES = (".txt", ".text", ".md")
"""Of the files that are read where a folder is named."""


def text_files(sources: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that sources name: files themselves, and folders' text files in order.

    Args:
        sources: files, or folders, of which every ``.txt``, ``.text`` and ``.md`` file counts, the
            subfolders' included, sorted by path.

    Raises:
        ValueError: nothing named, a source that does not exist, or a folder without text files.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise ValueError("no text named, expected a file or a folder")
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            inside = [p for p in inside if p.is_file()]
            if not inside:
                raise ValueError(f"{path}: no {', '.join(SUFFIXES)} files in this folder")
            found.extend(inside)
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file")
    return found


def read_text(sources: str | Path | Sequence[str | Path]) -> str:
    """Read text files one after another, as they are; a byte order mark is dropped.

    Args:
        sources: see `text_files`.

    Raises:
        ValueError: no such file, not UTF-8 (the message says where), or no text in any of them.
    """
    files = text_files(sources)
    text = "".join(_read(path) for path in files)
    if not text:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: empty, no text to learn from")
    return text


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from error
    try:
        return data.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8, byte 0x{data[error.start]:02X} at offset {error.start} "
            f"({error.reason}); convert it first, as with iconv -t UTF-8"
        ) from error


class Texts(NamedTuple):
    """The parts of a text: to learn from, to choose by, and to judge once at the end."""

    train: str
    validation: str
    test: str


def split_text(text: str, validation: float = 0.05, test: float = 0.05) -> Texts:
    """Split a text by position: the last part is the test, the one before it validation.

    Args:
        text: the whole.
        validation: share of the characters, rounded down, and at least one; 0 leaves none.
        test: the same for the test part.

    Raises:
        ValueError: an empty text, shares outside 0 ... 1 or that leave nothing to learn from.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"split_text: {name} = {share}, expected 0 <= {name} < 1")
    if not text:
        raise ValueError("split_text: an empty text")
    held = [max(int(len(text) * share), 1) if share else 0 for share in (validation, test)]
    first = len(text) - sum(held)
    if first < 1:
        raise ValueError(
            f"split_text: {len(text)} characters, of which validation = {validation} and "
            f"test = {test} leave none to learn from"
        )
    return Texts(text[:first], text[first : first + held[0]], text[first + held[0] :])
