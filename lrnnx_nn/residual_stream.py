# SPDX-License-Identifier: MIT
"""The residual stream between blocks, whose last branch is added by the norm that reads the sum.

Inside a `Stack` a block hands on what it has and what it would add to it; the next block's first
norm makes both the sum and its norm, in one pass over memory on a GPU. Blocks called by themselves
return the sum.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_core.backends.transforms import hooked
from lrnnx_core.ops.add_norm import add_norm
from lrnnx_nn.norms import LayerNorm, RMSNorm, normalize

Method = Literal["forward", "prefill", "step"]


class Stream(NamedTuple):
    """The sum so far, and a branch (of the same shape) that is still to be added to it."""

    x: Tensor
    branch: Tensor | None = None

    def total(self) -> Tensor:
        """Return the sum, in x's dtype."""
        if self.branch is None:
            return self.x
        if torch.promote_types(self.x.dtype, self.branch.dtype) == self.x.dtype:
            return self.x + self.branch  # one pass, the conversion within it
        return self.x + self.branch.to(self.x.dtype)


def run(module: Any, method: Method, u: Tensor, *state: Any, **sequence: Any) -> tuple[Tensor, Any]:
    """Return the output of a mixer's method, and its new state, None for ``forward``."""
    if method == "forward":
        return module(u, **sequence), None
    return getattr(module, method)(u, *state, **sequence)


def run_on_stream(
    module: Any, method: Method, stream: Stream, *state: Any, **sequence: Any
) -> tuple[Stream, Any]:
    """Run a mixer; one that knows streams takes and returns the branch that is not added yet.

    Those have a method ``_on_stream`` of their own class. A module with hooks, or a subclass, is
    called like any other, with the sum.
    """
    if "_on_stream" in type(module).__dict__ and not hooked(module):
        return module._on_stream(method, stream, *state, **sequence)
    u, new = run(module, method, stream.total(), *state, **sequence)
    return Stream(u), new


def add_and_normalize(
    norm: nn.Module, stream: Stream, valid: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum x (..., H) and its norm, in ``dtype`` or what the norm gives.

    Args:
        norm: of `make_norm`, or any Module.
        stream: what it reads.
        valid: (..., L) bool, the samples that count in the statistics of a batch.
        dtype: of the norm's result.
    """
    if not _in_one_pass(norm, stream.x):
        x = stream.total()
        y = normalize(norm, x, valid)
        return x, y if dtype is None else y.to(dtype)
    dtype = stream.x.dtype if dtype is None else dtype
    layer, eps = isinstance(norm, LayerNorm), norm.eps
    if eps is None:
        eps = torch.finfo(torch.promote_types(stream.x.dtype, torch.float32)).eps
    bias = norm.bias if layer else None
    return add_norm(*stream, norm.weight, bias, eps, layer=layer, dtype=dtype)  # pyright: ignore[reportArgumentType]


def _in_one_pass(norm: nn.Module, x: Tensor) -> bool:
    if type(norm) not in (LayerNorm, RMSNorm) or not _on_gpu(x) or hooked(norm):
        return False
    return norm.normalized_shape == x.shape[-1:]


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
