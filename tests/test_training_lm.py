"""Language models: bits that are a code length, windows, whole runs, and what they refuse."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.cli.main import main
from lrnnx_nn.data.text import ByteVocabulary, CharacterVocabulary, load_vocabulary
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.training import lm
from lrnnx_nn.training.checkpoint import digest
from lrnnx_nn.training.lm_task import LanguageTask, score_text, token_bits
from lrnnx_nn.training.text_baselines import COMPRESSORS, compressed_bits, ngram_bits

for package in ("matplotlib", "rich", "safetensors"):
    pytest.importorskip(package)

VERSE = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. "
TEXT = VERSE * 30


def tiny(mixers: list[str], size: int = 31, **options: Any) -> Any:
    torch.manual_seed(0)
    kwargs: dict[str, dict[str, Any]] = {
        "s5": {"d_state": 4}, "rglru": {}, "attn": {"n_heads": 2, "window": 7},
        "mamba": {"d_state": 4},
    }  # fmt: skip
    chosen = {name: kwargs[name] for name in mixers}
    return LRNNLMHeadModel(8, None, 2, size, mixers, chosen, 16, **options)


def flags(folder: Path, source: Path, **options: Any) -> list[str]:
    values = {
        "mixer": "rglru,attn", "d_model": 8, "d_intermediate": 16, "n_layer": 2, "context": 16,
        "steps": 12, "batch_size": 4, "evaluate_every": 4, "sample": 5, "vocabulary": "char",
        "dropout": 0.2, "mixer_option": "attn.n_heads=2",
    } | options  # fmt: skip
    words = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    return ["train", "--task", "lm", "--text", str(source), "--out", str(folder), *words]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "everything" not in request.node.name:
        monkeypatch.setattr(lm, "_draw", lambda *args: None)


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixers", [["s5"], ["rglru", "attn"], ["mamba"]])
def test_bits_are_those_of_one_forward_whatever_the_chunks(mixers: list[str]) -> None:
    model = tiny(mixers).double().eval()
    ids = torch.randint(31, (50,))
    logits = model(ids[:-1])
    nats = F.cross_entropy(logits, ids[1:], reduction="sum")
    expected = float(nats.detach()) / math.log(2)
    for chunk in (1, 7, 49, 1000):
        assert token_bits(model, ids, chunk=chunk) == pytest.approx(expected, rel=1e-6)
    assert token_bits(model, ids[:1]) == 0.0


def test_a_text_costs_its_first_token_and_spells_the_unknown() -> None:
    vocabulary = CharacterVocabulary.from_text("abc", unknown=True)
    model = tiny(["s5"], vocabulary.size).eval()
    score = score_text(model, vocabulary, "abé€")
    ids = vocabulary.encode("abé€")
    spelled = 2 * math.log2(0x110000 - 0x800 - 3)
    assert score.bits == pytest.approx(2.0 + token_bits(model, ids) + spelled)
    assert (score.tokens, score.characters, score.bytes) == (4, 4, 7)
    assert score.bits_per_byte == pytest.approx(score.bits / 7)
    assert score.bits_per_character == pytest.approx(score.bits / 4)
    with pytest.raises(ValueError, match="an empty text"):
        score_text(model, vocabulary, "")


def test_a_uniform_model_needs_log2_of_the_vocabulary() -> None:
    model = tiny(["s5"], 256).eval()
    torch.nn.init.zeros_(model.embedding.weight)
    score = score_text(model, ByteVocabulary(), "größe" * 40)
    assert score.bits_per_byte == pytest.approx(8.0)
    assert score.bits_per_character == pytest.approx(8.0 * 7 / 5)


# --- baselines -----------------------------------------------------------------------------------


def test_compressors_are_charged_for_what_the_test_adds() -> None:
    train, test = "grüße an alle " * 50, "und noch etwas"
    bits = compressed_bits(train, test)
    assert set(bits) == {"gzip", "bzip2", "xz"}
    for name, compress in COMPRESSORS.items():
        added = len(compress((train + test).encode())) - len(compress(train.encode()))
        assert bits[name] == 8 * added > 0


def counted(train: list[int], test: list[int], size: int, order: int) -> float:
    """Witten-Bell written out, one token at a time."""
    bits = 0.0
    for t, token in enumerate(test):
        p = 1.0 / size
        for k in range(min(order, t) + 1):
            context = tuple(test[t - k : t])
            follow = Counter(
                train[i + k] for i in range(len(train) - k) if tuple(train[i : i + k]) == context
            )
            c, r = sum(follow.values()), len(follow)
            if c:
                p = (follow[token] + r * p) / (c + r)
        bits -= math.log2(p)
    return bits


@pytest.mark.parametrize("size", [3, 40])
def test_counting_is_witten_bell(size: int) -> None:
    train, test = torch.randint(size, (200,)), torch.randint(size, (60,))
    found = ngram_bits(train, test, size, 4)
    expected = [counted(train.tolist(), test.tolist(), size, k) for k in range(5)]
    assert found == pytest.approx(expected, rel=1e-10)


def test_counting_stays_within_64_bits_and_takes_short_texts() -> None:
    large = torch.tensor([49_999, 0, 49_999, 7])
    assert len(ngram_bits(large, large, 50_000, 6)) == 3
    assert ngram_bits(torch.tensor([1]), torch.tensor([1, 0]), 2, 3)[0] == pytest.approx(
        -math.log2(0.75) - math.log2(0.25)
    )


# --- windows -------------------------------------------------------------------------------------


def task_of(model: Any, n: int, **options: Any) -> LanguageTask:
    config = FitConfig(batch_size=options.pop("batch_size", 3))
    options = {"context": 5, "vocabulary": ByteVocabulary(), **options}
    return LanguageTask(model, torch.arange(n) % 31, config, **options)


def test_random_windows_reach_every_place() -> None:
    task = task_of(tiny(["s5"]), 9)
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for _ in range(40):
        batch = task.batch(generator)
        assert batch.ids.shape == (3, 6)
        torch.testing.assert_close(batch.ids.diff(), torch.ones(3, 5, dtype=torch.int64))
        seen |= set(batch.ids[:, 0].tolist())
    assert seen == {0, 1, 2, 3}  # the last window ends with the text
    assert task.weight(task.batch(generator)) == 15


@pytest.mark.parametrize("mixers", [["s5", "attn"], ["rglru"], ["mamba"]])
def test_streams_carry_their_state(mixers: list[str]) -> None:
    """Losses of consecutive windows are those of one forward over all of them."""
    model = tiny(mixers)
    task = task_of(model, 90, windows="stream")  # three streams of 30: at most five windows each
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # passes
        losses: list[Tensor] = []
        parts: list[Tensor] = []
        batch = task.batch(generator)
        while not parts or torch.equal(batch.ids[:, 0], parts[-1][:, -1]):
            parts.append(batch.ids)
            losses.append(task.loss(model, batch))
            batch = task.batch(generator)
        assert len(parts) in (5, 6)
        assert (parts[0][1, 0] - parts[0][0, 0]) % 31 == 30
        whole = torch.cat([parts[0][:, :1], *(part[:, 1:] for part in parts)], dim=1)
        logits = model(whole[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten())
        torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-5, atol=1e-6)
        task.position -= task.context  # the batch that ended the pass begins the next one
        task.states = {}


def test_streams_are_cut_where_the_gradient_ends() -> None:
    model = tiny(["s5"])
    task = task_of(model, 90, windows="stream")
    generator = torch.Generator().manual_seed(1)
    task.loss(model, task.batch(generator)).backward()
    model.zero_grad()
    task.loss(model, task.batch(generator)).backward()  # would go through the first one again
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(task.states))


def test_parts_of_a_stream_keep_their_own_states() -> None:
    model, other = tiny(["rglru"]).double(), tiny(["rglru"]).double()
    whole, parted = (task_of(m, 90, windows="stream") for m in (model, other))
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    for _ in range(4):
        a, b = (t.batch(g) for t, g in zip((whole, parted), generators, strict=True))
        loss = whole.loss(model, a)
        parts = parted.split(b, 2)
        means = torch.stack([parted.loss(other, part) for part in parts])
        shares = torch.tensor([parted.weight(part) / parted.weight(b) for part in parts])
        assert shares.tolist() == pytest.approx([1 / 3, 2 / 3])
        torch.testing.assert_close((means * shares).sum(), loss, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("windows", "n"), [("random", 5), ("stream", 17)])
def test_too_short_a_text(windows: str, n: int) -> None:
    with pytest.raises(ValueError, match=f"has {n} tokens.* a window of context = 5 needs 6"):
        task_of(tiny(["s5"]), n, windows=windows)
    task_of(tiny(["s5"]), n + 1, windows=windows)


def test_unknown_windows() -> None:
    with pytest.raises(ValueError, match="windows = 'some', expected one of random, stream"):
        task_of(tiny(["s5"]), 90, windows="some")
    with pytest.raises(ValueError, match="context = 0, expected"):
        task_of(tiny(["s5"]), 90, context=0)


# --- whole runs ----------------------------------------------------------------------------------


def test_a_run_leaves_everything_and_eval_agrees(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(flags(folder, text)) == 0
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.json", "model.safetensors", "vocabulary.json", "metrics.jsonl",
        "result.json", "learning_curve.png",
    }  # fmt: skip
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "result.json").read_text())
    assert "1,918 characters to learn from, 20 to choose by, 102 to test; 29 different" in out
    assert f"{result['test_bits_per_character']:.3f} bits per character" in out
    for name, bits in result["baselines"].items():
        assert f"{bits:.3f} bits per byte" in out
        assert name in out
    assert result["sample"] in out
    assert result["sample"].startswith("lazy dog, and the dog sleeps on. the")
    model, vocabulary = LRNNLMHeadModel.from_pretrained(folder), load_vocabulary(folder)
    held = TEXT[-102:]
    assert result["test_bits_per_byte"] == score_text(model, vocabulary, held).bits_per_byte
    assert result["test_bytes"] == result["test_tokens"] == 102
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    best = min(rows, key=lambda row: row["validation_bits_per_byte"])
    assert result["best_step"] == best["step"]
    assert main(["eval", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test_bits_per_byte"] == result["test_bits_per_byte"]
    other = tmp_path / "other.txt"
    other.write_text(VERSE)
    assert main(["eval", str(folder), "--data", str(other)]) == 0
    bits = score_text(model, vocabulary, VERSE).bits_per_byte
    assert f"{bits:.3f} per byte" in capsys.readouterr().out


@pytest.mark.parametrize("windows", ["random", "stream"])
def test_it_learns(windows: str, text: Path, tmp_path: Path) -> None:
    """A text that repeats itself costs next to nothing once the state has seen where it is."""
    folder = tmp_path / "run"
    options = {
        "mixer": "rglru", "steps": 120, "evaluate_every": 60, "lr": 2e-2, "dropout": 0.0,
        "d_model": 16, "d_intermediate": 32, "context": 32, "windows": windows,
    }  # fmt: skip
    options["mixer_option"] = "rglru.mode=auto"
    assert main(flags(folder, text, **options)) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["test_bits_per_byte"] < 1.0
    assert result["test_bits_per_byte"] < result["best"]["validation_bits_per_byte"]  # is longer


def test_every_option_reaches_the_run(text: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text(VERSE)
    training = {
        "steps": 3, "batch_size": 5, "accumulate": 2, "precision": "bfloat16", "lr": 2e-3,
        "ssm_lr": 5e-4, "weight_decay": 0.2, "warmup": 0.3, "clip": 0.5, "evaluate_every": 2,
        "patience": 7, "seed": 5,
    }  # fmt: skip
    network = {
        "d_model": 8, "n_layer": 2, "d_intermediate": 12, "norm": "layer", "mlp": "gelu",
        "dropout": 0.4, "context": 9, "windows": "stream", "sample": 3, "prompt": "the ",
        "temperature": 0.3, "vocabulary": "char",
    }  # fmt: skip
    folder = tmp_path / "run"
    options = training | network | {"mixer": "S5,attn", "d_state": 6}
    options |= {"test_text": tmp_path / "held.txt", "validation_fraction": 0.1}
    words = ["--unknown-characters", "--no-baselines", "--mixer-option=s5.dt_min=0.01"]
    assert main([*flags(folder, text, **options), *words]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == "lm"
    assert config["training"] == training
    assert {key: config["network"][key] for key in network} == network
    assert config["network"]["unknown_characters"] is True
    model = config["model"]
    assert model["mixer_types"] == ["s5", "attn"]
    assert model["mixer_kwargs"] == {
        "s5": {"d_state": 6, "dt_min": 0.01}, "attn": {"n_heads": 2, "window": 9},
    }  # fmt: skip
    keys = ("d_model", "n_layer", "d_intermediate", "norm", "mlp", "dropout")
    assert all(model[key] == network[key] for key in keys)
    assert model["vocab_size"] == len(set(TEXT)) + 1
    result = json.loads((folder / "result.json").read_text())
    assert result["baselines"] == {}
    assert result["test_characters"] == len(VERSE)
    assert result["sample"].startswith("the ")
    assert len(result["sample"]) == len("the ") + 3


@pytest.mark.parametrize("vocabulary", ["byte", "tokenizer"])
def test_other_vocabularies(vocabulary: str, text: Path, tmp_path: Path) -> None:
    name = vocabulary
    if vocabulary == "tokenizer":
        tokenizers = pytest.importorskip("tokenizers")
        words = tokenizers.Tokenizer(
            tokenizers.models.WordLevel(
                {w: i for i, w in enumerate(("?", *dict.fromkeys(VERSE.split())))}, "?"
            )
        )
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        name = str(tmp_path / "words.json")
        words.save(name)
    folder = tmp_path / "run"
    assert main(flags(folder, text, vocabulary=name, context=8)) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["lossless"] is (vocabulary == "byte")
    assert load_vocabulary(folder).kind == vocabulary
    assert (folder / "tokenizer.json").exists() is (vocabulary == "tokenizer")


# --- resume --------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    batch: Callable[..., Any] = LanguageTask.batch
    calls: list[int] = []

    def counted_batch(self: LanguageTask, generator: torch.Generator) -> Any:
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return batch(self, generator)

    monkeypatch.setattr(LanguageTask, "batch", counted_batch)


def kept(folder: Path) -> tuple[Any, ...]:
    """Return what must not depend on interruptions."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    weights = digest(dict(LRNNLMHeadModel.from_pretrained(folder).state_dict()))
    names = sorted(path.name for path in folder.iterdir())
    return [row | {"seconds": 0} for row in rows], result | {"seconds": 0}, weights, names


@pytest.mark.parametrize(
    ("windows", "step", "options"),
    [
        ("random", 6, {}),
        ("stream", 6, {}),
        ("stream", 8, {"accumulate": 2}),
        ("stream", 11, {"mixer": "mamba,attn", "d_state": 4}),
    ],
)
def test_resume_is_the_uninterrupted_run(
    windows: str, step: int, options: dict[str, Any], text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = {"windows": windows, **options}
    assert main(flags(tmp_path / "whole", text, **options)) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        assert main(flags(tmp_path / "cut", text, **options)) == 130
    assert f"go on with lrnnx train --resume {tmp_path / 'cut'}" in capsys.readouterr().err
    cut = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert (cut["interrupted"], cut["steps"]) == (True, step)
    assert main(["train", "--resume", str(tmp_path / "cut"), "--device", "cpu"]) == 0
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")


def test_what_cannot_be_resumed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        assert main(flags(folder, text)) == 130
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(words: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(main(words))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    resume = ["train", "--resume", str(folder)]
    fails([*resume, "--lr", "0.1"], "--lr with --resume: a run goes on as it began")
    fails([*resume, "--text", "x"], "--text with --resume")
    fails([*resume, "--task", "classify"], "a run of task lm, not of classify")
    text.write_text(TEXT + "!")
    fails(resume, "the text has changed since the run began")
    text.write_text(TEXT)
    assert main(resume) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    fails(resume, "this run is finished, there is nothing to resume")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "lstm"}, "unknown mixer 'lstm'"),
        ({"mixer": "", "mixer_option": "s5.dt_min=0.1"}, "the mixers are"),
        ({"mixer": "rglru,attn,s5"}, "expected between 1 and n_layer = 2"),
        ({"mixer_option": "attn"}, "--mixer-option 'attn', expected TYPE.KEY=VALUE"),
        ({"mixer_option": "s5.blocks=2"}, "the mixers are rglru, attn"),
        ({"mixer_option": "attn.heads=2"}, "Attention has no option 'heads'"),
        ({"mixer_option": "attn.window=null"}, "the state of attention grows with the text"),
        ({"mixer_option": "attn.rotary=yes"}, "attn" and "rotary = 'yes', expected a number"),
        ({"mixer_option": "attn.n_heads=3"}, "3"),
        ({"context": 0}, "context = 0, expected an integer >= 1"),
        ({"context": 5000}, "a window of context = 5000 needs 5001"),
        ({"windows": "some"}, "windows = 'some', expected one of random, stream"),
        ({"test_fraction": 0}, "test_fraction = 0.0, expected 0 < test_fraction < 1"),
        ({"validation_fraction": 1}, "validation_fraction = 1.0, expected 0 <= valid"),
        ({"temperature": -1}, "temperature = -1.0, expected >= 0"),
        ({"sample": -1}, "sample = -1, expected an integer >= 0"),
        ({"prompt": "€"}, "--prompt: character '€' (U+20AC) at position 0"),
        ({"vocabulary": "word"}, "vocabulary 'word', expected byte, char"),
        ({"vocabulary": "none.json"}, "none.json: no such file"),
        ({"steps": 0}, "steps = 0, expected an integer >= 1"),
        ({"accumulate": 9}, "accumulate = 9, expected 1 <= accumulate <= batch_size"),
        ({"precision": "half"}, "precision = half, expected one of float32, bfloat16, float16"),
        ({"dropout": 1.5}, "dropout = 1.5, expected 0 <= dropout < 1"),
        ({"norm": "batch"}, "norm = 'batch', expected one of"),
        ({"d_model": 0}, "d_model = 0"),
        ({"text": "none.txt"}, "none.txt: no such file"),
        ({"test_text": "none.txt"}, "none.txt: no such file"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], message: str, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(flags(tmp_path / "run", text, **options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("lrnnx: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty, no text to learn from"),
        (b"abc\xff", "not UTF-8, byte 0xFF at offset 3"),
        (b"abcdefghij", "has 8 tokens, a window of context = 16 needs 17"),
        (TEXT.encode() + "€".encode(), "test part: character '€' (U+20AC) at position 101"),
        (b"a", "leave none to learn from"),
    ],
)
def test_bad_texts(
    data: bytes, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_bytes(data)
    assert main(flags(tmp_path / "run", text)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_than_the_models_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(flags(folder, text, steps=1)) == 0
    (folder / "vocabulary.json").write_text('{"kind": "byte", "size": 256}')
    assert main(["eval", str(folder)]) == 2
    assert "a model of vocab_size = 29, and a vocabulary of 256" in capsys.readouterr().err
    (folder / "config.json").write_text('{"task": "lm"}')
    assert main(["eval", str(folder)]) == 2
    assert "'text', not the config of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("text", "text", 5, "text = 5, expected names of files"),
        ("text", "test_text", [1], "test_text = [1], expected names of files"),
        ("network", "mixer_kwargs", None, "mixer_kwargs = None, expected a mapping"),
    ],
)
def test_an_edited_config_of_another_type(
    part: str, name: str, value: Any, message: str, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(flags(tmp_path / "run", text, steps=1)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config[part][name] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "config.json: " + message in error
    assert error.count("\n") == 1


def test_the_sample_goes_on_from_a_text_without_blanks(text: Path, tmp_path: Path) -> None:
    text.write_text("anna\nbert\ncarl\n" * 60)
    assert main(flags(tmp_path / "run", text, steps=1)) == 0
    sample = json.loads((tmp_path / "run" / "result.json").read_text())["sample"]
    assert " " not in sample
    assert "\nbert\ncarl\nanna" in sample


def test_a_terminal_that_lacks_characters(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained model of bytes writes bytes that are no text."""
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    assert main(flags(tmp_path / "run", text, steps=1, vocabulary="byte", sample=40)) == 0
    written.seek(0)
    assert "run folder" in written.read()
    assert not json.loads((tmp_path / "run" / "result.json").read_text())["sample"].isascii()


def test_a_loss_that_is_not_finite(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path / "run", text, lr=1e30, warmup=0.0)) == 2
    assert "the loss is not finite in the first 4 steps" in capsys.readouterr().err
