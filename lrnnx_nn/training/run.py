# SPDX-License-Identifier: MIT
"""One training run from data to a folder with weights, metrics, result and pictures."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_nn import viz
from lrnnx_nn.architectures import Classifier, ClassifierConfig
from lrnnx_nn.data import Dataset, load_dataset, statistics, stratified_split
from lrnnx_nn.data.dataset import Sequences
from lrnnx_nn.files import read_json, write_json
from lrnnx_nn.optional import require
from lrnnx_nn.recipes import TrainingConfig
from lrnnx_nn.training.loop import Epoch, Evaluation, Fit, evaluate, fit

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"


class RunResult(NamedTuple):
    """What `train_run` leaves: the folder, result.json's content, and whether Ctrl-C came."""

    folder: Path
    result: dict[str, Any]
    interrupted: bool


def check_folder(folder: Path | str) -> Path:
    """Return the folder if a run may be written there.

    Raises:
        ValueError: it is a file, or holds something already.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, expected a new or empty folder for the run")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty, and runs are never overwritten; name a new folder")
    return folder


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
    folder = check_folder(folder)
    for package in ("matplotlib", "safetensors"):
        require(package)
    started = time.perf_counter()
    kept, held = stratified_split(dataset.train.y, config.validation_fraction, config.seed)
    train, validation = dataset.train.take(kept), dataset.train.take(held)
    model = _fresh(model_config, config, train, device)
    before = viz.eigenvalues(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, _config(dataset, model_config, config, source, device))
    rows: list[Epoch] = []

    def record(epoch: Epoch) -> None:
        rows.append(epoch)
        with (folder / METRICS).open("a") as file:
            file.write(json.dumps(epoch._asdict()) + "\n")
        on_epoch(epoch)

    on_phase("search", config.epochs)
    search = fit(
        model, train, config, epochs=config.epochs, validation=validation, on_epoch=record,
        on_best=lambda best: best.save(folder),
    )  # fmt: skip
    _require_best(search, config)
    chosen, refitted, refit_interrupted = model, False, False
    if search.state is not None:
        model.load_state_dict(search.state)
    if config.refit and not search.interrupted and search.best is not None:
        on_phase("refit", search.best.epoch)
        again = _fresh(model_config, config, dataset.train, device)
        second = fit(
            again, dataset.train, config, epochs=search.best.epoch, phase="refit", on_epoch=record
        )
        refit_interrupted = second.interrupted
        if not second.interrupted and not second.diverged:
            chosen, refitted = again, True
    chosen.save(folder)
    seconds = time.perf_counter() - started
    _check_stability(chosen)
    test = evaluate(chosen, dataset.test)
    interrupted = search.interrupted or refit_interrupted
    result = _result(dataset, chosen, search, test) | {
        "seconds": round(seconds, 2),
        "refitted": refitted,
        "interrupted": interrupted,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(folder / RESULT, result)
    _draw(folder, dataset, chosen, before, rows, result)
    return RunResult(folder, result, interrupted)


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
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: not a run folder, it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    try:
        run_source, seed = config["dataset"]["source"], config["training"]["seed"]
        classes = config["dataset"]["classes"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: {error} is missing, not the config of a run"
        ) from error
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


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lrnnx-core", "torch", "numpy", "aeon"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _fresh(
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


def _require_best(search: Fit, config: TrainingConfig) -> None:
    if search.best is not None:
        return
    if search.interrupted:
        raise KeyboardInterrupt
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
        "dataset": {
            "name": dataset.name,
            "source": source,
            "split": dataset.split,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "channels": dataset.channels,
            "classes": list(dataset.classes),
        },
        "model": model_config.to_dict(),
        "training": dataclasses.asdict(config),
        "device": str(device),
        "versions": versions(),
    }


def _result(dataset: Dataset, model: Classifier, search: Fit, test: Evaluation) -> dict[str, Any]:
    best = search.best
    return {
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
