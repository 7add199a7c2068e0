# SPDX-License-Identifier: MIT
# pyright: basic
"""Vectors of neighbouring numbers as values in a kernel.

A scan whose decays are constant in time is bound by arithmetic only where states and coefficients
stay in registers while time passes, with channels side by side. A loop over channels cannot say
that: LLVM vectorises the innermost loop, and that one is over time. So these kernels name their
registers: ``load(address, one)`` is a vector of `count` numbers of the type of ``one``, ``+ - *``
act on all of them at once, ``store(address, x)`` writes them. Addresses are in bytes and need no
alignment.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, models, register_model  # pyright: ignore[reportAttributeAccessIssue]

# A vector is a register: where AVX-512 is there are 32 of 64 bytes, elsewhere 16 of 32 bytes or, on
# ARM, 32 of 16 (two of them to a vector then).
REGISTERS = 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16
BYTES = 2 * REGISTERS
_FLAGS = ("contract",)


class Lanes(types.Type):
    """The type of a vector of ``BYTES``."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.count = 8 * BYTES // base.bitwidth
        super().__init__(name=f"lanes({base} x {self.count})")


KINDS = (Lanes(types.float32), Lanes(types.float64))


def _instruction(function: Callable[..., Any]) -> Any:
    """Make a function of kernels that is written in LLVM's own instructions."""
    return intrinsic(function)


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        base = manager.lookup(kind.base).get_value_type()
        super().__init__(manager, kind, ir.VectorType(base, kind.count))


def count(itemsize: int) -> int:
    """Return how many numbers of this size in bytes a vector holds."""
    return BYTES // itemsize


@_instruction
def load(typing_context, address, one):
    """Return the vector at an address."""
    kind = Lanes(one)

    def generate(context, builder, signature, arguments):
        vector = context.get_value_type(kind)
        pointer = builder.inttoptr(arguments[0], vector.as_pointer())
        return builder.load(pointer, align=one.bitwidth // 8)

    return kind(address, one), generate


@_instruction
def store(typing_context, address, x):
    """Write a vector to an address."""

    def generate(context, builder, signature, arguments):
        vector = context.get_value_type(x)
        pointer = builder.inttoptr(arguments[0], vector.as_pointer())
        builder.store(arguments[1], pointer, align=x.base.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(address, x), generate


@_instruction
def nothing(typing_context, one):
    """Return a vector of zeros."""
    kind = Lanes(one)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(kind), None)

    return kind(one), generate


def _operate(symbol: Any, instruction: str) -> None:
    @infer_global(symbol)  # pyright: ignore[reportOptionalCall]
    class _Typing(ConcreteTemplate):
        cases: ClassVar[list[Any]] = [signature(kind, kind, kind) for kind in KINDS]

    for kind in KINDS:

        @lower_builtin(symbol, kind, kind)
        def _lower(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments, flags=_FLAGS)


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
):
    _operate(_symbol, _name)
