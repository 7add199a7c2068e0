# SPDX-License-Identifier: MIT
"""The compiled Cauchy sums on the CPU against those in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrnnx_core.backends import blocked_sums, library
from lrnnx_core.backends.cpu import pool

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import cauchy as compiled

F64 = torch.float64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(*shape: int, seed: int = 0) -> Inputs:
    """Return alpha, beta (*batch, R, H, N), square, rho (*batch, H, N) and a (*batch, H)."""
    generator = torch.Generator().manual_seed(seed)
    *batch, rows, heads, nodes = shape

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=F64)

    square, rho = 0.2 + 9 * draw(*batch, heads, nodes), -0.1 - draw(*batch, heads, nodes)
    numerators = [draw(*batch, rows, heads, nodes) - 0.5 for _ in range(2)]
    return numerators[0], numerators[1], square, rho, 1 + draw(*batch, heads)


def called(backend: Any, inputs: Inputs, length: int) -> list[Tensor]:
    """Return the sums, and the gradients for one cotangent."""
    alpha = inputs[0]
    shape = (*alpha.shape[:-1], length // 2 + 1, 2)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(shape, generator=generator, dtype=F64).to(alpha.dtype)
    found = [backend.cauchy(*inputs, length), *backend.cauchy_backward(upstream, *inputs, length)]
    assert found[0].shape == shape
    assert [t.shape for t in found[1:]] == [t.shape for t in inputs]
    return found


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 510, 511, 1025])
@pytest.mark.parametrize(
    "shape", [(1, 2, 3), (3, 2, 5), (2, 2, 3, 4), (2, 3, 1, 1, 8), (17, 1, 2), (2, 2, 0), (2, 0, 2)]
)
def test_all_shapes_are_those_of_pytorch(shape: tuple[int, ...], length: int) -> None:
    inputs = problem(*shape)
    close(*(called(b, inputs, length) for b in (compiled, blocked_sums)))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    heads=st.integers(1, 3),
    nodes=st.integers(1, 9),
    length=st.integers(1, 700),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows: int, heads: int, nodes: int, length: int, seed: int) -> None:
    inputs = problem(rows, heads, nodes, seed=seed)
    close(*(called(b, inputs, length) for b in (compiled, blocked_sums)))


def test_any_strides_and_shared_nodes() -> None:
    inputs = problem(2, 2, 3, 4)
    alpha, beta, square, rho, a = inputs
    views = (alpha.mT.contiguous().mT, beta.flip(0).flip(0), square[:1].expand(2, -1, -1), rho, a)
    close(*(called(b, views, 33) for b in (compiled, blocked_sums)))
    shared = (alpha, beta, *(t[:1].expand_as(t) for t in (square, rho, a)))
    close(*(called(b, shared, 33) for b in (compiled, blocked_sums)))
    one = torch.ones(1, dtype=F64)
    upstream = one.expand(2, 2, 3, 17, 2)
    close(
        list(compiled.cauchy_backward(upstream, *inputs, 33)),
        list(blocked_sums.cauchy_backward(upstream, *inputs, 33)),
    )


def test_many_rows_with_the_same_nodes_run_pytorch() -> None:
    alpha, beta, square, rho, a = problem(9, 2, 3, 4)
    inputs = (alpha, beta, *(t[:1].expand_as(t) for t in (square, rho, a)))
    assert torch.equal(compiled.cauchy(*inputs, 40), library.default("cauchy")(*inputs, 40))


@pytest.mark.parametrize("length", [64, 4097])
def test_errors_are_at_most_twice_those_of_pytorch(length: int) -> None:
    """Also beside the poles, where denominators nearly vanish."""
    for damping in (1.0, 1e-3):
        exact = problem(2, 8, 32)
        exact = (*exact[:3], damping * exact[3], exact[4])
        single = tuple(t.float() for t in exact)
        want = called(blocked_sums, tuple(t.double() for t in single), length)  # type: ignore[arg-type]
        got, plain = (called(b, single, length) for b in (compiled, blocked_sums))  # type: ignore[arg-type]
        # The cotangents are rounded in both alike.
        for value, other, true in zip(got, plain, want, strict=True):
            error, others = ((t.double() - true).norm() for t in (value, other))
            assert error <= 2 * others + 2e-7 * true.norm()


def test_results_do_not_depend_on_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(2, 7, 9)
    alone = called(compiled, inputs, 700)
    monkeypatch.setattr(pool, "workers", lambda items, nanoseconds: min(3, items))
    for _ in range(3):
        again = called(compiled, inputs, 700)
        assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
