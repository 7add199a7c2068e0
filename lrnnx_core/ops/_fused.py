# SPDX-License-Identifier: MIT
"""Two autograd Functions over a forward and a backward leaf, for operators with fused gradients.

The backward leaf returns all first derivatives at once and is no further differentiable itself:
where more is asked for (two levels of torch.func, or any forward mode) the operator runs a
composite of differentiable pieces, and a second derivative of an eager graph goes through the
derivative of that composite. `lrnnx_core.ops.diagonal_scan` is the shortest example of use:

    _apply = fused(_leaf, _leaf_backward, _composite, signature)

    def _my_op(*arguments): return _apply(*arguments)     # a module-level function of its own,
    allow_in_graph(_my_op)                                # as torch.compile wants one node
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import (
    differentiation_depth,
    dual_level_active,
    forward_mode_depth,
    positional_only,
    transform_active,
)


class Signature(NamedTuple):
    """How the arguments and results of the two leaves are ordered.

    The forward leaf is ``(*tensors, *choices, *passing) -> (*outputs, *kept)``, the backward leaf
    ``(*remembered, *grads of outputs, *tensors, *choices) -> gradients of the first tensors``.
    """

    tensors: int
    """Tensor arguments, any of them None; those that have a gradient come first."""
    differentiable: int
    """How many of them have a gradient: as many as the backward leaf returns."""
    choices: int
    """Arguments after the tensors that both leaves and the composite get."""
    outputs: int
    """Results that the composite has too."""
    remembered: tuple[int, ...]
    """Positions, among all results of the forward leaf, of what the backward leaf gets."""
    passing: int = 0
    """Last arguments of the forward leaf alone (such as whether to keep anything)."""


def fused(
    leaf: Callable[..., Any],
    leaf_backward: Callable[..., Any],
    composite: Callable[..., tuple[Tensor, ...]],
    signature: Signature,
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the operator: the arguments of the forward leaf -> ``outputs`` tensors.

    Args:
        leaf: the forward leaf.
        leaf_backward: the backward leaf; its results in the place of absent tensors are ignored.
        composite: (*tensors, *choices) -> outputs, of differentiable pieces.
        signature: how arguments and results are ordered.
    """
    n, s = signature.tensors, signature
    after = len(s.remembered) + s.outputs
    """Where the tensors begin among the arguments of the backward leaf."""

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return leaf(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.choices = inputs[n : n + s.choices]
            ctx.save_for_backward(*(output[i] for i in s.remembered), *inputs[:n])
            if not transform_active():  # no zeros for the gradients of what is kept
                ctx.set_materialize_grads(False)
                ctx.results = [(o.shape, o.dtype) for o in output[: s.outputs]]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            remembered, inputs = saved[: len(s.remembered)], saved[len(s.remembered) :]
            cotangents = list(grads[: s.outputs])
            for i, g in enumerate(grads[: s.outputs]):
                if g is None:
                    shape, dtype = ctx.results[i]
                    cotangents[i] = saved[0].new_zeros(shape, dtype=dtype)
            results = Backward.apply(*remembered, *cotangents, *inputs, *ctx.choices)
            given = zip(results, inputs, strict=False)
            gradients = [g if t is not None else None for g, t in given]
            none = n - s.differentiable + s.choices + s.passing
            return (*gradients, *(None,) * none)

    class Backward(torch.autograd.Function):
        """What is remembered counts as a function of the inputs here."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return leaf_backward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.choices = inputs[after + n :]
            ctx.save_for_backward(*inputs[len(s.remembered) : after + n])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            cotangents, inputs = saved[: s.outputs], saved[s.outputs :]
            present = [i for i, t in enumerate(inputs[: s.differentiable]) if t is not None]

            def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
                arguments = list(inputs)
                for i, t in zip(present, tensors, strict=True):
                    arguments[i] = t
                return composite(*arguments, *ctx.choices)

            def gradient(*values: Tensor) -> tuple[Tensor, ...]:
                pull = torch.func.vjp(forward, *values[s.outputs :])[1]
                return pull(values[: s.outputs])

            pull = torch.func.vjp(gradient, *cotangents, *(inputs[i] for i in present))[1]
            found = pull(tuple(grads[i] for i in present))
            result: list[Tensor | None] = [None] * (after + n + len(ctx.choices))
            result[len(s.remembered) : after] = found[: s.outputs]
            for i, g in zip(present, found[s.outputs :], strict=True):
                result[after + i] = g
            return tuple(result)

    for function in (Forward.forward, Backward.forward):
        positional_only(function)

    def apply(*arguments: Any) -> tuple[Tensor, ...]:
        if differentiation_depth() > 1 or forward_mode_depth() or dual_level_active():
            return composite(*arguments[: n + s.choices])
        if not (torch.is_grad_enabled() or transform_active()):
            return leaf(*arguments)[: s.outputs]  # a Function takes as long as a short kernel
        return Forward.apply(*arguments)[: s.outputs]

    return apply
