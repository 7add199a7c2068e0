"""The console script: what it prints, what it leaves, and one line for every mistake."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrnnx_core import registry
from lrnnx_core.backends import cpu, cuda
from lrnnx_nn import Classifier, optional, recipes
from lrnnx_nn.cli import doctor
from lrnnx_nn.cli.main import TASKS, build_parser, main
from lrnnx_nn.cli.options import layer_options, parse_device, parse_layer_options
from lrnnx_nn.data import Sequences
from lrnnx_nn.recipes import TrainingConfig
from lrnnx_nn.training import loop, run

for package in ("aeon", "matplotlib", "rich", "safetensors"):
    pytest.importorskip(package)

SMALL = ["--d-model", "4", "--d-state", "4", "--n-layer", "1", "--epochs", "2", "--batch-size", "8"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    random = np.random.default_rng(0)
    y = np.arange(40) % 2
    X = random.standard_normal((40, 5, 2)) + 2 * y[:, None, None]
    np.savez(tmp_path / "tiny.npz", X=X, y=y)
    return str(tmp_path / "tiny.npz")


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "everything" not in request.node.name:
        monkeypatch.setattr(run, "_draw", lambda *args: None)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """Expect code 2 and one line on stderr that matches."""
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's way
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(r"lrnnx: error: .*\n", captured.err), captured.err
    assert re.search(message, captured.err), captured.err


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# --- train and eval ------------------------------------------------------------------------------


def test_train_leaves_everything_and_eval_agrees(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", "--dataset", data, "--layer", "LRU", "--out", str(folder), *SMALL]) == 0
    out = capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text())
    assert "28 training and 12 test sequences (carved split)" in out
    assert f"test accuracy        {100 * result['test_accuracy']:.2f} %" in out
    assert f"parameters           {result['parameters']:,}" in out
    assert re.search(r"time +\d+\.\d s on cpu", out)
    assert "published" not in out
    assert (folder / "eigenvalues.png").exists()
    assert main(["eval", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for key in ("test_accuracy", "test_loss", "confusion_matrix", "classes"):
        assert again[key] == result[key]
    assert main(["eval", str(folder), "--dataset", data, "--device", "cpu"]) == 0
    assert f"test accuracy  {100 * result['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_every_training_option_reaches_the_run(data: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "epochs": 1, "batch_size": 9, "lr": 2e-3, "ssm_lr": 5e-4, "weight_decay": 0.2,
        "warmup": 0.3, "clip": 0.5, "label_smoothing": 0.2, "noise": 0.1, "crop": 0.2,
        "validation_fraction": 0.3, "patience": 7, "seed": 5, "accumulate": 2,
        "precision": "bfloat16",
    }  # fmt: skip
    model: dict[str, Any] = {
        "d_model": 6, "d_state": 4, "n_layer": 1, "norm": "rms", "activation": "gelu",
        "dropout": 0.4, "pooling": "last",
    }  # fmt: skip
    assert set(values) | {"refit"} == set(TrainingConfig.__dataclass_fields__)
    assert set(model) == set(recipes.MODEL)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (values | model).items()]
    options = ["--layer-option", "dt_min=0.02", "--layer-option=bidirectional=true", "--no-refit"]
    folder, threads = tmp_path / "run", torch.get_num_threads()
    code = main(
        ["train", "--dataset", data, "--layer", "s4d", "--out", str(folder), "--device", "cpu",
         "--threads", "2", *flags, *options]
    )  # fmt: skip
    assert code == 0
    assert json.loads((folder / "result.json").read_text())["threads"] == 2
    assert torch.get_num_threads() == threads
    config = config_of(folder)
    assert config["training"] == values | {"refit": False}
    assert config["model"]["layer_options"] == {"dt_min": 0.02, "bidirectional": True}
    assert config["model"]["layer"] == "s4d"
    assert {key: config["model"][key] for key in model} == model
    assert config["dataset"]["source"] == data
    mixer = Classifier.load(folder).blocks[0].mixer
    assert "C2_re" in dict(mixer.named_parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", registry.MODELS)
def test_defaults_are_the_recipe(layer: str, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert (
        main(["train", "--dataset", data, "--layer", layer, "--epochs", "1", "--out", str(folder)])
        == 0
    )
    config = config_of(folder)
    expected = recipes.model_defaults(layer)
    assert {key: config["model"][key] for key in expected} == expected
    assert config["training"] == TrainingConfig(epochs=1).__dict__


def test_the_default_folder_is_new_each_time(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--dataset", data, "--seed", "3", *SMALL, "--epochs", "1"]) == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2
    assert all(re.fullmatch(r"tiny-s5-3-\d{8}-\d{6}(-2)?", name) for name in names)


def test_ctrl_c_is_130_with_a_result(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, calls = loop.ClassifierTask.batch, []

    def interrupted(*args: Any) -> Sequences:
        calls.append(args)
        if len(calls) == 8:  # of three steps an epoch
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(loop.ClassifierTask, "batch", interrupted)
    folder = tmp_path / "run"
    arguments = ["train", "--dataset", data, "--out", str(folder), *SMALL, "--epochs", "9"]
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert captured.err == (
        "lrnnx: interrupted, the best network was kept and tested; go on with lrnnx train "
        f"--resume {folder}\n"
    )
    result = json.loads((folder / "result.json").read_text())
    assert (result["interrupted"], result["epochs"]) == (True, 2)
    assert main(["eval", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == result["test_accuracy"]


def test_a_late_divergence_keeps_the_best_and_says_so(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = iter([1.0] * 4 + [math.nan] * 2 + [1.0] * 99)  # three steps an epoch, then the refit
    loss = loop.ClassifierTask.loss
    monkeypatch.setattr(loop.ClassifierTask, "loss", lambda *args: next(factors) * loss(*args))
    folder = tmp_path / "run"
    assert main(["train", "--dataset", data, "--out", str(folder), *SMALL]) == 0
    assert "warning: the loss became infinite; try a smaller --lr" in capsys.readouterr().err
    result = json.loads((folder / "result.json").read_text())
    assert (result["diverged"], result["best_epoch"], result["epochs"]) == (True, 1, 1)


def test_ctrl_c_before_anything_is_130(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Sequences:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.ClassifierTask, "batch", interrupted)
    assert main(["train", "--dataset", data, "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert capsys.readouterr().err == (
        "lrnnx: interrupted before the first evaluation; go on with lrnnx train --resume "
        f"{tmp_path / 'run'}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "lstm"], "unknown model 'lstm'; expected one of"),
        (["--dataset", "NoSuchSet"], "neither a set that ships .* JapaneseVowels"),
        (["--dataset", "FordA"], "nothing is downloaded"),
        (["--dataset", "none.npz"], "none.npz: no such file"),
        (["--epochs", "0"], "epochs = 0, expected an integer >= 1"),
        (["--epochs", "many"], "argument --epochs: invalid integer value: 'many'"),
        (["--lr", "fast"], "argument --lr: invalid number value: 'fast'"),
        (["--lr", "nan"], "lr = nan, expected a number > 0"),
        (["--d-model", "0"], "d_model = 0, expected an integer >= 1"),
        (["--d-state", "7"], "d_state = 7"),
        (["--dropout", "1.5"], "dropout = 1.5, expected 0 <= dropout < 1"),
        (["--norm", "group"], "norm = 'group', expected one of"),
        (["--activation", "relu"], "activation = 'relu', expected one of"),
        (["--pooling", "sum"], "pooling = 'sum', expected one of"),
        (["--threads", "-1"], "--threads -1, expected >= 0"),
        (["--device", "tpu9"], "--device tpu9: cannot be used here"),
        (["--device", "meta"], "--device meta: holds no values"),
        (["--layer-option", "blocks"], "--layer-option 'blocks', expected KEY=VALUE"),
        (["--layer-option", "heads=2"], "s5 has no option 'heads'; expected one of .*blocks"),
        (["--layer-option", "device=cpu"], "s5 has no option 'device'"),
        (["--layer-option", "blocks=two"], "blocks = 'two', expected an integer"),
        (["--layer-option", "blocks=3"], "expected d_state divisible by blocks"),
        (["--layer-option", "bidirectional=1"], "bidirectional = 1, expected true or false"),
        (["--layer-option", "dt_min=[1]"], "dt_min = .1., expected a number"),
        (["--layer-option", "C_init=3"], "C_init = 3, expected a word"),
        (["--layer-option", "discretization=[]"], "expected a number or a word"),
        (["--layer-option", "discretization=tustin"], "tustin.*expected one of"),
        (["--layer-option", "mode=fast"], "mode 'fast', expected one of"),
        (["--layer-option", "blocks=1", "--layer-option", "blocks=2"], "blocks is given twice"),
        (["--width", "3"], "unrecognized arguments: --width 3"),
    ],
)
def test_bad_arguments_to_train(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["train", *arguments], message)
    assert list(tmp_path.iterdir()) == []  # before any work


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((0, 3, 2)), "y": np.zeros(0)}, "no sequences"),
        (
            {"X": np.zeros((8, 3, 2)), "y": np.zeros(8)},
            "only one class, 0.0; expected at least two",
        ),
        ({"X": np.full((8, 3, 2), np.nan), "y": np.arange(8) % 2}, "sequence 0 holds nan"),
        (
            {"X": np.zeros((8, 3, 2)), "y": np.arange(8) % 2, "lengths": np.full(8, -2)},
            "lengths: between -2 and -2, expected 0 ... 3",
        ),
        ({"X": np.zeros((8, 3, 2)), "y": np.arange(7) % 2}, "labels .7,. for 8 sequences"),
    ],
)
def test_bad_data_to_train(
    arrays: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    source, out = str(tmp_path / "bad.npz"), tmp_path / "run"
    fails(capsys, ["train", "--dataset", source, "--out", str(out)], message)
    assert not out.exists()


def test_a_folder_in_use_is_refused(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(
        capsys,
        ["train", "--dataset", data, "--out", str(tmp_path)],
        "not empty, and runs are never",
    )
    fails(
        capsys,
        ["train", "--dataset", data, "--out", data],
        "a file, expected a new or empty folder",
    )


def test_broken_runs_are_refused(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["eval", str(tmp_path / "none")], "not a run folder, it has no config.json")
    folder = tmp_path / "run"
    assert main(["train", "--dataset", data, "--out", str(folder), *SMALL]) == 0
    fails(
        capsys,
        ["eval", str(folder), "--dataset", "BasicMotions"],
        "6 channels.* trained on 2 chann",
    )
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    fails(capsys, ["eval", str(folder)], r"model\.safetensors: truncated or corrupt checkpoint")
    (folder / "config.json").write_text("{")
    fails(capsys, ["eval", str(folder)], r"config\.json: not a readable JSON file")


def test_traceback_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        main(["--traceback", "eval", str(tmp_path)])


@pytest.mark.parametrize("package", ["rich", "aeon", "matplotlib", "safetensors"])
def test_a_missing_package_names_the_pip_line(
    package: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def absent(name: str) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return __import__(name, fromlist=["_"])

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    source = "JapaneseVowels" if package == "aeon" else data
    out = tmp_path / "run"
    assert main(["train", "--dataset", source, "--out", str(out), *SMALL]) == 2
    assert capsys.readouterr().err == (
        f'lrnnx: error: {package} is not installed: pip install "lrnnx-core[demo]"\n'
    )
    assert not out.exists()


# --- options, models, doctor, help ---------------------------------------------------------------


def test_layer_options_are_typed() -> None:
    parsed = parse_layer_options(
        "S5", ["blocks=2", "dt_max=1", "clip_eigs=True", "C_init=lecun_normal"]
    )
    assert parsed == {"blocks": 2, "dt_max": 1.0, "clip_eigs": True, "C_init": "lecun_normal"}
    assert type(parsed["dt_max"]) is float
    assert parse_layer_options("s4d", ["n_ssm=2", "discretization='bilinear'"]) == {
        "n_ssm": 2,
        "discretization": "bilinear",
    }


def test_devices() -> None:
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert parse_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: cannot be used here"):
            parse_device("cuda")


def test_models_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(registry.MODELS)
    for entry, model in zip(listed, registry.MODELS.values(), strict=True):
        assert set(entry["options"]) == set(layer_options(model))
        assert entry["citation"] == model.citation
        for value in (model.title, f"--layer {model.name}", *model.discretizations):
            assert value in text
        assert all(f"{key}=" in text for key in entry["options"])
        assert model.citation.splitlines()[0] in text
    assert main(["models", "S-5", "--cite"]) == 0
    assert capsys.readouterr().out == registry.get("s5").citation + "\n"
    fails(capsys, ["models", "lstm"], "unknown model 'lstm'")


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for what in (
        "Python",
        "torch",
        "CPU",
        "numba",
        "CuPy",
        "NVRTC",
        "CUDA ops",
        "driver",
        "GPU",
        "safetensors",
    ):
        assert re.search(rf"^{what}\b", text, re.MULTILINE)
    assert torch.__version__ in text
    assert re.search(
        r"^CUDA ops +.*causal_conv1d, .*linear_scan, .*rg_lru_scan", text, re.MULTILINE
    )
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("numba", "rich") else "1")
    monkeypatch.setattr(doctor, "cuda_driver", lambda: (12, 4))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert 'numba        missing, for CPU kernels  ->  pip install "lrnnx-core[cpu]"' in text
    assert 'rich         missing, for lrnnx train  ->  pip install "lrnnx-core[demo]"' in text
    major = (torch.version.cuda or "12").split(".")[0]
    assert f'CuPy         missing  ->  pip install "lrnnx-core[cuda{major}]"' in text
    assert "supports CUDA 12.4" in text
    assert re.search(r"^[4-5] optional part\(s\) missing$", text, re.MULTILINE)


@pytest.mark.parametrize("command", ["train", "train --task lm", "eval", "models"])
def test_help_shows_every_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    options = text[re.search("^options:", text, re.MULTILINE).start() :]  # type: ignore[union-attr]
    entries = re.split(r"\n  (?=-)", options)[1:]
    assert len(entries) >= 3
    for entry in entries:
        assert "(default:" in " ".join(entry.split()) or entry.startswith("-h"), entry


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "expected cuda, cuda:N or cpu"),
        ("gpu", "no device 'gpu'"),
        ("cuda", "no CUDA device"),
    ],
)
def test_warmup_names_what_is_wrong(
    device: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(capsys, ["warmup", "--device", device], message)


def test_warmup_without_numba_says_what_brings_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "installed", lambda: False)
    fails(
        capsys, ["warmup", "--device", "cpu"], r'numba is missing; pip install "lrnnx-core\[cpu\]"'
    )


def test_warmup_says_how_many_kernels_and_compiles_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU of index {index}")
    monkeypatch.setattr(cuda, "limits", lambda index: cuda.Limits(132, 228 * 1024, 227 * 1024))
    monkeypatch.setattr(cuda, "_compiler", lambda: None)
    compiled: list[tuple[cuda.Kernel, int]] = []
    monkeypatch.setattr(cuda.Kernel, "compile", lambda *call: compiled.append(call))
    assert main(["warmup", "--device", "cuda:1"]) == 0
    assert {kernel for kernel, _ in compiled} == set(cuda.listed(1))
    assert {index for _, index in compiled} == {1}
    text = capsys.readouterr().out
    assert f"{len(compiled)} kernels for GPU of index 1" in text
    assert re.search(rf"^{len(compiled)} kernels ready in \d+\.\d s$", text, re.MULTILINE)
    fails(capsys, ["warmup", "--device", "cuda:2"], "cuda:2, there are 2 CUDA devices")


def test_no_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, [], "the following arguments are required: COMMAND")
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"lrnnx-core \d\S+\n", capsys.readouterr().out)
    assert build_parser().prog == "lrnnx"


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_the_tasks_and_the_options_of_one(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--task", task, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, summary in TASKS.items():
        assert re.search(rf"^  {name} +{summary}$", text, re.MULTILINE)
    assert f"The options below are those of --task {task}" in text
    own = {
        "classify": "--epochs",
        "lm": "--vocabulary",
        "forecast": "--horizon",
        "denoise": "--wav",
    }
    assert {name for name, option in own.items() if f"\n  {option} " in text} == {task}
    for option in ("--resume", "--precision", "--accumulate", "--clip", "--warmup"):
        assert f"\n  {option} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a.txt"], "--text is an option of --task lm, not of --task classify"),
        (["--text=a.txt"], "--text is an option of --task lm, not of --task classify"),
        (["--task", "lm", "--text", "a", "--epochs", "3"],
         "--epochs is an option of --task classify, not of --task lm"),
        (["--task", "lm", "--text", "a", "--layer", "s5"],
         "--layer is an option of --task classify, forecast, denoise, not of --task lm"),
        (["--horizon", "3"], "--horizon is an option of --task forecast, not of --task classify"),
        (["--task", "lm", "--text", "a", "--width", "3"], "unrecognized arguments: --width 3"),
        (["--task", "juggle"], "argument --task: invalid choice: 'juggle'"),
        (["--task", "lm"], "the following arguments are required: --text"),
        (["--epo", "3"], "unrecognized arguments: --epo 3"),  # no abbreviations
        (["--resume", "none"], "none: not a run folder, it has no config.json"),
        (["--resume", "none", "--lr", "1"], "--lr with --resume: a run goes on as it began"),
        (["--resume", "none", "--no-refit"], "--refit with --resume"),
        (["--resume", "none", "--out", "x"], "--out with --resume"),
        (["--resume", "none", "--threads", "-1"], "--threads -1, expected >= 0"),
    ],
)  # fmt: skip
def test_options_of_another_task_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["train", *arguments], message)


def test_resume_goes_on_by_itself(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["train", "--dataset", data, "--layer", "lru", *SMALL]
    assert main([*command, "--out", str(whole)]) == 0
    batch, calls = loop.ClassifierTask.batch, []

    def interrupted(*args: Any) -> Sequences:
        calls.append(args)
        if len(calls) == 5:  # of three steps an epoch
            signal.raise_signal(signal.SIGINT)
        return batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.ClassifierTask, "batch", interrupted)
        assert main([*command, "--out", str(cut)]) == 130
    assert f"go on with lrnnx train --resume {cut}" in capsys.readouterr().err
    assert main(["train", "--resume", str(cut)]) == 0
    found, expected = (json.loads((f / "result.json").read_text()) for f in (cut, whole))
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    fails(capsys, ["train", "--resume", str(cut)], "this run is finished, there is nothing to")


def test_a_run_of_before_there_were_tasks(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["train", "--dataset", data, "--out", str(folder), *SMALL]) == 0
    config = config_of(folder)
    del config["task"], config["dataset"]["digest"]
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["eval", str(folder), "--json"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == result["test_accuracy"]


@pytest.mark.parametrize("task", TASKS)
def test_help_imports_nothing_heavy(task: str) -> None:
    code = (
        "import sys\n"
        "from lrnnx_nn.cli.main import main\n"
        f"try:\n    main(['train', '--task', '{task}', '--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'aeon', 'rich', 'matplotlib', 'safetensors'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "-option" in done.stdout


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lrnnx_nn.cli.main", "eval", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"lrnnx: error: .* not a run folder, it has no config\.json\n", done.stderr)


def test_a_reader_that_has_left_before_the_end_is_no_error() -> None:
    """What is written stays in Python's buffer until the program ends."""
    run = (
        "import sys, os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w); "
        "from lrnnx_nn.cli.main import main; sys.exit(main(['--version']))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`lrnnx models | head -1`, with enough output to fill the pipe."""
    run = "import sys; from lrnnx_nn.cli.main import main; sys.exit(main(['models']))"
    command = f'"{sys.executable}" -u -c "{run}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("S4D")
