# SPDX-License-Identifier: MIT
"""The linear scan h_t = a_t h_{t-1} + b_t: the primitive of every model of this library.

Built as every op here is: leaf operators that the dispatcher sends to a backend, two
``autograd.Function``s over them that know each other's derivatives (so that any order of
differentiation and any nesting of torch.func transforms closes), and one node for torch.compile.

With hp_t = h_{t-1} (hp_1 = h0), cotangents g of h and g_last of h_last, and PyTorch's complex
convention, the derivatives are

    adjoint    lam_t = g_t + conj(a_{t+1}) lam_{t+1},  lam_L = g_L + g_last
               db = lam,  da_t = lam_t conj(hp_t),  dh0 = conj(a_1) lam_1
    tangent    dh_t = a_t dh_{t-1} + (da_t hp_t + db_t)

and both are scans again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrnnx_core.backends import blocked, cpu, cuda_linear_scan, library, reference
from lrnnx_core.backends.transforms import (
    allow_in_graph,
    forward_mode_depth,
    positional_only,
)
from lrnnx_core.types import Backend


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    reset: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t h_{t-1} + b_t along the second-to-last axis.

    Args:
        a: (..., L, S) or (..., 1, S), real or complex. A time axis of size 1 means constant in
            time; it is never expanded.
        b: (..., L, S). Batch dimensions and S of all arguments broadcast.
        h0: (..., S), the state before the first step (after the last one if ``reverse``); zeros if
            None.
        reverse: run from the last step to the first.
        reset: (..., L) bool. True clears the state before that step, in the order of running.
        backend: ``"auto"``, or ``"reference"`` for the plain differentiable loop.

    Returns:
        h (..., L, S), all states, in the promoted dtype of ``a`` and ``b``, and h_last (..., S),
        the final state, at least float32. For L = 0, h_last is h0.

    Raises:
        ValueError: shapes that do not broadcast, a dtype that is not floating or complex, tensors
            on different devices, an unknown backend.

    Source: Martin & Cundy 2018, arXiv:1709.04057, section 2; the adjoint is derived above.
    """
    if backend != "auto" or not _ready(a, b, h0, reset):
        a, b, h0, reset = _prepare(a, b, h0, reset, backend)
    if backend == "reference":
        return reference.linear_scan(a, b, h0, reset, reverse)
    return _linear_scan(a, b, h0, reset, reverse)


def _ready(a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None) -> bool:
    """Return whether the arguments are already what `_prepare` returns.

    They mostly are, and `torch.broadcast_shapes` alone takes 50 microseconds.
    """
    if a.ndim < 2 or a.dtype != b.dtype or a.device != b.device:
        return False
    if not (b.is_floating_point() or b.is_complex()):
        return False
    shape, other = b.shape, a.shape
    if other != shape:
        if len(other) != len(shape) or other[-2] != 1:
            return False
        if other[-1] != shape[-1] or other[:-2] != shape[:-2]:
            return False
    if h0 is not None:
        if h0.dtype != reference.state_dtype(b.dtype) or h0.device != b.device:
            return False
        if h0.shape != shape[:-2] + shape[-1:]:
            return False
    if reset is None:
        return True
    return reset.dtype == torch.bool and reset.device == b.device and reset.shape == shape[:-1]


def _prepare(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the arguments and bring them to one dtype and equal batch dimensions, as views."""
    if backend not in ("auto", "reference"):
        raise ValueError(f"linear_scan: backend {backend!r}, expected 'auto' or 'reference'")
    named = {"a": a, "b": b, "h0": h0, "reset": reset}
    for name, rank in (("a", 2), ("b", 2), ("h0", 1), ("reset", 1)):
        value = named[name]
        if value is None:
            continue
        if value.ndim < rank:
            raise ValueError(
                f"linear_scan: {name} {tuple(value.shape)} needs at least {rank} dimension(s)"
            )
        if value.device != b.device:
            raise ValueError(f"linear_scan: {name} is on {value.device} and b on {b.device}")
        if name == "reset":
            if value.dtype != torch.bool:
                raise ValueError(f"linear_scan: reset has dtype {value.dtype}, expected bool")
        elif not (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"linear_scan: {name} has dtype {value.dtype}, expected a floating or complex one"
            )
    length = b.shape[-2]
    if a.shape[-2] not in (1, length):
        raise ValueError(
            f"linear_scan: a {tuple(a.shape)} and b {tuple(b.shape)} do not broadcast at axis -2 "
            f"(time): a needs size 1 or {length}"
        )
    if reset is not None and reset.shape[-1] != length:
        raise ValueError(
            f"linear_scan: reset {tuple(reset.shape)} has {reset.shape[-1]} steps, b has {length}"
        )
    size = _broadcast("axis -1 (channels)", named, {"a": -1, "b": -1, "h0": -1})
    batch = _broadcast("the batch axes", named, {"a": -2, "b": -2, "h0": -1, "reset": -1})
    dtype = torch.promote_types(a.dtype, b.dtype)
    if h0 is not None and h0.is_complex():
        dtype = torch.promote_types(dtype, torch.complex64)
    if h0 is not None:
        h0 = h0.to(reference.state_dtype(dtype)).expand(batch + size)
    a = a.to(dtype).expand(batch + a.shape[-2:-1] + size)
    b = b.to(dtype).expand(batch + b.shape[-2:-1] + size)
    return a, b, h0, None if reset is None else reset.expand(batch + reset.shape[-1:])


def _broadcast(what: str, named: dict[str, Tensor | None], ends: dict[str, int]) -> torch.Size:
    """Broadcast the last axis (``what`` is the channels) or the leading ones before ``ends``."""
    last = what.startswith("axis")
    shapes = {
        name: value.shape[-1:] if last else value.shape[:end]
        for name, end in ends.items()
        if (value := named[name]) is not None
    }
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        got = " and ".join(f"{n} {tuple(t.shape)}" for n, t in named.items() if t is not None)
        raise ValueError(f"linear_scan: {got} do not broadcast at {what}") from None


def _linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    if forward_mode_depth() > 1:
        return reference.linear_scan(a, b, h0, reset, reverse)
    return _Scan.apply(a, b, h0, reset, reverse)


def _linear_scan_backward(
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    grad_h: Tensor,
    grad_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _ScanBackward.apply(a, h, h0, reset, grad_h, grad_last, reverse)


def _previous(h: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """Return what step t received: h_{t-1}, h0 at the first step, zero where reset."""
    before = (torch.zeros_like(h[..., :1, :]) if h0 is None else h0.unsqueeze(-2)).to(h.dtype)
    if h.shape[-2] == 0:
        return h
    parts = (h[..., 1:, :], before) if reverse else (before, h[..., :-1, :])
    return _masked(torch.cat(parts, dim=-2), reset)


def _handed_on(x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Send a cotangent of `_previous` back: (to h, to h0)."""
    first = x[..., -1, :] if reverse else x[..., 0, :]
    zero = torch.zeros_like(x[..., :1, :])
    parts = (zero, x[..., :-1, :]) if reverse else (x[..., 1:, :], zero)
    return torch.cat(parts, dim=-2), first


def _masked(x: Tensor, reset: Tensor | None) -> Tensor:
    return x if reset is None else x.masked_fill(reset.unsqueeze(-1), 0)


def _like_a(x: Tensor, a: Tensor) -> Tensor:
    """Sum over time where ``a`` is constant in time."""
    return (x if a.shape[-2] == x.shape[-2] else x.sum(-2, keepdim=True)).to(a.dtype)


class _Scan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        return _leaf(a, b, h0, reset, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, h0, reset, ctx.reverse = inputs
        ctx.save_for_backward(a, output[0], h0, reset)
        ctx.save_for_forward(a, output[0], h0, reset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, h, h0, reset = ctx.saved_tensors
        grad_h, grad_last = grads
        da, db, dh0 = _linear_scan_backward(a, h, h0, reset, grad_h, grad_last, ctx.reverse)
        return da, db, None if h0 is None else dh0, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        a, h, h0, reset = ctx.saved_tensors
        ta, tb, th0 = tangents[:3]
        drive = torch.zeros_like(h) if tb is None else tb
        if ta is not None:
            drive = drive + ta * _previous(h, h0, reset, ctx.reverse)
        return _linear_scan(a, drive, th0, reset, ctx.reverse)


class _ScanBackward(torch.autograd.Function):
    """(a, h, h0, g, g_last) -> (da, db, dh0), all five independent variables here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor,
        h: Tensor,
        h0: Tensor | None,
        reset: Tensor | None,
        grad_h: Tensor,
        grad_last: Tensor,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _leaf_backward(a, h, h0, reset, grad_h, grad_last, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        a, h, h0, reset, _, _, ctx.reverse = inputs
        ctx.save_for_backward(a, h, h0, reset, output[1])
        ctx.save_for_forward(a, h, h0, reset, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # nu is the cotangent of lam: it runs forward in time, and starts from that of dh0.
        a, h, h0, reset, lam = ctx.saved_tensors
        c_a, c_b, c_h0 = grads
        drive = c_b + c_a * _previous(h, h0, reset, ctx.reverse)
        nu, nu_last = _linear_scan(a, drive, c_h0, reset, ctx.reverse)
        grad_a = lam * _previous(nu, c_h0, reset, ctx.reverse).conj()
        if h.shape[-2] == 0:
            return torch.zeros_like(a), torch.zeros_like(h), None, None, nu, nu_last, None
        to_h, to_h0 = _handed_on(_masked(c_a.conj() * lam, reset), ctx.reverse)
        to_h0 = None if h0 is None else to_h0.to(h0.dtype)
        return _like_a(grad_a, a), to_h, to_h0, None, nu, nu_last, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # The tangent of lam obeys the adjoint recursion itself: this Function with another drive.
        a, h, h0, reset, lam = ctx.saved_tensors
        ta, th, th0, _, tg, tlast, _ = tangents
        drive = torch.zeros_like(lam) if tg is None else tg
        first = None
        if ta is not None and h.shape[-2]:
            onward, first = _handed_on(_masked(ta.conj() * lam, reset), ctx.reverse)
            drive = drive + onward
        if tlast is None:
            tlast = torch.zeros_like(h[..., 0, :] if h.shape[-2] else h.sum(-2))
        tlast = tlast.to(reference.state_dtype(h.dtype))
        tda, tlam, tdh0 = _linear_scan_backward(a, h, h0, reset, drive, tlast, ctx.reverse)
        if th is not None or th0 is not None:
            th = torch.zeros_like(h) if th is None else th
            moved = _previous(th, th0, reset, ctx.reverse)
            tda = tda + _like_a(lam * moved.conj(), a)
        return tda, tlam, tdh0 if first is None else tdh0 + first.to(tdh0.dtype)


def _fake(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    last = b.new_empty(b.shape[:-2] + b.shape[-1:], dtype=reference.state_dtype(b.dtype))
    return b.new_empty(b.shape), last


def _fake_backward(
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    grad_h: Tensor,
    grad_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), grad_last.new_empty(grad_last.shape)


_leaf = library.define(
    "linear_scan(Tensor a, Tensor b, Tensor? h0, Tensor? reset, bool reverse) -> (Tensor, Tensor)",
    default=blocked.linear_scan,
    fake=_fake,
)
_leaf_backward = library.define(
    "linear_scan_backward(Tensor a, Tensor h, Tensor? h0, Tensor? reset, Tensor grad_h, "
    "Tensor grad_last, bool reverse) -> (Tensor, Tensor, Tensor)",
    default=blocked.linear_scan_backward,
    fake=_fake_backward,
)
for _function in (_Scan.forward, _ScanBackward.forward):
    positional_only(_function)
allow_in_graph(_linear_scan)
_CUDA = cuda_linear_scan.implement()
_CPU = cpu.implement("linear_scan", "linear_scan", "linear_scan_backward")
