# SPDX-License-Identifier: MIT
"""The folder of a run: what was asked, what happened, and how to go on.

| file | holds |
|---|---|
| ``config.json`` | what was asked, with ``task`` |
| ``metrics.jsonl`` | one line per evaluation |
| ``checkpoint.pt`` | the state of an unfinished run, for ``--resume`` |
| ``result.json`` | what came out |
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lrnnx_core.backends import cpu
from lrnnx_nn.files import read_json, write_atomically, write_json
from lrnnx_nn.recipes import FitConfig
from lrnnx_nn.training.checkpoint import load_state, save_state
from lrnnx_nn.training.engine import Outcome, Record, Task, fit

CONFIG, METRICS, RESULT, STATE = "config.json", "metrics.jsonl", "result.json", "checkpoint.pt"
TASKS = ("classify", "lm", "forecast", "denoise")

_INCIDENTAL = frozenset({"device", "versions"})  # of config.json: may differ in a resumed run


class Progress(Protocol):
    """Whoever shows how a fit goes on; `lrnnx_nn.cli.progress.Progress` does."""

    def begin(self, title: str, steps: int, *, done: int = 0) -> None:
        """Start a phase of so many steps."""
        ...

    def step(self, step: int) -> None:
        """Note that so many steps are taken."""
        ...

    def record(self, record: Record) -> None:
        """Show an evaluation."""
        ...


def check_folder(folder: Path | str) -> Path:
    """Return the folder if a run may be written there.

    Raises:
        ValueError: it is a file, or holds something already.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, expected a new or empty folder for the run")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty, and runs are never overwritten; name a new folder")
    return folder


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return the config of a run; runs of before there were tasks are of ``classify``.

    Raises:
        ValueError: not a run folder, or a broken file in it.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder, it has no {CONFIG}")
    config = {"task": "classify", **read_json(path)}
    if config["task"] not in TASKS:
        raise ValueError(f"{path}: task {config['task']!r}, expected one of {', '.join(TASKS)}")
    return config


class RunFolder:
    """A run folder while it is written; made by `create` or `resume`.

    Attributes:
        path: the folder.
        config: what ``config.json`` holds.
        state: what the last `save` was given, if the run goes on, else None.
    """

    def __init__(self, path: Path, config: dict[str, Any], state: dict[str, Any] | None) -> None:
        self.path, self.config, self.state = path, config, state
        self._lines = 0

    @classmethod
    def create(cls, path: Path | str, config: Mapping[str, Any]) -> RunFolder:
        """Make a folder and write ``config.json``.

        Args:
            path: new or empty.
            config: what JSON can hold: ``task``, and whatever a resumed run has to know.

        Raises:
            ValueError: a folder in use.
        """
        run = cls(check_folder(path), dict(config), None)
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.path / CONFIG, run.config)
        return run

    @classmethod
    def resume(cls, path: Path | str, *, task: str) -> RunFolder:
        """Open the folder of an unfinished run; nothing is written before `fit`.

        Raises:
            ValueError: no run folder, a finished run, another task, a damaged file, or a
                ``config.json`` that is not the one the state was saved with.
        """
        path = Path(path)
        config = read_config(path)
        if config["task"] != task:
            raise ValueError(f"{path}: a run of task {config['task']}, not of {task}")
        if not (path / STATE).is_file():
            if (path / RESULT).is_file():
                raise ValueError(f"{path}: this run is finished, there is nothing to resume")
            raise ValueError(f"{path}: no {STATE}, this run cannot be resumed")
        saved = load_state(path / STATE)
        _same_config(path, config, saved["config"])
        run = cls(path, config, saved["run"])
        run._lines = saved["lines"]
        lines = run._read_lines()
        if len(lines) < run._lines:
            raise ValueError(
                f"{path / METRICS}: {len(lines)} lines, the saved state comes after {run._lines}"
            )
        return run

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._lines += 1

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``checkpoint.pt``: tensors, numbers and strings, for the next `resume`."""
        content = {"config": comparable(self.config), "lines": self._lines, "run": dict(state)}
        save_state(self.path / STATE, content)

    def rewind(self) -> None:
        """Drop the lines of ``metrics.jsonl`` that came after the state of a resumed run."""
        lines = self._read_lines()
        if len(lines) > self._lines:
            write_atomically(self.path / METRICS, "".join(lines[: self._lines]))

    def fit(
        self,
        model: nn.Module,
        task: Task,
        config: FitConfig,
        *,
        save_model: Callable[[Any], None],
        progress: Progress | None = None,
        title: str = "training",
    ) -> Outcome:
        """Train by `engine.fit`, with everything that happens kept in the folder.

        Args:
            model: see `engine.fit`.
            task: the same.
            config: the same.
            save_model: writes the weights of the best model so far into the folder.
            progress: who shows how it goes on.
            title: of the progress bar.

        Raises:
            ValueError: a saved state that does not fit, or no finite loss up to the first record.
            KeyboardInterrupt: before the first record; the run can be resumed.
        """

        def on_record(record: Record) -> None:
            self.append(record.to_dict())
            if progress is not None:
                progress.record(record)

        def on_step(step: int) -> None:
            if progress is not None:
                progress.step(step)

        if progress is not None:
            progress.begin(title, config.steps, done=self.state["step"] if self.state else 0)
        self.rewind()
        outcome = fit(
            model, task, config, state=self.state, save=self.save, on_step=on_step,
            on_best=save_model, on_record=on_record,
        )  # fmt: skip
        if outcome.weights is None:
            if outcome.interrupted:
                raise KeyboardInterrupt(
                    f"before the first evaluation; go on with lrnnx train --resume {self.path}"
                )
            raise ValueError(
                f"the loss is not finite in the first {outcome.steps} steps with "
                f"lr = {config.lr}; try a smaller one"
            )
        return outcome

    def finish(self, result: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
        """Write ``result.json``, and remove ``checkpoint.pt`` unless the run was interrupted.

        Args:
            result: the figures of the task; how the fit ended is added.
            outcome: of `fit`.

        Returns:
            What ``result.json`` holds.
        """
        best = outcome.best
        whole = {
            "task": self.config["task"],
            **result,
            "best_step": None if best is None else best.step,
            "best": {} if best is None else best.figures,
            "steps": outcome.steps,
            "interrupted": outcome.interrupted,
            "diverged": outcome.diverged,
            "versions": versions(),
        }
        self.write_result(whole, keep_state=outcome.interrupted)
        return whole

    def write_result(self, result: Mapping[str, Any], *, keep_state: bool) -> None:
        """Write ``result.json`` as it is given, and remove ``checkpoint.pt`` or not."""
        write_json(self.path / RESULT, dict(result))
        if not keep_state:
            (self.path / STATE).unlink(missing_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl`` up to the state of a resumed run."""
        return [json.loads(line) for line in self._read_lines()[: self._lines]]

    def _read_lines(self) -> list[str]:
        path = self.path / METRICS
        return path.read_text().splitlines(keepends=True) if path.is_file() else []


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that a resumed run must share, as JSON gives it back."""
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in _INCIDENTAL}))


def _same_config(path: Path, config: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    have, want = _flat(comparable(config)), _flat(saved)
    for key in sorted(have.keys() | want.keys()):
        if have.get(key) != want.get(key):
            raise ValueError(
                f"{path / CONFIG}: {key} = {have.get(key)!r}, but {STATE} was saved with "
                f"{want.get(key)!r}; a run goes on only as it began"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def kernels(device: torch.device | str) -> str:
    """Return what the library's operators run on a device: ``compiled`` kernels, or ``torch``."""
    device = torch.device(device)
    if device.type == "cpu":
        return "compiled" if cpu.in_force() else "torch"
    has_cupy = importlib.util.find_spec("cupy") is not None
    ours = device.type == "cuda" and torch.version.hip is None and has_cupy
    return "compiled" if ours else "torch"


def elapsed(result: Mapping[str, Any]) -> str:
    """Return time, device and kernels of a training run, for its report."""
    used = {"compiled": ", compiled kernels", "torch": ", plain PyTorch"}
    kind = used.get(result.get("kernels", ""), "")
    return f"{result['seconds']:.1f} s on {result['device']}{kind}"


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lrnnx-core", "torch", "numba", "numpy", "aeon"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
