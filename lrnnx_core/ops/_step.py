# SPDX-License-Identifier: MIT
"""When one step of a recurrence runs as a compiled leaf operator.

A step takes less time than Python needs to call a few dozen operators. Where nobody differentiates
or transforms, each model's step is one kernel; everywhere else it is the same formulas in plain
PyTorch (`lrnnx_core.ops._step_formulas`), right to any order under any transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter  # noqa: TID251  (a type to compare with)

from lrnnx_core.backends import cpu, library
from lrnnx_core.backends.transforms import dispatch_observed, dual_level_active, transform_active

_ORDINARY = frozenset({Tensor, Parameter, type(None), float, int, bool, str})


def step_operator(
    schema: str,
    module: str | None,
    default: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return a step whose first argument is a tensor.

    On a device with compiled kernels, where nobody differentiates or transforms, it is the kernel:
    by way of the leaf operator if anyone looks on (a mode, a profiler, a subclass of Tensor),
    called at once otherwise, since a call through the dispatcher takes as long as a small kernel.
    Elsewhere it is ``default``.

    Args:
        schema: of the leaf, see `library.define`; the name is that of the kernel too.
        module: of ``lrnnx_core.backends.cpu``, where the CPU's kernel stands, if there is one.
        default: the step in differentiable pieces.
        fake: see `library.define`.
        cuda: the kernel for CUDA tensors, if there is one; what it cannot take it gives to
            ``default`` itself.
    """
    name = schema.split("(", 1)[0]
    leaf = library.define(schema, default=default, fake=fake)
    on_cpu = None
    if module is not None and (handles := cpu.implement(module, name)) is not None:
        _HANDLES.extend(handles)
        on_cpu = cpu.deferred(module, name)
    if cuda is not None:
        _HANDLES.append(library.implement(name, "cuda", cuda))
    if on_cpu is None and cuda is None:
        return default

    def step(*arguments: Any) -> Any:
        first = arguments[0]
        kernel = on_cpu if first.is_cpu else cuda if first.is_cuda else None
        if kernel is None or transform_active() or dual_level_active():
            return default(*arguments)
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in arguments
        ):
            return default(*arguments)
        if kernel is on_cpu and library.plain_on_cpu():
            return default(*arguments)
        if dispatch_observed() or not _ORDINARY.issuperset(map(type, arguments)):
            return leaf(*arguments)
        return kernel(*arguments)

    return step


_HANDLES: list[Any] = []
