# SPDX-License-Identifier: MIT
"""One training run from data to a folder with weights, metrics, result and pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_nn import viz
from lrnnx_nn.architectures import Classifier, ClassifierConfig
from lrnnx_nn.data import Dataset, load_dataset, statistics, stratified_split
from lrnnx_nn.data.dataset import Sequences
from lrnnx_nn.optional import require
from lrnnx_nn.recipes import TrainingConfig
from lrnnx_nn.training.checkpoint import digest
from lrnnx_nn.training.folder import (
    CONFIG,
    RunFolder,
    check_folder,
    kernels,
    read_config,
    versions,
)
from lrnnx_nn.training.loop import Epoch, Evaluation, Fit, evaluate, fit


class RunResult(NamedTuple):
    """What `train_run` leaves: the folder, result.json's content, and whether Ctrl-C came."""

    folder: Path
    result: dict[str, Any]
    interrupted: bool


def train_run(
    dataset: Dataset,
    model_config: ClassifierConfig,
    config: TrainingConfig,
    folder: Path | str,
    *,
    source: str,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_phase: Callable[[str, int], None] = lambda phase, epochs: None,
) -> RunResult:
    """Train a classifier, test it once, and write everything into ``folder``.

    Args:
        dataset: from `load_dataset`.
        model_config: what to train.
        config: how.
        folder: new or empty.
        source: what ``dataset`` was loaded from; `evaluate_run` loads it again.
        device: where to train.
        on_epoch: called after each epoch.
        on_phase: called with ``search`` or ``refit`` and the number of epochs, before each.

    Returns:
        The result. A KeyboardInterrupt ends training early and the best network so far is tested.

    Raises:
        ValueError: a folder in use; a loss that is not finite.
        KeyboardInterrupt: it came before the first epoch had ended.
        MissingDependencyError: matplotlib or safetensors is not installed.
    """
    check_folder(folder)
    for package in ("matplotlib", "safetensors"):
        require(package)
    make_model(model_config, config, dataset.train, device)  # its errors come before the folder
    asked = _config(dataset, model_config, config, source, device)
    run = RunFolder.create(folder, asked)
    return _go(run, dataset, model_config, config, device, on_epoch, on_phase)


def resume_run(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_phase: Callable[[str, int], None] = lambda phase, epochs: None,
) -> RunResult:
    """Go on with a run that Ctrl-C or a crash ended: bit for bit as if nothing had, on a CPU.

    Args:
        folder: of `train_run`.
        device: see `train_run`.
        on_epoch: the same.
        on_phase: the same.

    Raises:
        ValueError: no such run, a finished one, a damaged file, or data that have changed.
    """
    run = RunFolder.resume(folder, task="classify")
    for package in ("matplotlib", "safetensors"):
        require(package)
    asked = run.config
    dataset = load_dataset(asked["dataset"]["source"], seed=asked["training"]["seed"])
    if _digest(dataset) != asked["dataset"]["digest"]:
        raise ValueError(f"{asked['dataset']['source']}: the data have changed since the run began")
    model_config = ClassifierConfig.from_dict(asked["model"])
    config = TrainingConfig(**asked["training"])
    return _go(run, dataset, model_config, config, device, on_epoch, on_phase)


def _go(
    run: RunFolder,
    dataset: Dataset,
    model_config: ClassifierConfig,
    config: TrainingConfig,
    device: torch.device | str,
    on_epoch: Callable[[Epoch], None],
    on_phase: Callable[[str, int], None],
) -> RunResult:
    """Search, refit, test and write, or what is left of that."""
    started = time.perf_counter()
    saved: dict[str, Any] = run.state or {"phase": "search", "fit": None, "seconds": 0.0}
    kept, held = stratified_split(dataset.train.y, config.validation_fraction, config.seed)
    train, validation = dataset.train.take(kept), dataset.train.take(held)
    model = make_model(model_config, config, train, device)
    before = viz.eigenvalues(model)
    run.rewind()
    rows = [Epoch(**row) for row in run.rows()]

    def record(epoch: Epoch) -> None:
        rows.append(epoch)
        run.append(epoch._asdict())
        on_epoch(epoch)

    def save(phase: str, done: dict[str, Any] | None) -> Callable[[dict[str, Any]], None]:
        def write(state: dict[str, Any]) -> None:
            seconds = saved["seconds"] + time.perf_counter() - started
            run.save({"phase": phase, "search": done, "fit": state, "seconds": seconds})

        return write

    if saved["phase"] == "search":
        on_phase("search", config.epochs)
        search = fit(
            model, train, config, epochs=config.epochs, validation=validation, on_epoch=record,
            on_best=lambda best: best.save(run.path), state=saved["fit"],
            save=save("search", None),
        )  # fmt: skip
        _require_best(search, config, run.path)
        done, state = _pack(search), None
    else:
        done, state = saved["search"], saved["fit"]
        search = _unpack(done, rows)
    chosen, refitted, refit_interrupted = model, False, False
    if search.state is not None:
        model.load_state_dict(search.state)
    if config.refit and not search.interrupted and search.best is not None:
        on_phase("refit", search.best.epoch)
        again = make_model(model_config, config, dataset.train, device)
        second = fit(
            again, dataset.train, config, epochs=search.best.epoch, phase="refit",
            on_epoch=record, state=state, save=save("refit", done),
        )  # fmt: skip
        refit_interrupted = second.interrupted
        if not second.interrupted and not second.diverged:
            chosen, refitted = again, True
    chosen.save(run.path)
    seconds = saved["seconds"] + time.perf_counter() - started
    _check_stability(chosen)
    test = evaluate(chosen, dataset.test)
    interrupted = search.interrupted or refit_interrupted
    result = _result(dataset, chosen, search, test) | {
        "seconds": round(seconds, 2),
        "refitted": refitted,
        "interrupted": interrupted,
        "device": str(device),
        "kernels": kernels(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    run.write_result(result, keep_state=interrupted)
    _draw(run.path, dataset, chosen, before, rows, result)
    return RunResult(run.path, result, interrupted)


def _pack(search: Fit) -> dict[str, Any]:
    """Return what the refit needs of the search, for a saved state."""
    best = None if search.best is None else search.best._asdict()
    return {"state": search.state, "best": best, "diverged": search.diverged}


def _unpack(done: dict[str, Any], rows: list[Epoch]) -> Fit:
    best = None if done["best"] is None else Epoch(**done["best"])
    epochs = [row for row in rows if row.phase == "search"]
    return Fit(done["state"], best, epochs, False, done["diverged"])


def evaluate_run(
    folder: Path | str, *, source: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Test the network of a run folder again.

    Args:
        folder: of `train_run`.
        source: another data set to test on, with the same channels and classes; the run's if None.
        device: where.

    Returns:
        ``test_accuracy``, ``test_loss`` (nats), ``confusion_matrix``, ``classes``, ``dataset``.

    Raises:
        ValueError: not a run folder, a broken file in it, data that do not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        run_source, seed = config["dataset"]["source"], config["training"]["seed"]
        classes = config["dataset"]["classes"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: {error} is missing, not the config of a run"
        ) from error
    if not isinstance(run_source, str) or not isinstance(seed, int):
        raise ValueError(
            f"{folder / CONFIG}: source = {run_source!r} and seed = {seed!r}, "
            "expected text and an integer"
        )
    model = Classifier.load(folder).to(device)
    dataset = load_dataset(run_source if source is None else source, seed=seed)
    if list(dataset.classes) != classes or dataset.channels != model.config.d_input:
        raise ValueError(
            f"{dataset.name}: {dataset.channels} channels, classes {list(dataset.classes)}; the "
            f"run in {folder} was trained on {model.config.d_input} channels, classes {classes}"
        )
    _check_stability(model)
    test = evaluate(model, dataset.test)
    return {
        "dataset": dataset.name,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "classes": list(dataset.classes),
        "confusion_matrix": confusion_matrix(dataset.test.y, test.predictions, len(classes)),
    }


def confusion_matrix(y: Tensor, predictions: Tensor, n_classes: int) -> list[list[int]]:
    """Return how many sequences of each class (rows) got each answer (columns)."""
    pairs = y.cpu() * n_classes + predictions.cpu()
    return torch.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes).tolist()


def report(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines that `lrnnx eval` prints of `evaluate_run`'s result."""
    lines = [
        ("data set", str(result["dataset"])),
        ("test accuracy", f"{100 * result['test_accuracy']:.2f} %"),
        ("test loss", f"{result['test_loss']:.4f} nats"),
    ]
    for name, row in zip(result["classes"], result["confusion_matrix"], strict=True):
        right = row[result["classes"].index(name)]
        lines.append((f"class {name}", f"{right} of {sum(row)} right"))
    return lines


def make_model(
    model_config: ClassifierConfig,
    config: TrainingConfig,
    train: Sequences,
    device: torch.device | str,
) -> Classifier:
    """Return a new network with the run's seed, standardising by the statistics of ``train``."""
    torch.manual_seed(config.seed)
    model = Classifier(model_config)
    model.set_statistics(*statistics(train))
    return model.to(device)


def _check_stability(model: Classifier) -> None:
    """Warn of unstable layers on any device; on a CPU evaluation does so by itself, once."""
    for layer in viz.layers_of(model).values():
        layer.check_stability()


def _require_best(search: Fit, config: TrainingConfig, folder: Path) -> None:
    if search.best is not None:
        return
    if search.interrupted:
        raise KeyboardInterrupt(
            f"before the first evaluation; go on with lrnnx train --resume {folder}"
        )
    raise ValueError(
        f"the loss is not finite in the first epoch with lr = {config.lr}; try a smaller one"
    )


def _config(
    dataset: Dataset,
    model_config: ClassifierConfig,
    config: TrainingConfig,
    source: str,
    device: torch.device | str,
) -> dict[str, Any]:
    return {
        "task": "classify",
        "dataset": {
            "name": dataset.name,
            "source": source,
            "split": dataset.split,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "channels": dataset.channels,
            "classes": list(dataset.classes),
            "digest": _digest(dataset),
        },
        "model": model_config.to_dict(),
        "training": dataclasses.asdict(config),
        "device": str(device),
        "versions": versions(),
    }


def _digest(dataset: Dataset) -> str:
    return digest([[part.x, part.lengths, part.y] for part in (dataset.train, dataset.test)])


def _result(dataset: Dataset, model: Classifier, search: Fit, test: Evaluation) -> dict[str, Any]:
    best = search.best
    return {
        "task": "classify",
        "dataset": dataset.name,
        "layer": model.config.layer,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "validation_accuracy": None if best is None else best.validation_accuracy,
        "best_epoch": None if best is None else best.epoch,
        "epochs": len(search.epochs),
        "diverged": search.diverged,
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": list(dataset.classes),
        "confusion_matrix": confusion_matrix(
            dataset.test.y, test.predictions, len(dataset.classes)
        ),
    }


def _draw(
    folder: Path,
    dataset: Dataset,
    model: Classifier,
    before: dict[str, Tensor],
    rows: list[Epoch],
    result: dict[str, Any],
) -> None:
    name = f"{result['layer'].upper()} on {dataset.name}"
    accuracy = f"test accuracy {100 * result['test_accuracy']:.2f} %"
    length = min(dataset.train.x.shape[1], 512)
    figures = {
        "learning_curve": viz.plot_learning_curve([row._asdict() for row in rows], name),
        "confusion_matrix": viz.plot_confusion_matrix(
            result["confusion_matrix"], result["classes"], f"{name}, {accuracy}"
        ),
    }
    after, kernels = viz.eigenvalues(model), viz.kernels(model, length)
    if after:  # a time-varying layer has no eigenvalues of its own
        title = f"{name}: discrete eigenvalues"
        figures["eigenvalues"] = viz.plot_eigenvalues(before, after, title)
    if kernels:
        figures["kernels"] = viz.plot_kernels(kernels, f"{name}: convolution kernels")
    for key, figure in figures.items():
        viz.save_figure(figure, folder / f"{key}.png")
