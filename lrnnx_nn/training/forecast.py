# SPDX-License-Identifier: MIT
"""``lrnnx train --task forecast``: a series continued, against classical forecasts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_nn import viz
from lrnnx_nn.architectures.regressor import Regressor, RegressorConfig
from lrnnx_nn.data.series import STATSMODELS, Series, Split, load_series, split_in_time
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.signal_recipes import ForecastConfig, SeriesSource
from lrnnx_nn.training.checkpoint import digest
from lrnnx_nn.training.engine import Outcome
from lrnnx_nn.training.folder import (
    Progress,
    RunFolder,
    check_folder,
    kernels,
    read_config,
    versions,
)
from lrnnx_nn.training.forecast_scores import (
    NETWORK,
    SEASONAL,
    baseline_forecasts,
    scores,
    write_forecasts,
)
from lrnnx_nn.training.forecast_task import ForecastTask
from lrnnx_nn.training.forecaster import Forecaster, forecast

TASK = "forecast"


class ForecastRun(NamedTuple):
    """What `train_run` leaves: the folder, result.json's content, and how the fit ended."""

    folder: Path
    result: dict[str, Any]
    outcome: Outcome


def read(source: SeriesSource) -> Series:
    """Load the series."""
    return load_series(
        source.source, source.columns, source.time, on_gap=source.on_gap,  # pyright: ignore[reportArgumentType]
        missing=source.missing, time_format=source.time_format,
    )  # fmt: skip


def defaults(series: Series, values: Mapping[str, Any]) -> ForecastConfig:
    """Return a config in which what is None stands for the series' own: season, context, unroll.

    The season of a known set is its own, of a file 1. The context is four seasons or twice the
    horizon, whichever is longer, but at most a third of the training part.
    """
    given = {k: v for k, v in values.items() if v is not None}
    base = ForecastConfig()
    horizon = given.get("horizon", base.horizon)
    known = STATSMODELS.get(series.name.lower())
    season = given.get("season", known.season if known is not None else 1)
    held = sum(given.get(k, getattr(base, k)) for k in ("validation_fraction", "test_fraction"))
    room = max(2, int(len(series) * (1 - held)) // 3)
    chosen = {"season": season, "context": min(max(4 * season, 2 * horizon), room)}
    return ForecastConfig(**{**chosen, "unroll": horizon, **given})


def train_run(
    source: SeriesSource,
    series: Series,
    config: ForecastConfig,
    model_config: RegressorConfig,
    fit: FitConfig,
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ForecastRun:
    """Train a forecaster, test it once against the baselines, and write all of it into ``folder``.

    Args:
        source: where the series was read from; `evaluate_run` and `resume_run` read it again.
        series: the series.
        config: what to forecast.
        model_config: the network; its output is a sequence.
        fit: how to train.
        folder: new or empty.
        device: where to train.
        progress: who shows how it goes on.

    Raises:
        ValueError: a folder in use, a series too short, a network that cannot forecast it, a loss
            that is not finite.
        KeyboardInterrupt: before the first evaluation.
    """
    folder = check_folder(folder)
    task, model, split = _prepare(series, config, model_config, fit, device)
    run = RunFolder.create(
        folder,
        {
            "task": TASK,
            "data": {
                **dataclasses.asdict(source),
                "rows": len(series),
                "gaps": series.gaps,
                "digest": _digest(series),
            },
            "forecast": dataclasses.asdict(config),
            "model": model_config.to_dict(),
            "training": dataclasses.asdict(fit),
            "device": str(device),
            "versions": versions(),
        },
    )
    return _train(run, series, split, task, model, config, fit, progress, device)


def resume_run(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ForecastRun:
    """Go on with an unfinished run.

    Raises:
        ValueError: no such run, a damaged file in it, data that have changed.
    """
    run = RunFolder.resume(folder, task=TASK)
    source, config, model_config, fit = _read_config(run.path, run.config)
    series = read(source)
    rows = run.config["data"]["rows"]
    if len(series) != rows:
        raise ValueError(f"{source.source}: {len(series)} rows now, the run began with {rows}")
    if _digest(series) != run.config["data"].get("digest"):
        raise ValueError(f"{source.source}: the series has changed since the run began")
    task, model, split = _prepare(series, config, model_config, fit, device)
    return _train(run, series, split, task, model, config, fit, progress, device)


def _digest(series: Series) -> str:
    return digest([series.columns, series.values, series.positions, series.observed])


def evaluate_run(
    folder: Path | str, *, source: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Test the network of a run folder again.

    Args:
        folder: of `train_run`.
        source: another series with the same columns; the run's if None.
        device: where.

    Raises:
        ValueError: not a run folder, a broken file in it, a series that does not fit.
    """
    folder = Path(folder)
    values, config, _, _ = _read_config(folder, read_config(folder))
    if source is not None:
        values = dataclasses.replace(values, source=source)
    series = read(values)
    split = split_in_time(series, config.validation_fraction, config.test_fraction)
    task = ForecastTask(series, split, config)
    regressor = Regressor.load(folder, device=device)
    if regressor.config.d_input != len(series.columns):
        raise ValueError(
            f"{series.name}: {len(series.columns)} columns; the run in {folder} was trained on "
            f"{regressor.config.d_input}"
        )
    result, _, _ = _test(Forecaster(regressor).eval(), series, split, task, config)
    return result


def report(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what `lrnnx eval` and the end of training print."""
    lines = [
        ("series", f"{result['series']}, {', '.join(result['columns'])}"),
        ("forecasts", f"{result['horizon']} rows from {result['origins']} origins"),
    ]
    for name, score in sorted(result["methods"].items(), key=lambda item: _order(item[1]["mase"])):
        shown = "not finite" if score["mase"] is None else f"MASE {score['mase']:.3f}"
        columns = score["columns"].values()
        if len(columns) == 1 and score["mase"] is not None:
            only = next(iter(columns))
            shown += f"  RMSE {only['rmse']:.4g}  MAE {only['mae']:.4g}"
        lines.append((name, shown))
    return lines


def _order(value: float | None) -> float:
    return float("inf") if value is None else value


def _read_config(
    folder: Path, config: Mapping[str, Any]
) -> tuple[SeriesSource, ForecastConfig, RegressorConfig, FitConfig]:
    try:
        known = {field.name for field in dataclasses.fields(SeriesSource)}
        data = {k: v for k, v in config["data"].items() if k in known}
        return (
            SeriesSource(**data),
            ForecastConfig(**config["forecast"]),
            RegressorConfig.from_dict(config["model"]),
            FitConfig(**config["training"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder}: not the config of a forecast run ({error})") from error


def _prepare(
    series: Series,
    config: ForecastConfig,
    model_config: RegressorConfig,
    fit: FitConfig,
    device: torch.device | str,
) -> tuple[ForecastTask, Forecaster, Split]:
    """Make everything a run needs; whatever does not fit is found here, before any folder."""
    split = split_in_time(series, config.validation_fraction, config.test_fraction)
    task = ForecastTask(series, split, config)
    task.batch_size = fit.batch_size
    torch.manual_seed(fit.seed)
    regressor = Regressor(model_config)
    task.set_statistics(regressor)
    model = Forecaster(regressor).to(device)
    with torch.no_grad():  # a layer may refuse elapsed time: let it do so now
        forecast(model.eval(), task.windows(task.starts[:1]), config.context)
    return task, model.train(), split


def _train(
    run: RunFolder,
    series: Series,
    split: Split,
    task: ForecastTask,
    model: Forecaster,
    config: ForecastConfig,
    fit: FitConfig,
    progress: Progress | None,
    device: torch.device | str,
) -> ForecastRun:
    started = time.perf_counter()
    outcome = run.fit(
        model, task, fit, save_model=lambda best: best.regressor.save(run.path), progress=progress
    )
    if outcome.weights is not None:
        model.load_state_dict(outcome.weights)
    result, forecasts, origins = _test(model.eval(), series, split, task, config)
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
    write_forecasts(run.path / "forecasts.csv", series, origins, forecasts)
    draw(run.path, series, origins, forecasts, result)
    return ForecastRun(run.path, result, outcome)


def _test(
    model: Forecaster, series: Series, split: Split, task: ForecastTask, config: ForecastConfig
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Forecast from every origin of the test part; return figures, forecasts and origins."""
    before = len(split.train) + len(split.validation)
    origins = torch.arange(before, len(series) - config.horizon + 1, config.stride)
    pieces = [task.windows(some) for some in origins.split(256)]
    network = torch.cat([forecast(model, piece, config.context) for piece in pieces])
    fitted = series.part(0, before)
    named = baseline_forecasts(series, origins, config.horizon, config.season, fitted)
    forecasts = {NETWORK: network, **named}
    rows = origins[:, None] + torch.arange(config.horizon)
    figures = scores(
        forecasts, series.values[rows], series.observed[rows], task.scale, series.columns
    )
    result = {
        "series": series.name,
        "columns": list(series.columns),
        "season": config.season,
        "horizon": config.horizon,
        "origins": len(origins),
        "test_mase": figures[NETWORK]["mase"],
        "seasonal_naive_mase": figures[SEASONAL]["mase"],
        "methods": figures,
    }
    return result, forecasts, origins


def draw(
    folder: Path,
    series: Series,
    origins: Tensor,
    forecasts: Mapping[str, Tensor],
    result: Mapping[str, Any],
) -> None:
    """Write the pictures of a run."""
    title = f"{series.name}: {result['horizon']} rows ahead"
    by_step = {name: score["mase_by_step"] for name, score in result["methods"].items()}
    pictures = {
        "forecasts": viz.plot_forecasts(series, origins, forecasts, title),
        "error_by_step": viz.plot_error_by_step(by_step, title),
    }
    for name, figure in pictures.items():
        viz.save_figure(figure, folder / f"{name}.png")
