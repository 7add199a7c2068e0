# SPDX-License-Identifier: MIT
"""The compiled RG-LRU scan on the CPU against the one in PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrnnx_core.backends import blocked_rg_lru
from lrnnx_core.backends.cpu import pool

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import rg_lru as compiled

F64 = torch.float64
FIELDS = (
    "x", "input_gate", "recurrent_gate", "rate", "input_bias", "recurrent_bias", "h0",
    "timesteps", "reset", "mask",
)  # fmt: skip
OPTIONS = FIELDS[4:]
Inputs = list[Tensor | None]


def problem(
    *shape: int, optional: tuple[str, ...] = OPTIONS, groups: tuple[int, ...] = (), seed: int = 0
) -> Inputs:
    """Draw arguments in float64; each group of the batch has parameters of its own."""
    generator = torch.Generator().manual_seed(seed)
    *batch, length, width = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=F64)

    found: dict[str, Tensor] = {n: draw(*shape) for n in FIELDS[:3]}
    found["rate"] = 0.01 + draw(*groups, width).abs()
    found |= {n: draw(*groups, width) for n in FIELDS[4:6]}
    found["h0"] = draw(*batch, width)
    found["timesteps"] = draw(*batch, length).abs()
    found["reset"], found["mask"] = draw(*batch, length) > 0.8, draw(*batch, length) > -0.8
    return [found[n] if n in FIELDS[:4] or n in optional else None for n in FIELDS]


def called(
    backend: Any, inputs: Inputs, state_only: bool = False, start_rule: bool = False
) -> list[Tensor]:
    """Return outputs and gradients, made with the same cotangents in every backend."""
    h, last = backend.rg_lru_scan(*inputs, state_only, start_rule)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(t.shape, generator=generator, dtype=F64).to(t.dtype) for t in (h, last)]
    backward = getattr(backend, "gradients", None) or backend.rg_lru_scan_backward
    found = [h, last, *backward(h, *grads, *inputs, state_only, start_rule)]
    assert all(t.is_contiguous() for t in found)
    return found


def close(got: Any, want: Any, **tolerance: Any) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-11} | tolerance
    torch.testing.assert_close(got, want, **tolerance)


def agree(inputs: Inputs, state_only: bool = False, start_rule: bool = False) -> None:
    close(*(called(b, inputs, state_only, start_rule) for b in (compiled, blocked_rg_lru)))


@pytest.mark.parametrize("choices", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 0, 3), (3, 1, 5), (131, 2), (0, 3, 2), (2, 3, 0)])
def test_every_option_is_that_of_pytorch(
    shape: tuple[int, ...], choices: tuple[bool, bool]
) -> None:
    subsets = [(), *((n,) for n in OPTIONS), ("reset", "mask"), ("h0", "reset", "mask"), OPTIONS]
    for optional in subsets:
        agree(problem(*shape, optional=optional), *choices)


@pytest.mark.parametrize("width", [511, 512, 513, 1100])
def test_blocks_of_channels(width: int) -> None:
    agree(problem(2, 9, width), start_rule=True)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(0, 140),
    width=st.integers(1, 40),
    optional=st.sets(st.sampled_from(OPTIONS)),
    choices=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int, length: int, width: int, optional: set[str], choices: tuple[bool, bool], seed: int
) -> None:
    agree(problem(rows, length, width, optional=tuple(optional), seed=seed), *choices)


def test_groups_of_the_batch_have_parameters_of_their_own() -> None:
    for groups in ((2,), (2, 3)):
        agree(problem(2, 3, 9, 5, groups=groups), start_rule=True)


def test_any_strides() -> None:
    inputs = problem(2, 20, 24)
    x = inputs[0]
    assert x is not None
    views = {
        "slice": torch.cat([x, x, x], -1)[..., 10:34],
        "even": torch.stack([x, x], -2).flatten(-2)[..., ::2],
        "transposed": x.mT.contiguous().mT,
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "one row": x[:1].expand(2, -1, -1),
        "one channel": x[..., :1].expand(-1, -1, 24),
        "one number": x[:1, :1, :1].expand(2, 20, 24),
    }
    for view in views.values():
        agree([view, view, view, *inputs[3:]])
        _, last = compiled.rg_lru_scan(*inputs, False, False)
        close(
            compiled.rg_lru_scan_backward(view, view, last, *inputs, False, False),
            blocked_rg_lru.gradients(view, view, last, *inputs, False, False),
        )
    flags = torch.rand(1, 20) > 0.5
    times = torch.rand(2, 1, dtype=F64)
    agree(
        [*inputs[:7], times.expand(2, 20), flags.expand(2, 20), flags.mT.clone().mT.expand(2, 20)]
    )


def test_the_root_and_its_slope_where_the_state_keeps_or_forgets_all() -> None:
    """A decay from 1 - 1e-17 to 1e-300, in one channel each."""
    inputs = problem(2, 30, 8, optional=("h0",))
    inputs[3] = torch.tensor([0.0, 1e-17, 1e-12, 1e-8, 1e-4, 1.0, 50.0, 700.0], dtype=F64)
    agree(inputs)
    agree(inputs, start_rule=True)
    inputs[1] = 40 * inputs[1]  # type: ignore[operator]
    inputs[2] = 400 * inputs[2]  # type: ignore[operator]
    agree(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 700, 40), (3, 1, 40), (1, 3000, 24)])
@pytest.mark.parametrize("memory", [1e-4, 1.0])
def test_errors_are_at_most_twice_those_of_pytorch(
    memory: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = problem(*shape, optional=tuple(n for n in OPTIONS if n != "reset"))
    inputs[3] = memory * inputs[3]  # type: ignore[operator]
    typed: Inputs = [
        t if t is None or t.dtype == torch.bool else t.to(dtype if i < 3 else torch.float32)
        for i, t in enumerate(inputs)
    ]
    exact = [t if t is None or t.dtype == torch.bool else t.double() for t in typed]
    h, last = (t.double() for t in blocked_rg_lru.rg_lru_scan(*exact, False, True))
    grads = (torch.ones_like(h), torch.zeros_like(last))
    want = [h, last, *blocked_rg_lru.gradients(h, *grads, *exact, False, True)]

    def run(backend: Any, backward: Any) -> list[Tensor]:
        h, last = backend.rg_lru_scan(*typed, False, True)
        grads = (torch.ones_like(h), torch.zeros_like(last))
        return [h, last, *backward(h, *grads, *typed, False, True)]

    got = run(compiled, compiled.rg_lru_scan_backward)
    plain = run(blocked_rg_lru, blocked_rg_lru.gradients)
    for value, other, true in zip(got, plain, want, strict=True):
        assert value.dtype == other.dtype
        error, others = ((t.double() - true).norm() for t in (value, other))
        assert error <= 2 * others + 2e-7 * true.norm()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_spreads_alike(which: int, value: float) -> None:
    inputs = problem(2, 12, 3, optional=("h0", "mask"))
    chosen = inputs[which]
    assert chosen is not None
    chosen[0, 5, 1] = value
    for backend in (compiled, blocked_rg_lru):
        h, _ = backend.rg_lru_scan(*inputs, False, False)
        assert h[1].isfinite().all()
    close(
        compiled.rg_lru_scan(*inputs, False, False),
        blocked_rg_lru.rg_lru_scan(*inputs, False, False),
        equal_nan=True,
    )


@pytest.mark.parametrize("shape", [(1, 90, 1300), (3, 65, 130), (5, 40, 8)])
def test_results_do_not_depend_on_chance(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(*shape)
    alone = called(compiled, inputs)
    monkeypatch.setattr(pool, "workers", lambda items, nanoseconds: min(3, items))
    together = [called(compiled, inputs) for _ in range(3)]
    close(together[0], alone)
    for again in together[1:]:
        assert all(torch.equal(a, b) for a, b in zip(together[0], again, strict=True))


def test_a_million_steps() -> None:
    x = torch.ones(1, 1).expand(1_000_000, 2)
    rate = torch.tensor([1e-3, 1.0])
    h, last = compiled.rg_lru_scan(x, x, x, rate, *(None,) * 6, False, False)
    short, _ = compiled.rg_lru_scan(*(x[:20_000],) * 3, rate, *(None,) * 6, False, False)
    torch.testing.assert_close(last, short[-1], rtol=1e-4, atol=0)
    g = torch.zeros(1, 1).expand(1_000_000, 2)
    back = compiled.rg_lru_scan_backward(
        h, g, torch.ones(2), x, x, x, rate, *(None,) * 6, False, False
    )
    assert all(t.isfinite().all() for t in back)
