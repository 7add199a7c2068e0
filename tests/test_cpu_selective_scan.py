# SPDX-License-Identifier: MIT
"""The compiled selective scan on the CPU against the one in PyTorch.

`test_selective_scan` runs the operator both ways against loop and dense operator; here are the
leaves: shapes and layouts, errors, threads, the step, and that they are what an operator runs.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from op_cases import draw
from torch import Tensor

from lrnnx_core import ops
from lrnnx_core.backends import blocked_selective
from lrnnx_core.backends.blocked_selective import CHUNK
from lrnnx_core.discretize import FUSED

pytest.importorskip("numba")
from lrnnx_core.backends.cpu import pool, selective_step
from lrnnx_core.backends.cpu import selective_scan as compiled

TENSORS = (
    "u", "dt", "A", "B", "C", "D", "z", "dt_bias", "h0", "decay_dt", "timesteps", "reset",
)  # fmt: skip
OPTIONAL = TENSORS[5:]
Inputs = dict[str, Any]


def kinds(*complexity: bool, quick: tuple[tuple[str, bool], ...]) -> list[Any]:
    """Return (scheme, complex) for parametrization; each compiles kernels of its own.

    Every scheme's formulas run in `test_selective_scan`, real and complex; those of these cases
    that are not ``quick`` run the same loops.
    """
    return [
        pytest.param(
            *case,
            id=f"{case[0]}-{'complex' if case[1] else 'real'}",
            marks=() if case in quick else pytest.mark.exhaustive,
        )
        for case in itertools.product(sorted(FUSED), complexity)
    ]


REAL, COMPLEX = ("mamba", False), ("zoh", True)
KINDS = pytest.mark.parametrize(("scheme", "complex_"), kinds(False, True, quick=(REAL, COMPLEX)))
REAL_KINDS = pytest.mark.parametrize(
    ("scheme", "complex_"), kinds(False, quick=(REAL, ("zoh", False)))
)


def problem(
    length: int,
    width: int = 5,
    states: int = 3,
    batch: tuple[int, ...] = (2,),
    shared: int = 0,
    groups: tuple[int, int] = (1, 1),
    constant: str = "",
    optional: tuple[str, ...] = OPTIONAL,
    complex_: bool = False,
    seed: int = 0,
) -> Inputs:
    """Return the leaf's tensors, None where not wanted; ``constant`` names B, C, decay_dt."""
    sequence, one = (*batch, length), (*batch, 1)
    matrix = {k: (*(one if k in constant else sequence), g, states) for k, g in zip("BC", groups)}  # noqa: B905
    own = one if "decay_dt" in constant else sequence
    parameter = (*batch[:shared], width)
    shapes = {
        "u": (*sequence, width), "dt": (*sequence, width), "A": (*parameter, states),
        "B": matrix["B"], "C": matrix["C"], "D": parameter, "z": (*sequence, width),
        "dt_bias": parameter, "h0": (*batch, width, states), "decay_dt": (*own, width),
        "timesteps": sequence, "reset": sequence,
    }  # fmt: skip
    found: Inputs = {}
    for i, (name, shape) in enumerate(shapes.items()):
        x = draw(*shape, seed=30 * seed + i, complex_=complex_ and name in ("A", "B", "C", "h0"))
        if name == "A":
            x = torch.complex(-x.real.abs(), x.imag) if complex_ else -x.abs()
        elif name in ("decay_dt", "timesteps"):
            x = x.abs()
        elif name == "reset":
            x = x > 1.3
        elif name == "dt":
            x = x - 1.5
        found[name] = x if name in optional or name not in OPTIONAL else None
    return found


def run(module: Any, inputs: Inputs, softplus: bool, state_only: bool, scheme: str) -> list[Tensor]:
    """Return y, the last state and all gradients of a leaf."""
    arguments = (*(inputs[k] for k in TENSORS), softplus, state_only, scheme)
    y, last, kept = module.selective_scan(*arguments, True)
    alone = module.selective_scan(*arguments, False)
    for a, b in zip((y, last), alone, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert alone[2].shape[-1] == 0
    upstream = draw(*y.shape, seed=7), draw(*last.shape, seed=8, complex_=last.is_complex())
    gradients = module.selective_scan_backward(
        kept, upstream[0].to(y.dtype), upstream[1].to(last.dtype), *arguments
    )
    empty = y.new_empty(0)
    return [y, last, *(empty if g is None else g for g in gradients)]


def agree(inputs: Inputs, *options: Any, tolerance: float = 1e-11) -> None:
    got, want = run(compiled, inputs, *options), run(blocked_selective, inputs, *options)
    for name, a, b in zip(("y", "last", *TENSORS), got, want, strict=False):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        if b.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), name


@KINDS
@settings(max_examples=25)
@given(
    length=st.sampled_from([0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]),
    per_group=st.integers(1, 40),
    pairs=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4), (3, 3)]),
    states=st.integers(1, 19),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    constant=st.sampled_from(["", "B", "C", "BC", "decay_dt"]),
    optional=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    state_only=st.booleans(),
)
@example(40, 16, (2, 1), 16, (3,), "", set(OPTIONAL), True, False)
@example(40, 1, (40, 40), 4, (2,), "BC", set(OPTIONAL), True, True)
def test_any_problem_is_as_in_pytorch(
    scheme: str,
    complex_: bool,
    length: int,
    per_group: int,
    pairs: tuple[int, int],
    states: int,
    batch: tuple[int, ...],
    constant: str,
    optional: set[str],
    softplus: bool,
    state_only: bool,
) -> None:
    width = per_group * max(pairs) * (2 if pairs == (2, 4) else 1)
    inputs = problem(
        length, width, states, batch, len(batch) // 2, pairs, constant, tuple(optional), complex_
    )
    agree(inputs, softplus, state_only and "timesteps" in optional, scheme)


@pytest.mark.parametrize("batch", [(2, 3), (4,)], ids=str)
@pytest.mark.parametrize("shared", [0, 1])
def test_parameters_of_a_leading_axis(batch: tuple[int, ...], shared: int) -> None:
    for scheme, complex_ in (REAL, COMPLEX):
        inputs = problem(CHUNK + 3, 20, 4, batch, shared, complex_=complex_)
        agree(inputs, True, False, scheme)


def test_blocks_slots_and_pieces_of_a_wide_row() -> None:
    """Several blocks of one row add to the same gradients of B, C and the timesteps."""
    for width, groups, batch in ((300, (1, 1), (1,)), (320, (2, 1), (1,)), (200, (1, 1), (70,))):
        length = CHUNK + 2 if batch == (1,) else 3
        inputs = problem(length, width, 5, batch, groups=groups)
        agree(inputs, True, False, "mamba", tolerance=1e-10)


def test_slices_and_expanded_tensors_are_read_in_place() -> None:
    inputs = problem(CHUNK + 1, 24, 4)
    xz = torch.cat([inputs["u"], inputs["z"]], -1)
    strided = inputs | {"u": xz[..., :24], "z": xz[..., 24:]}
    for name, axes in {"dt": 2, "B": 3, "C": 1, "h0": 1, "timesteps": 1, "reset": 1}.items():
        core = strided[name]
        core = core[(slice(1),) * axes]
        strided[name] = core.expand(inputs[name].shape)
    compact = {k: None if v is None else v.contiguous() for k, v in strided.items()}
    got, want = (run(compiled, x, True, False, "mamba") for x in (strided, compact))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@KINDS
def test_single_precision_is_as_exact_as_in_pytorch(scheme: str, complex_: bool) -> None:
    exact = problem(3 * CHUNK, 48, 8, complex_=complex_, optional=OPTIONAL[:4])
    single = {
        k: None if v is None else v.to(torch.complex64 if v.is_complex() else torch.float32)
        for k, v in exact.items()
    }
    double = {
        k: None if v is None else v.to(torch.complex128 if v.is_complex() else torch.float64)
        for k, v in single.items()
    }
    want = run(blocked_selective, double, True, False, scheme)
    plain = run(blocked_selective, single, True, False, scheme)
    got = run(compiled, single, True, False, scheme)
    for name, g, p, w in zip(("y", "last", *TENSORS), got, plain, want, strict=False):
        if w.numel():
            scale = w.abs().max()
            errors = [float((x - w).abs().max() / scale) for x in (g, p)]
            assert errors[0] <= max(2 * errors[1], 5e-7), (scheme, complex_, name, errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mixed_activations(dtype: torch.dtype) -> None:
    inputs = {k: v if k == "reset" else v.float() for k, v in problem(CHUNK + 1, 20, 4).items()}
    for name in ("u", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    agree(inputs, True, False, "mamba", tolerance=tolerance)


@REAL_KINDS
def test_extreme_and_broken_numbers_go_the_same_way(scheme: str, complex_: bool) -> None:
    """Decays of 0 and 1, growth, infinities and NaN: finite where PyTorch's result is."""
    for value in (0.0, 1e-30, -3.0, 60.0, 1e4, float("inf"), float("nan")):
        for name in ("dt", "u", "A", "h0"):
            inputs = problem(5, 20, 3, optional=("h0", "D", "z"), complex_=complex_)
            inputs[name] = inputs[name].clone()
            inputs[name][..., 1, 2] = value
            for dtype in (torch.float32, torch.float64):
                x = {k: None if v is None else v.to(dtype) for k, v in inputs.items()}
                arguments = (*(x[k] for k in TENSORS), False, False, scheme, False)
                got = compiled.selective_scan(*arguments)
                want = blocked_selective.selective_scan(*arguments)
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-30, equal_nan=True)


def test_results_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, complex_ in (REAL, COMPLEX):
        inputs = problem(2 * CHUNK + 1, 200, 4, (3,), complex_=complex_)
        results = []
        for workers in (1, 2, 5):
            monkeypatch.setattr(pool, "workers", lambda items, _, w=workers: min(w, items))
            results.append(run(compiled, inputs, True, False, scheme))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_million_steps() -> None:
    length = 1_000_000
    inputs = problem(length, 1, 1, (1,), optional=())
    single = {k: None if v is None else v.float() for k, v in inputs.items()}
    single["A"] = -torch.full((1, 1), 1e-3)
    arguments = [single[k] for k in TENSORS] + [True, False, "mamba"]
    y, last, _ = compiled.selective_scan(*arguments, False)
    half, parts = length // 2 + 3, []
    for h0, cut in ((None, slice(None, half)), ("last", slice(half, None))):
        part = [t if i == 2 or t is None else t[:, cut] for i, t in enumerate(arguments[:12])]
        part[8] = parts[-1][1] if h0 else None
        parts.append(compiled.selective_scan(*part, *arguments[12:], False))
    assert torch.equal(torch.cat([parts[0][0], parts[1][0]], 1), y)
    assert torch.equal(parts[1][1], last)
    double = [t.double() if isinstance(t, Tensor) else t for t in arguments]
    want = compiled.selective_scan(*double, False)[0]
    assert (y - want).abs().max() <= 1e-5 * want.abs().max()


# ---------------------------------------------------------------- the step


@REAL_KINDS
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_a_step_is_as_in_pytorch(batch: tuple[int, ...], scheme: str, complex_: bool) -> None:
    choices: list[tuple[str, ...]] = [(), OPTIONAL, ("h0", "D", "z", "dt_bias"), ("h0", "reset")]
    for optional, groups, softplus in itertools.product(choices, [(1, 1), (2, 4)], (False, True)):
        inputs = problem(1, 20, 7, batch, 0, groups, "", optional, complex_)
        for state_only in (False, True) if "timesteps" in optional else (False,):
            arguments = (*(inputs[k] for k in TENSORS), softplus, state_only, scheme)
            got = selective_step.selective_step(*arguments)
            assert got is not None
            want = blocked_selective.selective_scan(*arguments, False)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_step_that_the_short_way_does_not_take() -> None:
    for change in ("complex", "half", "columns", "two axes"):
        inputs = problem(
            1, 20, 7, (2, 2) if change == "two axes" else (3,), complex_=change == "complex"
        )
        if change == "half":
            inputs["u"] = inputs["u"].bfloat16()
        elif change == "columns":
            inputs["dt"] = inputs["dt"].mT.contiguous().mT.expand(3, 1, 20)
            inputs["u"] = torch.stack([inputs["u"], inputs["u"]], -1)[..., 0]
        scheme = "zoh" if change == "complex" else "mamba"
        arguments = (*(inputs[k] for k in TENSORS), True, False, scheme)
        assert selective_step.selective_step(*arguments) is None
        got = compiled.selective_scan(*arguments, False)
        want = blocked_selective.selective_scan(*arguments, False)
        tolerance = 1e-2 if change == "half" else 1e-12
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_many_rows_step_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(1, 160, 16, (30,), optional=("h0", "z", "D", "dt_bias"))
    arguments = (*(inputs[k] for k in TENSORS), True, False, "mamba", False)
    want = compiled.selective_scan(*arguments)
    monkeypatch.setattr(pool, "workers", lambda items, _: 3)
    got = compiled.selective_scan(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------- what an operator runs


def test_the_operator_runs_compiled_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = compiled._Problem

    def counted(*arguments: Any) -> Any:
        calls.append("compiled")
        return original(*arguments)

    monkeypatch.setattr(compiled, "_Problem", counted)
    monkeypatch.delenv("LRNNX_CPU_BACKEND", raising=False)
    u = torch.ones(2, 5, 4, requires_grad=True)
    arguments = (u, u, -torch.ones(4, 3), torch.ones(2, 5, 3), torch.ones(2, 5, 3))
    ops.selective_scan(*arguments)[0].sum().backward()
    assert calls == ["compiled"] * 2
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    ops.selective_scan(*arguments)[0].sum().backward()
    assert calls == ["compiled"] * 2
