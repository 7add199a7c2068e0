# SPDX-License-Identifier: MIT
"""Options of ``lrnnx train --task forecast``, and the run. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from lrnnx_nn.cli.arguments import (
    add_training_options,
    cpu_threads,
    fit_config,
    integer,
    new_folder,
    number,
    table,
)
from lrnnx_nn.cli.network import add_network_options, network_options
from lrnnx_nn.signal_recipes import (
    FORECAST_FIT,
    FORECAST_LAYER_OPTIONS,
    FORECAST_MODEL,
    NORMALIZE,
    ON_GAP,
    ForecastConfig,
    SeriesSource,
)

SUMMARY = "the continuation of a series, against classical forecasts."


def add_arguments(parser: Any) -> None:
    """Add the groups of this task."""
    data = parser.add_argument_group("the series")
    add = data.add_argument
    add(
        "--series", default="sunspots", metavar="NAME|FILE",
        help="sunspots, co2, or a CSV file (default: %(default)s)",
    )  # fmt: skip
    add(
        "--column", action="append", default=[], metavar="COLUMN",
        help="name or number, from 1, of a column; may be repeated, all are forecast together "
        "(default: the only one besides the time)",
    )  # fmt: skip
    add(
        "--time", metavar="COLUMN",
        help="column of time, numbers or dates (default: none, rows are equally spaced)",
    )  # fmt: skip
    add(
        "--time-format", metavar="FORMAT",
        help="of dates that are not ISO 8601, such as %%d.%%m.%%Y (default: ISO 8601)",
    )  # fmt: skip
    add(
        "--on-gap", choices=ON_GAP,
        help="missing values, missing rows, uneven spacing: refuse them, let elapsed time tell the "
        "network, or interpolate (default: error for a file, timesteps for a set by name)",
    )  # fmt: skip
    add(
        "--missing", action="append", default=[], metavar="TEXT",
        help="a further text that stands for a missing value, as in --missing=-99.99; may be "
        "repeated (default: empty cells, NA, NaN, null and the like)",
    )  # fmt: skip
    _add_forecast(parser.add_argument_group("the forecast"))
    add_network_options(parser, FORECAST_MODEL, FORECAST_LAYER_OPTIONS)
    add_training_options(parser, FORECAST_FIT)


def _add_forecast(group: Any) -> None:
    base, add = ForecastConfig(), group.add_argument
    add("--horizon", type=integer, metavar="N", default=base.horizon,
        help="rows ahead (default: %(default)s)")  # fmt: skip
    add("--season", type=integer, metavar="N",
        help="rows a season, for the seasonal naive forecast and the unit of the MASE "
        "(default: 11 for sunspots, 52 for co2, 1 for a file)")  # fmt: skip
    add("--context", type=integer, metavar="N",
        help="rows a forecast starts from (default: four seasons or two horizons, at most a third "
        "of the training part)")  # fmt: skip
    add("--unroll", type=integer, metavar="N",
        help="rows over which training feeds outputs back; 0: one step ahead alone "
        "(default: the horizon)")  # fmt: skip
    add("--normalize", choices=NORMALIZE, default=base.normalize,
        help="centre and scale each window by its own context, by its last value and the deviation "
        "of the training part, or all by the training part (default: %(default)s)")  # fmt: skip
    add("--validation-fraction", type=number, metavar="X", default=base.validation_fraction,
        help="share of the rows behind the training part (default: %(default)s)")  # fmt: skip
    add("--test-fraction", type=number, metavar="X", default=base.test_fraction,
        help="share of the rows at the end (default: %(default)s)")  # fmt: skip
    add("--stride", type=integer, metavar="N", default=base.stride,
        help="rows between two origins in the test part (default: %(default)s)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Check every argument, read the series, then train; return the exit code."""
    from lrnnx_nn.architectures.regressor import RegressorConfig
    from lrnnx_nn.cli.options import parse_device
    from lrnnx_nn.cli.progress import Progress
    from lrnnx_nn.optional import require
    from lrnnx_nn.training import forecast
    from lrnnx_nn.training.folder import check_folder

    device = parse_device(arguments.device)
    for package in ("matplotlib", "safetensors"):
        require(package)
    progress = Progress("validation_mase", "MASE {:.3f}")
    if arguments.resume is not None:
        with cpu_threads(arguments.threads), progress:
            return _end(forecast.resume_run(arguments.resume, device=device, progress=progress))
    fit = fit_config(arguments)
    options = network_options(arguments, FORECAST_MODEL, FORECAST_LAYER_OPTIONS)
    RegressorConfig(1, 1, output="sequence", **options)
    asked = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(ForecastConfig)}
    given: dict[str, Any] = {"unroll": 0}
    given |= {k: v for k, v in asked.items() if v is not None}
    ForecastConfig(**given)  # before the series is read
    folder = None if arguments.out is None else check_folder(arguments.out)
    name = arguments.series
    source = SeriesSource(
        str(Path(name).resolve()) if Path(name).is_file() else name,
        tuple(arguments.column), arguments.time, arguments.on_gap, tuple(arguments.missing),
        arguments.time_format,
    )  # fmt: skip
    series = forecast.read(source)
    config = forecast.defaults(series, asked)
    count = len(series.columns)
    model_config = RegressorConfig(count, count, output="sequence", **options)
    if folder is None:
        folder = new_folder("forecast", series.name, model_config.layer, fit.seed)
    gaps = f"{series.gaps} gaps" if series.gaps or series.regular else "time stamps off the grid"
    labels = series.labels(series.positions[[0, -1]])
    print(
        f"{series.name}: {len(series)} rows of {series.clock.period}, {labels[0]} to {labels[1]}, "
        f"{gaps}; season {config.season}, context {config.context}, horizon {config.horizon}"
    )
    with cpu_threads(arguments.threads), progress:
        outcome = forecast.train_run(
            source, series, config, model_config, fit, folder, device=device, progress=progress
        )
    return _end(outcome)


def _end(outcome: Any) -> int:
    from lrnnx_nn.training import forecast
    from lrnnx_nn.training.folder import elapsed

    result = outcome.result
    print(table([
        *forecast.report(result),
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
