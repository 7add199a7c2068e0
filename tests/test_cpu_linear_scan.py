"""The linear scan's compiled kernels: what only they could get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import draw
from torch import Tensor

pytest.importorskip("numba")

from lrnnx_core.backends import blocked
from lrnnx_core.backends.cpu import linear_scan as compiled
from lrnnx_core.backends.cpu import pool

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    monkeypatch.setattr(pool, "WORTH", 1)  # small cases are shared out too
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(
    *shape: int, dtype: torch.dtype, constant: bool = False, seed: int = 0, scale: float = 0.9
) -> tuple[list[Any], list[Any]]:
    """Return the arguments of both leaves, without h, for b of this shape (..., L, S)."""
    state = shape[:-2] + shape[-1:]

    def values(*size: int, at: int) -> Tensor:
        return draw(*size, seed=seed + at, complex_=dtype.is_complex).to(dtype)

    a = values(*shape[:-2], 1 if constant else shape[-2], shape[-1], at=0)
    a = scale * a / (1 + a.abs())
    reset = draw(*shape[:-1], seed=seed + 1) > 1.2
    forward = [a, values(*shape, at=2), values(*state, at=3), reset]
    return forward, [values(*shape, at=4), values(*state, at=5)]


def both_leaves(module: Any, forward: list[Any], grads: list[Any], reverse: bool) -> list[Tensor]:
    a, _, h0, reset = forward
    h, last = module.linear_scan(*forward, reverse)
    return [h, last, *module.linear_scan_backward(a, h, h0, reset, *grads, reverse)]


def widened(arguments: list[Any]) -> list[Any]:
    return [x if x is None else x.to(WIDE.get(x.dtype, x.dtype)) for x in arguments]


def near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(got, expected, strict=True):
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_every_way_of_dealing_out_gives_the_same_numbers(
    dtype: torch.dtype, constant: bool, threads: Callable[[int], None]
) -> None:
    shapes = [(1, 9, 1000), (1, 9, 130), (2, 3, 7, 65), (3, 17, 200), (5, 4, 3)]
    for shape in shapes:
        forward, grads = problem(*shape, dtype=dtype, constant=constant)
        results = []
        for count in (1, 2, 3, 4, 7):
            threads(count)
            results.append(both_leaves(compiled, forward, grads, reverse=False))
            assert compiled._Work(forward[1], dtype, 1.0).workers == min(
                count, compiled._Work(forward[1], dtype, 1.0).batch * max(1, most(shape, dtype))
            )
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert torch.equal(x, y)
        near(results[0], both_leaves(blocked, forward, grads, reverse=False), 2e-5)


def most(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return shape[-1] * dtype.itemsize // compiled.LEAST


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_workers_get_equal_shares_where_lines_can_be_cut(
    batch: int, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    work = compiled._Work(torch.empty(batch, 8, 4096), torch.float32, 1e9)
    assert work.workers == count
    assert batch * work.blocks % count == 0 or batch >= 4 * count
    assert work.blocks * work.wide >= work.numbers
    assert work.wide * work.size >= compiled.LEAST


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 70),
    channels=st.integers(0, 40),
    constant=st.booleans(),
    reverse=st.booleans(),
    given_h0=st.booleans(),
    given_reset=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 0.9, 1.0, -1.0, 1.3]),
    seed=st.integers(0, 1000),
)
def test_equals_plain_pytorch(
    batch: int,
    length: int,
    channels: int,
    constant: bool,
    reverse: bool,
    given_h0: bool,
    given_reset: bool,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    forward, grads = problem(
        batch, length, channels, dtype=dtype, constant=constant, seed=seed, scale=scale
    )
    forward = [*forward[:2], forward[2] if given_h0 else None, forward[3] if given_reset else None]
    got = both_leaves(compiled, forward, grads, reverse)
    expected = both_leaves(blocked, forward, grads, reverse)
    for x, y in zip(got, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    near(got, expected, 1e-12 if dtype in WIDE.values() else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("scale", [0.9, 1.0, 1.002])
def test_errors_are_at_most_twice_those_of_plain_pytorch(
    dtype: torch.dtype, constant: bool, scale: float
) -> None:
    for length in (63, 64, 65, 3001):
        forward, grads = problem(2, length, 24, dtype=dtype, constant=constant, seed=length)
        forward[0] = torch.full_like(forward[0], scale)
        exact = both_leaves(blocked, widened(forward), widened(grads), reverse=False)
        ours = both_leaves(compiled, forward, grads, reverse=False)
        plain = both_leaves(blocked, forward, grads, reverse=False)
        for x, y, z in zip(ours, plain, exact, strict=True):
            floor = torch.finfo(dtype).eps * z.abs().max()
            assert (x - z).abs().max() <= 2 * (y - z).abs().max() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["a", "b", "h0", "grad_h", "grad_last"])
def test_infinities_and_nan_go_where_plain_pytorch_sends_them(
    place: str, value: float, dtype: torch.dtype
) -> None:
    forward, grads = problem(2, 14, 5, dtype=dtype)
    named = dict(zip(("a", "b", "h0", "reset"), forward, strict=True))
    named |= dict(zip(("grad_h", "grad_last"), grads, strict=True))
    named["reset"] = torch.zeros_like(named["reset"])
    named["reset"][:, 9] = True
    x = named[place]
    x[(0, 6, 2) if x.ndim == 3 else (0, 2)] = value
    forward = [named[k] for k in ("a", "b", "h0", "reset")]
    grads = [named[k] for k in ("grad_h", "grad_last")]
    got = both_leaves(compiled, forward, grads, reverse=False)
    expected = both_leaves(blocked, forward, grads, reverse=False)
    for y, z in zip(got, expected, strict=True):
        y, z = (torch.view_as_real(v) if v.is_complex() else v for v in (y, z))
        # complex products of infinities are NaN or infinite by the order of their four terms
        if dtype.is_complex:
            assert torch.equal(y.isfinite().all(-1), z.isfinite().all(-1))
        else:
            assert torch.equal(y.isnan(), z.isnan())
            assert torch.equal(y.isinf(), z.isinf())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_of_low_precision_inputs_are_float32(dtype: torch.dtype) -> None:
    forward, grads = problem(2, 300, 8, dtype=torch.float32)
    low = [forward[0].to(dtype), forward[1].to(dtype), *forward[2:]]
    h, last = compiled.linear_scan(*low, False)
    wide = [x.float() if x.is_floating_point() else x for x in low]
    expected, expected_last = compiled.linear_scan(*wide, False)
    assert torch.equal(h, expected.to(dtype))
    assert torch.equal(last, expected_last)
    grads[0] = grads[0].to(dtype)
    got = compiled.linear_scan_backward(low[0], h, *low[2:], *grads, False)
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32]


def test_a_million_steps() -> None:
    b = draw(1_000_000, 2, seed=1).float()
    a = torch.full((1, 2), 0.999)
    h, last = compiled.linear_scan(a, b, None, None, False)
    exact = compiled.linear_scan(a.double(), b.double(), None, None, False)[0]
    assert (h - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert torch.equal(last, h[-1])
    # With b = 1 and a cotangent of 1, da is a geometric sum: a sum in float32 would lose digits.
    ones = torch.ones_like(b)
    h, last = compiled.linear_scan(a, ones, None, None, False)
    da = compiled.linear_scan_backward(a, h, None, None, ones, last * 0, False)[0]
    rate = 1 - a.double()
    expected = (1_000_000 - (2 - rate) / rate) / rate**2
    torch.testing.assert_close(da.double(), expected, rtol=2e-4, atol=0)


def test_a_slice_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of an argument would be one more allocation of its size."""
    whole = torch.rand(4, 64, 96)
    a, b = whole[..., :32], whole[..., 32:64]

    def allocated(*inputs: Tensor) -> int:
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            compiled.linear_scan(*inputs, None, None, False)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    assert allocated(a, b) == allocated(a.contiguous(), b.contiguous())
    assert allocated(a.mT.contiguous().mT, b) > allocated(a, b)
    torch.testing.assert_close(
        compiled.linear_scan(a, b, None, None, False),
        blocked.linear_scan(a, b, None, None, False),
    )
