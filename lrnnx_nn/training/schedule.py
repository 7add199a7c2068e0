# SPDX-License-Identifier: MIT
"""Learning rates over time: a warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math

import torch


def schedule_factor(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate at a step, counted from 0.

    With w = warmup * steps it is (step + 1) / (w + 1) below w, and
    (1 + cos(pi (step - w) / (steps - w))) / 2 from there on: 0 after the last step.
    """
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(steps - warm, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Schedule:
    """Sets every group's rate of an optimizer to its peak times `schedule_factor`."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> None:
        self.optimizer, self.steps, self.warmup = optimizer, steps, warmup
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.factor = 1.0
        self.set(0)

    def set(self, step: int) -> None:
        """Set the rates of that step, counted from 0."""
        self.factor = schedule_factor(step, self.steps, self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor
