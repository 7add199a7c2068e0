# SPDX-License-Identifier: MIT
"""Training by optimizer steps, whatever the task: `fit(model, task, config)`.

A task (`Task`; derive from `BaseTask` for the defaults) says how to draw a batch, what the loss is
and how to judge a model; `FitConfig` (`lrnnx_nn.recipes`) says how long and how fast. The engine
does the rest: AdamW over `param_groups`, a warm-up and a half cosine, clipping, accumulation, mixed
precision, evaluation every so many steps, the best model, divergence, Ctrl-C, and a state from
which a run goes on bit for bit (on a CPU). `RunFolder` (`lrnnx_nn.training.folder`) keeps all that
in a folder:

    run = RunFolder.create(path, {"task": "forecast", "data": {...}, "training": asdict(config)})
    run = RunFolder.resume(path, task="forecast")           # with --resume: run.config is that dict
    torch.manual_seed(config.seed); model = ...; task = MyTask(...)
    outcome = run.fit(model, task, config, save_model=lambda m: checkpoint.save(path, cfg, m),
                      progress=progress)                    # metrics.jsonl, checkpoint.pt, weights
    model.load_state_dict(outcome.weights); ...             # judge it on the test part
    run.finish({...}, outcome)                              # result.json; checkpoint.pt goes

`lrnnx train --task NAME` reads its options from the light module ``lrnnx_nn.cli.train_NAME`` (it
must not import torch at the top), which holds

* ``SUMMARY``: one line of help;
* ``add_arguments(parser)``: groups of options with their defaults in the help text;
  `lrnnx_nn.cli.arguments.add_training_options(parser, FitConfig(...))` adds the engine's own, and
  `fit_config(arguments)` reads them. There already: --task, --out, --resume, --device, --threads;
* ``run(arguments) -> int``: the exit code (0, or 130 after Ctrl-C). With ``arguments.resume`` (a
  folder) every other option has its default and is to be taken from `RunFolder.resume`'s config;
  ``required=True`` options are not asked for then. ``arguments.out`` may be None: see
  `lrnnx_nn.cli.arguments.new_folder`.

``lrnnx eval RUN`` calls ``lrnnx_nn.training.NAME.evaluate_run(folder, source=None, device="cpu") ->
dict`` (``source``: what --data names, None for the run's own) and prints the lines of
``lrnnx_nn.training.NAME.report(result) -> list[tuple[str, str]]``: a label and a value each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_nn.optimizer_groups import param_groups
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.training.schedule import Schedule, schedule_factor
from lrnnx_nn.training.task import BaseTask, Task, split_batch, to_device

__all__ = [
    "BaseTask",
    "Outcome",
    "Record",
    "Schedule",
    "Task",
    "autocast",
    "fit",
    "schedule_factor",
    "split_batch",
    "to_device",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Record(NamedTuple):
    """An evaluation: one line of metrics.jsonl."""

    step: int
    loss: float
    """Mean training loss since the record before."""
    lr: float
    """Rate of the ordinary parameters at the next step."""
    seconds: float
    """Since the record before, the evaluation included."""
    figures: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it flat, as metrics.jsonl has it."""
        values = self._asdict()
        return values | values.pop("figures")


class Outcome(NamedTuple):
    """How a fit ended. ``weights`` is the best `state_dict`, None if there was no record yet."""

    weights: dict[str, Tensor] | None
    best: Record | None
    records: list[Record]
    steps: int
    interrupted: bool
    diverged: bool


def fit(
    model: nn.Module,
    task: Task,
    config: FitConfig,
    *,
    state: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_best: Callable[[Any], None] = lambda model: None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Outcome:
    """Train a model.

    Args:
        model: on the device to train on, in its initial values; holds the last weights afterwards.
        task: what to learn, with its own seed if it has any randomness besides the generator.
        config: how long and how fast.
        state: of an earlier fit with the same model, task and config, as ``save`` got it: go on
            from there, bit for bit on a CPU.
        save: called with such a state at the start, after each evaluation and on Ctrl-C.
        on_step: called after each optimizer step.
        on_best: called with the model after an evaluation that is the best so far.
        on_record: called after each evaluation, before ``save``.

    Returns:
        The best weights and the record. Ctrl-C ends the loop after the step it came in, a second
        one at once; a mean loss that is not finite ends it too. Neither is an error here.

    Raises:
        ValueError: a state of another config or model, or a precision the device lacks.
    """
    loop = _Loop(model, task, config)
    if state is None:
        save(loop.state_dict())
    else:
        loop.load_state_dict(state)
    interrupted = diverged = False
    consistent = True
    try:
        with _deferred_interrupt() as asked:
            while not loop.ended:
                consistent = False
                loop.take_step()
                on_step(loop.step)
                if loop.due:
                    record = loop.evaluate()
                    if not math.isfinite(record.loss):
                        diverged = True
                        break
                    if loop.keep(record):
                        on_best(model)
                    consistent = True
                    on_record(record)
                    save(loop.state_dict())
                consistent = True
                if asked.is_set():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
        if consistent:
            save(loop.state_dict())
    return Outcome(loop.weights, loop.best, loop.records, loop.step, interrupted, diverged)


class _Loop:
    """Everything that changes while a model is trained."""

    def __init__(self, model: nn.Module, task: Task, config: FitConfig) -> None:
        self.model, self.task, self.config = model, task, config
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            param_groups(model, config.lr, config.ssm_lr, config.weight_decay)
        )
        self.schedule = Schedule(self.optimizer, config.steps, config.warmup)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.step = 0
        self.records: list[Record] = []
        self.best: Record | None = None
        self.weights: dict[str, Tensor] | None = None
        self.since_best = 0  # evaluations
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        # on the device, so that a step does not wait for the one before
        self.total = torch.zeros((), dtype=exact, device=self.device)
        self.weight = 0.0
        self.seconds = 0.0  # before a resumed run went on
        self.started = time.perf_counter()

    @property
    def due(self) -> bool:
        """Whether an evaluation follows this step."""
        return self.step % self.config.evaluate_every == 0 or self.step == self.config.steps

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or patience is at an end."""
        patience = self.config.patience
        return self.step >= self.config.steps or bool(patience and self.since_best >= patience)

    def take_step(self) -> None:
        """Take one optimizer step, with the gradient of the mean loss of the whole batch."""
        config = self.config
        self.model.train()
        batch = self.task.batch(self.generator)
        parts = [batch] if config.accumulate == 1 else self.task.split(batch, config.accumulate)
        weights = [self.task.weight(part) for part in parts]
        whole = sum(weights)
        self.optimizer.zero_grad(set_to_none=True)
        for part, weight in zip(parts, weights, strict=True):
            with autocast(self.device, config.precision):
                loss = self.task.loss(self.model, part)
            share = weight / whole if whole else 0.0
            self.scaler.scale(loss * share).backward()
            self.total += loss.detach().to(self.total.dtype) * weight
        self.weight += whole
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.schedule.set(self.step)

    @torch.no_grad()
    def evaluate(self) -> Record:
        """Return the record of the steps since the last one."""
        loss = float(self.total) / self.weight if self.weight else math.nan
        figures: dict[str, float] = {}
        if math.isfinite(loss):
            self.model.eval()
            with autocast(self.device, self.config.precision):
                figures = {k: float(v) for k, v in self.task.evaluate(self.model).items()}
            self.model.train()
        rate = self.config.lr * self.schedule.factor
        seconds = self.seconds + time.perf_counter() - self.started
        return Record(self.step, loss, rate, seconds, figures)

    def keep(self, record: Record) -> bool:
        """Note a record; return whether it is the best so far."""
        self.records.append(record)
        self.total.zero_()
        self.weight = self.seconds = 0.0
        self.started = time.perf_counter()
        score = self.task.score(record.figures)
        finite = not any(math.isnan(x) for x in score)
        better = finite and (
            self.best is None or not score or score > self.task.score(self.best.figures)
        )
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.best = record
            self.weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as ``torch.load(weights_only=True)`` can read it back."""
        on_cuda = self.device.type == "cuda"
        return {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "task": self.task.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
            "records": [record._asdict() for record in self.records],
            "best": None if self.best is None else self.best._asdict(),
            "weights": self.weights,
            "since_best": self.since_best,
            "total": float(self.total),
            "weight": self.weight,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: a state of another config or model; nothing of it has been used.
        """
        have, want = state["config"], dataclasses.asdict(self.config)
        for name in want:
            if have.get(name) != want[name]:
                raise ValueError(
                    f"the saved state is of a run with {name} = {have.get(name)!r}, this one has "
                    f"{want[name]!r}"
                )
        shapes = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        for key in sorted(shapes.keys() | state["model"].keys()):
            saved = state["model"].get(key)
            if key not in shapes or saved is None or tuple(saved.shape) != shapes[key]:
                raise ValueError(
                    f"the saved state is of another network: {key} is "
                    f"{'absent' if saved is None else tuple(saved.shape)}, expected "
                    f"{shapes.get(key, 'absent')}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.task.load_state_dict(state["task"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        self.schedule.set(self.step)
        self.records = [Record(**record) for record in state["records"]]
        self.best = None if state["best"] is None else Record(**state["best"])
        if state["weights"] is not None:
            self.weights = {k: v.to(self.device) for k, v in state["weights"].items()}
        self.since_best = state["since_best"]
        self.total.fill_(state["total"])
        self.weight, self.seconds = state["weight"], state["seconds"]
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which matrix products run in ``precision``.

    State-space parameters, their states and the sums stay float32 in every layer.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}, expected one of {', '.join(DTYPES)}")
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set an event and the second one raise.

    Left alone outside the main thread, and where a program has its own handler.
    """
    asked = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
