"""Vocabularies and text files: there and back, and a clear message for everything that is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrnnx_nn import optional
from lrnnx_nn.data.text import (
    ByteVocabulary,
    CharacterVocabulary,
    TokenizerVocabulary,
    Vocabulary,
    is_lossless,
    load_vocabulary,
    make_vocabulary,
    read_text,
    save_vocabulary,
    split_text,
    text_files,
)

WORDS = "in the beginning was the word, and the word was with me. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer, made here."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([WORDS] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    made.save(str(path))
    return path


# --- vocabularies --------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_write_every_text(text: str) -> None:
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(text.encode())
    assert vocabulary.decode(ids) == text


def test_broken_utf8_is_shown_as_such() -> None:
    assert ByteVocabulary().decode([0x68, 0xC3, 0x69]) == "h\ufffdi"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_characters_are_numbered_in_order(text: str) -> None:
    vocabulary = CharacterVocabulary.from_text(text)
    assert vocabulary.characters == "".join(sorted(set(text)))
    assert vocabulary.size == len(set(text))
    assert vocabulary.encode(text).tolist() == [vocabulary.characters.index(c) for c in text]
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_an_unknown_character_is_an_error_or_a_token_by_choice() -> None:
    strict = CharacterVocabulary.from_text("abc")
    with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) at position 2 is not in the"):
        strict.encode("abé")
    with pytest.raises(ValueError, match="not in the vocabulary of 3 characters"):
        strict.encode("\U0010ffff")
    loose = CharacterVocabulary.from_text("abc", unknown=True)
    ids = loose.encode("aé\U0010ffffb")
    assert (loose.size, ids.tolist()) == (4, [0, 3, 3, 1])
    assert loose.decode(ids) == "a\ufffd\ufffdb"
    assert loose.unknown_bits(ids) == pytest.approx(2 * math.log2(0x110000 - 0x800 - 3))
    assert strict.unknown_bits(strict.encode("abc")) == 0.0
    assert not is_lossless(loose, "aé")
    assert is_lossless(loose, "abc")


@pytest.mark.parametrize("characters", ["", "aba"])
def test_bad_characters(characters: str) -> None:
    with pytest.raises(ValueError, match="expected at least one, and each once"):
        CharacterVocabulary(characters)


def test_a_tokenizer_of_the_tokenizers_package(tokenizer: Path) -> None:
    vocabulary = TokenizerVocabulary(tokenizer)
    ids = vocabulary.encode(WORDS + "größer 日本")
    assert ids.dtype == torch.int64
    assert len(ids) < len(WORDS)
    assert int(ids.max()) < vocabulary.size
    assert vocabulary.decode(ids) == WORDS + "größer 日本"
    assert is_lossless(vocabulary, WORDS)
    assert vocabulary.unknown_bits(ids) == 0.0


def test_a_tokenizer_that_loses_something(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    lower = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 7}, "[UNK]"))
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(tmp_path / "lower.json"))
    vocabulary = TokenizerVocabulary(tmp_path / "lower.json")
    assert vocabulary.size == 8  # numbers may have gaps
    assert not is_lossless(vocabulary, "A")


@pytest.mark.parametrize("name", ["byte", "char", "unknown", "tokenizer"])
def test_saved_and_loaded(name: str, tokenizer: Path, tmp_path: Path) -> None:
    made = make_vocabulary(
        {"unknown": "char", "tokenizer": tokenizer}.get(name, name), WORDS,
        unknown=name == "unknown",
    )  # fmt: skip
    assert isinstance(made, Vocabulary)
    save_vocabulary(tmp_path, made)
    tokenizer_kept = (tmp_path / "tokenizer.json").exists()
    assert tokenizer_kept is (name == "tokenizer")
    loaded = load_vocabulary(tmp_path)
    assert (loaded.kind, loaded.size) == (made.kind, made.size)
    assert (
        loaded.to_dict() == made.to_dict() == json.loads((tmp_path / "vocabulary.json").read_text())
    )
    torch.testing.assert_close(loaded.encode(WORDS), made.encode(WORDS))
    with pytest.raises(ValueError, match=f"token {made.size}, expected 0 ... {made.size - 1}"):
        loaded.decode([0, made.size])
    with pytest.raises(ValueError, match="token -1"):
        loaded.decode(torch.tensor([-1]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "not a readable JSON file"),
        ({}, "'kind' is missing, not a vocabulary"),
        ({"kind": "morse", "size": 2}, "kind 'morse', expected byte, char or tokenizer"),
        ({"kind": "byte", "size": 255}, "size 255, but the vocabulary has 256 tokens"),
        ({"kind": "char", "characters": "ab", "unknown": True, "size": 2}, "has 3 tokens"),
        ({"kind": "char", "characters": "ab", "size": 2}, "'unknown' is missing"),
        ({"kind": "char", "characters": ["a"], "unknown": False, "size": 1}, "expected a string"),
        ({"kind": "tokenizer", "size": 2}, r"tokenizer\.json: no such file"),
    ],
)
def test_damaged_vocabularies(values: Any, message: str, tmp_path: Path) -> None:
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(tmp_path)


def test_a_missing_package_names_the_pip_line(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(optional.MissingDependencyError, match=r'pip install "lrnnx-core\[demo\]"'):
        TokenizerVocabulary(tokenizer)


def test_vocabularies_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary\.json: no such file"):
        load_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"'word', expected byte, char or the \.json"):
        make_vocabulary("word", WORDS)
    with pytest.raises(ValueError, match="an unknown token is for the vocabulary char alone"):
        make_vocabulary("byte", WORDS, unknown=True)
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        make_vocabulary(tmp_path / "none.json", WORDS)
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"bad\.json: not a JSON file of the tokenizers package"):
        make_vocabulary(str(tmp_path / "bad.json"), WORDS)


# --- files ---------------------------------------------------------------------------------------


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"zwei\r\n")
    (tmp_path / "a.md").write_bytes("\ufeffeins\n".encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.TXT").write_bytes(b"three")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert read_text(tmp_path) == "eins\nzwei\r\nthree"
    assert read_text([tmp_path / "b.txt", str(tmp_path / "a.md")]) == "zwei\r\neins\n"
    assert [path.name for path in text_files(tmp_path)] == ["a.md", "b.txt", "c.TXT"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, no text to learn from"),
        (b"\xef\xbb\xbf", "empty, no text"),
        (b"abc\xe9def", r"text\.txt: not UTF-8, byte 0xE9 at offset 3"),
    ],
)
def test_bad_files(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "text.txt")


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"no \.txt, \.text, \.md files in this folder"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="no text named"):
        read_text([])


@given(
    st.text(min_size=1, max_size=300),
    st.sampled_from([0.0, 0.01, 0.2, 0.3]),
    st.sampled_from([0.0, 0.01, 0.2, 0.6]),
)
def test_parts_are_the_text_in_order(text: str, validation: float, test: float) -> None:
    held = [max(int(len(text) * share), 1) if share else 0 for share in (validation, test)]
    if sum(held) >= len(text):
        with pytest.raises(ValueError, match="leave none to learn from"):
            split_text(text, validation, test)
        return
    parts = split_text(text, validation, test)
    assert "".join(parts) == text
    assert parts.train
    assert [len(parts.validation), len(parts.test)] == held


def test_bad_splits() -> None:
    with pytest.raises(ValueError, match="an empty text"):
        split_text("")
    with pytest.raises(ValueError, match="test = 1, expected 0 <= test < 1"):
        split_text("abc", 0.1, 1)
    with pytest.raises(ValueError, match="leave none to learn from"):
        split_text("abcdefghij", 0.5, 0.5)
