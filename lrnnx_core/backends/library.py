# SPDX-License-Identifier: MIT
"""Define leaf operators and the rules that make PyTorch carry them through its transforms."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "lrnnx_core"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_DEFAULTS: dict[str, Callable[..., Any]] = {}
_KERNELS: dict[tuple[str, str], list[Callable[..., Any]]] = {}  # (name, device), newest last
_REGISTERED: list[torch.library.Library] = []
_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", float: "float", int: "int",
    str: "str",
}  # fmt: skip


def parameters(record: type[NamedTuple]) -> str:
    """Return the parameters of a leaf operator as `define` wants them.

    A leaf of many arguments has a record of them beside its default implementation, which is the
    one list of their names, types and order: every implementation begins with
    ``p = Arguments(*arguments)``.
    """
    types, defaults = get_type_hints(record), record._field_defaults
    return ", ".join(
        f"{_TYPES[types[name]]} {name}" + (f"={defaults[name]}" if name in defaults else "")
        for name in record._fields
    )


def plain_on_cpu() -> bool:
    """Return whether the environment asks for plain PyTorch on CPU tensors.

    Raises:
        ValueError: the variable has another value.
    """
    choice = os.environ.get("LRNNX_CPU_BACKEND")
    if choice and choice != "torch":
        raise ValueError(
            f"LRNNX_CPU_BACKEND = {choice!r} in the environment, expected 'torch' (plain PyTorch) "
            "or nothing (compiled kernels, where numba is installed)"
        )
    return choice == "torch"


def define(
    schema: str, *, default: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define a leaf operator and return it.

    Args:
        schema: in PyTorch's schema language, for instance ``"scale(Tensor x, float s) -> Tensor"``.
            Every tensor's leading dimensions are batch dimensions, equal for all of them.
        default: the pure PyTorch implementation, used on every device without one of its own.
        fake: returns outputs of the right shape and dtype without computing them.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch.no_grad()(default), "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    leaf = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(qualified, _fold_batch(leaf), lib=_LIBRARY)
    _DEFAULTS[name] = default
    return leaf


class Implementation:
    """Keeps a kernel in force while it lives."""

    def __init__(self, kernels: list[Callable[..., Any]], kernel: Callable[..., Any]) -> None:
        kernels.append(kernel)
        weakref.finalize(self, kernels.remove, kernel).atexit = False


def implement(name: str, device: str, kernel: Callable[..., Any]) -> Implementation:
    """Let ``kernel`` run leaf operator ``name`` on ``device`` ("cpu" or "cuda").

    The kernel is in force while the returned handle lives; of several the newest is. On the CPU the
    environment variable ``LRNNX_CPU_BACKEND=torch``, read at each call, goes back to pure PyTorch.

    Raises:
        ValueError: no operator of that name, or another device.
    """
    if name not in _DEFAULTS:
        raise ValueError(f"implement: no operator {name!r}; defined are {sorted(_DEFAULTS)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"implement: device {device!r}, expected 'cpu' or 'cuda'")
    if (name, device) not in _KERNELS:
        _register(name, device)
    return Implementation(_KERNELS[name, device], kernel)


def default(name: str) -> Callable[..., Any]:
    """Return the pure PyTorch implementation of a leaf operator."""
    return _DEFAULTS[name]


def kernel(name: str, device: str) -> Callable[..., Any] | None:
    """Return the newest kernel of a leaf operator on a device, None without one."""
    kernels = _KERNELS.get((name, device))
    return kernels[-1] if kernels else None


def _register(name: str, device: str) -> None:
    plain, kernels = _DEFAULTS[name], _KERNELS.setdefault((name, device), [])

    def call(*arguments: Any) -> Any:
        if not kernels or (device == "cpu" and plain_on_cpu()):
            return plain(*arguments)
        return kernels[-1](*arguments)

    handle = torch.library.Library(NAMESPACE, "IMPL")
    handle.impl(name, torch.no_grad()(call), device.upper())
    _REGISTERED.append(handle)


def _fold_batch(leaf: Callable[..., Any]) -> Callable[..., Any]:
    """Return the vmap rule of a leaf: the mapped dimension becomes one more batch dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def front(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            if dim is None:
                return value.expand(info.batch_size, *value.shape)
            return value.movedim(dim, 0)

        outputs = leaf(*(front(v, d) for v, d in zip(arguments, in_dims, strict=True)))
        if isinstance(outputs, Tensor):
            return outputs, 0
        # An output that stands for an absent gradient has no batch axis: shape (0,).
        return outputs, tuple(None if o.shape == (0,) else 0 for o in outputs)

    return rule
