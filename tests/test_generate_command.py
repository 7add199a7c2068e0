"""`lrnnx generate`: text as it comes, exactly the model's, and one line for what is wrong."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.architectures import Classifier, ClassifierConfig
from lrnnx_nn.cli.main import main
from lrnnx_nn.data.text import ByteVocabulary, CharacterVocabulary, save_vocabulary
from lrnnx_nn.generation import generate

pytest.importorskip("safetensors")
LETTERS = CharacterVocabulary("\n abcdeé€")
WINDOW = 6


def model_of(size: int, *types: str, **options: Any) -> LRNNLMHeadModel:
    torch.manual_seed(0)
    model = LRNNLMHeadModel(8, 4, len(types), size, types, tie_embeddings=False, **options)
    for table in (model.embedding, model.head):
        nn.init.normal_(table.weight, std=0.7)  # pyright: ignore[reportOptionalMemberAccess]
    return model.eval()


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LRNNLMHeadModel]:
    """Return the folder of a model of characters with a window of attention, and the model."""
    folder = tmp_path_factory.mktemp("letters")
    model = model_of(LETTERS.size, "s5", "attn", mixer_kwargs={"attn": {"window": WINDOW}})
    model.save_pretrained(folder)
    save_vocabulary(folder, LETTERS)
    return str(folder), model


@pytest.fixture(scope="module")
def raw_bytes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bytes")
    model_of(256, "s5").save_pretrained(folder)
    save_vocabulary(folder, ByteVocabulary())
    return str(folder)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    assert main(["generate", *arguments]) == 0
    out = capsys.readouterr()
    return out.out, out.err


def test_the_text_is_what_generate_gives(
    letters: tuple[str, LRNNLMHeadModel], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = letters
    options: dict[str, Any] = {
        "temperature": 0.8, "top_k": 7, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1,
    }  # fmt: skip
    words = [w for k, v in options.items() for w in ("--" + k.replace("_", "-"), str(v))]
    ids = LETTERS.encode("abc")
    want = generate(model, ids, 30, seed=4, stop_tokens=LETTERS.encode("€").tolist(), **options)
    text = LETTERS.decode(want.tokens)
    run = [folder, "--prompt", "abc", "--tokens", "30", "--seed", "4", "--stop", "€"]
    out, err = said(capsys, *run, *words)
    assert out == text + ("" if text.endswith("\n") else "\n")
    assert err == ""
    assert said(capsys, *run, *words, "--echo", "--prefill-chunk", "2")[0] == "abc" + out
    changed = {"temperature": 3.0, "top_k": 1, "top_p": 0.05, "min_p": 0.9, "repetition_penalty": 9}
    for name, value in changed.items():  # each option reaches it
        then = generate(model, ids, 30, seed=4, **{**options, name: value})
        flag = "--" + name.replace("_", "-")
        got, _ = said(capsys, *run[:-2], *words, flag, str(value))
        assert got.removesuffix("\n") == LETTERS.decode(then.tokens).removesuffix("\n")


def test_a_stop_ends_the_text(
    letters: tuple[str, LRNNLMHeadModel], capsys: pytest.CaptureFixture[str]
) -> None:
    stops = [w for c in "abcd" for w in ("--stop", c)]
    out, _ = said(capsys, letters[0], "--prompt", "a", "--tokens", "500", "--seed", "1", *stops)
    text = out.rstrip("\n")
    assert text[-1] in "abcd"
    assert not set(text[:-1]) & set("abcd")


def test_prompts_from_a_file_and_from_standard_input(
    letters: tuple[str, LRNNLMHeadModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = [letters[0], "--tokens", "20", "--temperature", "0"]
    want = said(capsys, *run, "--prompt", "abé\n")
    file = tmp_path / "prompt.txt"
    file.write_text("abé\n", encoding="utf-8")
    assert said(capsys, *run, "--prompt-file", str(file)) == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("abé\n".encode())))
    assert said(capsys, *run, "--prompt-file", "-") == want


def test_the_seed_that_was_taken_is_told(
    letters: tuple[str, LRNNLMHeadModel], capsys: pytest.CaptureFixture[str]
) -> None:
    run = [letters[0], "--prompt", "a", "--tokens", "30"]
    out, err = said(capsys, *run)
    assert err.startswith("lrnnx: note: --seed ")
    assert said(capsys, *run, "--seed", err.split()[3]) == (out, "")
    assert said(capsys, *run, "--temperature", "0")[1] == ""


def test_a_prompt_longer_than_the_window_is_noted(
    letters: tuple[str, LRNNLMHeadModel], capsys: pytest.CaptureFixture[str]
) -> None:
    run = [letters[0], "--tokens", "2", "--temperature", "0", "--prompt"]
    assert said(capsys, *run, "abcabc")[1] == ""
    assert said(capsys, *run, "abcabcab")[1] == (
        "lrnnx: note: the prompt has 8 tokens, of which a layer of sliding-window attention sees "
        "the last 6\n"
    )


def test_pieces_come_as_they_are_made_and_never_break_a_character(
    raw_bytes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    text = "a€𝔾é!"
    table = torch.full((256, 256), -99.0)
    following = list(zip(text.encode(), text.encode()[1:], strict=False))
    for now, then in following:
        table[now, then] = 99.0
    assert len({now for now, _ in following}) == len(following)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(LRNNLMHeadModel, "prefill", lambda m, ids, *_, **__: (table[ids[-1]], None))
    monkeypatch.setattr(LRNNLMHeadModel, "step", lambda m, ids, *_, **__: (table[ids], None))
    count = len(text.encode()) - 1
    run = ["generate", raw_bytes, "--prompt", "a", "--tokens", str(count), "--temperature", "0"]
    assert main(run) == 0
    assert pieces == [*text[1:], "\n"]


def test_an_encoding_without_the_character_is_no_error(
    raw_bytes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run = ["generate", raw_bytes, "--prompt", "é", "--tokens", "3", "--echo", "--seed", "0"]
    assert main(run) == 0
    assert written.getvalue().startswith(b"?")


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    try:
        code = main(["generate", *arguments])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    assert code == 2
    assert out.out == ""
    assert out.err.startswith("lrnnx: error: ")
    assert message in out.err
    assert out.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --prompt --prompt-file is required"),
        (["--prompt", "a", "--prompt-file", "x"], "not allowed with argument"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "abx"], "character 'x' (U+0078) at position 2 is not in the vocabulary"),
        (["--prompt-file", "/nowhere.txt"], "/nowhere.txt: not readable"),
        (["--prompt", "a", "--stop", "ab"], "--stop 'ab' is 2 tokens, expected a text of one"),
        (["--prompt", "a", "--tokens", "-1"], "max_new_tokens = -1, expected >= 0"),
        (["--prompt", "a", "--tokens", "x"], "invalid integer value: 'x'"),
        (["--prompt", "a", "--top-k", "99", "--echo"], "top_k = 99, but the vocabulary has 9"),
        (["--prompt", "a", "--top-p", "2"], "top_p = 2.0, expected a number in (0, 1]"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0, expected a number >= 0"),
        (["--prompt", "a", "--threads", "-1"], "--threads -1, expected >= 0"),
        (["--prompt", "a", "--device", "gpu"], "--device gpu: cannot be used here"),
    ],
)
def test_bad_arguments(
    letters: tuple[str, LRNNLMHeadModel],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails(capsys, [letters[0], *arguments], message)


def test_bad_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, [str(tmp_path), "--prompt", "a"], "not a saved network")
    Classifier(ClassifierConfig(1, 2)).save(tmp_path / "classifier")
    fails(capsys, [str(tmp_path / "classifier"), "--prompt", "a"], "a network of kind 'classifier'")
    folder = tmp_path / "lm"
    model_of(9, "s5").save_pretrained(folder)
    fails(capsys, [str(folder), "--prompt", "a"], "vocabulary.json: no such file")
    save_vocabulary(folder, ByteVocabulary())
    fails(capsys, [str(folder), "--prompt", "a"], "vocab_size = 9, and a vocabulary of 256")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    save_vocabulary(folder, LETTERS)
    fails(capsys, [str(folder), "--prompt-file", str(latin)], "not UTF-8, byte 0xE9 at offset 0")


def test_ctrl_c_is_130_and_keeps_what_was_written(
    letters: tuple[str, LRNNLMHeadModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step, count = LRNNLMHeadModel.step, [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] > 5:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(LRNNLMHeadModel, "step", interrupted)
    assert main(["generate", letters[0], "--prompt", "ab", "--seed", "3"]) == 130
    out = capsys.readouterr()
    assert len(out.out.rstrip("\n")) >= 4
    assert out.err == "lrnnx: interrupted\n"


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.count("(default:") == text.count("\n  --")
