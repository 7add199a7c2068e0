# SPDX-License-Identifier: MIT
"""The parts of the data, and epochs of batches that hold sequences of like lengths."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.listops.grammar import Task, sequences
from benchmarks.listops.recipe import Recipe

SHARD = 500  # sequences of one seed, so that the data do not depend on the number of processes
SEEDS = {"train": 0, "validation": 10**6, "test": 2 * 10**6}


class Part(NamedTuple):
    """Sequences of a part: tokens (n, longest) uint8, lengths (n,) and values (n,) int64."""

    tokens: Tensor
    lengths: Tensor
    values: Tensor

    def to(self, device: str) -> Part:
        """Return the part on another device."""
        return Part(*(t.to(device) for t in self))


def _shard(arguments: tuple[int, int, Task]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return sequences(*arguments)


def data(part: str, count: int, task: Task, jobs: int) -> Part:
    """Draw a part; its sequences are ordered by nothing."""
    plan = [
        (min(SHARD, count - start), SEEDS[part] + start // SHARD, task)
        for start in range(0, count, SHARD)
    ]
    if jobs == 1:
        found = [_shard(p) for p in plan]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            found = list(pool.map(_shard, plan))
    return Part(*(torch.from_numpy(np.concatenate(column)) for column in zip(*found, strict=True)))


def parts_of(recipe: Recipe, task: Task, jobs: int, file: Path | None) -> dict[str, Part]:
    """Draw all parts, or read them from a file that an earlier run has kept.

    Raises:
        ValueError: the file holds other sizes.
    """
    counts = {p: recipe.sequences if p == "train" else recipe.held_out for p in SEEDS}
    about = np.array([*counts.values(), *task])
    if file is not None and file.is_file():
        with np.load(file) as kept:
            if not np.array_equal(kept["about"], about):
                raise ValueError(f"listops: {file} holds other sizes, {kept['about'].tolist()}")
            return {
                p: Part(*(torch.from_numpy(kept[f"{p}_{f}"]) for f in Part._fields)) for p in SEEDS
            }
    parts = {p: data(p, count, task, jobs) for p, count in counts.items()}
    if file is not None:
        arrays = {f"{p}_{f}": t.numpy() for p in SEEDS for f, t in parts[p]._asdict().items()}
        np.savez(file, about=about, **arrays)
    return parts


def bounds(lengths: Tensor, buckets: int) -> Tensor:
    """Return the increasing lengths, at most so many, to which batches are padded.

    Each bucket holds about as many sequences as the others; the last bound is the greatest length.
    """
    rank = torch.arange(1, buckets + 1) * len(lengths) // buckets - 1
    return lengths.sort().values[rank.clamp(min=0)].unique()


class Epoch(NamedTuple):
    """Batches in the order of their steps: rows (n, batch) of the data, bucket (n,) of each."""

    rows: Tensor
    bucket: list[int]


def epoch(lengths: Tensor, limits: Tensor, batch_size: int, draw: torch.Generator) -> Epoch:
    """Return batches that hold every sequence once, none longer than its bucket's bound.

    What is left of a bucket after its last whole batch goes into the next longer one.
    """
    order = torch.randperm(len(lengths), generator=draw)
    bucket = torch.searchsorted(limits, lengths[order])
    rows: list[Tensor] = []
    which: list[int] = []
    left = order[:0]
    for b in range(len(limits)):
        held = torch.cat([left, order[bucket == b]])
        whole = len(held) // batch_size
        rows.append(held[: whole * batch_size].view(whole, batch_size))
        which += [b] * whole
        left = held[whole * batch_size :]
    if len(left):
        raise ValueError(f"listops: {len(lengths)} sequences are not batches of {batch_size}")
    mixed = torch.randperm(len(which), generator=draw)
    return Epoch(torch.cat(rows)[mixed], [which[i] for i in mixed.tolist()])
