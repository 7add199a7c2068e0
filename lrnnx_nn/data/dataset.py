# SPDX-License-Identifier: MIT
"""What a data set is, the checks it passes before any work, and how it is split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrnnx_core.sequences import valid_mask


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """A right-padded batch with labels: x (n, L, channels), lengths (n,), y (n,) class numbers."""

    x: Tensor
    lengths: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, index: Tensor) -> Sequences:
        """Return the rows of an index (k,), cut to their longest."""
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(lengths) else 0
        return Sequences(self.x[index, :longest], lengths, self.y[index])

    def to(self, device: torch.device | str) -> Sequences:
        """Return the batch on another device."""
        return Sequences(self.x.to(device), self.lengths.to(device), self.y.to(device))


class Dataset(NamedTuple):
    """A classification problem with its training and test part."""

    name: str
    train: Sequences
    test: Sequences
    classes: tuple[str, ...]
    split: str
    """Where the test part comes from: ``official``, ``files``, ``keys`` or ``carved``."""

    @property
    def channels(self) -> int:
        """Channels of every sequence."""
        return self.train.x.shape[-1]


class Raw(NamedTuple):
    """One part of a set as it was read: x[i] (length, channels), y (n,) labels of any kind."""

    x: list[np.ndarray]
    y: np.ndarray


def check_raw(where: str, raw: Raw) -> None:
    """Check one part.

    Raises:
        ValueError: no sequences, an empty one, another number of labels or channels, complex or
            text values, NaN or infinity; the message says which sequence.
    """
    if not len(raw.x):
        raise ValueError(f"{where}: no sequences")
    if raw.y.ndim != 1 or len(raw.y) != len(raw.x):
        raise ValueError(
            f"{where}: labels {raw.y.shape} for {len(raw.x)} sequences, expected ({len(raw.x)},)"
        )
    if raw.y.dtype.kind == "f" and not np.isfinite(raw.y).all():
        raise ValueError(f"{where}: a label is NaN or infinite")
    channels = raw.x[0].shape[-1]
    for i, x in enumerate(raw.x):
        if x.dtype.kind not in "iufb":
            raise ValueError(f"{where}: sequence {i} has dtype {x.dtype}, expected real numbers")
        if x.ndim != 2 or x.shape[-1] != channels:
            raise ValueError(
                f"{where}: sequence {i} is {x.shape}, expected (length, {channels}) as the first"
            )
        if x.shape[0] < 1 or channels < 1:
            raise ValueError(f"{where}: sequence {i} is {x.shape}, expected at least one sample")
        if not np.isfinite(x).all():
            t, c = (int(k) for k in np.argwhere(~np.isfinite(x))[0])
            raise ValueError(
                f"{where}: sequence {i} holds {x[t, c]} at time {t}, channel {c}; "
                "expected finite values (fill missing ones first)"
            )


def build(name: str, train: Raw, test: Raw, split: str) -> Dataset:
    """Check both parts of a set and make tensors of them.

    Raises:
        ValueError: see `check_raw`; fewer than two classes, parts of different channels, a label
            that the training part lacks.
    """
    check_raw(f"{name}, training part", train)
    check_raw(f"{name}, test part", test)
    widths = train.x[0].shape[-1], test.x[0].shape[-1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"{name}: {widths[0]} channels in the training part and {widths[1]} in the test part"
        )
    check_classes(name, train.y)
    labels = np.unique(train.y)
    strange = np.setdiff1d(np.unique(test.y), labels)
    if len(strange):
        raise ValueError(f"{name}: test label {strange[0]!s} does not occur in the training part")
    return Dataset(
        name, _tensors(train, labels), _tensors(test, labels), tuple(map(str, labels)), split
    )


def check_classes(name: str, y: np.ndarray) -> None:
    """Raise a ValueError unless there are two classes or more."""
    labels = np.unique(y)
    if len(labels) < 2:
        only = f"only one class, {labels[0]!s}" if len(labels) else "no labels"
        raise ValueError(f"{name}: {only}; expected at least two classes")


def _tensors(raw: Raw, labels: np.ndarray) -> Sequences:
    lengths = [len(x) for x in raw.x]
    padded = np.zeros((len(raw.x), max(lengths), raw.x[0].shape[-1]), dtype=np.float32)
    for row, x in zip(padded, raw.x, strict=True):
        row[: len(x)] = x
    y = np.searchsorted(labels, raw.y).astype(np.int64)
    return Sequences(torch.from_numpy(padded), torch.tensor(lengths), torch.from_numpy(y))


def stratified_split(
    y: Tensor | Sequence[int], fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Split row numbers in two, each class by the same fraction.

    Args:
        y: (n,) class numbers.
        fraction: of each class that goes into the second part, rounded, at least one row and never
            all; a class of one row stays in the first part.
        seed: of the draw; the same seed gives the same split everywhere.

    Returns:
        Two sorted index tensors that together hold every row once.

    Raises:
        ValueError: a fraction outside 0 ... 1, or nothing to put into the second part.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"stratified_split: fraction = {fraction}, expected 0 < fraction < 1")
    labels = np.asarray(y)
    random = np.random.default_rng(seed)
    second: list[int] = []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            second.extend(rows[:count].tolist())
    if not second:
        raise ValueError("stratified_split: every class has a single row, nothing can be set aside")
    first = np.setdiff1d(np.arange(len(labels)), second)
    return torch.from_numpy(first), torch.tensor(sorted(second))


def statistics(part: Sequences) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (channels,) over the valid samples; a constant channel's is one."""
    samples = part.x[valid_mask(part.lengths, part.x.shape[1])].double()
    mean, std = samples.mean(0), samples.std(0, correction=0)
    std = torch.where(std > 1e-12 * (1 + mean.abs()), std, torch.ones_like(std))
    return mean.float(), std.float()
