# SPDX-License-Identifier: MIT
"""The residual sum and the norm that reads it, in one pass over memory on a GPU.

One forward and one backward leaf, as `lrnnx_core.ops._fused`; a pair of Functions of its own, since
what the gradient needs is the sum alone and neither of its terms. Where more than one derivative is
asked for, or forward mode, the formula runs in differentiable pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import cuda_add_norm, library, norm_formulas
from lrnnx_core.backends.reference import state_dtype
from lrnnx_core.backends.transforms import (
    allow_in_graph,
    differentiation_depth,
    dual_level_active,
    forward_mode_depth,
    full_precision,
    positional_only,
    transform_active,
)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    layer: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute s = x + branch and y = norm(s) weight + bias, the norm in at least float32.

    Args:
        x: (..., H), the residual stream.
        branch: (..., H), what is added to it in x's dtype; None adds nothing.
        weight: (H,).
        bias: (H,).
        eps: added to the mean square.
        layer: subtract the mean before (LayerNorm), or not (RMSNorm).
        dtype: that of y.

    Returns:
        s (..., H) in x's dtype, x itself without a branch; y (..., H).
    """
    with full_precision(x.device):
        total, y = _add_norm(x, branch, weight, bias, eps, layer, dtype)
    return (x if branch is None else total), y


def _add_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the sum, which is an empty tensor without a branch, and its norm."""
    if differentiation_depth() > 1 or forward_mode_depth() or dual_level_active():
        return norm_formulas.add_norm(x, branch, weight, bias, eps, layer, dtype)[:2]
    if not torch.is_grad_enabled():
        return _leaf(x, branch, weight, bias, eps, layer, dtype)[:2]
    total, y, _ = _AddNorm.apply(x, branch, weight, bias, eps, layer, dtype)
    return total, y


class _AddNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        layer: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _leaf(x, branch, weight, bias, eps, layer, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, branch, weight, bias, *ctx.choices, _ = inputs
        ctx.branch = None if branch is None else branch.dtype
        ctx.save_for_backward(x if branch is None else output[0], output[2], weight, bias)
        if not transform_active():  # no zeros for the gradients of what nobody uses
            ctx.set_materialize_grads(False)
            ctx.dtype = output[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, stats, weight, bias = ctx.saved_tensors
        grad_sum, grad_out, _ = grads
        if grad_out is None:
            grad_out = torch.zeros_like(total, dtype=ctx.dtype)
        kind = total.dtype if ctx.branch is None else ctx.branch
        dx, dbranch, dweight, dbias = _AddNormBackward.apply(
            None if ctx.branch is None else grad_sum, grad_out, total, stats, weight, bias,
            *ctx.choices, kind,
        )  # fmt: skip
        if ctx.branch is None:
            dbranch = None
        elif kind == total.dtype:
            dbranch = dx
        dweight, dbias = None if weight is None else dweight, None if bias is None else dbias
        return dx, dbranch, dweight, dbias, None, None, None


class _AddNormBackward(torch.autograd.Function):
    """A function of the sum; its statistics count as functions of that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_sum: Tensor | None,
        grad_out: Tensor,
        total: Tensor,
        stats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        layer: bool,
        branch: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _leaf_backward(grad_sum, grad_out, total, stats, weight, bias, layer, branch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_sum, grad_out, total, _, weight, bias, *ctx.choices = inputs
        ctx.summed = grad_sum is not None
        ctx.save_for_backward(grad_out, total, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, *inputs = ctx.saved_tensors
        eps, layer, branch = ctx.choices
        present = [i for i, t in enumerate(inputs) if t is not None]

        def forward(*tensors: Tensor) -> Tensor:
            arguments: list[Tensor | None] = [None, None, None]
            for i, t in zip(present, tensors, strict=True):
                arguments[i] = t
            total, weight, bias = arguments
            if total is None:
                raise RuntimeError("add_norm: no sum")
            inputs = (total, None, weight, bias, eps, layer, grad_out.dtype)
            return norm_formulas.add_norm(*inputs)[1]

        def gradient(grad_out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(forward, *tensors)[1](grad_out)

        along, along_branch, *rest = grads
        if branch != along.dtype:
            along = along + along_branch.to(along.dtype)
        pull = torch.func.vjp(gradient, grad_out, *(inputs[i] for i in present))[1]
        g_out, *found = pull(tuple((along, *rest)[i] for i in present))
        result: list[Tensor | None] = [None] * 9
        result[0], result[1] = along if ctx.summed else None, g_out
        for i, g in zip(present, found, strict=True):
            result[(2, 4, 5)[i]] = g
        return tuple(result)


def _fake(x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, layer, dtype = rest
    stats = x.new_empty((*x.shape[:-1], 1 + layer), dtype=state_dtype(x.dtype))
    total = x.new_empty(0 if branch is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), stats


def _fake_backward(
    grad_sum: Tensor | None, grad_out: Tensor, total: Tensor, stats: Tensor, weight: Tensor | None,
    bias: Tensor | None, layer: bool, branch: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    own = total.new_empty(0 if branch == total.dtype else total.shape, dtype=branch)
    parameters = (total.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return total.new_empty(total.shape), own, *parameters


_leaf = library.define(
    "add_norm(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, bool layer, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    default=norm_formulas.add_norm,
    fake=_fake,
)
_leaf_backward = library.define(
    "add_norm_backward(Tensor? grad_sum, Tensor grad_out, Tensor sum, Tensor stats, "
    "Tensor? weight, Tensor? bias, bool layer, ScalarType branch) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    default=norm_formulas.add_norm_backward,
    fake=_fake_backward,
)
for _function in (_AddNorm.forward, _AddNormBackward.forward):
    positional_only(_function)
allow_in_graph(_add_norm)
_CUDA = cuda_add_norm.implement()
