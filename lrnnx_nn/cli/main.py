# SPDX-License-Identifier: MIT
"""Arguments and errors of ``lrnnx``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lrnnx_nn import recipes
from lrnnx_nn.optional import MissingDependencyError
from lrnnx_nn.recipes import TrainingConfig

USER_ERROR, INTERRUPTED = 2, 130


def integer(text: str) -> int:
    """Read an integer; argparse names this function in its message."""
    return int(text)


def number(text: str) -> float:
    """Read a number; argparse names this function in its message."""
    return float(text)


_KINDS: dict[type, tuple[Any, str]] = {
    int: (integer, "N"),
    float: (number, "X"),
    str: (str, "NAME"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    A user's error is one line on stderr and code 2; Ctrl-C is code 130.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return importlib.import_module(f"lrnnx_nn.cli.{arguments.module}").run(arguments)
    except BrokenPipeError:
        # The reader has gone (`lrnnx models | head`): no error of ours, and nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("lrnnx: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MissingDependencyError) as error:
        if arguments.traceback:
            raise
        print(f"lrnnx: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other user error: one line, code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"lrnnx: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = _Parser(prog="lrnnx", description="Linear recurrent networks on sequences.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from (default: one line)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_models(commands)
    doctor = commands.add_parser("doctor", help="what is installed, and what is missing")
    doctor.set_defaults(module="doctor")
    warmup = commands.add_parser("warmup", help="compile the kernels ahead of their first use")
    warmup.set_defaults(module="warmup")
    warmup.add_argument(
        "--device", default="cuda", help="cuda, or cuda:1 ... (default: %(default)s)"
    )
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **options: Any) -> None:
        from importlib.metadata import version

        print(f"lrnnx-core {version('lrnnx-core')}")
        parser.exit()


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a sequence classifier and test it",
        description="Train a sequence classifier, test it once, and leave a run folder with "
        "config, weights, metrics and pictures. Ctrl-C ends training and keeps the best network.",
    )
    parser.set_defaults(module="train")
    add = parser.add_argument
    add(
        "--dataset",
        default=recipes.DEFAULT_DATASET,
        metavar="NAME|FILE",
        help="a set that aeon ships, digits, or a .ts or .npz file (default: %(default)s)",
    )
    add(
        "--layer",
        default=recipes.DEFAULT_LAYER,
        metavar="MODEL",
        help="recurrent layer, see `lrnnx models` (default: %(default)s)",
    )
    add(
        "--out",
        metavar="FOLDER",
        help="new or empty run folder (default: runs/DATASET-LAYER-SEED-TIME)",
    )
    add(
        "--device",
        default="auto",
        help="auto (a CUDA device if there is one), cpu, cuda, cuda:1 ... (default: %(default)s)",
    )
    # A network this small gains nothing from a second thread, and on a busy machine loses much:
    # threads that wait for each other at every operation made the demo ten times slower.
    add(
        "--threads",
        type=integer,
        default=1,
        metavar="N",
        help="CPU threads; 0: torch's own choice, for larger networks (default: %(default)s)",
    )
    model = parser.add_argument_group("the network")
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
        kind, metavar = _KINDS[type(recipes.MODEL[name])]
        text += f" (default: {_model_default(name)})"
        model.add_argument(_flag(name), type=kind, help=text, metavar=metavar)
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
    }
    for field in dataclasses.fields(TrainingConfig):
        if field.name == "refit":
            continue
        kind, metavar = _KINDS[type(field.default)]
        group.add_argument(
            _flag(field.name), type=kind, default=field.default,
            metavar=metavar,
            help=f"{texts[field.name]} (default: %(default)s)",
        )  # fmt: skip
    group.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=TrainingConfig.refit,
        help="train once more on training and validation part, for the epochs that validation "
        f"chose (default: --{'refit' if TrainingConfig.refit else 'no-refit'})",
    )  # fmt: skip


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="test the network of a run folder again")
    parser.set_defaults(module="evaluate")
    parser.add_argument("run", metavar="RUN", help="folder that `lrnnx train` wrote")
    parser.add_argument(
        "--dataset", metavar="NAME|FILE", help="test on this set (default: the run's)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda ... (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")


def _add_models(commands: Any) -> None:
    parser = commands.add_parser("models", help="every model with its options and citation")
    parser.set_defaults(module="models")
    parser.add_argument("name", nargs="?", metavar="MODEL", help="only this one (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (default: text)")
    form.add_argument("--cite", action="store_true", help="print BibTeX alone (default: text)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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


if __name__ == "__main__":
    sys.exit(main())
