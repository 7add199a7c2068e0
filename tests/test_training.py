"""Training: it learns, it stops, it keeps the best, and nothing of the test part leaks into it."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_nn import Classifier, ClassifierConfig, viz
from lrnnx_nn.data import Dataset, Sequences, statistics, stratified_split
from lrnnx_nn.recipes import TrainingConfig
from lrnnx_nn.training import Epoch, evaluate, evaluate_run, fit, loop, run, train_run
from lrnnx_nn.training.checkpoint import digest
from lrnnx_nn.training.loop import augment

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

MODEL = ClassifierConfig(2, 2, "lru", d_model=8, d_state=4, n_layer=1, dropout=0.0)
QUICK = TrainingConfig(epochs=2, batch_size=8, noise=0.0, validation_fraction=0.25)


def sequences(n: int, seed: int = 0) -> Sequences:
    """Two classes that differ in the sign of the first channel's mean; lengths 3 to 6."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (n,), generator=generator)
    y = torch.arange(n) % 2
    x = torch.randn(n, 6, 2, generator=generator)
    x[..., 0] += 2 * (2.0 * y - 1)[:, None]
    x = torch.where(torch.arange(6)[None, :, None] < lengths[:, None, None], x, torch.tensor(0.0))
    return Sequences(x, lengths, y)


@pytest.fixture
def dataset() -> Dataset:
    return Dataset("tiny", sequences(32), sequences(20, seed=1), ("minus", "plus"), "keys")


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time: two tests look at pictures, the others do not."""
    if "pictures" not in request.node.name and "everything" not in request.node.name:
        monkeypatch.setattr(run, "_draw", lambda *args: None)


def go(dataset: Dataset, folder: Path, config: TrainingConfig = QUICK, **options: Any) -> Any:
    return train_run(dataset, MODEL, config, folder, source="tiny", **options)


def test_it_learns(dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = Classifier(MODEL)
    config = dataclasses.replace(QUICK, epochs=12, lr=1e-2)
    before = evaluate(model, dataset.test)
    outcome = fit(model, dataset.train, config, epochs=12)
    after = evaluate(model, dataset.test)
    assert after.accuracy >= 0.9 > before.accuracy
    assert outcome.epochs[-1].loss < 0.7 * outcome.epochs[0].loss
    assert outcome.best == outcome.epochs[-1]  # nothing held out: the last one counts


def test_a_run_leaves_everything(dataset: Dataset, tmp_path: Path) -> None:
    phases: list[tuple[str, int]] = []
    outcome = go(dataset, tmp_path / "run", on_phase=lambda *phase: phases.append(phase))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"learning_curve.png", "confusion_matrix.png", "eigenvalues.png", "kernels.png"}
    files = {"config.json", "model.json", "model.safetensors", "metrics.jsonl", "result.json"}
    assert names == pictures | files
    for name in pictures:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == outcome.result
    model = Classifier.load(tmp_path / "run")
    test = evaluate(model, dataset.test)
    assert result["test_accuracy"] == test.accuracy
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(map(sum, result["confusion_matrix"])) == 20
    right = sum(row[i] for i, row in enumerate(result["confusion_matrix"]))
    assert right / 20 == result["test_accuracy"]
    assert result["classes"] == ["minus", "plus"]
    assert (
        result["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    )
    assert result["device"] == "cpu"
    assert result["seconds"] > 0
    assert not result["interrupted"]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["phase"] for line in lines[:2]] == ["search", "search"]
    assert phases == [("search", 2), ("refit", result["best_epoch"])]
    assert [line["phase"] for line in lines[2:]] == ["refit"] * result["best_epoch"]
    best = max(lines[:2], key=lambda line: (line["validation_accuracy"], -line["validation_loss"]))
    assert (best["epoch"], best["validation_accuracy"]) == (
        result["best_epoch"],
        result["validation_accuracy"],
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert TrainingConfig(**config["training"]) == QUICK
    assert ClassifierConfig.from_dict(config["model"]) == MODEL


def test_refit_sees_the_validation_part_and_no_refit_does_not(
    dataset: Dataset, tmp_path: Path
) -> None:
    kept, _ = stratified_split(dataset.train.y, QUICK.validation_fraction, QUICK.seed)
    parts = {True: dataset.train, False: dataset.train.take(kept)}
    for refit, part in parts.items():
        folder = tmp_path / str(refit)
        outcome = go(dataset, folder, dataclasses.replace(QUICK, refit=refit))
        mean, std = statistics(part)
        model = Classifier.load(folder)
        torch.testing.assert_close(model.input_mean, mean)
        torch.testing.assert_close(model.input_std, std)
        assert outcome.result["refitted"] is refit


def test_the_test_part_changes_nothing_but_the_test(dataset: Dataset, tmp_path: Path) -> None:
    go(dataset, tmp_path / "a")
    strange = dataclasses.replace(sequences(8, seed=9), x=torch.full((8, 6, 2), 50.0))
    other = dataset._replace(test=strange)
    go(other, tmp_path / "b")
    first, second = (Classifier.load(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_seeds_repeat_and_differ(dataset: Dataset) -> None:
    losses = []
    for seed in (0, 0, 1):
        config = dataclasses.replace(QUICK, seed=seed, noise=0.1, crop=0.3)
        model = run.make_model(MODEL, config, dataset.train, "cpu")
        losses.append([epoch.loss for epoch in fit(model, dataset.train, config, epochs=2).epochs])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_early_stopping_counts_from_the_best(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.5, 0.7, 0.7, 0.6, 0.6, 0.6, 0.6])
    losses = iter([1.0, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1])
    seen: list[dict[str, Tensor]] = []

    def judged(model: Classifier, data: Sequences) -> loop.Evaluation:
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return loop.Evaluation(next(accuracies), next(losses), data.y)

    monkeypatch.setattr(loop, "evaluate", judged)
    config = dataclasses.replace(QUICK, patience=2)
    outcome = fit(Classifier(MODEL), dataset.train, config, epochs=7, validation=dataset.train)
    assert outcome.best is not None
    assert outcome.best.epoch == 3  # of two equal accuracies, the lower loss
    assert len(outcome.epochs) == 5
    assert outcome.state is not None
    for key, value in outcome.state.items():
        assert torch.equal(value, seen[2][key])


def interrupt_at(phase: str, number: int) -> Any:
    def on_epoch(epoch: Epoch) -> None:
        if (epoch.phase, epoch.epoch) == (phase, number):
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.parametrize("phase", ["search", "refit"])
def test_ctrl_c_keeps_and_tests_the_best(dataset: Dataset, tmp_path: Path, phase: str) -> None:
    folder = tmp_path / "run"
    outcome = go(dataset, folder, on_epoch=interrupt_at(phase, 1))
    assert outcome.interrupted
    result = json.loads((folder / "result.json").read_text())
    assert result["interrupted"]
    assert not result["refitted"]
    model = Classifier.load(folder)
    assert evaluate(model, dataset.test).accuracy == result["test_accuracy"]
    kept, held = stratified_split(dataset.train.y, QUICK.validation_fraction, QUICK.seed)
    torch.testing.assert_close(model.input_mean, statistics(dataset.train.take(kept))[0])
    validation = evaluate(model, dataset.train.take(held))
    assert validation.accuracy == result["validation_accuracy"]


def interrupt_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let Ctrl-C come while a batch is drawn."""
    batch, calls = loop.ClassifierTask.batch, []

    def counted(self: loop.ClassifierTask, generator: torch.Generator) -> Sequences:
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return batch(self, generator)

    monkeypatch.setattr(loop.ClassifierTask, "batch", counted)


def kept(folder: Path) -> tuple[Any, ...]:
    """Return what must not depend on interruptions."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    weights = digest(dict(Classifier.load(folder).state_dict()))
    names = sorted(path.name for path in folder.iterdir())
    return [line | {"seconds": 0} for line in lines], result | {"seconds": 0}, weights, names


RANDOM = dataclasses.replace(QUICK, epochs=3, noise=0.1, crop=0.3, label_smoothing=0.1)


# three steps an epoch in the search, four in the refit
@pytest.mark.parametrize("step", [1, 4, 6, 9, 10, 13])
def test_resume_is_the_uninterrupted_run(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(run, "load_dataset", lambda source, seed: dataset)
    monkeypatch.setattr(sys.modules[__name__], "MODEL", dataclasses.replace(MODEL, dropout=0.2))
    go(dataset, tmp_path / "whole", RANDOM)
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_batch(patch, step)
        if step < 3:
            with pytest.raises(KeyboardInterrupt):
                go(dataset, cut, RANDOM)
        else:
            assert go(dataset, cut, RANDOM).interrupted
    assert (cut / "checkpoint.pt").is_file()
    outcome = run.resume_run(cut)
    assert not outcome.interrupted
    assert kept(cut) == kept(tmp_path / "whole")
    with pytest.raises(ValueError, match="this run is finished, there is nothing to resume"):
        run.resume_run(cut)


def test_resume_refuses_other_data(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_batch(monkeypatch, 4)
    go(dataset, tmp_path / "run")
    other = dataset._replace(test=sequences(20, seed=2))
    monkeypatch.setattr(run, "load_dataset", lambda source, seed: other)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="tiny: the data have changed since the run began"):
        run.resume_run(tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"precision": "bfloat16"}])
def test_accumulation_and_precision_change_little(
    dataset: Dataset, options: dict[str, Any]
) -> None:
    losses = []
    for config in (QUICK, dataclasses.replace(QUICK, **options)):
        model = run.make_model(MODEL, config, dataset.train, "cpu")
        fitted = fit(model, dataset.train, config, epochs=2, validation=dataset.test)
        losses.append([(epoch.loss, epoch.validation_loss) for epoch in fitted.epochs])
    tolerance = 1e-5 if "accumulate" in options else 0.05
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    assert (losses[0] == losses[1]) is False  # the option was not ignored


def test_the_best_is_on_disk_while_training_goes_on(dataset: Dataset, tmp_path: Path) -> None:
    """A killed run loses nothing: the checkpoint does not wait for the end."""
    found: list[Classifier] = []
    go(
        dataset,
        tmp_path / "run",
        on_epoch=lambda epoch: found.append(Classifier.load(tmp_path / "run")),
    )
    assert len(found) >= 3


def test_ctrl_c_before_the_first_epoch(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> Sequences:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.ClassifierTask, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(dataset, tmp_path / "run")


def test_a_loss_that_is_not_finite(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the loss is not finite in the first epoch with lr = 1e\+30"
    ):
        go(dataset, tmp_path / "run", dataclasses.replace(QUICK, lr=1e30, warmup=0.0))


def test_runs_are_not_overwritten(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    go(dataset, tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(ValueError, match="not empty, and runs are never overwritten"):
        go(dataset, tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    with pytest.raises(ValueError, match="a file, expected a new or empty folder"):
        go(dataset, tmp_path / "run" / "result.json")


def test_augmentation() -> None:
    part = sequences(64)
    std = torch.tensor([1.0, 100.0])

    def draw(**options: float) -> Sequences:
        config = dataclasses.replace(QUICK, **options)  # type: ignore[arg-type]
        return augment(part, std, config, torch.Generator().manual_seed(0))

    same = draw()
    assert (same.x is part.x, same.lengths is part.lengths) == (True, True)
    noisy = draw(noise=0.5)
    deviation = (noisy.x - part.x).std((0, 1))
    torch.testing.assert_close(deviation, 0.5 * std, rtol=0.2, atol=0.0)
    cut = draw(crop=0.5)
    assert bool((cut.lengths >= part.lengths / 2).all())
    assert bool((cut.lengths <= part.lengths).all())
    assert bool((cut.lengths < part.lengths).any())
    for row, n, source in zip(cut.x, cut.lengths.tolist(), part.x, strict=True):
        stretches = [torch.equal(row[:n], source[k : k + n]) for k in range(7 - n)]
        assert any(stretches)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("ssm_lr", -1.0),
        ("weight_decay", -0.1), ("warmup", 1.0), ("clip", 0.0), ("label_smoothing", 1.0),
        ("noise", -1.0), ("crop", 1.0), ("validation_fraction", 0.0), ("patience", -1),
        ("seed", -1), ("accumulate", 0), ("accumulate", 33), ("precision", "float8"),
    ],
)  # fmt: skip
def test_training_config_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} = .*, expected"):
        TrainingConfig(**{field: value})


def test_evaluate_run_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder, it has no config\.json"):
        evaluate_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="'dataset' is missing, not the config of a run"):
        evaluate_run(tmp_path)


def test_confusion_matrix() -> None:
    y, answers = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    assert run.confusion_matrix(y, answers, 3) == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "options",
    [
        {
            "layer": "s4d",
            "layer_options": {"bidirectional": True, "channels": 2},
            "activation": "glu",
        },
        {"layer": "s5", "layer_options": {"bidirectional": True}, "n_layer": 4},
        {"layer": "s4d", "layer_options": {"is_real": True, "A_init": "real"}},
    ],
)
def test_pictures_of_every_kind_of_layer(options: dict[str, Any], tmp_path: Path) -> None:
    model = Classifier(ClassifierConfig(2, 2, d_model=4, d_state=4, **options))
    values, kernels = viz.eigenvalues(model), viz.kernels(model, 7)
    assert list(values) == list(kernels) == [f"blocks.{i}.mixer" for i in range(len(model.blocks))]
    layer = model.blocks[0].mixer
    assert isinstance(layer, viz.Layer)
    A_bar, _ = layer.model.discretize(layer.params)
    torch.testing.assert_close(values["blocks.0.mixer"], A_bar.flatten().to(torch.complex128))
    # the kernel is the answer to a unit impulse into its input channel, without D and C2
    params = {k: v.detach() for k, v in layer.params.items()}
    params["D"] = torch.zeros_like(params["D"])
    u = torch.zeros(7, 4)
    u[0, 3] = 1.0
    known = {k: v for k, v in layer._known("scan").items() if k != "bidirectional"}
    y, _ = layer.model.scan(params, u, **known)
    K = kernels["blocks.0.mixer"]
    drawn = K[:, 3] if K.ndim == 3 else K[3::4]
    heard = y.T if K.ndim == 3 else y[:, 3::4].T
    torch.testing.assert_close(drawn, heard.double(), rtol=1e-4, atol=1e-6)
    for figure in (viz.plot_eigenvalues(values, values), viz.plot_kernels(kernels)):
        viz.save_figure(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_pictures_without_epochs_or_with_many_classes() -> None:
    rows = [{"epoch": 1, "loss": 1.0, "validation_loss": None, "validation_accuracy": None}]
    left, right = viz.plot_learning_curve(rows).axes
    assert len(left.get_lines()) == 3
    assert right.get_xlabel() == "epoch"
    names = [f"class number {i}" for i in range(40)]
    matrix = torch.eye(40, dtype=torch.int64).tolist()
    assert len(viz.plot_confusion_matrix(matrix, names).axes[0].texts) == 0  # numbers would not fit


@pytest.mark.parametrize(
    ("backend", "said"), [("torch", "on cpu, plain PyTorch"), ("", "on cpu, compiled kernels")]
)
def test_a_run_says_what_it_ran_on(
    backend: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrnnx_core.backends import cpu
    from lrnnx_nn.training import folder

    monkeypatch.setenv("LRNNX_CPU_BACKEND", backend)
    device = torch.device("cpu")
    result = {"seconds": 1.25, "device": "cpu", "kernels": folder.kernels(device)}
    if backend == "torch" or cpu.installed():
        assert folder.elapsed(result) == f"1.2 s {said}"
    assert folder.elapsed({"seconds": 2, "device": "cpu"}) == "2.0 s on cpu"  # of an older run
