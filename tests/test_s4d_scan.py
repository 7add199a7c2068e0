# SPDX-License-Identifier: MIT
"""The operator `s4d_scan` against a loop over single steps, and what its arguments may be.

Derivatives under every transform are the business of `test_transform_table.py`, which compiled
kernel is right to the last digit that of `test_cpu_s4d_scan.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_both import both_backends
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrnnx_core.backends import blocked_s4d
from lrnnx_core.ops import s4d_scan

F32, F64 = torch.float32, torch.float64
OPTIONS = ((), ("lengths",), ("D", "reset"), ("D", "lengths", "reset"))
pytestmark = pytest.mark.usefixtures(both_backends.__name__)


def arguments(
    *shape: int,
    states: int = 4,
    optional: tuple[str, ...] = ("lengths", "reset"),
    dtype: torch.dtype = F64,
    complex_: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw arguments for u of ``shape``, (..., L, H), on the default device; |a| < 1."""
    generator = torch.Generator().manual_seed(seed)
    *batch, length, width = shape

    def draw(*size: int, kind: torch.dtype = F64) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=kind, device="cpu")

    kind = torch.complex128 if complex_ else F64
    direction = draw(width, states, kind=kind)
    a = direction / direction.abs() * torch.rand(width, states, generator=generator, dtype=F64)
    found = {"u": draw(*shape), "a": a, "v": draw(width, states, kind=kind)}
    state = torch.promote_types(dtype, F32)
    complex_state = torch.complex128 if state == F64 else torch.complex64
    dtypes = {"u": dtype, **dict.fromkeys("av", complex_state if complex_ else state)}
    found = {n: t.to(dtypes[n]) for n, t in found.items()}
    if "D" in optional:
        found["D"] = draw(width).to(state)
    if "lengths" in optional:
        found["lengths"] = torch.randint(0, length + 1, tuple(batch), generator=generator)
    if "reset" in optional:
        found["reset"] = draw(*batch, length) > 1
    return {n: t.to(torch.get_default_device()) for n, t in found.items()}


def loop(
    u: Tensor,
    a: Tensor,
    v: Tensor,
    D: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute u (L, H) step by step."""
    s, ys = torch.zeros_like(a), []
    stop = u.shape[0] if lengths is None else int(lengths)
    for t in range(u.shape[0]):
        if t < stop:
            if reset is not None and bool(reset[t]):
                s = torch.zeros_like(s)
            s = a * s + u[t].unsqueeze(-1)
            ys.append((v * s).sum(-1) + (0 if D is None else D * u[t]))
        else:
            ys.append(torch.zeros_like(a[:, 0]))
    y = torch.stack(ys) if ys else a.new_zeros(u.shape)
    return y.real if y.is_complex() else y, s


def row_of(named: dict[str, Any], row: int) -> dict[str, Any]:
    return {n: t if n in "avD" else t[row] for n, t in named.items()}


@pytest.mark.parametrize("optional", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("complex_", [True, False])
@pytest.mark.parametrize("length", [1, 63, 130])
def test_every_backend_is_the_loop(length: int, complex_: bool, optional: tuple[str, ...]) -> None:
    named = arguments(3, length, 5, optional=optional, complex_=complex_)
    for backend in ("auto", "reference"):
        y, last = s4d_scan(**named, backend=backend)
        for row in range(3):
            want, end = loop(**row_of(named, row))
            torch.testing.assert_close(y[row], want, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(last[row], end, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("optional", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("complex_", [True, False])
@pytest.mark.parametrize(("length", "width", "states"), [(7, 3, 1), (150, 17, 5), (200, 8, 33)])
def test_the_fused_gradients_are_those_of_the_loop(
    length: int, width: int, states: int, complex_: bool, optional: tuple[str, ...]
) -> None:
    named = arguments(2, length, width, states=states, optional=optional, complex_=complex_)
    inputs = [named[n].requires_grad_() for n in "uavD" if n in named]
    found = []
    for backend in ("auto", "reference"):
        y, last = s4d_scan(**named, backend=backend)
        parts = torch.view_as_real(last) if complex_ else last
        found.append(torch.autograd.grad(y.sin().sum() + parts.cos().sum(), inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_everything_at_once() -> None:
    for complex_ in (True, False):
        named = arguments(2, 5, 2, states=2, complex_=complex_, optional=OPTIONS[-1])
        inputs = tuple(named.pop(n).requires_grad_() for n in "uavD")

        def run(u: Tensor, a: Tensor, v: Tensor, D: Tensor, named: Any = named) -> Any:
            return s4d_scan(u, a, v, D, **named)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_decays_of_zero_one_and_beyond_are_exact() -> None:
    """Values and gradients where a logarithm or a quotient would fail."""
    named = arguments(2, 140, 6, states=1, optional=("reset",), complex_=False)
    named["a"] = torch.tensor([[0.0], [1.0], [-1.0], [-0.5], [1.01], [1e-30]], dtype=F64)
    u, a, v = (named[n].requires_grad_() for n in "uav")
    for reset in (None, named["reset"]):
        found = []
        for backend in ("auto", "reference"):
            y, last = s4d_scan(u, a, v, reset=reset, backend=backend)
            found.append((y, last, *torch.autograd.grad(y.sum() + last.sum(), (u, a, v))))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
@pytest.mark.parametrize("complex_", [True, False])
def test_dtypes_and_batch_axes(complex_: bool, dtype: torch.dtype) -> None:
    named = arguments(2, 3, 90, 4, dtype=dtype, complex_=complex_)
    named["lengths"] = named["lengths"][0, :1]
    named["reset"] = named["reset"][0, 0]
    y, last = s4d_scan(**named)
    assert (y.shape, y.dtype) == ((2, 3, 90, 4), dtype)
    assert (last.shape, last.dtype) == ((2, 3, 4, 4), named["a"].dtype)
    kinds = {"u": F64, **dict.fromkeys("av", torch.complex128 if complex_ else F64)}
    wide = {n: t.to(kinds.get(n, t.dtype)) for n, t in named.items()}
    want, end = s4d_scan(**wide, backend="reference")
    assert (y.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
    assert (last - end).norm() <= 1e-6 * end.norm()


def test_dtypes_may_differ() -> None:
    named = arguments(9, 3, dtype=F32, optional=())
    wide = named["a"].to(torch.complex128)
    y, last = s4d_scan(**(named | {"a": wide}))
    assert (y.dtype, last.dtype) == (F32, torch.complex128)
    y, last = s4d_scan(**(named | {"u": named["u"].double()}))
    assert (y.dtype, last.dtype) == (F64, torch.complex128)
    y, last = s4d_scan(**(named | {"v": named["v"].real}))
    want, _ = s4d_scan(**(named | {"v": named["v"].real.to(torch.complex64)}))
    assert torch.equal(y, want)
    y, last = s4d_scan(**(named | {"a": named["a"].real}))
    assert last.dtype == F32
    want, _ = s4d_scan(**(named | {"a": named["a"].real, "v": named["v"].real}))
    assert torch.equal(y, want)


def test_lengths_beyond_the_sequence_are_cut() -> None:
    named = arguments(2, 9, 3, optional=())
    whole = s4d_scan(**named)
    for got, want in zip(s4d_scan(**named, lengths=torch.tensor([9, 12])), whole, strict=True):
        torch.testing.assert_close(got, want)
    y, last = s4d_scan(**named, lengths=torch.tensor([0, -3], dtype=torch.int32))
    assert not y.any()
    assert not last.any()


def test_what_stands_beyond_the_lengths_reaches_nothing() -> None:
    named = arguments(2, 150, 3, optional=("reset",))
    named["lengths"] = torch.tensor([70, 0])
    inputs = [named[n].requires_grad_() for n in "uavD" if n in named]
    results = []
    for beyond in (0.0, float("nan")):
        u = named["u"].clone()
        u[0, 70:], u[1] = beyond, beyond
        y, last = s4d_scan(**(named | {"u": u}))
        results.append((y, last, *torch.autograd.grad(y.sum() + last.real.sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert not results[0][2][0, 70:].any()


def within(named: dict[str, Any]) -> Tensor:
    """Return u with zeros from the lengths on."""
    if "lengths" not in named:
        return named["u"]
    beyond = torch.arange(named["u"].shape[-2]) >= named["lengths"].unsqueeze(-1)
    return named["u"].masked_fill(beyond.unsqueeze(-1), 0)


@pytest.mark.parametrize("optional", OPTIONS, ids=" ".join)
def test_no_steps_no_channels_no_states_no_rows(optional: tuple[str, ...]) -> None:
    for shape, states in (((2, 0, 3), 2), ((2, 3, 0), 2), ((2, 3, 4), 0), ((0, 3, 4), 2)):
        named = arguments(*shape, states=states, optional=optional)
        D = named.pop("D", torch.ones(shape[-1], dtype=F64))
        assert torch.equal(s4d_scan(**named, D=D)[0].nonzero(), within(named).nonzero())
        inputs = [named[n].requires_grad_() for n in "uavD" if n in named]
        y, last = s4d_scan(**named)
        assert y.shape == shape
        assert not y.any()
        assert last.shape == (shape[0], shape[2], states)
        assert not last.any()
        loss = y.sum() + last.real.sum()
        for g, x in zip(torch.autograd.grad(loss, inputs), inputs, strict=True):
            assert g.shape == x.shape
            assert not g.any()


def test_autocast_changes_nothing() -> None:
    named = arguments(2, 90, 3, dtype=F32)
    u = named["u"].requires_grad_()
    want = s4d_scan(**named)
    first = torch.autograd.grad(want[0].sum(), u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = s4d_scan(**named)
        second = torch.autograd.grad(got[0].sum(), u)
    for x, y in zip((*got, *second), (*want, *first), strict=True):
        assert torch.equal(x, y)


class Calls(TorchDispatchMode):
    """Keeps the names of operators, and the size of the largest tensor that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize("optional", OPTIONS, ids=" ".join)
def test_no_tensor_holds_all_states(optional: tuple[str, ...]) -> None:
    """One leaf forward and one backward, and nothing in them grows with L beyond an activation."""
    length, width, states = 4096, 4, 32
    named = arguments(1, length, width, states=states, optional=optional, dtype=F32)
    with Calls() as calls:
        s4d_scan(**(named | {"u": named["u"].requires_grad_()}))[0].sum().backward()
    assert calls.names.count("lrnnx_core::s4d_scan") == 1
    assert calls.names.count("lrnnx_core::s4d_scan_backward") == 1
    p = {n: t.detach() for n, t in named.items()}
    ordered = [p.get(n) for n in ("u", "a", "v", "D", "lengths", "reset")]
    with Calls() as inside:
        y, last, kept = blocked_s4d.s4d_scan(*ordered, True)
        blocked_s4d.s4d_scan_backward(kept, y, last, *ordered)
    for seen in (calls, inside):
        assert seen.largest <= length * width * states / 8


def test_bad_arguments_are_named() -> None:
    named = arguments(2, 9, 3)

    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            s4d_scan(**(named | changes))

    expected = r"expected \(..., L, H\), \(H, M\) and \(H, M\)"
    refuse(rf"u \(2, 9, 4\), a \(3, 4\) .*{expected}", u=torch.zeros(2, 9, 4))
    refuse(rf"v \(3, 5\), {expected}", v=torch.zeros(3, 5))
    refuse(r"D \(4,\), expected \(3,\)", D=torch.zeros(4))
    refuse(r"D has dtype torch.complex64", D=torch.zeros(3, dtype=torch.complex64))
    refuse(rf"a \(2, 3, 4\).*{expected}", a=torch.zeros(2, 3, 4))
    refuse(rf"u \(3,\).*{expected}", u=torch.zeros(3))
    refuse(r"reset \(2, 8\), expected \(..., 9\)", reset=torch.ones(2, 8, dtype=torch.bool))
    refuse(r"reset has dtype torch.float32, expected bool", reset=torch.zeros(2, 9))
    refuse(r"lengths has dtype torch.float32, expected an integer", lengths=torch.zeros(2))
    refuse(r"u has dtype torch.complex64", u=torch.zeros(2, 9, 3, dtype=torch.complex64))
    refuse(r"a has dtype torch.int64", a=torch.zeros(3, 4, dtype=torch.int64))
    refuse(r"batch axes do not broadcast: .* lengths \(5,\)", lengths=torch.zeros(5).long())
    refuse(r"v is on meta and u on cpu", v=torch.zeros(3, 4, device="meta"))
    refuse(r"backend 'fast', expected 'auto' or 'reference'", backend="fast")


def test_inputs_are_left_alone() -> None:
    for optional in OPTIONS:
        named = arguments(2, 70, 3, optional=optional)
        before = {n: t.clone() for n, t in named.items()}
        ordered = [named.get(n) for n in ("u", "a", "v", "D", "lengths", "reset")]
        y, last, kept = torch.ops.lrnnx_core.s4d_scan(*ordered, True)
        saved = [t.clone() for t in (kept, y, last)]
        torch.ops.lrnnx_core.s4d_scan_backward(kept, y, last, *ordered)
        assert all(torch.equal(x, s) for x, s in zip((kept, y, last), saved, strict=True))
        assert all(torch.equal(named[n], before[n]) for n in named)
