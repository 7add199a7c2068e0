# SPDX-License-Identifier: MIT
"""``lrnnx train --task lm``: one run from text files to a folder with a language model."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrnnx_nn import viz
from lrnnx_nn.architectures.language_model import LRNNLMHeadModel
from lrnnx_nn.data.text import (
    Texts,
    Vocabulary,
    is_lossless,
    load_vocabulary,
    make_vocabulary,
    read_text,
    save_vocabulary,
    text_files,
)
from lrnnx_nn.generation import generate
from lrnnx_nn.optional import require
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.training.engine import Outcome
from lrnnx_nn.training.folder import (
    CONFIG,
    Progress,
    RunFolder,
    check_folder,
    elapsed,
    kernels,
    read_config,
    versions,
)
from lrnnx_nn.training.lm_config import LMConfig
from lrnnx_nn.training.lm_task import LanguageTask, score_text
from lrnnx_nn.training.text_baselines import compressed_bits, ngram_bits

TASK = "lm"
PROMPT_WORDS = 8


class LMResult(NamedTuple):
    """What a run leaves: the folder, result.json's content, and whether Ctrl-C came."""

    folder: Path
    result: dict[str, Any]
    interrupted: bool


def train_run(
    config: LMConfig,
    fit: FitConfig,
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LMResult:
    """Train a language model, judge it once by the test part, and write it all into ``folder``.

    Args:
        config: what to learn, and the network.
        fit: how long and how fast.
        folder: new or empty.
        device: where to train.
        progress: who shows how it goes on.
        say: called with a line about the text before training.

    Raises:
        ValueError: texts that are empty, too short, not UTF-8 or hold unknown characters; a folder
            in use. Nothing is written then. A loss that is not finite.
        KeyboardInterrupt: before the first evaluation; the run can be resumed.
        MissingDependencyError: safetensors, matplotlib or tokenizers is not installed.
    """
    check_folder(folder)
    for package in ("matplotlib", "safetensors"):
        require(package)
    texts = config.read()
    vocabulary = make_vocabulary(config.vocabulary, texts.train, unknown=config.unknown_characters)
    model, task = _prepare(config, fit, texts, vocabulary, device)
    for part, text in (("validation", texts.validation), ("test", texts.test)):
        _encodable(vocabulary, f"{part} part", text)
    if config.sample:
        _encodable(vocabulary, "--prompt", _prompt(config, texts.test))
    files = [str(path) for path in text_files(config.text)]
    say(
        f"{', '.join(files[:3])}{', ...' if len(files) > 3 else ''}: {len(texts.train):,} "
        f"characters to learn from, {len(texts.validation):,} to choose by, {len(texts.test):,} to "
        f"test; {vocabulary.size:,} different tokens"
    )
    run = RunFolder.create(folder, _asked(config, fit, texts, model, vocabulary, device))
    save_vocabulary(run.path, vocabulary)
    return _go(run, config, fit, texts, vocabulary, model, task, device, progress)


def resume_run(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LMResult:
    """Go on with an unfinished run: bit for bit as if nothing had ended it, on a CPU.

    Args:
        folder: of `train_run`.
        device: see `train_run`.
        progress: the same.

    Raises:
        ValueError: no such run, a finished one, a damaged file, or texts that have changed.
    """
    run = RunFolder.resume(folder, task=TASK)
    for package in ("matplotlib", "safetensors"):
        require(package)
    config = LMConfig(**run.config["text"], **run.config["network"])
    fit = FitConfig(**run.config["training"])
    texts = _same_texts(config, run.config)
    vocabulary = load_vocabulary(run.path)
    model, task = _prepare(config, fit, texts, vocabulary, device)
    return _go(run, config, fit, texts, vocabulary, model, task, device, progress)


def evaluate_run(
    folder: Path | str, *, source: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Judge the language model of a run folder again.

    Args:
        folder: of `train_run`.
        source: a text file or folder to judge it by, from its start to its end; the test part of
            the run if None.
        device: where.

    Returns:
        ``text``, ``test_bits_per_byte``, ``test_bits_per_character``, ``test_characters``,
        ``test_tokens``.

    Raises:
        ValueError: not such a run, a broken file in it, texts that have changed, or characters
            that its vocabulary lacks.
    """
    asked = read_config(folder)
    try:
        config = LMConfig(**asked["text"], **asked["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{Path(folder) / CONFIG}: {error}, not the config of a run") from error
    vocabulary = load_vocabulary(folder)
    model = LRNNLMHeadModel.from_pretrained(folder, device=device, vocab_size=vocabulary.size)
    text = _same_texts(config, asked).test if source is None else read_text(source)
    return {
        "text": "the run's test part" if source is None else source,
        **_judge(model, vocabulary, text),
    }


def report(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines that `lrnnx train` and `lrnnx eval` print."""
    per_character, per_byte = (result[f"test_bits_per_{x}"] for x in ("character", "byte"))
    lines = [("test", f"{per_character:.3f} bits per character, {per_byte:.3f} per byte")]
    for name, bits in result.get("baselines", {}).items():
        lines.append((name, f"{bits:.3f} bits per byte"))
    if not result["lossless"]:
        lines.append(
            ("note", "the vocabulary loses part of the text, so these are no code lengths")
        )
    if "parameters" in result:
        lines += [
            ("parameters", f"{result['parameters']:,}"),
            ("time", elapsed(result)),
        ]
    else:
        lines.append(("text", f"{result['text']}, {result['test_characters']:,} characters"))
    return lines


def _prepare(
    config: LMConfig,
    fit: FitConfig,
    texts: Texts,
    vocabulary: Vocabulary,
    device: torch.device | str,
) -> tuple[LRNNLMHeadModel, LanguageTask]:
    """Return a new network with the run's seed, and its task."""
    torch.manual_seed(fit.seed)
    model = LRNNLMHeadModel.from_config(config.model(vocabulary.size)).to(device)
    task = LanguageTask(
        model, vocabulary.encode(texts.train), fit, context=config.context,
        windows=config.windows, vocabulary=vocabulary, validation=texts.validation,
    )  # fmt: skip
    return model, task


def _go(
    run: RunFolder,
    config: LMConfig,
    fit: FitConfig,
    texts: Texts,
    vocabulary: Vocabulary,
    model: LRNNLMHeadModel,
    task: LanguageTask,
    device: torch.device | str,
    progress: Progress | None,
) -> LMResult:
    outcome = run.fit(
        model, task, fit, progress=progress, save_model=lambda m: m.save_pretrained(run.path)
    )
    if outcome.weights is not None:
        model.load_state_dict(outcome.weights)
    model.eval()
    result = _judge(model, vocabulary, texts.test)
    result["baselines"] = _baselines(texts, vocabulary) if config.baselines else {}
    result |= {
        "sample": _sample(config, fit, model, vocabulary, texts.test),
        "parameters": model.num_parameters(),
        "seconds": round(sum(record.seconds for record in outcome.records), 2),
        "device": str(device),
        "kernels": kernels(device),
        "threads": torch.get_num_threads(),
    }
    whole = run.finish(result, outcome)
    _draw(run, outcome, whole)
    return LMResult(run.path, whole, outcome.interrupted)


def _judge(model: LRNNLMHeadModel, vocabulary: Vocabulary, text: str) -> dict[str, Any]:
    score = score_text(model, vocabulary, text)
    return {
        **score.figures("test"),
        "test_characters": score.characters,
        "test_bytes": score.bytes,
        "test_tokens": score.tokens,
        "lossless": vocabulary.kind != "tokenizer" or is_lossless(vocabulary, text),
    }


def _baselines(texts: Texts, vocabulary: Vocabulary) -> dict[str, float]:
    """Return bits per byte of the test part; the order of counting is chosen by validation."""
    train, test = vocabulary.encode(texts.train), vocabulary.encode(texts.test)
    known, chosen = train, vocabulary.encode(texts.validation)
    if not len(chosen):
        held = max(len(train) // 20, 1)
        known, chosen = train[:-held], train[-held:]
    bits = ngram_bits(train, test, vocabulary.size)
    found = ngram_bits(known, chosen, vocabulary.size)
    order = min(range(len(found)), key=found.__getitem__)
    counted = bits[order] + vocabulary.unknown_bits(test)
    total = {**compressed_bits(texts.train, texts.test), f"{order + 1}-gram counts": counted}
    return {name: value / len(texts.test.encode()) for name, value in total.items()}


def _prompt(config: LMConfig, test: str) -> str:
    """Return what the sample goes on from: the text's own blanks are sure to be in a vocabulary."""
    words = re.match(rf"\s*(\S+(?:\s+\S+){{0,{PROMPT_WORDS - 1}}})", test)
    return config.prompt or (test[:1] if words is None else words[1])


def _sample(
    config: LMConfig, fit: FitConfig, model: LRNNLMHeadModel, vocabulary: Vocabulary, test: str
) -> str:
    if not config.sample:
        return ""
    ids = vocabulary.encode(_prompt(config, test))
    found = generate(
        model, ids, config.sample, temperature=config.temperature, seed=fit.seed,
        prefill_chunk=1024,
    )  # fmt: skip
    return vocabulary.decode(torch.cat([ids, found.tokens.cpu()]))


def _draw(run: RunFolder, outcome: Outcome, result: Mapping[str, Any]) -> None:
    rows = [record.to_dict() for record in outcome.records]
    types = ", ".join(run.config["model"]["mixer_types"])
    title = f"{types}: test {result['test_bits_per_byte']:.3f} bits per byte"
    figure = viz.plot_bits(rows, result["baselines"], title)
    viz.save_figure(figure, run.path / "learning_curve.png")


def _encodable(vocabulary: Vocabulary, part: str, text: str) -> None:
    try:
        ids = vocabulary.encode(text)
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error
    if text and not len(ids):
        raise ValueError(f"{part}: {text[:20]!r} has no token in the vocabulary")


def _asked(
    config: LMConfig,
    fit: FitConfig,
    texts: Texts,
    model: LRNNLMHeadModel,
    vocabulary: Vocabulary,
    device: torch.device | str,
) -> dict[str, Any]:
    """Return what config.json holds."""
    values = dataclasses.asdict(config)
    text: dict[str, Any] = {}
    for name in ("text", "validation_text", "test_text"):
        files = values.pop(name)
        text[name] = None if files is None else [str(Path(f).resolve()) for f in files]
    for name in ("validation_fraction", "test_fraction"):
        text[name] = values.pop(name)
    return {
        "task": TASK,
        "text": text,
        "digest": _digest(texts),
        "network": values,
        "vocabulary": vocabulary.to_dict(),
        "model": model.config.to_dict(),
        "training": dataclasses.asdict(fit),
        "device": str(device),
        "versions": versions(),
    }


def _same_texts(config: LMConfig, asked: Mapping[str, Any]) -> Texts:
    texts = config.read()
    if _digest(texts) != asked.get("digest"):
        raise ValueError(f"{', '.join(config.text)}: the text has changed since the run began")
    return texts


def _digest(texts: Texts) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)} ".encode() + text.encode())
    return found.hexdigest()
