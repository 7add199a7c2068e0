# SPDX-License-Identifier: MIT
"""One training step: eager, or captured in a CUDA graph for each length of batch.

Everything of a step is on the device: the rows of the batch are gathered from the data, and the
learning rate is read from a table by a counter. On a GPU the first steps of each bucket run eagerly
and the next one is captured; all are steps of the same training.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.listops.data import Part
from benchmarks.listops.recipe import Recipe
from lrnnx_nn import Classifier, param_groups

EAGER = 2
"""Eager steps of a bucket before its graph: kernels get compiled, libraries their memory."""
CAPACITY = 2**20
"""Steps that the table of rates has room for."""


class Schedule:
    """The learning rate over its peak at every step: a linear rise, then half a cosine to zero.

    The number of steps may be set late, and again: what is left of the cosine then takes as many
    steps as are left. Until it is first set the rate rises and stays.

    Args:
        warmup: steps of the rise.
        device: where the table of factors is.
    """

    def __init__(self, warmup: int, device: str) -> None:
        self.warmup = warmup
        self._phase = torch.zeros(CAPACITY, dtype=torch.float64)
        self._rise = self._ramp()
        self.factors = torch.zeros(CAPACITY, device=device)
        self.total: int | None = None
        self._write()

    def set_total(self, step: int, total: int) -> None:
        """Let the schedule end after ``total`` steps, ``step`` of them done.

        Raises:
            ValueError: total <= step, or more than there is room for.
        """
        if not step < total <= CAPACITY:
            raise ValueError(
                f"Schedule: {total} steps after {step}, expected {step} < total <= {CAPACITY}"
            )
        if self.total is None:
            self.warmup = max(step, min(self.warmup, total // 4))
            self._rise = self._ramp()
        start = min(max(step, self.warmup), total - 1)
        begin = float(self._phase[start])
        self._phase[start:total] = torch.linspace(begin, 1, total - start + 1)[:-1].double()
        self._phase[total:] = 1.0
        self.total = total
        self._write()

    def _ramp(self) -> Tensor:
        return (torch.arange(1, CAPACITY + 1) / max(self.warmup, 1)).clamp(max=1)

    def _write(self) -> None:
        self.factors.copy_(self._rise * 0.5 * (1 + torch.cos(math.pi * self._phase)))


class Step:
    """One optimizer step a call.

    Args:
        model: on the device of the data.
        part: the training part.
        limits: the lengths to which the buckets are padded.
        recipe: batch size, peak learning rates, decay, clip, precision.
        schedule: the factor of both at every step.
    """

    def __init__(
        self,
        model: Classifier,
        part: Part,
        limits: Tensor,
        recipe: Recipe,
        schedule: Schedule,
    ) -> None:
        self.model, self.part, self.recipe, self.schedule = model, part, recipe, schedule
        self.limits: list[int] = limits.tolist()
        self.device = part.tokens.device.type
        self.rows = torch.zeros(recipe.batch_size, dtype=torch.int64, device=self.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        """The sum of the losses since it was last set to zero."""
        groups = param_groups(model, recipe.lr, recipe.ssm_lr, recipe.weight_decay)
        self._peaks = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=self.device)
        graphs = self.device == "cuda"
        self.optimizer = torch.optim.AdamW(groups, fused=True, capturable=graphs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._eager = [EAGER if graphs else -1] * len(self.limits)
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self.stream = torch.cuda.Stream() if graphs else None

    @property
    def ready(self) -> bool:
        """Whether no bucket is left whose step must still be captured."""
        return self.stream is None or len(self._graphs) == len(self.limits)

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Return the context that all steps, and what reads their results, must run in."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def __call__(self, bucket: int, rows: Tensor) -> None:
        """Take a step on the rows (batch,) of the data, none longer than the bucket's bound."""
        self.rows.copy_(rows, non_blocking=True)
        if bucket in self._graphs:
            self._graphs[bucket].replay()
        elif self._eager[bucket]:
            self._eager[bucket] -= 1
            self._run(self.limits[bucket])
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                self._run(self.limits[bucket])
            self._graphs[bucket] = graph
            graph.replay()

    def _run(self, length: int) -> None:
        factor = self.schedule.factors.index_select(0, self.count).squeeze(0)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"].copy_(peak * factor)
        self.optimizer.zero_grad(set_to_none=True)
        tokens = self.part.tokens[:, :length].index_select(0, self.rows).to(torch.int64)
        lengths = self.part.lengths.index_select(0, self.rows)
        with autocast(self.device, self.recipe.precision):
            found = self.model(tokens, lengths=lengths)
        loss = F.cross_entropy(found.float(), self.part.values.index_select(0, self.rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.recipe.clip, error_if_nonfinite=False
        )
        self.optimizer.step()
        self.loss.add_(loss.detach())
        self.count.add_(1)


def autocast(device: str, precision: str) -> torch.autocast:
    """Return the context of a forward pass; a graph must not find casts kept outside of it."""
    return torch.autocast(
        device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
    )
