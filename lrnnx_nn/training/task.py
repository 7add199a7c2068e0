# SPDX-License-Identifier: MIT
"""What the engine trains: the protocol of a task, and batches that can be cut and moved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Task(Protocol):
    """What is trained. A batch is whatever `batch` returns and `loss` takes."""

    metric: str
    """Key of `evaluate`'s figures that progress is shown by."""

    maximize: bool
    """Whether a larger figure is better."""

    def batch(self, generator: torch.Generator) -> Any:
        """Return the next batch; draw from this generator (a CPU one) alone."""
        ...

    def split(self, batch: Any, parts: int) -> Sequence[Any]:
        """Return the batch in at most so many parts, for gradient accumulation."""
        ...

    def weight(self, batch: Any) -> float:
        """Return how many samples or tokens the mean of `loss` runs over."""
        ...

    def loss(self, model: Any, batch: Any) -> Tensor:
        """Return the mean loss of a batch or part, a scalar; the model is in training mode."""
        ...

    def evaluate(self, model: Any) -> Mapping[str, float]:
        """Judge a model in evaluation mode, without gradients; {} if there is nothing to judge by.

        The keys stand in metrics.jsonl. It must not draw from torch's global generator.
        """
        ...

    def score(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """Return what to compare models by: larger is better, () always takes the newest."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data: tensors, numbers and strings in dicts and lists."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to such a position."""
        ...


class BaseTask:
    """Defaults of a `Task`: no position, batches that are tensors or tuples and dicts of them."""

    metric = "validation_loss"
    maximize = False

    def split(self, batch: Any, parts: int) -> Sequence[Any]:
        """Cut every tensor of the batch along its first axis."""
        return split_batch(batch, parts)

    def weight(self, batch: Any) -> float:
        """Return the number of rows."""
        return float(_rows(batch))

    def evaluate(self, model: Any) -> Mapping[str, float]:
        """Return {}: nothing to judge by, the newest model is the best."""
        return {}

    def score(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """Return the figure called `metric`, turned so that larger is better."""
        if self.metric not in figures:
            return ()
        return (figures[self.metric] if self.maximize else -figures[self.metric],)

    def state_dict(self) -> dict[str, Any]:
        """Return {}."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cut every tensor of a batch along its first axis into at most so many parts.

    Args:
        batch: a tensor, or tuples (also named ones), lists, dicts and dataclasses of them; all with
            the same number of rows. Whatever is no tensor goes into each part as it is.
        parts: how many; fewer come back if there are fewer rows.

    Raises:
        ValueError: tensors of different numbers of rows, or none at all.
    """
    rows = _rows(batch)
    parts = max(1, min(parts, rows))
    if parts == 1:
        return [batch]
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [_slice(batch, a, b) for a, b in itertools.pairwise(bounds)]


def _slice(batch: Any, start: int, stop: int) -> Any:
    return _map(batch, lambda x: x[start:stop])


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple):
        values = [_map(x, function) for x in batch]
        make = getattr(type(batch), "_make", tuple)
        return make(values)
    if isinstance(batch, list):
        return [_map(x, function) for x in batch]
    if isinstance(batch, dict):
        return {key: _map(x, function) for key, x in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f.name for f in dataclasses.fields(batch)]
        return dataclasses.replace(
            batch, **{name: _map(getattr(batch, name), function) for name in fields}
        )
    return batch


def _rows(batch: Any) -> int:
    found: set[int] = set()
    _map(batch, lambda x: found.add(x.shape[0]))
    if len(found) != 1:
        raise ValueError(
            f"split_batch: tensors of {sorted(found) or 'no'} rows, expected one number of rows"
        )
    return found.pop()


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a batch with its tensors on a device."""
    return _map(batch, lambda x: x.to(device, non_blocking=True))
