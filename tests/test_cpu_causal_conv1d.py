# SPDX-License-Identifier: MIT
"""The compiled short convolution on the CPU against the one in PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_causal_conv1d_leaf import called, close, cotangents, problem
from torch import Tensor

from lrnnx_core.backends import blocked_conv1d
from lrnnx_core.backends.cpu import pool

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import causal_conv1d as compiled

Inputs = tuple[Tensor | None, ...]
TAPS = [1, 2, 3, 4, 5, 9]


def agree(*inputs: Tensor | None, silu: bool) -> None:
    close(called(compiled, *inputs, silu=silu), called(blocked_conv1d, *inputs, silu=silu))


def converted(inputs: Inputs, dtype: torch.dtype) -> list[Tensor | None]:
    return [t if t is None or t.dtype == torch.bool else t.to(dtype) for t in inputs]


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("length", [0, 1, 2, 4, 19])
def test_every_option_is_that_of_pytorch(length: int, taps: int) -> None:
    for optional, reset, silu in itertools.product((True, False), repeat=3):
        inputs = problem(2, length, 3, taps=taps, optional=optional, reset=reset)
        agree(*inputs, silu=silu)


@pytest.mark.parametrize(
    "shape", [(70, 600), (3, 300, 64), (2, 0, 5, 4), (4, 3, 0), (2, 1, 33, 17)]
)
def test_rows_short_and_long(shape: tuple[int, ...]) -> None:
    """Several steps make one row, or a piece of the backward is shorter than the sequence."""
    for taps, reset in itertools.product((4, 6), (True, False)):
        agree(*problem(*shape, taps=taps, reset=reset), silu=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(0, 90),
    channels=st.integers(1, 40),
    taps=st.integers(1, 9),
    often=st.floats(0, 1),
    optional=st.booleans(),
    silu=st.booleans(),
)
def test_any_shape_and_any_resets(
    rows: int, length: int, channels: int, taps: int, often: float, optional: bool, silu: bool
) -> None:
    x, weight, bias, tail, _ = problem(rows, length, channels, taps=taps, optional=optional)
    reset = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < often
    agree(x, weight, bias, tail, reset, silu=silu)


@pytest.mark.parametrize("length", [1, 70])
def test_groups_of_the_batch_have_weights_of_their_own(length: int) -> None:
    for groups in ((2,), (2, 3)):
        agree(*problem(2, 3, 4, length, 3, taps=4, groups=groups), silu=True)
    x, weight, bias, tail, reset = problem(2, 3, length, 20, taps=4, groups=(1,))
    expanded = weight.expand(2, -1, -1, -1), bias.expand(2, -1)
    agree(x, *expanded, tail, reset, silu=True)


@pytest.mark.parametrize("taps", [3, 5])
def test_any_strides(taps: int) -> None:
    x, weight, bias, tail, reset = problem(2, 30, 24, taps=taps)
    wide = torch.stack([x, x], dim=-2).flatten(-2)  # (2, 30, 48)
    views = {
        "slice": wide[..., 20:44],
        "even": wide[..., ::2],
        "transposed": x.mT.contiguous().mT,
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "reversed twice": x.flip(1).flip(1),
        "one row": x[:1].expand(2, -1, -1),
        "one step": x[:, :1].expand(-1, 30, -1),
        "one channel": x[..., :1].expand(-1, -1, 24),
        "one number": x[:1, :1, :1].expand(2, 30, 24),
    }
    for name, view in views.items():
        for kernel in (compiled, blocked_conv1d):
            want = kernel.causal_conv1d(view.contiguous(), weight, bias, tail, reset, True)
            got = kernel.causal_conv1d(view, weight, bias, tail, reset, True)
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)
        _, grad_last = cotangents(x, taps)
        close(
            compiled.causal_conv1d_backward(view, grad_last, view, weight, bias, tail, reset, True),
            blocked_conv1d.causal_conv1d_backward(
                view, grad_last, view, weight, bias, tail, reset, True
            ),
        )
    agree(
        x, weight.mT.contiguous().mT, bias, tail.mT.contiguous().mT, reset.mT.clone().mT, silu=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 500, 40), (3, 1, 40), (1, 3000, 3)])
def test_errors_are_at_most_twice_those_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = converted(problem(*shape, taps=4), dtype)
    exact = called(blocked_conv1d, *converted(inputs, torch.float64), silu=True)
    typed = lambda backend: [  # noqa: E731
        *backend.causal_conv1d(*inputs, True),
        *backend.causal_conv1d_backward(
            *(g.to(dtype) for g in cotangents(inputs[0], 4)), *inputs, True
        ),
    ]
    if dtype != torch.float32:  # the cotangents are rounded too
        grads = [g.to(dtype).double() for g in cotangents(inputs[0], 4)]
        exact = exact[:2] + blocked_conv1d.causal_conv1d_backward(
            *grads, *converted(inputs, torch.float64), True
        )
    floor = 2 * torch.finfo(dtype).eps
    for got, plain, want in zip(typed(compiled), typed(blocked_conv1d), exact, strict=True):
        assert got.dtype == dtype
        scale = want.abs().max()
        error, others = ((t.double() - want).abs().max() for t in (got, plain))
        assert error <= 2 * others + floor * scale


def test_a_wider_weight_computes_in_its_dtype() -> None:
    x, weight, bias, tail, reset = problem(2, 20, 5, taps=4)
    x, tail = x.float(), tail.float()
    got = compiled.causal_conv1d(x, weight, bias, tail, reset, True)
    want = blocked_conv1d.causal_conv1d(x, weight, bias, tail, reset, True)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    grads = tuple(g.float() for g in cotangents(x, 4))
    back = compiled.causal_conv1d_backward(*grads, x, weight, bias, tail, reset, True)
    want = blocked_conv1d.causal_conv1d_backward(*grads, x, weight, bias, tail, reset, True)
    assert [t.dtype for t in back] == [t.dtype for t in want]
    torch.testing.assert_close(back, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e300])
def test_what_is_not_finite_spreads_alike(value: float) -> None:
    x, weight, bias, tail, reset = problem(2, 12, 3, taps=4)
    x[0, 5, 1] = value
    tail[1, 2, 0] = value
    for silu in (True, False):
        got = compiled.causal_conv1d(x, weight, bias, tail, reset, silu)
        want = blocked_conv1d.causal_conv1d(x, weight, bias, tail, reset, silu)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_what_a_reset_hides_reaches_no_gradient() -> None:
    x, weight, bias, tail, _ = problem(2, 6, 3, taps=4)
    reset = torch.arange(6).expand(2, 6) == 0
    hidden = torch.full_like(tail, float("inf"))
    got = called(compiled, x, weight, bias, hidden, reset, silu=True)
    close(got, called(compiled, x, weight, bias, torch.zeros_like(tail), reset, silu=True))


@pytest.mark.parametrize("shape", [(1, 300, 300), (3, 65, 130), (5, 40, 8)])
def test_results_do_not_depend_on_chance(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(*shape, taps=4)
    alone = called(compiled, *inputs, silu=True)
    monkeypatch.setattr(pool, "workers", lambda items, nanoseconds: min(3, items))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = [called(compiled, *inputs, silu=True) for _ in range(3)]
    close(together[0], alone)
    for again in together[1:]:
        assert all(torch.equal(a, b) for a, b in zip(together[0], again, strict=True))


def test_a_million_steps() -> None:
    x, weight, bias, *_ = (None if t is None else t.float() for t in problem(4, 2, taps=4))
    x = x.repeat(250_000, 1)
    y, _ = compiled.causal_conv1d(x, weight, bias, None, None, True)
    torch.testing.assert_close(y[-4:], y[4:8], rtol=0, atol=0)
    _, dweight, dbias, _ = compiled.causal_conv1d_backward(
        torch.ones(1).expand(x.shape), torch.zeros(3, 2), x, weight, bias, None, None, False
    )
    assert torch.equal(dbias, torch.full((2,), 1e6))
    torch.testing.assert_close(
        dweight[..., -1, -1], x.double().sum(0).float(), rtol=1e-6, atol=1e-3
    )
