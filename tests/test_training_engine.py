"""The engine: schedule, accumulation, clipping, precision, the best, going on bit for bit.

The task here is a toy of a few parameters with dropout, so that every source of randomness a run
has (initial values, batches, torch's own generator) takes part.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.training import checkpoint, engine
from lrnnx_nn.training.engine import BaseTask, Outcome, Schedule, fit, schedule_factor, split_batch
from lrnnx_nn.training.folder import RunFolder

QUICK = FitConfig(steps=12, batch_size=6, lr=1e-2, evaluate_every=4, warmup=0.25)


class Toy(BaseTask):
    """Passes in random order over 20 rows of three numbers whose sum is to be found."""

    def __init__(self, batch_size: int = 6) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(20, 3, generator=generator)
        self.held = torch.randn(9, 3, generator=generator)
        self.size, self.order, self.position = batch_size, torch.empty(0, dtype=torch.int64), 0
        self.on_batch: Callable[[int], None] = lambda count: None
        self.on_loss: Callable[[int], None] = lambda count: None
        self.batches = self.losses = 0

    def batch(self, generator: torch.Generator) -> Tensor:
        self.batches += 1
        self.on_batch(self.batches)
        if self.position >= len(self.order):
            self.order, self.position = torch.randperm(len(self.x), generator=generator), 0
        index = self.order[self.position : self.position + self.size]
        self.position += self.size
        noise = torch.randn(len(index), 3, generator=generator)
        return self.x[index] + 0.1 * noise

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.losses += 1
        self.on_loss(self.losses)
        return (model(batch).squeeze(-1) - batch.sum(-1)).square().mean()

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        assert not model.training
        error = model(self.held).squeeze(-1) - self.held.sum(-1)
        return {"validation_loss": float(error.square().mean())}

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(records: list[engine.Record]) -> list[engine.Record]:
    return [record._replace(seconds=0.0) for record in records]


# --- schedule ------------------------------------------------------------------------------------


def test_the_schedule_is_its_closed_form() -> None:
    steps, warmup = 40, 0.2
    warm = [schedule_factor(step, steps, warmup) for step in range(8)]
    assert warm == pytest.approx([(k + 1) / 9 for k in range(8)])
    fall = [schedule_factor(step, steps, warmup) for step in range(8, 41)]
    assert fall == pytest.approx([math.cos(math.pi * k / 64) ** 2 for k in range(33)])
    assert fall[0] == 1.0
    assert fall[-1] == pytest.approx(0.0, abs=1e-12)
    assert schedule_factor(0, 5, 0.0) == 1.0
    assert schedule_factor(9, 5, 0.0) == 0.0  # beyond the end


def test_every_group_follows_it_at_its_own_peak() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": peak} for w, peak in zip(weights, (1e-2, 1e-3), strict=True)]
    optimizer = torch.optim.AdamW(groups)
    schedule = Schedule(optimizer, steps=8, warmup=0.25)
    for step in range(9):
        schedule.set(step)
        rates = [group["lr"] for group in optimizer.param_groups]
        factor = schedule_factor(step, 8, 0.25)
        assert rates == pytest.approx([1e-2 * factor, 1e-3 * factor])


def test_the_rates_reach_the_optimizer() -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        outcome = fit(network(), Toy(), QUICK)
    expected = [QUICK.lr * schedule_factor(k, 12, 0.25) for k in range(12)]
    assert rates == pytest.approx(expected)
    assert [r.lr for r in outcome.records] == pytest.approx(
        [QUICK.lr * schedule_factor(k, 12, 0.25) for k in (4, 8, 12)]
    )


# --- one step ------------------------------------------------------------------------------------


def gradients(model: nn.Module, task: Any, config: FitConfig) -> list[Tensor]:
    """Return the gradient of the first step, after clipping: Adam's first moment has it."""
    states: list[dict[str, Any]] = []
    once = dataclasses.replace(config, steps=1)
    fit(model, task, once, save=lambda state: states.append(copied(state)))
    moments = states[-1]["optimizer"]["state"]
    return [moments[key]["exp_avg"] / 0.1 for key in sorted(moments)]


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(inside) for key, inside in value.items()}
    return [copied(inside) for inside in value] if isinstance(value, list) else value


class Ragged(BaseTask):
    """Rows of 1 ... 7 tokens: the loss is a mean over tokens, so parts differ in weight."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(7, 8, 3, dtype=torch.float64, generator=generator)
        self.valid = torch.arange(8) < torch.arange(1, 8).unsqueeze(-1)

    def batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": self.x, "valid": self.valid}

    def weight(self, batch: dict[str, Tensor]) -> float:
        return float(batch["valid"].sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        error = model(batch["x"]).squeeze(-1) - batch["x"].sum(-1)
        return error[batch["valid"]].square().mean()


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_accumulation_is_the_large_batch(parts: int) -> None:
    def model() -> nn.Module:
        return network().double().eval().requires_grad_()

    config = dataclasses.replace(QUICK, batch_size=7, clip=math.inf)
    plain = nn.Sequential(*(m for m in model() if not isinstance(m, nn.Dropout)))
    task = Ragged()
    task.loss(plain, task.batch(torch.Generator())).backward()
    expected = [p.grad for p in plain.parameters()]
    found = gradients(plain, Ragged(), dataclasses.replace(config, accumulate=parts))
    order = {"0.weight": 2, "0.bias": 0, "2.weight": 3, "2.bias": 1}  # biases stand first
    for gradient, (name, _) in zip(expected, plain.named_parameters(), strict=True):
        assert gradient is not None
        torch.testing.assert_close(found[order[name]], gradient, rtol=1e-12, atol=1e-14)
    # the mean of the parts' means is another gradient: the weights matter
    means = [
        torch.autograd.grad(task.loss(plain, part), list(plain.parameters()))[0]
        for part in split_batch(task.batch(torch.Generator()), parts)
    ]
    assert not torch.allclose(torch.stack(means).mean(0), expected[0], rtol=1e-3)  # type: ignore[arg-type]


def test_a_whole_run_with_accumulation_is_the_run_without() -> None:
    runs: list[Outcome] = []
    for accumulate in (1, 4):
        model = nn.Sequential(*(m for m in network() if not isinstance(m, nn.Dropout)))
        runs.append(fit(model, Toy(), dataclasses.replace(QUICK, accumulate=accumulate)))
    for a, b in zip(runs[0].records, runs[1].records, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.figures == pytest.approx(b.figures, rel=1e-4)


def test_batches_are_split_whatever_they_are() -> None:
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    for batch in ((x, y), [x, y], {"x": x, "y": y, "name": "kept"}):
        parts = split_batch(batch, 2)
        assert len(parts) == 2
        pairs = [list(p.values())[:2] if isinstance(p, dict) else list(p) for p in parts]
        torch.testing.assert_close(torch.cat([p[0] for p in pairs]), x)
        torch.testing.assert_close(torch.cat([p[1] for p in pairs]), y)
    assert [len(part) for part in split_batch(x, 99)] == [1] * 5
    assert split_batch({"x": x, "name": "kept"}, 2)[1]["name"] == "kept"
    with pytest.raises(ValueError, match=r"tensors of \[4, 5\] rows"):
        split_batch((x, y[1:]), 2)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_the_norm_of_the_whole_gradient_is_clipped(clip: float) -> None:
    config = dataclasses.replace(QUICK, accumulate=2)
    whole = gradients(network(), Toy(), dataclasses.replace(config, clip=math.inf))
    free = torch.cat([g.flatten() for g in whole]).norm()
    cut = gradients(network(), Toy(), dataclasses.replace(config, clip=clip))
    norm = torch.cat([g.flatten() for g in cut]).norm()
    assert float(free) > 0.01
    torch.testing.assert_close(norm, free.clamp(max=clip), rtol=1e-4, atol=0.0)


# --- precision -----------------------------------------------------------------------------------


class Words(BaseTask):
    """A language model on random tokens."""

    def batch(self, generator: torch.Generator) -> Tensor:
        return torch.randint(11, (4, 9), generator=generator)

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        self.logits, self.state = model.prefill(batch[:, :-1])
        flat = self.logits.float().flatten(0, 1)
        return nn.functional.cross_entropy(flat, batch[:, 1:].flatten())


def floats(state: Any) -> list[torch.dtype]:
    if isinstance(state, Tensor):
        return [state.dtype] if state.is_floating_point() or state.is_complex() else []
    return [dtype for inside in state for dtype in floats(inside)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("mixer", ["s5", "rglru", "mamba"])
def test_mixed_precision_keeps_the_recurrence_in_float32(mixer: str, precision: str) -> None:
    torch.manual_seed(0)
    size = None if mixer == "rglru" else 4
    model = LRNNLMHeadModel(8, size, 1, 11, [mixer], d_intermediate=8)
    task, seen = Words(), set()
    assert model.layers[0].mlp is not None  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    config = dataclasses.replace(QUICK, steps=3, precision=precision)
    outcome = fit(model, task, config)
    assert all(math.isfinite(record.loss) for record in outcome.records)
    assert seen == {engine.DTYPES[precision]}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    recurrent = task.state.blocks[0]
    assert set(floats(recurrent)) <= {torch.float32, torch.complex64, engine.DTYPES[precision]}
    assert {torch.float32, torch.complex64} & set(floats(recurrent))


def test_float16_scales_its_loss() -> None:
    """A gradient below float16's smallest number survives, as GradScaler is there for."""
    factors: list[float] = []

    class Small(Toy):
        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            loss = super().loss(model, batch)
            loss.register_hook(lambda grad: factors.append(float(grad)))
            return loss

    fit(network(), Small(), dataclasses.replace(QUICK, steps=1, precision="float16"))
    fit(network(), Small(), dataclasses.replace(QUICK, steps=1))
    assert factors == [2.0**16, 1.0]


# --- the best, patience, divergence --------------------------------------------------------------


class Scripted(Toy):
    """Says what it is told to say."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = iter(values)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {"validation_loss": next(self.values)}


def test_the_best_is_kept_and_handed_out() -> None:
    seen: list[dict[str, Tensor]] = []
    model = network()
    outcome = fit(
        model, Scripted([3.0, 1.0, 2.0]), QUICK,
        on_best=lambda m: seen.append(copied(m.state_dict())),
    )  # fmt: skip
    assert [record.step for record in outcome.records] == [4, 8, 12]
    assert outcome.best is not None
    assert outcome.best.step == 8
    assert outcome.weights is not None
    assert len(seen) == 2
    assert same(outcome.weights, seen[-1])
    assert not same(outcome.weights, model.state_dict())


def test_nan_is_never_the_best() -> None:
    outcome = fit(network(), Scripted([math.nan, 2.0, math.nan]), QUICK)
    assert outcome.best is not None
    assert outcome.best.step == 8
    assert fit(network(), Scripted([math.nan] * 3), QUICK).best is None


def test_a_larger_figure_may_be_better() -> None:
    task = Scripted([3.0, 1.0, 2.0])
    task.maximize = True  # type: ignore[misc]
    outcome = fit(network(), task, QUICK)
    assert outcome.best is not None
    assert outcome.best.step == 4


def test_without_figures_the_newest_is_the_best() -> None:
    task = Toy()
    task.evaluate = lambda model: {}  # type: ignore[method-assign]
    model = network()
    outcome = fit(model, task, QUICK)
    assert outcome.best == outcome.records[-1]
    assert outcome.weights is not None
    assert same(outcome.weights, model.state_dict())


def test_patience_counts_evaluations() -> None:
    config = dataclasses.replace(QUICK, steps=40, patience=2)
    outcome = fit(network(), Scripted([3.0, 1.0, 2.0, 1.0, 0.1]), config)
    assert outcome.steps == 16
    assert outcome.best is not None
    assert outcome.best.step == 8


def test_the_last_step_is_always_judged() -> None:
    outcome = fit(network(), Toy(), dataclasses.replace(QUICK, steps=10))
    assert [record.step for record in outcome.records] == [4, 8, 10]


def test_the_loss_is_the_mean_over_samples() -> None:
    losses: list[tuple[float, int]] = []

    class Noted(Toy):
        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            loss = super().loss(model, batch)
            losses.append((float(loss.detach()), len(batch)))
            return loss

    outcome = fit(network(), Noted(), QUICK)
    assert {n for _, n in losses} == {6, 2}  # 20 rows in batches of 6
    for i, record in enumerate(outcome.records):
        part = losses[4 * i : 4 * i + 4]
        mean = sum(loss * n for loss, n in part) / sum(n for _, n in part)
        assert record.loss == pytest.approx(mean, rel=1e-12)


def test_divergence_keeps_the_best() -> None:
    task = Toy()

    def fails(count: int) -> None:
        if count == 7:
            task.x.fill_(math.nan)

    task.on_batch = fails
    outcome = fit(network(), task, QUICK)
    assert outcome.diverged
    assert not outcome.interrupted
    assert outcome.steps == 8
    assert [record.step for record in outcome.records] == [4]
    assert outcome.weights is not None
    assert all(bool(torch.isfinite(w).all()) for w in outcome.weights.values())


# --- going on ------------------------------------------------------------------------------------


def run_in(folder: Path, task: Toy, config: FitConfig = QUICK, *, resume: bool = False) -> Outcome:
    run = (
        RunFolder.resume(folder, task="lm")
        if resume
        else RunFolder.create(folder, {"task": "lm", "training": dataclasses.asdict(config)})
    )
    model = network()
    torch.manual_seed(7 if resume else 5)  # what happens before must not matter
    if not resume:
        torch.manual_seed(0)
    outcome = run.fit(
        model, task, config,
        save_model=lambda m: checkpoint.save_state(folder / "best.pt", m.state_dict()),
    )  # fmt: skip
    assert outcome.weights is not None
    best = checkpoint.load_state(folder / "best.pt")
    assert same(best, outcome.weights)
    return outcome._replace(weights=copied(model.state_dict()))  # the last ones are stricter


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) | {"seconds": 0} for line in text.splitlines()]


def final_state(folder: Path) -> str:
    run = checkpoint.load_state(folder / "checkpoint.pt")["run"]
    for record in [*run["records"], run["best"]]:
        record["seconds"] = 0
    return checkpoint.digest({**run, "seconds": 0})


CASES = {
    **{f"step {step}": (step, QUICK) for step in (4, 5, 6, 8, 11)},
    "bfloat16": (6, dataclasses.replace(QUICK, accumulate=3, precision="bfloat16")),
    "float16": (6, dataclasses.replace(QUICK, precision="float16")),
}


@pytest.mark.parametrize(("step", "config"), CASES.values(), ids=CASES)
def test_ctrl_c_and_resume_change_nothing(step: int, config: FitConfig, tmp_path: Path) -> None:
    """At an evaluation, within a pass, between passes, after the best, before the last step."""
    whole = run_in(tmp_path / "whole", Toy(), config)
    task = Toy()
    task.on_batch = lambda n: signal.raise_signal(signal.SIGINT) if n == step else None
    first = run_in(tmp_path / "cut", task, config)
    assert first.interrupted
    assert first.steps == step  # the step that Ctrl-C came in was finished
    second = run_in(tmp_path / "cut", Toy(), config, resume=True)
    assert not second.interrupted
    assert timeless(second.records) == timeless(whole.records)
    assert second.best is not None
    assert whole.best is not None
    assert second.best.step == whole.best.step
    assert same(second.weights or {}, whole.weights or {})
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [5, 8, 9, 12])
def test_a_crash_within_a_step_loses_no_more_than_the_steps_since_the_last_evaluation(
    kind: type[BaseException], step: int, tmp_path: Path
) -> None:
    whole = run_in(tmp_path / "whole", Toy())
    task = Toy()

    def crash(count: int) -> None:
        if count == step:
            raise kind("at once")

    task.on_loss = crash
    try:
        first = run_in(tmp_path / "cut", task)
        assert first.interrupted
        assert kind is KeyboardInterrupt
    except RuntimeError:
        assert kind is RuntimeError
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a line that a crash left half-written
    second = run_in(tmp_path / "cut", Toy(), resume=True)
    assert timeless(second.records) == timeless(whole.records)
    assert same(second.weights or {}, whole.weights or {})
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    whole = run_in(tmp_path / "whole", Toy())
    for i, count in enumerate((4, 1, 2, 3)):  # of steps until Ctrl-C
        task = Toy()
        task.on_batch = lambda n, count=count: (  # type: ignore[misc]
            signal.raise_signal(signal.SIGINT) if n == count else None
        )
        outcome = run_in(tmp_path / "cut", task, resume=i > 0)
        assert outcome.interrupted
    outcome = run_in(tmp_path / "cut", Toy(), resume=True)
    assert timeless(outcome.records) == timeless(whole.records)
    assert same(outcome.weights or {}, whole.weights or {})


def test_ctrl_c_before_the_first_evaluation_can_be_resumed(tmp_path: Path) -> None:
    whole = run_in(tmp_path / "whole", Toy())
    task = Toy()
    task.on_batch = lambda n: signal.raise_signal(signal.SIGINT) if n == 2 else None
    with pytest.raises(KeyboardInterrupt, match="go on with lrnnx train --resume"):
        run_in(tmp_path / "cut", task)
    second = run_in(tmp_path / "cut", Toy(), resume=True)
    assert same(second.weights or {}, whole.weights or {})
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once() -> None:
    task = Toy()

    def twice(count: int) -> None:
        if count == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    task.on_batch = twice
    outcome = fit(network(), task, QUICK)
    assert outcome.interrupted
    assert outcome.steps == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A run that Ctrl-C ended after six steps."""
    task = Toy()
    task.on_batch = lambda n: signal.raise_signal(signal.SIGINT) if n == 6 else None
    run_in(tmp_path / "run", task)
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path, message: str, **options: Any) -> None:
    before = content(folder)
    with pytest.raises(ValueError, match=message):
        run_in(folder, Toy(), resume=True, **options)
    assert content(folder) == before


def test_the_state_is_plain_data(cut: Path) -> None:
    values = torch.load(cut / "checkpoint.pt", weights_only=True)
    assert set(values) == {"content", "digest"}
    assert values["content"]["run"]["step"] == 6


@pytest.mark.parametrize("place", [0, 0.01, 0.2, 0.5, 0.8, 0.99])
def test_a_damaged_state_is_refused(cut: Path, place: float) -> None:
    path = cut / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + 40] = bytes(255 - byte for byte in data[start : start + 40])
    path.write_bytes(bytes(data))
    refused(cut, r"checkpoint\.pt: (truncated or )?damaged")


def test_a_truncated_state_is_refused(cut: Path) -> None:
    path = cut / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    refused(cut, r"checkpoint\.pt: truncated or damaged")


def test_one_wrong_bit_of_a_weight_is_found(cut: Path) -> None:
    path = cut / "checkpoint.pt"
    values = torch.load(path, weights_only=True)
    values["content"]["run"]["model"]["0.weight"][0, 0] += 1e-6
    torch.save(values, path)
    refused(cut, "its content does not match its digest")


def test_another_config_is_refused(cut: Path) -> None:
    config = json.loads((cut / "config.json").read_text())
    config["training"]["lr"] = 0.5
    (cut / "config.json").write_text(json.dumps(config))
    refused(cut, r"training\.lr = 0\.5, but checkpoint\.pt was saved with 0\.01")


def test_a_state_of_another_config_or_model_is_refused(cut: Path) -> None:
    refused(
        cut,
        "of a run with steps = 12, this one has 13",
        config=dataclasses.replace(QUICK, steps=13),
    )
    state = RunFolder.resume(cut, task="lm").state
    other = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=r"of another network: 1\.bias is absent, expected"):
        fit(other, Toy(), QUICK, state=state)


def test_folders_that_cannot_be_resumed(cut: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a run of task lm, not of denoise"):
        RunFolder.resume(cut, task="denoise")
    (cut / "metrics.jsonl").unlink()
    refused(cut, r"metrics\.jsonl: 0 lines, the saved state comes after 1")
    (cut / "checkpoint.pt").unlink()
    refused(cut, r"no checkpoint\.pt, this run cannot be resumed")
    (cut / "result.json").write_text("{}")
    refused(cut, "this run is finished, there is nothing to resume")
    with pytest.raises(ValueError, match=r"not a run folder, it has no config\.json"):
        RunFolder.resume(tmp_path / "none", task="lm")
    (cut / "config.json").write_text('{"task": "juggle"}')
    refused(cut, "task 'juggle', expected one of classify, lm, forecast, denoise")


def test_finish_removes_the_state_of_a_finished_run_alone(tmp_path: Path) -> None:
    for interrupted in (True, False):
        run = RunFolder.create(tmp_path / str(interrupted), {"task": "lm"})
        run.save({"step": 1})
        outcome = Outcome(None, None, [], 3, interrupted, False)
        result = run.finish({"figure": 1.5}, outcome)
        assert json.loads((run.path / "result.json").read_text()) == result
        assert (result["figure"], result["task"], result["steps"]) == (1.5, "lm", 3)
        assert (run.path / "checkpoint.pt").exists() is interrupted


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("accumulate", 0), ("accumulate", 33), ("lr", 0.0),
        ("precision", "float8"), ("lr", math.nan), ("ssm_lr", -1.0), ("weight_decay", -0.1),
        ("warmup", 1.0), ("clip", 0.0), ("evaluate_every", 0), ("patience", -1), ("seed", -1),
    ],
)  # fmt: skip
def test_the_config_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} = .*, expected"):
        FitConfig(**{field: value})
