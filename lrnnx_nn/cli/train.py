# SPDX-License-Identifier: MIT
"""``lrnnx train --task classify``, once its options are read."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from lrnnx_core import registry
from lrnnx_nn import recipes
from lrnnx_nn.architectures import Classifier, ClassifierConfig
from lrnnx_nn.cli.arguments import cpu_threads, new_folder, table
from lrnnx_nn.cli.options import parse_device, parse_layer_options
from lrnnx_nn.cli.progress import Progress
from lrnnx_nn.data import load_dataset
from lrnnx_nn.recipes import TrainingConfig
from lrnnx_nn.training import RunResult, resume_run, train_run
from lrnnx_nn.training.folder import check_folder, elapsed


def run(arguments: argparse.Namespace) -> int:
    """Check every argument, then train; return the exit code."""
    device = parse_device(arguments.device)
    progress = Progress("validation_accuracy", "{:.1%}", maximize=True)
    if arguments.resume is not None:
        with cpu_threads(arguments.threads), progress:
            outcome = resume_run(
                arguments.resume, device=device, on_epoch=progress.epoch, on_phase=progress.phase
            )
        return _end(outcome)
    fields = [field.name for field in dataclasses.fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(arguments, name) for name in fields})
    model_config = _model_config(arguments)
    if arguments.threads < 0:
        raise ValueError(f"--threads {arguments.threads}, expected >= 0")
    folder = None if arguments.out is None else check_folder(arguments.out)
    dataset = load_dataset(arguments.dataset, seed=config.seed)
    if folder is None:
        folder = new_folder(dataset.name, model_config.layer, config.seed)
    model_config = dataclasses.replace(
        model_config, d_input=dataset.channels, n_classes=len(dataset.classes)
    )
    shortest, longest = int(dataset.train.lengths.min()), int(dataset.train.lengths.max())
    print(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test sequences "
        f"({dataset.split} split), length {shortest} to {longest}, {dataset.channels} channels, "
        f"{len(dataset.classes)} classes"
    )
    with cpu_threads(arguments.threads), progress:
        outcome = train_run(
            dataset, model_config, config, folder, source=_source(arguments.dataset), device=device,
            on_epoch=progress.epoch, on_phase=progress.phase,
        )  # fmt: skip
    return _end(outcome)


def _end(outcome: RunResult) -> int:
    _report(outcome)
    if outcome.result["diverged"]:
        print("lrnnx: warning: the loss became infinite; try a smaller --lr", file=sys.stderr)
    if outcome.interrupted:
        print(
            "lrnnx: interrupted, the best network was kept and tested; "
            f"go on with lrnnx train --resume {outcome.folder}",
            file=sys.stderr,
        )
        return 130
    return 0


def _model_config(arguments: argparse.Namespace) -> ClassifierConfig:
    """Return the network's config with the sizes of the data still to come.

    Raises:
        ValueError: whatever the layer or the network refuses, before any data are read.
    """
    layer = registry.get(arguments.layer).name
    values: dict[str, Any] = recipes.model_defaults(layer)
    for name in recipes.MODEL:
        given = getattr(arguments, name)
        if given is not None:
            values[name] = given
    options = {
        **recipes.LAYER_OPTIONS.get(layer, {}),
        **parse_layer_options(layer, arguments.layer_option),
    }
    config = ClassifierConfig(1, 2, layer=layer, layer_options=options, **values)
    try:
        Classifier(config)
    except TypeError as error:
        raise ValueError(f"--layer-option: {error}") from error
    return config


def _source(dataset: str) -> str:
    """Return what `lrnnx eval` can load from another folder too."""
    path = Path(dataset)
    return str(path.resolve()) if path.suffix.lower() in (".ts", ".npz") else dataset


def _report(outcome: RunResult) -> None:
    result = outcome.result
    lines = [("test accuracy", f"{100 * result['test_accuracy']:.2f} %")]
    if result["dataset"] in recipes.PUBLISHED:
        method, accuracy = recipes.PUBLISHED[result["dataset"]]
        lines.append((f"{method}, published", f"{100 * accuracy:.2f} %"))
    if result["validation_accuracy"] is not None:
        value, epoch = 100 * result["validation_accuracy"], result["best_epoch"]
        lines.append(("validation accuracy", f"{value:.2f} % (epoch {epoch})"))
    lines += [
        ("parameters", f"{result['parameters']:,}"),
        ("time", elapsed(result)),
        ("run folder", str(outcome.folder)),
    ]
    print(table(lines))
