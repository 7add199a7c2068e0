# SPDX-License-Identifier: MIT
"""Options of ``lrnnx train --task lm``, and the run. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from lrnnx_nn import recipes
from lrnnx_nn.cli.arguments import (
    KINDS,
    add_training_options,
    cpu_threads,
    fit_config,
    flag,
    integer,
    new_folder,
    number,
    table,
)

SUMMARY = "a language model of text files."

_TEXTS = {
    "d_model": "channels of the blocks",
    "n_layer": "number of blocks",
    "d_intermediate": "width of the gated MLP of each block; 0: none",
    "norm": "rms, layer or none",
    "mlp": "swiglu, geglu or gelu",
    "dropout": "probability of a zero",
    "context": "tokens of a training window, and attention's window",
    "windows": "random, or stream: consecutive ones, with the state carried on",
    "validation_fraction": "of the text, before the test part; 0: choose nothing by it",
    "test_fraction": "of the text, at its end",
    "sample": "tokens of the text that is written at the end",
    "temperature": "of that text; 0: always the likeliest token",
}


def add_arguments(parser: Any) -> None:
    """Add the groups of this task."""
    text = parser.add_argument_group("text")
    add = text.add_argument
    add(
        "--text", nargs="+", required=True, metavar="FILE",
        help="UTF-8 text files, or folders of .txt, .text and .md files, read in this order "
        "(default: none, always needed)",
    )  # fmt: skip
    for part in ("validation", "test"):
        add(
            f"--{part}-text", nargs="+", metavar="FILE",
            help=f"files for the {part} part (default: a part of --text)",
        )  # fmt: skip
    add(
        "--vocabulary", default="byte", metavar="byte|char|FILE",
        help="bytes, characters, or the .json file of a tokenizer (default: %(default)s)",
    )  # fmt: skip
    add(
        "--unknown-characters", action="store_true",
        help="char: a token for characters that the training part lacks (default: an error)",
    )  # fmt: skip
    for name in ("validation_fraction", "test_fraction"):
        _add(text, name)
    model = parser.add_argument_group("the network")
    model.add_argument(
        "--mixer", default=recipes.LM["mixer"], metavar="TYPE,...",
        help="layers of `lrnnx models` or attn, repeated in turn over the blocks "
        "(default: %(default)s)",
    )  # fmt: skip
    model.add_argument(
        "--mixer-option", action="append", default=[], metavar="TYPE.KEY=VALUE",
        help="an option of a mixer, may be repeated, as in attn.n_heads=4 (default: none)",
    )  # fmt: skip
    sizes = "; ".join(f"{v['d_state']} for {k}" for k, v in recipes.LAYER_MODEL.items())
    model.add_argument(
        "--d-state", type=integer, metavar="N",
        help="state size of the layers that have one (default: "
        f"{recipes.MODEL['d_state']}; {sizes})",
    )  # fmt: skip
    for name in ("d_model", "n_layer", "d_intermediate", "norm", "mlp", "dropout"):
        _add(model, name)
    windows = parser.add_argument_group("windows")
    for name in ("context", "windows"):
        _add(windows, name)
    add_training_options(parser, recipes.LM_FIT)
    end = parser.add_argument_group("at the end")
    end.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True,
        help="compare with gzip, bzip2, xz and counting (default: --baselines)",
    )  # fmt: skip
    _add(end, "sample")
    end.add_argument(
        "--prompt", default="", metavar="TEXT",
        help="what that text goes on from (default: the first words of the test part)",
    )  # fmt: skip
    end.add_argument(
        flag("temperature"), type=number, default=recipes.LM["temperature"], metavar="X",
        help=f"{_TEXTS['temperature']} (default: %(default)s)",
    )  # fmt: skip


def _add(group: Any, name: str) -> None:
    default = recipes.LM[name]
    kind, metavar = KINDS[type(default)]
    group.add_argument(
        flag(name), type=kind, default=default, metavar=metavar,
        help=f"{_TEXTS[name]} (default: %(default)s)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Check every argument, then train; return the exit code."""
    from lrnnx_nn.cli.options import parse_device, parse_mixer_options
    from lrnnx_nn.cli.progress import Progress
    from lrnnx_nn.training import lm

    device = parse_device(arguments.device)
    progress = Progress("validation_bits_per_byte", "{:.3f}", unit="bits per byte")
    with cpu_threads(arguments.threads), progress:
        if arguments.resume is not None:
            outcome = lm.resume_run(arguments.resume, device=device, progress=progress)
        else:
            names = {f.name for f in dataclasses.fields(lm.LMConfig)}
            values = {k: v for k, v in vars(arguments).items() if k in names}
            mixers = tuple(name for name in arguments.mixer.split(",") if name)
            config = lm.LMConfig(
                **values, mixer_types=mixers,
                mixer_kwargs=parse_mixer_options(mixers, arguments.mixer_option),
            )  # fmt: skip
            folder = arguments.out or new_folder("lm", arguments.mixer, arguments.seed)
            outcome = lm.train_run(
                config, fit_config(arguments), folder, device=device, progress=progress,
                say=print,
            )  # fmt: skip
    print(table([*lm.report(outcome.result), ("run folder", str(outcome.folder))]))
    if outcome.result["sample"]:
        print(f"\n{outcome.result['sample']}")
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
