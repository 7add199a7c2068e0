# SPDX-License-Identifier: MIT
"""Options of ``lrnnx train --task denoise``, and the run. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

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
from lrnnx_nn.signal_recipes import (
    CHANNELS,
    DENOISE_FIT,
    DENOISE_MODEL,
    LOSSES,
    ON_RATE,
    DenoiseConfig,
    SoundSource,
)

SUMMARY = "clean speech from noisy speech, against classical filters."
PUBLISHED = ("attenuate",)

_TEXTS = {
    "layer": "recurrent layer, see `lrnnx models`",
    "d_state": "state size of the layer",
    "channels": "channels of the levels below the first",
    "factors": "samples of a level for one of the next, as many as channels",
    "n_layer": "blocks at each level, down and up",
    "n_neck": "blocks at the coarsest level",
    "n_output": "blocks behind the way up",
    "d_stem": "channels of the first level",
    "preconv": "width of the convolution in front of each layer; 0: none",
    "norm": "layer, rms, batch or none",
    "activation": "silu, gelu, relu or none",
    "residual": "add the input of each block to its output",
    "causal": "look at the past alone, apart from the samples of a frame, so as to stream",
}


def add_arguments(parser: Any) -> None:
    """Add the groups of this task."""
    add = parser.add_argument_group("the sounds").add_argument
    add("--wav", required=True, metavar="FOLDER",
        help="WAV files of clean speech, in folders below it too (required)")  # fmt: skip
    add("--noise", default=SoundSource.noise, metavar="white|pink|FOLDER",
        help="generated noise, or WAV files of noise (default: %(default)s)")  # fmt: skip
    add("--snr", nargs="+", type=number, metavar="DB", default=list(DenoiseConfig.snr),
        help="signal-to-noise ratio, or the lowest and the highest (default: 0 10)")  # fmt: skip
    add("--rate", type=integer, metavar="HZ",
        help="samples a second (default: those of the first file)")  # fmt: skip
    add("--on-rate", choices=ON_RATE, default=SoundSource.on_rate,
        help="refuse files of another rate, or resample them (default: %(default)s)")  # fmt: skip
    add("--channel", choices=CHANNELS, default=SoundSource.channel,
        help="what becomes of stereo sound (default: %(default)s)")  # fmt: skip
    add("--segment", type=number, metavar="S", default=DenoiseConfig.segment,
        help="seconds of a stretch that training reads (default: %(default)s)")  # fmt: skip
    add("--loss", choices=LOSSES, default=DenoiseConfig.loss,
        help="what training makes small: -SNR, -SI-SNR or the mean absolute error "
        "(default: %(default)s)")  # fmt: skip
    add("--validation-fraction", type=number, metavar="X",
        default=DenoiseConfig.validation_fraction,
        help="share of the files (default: %(default)s)")  # fmt: skip
    add("--test-fraction", type=number, metavar="X", default=DenoiseConfig.test_fraction,
        help="share of the files (default: %(default)s)")  # fmt: skip
    add("--split-seed", type=integer, metavar="N", default=DenoiseConfig.split_seed,
        help="of the three parts and the noise to test with (default: %(default)s)")  # fmt: skip
    add("--examples", type=integer, metavar="N", default=DenoiseConfig.examples,
        help="test files of which sounds and spectrograms are written "
        "(default: %(default)s)")  # fmt: skip
    _add_network(parser.add_argument_group("the network"))
    add_training_options(parser, DENOISE_FIT)


def _add_network(group: Any) -> None:
    group.add_argument(
        "--published", choices=PUBLISHED,
        help="start from a published configuration instead of the defaults below (default: none)",
    )  # fmt: skip
    for name, default in DENOISE_MODEL.items():
        text = f"{_TEXTS[name]} (default: {_shown(default)})"
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(flag(name), action=action, default=None, help=text)
        elif isinstance(default, tuple):
            group.add_argument(flag(name), type=integer, nargs="+", metavar="N", help=text)
        else:
            kind, metavar = KINDS[type(default)]
            group.add_argument(flag(name), type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--layer-option", action="append", default=[], metavar="KEY=VALUE",
        help="a further option of the layer, may be repeated, as in bidirectional=true "
        "(default: none)",
    )  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else value


def run(arguments: argparse.Namespace) -> int:
    """Check every argument, read the sounds, then train; return the exit code."""
    from lrnnx_nn.cli.options import parse_device
    from lrnnx_nn.cli.progress import Progress
    from lrnnx_nn.optional import require
    from lrnnx_nn.training import denoise, denoise_task
    from lrnnx_nn.training.folder import check_folder

    device = parse_device(arguments.device)
    for package in ("matplotlib", "safetensors"):
        require(package)
    progress = Progress("validation_si_snr", "SI-SNR {:.2f} dB", maximize=True)
    if arguments.resume is not None:
        with cpu_threads(arguments.threads), progress:
            return _end(denoise.resume_run(arguments.resume, device=device, progress=progress))
    fit = fit_config(arguments)
    model_config = _model_config(arguments)
    if len(arguments.snr) > 2:
        raise ValueError(f"--snr: {len(arguments.snr)} numbers, expected one or two")
    fields = [f.name for f in dataclasses.fields(DenoiseConfig) if f.name != "snr"]
    config = DenoiseConfig(
        snr=(arguments.snr[0], arguments.snr[-1]), **{k: getattr(arguments, k) for k in fields}
    )
    noise = arguments.noise
    source = SoundSource(
        str(Path(arguments.wav).resolve()),
        noise if noise in denoise_task.GENERATED else str(Path(noise).resolve()),
        arguments.rate, arguments.on_rate, arguments.channel,
    )  # fmt: skip
    folder = None if arguments.out is None else check_folder(arguments.out)
    sounds = denoise_task.read(source, config)
    if folder is None:
        folder = new_folder("denoise", model_config.layer, fit.seed)
    counts = [len(part) for part in sounds.split]
    silent = f", {len(sounds.clean.silent)} silent ones left out" if sounds.clean.silent else ""
    print(
        f"{sum(counts)} files, {sounds.clean.seconds / 60:.1f} minutes at {sounds.clean.rate} Hz"
        f"{silent}: {counts[0]} to train on, {counts[1]} to validate, {counts[2]} to test"
    )
    if sounds.shared_noise:
        print("lrnnx: fewer than three files of noise: all parts share them", file=sys.stderr)
    with cpu_threads(arguments.threads), progress:
        outcome = denoise.train_run(
            source, sounds, config, model_config, fit, folder, device=device, progress=progress
        )
    return _end(outcome)


def _model_config(arguments: argparse.Namespace) -> Any:
    """Return the network's config; whatever it refuses is found before any sound is read."""
    from lrnnx_nn.architectures.unet import UNet, UNetConfig
    from lrnnx_nn.cli.options import parse_layer_options

    given = {k: getattr(arguments, k) for k in DENOISE_MODEL if getattr(arguments, k) is not None}
    if arguments.published is None:
        base = UNetConfig(**DENOISE_MODEL)
    else:
        base = UNetConfig.named(arguments.published)
    values = {**base.to_dict(), **given}
    if arguments.layer_option:
        values["layer_options"] = parse_layer_options(values["layer"], arguments.layer_option)
    elif "layer" in given:
        values["layer_options"] = {}
    config = UNetConfig.from_dict(values)
    try:
        UNet(config)
    except TypeError as error:
        raise ValueError(f"--layer-option: {error}") from error
    return config


def _end(outcome: Any) -> int:
    from lrnnx_nn.training import denoise
    from lrnnx_nn.training.folder import elapsed

    result = outcome.result
    print(table([
        *denoise.report(result),
        ("parameters", f"{result['parameters']:,}"),
        ("time", elapsed(result)),
        ("run folder", str(outcome.folder)),
    ]))  # fmt: skip
    if result["diverged"]:
        print("lrnnx: warning: the loss became infinite; try a smaller --lr", file=sys.stderr)
    if result["interrupted"]:
        print(
            "lrnnx: interrupted, the best network was kept and tested; "
            f"go on with lrnnx train --resume {outcome.folder}",
            file=sys.stderr,
        )
        return 130
    return 0
