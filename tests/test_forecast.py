"""Forecasting: windows and gaps, nothing of the future read, runs that resume and report."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_nn import viz
from lrnnx_nn.architectures.regressor import Regressor, RegressorConfig
from lrnnx_nn.baselines import seasonal_changes, seasonal_drift
from lrnnx_nn.cli.main import main
from lrnnx_nn.data.series import Series, read_csv, split_in_time
from lrnnx_nn.metrics import seasonal_scale
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.signal_recipes import ForecastConfig, SeriesSource
from lrnnx_nn.training import forecast as run
from lrnnx_nn.training.forecast import defaults, evaluate_run, train_run
from lrnnx_nn.training.forecast_scores import baseline_forecasts, scores, season_scale
from lrnnx_nn.training.forecast_task import ForecastTask, spread
from lrnnx_nn.training.forecaster import Forecaster, forecast, one_step_and_rollout, windows

for package in ("matplotlib", "safetensors", "rich"):
    pytest.importorskip(package)

same = torch.testing.assert_close
NETWORK = RegressorConfig(
    1, 1, output="sequence", d_model=4, d_state=4, n_layer=1, dropout=0.0,
    layer_options={"clip_eigs": True},
)  # fmt: skip
CONFIG = ForecastConfig(horizon=4, season=8, context=10, unroll=4)
QUICK = FitConfig(steps=4, batch_size=4, evaluate_every=2)
SMALL = ["--d-model", "4", "--d-state", "4", "--n-layer", "1", "--steps", "2", "--batch-size", "4"]


def T(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def written(path: Path, rows: list[tuple[float, float]], name: str = "mine.csv") -> Path:
    lines = ["t,y"] + [f"{t:g},{y!r}" for t, y in rows]
    (path / name).write_text("\n".join(lines) + "\n")
    return path / name


def rows(n: int = 80, gaps: tuple[int, ...] = (), noise: float = 0.1) -> list[tuple[float, float]]:
    z = torch.randn(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [
        (t, math.sin(2 * math.pi * t / 8) + 0.02 * t + noise * z[t])
        for t in range(n)
        if t not in gaps
    ]


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return read_csv(written(tmp_path, rows()), ["y"], "t")


@pytest.fixture
def gappy(tmp_path: Path) -> Series:
    path = written(tmp_path, rows(gaps=(13, 14, 31, 70)))
    return read_csv(path, ["y"], "t", on_gap="timesteps")


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "everything" not in request.node.name:
        monkeypatch.setattr(run, "draw", lambda *args: None)


def regressor(seed: int = 0, **options: Any) -> Regressor:
    torch.manual_seed(seed)
    return Regressor(dataclasses.replace(NETWORK, **{"layer_options": {}, **options}))


def cut(series: Series, origins: Tensor, normalize: str = "window", **sizes: int) -> Any:
    given = {"context": 10, "horizon": 4} | sizes
    return windows(
        series, origins, **given, normalize=normalize, mean=T(0.5), std=T(2.0)
    )  # fmt: skip


# ----------------------------------------------------------------------------------- windows


def test_windows_are_normalized_three_ways(series: Series) -> None:
    origins = torch.tensor([10, 33])
    rows = origins[:, None] + torch.arange(-10, 4)
    values = series.values[rows]
    for normalize, offset, scale in (
        ("train", T(0.5).expand(2, 1), T(2).expand(2, 1)),
        ("last", values[:, 9], T(2).expand(2, 1)),
        ("window", values[:, :10].mean(1), values[:, :10].std(1, correction=0)),
    ):
        data = cut(series, origins, normalize)
        same(data.offset, offset)
        same(data.scale, scale)
        same(data.u, ((values - offset[:, None]) / scale[:, None]).float())
        assert data.gaps is None
        assert bool(data.counts.all())


def test_a_context_that_does_not_move(series: Series) -> None:
    still = dataclasses.replace(series, values=torch.full_like(series.values, 7.0))
    data = cut(still, torch.tensor([10]))
    same(data.scale, torch.full((1, 1), 0.02).double())
    same(data.u, torch.zeros(1, 14, 1))


def test_windows_of_a_series_with_gaps(gappy: Series) -> None:
    data = cut(gappy, torch.tensor([15]))
    assert data.gaps is not None
    # rows 5 ... 18 stand at the times 5 ... 12, 15, 16 ... 20
    assert data.gaps.tolist() == [[1.0] * 7 + [3.0] + [1.0] * 5]


# ------------------------------------------------------------------------------- the network


def test_without_a_say_of_the_network_the_forecast_is_naive(series: Series) -> None:
    network = regressor()
    torch.nn.init.zeros_(network.decoder.weight)
    torch.nn.init.zeros_(network.decoder.bias)
    origins = torch.tensor([10, 20])
    ahead = forecast(Forecaster(network).eval(), cut(series, origins), 10)
    same(ahead, series.values[origins - 1][:, None].expand(2, 4, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["s5", "mamba"])
@pytest.mark.parametrize("timed", [False, True])
def test_the_free_run_is_the_loop_over_whole_sequences(
    gappy: Series, layer: str, timed: bool
) -> None:
    """Each new value appended, everything computed again: the gap ahead belongs to each row."""
    model = Forecaster(regressor(layer=layer)).double().eval()
    data = cut(gappy, torch.tensor([15, 40]))
    u, gaps = data.u.double(), data.gaps.double() if timed and data.gaps is not None else None
    with torch.no_grad():
        known, ahead = one_step_and_rollout(model, u, gaps, 10, 4)
        grown = u[:, :10]
        for _ in range(4):
            here = {} if gaps is None else {"integration_timesteps": gaps[:, : grown.shape[1]]}
            grown = torch.cat([grown, model(grown, **here)[:, -1:]], 1)
        here = {} if gaps is None else {"integration_timesteps": gaps[:, :9]}
        same(known, model(u[:, :9], **here))
    same(ahead, grown[:, 10:])
    if timed:
        without = one_step_and_rollout(model, u, None, 10, 4)[1].detach()
        assert float((without - ahead).abs().max()) > 1e-7


def test_nothing_of_the_horizon_is_read_but_its_times(gappy: Series) -> None:
    model = Forecaster(regressor()).eval()
    origins = torch.tensor([40])
    changed = dataclasses.replace(gappy, values=gappy.values.clone())
    changed.values[40:] = 1e3
    same(forecast(model, cut(gappy, origins), 10), forecast(model, cut(changed, origins), 10))


def test_networks_that_cannot_forecast() -> None:
    for options, message in (
        ({"output": "value"}, "output = 'value' with 1 inputs and 1 targets"),
        ({"d_target": 2}, "'sequence' with 1 inputs and 2 targets"),
    ):
        with pytest.raises(ValueError, match=message):
            Forecaster(regressor(**options))


# -------------------------------------------------------------------------------------- scores


def test_the_unit_of_the_mase(series: Series, gappy: Series) -> None:
    for season in (1, 8):
        same(season_scale(series, season), seasonal_scale(series.values[:, 0], season)[None])
        _, grid = gappy.grid()
        column = grid[:, 0]
        expected = seasonal_scale(column, season, mask=~column.isnan())
        same(season_scale(gappy, season), expected[None])
    with pytest.raises(ValueError, match="spans 79 sampling periods, expected two observed rows a"):
        season_scale(series, 80)


def test_seasonal_drift_follows_a_trend() -> None:
    times = torch.arange(30).double()
    values = torch.sin(2 * math.pi * times / 7) + 0.3 * times
    same(seasonal_changes(values, times, 7), torch.full((23,), 2.1).double())
    future = torch.arange(30, 50).double()
    expected = torch.sin(2 * math.pi * future / 7) + 0.3 * future
    same(seasonal_drift(values, times, future, 7), expected)
    # one pair of rows a season apart, and none
    short = seasonal_drift(values[:7], times[:7], T(7), 6)
    same(short, values[1:2] + values[6] - values[0])
    same(seasonal_drift(values[:6], times[:6], T(6), 6), values[:1])


def test_baselines_see_the_past_alone(gappy: Series) -> None:
    origins = torch.tensor([40, 50])
    fitted = gappy.part(0, 40)
    named = baseline_forecasts(gappy, origins, 4, 8, fitted)
    assert [name for name in named if not name.startswith("AR(")] == [
        "naive", "drift", "seasonal naive", "seasonal drift",
    ]  # fmt: skip
    assert len(named) == 5
    changed = dataclasses.replace(gappy, values=gappy.values.clone())
    changed.values[50:] = 1e3
    for name, other in baseline_forecasts(changed, origins, 4, 8, fitted).items():
        assert other.shape == (2, 4, 1)
        same(other, named[name])
    uneven = dataclasses.replace(gappy, positions=gappy.positions * 1.1, regular=False)
    assert len(baseline_forecasts(uneven, origins, 4, 8, uneven.part(0, 40))) == 4


def test_scores() -> None:
    truth = torch.tensor([[[1.0, 10], [2, 20]], [[3, 30], [4, 40]]]).double()
    counts = torch.tensor([[True, True], [True, False]])
    found = scores({"a": truth + 1, "b": truth}, truth, counts, T(2, 0), ["x", "y"])
    assert found["a"]["columns"]["x"] == {"mase": 0.5, "mae": 1.0, "rmse": 1.0}
    assert found["a"]["columns"]["y"]["mase"] is None  # over a unit of zero
    assert found["a"]["mase"] is None
    assert (found["b"]["mase"], found["b"]["mase_by_step"]) == (0.0, [0.0, 0.0])
    json.dumps(found, allow_nan=False)


def test_spread() -> None:
    assert spread(torch.arange(5), 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(torch.arange(100), 4).tolist() == [0, 33, 66, 99]


# ---------------------------------------------------------------------------------------- task


def test_windows_of_training_and_validation_stay_in_their_parts(series: Series) -> None:
    split = split_in_time(series, 0.2, 0.2)
    task = ForecastTask(series, split, CONFIG)
    assert (int(task.starts[0]), int(task.starts[-1]) + 4) == (10, 48)
    assert (int(task.origins[0]), int(task.origins[-1]) + 4) == (48, 64)
    changed = dataclasses.replace(series, values=series.values.clone())
    changed.values[48:] = 1e3
    other = ForecastTask(changed, split_in_time(changed, 0.2, 0.2), CONFIG)
    for name in ("mean", "std", "scale", "input_std", "change_mean", "change_std"):
        assert torch.equal(getattr(task, name), getattr(other, name))
    draws = [t.batch(torch.Generator().manual_seed(1)).u for t in (task, other)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("unroll", [0, 2, 4])
def test_the_loss_is_in_units_of_the_mase(gappy: Series, unroll: int) -> None:
    config = dataclasses.replace(CONFIG, unroll=unroll, normalize="last")
    task = ForecastTask(gappy, split_in_time(gappy), config)
    network = regressor()
    torch.nn.init.zeros_(network.decoder.weight)
    torch.nn.init.zeros_(network.decoder.bias)
    model = Forecaster(network)
    data = task.windows(task.starts[:3])
    values = data.u.double() * data.scale[:, None]
    near = values[:, 1:].diff(dim=1).abs()[:, : 8 if unroll else None]
    near = torch.cat([(values[:, 1] - values[:, 0]).abs()[:, None], near], 1).mean()
    far = values[:, 10 : 10 + unroll].abs().mean() if unroll else T(0)[0]
    same(task.loss(model, data).double(), (near + far) / task.scale[0], rtol=1e-4, atol=1e-5)


def test_interpolated_rows_do_not_count(tmp_path: Path) -> None:
    path = written(tmp_path, rows(gaps=(13, 14, 62)))
    series = read_csv(path, ["y"], "t", on_gap="interpolate")
    task = ForecastTask(series, split_in_time(series, 0.2, 0.2), CONFIG)
    model = Forecaster(regressor()).eval()
    before = task.evaluate(model)
    loss = task.loss(model, task.windows(torch.tensor([12])))
    # without normalizing by the context, which reads them
    assert not bool(task.windows(torch.tensor([60])).counts.all())
    data = task.windows(torch.tensor([12]))
    data.u[:, 11:13] = 50.0
    same(task.loss(model, data), loss)
    assert before.keys() == {"validation_mase"}


def test_series_too_short(series: Series) -> None:
    for part, config, message in (
        (series.part(0, 19), CONFIG, r"13 rows to train on, expected .* = 10 \+ 4"),
        (series, dataclasses.replace(CONFIG, horizon=13), "12 rows in the validation part, exp"),
        (series, dataclasses.replace(CONFIG, season=60), "expected two observed rows a season"),
    ):
        split = split_in_time(part)
        with pytest.raises(ValueError, match=message):
            ForecastTask(part, split, config)


def test_defaults(series: Series) -> None:
    config = defaults(series, {"horizon": 4, "season": None, "context": None, "unroll": None})
    assert (config.horizon, config.season, config.context, config.unroll) == (4, 1, 8, 4)
    assert defaults(series, {"season": 30}).context == 18  # a third of 56 rows
    sunspots = dataclasses.replace(series, name="sunspots")
    assert defaults(sunspots, {"horizon": 3}).season == 11


# ----------------------------------------------------------------------------------------- runs


def go(series: Series, folder: Path, config: ForecastConfig = CONFIG, **options: Any) -> Any:
    given: dict[str, Any] = {"fit": QUICK, "model_config": NETWORK} | options
    source = SeriesSource(str(folder.parent / "mine.csv"), ("y",), "t", "timesteps")
    return train_run(source, series, config, folder=folder, **given)


def test_it_learns(tmp_path: Path) -> None:
    series = read_csv(written(tmp_path, rows(120, noise=0.02)), ["y"], "t")
    fit = FitConfig(steps=80, batch_size=16, evaluate_every=40, lr=2e-2, ssm_lr=2e-2)
    config = dataclasses.replace(CONFIG, unroll=0)
    model = dataclasses.replace(NETWORK, d_model=8, d_state=8)
    outcome = go(series, tmp_path / "run", config, fit=fit, model_config=model)
    methods = outcome.result["methods"]
    assert methods["network"]["mase"] < 0.7 * methods["seasonal naive"]["mase"]
    assert outcome.outcome.records[-1].figures["validation_mase"] < 0.7


def test_a_run_leaves_everything(gappy: Series, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = go(gappy, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.json", "model.safetensors", "metrics.jsonl", "result.json",
        "forecasts.csv", "forecasts.png", "error_by_step.png",
    }  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert result == outcome.result
    assert (result["task"], result["series"], result["season"]) == ("forecast", "mine", 8)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["gaps"] == gappy.gaps == 3
    assert ForecastConfig(**config["forecast"]) == CONFIG
    lines = list(csv.DictReader((folder / "forecasts.csv").read_text().splitlines()))
    assert len(lines) == result["origins"] * 4
    # the scores can be had again from the table
    network = [(float(line["network"]), float(line["truth"])) for line in lines]
    error = sum(abs(a - b) for a, b in network) / len(network)
    assert error == pytest.approx(result["methods"]["network"]["columns"]["y"]["mae"], rel=1e-4)
    assert (lines[0]["step"], lines[3]["step"], lines[0]["column"]) == ("1", "4", "y")
    assert float(lines[0]["time"]) == float(lines[0]["origin"]) + 1
    again = evaluate_run(folder)
    for key in again:
        assert again[key] == result[key]
    assert "seasonal naive" in dict(run.report(again))


def test_everything_is_drawn(gappy: Series) -> None:
    origins = torch.tensor([40, 50])
    named = baseline_forecasts(gappy, origins, 4, 8, gappy.part(0, 40))
    figure = viz.plot_forecasts(gappy, origins, {"network": named["naive"], **named}, "title")
    assert len(figure.axes) == 2
    assert [line.get_label() for line in figure.axes[0].get_lines()][:3] == [
        "observed", "network", "seasonal naive",
    ]  # fmt: skip
    errors = viz.plot_error_by_step({"network": [1.0, None, 2.0], "naive": [None] * 3})
    assert errors.axes[0].get_lines()[0].get_xdata().tolist() == [1, 3]


def test_an_interrupted_run_goes_on_bit_for_bit(
    gappy: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(NETWORK, dropout=0.2)
    whole = go(gappy, tmp_path / "whole", model_config=model)

    class Interrupts:
        def begin(self, title: str, steps: int, *, done: int = 0) -> None: ...
        def record(self, record: Any) -> None: ...
        def step(self, step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

    part = go(gappy, tmp_path / "part", model_config=model, progress=Interrupts())
    assert (part.result["interrupted"], part.result["steps"]) == (True, 3)
    resumed = run.resume_run(tmp_path / "part")
    first, second = (Regressor.load(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    tables = [(tmp_path / name / "forecasts.csv").read_bytes() for name in ("whole", "part")]
    assert tables[0] == tables[1]
    assert resumed.result["methods"] == whole.result["methods"]
    with pytest.raises(ValueError, match="this run is finished"):
        run.resume_run(tmp_path / "part")


def test_a_resumed_run_wants_its_own_series(gappy: Series, tmp_path: Path) -> None:
    class Interrupts:
        def begin(self, title: str, steps: int, *, done: int = 0) -> None: ...
        def record(self, record: Any) -> None: ...
        def step(self, step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

    go(gappy, tmp_path / "run", progress=Interrupts())
    path = tmp_path / "mine.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].split(",")[0] + ",99"]) + "\n")
    with pytest.raises(ValueError, match="the series has changed since the run began"):
        run.resume_run(tmp_path / "run")
    written(tmp_path, rows(79))
    with pytest.raises(ValueError, match="79 rows now, the run began with 76"):
        run.resume_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"), [("source", 5), ("time", ["t"]), ("columns", [1]), ("time_format", {})]
)
def test_an_edited_config_of_another_type(
    name: str, value: Any, gappy: Series, tmp_path: Path
) -> None:
    folder = go(gappy, tmp_path / "run").folder
    config = json.loads((folder / "config.json").read_text())
    config["data"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"not the config of a forecast run \({name} = "):
        run.evaluate_run(folder)


def test_several_columns(tmp_path: Path) -> None:
    lines = ["t,y,z"] + [f"{t:g},{y!r},{10 - 3 * y!r}" for t, y in rows()]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    series = read_csv(tmp_path / "mine.csv", ["y", "z"], "t")
    model = dataclasses.replace(NETWORK, d_input=2, d_target=2)
    result = go(series, tmp_path / "run", model_config=model).result
    for score in result["methods"].values():
        y, z = (score["columns"][name]["mase"] for name in "yz")
        assert score["mase"] == pytest.approx((y + z) / 2)
    naive = result["methods"]["naive"]["columns"]
    assert naive["z"]["mae"] == pytest.approx(3 * naive["y"]["mae"])
    assert naive["z"]["mase"] == pytest.approx(naive["y"]["mase"])
    with pytest.raises(ValueError, match=r"1 columns; the run in .* was trained on 2"):
        evaluate_run(tmp_path / "run")  # of which `go` notes the column y alone


# --------------------------------------------------------------------------------- command line


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = written(tmp_path, rows(gaps=(20,))), tmp_path / "run"
    arguments = [
        "train", "--task", "forecast", "--series", str(path), "--time", "t", "--column", "y",
        "--on-gap", "timesteps", "--horizon", "4", "--season", "8", "--context", "9",
        "--unroll", "2", "--normalize", "last", "--stride", "3", "--layer", "lru", *SMALL,
        "--device", "cpu", "--out", str(folder),
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "mine: 79 rows of 1, 0 to 79, 1 gaps; season 8, context 9, horizon 4" in out
    assert re.search(r"seasonal naive +MASE \d\.\d{3} +RMSE", out)
    config = json.loads((folder / "config.json").read_text())
    assert config["forecast"] == dataclasses.asdict(
        ForecastConfig(horizon=4, season=8, context=9, unroll=2, normalize="last", stride=3)
    )
    assert (config["model"]["layer"], config["training"]["steps"]) == ("lru", 2)
    assert main(["eval", str(folder), "--json", "--device", "cpu"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["methods"] == result["methods"]
    other = written(tmp_path, rows(90), "other.csv")
    assert main(["eval", str(folder), "--data", str(other), "--device", "cpu"]) == 0
    assert "other, y" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--series", "nothing"], "no such file, and no known name; known are sunspots, co2"),
        (["--series", "nothing.csv"], "no such file"),
        ([], r"line 22: 2 sampling periods of 1 since the row before \(1 such gaps"),
        (["--on-gap", "timesteps", "--column", "q"], "no column 'q'"),
        (
            ["--on-gap", "timesteps", "--horizon", "40"],
            "55 rows to train on, expected",
        ),
        (["--on-gap", "timesteps", "--horizon", "0"], "horizon = 0, expected an integer >= 1"),
        (["--on-gap", "timesteps", "--unroll", "9"], "unroll = 9, expected 0 ... horizon = 4"),
        (["--on-gap", "timesteps", "--context", "60"], "rows to train on, expected at least"),
        (["--on-gap", "timesteps", "--season", "70"], "a season of 70"),
        (["--on-gap", "timesteps", "--test-fraction", "0.9"], "test_fraction = 0.9"),
        (["--on-gap", "timesteps", "--layer", "q"], "unknown mixer 'q'"),
        (["--on-gap", "timesteps", "--layer-option", "bidirectional=true"], "bidirectional"),
        (["--on-gap", "timesteps", "--layer-option", "q=1"], "no option 'q'"),
        (["--on-gap", "timesteps", "--steps", "0"], "steps = 0"),
        (["--on-gap", "ignore"], "invalid choice"),
        (["--wav", "x"], "--wav is an option of --task denoise, not of --task forecast"),
    ],
)
def test_bad_input_leaves_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = written(tmp_path, rows(gaps=(20,))), tmp_path / "run"
    arguments = ["train", "--task", "forecast", "--time", "t", "--horizon", "4", *SMALL]
    arguments += ["--series", str(path), "--device", "cpu", "--out", str(folder), *options]
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(r"lrnnx: error: .*\n", captured.err), captured.err
    assert re.search(message, captured.err), captured.err
    assert not folder.exists()


@pytest.mark.slow
def test_co2_beats_the_seasonal_naive_forecast(tmp_path: Path) -> None:
    """A real series with a trend, a season and gaps."""
    pytest.importorskip("statsmodels")
    folder = tmp_path / "run"
    command = "train --task forecast --series co2 --horizon 26 --context 104 --unroll 6 --stride 4"
    options = "--steps 60 --evaluate-every 30 --lr 8e-3 --device cpu --out"
    assert main([*command.split(), *options.split(), str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert json.loads((folder / "config.json").read_text())["data"]["gaps"] == 22
    assert result["test_mase"] < 0.6 * result["seasonal_naive_mase"]
