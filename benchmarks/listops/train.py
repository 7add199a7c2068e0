# SPDX-License-Identifier: MIT
"""One ListOps run: as many steps as fit the time, a curve of accuracies, the test at the end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.listops.data import Epoch, Part, bounds, epoch
from benchmarks.listops.grammar import Task
from benchmarks.listops.recipe import Recipe, network
from benchmarks.listops.step import Schedule, Step, autocast
from lrnnx_core import registry
from lrnnx_nn import Classifier

PROBE = 300
"""Steps timed, after the last graph was captured, before the number of steps is set."""

Result = dict[str, Any]


@torch.no_grad()
def accuracy(model: Classifier, part: Part, precision: str = "float32", size: int = 250) -> float:
    """Return the share of a part that the network gets right."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=part.values.device)
    order = part.lengths.argsort()  # little padding
    for rows in order.split(size):
        tokens = part.tokens[rows, : int(part.lengths[rows[-1]])].to(torch.int64)
        with autocast(part.tokens.device.type, precision):
            found = model(tokens, lengths=part.lengths[rows])
        right += (found.argmax(-1) == part.values[rows]).sum()
    model.train()
    return int(right) / len(part.values)


class Batches:
    """Batches without end, epoch after epoch: (bucket, rows) of the data."""

    def __init__(self, part: Part, limits: torch.Tensor, recipe: Recipe, seed: int) -> None:
        self._lengths, self._limits = part.lengths.cpu(), limits
        self._device, self._batch = part.tokens.device, recipe.batch_size
        self._draw = torch.Generator().manual_seed(seed)
        self._now, self._at = Epoch(torch.empty(0), []), 0

    def next(self) -> tuple[int, torch.Tensor]:
        """Return the next batch."""
        if self._at == len(self._now.bucket):
            new = epoch(self._lengths, self._limits, self._batch, self._draw)
            self._now, self._at = Epoch(new.rows.to(self._device), new.bucket), 0
        self._at += 1
        return self._now.bucket[self._at - 1], self._now.rows[self._at - 1]


class Clock:
    """Sets the number of steps: the recipe's, or what fits the minutes at the rate so far.

    Args:
        schedule: is told.
        steps: of the recipe; 0 for what fits.
        minutes: of training, evaluations and capturing included.
    """

    def __init__(self, schedule: Schedule, steps: int, minutes: float) -> None:
        self.schedule, self.minutes = schedule, minutes
        self.fixed = steps > 0
        self.started = time.perf_counter()
        self._probe: tuple[int, float] | None = None
        if self.fixed:
            schedule.set_total(0, steps)

    @property
    def seconds(self) -> float:
        """Return the time since the start."""
        return time.perf_counter() - self.started

    def look(self, step: int, ready: bool, wait: Callable[[], None]) -> bool:
        """Start, and end, the timing of the first steps; return whether it has just ended."""
        late = self.seconds > 30 * self.minutes
        if self.fixed or self.schedule.total is not None or not (ready or late):
            return False
        if self._probe is None:
            wait()
            self._probe = step, self.seconds
        elif step == self._probe[0] + PROBE or late:
            wait()
            self.plan(step)
            return True
        return False

    def plan(self, step: int) -> None:
        """Set the number of steps by the rate since the probe began."""
        if self.fixed or self._probe is None:
            return
        since, at = self._probe
        rate = (step - since) / (self.seconds - at)
        total = step + int(rate * max(60 * self.minutes - self.seconds, 0))
        self.schedule.set_total(step, max(total, step + 1))


def train(
    name: str,
    seed: int,
    recipe: Recipe,
    task: Task,
    *,
    parts: dict[str, Part],
    device: str,
    minutes: float,
    save: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Train a fresh network for the recipe's steps, or for as many as fit ``minutes``.

    The test part is read once, at the end, by the last weights. ``save`` is given the result so far
    after every evaluation, without ``test``, and at the end with it.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    parts = {key: part.to(device) for key, part in parts.items()}
    limits = bounds(parts["train"].lengths.cpu(), recipe.buckets)
    model = network(name, recipe).to(device)
    schedule = Schedule(recipe.warmup, device)
    run = Step(model, parts["train"], limits, recipe, schedule)
    result: Result = {
        "model": registry.get(name).name,
        "seed": seed,
        "test": None,
        "steps": 0,
        "seconds": 0.0,
        "curve": [],
        "commonest": _commonest(parts["test"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "lr": (recipe.lr, recipe.ssm_lr),
        "lengths": run.limits,
        "recipe": dataclasses.asdict(recipe),
        "task": task._asdict(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    with run.on_stream():
        _steps(run, result, Batches(parts["train"], limits, recipe, seed), parts["validation"],
               Clock(schedule, recipe.steps, minutes), wait, save)  # fmt: skip
        result["test"] = accuracy(model, parts["test"], recipe.precision)
    save(result)
    return result


def _commonest(part: Part) -> float:
    """Return the share of the commonest value: what a constant answer gets."""
    return int(part.values.bincount().max()) / len(part.values)


def _steps(
    run: Step,
    result: Result,
    batches: Batches,
    validation: Part,
    clock: Clock,
    wait: Callable[[], None],
    save: Callable[[Result], None],
) -> None:
    """Train until the schedule ends, and write the curve into the result."""
    recipe, step, counted = run.recipe, 0, 0
    while clock.schedule.total is None or step < clock.schedule.total:
        run(*batches.next())
        step, counted = step + 1, counted + 1
        if clock.look(step, run.ready, wait):
            print(f"{result['model']}: {clock.schedule.total} steps fit", flush=True)
        total = clock.schedule.total
        if total is None:
            continue
        every = max(total // recipe.evaluations, 1)
        if step != total and (step % every or total - step < every // 2):
            continue
        loss, counted = float(run.loss) / counted, 0
        run.loss.zero_()
        point = {
            "step": step,
            "epoch": round(step * recipe.batch_size / recipe.sequences, 2),
            "loss": round(loss, 4),
            "validation": accuracy(run.model, validation, recipe.precision),
            "seconds": round(clock.seconds, 1),
        }
        result["curve"].append(point)
        result |= {"steps": step, "seconds": point["seconds"]}
        print(f"{result['model']} {point}", flush=True)
        save(result)
        if not math.isfinite(loss):
            print(f"{result['model']}: stopped, the loss is {loss}", flush=True)
            return
        if total - step > every:
            clock.plan(step)
