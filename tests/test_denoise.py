"""Denoising: fixed noise, fresh noise, whole files in batches, runs that resume and report."""

from __future__ import annotations

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
from lrnnx_nn.architectures.unet import UNet, UNetConfig
from lrnnx_nn.cli.main import main
from lrnnx_nn.data.audio import Recording, pink_noise, read_wav, white_noise, write_wav
from lrnnx_nn.metrics import si_snr, snr
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.signal_recipes import DenoiseConfig, SoundSource
from lrnnx_nn.training import denoise as run
from lrnnx_nn.training.denoise import evaluate_run, train_run
from lrnnx_nn.training.denoise_task import DenoiseTask, read
from lrnnx_nn.training.denoiser import Denoiser, Stretches, denoise_all, fixed_pairs

for package in ("matplotlib", "safetensors", "rich"):
    pytest.importorskip(package)

same = torch.testing.assert_close
RATE = 4000
NETWORK = UNetConfig(
    channels=(4,), factors=(4,), d_stem=2, layer="lru", d_state=4, n_neck=1, n_output=1
)
CONFIG = DenoiseConfig(
    segment=0.1, validation_fraction=0.2, test_fraction=0.2, snr=(0.0, 4.0), examples=1
)
QUICK = FitConfig(steps=4, batch_size=4, evaluate_every=2)
SMALL = [
    "--channels", "4", "--factors", "4", "--d-stem", "2", "--layer", "lru", "--d-state", "4",
    "--n-neck", "1", "--steps", "2", "--batch-size", "4", "--segment", "0.1", "--device", "cpu",
]  # fmt: skip


def tone(n: int, hertz: float) -> Tensor:
    t = torch.arange(n) / RATE
    return 0.3 * torch.sin(2 * math.pi * hertz * t) * (1 + torch.sin(2 * math.pi * 5 * t)) / 2


@pytest.fixture
def wavs(tmp_path: Path) -> Path:
    folder = tmp_path / "wavs"
    (folder / "more").mkdir(parents=True)
    for i in range(10):
        place = folder / ("more" if i % 2 else "") / f"{i}.wav"
        write_wav(place, tone(500 + 60 * i, 200 + 100 * i), RATE)
    return folder


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "everything" not in request.node.name:
        monkeypatch.setattr(run, "write_examples", lambda *args: None)


def recordings(*lengths: int) -> list[Recording]:
    return [Recording(f"{i}.wav", tone(n, 300.0), RATE) for i, n in enumerate(lengths)]


def ratio(noisy: Tensor, clean: Tensor) -> float:
    power = clean.square().mean() / (noisy - clean).square().mean()
    return float(10 * torch.log10(power))


# ---------------------------------------------------------------------------------------- noise


def test_the_noise_of_a_part_is_fixed() -> None:
    items = recordings(400, 900, 300, 500, 600, 700)
    pairs = fixed_pairs(items, white_noise, (0.0, 8.0), 5)
    assert [pair.snr for pair in pairs] == [0.0, 2.0, 4.0, 6.0, 8.0, 0.0]
    for pair, item in zip(pairs, items, strict=True):
        assert ratio(pair.noisy, pair.clean) == pytest.approx(pair.snr, abs=1e-3)
        assert pair.name == item.name
    again = fixed_pairs(items, white_noise, (0.0, 8.0), 5)
    assert all(torch.equal(a.noisy, b.noisy) for a, b in zip(pairs, again, strict=True))
    other = fixed_pairs(items, white_noise, (0.0, 8.0), 6)
    assert not torch.equal(pairs[0].noisy, other[0].noisy)
    assert [p.snr for p in fixed_pairs(items[:2], pink_noise, (3.0, 3.0), 0)] == [3.0, 3.0]


def test_stretches() -> None:
    items = recordings(1000, 100)
    data = Stretches(items, white_noise, (2.0, 6.0), 250).draw(64, torch.Generator().manual_seed(0))
    assert data.noisy.shape == data.clean.shape == (64, 250)
    assert set(data.lengths.tolist()) == {250, 100}
    ratios = []
    for noisy, clean, n in zip(*data, strict=True):
        assert float(noisy[n:].abs().sum()) == float(clean[n:].abs().sum()) == 0.0
        source = items[0 if n == 250 else 1].samples
        windows = source.unfold(0, int(n), 1)
        assert float((windows - clean[:n]).abs().amax(1).min()) == 0.0
        ratios.append(ratio(noisy[:n], clean[:n]))
    assert 1.9 < min(ratios) < 2.6
    assert 5.4 < max(ratios) < 6.1
    longer = int((data.lengths == 250).sum())
    assert longer > 45  # drawn by their length


# ----------------------------------------------------------------------------------- the network


def denoiser(gain: float = 3.0, **options: Any) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(UNet(dataclasses.replace(NETWORK, **options)), gain).eval()


def test_the_gain_goes_in_and_out() -> None:
    model = denoiser(gain=4.0)
    x = torch.randn(2, 40)
    same(model(x), model.unet(4.0 * x.unsqueeze(-1)).squeeze(-1) / 4.0)
    with pytest.raises(ValueError, match=r"gain = 0\.0, expected > 0"):
        denoiser(gain=0.0)
    with pytest.raises(ValueError, match="1 channels in and 2 out, expected one"):
        denoiser(d_output=2)


@pytest.mark.parametrize("at_once", [1, 250, 10_000])
def test_whole_sounds_in_batches_are_what_they_are_alone(at_once: int) -> None:
    model = denoiser()
    sounds = [torch.randn(n) for n in (90, 17, 120, 64, 1)]
    found = denoise_all(model, sounds, "cpu", at_once=at_once)
    for x, y in zip(sounds, found, strict=True):
        same(y, model(x[None])[0].detach(), rtol=1e-4, atol=1e-5)


def test_losses(wavs: Path) -> None:
    sounds = read(SoundSource(str(wavs)), CONFIG)
    model = denoiser()
    values = {}
    for loss in ("snr", "si_snr", "l1"):
        task = DenoiseTask(sounds, dataclasses.replace(CONFIG, loss=loss), 4)
        batch = task.batch(torch.Generator().manual_seed(0))
        values[loss] = float(task.loss(model, batch).detach())
        estimate = model(batch.noisy, lengths=batch.lengths).detach()
    assert values["si_snr"] == pytest.approx(
        -float(si_snr(estimate, batch.clean, lengths=batch.lengths).mean()), rel=1e-5
    )
    assert values["snr"] == pytest.approx(
        -float(snr(estimate, batch.clean, lengths=batch.lengths).mean()), rel=1e-5
    )
    power = torch.cat([item.samples for item in sounds.split.train]).square().mean()
    assert task.gain == pytest.approx(float(power) ** -0.5, rel=1e-5)
    error = (estimate - batch.clean).abs().sum() / batch.lengths.sum() * task.gain
    assert values["l1"] == pytest.approx(float(error), rel=1e-5)


# ------------------------------------------------------------------------------------------ sounds


def test_noise_is_split_by_file_too(wavs: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    write_wav(tmp_path / "noise" / "0.wav", tone(800, 50.0), RATE)
    source = SoundSource(str(wavs), str(tmp_path / "noise"))
    assert read(source, CONFIG).shared_noise
    for i in range(3):
        write_wav(tmp_path / "noise" / f"{i}.wav", tone(800, 50.0 * (i + 1)), RATE)
    sounds = read(source, CONFIG)
    assert not sounds.shared_noise
    names = [{item.name for item in noise.items} for noise in sounds.noise]  # type: ignore[attr-defined]
    assert [len(part) for part in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    assert not read(SoundSource(str(wavs), "pink"), CONFIG).shared_noise
    with pytest.raises(ValueError, match=r"noise: .*nowhere: no such folder \(expected wh"):
        read(SoundSource(str(wavs), str(tmp_path / "nowhere")), CONFIG)


# -------------------------------------------------------------------------------------------- runs


def go(wavs: Path, folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"fit": QUICK, "config": CONFIG, "model_config": NETWORK} | options
    source = SoundSource(str(wavs))
    return train_run(source, read(source, given["config"]), folder=folder, **given)


class Interrupts:
    def begin(self, title: str, steps: int, *, done: int = 0) -> None: ...
    def record(self, record: Any) -> None: ...
    def step(self, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt


def test_it_learns(wavs: Path, tmp_path: Path) -> None:
    fit = FitConfig(steps=60, batch_size=8, evaluate_every=30, lr=1e-2)
    model = UNetConfig(
        channels=(8,), factors=(4,), d_stem=8, layer="s5", d_state=8, n_neck=1, n_output=1,
        residual=True,
    )  # fmt: skip
    outcome = go(wavs, tmp_path / "run", fit=fit, model_config=model)
    assert outcome.outcome.records[-1].figures["validation_improvement"] > 1.2
    assert outcome.result["test_si_snr"] > outcome.result["noisy_si_snr"] + 0.2


def test_a_run_leaves_everything(wavs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = go(wavs, folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    test = read(SoundSource(str(wavs)), CONFIG).split.test
    stem = test[0].name.removesuffix(".wav").replace("/", "-")
    assert names == {
        "config.json", "model.json", "model.safetensors", "metrics.jsonl", "result.json",
        "examples", f"examples/{stem}.png",
        *(f"examples/{stem}-{kind}.wav" for kind in ("noisy", "denoised", "clean")),
    }  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert result == outcome.result
    assert (result["task"], result["files"], result["rate"]) == ("denoise", 2, RATE)
    sounds = {k: read_wav(folder / f"examples/{stem}-{k}.wav") for k in ("noisy", "clean")}
    assert sounds["clean"].rate == RATE
    given = fixed_pairs(test, white_noise, CONFIG.snr, 1)[0]
    loudest = max(1.0, float(given.noisy.abs().max()))
    same(sounds["clean"].samples, given.clean / loudest, rtol=0, atol=2**-10)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["files"] == [6, 2, 2]
    again = evaluate_run(folder)
    assert all(again[key] == result[key] for key in again)
    assert {"network", "noisy", "Wiener", "Wiener, informed"} < dict(run.report(again)).keys()
    assert evaluate_run(folder, source=str(wavs / "more"))["files"] == 5


def test_an_interrupted_run_goes_on_bit_for_bit(wavs: Path, tmp_path: Path) -> None:
    whole = go(wavs, tmp_path / "whole")
    part = go(wavs, tmp_path / "part", progress=Interrupts())
    assert (part.result["interrupted"], part.result["steps"]) == (True, 3)
    resumed = run.resume_run(tmp_path / "part")
    first, second = (UNet.load(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.result["methods"] == whole.result["methods"]


def test_a_resumed_run_wants_its_own_sounds(wavs: Path, tmp_path: Path) -> None:
    folder = go(wavs, tmp_path / "run", progress=Interrupts()).folder
    asked = json.loads((folder / "config.json").read_text())["data"]
    source = SoundSource(**{f.name: asked[f.name] for f in dataclasses.fields(SoundSource)})
    path = wavs / read(source, CONFIG).split.test[0].name  # of which the gain does not tell
    before = path.read_bytes()
    write_wav(path, tone(700, 99.0), RATE)
    with pytest.raises(ValueError, match="the same files with other content"):
        run.resume_run(folder)
    path.write_bytes(before)
    for path in wavs.glob("*.wav"):
        write_wav(path, tone(700, 99.0), RATE)
    with pytest.raises(ValueError, match="the same files with other content"):
        run.resume_run(tmp_path / "run")


def test_spectrograms() -> None:
    sounds = {"noisy": torch.randn(900), "silent": torch.zeros(900)}
    figure = viz.plot_spectrograms(sounds, RATE, "title")
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["noisy", "silent"]


# ----------------------------------------------------------------------------------- command line


def test_the_command_line(wavs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = ["--snr", "5", "--noise", "pink", "--causal", "--no-residual", "--loss", "l1"]
    shares = ["--validation-fraction", "0.2", "--test-fraction", "0.3"]
    arguments = ["train", "--task", "denoise", "--wav", str(wavs), "--out", str(folder)]
    assert main([*arguments, *options, *shares, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "10 files, 0.0 minutes at 4000 Hz: 5 to train on, 2 to validate, 3 to test" in out
    assert re.search(r"noisy +SI-SNR +[45]\.\d\d dB", out)
    config = json.loads((folder / "config.json").read_text())
    assert (config["denoise"]["snr"], config["denoise"]["loss"]) == ([5.0, 5.0], "l1")
    assert (config["model"]["causal"], config["model"]["residual"]) == (True, False)
    assert config["data"]["noise"] == "pink"
    assert main(["eval", str(folder), "--json", "--device", "cpu"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["methods"] == result["methods"]


def test_the_published_network_by_name(wavs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = ["--channels", "4", "--factors", "4", "--steps", "1", "--segment", "0.1"]
    arguments = ["train", "--task", "denoise", "--published", "attenuate", "--wav", str(wavs)]
    assert main([*arguments, *small, "--device", "cpu", "--out", str(folder)]) == 0
    model = json.loads((folder / "config.json").read_text())["model"]
    expected = UNetConfig.named("attenuate", channels=[4], factors=[4]).to_dict()
    assert model == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wav", "nowhere"], "nowhere: no such folder"),
        (["--rate", "8000"], r"\.wav: 4000 Hz, expected 8000 Hz .*choose on-rate resample"),
        (["--noise", "nowhere"], r"noise: .*nowhere: no such folder \(expected white, pink or a"),
        (["--snr", "1", "2", "3"], "--snr: 3 numbers, expected one or two"),
        (["--snr", "9", "2"], r"snr = \(9\.0, 2\.0\), expected"),
        (["--segment", "0"], r"segment = 0\.0, expected"),
        (["--test-fraction", "0.95"], r"test_fraction = 0\.95"),
        (["--channels", "4", "8"], "2 channels and 1 factors"),
        (["--layer", "q"], "unknown mixer 'q'"),
        (["--layer-option", "q=1"], "no option 'q'"),
        (["--causal", "--layer", "s5", "--layer-option", "bidirectional=true"], "bidirectional la"),
        (["--loss", "mse"], "invalid choice: 'mse'"),
        (["--series", "x"], "--series is an option of --task forecast, not of --task denoise"),
    ],
)
def test_bad_input_leaves_nothing(
    options: list[str],
    message: str,
    wavs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    arguments = ["train", "--task", "denoise", "--wav", str(wavs), "--out", str(folder)]
    try:
        code = main([*arguments, *SMALL, *options])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(r"lrnnx: error: .*\n", captured.err), captured.err
    assert re.search(message, captured.err), captured.err
    assert not folder.exists()


def test_a_truncated_file_leaves_nothing(
    wavs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (wavs / "0.wav").write_bytes((wavs / "0.wav").read_bytes()[:-100])
    folder = tmp_path / "run"
    arguments = ["train", "--task", "denoise", "--wav", str(wavs), "--out", str(folder)]
    assert main([*arguments, *SMALL]) == 2
    assert re.search(r"0\.wav: truncated, \d+ of 1000 bytes", capsys.readouterr().err)
    assert not folder.exists()


def test_the_folder_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--task", "denoise"])
    assert "--wav" in capsys.readouterr().err
