# SPDX-License-Identifier: MIT
"""The progress bar of a training run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from lrnnx_nn.optional import require
from lrnnx_nn.training import Epoch
from lrnnx_nn.training.engine import Record

_TITLES = {"search": "training", "refit": "refit on all"}
_LINES = 10  # of a phase, where the output is no terminal


class Progress:
    """A bar for each phase with the loss, a validation figure and the best of it so far.

    Where the output is no terminal, a line now and then instead.

    Args:
        metric: key of the figure in `Record.figures`; "" shows the loss alone.
        form: how to show it, as in ``"{:.3f}"``.
        maximize: whether a larger one is better.
        unit: of the figure.
    """

    def __init__(
        self, metric: str = "", form: str = "{:.4g}", *, maximize: bool = False, unit: str = ""
    ) -> None:
        console, progress = require("rich.console"), require("rich.progress")
        self.metric, self.form, self.maximize, self.unit = metric, form, maximize, unit
        self.console = console.Console()
        self.bar: Any = progress.Progress(
            progress.TextColumn("{task.description:<12}"),
            progress.BarColumn(bar_width=12),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: Any = None
        self.title, self.total, self.shown = "", 0, 0
        self.best: float | None = None

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def begin(self, title: str, steps: int, *, done: int = 0) -> None:
        """Begin a phase of so many steps, ``done`` of which an earlier run took."""
        self.title, self.total, self.best, self.shown = title, steps, None, done
        self.task = self.bar.add_task(title, total=steps, completed=done, figures="")

    def step(self, step: int) -> None:
        """Show that so many steps are taken."""
        self.bar.update(self.task, completed=step)

    def record(self, record: Record) -> None:
        """Show an evaluation."""
        self._show(record.step, record.loss, record.figures.get(self.metric))

    def phase(self, phase: str, epochs: int) -> None:
        """Begin a phase of a classifier's training, of so many epochs."""
        self.begin(_TITLES.get(phase, phase), epochs)

    def epoch(self, epoch: Epoch) -> None:
        """Show an epoch that has ended."""
        self._show(epoch.epoch, epoch.loss, epoch.validation_accuracy)

    def _show(self, done: int, loss: float, value: float | None) -> None:
        figures = short = f"loss {loss:.3f}"
        if value is not None:
            better = max if self.maximize else min
            self.best = value if self.best is None else better(self.best, value)
            now, best = (self.form.format(x) for x in (value, self.best))
            figures += f"  validation {now}  best {best} {self.unit}".rstrip()
            short += f"  val {now}  best {best}"  # in 80 columns, with the bar
        self.bar.update(self.task, completed=done, figures=short)
        due = done - self.shown >= self.total / _LINES or done == self.total
        if not self.console.is_terminal and due:
            self.shown = done
            width = len(str(self.total))
            print(f"{self.title} {done:{width}d}/{self.total}  {figures}", flush=True)
