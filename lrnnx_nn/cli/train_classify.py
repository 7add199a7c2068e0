# SPDX-License-Identifier: MIT
"""Options of ``lrnnx train --task classify``, and the run. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from lrnnx_nn import recipes
from lrnnx_nn.cli.arguments import KINDS, flag
from lrnnx_nn.recipes import TrainingConfig

SUMMARY = "a classifier of sequences, of their own lengths each."


def run(arguments: argparse.Namespace) -> int:
    """Train; return the exit code."""
    from lrnnx_nn.cli import train

    return train.run(arguments)


def add_arguments(parser: Any) -> None:
    """Add the groups of this task."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        default=recipes.DEFAULT_DATASET,
        metavar="NAME|FILE",
        help="a set that aeon ships, digits, or a .ts or .npz file (default: %(default)s)",
    )
    model = parser.add_argument_group("the network")
    model.add_argument(
        "--layer",
        default=recipes.DEFAULT_LAYER,
        metavar="MODEL",
        help="recurrent layer, see `lrnnx models` (default: %(default)s)",
    )
    texts = {
        "d_model": "channels of the blocks",
        "d_state": "state size of the layer",
        "n_layer": "number of blocks",
        "norm": "layer, rms, batch or none",
        "activation": "none, gelu, half_glu1, half_glu2, full_glu or glu",
        "dropout": "probability of a zero",
        "pooling": "over time: mean, last or max",
    }
    for name, text in texts.items():
        kind, metavar = KINDS[type(recipes.MODEL[name])]
        text += f" (default: {_model_default(name)})"
        model.add_argument(flag(name), type=kind, help=text, metavar=metavar)
    model.add_argument(
        "--layer-option", action="append", default=[], metavar="KEY=VALUE",
        help="a further option of the layer, may be repeated, as in bidirectional=true "
        f"(default: {_layer_option_default()})",
    )  # fmt: skip
    _add_training_options(parser.add_argument_group("training"))


def _add_training_options(group: Any) -> None:
    texts = {
        "epochs": "largest number of passes over the training part",
        "batch_size": "sequences a step",
        "lr": "peak learning rate of AdamW",
        "ssm_lr": "the same for state-space parameters",
        "weight_decay": "of what is not a state-space parameter, a norm or a bias",
        "warmup": "part of the steps in which the rate rises",
        "clip": "largest norm of the gradient",
        "label_smoothing": "share of the target spread over all classes",
        "noise": "deviation of noise on the inputs, in units of each channel's deviation",
        "crop": "cut training sequences to stretches at most this share shorter",
        "validation_fraction": "of the training part, held out for every choice",
        "patience": "stop after so many epochs without a better validation result; 0: never",
        "seed": "of splits, initial values, order and noise",
        "accumulate": "compute the batch in so many parts, for the same step in less memory",
        "precision": "float32, or bfloat16 or float16 for matrix products",
    }
    for field in dataclasses.fields(TrainingConfig):
        if field.name == "refit":
            continue
        kind, metavar = KINDS[type(field.default)]
        group.add_argument(
            flag(field.name), type=kind, default=field.default,
            metavar=metavar,
            help=f"{texts[field.name]} (default: %(default)s)",
        )  # fmt: skip
    group.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=TrainingConfig.refit,
        help="train once more on training and validation part, for the epochs that validation "
        f"chose (default: --{'refit' if TrainingConfig.refit else 'no-refit'})",
    )  # fmt: skip


def _model_default(name: str) -> str:
    exceptions = [
        f"{values[name]} for {layer}"
        for layer, values in recipes.LAYER_MODEL.items()
        if name in values
    ]
    return "; ".join([str(recipes.MODEL[name]), *exceptions])


def _layer_option_default() -> str:
    chosen = [
        f"{key}={value} for {layer}"
        for layer, values in recipes.LAYER_OPTIONS.items()
        for key, value in values.items()
    ]
    return "; ".join(chosen) or "none"
