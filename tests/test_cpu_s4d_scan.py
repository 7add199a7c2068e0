# SPDX-License-Identifier: MIT
"""The compiled scan of S4D: its error, its blocks, its threads, what it reads in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrnnx_core.backends import blocked_s4d
from lrnnx_core.ops import s4d_scan

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import pool
from lrnnx_core.backends.cpu import s4d_scan as compiled

F32, F64 = torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
NAMES = ("y", "last", "du", "da", "dv", "dD")


def drawn(
    *shape: int, states: int, complex_: bool = True, radius: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Return u, a, v in float64, every number one that float32 has."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    u = torch.randn(shape, generator=generator)
    v = torch.randn(width, states, generator=generator, dtype=C64 if complex_ else F32)
    a = torch.randn(width, states, generator=generator, dtype=v.dtype)
    a = a / a.abs() * radius * torch.rand(width, states, generator=generator) ** 0.1
    return [u.double(), *(t.to(C128 if complex_ else F64) for t in (a, v))]


def results(module: Any, inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    """Return outputs and gradients of leaves, of cotangents that depend on the shapes alone."""
    if module is compiled:
        return _results(module, inputs, *rest)
    with pytest.MonkeyPatch.context() as patch:  # `blocked_s4d` calls other operators
        patch.setenv("LRNNX_CPU_BACKEND", "torch")
        return _results(module, inputs, *rest)


def _results(module: Any, inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    D = torch.real(inputs[2])[..., 0]
    y, last, kept = module.s4d_scan(*inputs, D, *rest, True)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(y.shape, generator=generator, dtype=F32).to(y.dtype)
    end = torch.randn(last.shape, generator=generator, dtype=C64).to(C128)
    end = end.to(last.dtype) if last.is_complex() else end.real.to(last.dtype)
    lengths = rest[0]
    if lengths is not None:
        counted = (torch.arange(y.shape[-2]) < lengths.unsqueeze(-1)).unsqueeze(-1)
        y, g = y * counted, g * counted
    return [y, last, *module.s4d_scan_backward(kept, g, end, *inputs, D, *rest)]


def narrowed(inputs: list[Tensor]) -> list[Tensor]:
    return [t.to(C64 if t.is_complex() else F32) for t in inputs]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Return the largest error of each, relative to the largest number."""
    scales = [float(w.abs().max()) if w.numel() else 1.0 for w in want]
    return [
        float((x - w).abs().max()) / (s or 1.0) if w.numel() else 0.0
        for x, w, s in zip(got, want, scales, strict=True)
    ]


@settings(max_examples=30)
@given(
    length=st.sampled_from([1, 2, 63, 64, 65, 127, 129, 300]),
    width=st.sampled_from([1, 5, 16, 17, 33]),
    states=st.sampled_from([1, 2, 3, 32, 33]),
    complex_=st.booleans(),
    flags=st.booleans(),
    radius=st.sampled_from([0.0, 0.5, 1.0, 1.01]),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_at_most_twice_that_of_plain_pytorch(
    length: int, width: int, states: int, complex_: bool, flags: bool, radius: float, seed: int
) -> None:
    inputs = drawn(2, length, width, states=states, complex_=complex_, radius=radius, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, length + 1, (2,), generator=generator) if flags else None
    reset = torch.rand(2, length, generator=generator) > 0.9 if flags else None
    exact = results(blocked_s4d, inputs, lengths, reset)
    plain = errors(results(blocked_s4d, narrowed(inputs), lengths, reset), exact)
    found = errors(results(compiled, narrowed(inputs), lengths, reset), exact)
    for name, error, allowed in zip(NAMES, found, plain, strict=True):
        assert error <= 2 * allowed + 1e-6, name
    found = errors(results(compiled, inputs, lengths, reset), exact)
    assert max(found) < 1e-12


@pytest.mark.parametrize("complex_", [True, False])
def test_parameters_of_each_row(complex_: bool) -> None:
    """As a vmap over parameters has them: a leading part of the batch."""
    kind = C128 if complex_ else F64
    u = torch.randn(2, 3, 70, 18, dtype=F64)
    a, v = (0.5 * torch.randn(2, 18, 3, dtype=kind) for _ in range(2))
    got = results(compiled, [u, a, v], None, None)
    rows = [results(compiled, [u[i], a[i], v[i]], None, None)[:2] for i in range(2)]
    for x, row in zip(got, zip(*rows, strict=True), strict=False):
        assert torch.equal(x, torch.stack(row))
    for error in errors(got, results(blocked_s4d, [u, a, v], None, None)):
        assert error < 1e-12


def test_threads_share_the_work_and_results_are_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = narrowed(drawn(5, 200, 40, states=8))
    single = results(compiled, inputs, None, None)
    for count in (2, 3, 7):
        used = []

        def workers(items: int, nanoseconds: float, count: int = count, used: Any = used) -> int:
            used.append(min(count, items))
            return used[-1]

        monkeypatch.setattr(pool, "workers", workers)
        first = results(compiled, inputs, None, None)
        assert used == [count, count]
        again = results(compiled, inputs, None, None)
        for x, y, z in zip(first, again, single, strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(x, z) for x, z in zip(first[:3], single[:3], strict=True))
        monkeypatch.undo()


def test_strided_and_expanded_inputs() -> None:
    u, a, v = drawn(3, 90, 34, states=3)
    wide = torch.randn(3, 90, 2, 34, dtype=F64)
    for x in (wide[:, :, 1], u.mT.contiguous().mT, u[:1].expand(3, -1, -1), u[:, :1].expand_as(u)):
        got = results(compiled, [x, a, v], None, None)
        want = results(compiled, [x.contiguous(), a, v], None, None)
        assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
    y, last, kept = compiled.s4d_scan(u, a, v, None, None, None, True)
    for g in (torch.ones(()).double().expand(y.shape), torch.randn(34, dtype=F64).expand(y.shape)):
        ends = last.mT.contiguous().mT
        got = compiled.s4d_scan_backward(kept, g, ends, u, a, v, None, None, None)
        want = compiled.s4d_scan_backward(kept, g.contiguous(), last, u, a, v, None, None, None)
        assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
    assert torch.equal(compiled.s4d_scan(u, a.mT.contiguous().mT, v, None, None, None, False)[0], y)


def test_a_number_that_is_not_finite_reaches_later_samples_of_its_document_alone() -> None:
    u, a, v = narrowed(drawn(2, 150, 17, states=3))
    reset = torch.zeros(2, 150, dtype=torch.bool)
    reset[:, 100] = True
    clean = compiled.s4d_scan(u, a, v, None, None, reset, False)[0]
    for bad in (float("inf"), float("nan")):
        x = u.clone()
        x[0, 70, 5] = bad
        y = compiled.s4d_scan(x, a, v, None, None, reset, False)[0]
        finite = torch.ones_like(y, dtype=torch.bool)
        finite[0, 70:100, 5] = False
        assert torch.equal(y.isfinite(), finite)
        assert torch.equal(y[finite], clean[finite])


def test_a_million_samples() -> None:
    """Against the closed form: of a constant input 1 - a^t over 1 - a."""
    a = torch.tensor([[0.9], [0.99]], dtype=F32)
    u = torch.ones(1_000_000, 2, requires_grad=True)
    y, last = s4d_scan(u, a, torch.ones(2, 1))
    t = torch.tensor([0, 10, 1000, 999_999])
    want = (1 - a.double().mT ** (t + 1).unsqueeze(-1)) / (1 - a.double().mT)
    torch.testing.assert_close(y[t].double(), want, rtol=2e-5, atol=0)
    torch.testing.assert_close(last.double(), want[-1:].mT, rtol=2e-5, atol=0)
    y.sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(u.grad.flip(0)[t].double(), want, rtol=2e-5, atol=0)


def test_without_a_backward_nothing_is_kept() -> None:
    u, a, v = drawn(2, 200, 3, states=2)
    shapes = [compiled.s4d_scan(u, a, v, None, None, None, keep)[2].shape for keep in (True, False)]
    assert shapes == [(2, 4 * 3 * 2), (2, 0)]


@pytest.mark.parametrize("complex_", [True, False])
@pytest.mark.parametrize("optional", [(), ("lengths",), ("lengths", "reset")], ids=" ".join)
def test_what_one_backend_keeps_another_one_reads(
    optional: tuple[str, ...], complex_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state before every chunk: 17 channels are two blocks of the compiled kernel, one cut."""
    length, states = 300, 5
    inputs = drawn(4, length, 17, states=states, complex_=complex_)
    lengths = torch.tensor([300, 0, 128, 77]) if "lengths" in optional else None
    reset = torch.rand(4, length, generator=torch.Generator().manual_seed(3)) > 0.98
    rest = (None, lengths, reset if "reset" in optional else None)
    _, last, kept = compiled.s4d_scan(*inputs, *rest, True)
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    torch.testing.assert_close(blocked_s4d.s4d_scan(*inputs, *rest, True)[2], kept)
    every = blocked_s4d.chunk_length(states)
    for c, state in enumerate(kept.unflatten(-1, (-1, *last.shape[-2:])).unbind(1)):
        t, (u, a, v) = c * every, inputs
        cut = None if lengths is None else lengths.clamp(max=t)
        flags = None if rest[2] is None else reset[:, :t]
        want = s4d_scan(u[:, :t], a, v, lengths=cut, reset=flags, backend="reference")[1]
        torch.testing.assert_close(state, want)


@pytest.mark.parametrize("complex_", [True, False])
@pytest.mark.parametrize("optional", [(), ("lengths",), ("lengths", "reset")], ids=" ".join)
def test_a_backward_may_run_under_the_other_backend(
    optional: tuple[str, ...], complex_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, a, v = (t.requires_grad_() for t in drawn(4, 300, 17, states=5, complex_=complex_))
    D = torch.linspace(-1, 1, 17, dtype=F64).requires_grad_()
    given: dict[str, Any] = {"lengths": torch.tensor([300, 0, 128, 77])} if optional else {}
    if "reset" in optional:
        flags = torch.rand(4, 300, generator=torch.Generator().manual_seed(3))
        given["reset"] = flags > 0.98
    found = {}
    for forward in ("", "torch"):
        for backward in ("", "torch"):
            monkeypatch.setenv("LRNNX_CPU_BACKEND", forward)
            y, last = s4d_scan(u, a, v, D, **given)
            monkeypatch.setenv("LRNNX_CPU_BACKEND", backward)
            loss = y.sin().sum() + last.abs().square().sum()
            found[forward, backward] = torch.autograd.grad(loss, (u, a, v, D))
    want = found.pop(("torch", "torch"))
    for got in found.values():
        for g, w in zip(got, want, strict=True):
            assert (g - w).norm() <= 1e-11 * w.norm()
