# SPDX-License-Identifier: MIT
"""Calling an ``nn.Linear``, or whatever stands in its place, on many rows and on few."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from lrnnx_core.backends.cuda_linear_step import MOST_ROWS
from lrnnx_core.backends.transforms import autocasting, transform_active
from lrnnx_core.ops.steps import linear_step

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = tuple("_global" + name for name in _HOOKS)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)``; a plain ``nn.Linear`` on a few rows on a GPU runs a kernel of its own.

    A module that is wrapped, quantised, parametrized or hooked is called.
    """
    if not _few(x) or type(module) is not nn.Linear or not _bare(module):
        return module(x)
    return apply_weight(x, module.weight, module.bias)


def apply_weight(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, by the kernel for a few rows where `apply_linear` takes it."""
    if (
        not _few(x)
        or weight.dtype is not x.dtype
        or not all(type(t) in (Tensor, nn.Parameter, type(None)) for t in (x, weight, bias))
        or autocasting(x.device)
    ):
        return nn.functional.linear(x, weight, bias)
    return linear_step(x, weight, bias)


def _few(x: Tensor) -> bool:
    return x.is_cuda and 0 < x.numel() <= MOST_ROWS * x.shape[-1] and not transform_active()


def _bare(module: nn.Module) -> bool:
    """Return whether calling a module is calling its forward, that of its class."""
    own = module.__dict__
    return "forward" not in own and not (
        any(own.get(name) for name in _HOOKS) or any(getattr(hooks, name, None) for name in _GLOBAL)
    )
