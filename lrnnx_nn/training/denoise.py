# SPDX-License-Identifier: MIT
"""``lrnnx train --task denoise``: clean speech from noisy speech, against classical filters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_nn import baselines, viz
from lrnnx_nn.architectures.unet import UNet, UNetConfig
from lrnnx_nn.data.audio import RecordedNoise, read_folder, write_wav
from lrnnx_nn.metrics import si_snr, snr
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.signal_recipes import DenoiseConfig, SoundSource
from lrnnx_nn.training.checkpoint import digest
from lrnnx_nn.training.denoise_task import GENERATED, DenoiseTask, Sounds, each, mean, read
from lrnnx_nn.training.denoiser import Denoiser, Pair, denoise_all, fixed_pairs
from lrnnx_nn.training.engine import Outcome
from lrnnx_nn.training.folder import (
    Progress,
    RunFolder,
    check_folder,
    kernels,
    read_config,
    versions,
)

TASK = "denoise"
NETWORK, NOISY = "network", "noisy"


class DenoiseRun(NamedTuple):
    """What `train_run` leaves: the folder, result.json's content, and how the fit ended."""

    folder: Path
    result: dict[str, Any]
    outcome: Outcome


def train_run(
    source: SoundSource,
    sounds: Sounds,
    config: DenoiseConfig,
    model_config: UNetConfig,
    fit: FitConfig,
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> DenoiseRun:
    """Train a denoiser, test it once against the baselines, and write all of it into ``folder``.

    Args:
        source: where the sounds were read from; `evaluate_run` and `resume_run` read them again.
        sounds: from `read`.
        config: what is asked of the network.
        model_config: the network.
        fit: how to train.
        folder: new or empty.
        device: where to train.
        progress: who shows how it goes on.

    Raises:
        ValueError: a folder in use, a network that does not fit, a loss that is not finite.
        KeyboardInterrupt: before the first evaluation.
    """
    folder = check_folder(folder)
    task, model = _prepare(sounds, config, model_config, fit, device)
    run = RunFolder.create(
        folder,
        {
            "task": TASK,
            "data": {
                **dataclasses.asdict(source),
                "rate": sounds.clean.rate,
                "files": [len(part) for part in sounds.split],
                "silent": len(sounds.clean.silent),
                "shared_noise": sounds.shared_noise,
                "digest": _digest(sounds),
            },
            "denoise": {**dataclasses.asdict(config), "gain": task.gain},
            "model": model_config.to_dict(),
            "training": dataclasses.asdict(fit),
            "device": str(device),
            "versions": versions(),
        },
    )
    return _train(run, sounds, task, model, fit, progress, device)


def resume_run(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> DenoiseRun:
    """Go on with an unfinished run.

    Raises:
        ValueError: no such run, a damaged file in it, data that have changed.
    """
    run = RunFolder.resume(folder, task=TASK)
    source, config, model_config, fit, gain = _read_config(run.path, run.config)
    sounds = read(source, config)
    task, model = _prepare(sounds, config, model_config, fit, device)
    files = [len(part) for part in sounds.split]
    asked = run.config["data"]
    changed = task.gain != gain or _digest(sounds) != asked.get("digest")
    if files != asked["files"] or changed:
        raise ValueError(
            f"{source.wav}: other sounds now ({files} files in three parts, the run began with "
            f"{asked['files']}), or the same files with other content"
        )
    return _train(run, sounds, task, model, fit, progress, device)


def _digest(sounds: Sounds) -> str:
    """Return a digest of every sound, in its part, and of recorded noise."""
    recorded = [noise.items for noise in sounds.noise if isinstance(noise, RecordedNoise)]
    return digest([[[x.name, x.samples] for x in part] for part in [*sounds.split, *recorded]])


def evaluate_run(
    folder: Path | str, *, source: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Test the network of a run folder again.

    Args:
        folder: of `train_run`.
        source: another folder of clean WAVs, all of which are tested; the run's test part if None.
        device: where.

    Raises:
        ValueError: not a run folder, a broken file in it, a bad folder of sounds.
    """
    folder = Path(folder)
    values, config, _, _, gain = _read_config(folder, read_config(folder))
    if source is None:
        sounds = read(values, config)
        items, noise = sounds.split.test, sounds.noise[2]
        rate = sounds.clean.rate
    else:
        noise = read(values, config).noise[2] if values.noise not in GENERATED else None
        found = read_folder(
            source, rate=values.rate, on_rate=values.on_rate, channel=values.channel  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        items, noise, rate = found.items, noise or GENERATED[values.noise], found.rate
    model = Denoiser(UNet.load(folder, device=device), gain).eval()
    pairs = fixed_pairs(items, noise, config.snr, config.split_seed + 1)
    return _test(model, pairs, rate, device)[0]


def report(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what `lrnnx eval` and the end of training print."""
    lines = [("test", f"{result['files']} files, {result['seconds_of_sound']:.0f} s of sound")]
    methods = sorted(result["methods"].items(), key=lambda item: -item[1]["si_snr"])
    for name, score in methods:
        lines.append((name, f"SI-SNR {score['si_snr']:6.2f} dB  SNR {score['snr']:6.2f} dB"))
    return lines


def _read_config(
    folder: Path, config: Mapping[str, Any]
) -> tuple[SoundSource, DenoiseConfig, UNetConfig, FitConfig, float]:
    try:
        known = {field.name for field in dataclasses.fields(SoundSource)}
        asked = dict(config["denoise"])
        gain = float(asked.pop("gain"))
        return (
            SoundSource(**{k: v for k, v in config["data"].items() if k in known}),
            DenoiseConfig(**asked),
            UNetConfig.from_dict(config["model"]),
            FitConfig(**config["training"]),
            gain,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder}: not the config of a denoise run ({error})") from error


def _prepare(
    sounds: Sounds,
    config: DenoiseConfig,
    model_config: UNetConfig,
    fit: FitConfig,
    device: torch.device | str,
) -> tuple[DenoiseTask, Denoiser]:
    task = DenoiseTask(sounds, config, fit.batch_size)
    torch.manual_seed(fit.seed)
    model = Denoiser(UNet(model_config), task.gain).to(device)
    return task, model


def _train(
    run: RunFolder,
    sounds: Sounds,
    task: DenoiseTask,
    model: Denoiser,
    fit: FitConfig,
    progress: Progress | None,
    device: torch.device | str,
) -> DenoiseRun:
    started = time.perf_counter()
    outcome = run.fit(
        model, task, fit, save_model=lambda best: best.unet.save(run.path), progress=progress
    )
    if outcome.weights is not None:
        model.load_state_dict(outcome.weights)
    config = task.config
    seed = config.split_seed + 1
    pairs = fixed_pairs(sounds.split.test, sounds.noise[2], config.snr, seed)
    result, cleaned = _test(model.eval(), pairs, sounds.clean.rate, device)
    result = run.finish(
        {
            **result,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(time.perf_counter() - started, 2),
            "device": str(device),
            "kernels": kernels(device),
            "threads": torch.get_num_threads(),
        },
        outcome,
    )
    write_examples(run.path, pairs, cleaned, sounds.clean.rate, config.examples)
    return DenoiseRun(run.path, result, outcome)


def _test(
    model: Denoiser, pairs: Sequence[Pair], rate: int, device: torch.device | str
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Denoise by every method; return figures and sounds.

    The filters called informed are given the power spectrum of the very noise in each file, which
    no one would know; the others estimate it from the noisy sound, as the network has to.
    """
    noisy = [pair.noisy for pair in pairs]
    spectra = [baselines.noise_spectrum(pair.noisy - pair.clean) for pair in pairs]
    cleaned = {NETWORK: denoise_all(model, noisy, device), NOISY: noisy}
    for name, method in (
        ("spectral subtraction", baselines.spectral_subtraction),
        ("Wiener", baselines.wiener),
    ):
        cleaned[name] = [method(x) for x in noisy]
        cleaned[f"{name}, informed"] = [
            method(x, known) for x, known in zip(noisy, spectra, strict=True)
        ]
    methods: dict[str, dict[str, Any]] = {}
    for name, sounds in cleaned.items():
        values = each(si_snr, sounds, pairs)
        by_snr = {
            f"{ratio:g}": mean([v for v, p in zip(values, pairs, strict=True) if p.snr == ratio])
            for ratio in sorted({pair.snr for pair in pairs})
        }
        methods[name] = {
            "si_snr": mean(values), "snr": mean(each(snr, sounds, pairs)), "si_snr_by_snr": by_snr,
        }  # fmt: skip
    result = {
        "files": len(pairs),
        "seconds_of_sound": sum(len(pair.clean) for pair in pairs) / rate,
        "rate": rate,
        "test_si_snr": methods[NETWORK]["si_snr"],
        "noisy_si_snr": methods[NOISY]["si_snr"],
        "methods": methods,
    }
    return result, cleaned


def write_examples(
    folder: Path, pairs: Sequence[Pair], cleaned: Mapping[str, Sequence[Tensor]], rate: int,
    count: int,
) -> None:  # fmt: skip
    """Write a few test files noisy, denoised and clean, and a spectrogram of each.

    The three sounds of an example are scaled by one factor where the loudest would be clipped.
    """
    if not count:
        return
    place = folder / "examples"
    place.mkdir(exist_ok=True)
    step = max(1, len(pairs) // count)
    for i in range(0, min(len(pairs), step * count), step):
        pair = pairs[i]
        sounds = {NOISY: pair.noisy, "denoised": cleaned[NETWORK][i], "clean": pair.clean}
        loudest = max(float(x.abs().max()) for x in sounds.values())
        stem = Path(pair.name).with_suffix("").as_posix().replace("/", "-")
        for name, x in sounds.items():
            write_wav(place / f"{stem}-{name}.wav", x / max(1.0, loudest), rate)
        sounds = {NOISY: pair.noisy, "Wiener": cleaned["Wiener"][i],
                  "denoised by the network": cleaned[NETWORK][i], "clean": pair.clean}  # fmt: skip
        figure = viz.plot_spectrograms(sounds, rate, f"{pair.name}, {pair.snr:g} dB")
        viz.save_figure(figure, place / f"{stem}.png")
