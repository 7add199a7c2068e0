# SPDX-License-Identifier: MIT
"""The progress bar of a training run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from lrnnx_nn.optional import require
from lrnnx_nn.training import Epoch

_TITLES = {"search": "training", "refit": "refit on all"}


class Progress:
    """A bar for each phase with loss, validation accuracy and the best so far.

    Where the output is no terminal, a line every tenth epoch instead.
    """

    def __init__(self) -> None:
        console, progress = require("rich.console"), require("rich.progress")
        self.console = console.Console()
        self.bar: Any = progress.Progress(
            progress.TextColumn("{task.description:<12}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: Any = None
        self.title, self.epochs, self.best = "", 0, 0.0

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

    def phase(self, phase: str, epochs: int) -> None:
        """Begin a phase of so many epochs."""
        self.title, self.epochs, self.best = _TITLES.get(phase, phase), epochs, 0.0
        self.task = self.bar.add_task(self.title, total=epochs, figures="")

    def epoch(self, epoch: Epoch) -> None:
        """Show an epoch that has ended."""
        figures = f"loss {epoch.loss:.3f}"
        if epoch.validation_accuracy is not None:
            self.best = max(self.best, epoch.validation_accuracy)
            figures += f"  validation {100 * epoch.validation_accuracy:5.1f} %"
            figures += f"  best {100 * self.best:5.1f} %"
        self.bar.update(self.task, completed=epoch.epoch, figures=figures)
        if not self.console.is_terminal and (epoch.epoch % 10 == 0 or epoch.epoch == self.epochs):
            print(f"{self.title} {epoch.epoch:3d}/{self.epochs}  {figures}", flush=True)
