"""The compiled kernels of `diagonal_scan` against plain PyTorch: accuracy, extremes, threads."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrnnx_core.backends import blocked_diagonal
from lrnnx_core.ops.diagonal_scan import NAMES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)
FIELDS = ("x", "A", "steps", "dt", "h0", "timesteps", "reset", "mask")
C128 = torch.complex128
leaf = torch.ops.lrnnx_core.diagonal_scan.default
leaf_backward = torch.ops.lrnnx_core.diagonal_scan_backward.default


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(
    seed: int,
    batch: int = 2,
    length: int = 70,
    size: int = 5,
    *,
    optional: tuple[str, ...] = ("steps", "h0", "timesteps", "reset", "mask"),
    scheme: str = "zoh",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return the arguments of the leaf, in its ranks and dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    A = torch.complex(-0.02 - 0.5 * draw(size).abs(), 2 * draw(size))
    extra = {
        "steps": (0.01 + draw(size).abs()),
        "dt": (0.01 + draw(batch, length, size).abs()),
        "h0": torch.complex(draw(batch, size), draw(batch, size)),
        "timesteps": draw(batch, length).abs(),
        "reset": draw(batch, length) > 1.7,
        "mask": draw(batch, length) > -1.5,
    }
    named: dict[str, Any] = dict.fromkeys(FIELDS)
    named |= {"x": draw(batch, length, 2 * size), "A": torch.exp(A) if scheme == "none" else A}
    hidden = ("steps", "dt", "timesteps") if scheme == "none" else ()
    return named | {n: extra[n] for n in optional if n not in hidden}


def wide(t: Any) -> Any:
    if not isinstance(t, Tensor) or t.dtype == torch.bool:
        return t
    return t.to(C128) if t.is_complex() else t.double()


def everything(named: dict[str, Any], *choices: Any, plain: bool = False) -> tuple[Tensor, ...]:
    """Return h, last and all gradients, for cotangents that depend on the shapes alone."""
    choices = (*choices, False)[:3]  # state_only, scheme, reverse
    forward = blocked_diagonal.diagonal_scan if plain else leaf
    backward = blocked_diagonal.gradients if plain else leaf_backward
    arguments = [named[n] for n in FIELDS]
    h, last = forward(*arguments, *choices)
    generator = torch.Generator().manual_seed(h.numel())
    g = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype)
    g_last = torch.randn((*last.shape, 2), generator=generator, dtype=torch.float64)
    g_last = torch.view_as_complex(g_last).to(last.dtype)
    return (h, last, *backward(h, g, g_last, *arguments, *choices))


def errors(named: dict[str, Any], *choices: Any) -> list[tuple[float, float]]:
    """Return (compiled, plain) errors of each result against float64, relative in the norm."""
    exact = everything({n: wide(t) for n, t in named.items()}, *choices, plain=True)
    found = []
    results = [everything(named, *choices), everything(named, *choices, plain=True)]
    for got, plain, want in zip(*results, exact, strict=True):
        if want.numel():
            scale = want.norm() + 1e-30
            found.append(tuple(float((wide(t) - want).norm() / scale) for t in (got, plain)))
    return found


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scheme=st.sampled_from(NAMES),
    mode=st.booleans(),
    length=st.sampled_from((1, 2, 31, 63, 64, 65, 129, 300)),
    size=st.sampled_from((1, 3, 16, 17, 33, 64)),
    optional=st.sets(st.sampled_from(("h0", "timesteps", "reset", "mask"))),
    step=st.sampled_from((None, "steps", "dt")),
    reverse=st.booleans(),
)
def test_any_arguments_are_as_in_plain_pytorch(
    seed: int,
    scheme: str,
    mode: bool,
    length: int,
    size: int,
    optional: set[str],
    step: Any,
    reverse: bool,
) -> None:
    chosen = (*sorted(optional), *((step,) if step else ()))
    named = problem(seed, 2, length, size, optional=chosen, scheme=scheme)
    for compiled, plain in errors(named, mode, scheme, reverse):
        assert compiled <= 2 * plain + 2e-5  # a sum that nearly cancels, as of one channel


@pytest.mark.parametrize(
    ("scheme", "optional"),
    [
        ("none", ("h0",)),
        ("zoh", ("steps", "h0", "timesteps")),
        ("zoh", ("dt",)),
        ("dirac", ("steps", "timesteps")),
        ("bilinear", ("steps", "timesteps")),
    ],
)
def test_errors_are_at_most_twice_those_of_plain_pytorch(
    scheme: str, optional: tuple[str, ...]
) -> None:
    cases = [problem(seed, 2, 200, 33, optional=optional, scheme=scheme) for seed in range(6)]
    for pairs in zip(*(errors(named, False, scheme) for named in cases), strict=True):
        compiled, plain = (sum(errors) for errors in zip(*pairs, strict=True))
        assert compiled <= 2 * plain


@pytest.mark.parametrize("scheme", NAMES)
def test_float64_is_exact(scheme: str) -> None:
    named = problem(1, scheme=scheme, dtype=torch.float64)
    for got, want in zip(
        everything(named, False, scheme), everything(named, False, scheme, plain=True), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scheme", [n for n in NAMES if n != "none"])
@pytest.mark.parametrize("state_only", [False, True])
def test_extreme_eigenvalues_and_steps(scheme: str, state_only: bool) -> None:
    """No decay, no rotation, A = 0, steps of zero and huge ones, phi1 at its changes of form."""
    named = problem(3, 2, 20, 8, optional=("steps", "timesteps"), scheme=scheme)
    named["A"] = torch.tensor(
        [0, -1e-8, -0.4999, -0.5001, -1e4, 1e-3j, -1e-5 + 0.4999j, -30 + 300j],
        dtype=torch.complex64,
    )
    named["steps"] = torch.ones(8)
    named["timesteps"][:, ::3] = 0
    named["timesteps"][:, 1] = 1e3
    for compiled, plain in errors(named, state_only, scheme):
        assert compiled <= 2 * plain + 1e-6


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_spreads_alike(scheme: str, bad: float) -> None:
    named = problem(4, 3, 12, 3, optional=("steps", "reset"), scheme=scheme)
    named["x"][1, 4, 2] = bad
    h, last = leaf(*(named[n] for n in FIELDS), False, scheme)
    want, end = blocked_diagonal.diagonal_scan(*(named[n] for n in FIELDS), False, scheme)
    assert torch.equal(h.isfinite(), want.isfinite())
    assert torch.equal(last.isfinite(), end.isfinite())
    kept = want.isfinite()
    torch.testing.assert_close(h[kept], want[kept])


def test_angles_beyond_the_kernels_range_go_to_plain_pytorch() -> None:
    named = problem(5, optional=("timesteps",), scheme="dirac")
    named["timesteps"] = named["timesteps"] * 1e9
    for got, want in zip(
        everything(named, True, "dirac"), everything(named, True, "dirac", plain=True), strict=True
    ):
        assert torch.equal(got, want)
        assert got.isfinite().all()


@pytest.mark.parametrize("scheme", ["none", "zoh"])
def test_results_do_not_change_from_run_to_run(scheme: str, threads: None) -> None:
    named = problem(6, 3, 300, 200, scheme=scheme)
    per_count = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, second = (everything(named, False, scheme) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        per_count.append(first)
    for other in per_count[1:]:
        for a, b in zip(per_count[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def test_one_wide_row_is_dealt_out_in_blocks(threads: None) -> None:
    named = problem(7, 1, 400, 300, optional=("dt", "h0", "timesteps"))
    torch.set_num_threads(4)
    for compiled, plain in errors(named, False, "zoh"):
        assert compiled <= 2 * plain + 5e-7


def test_a_million_steps() -> None:
    length = 10**6
    x = torch.randn(1, length, 2, generator=torch.Generator().manual_seed(0))
    A = torch.tensor([0.9 * 1j], dtype=torch.complex64)
    named: dict[str, Any] = dict.fromkeys(FIELDS) | {"x": x, "A": A}
    for compiled, plain in errors(named, False, "none"):
        assert compiled <= 2 * plain + 5e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_have_wide_states(dtype: torch.dtype) -> None:
    """Only what comes in and goes out is rounded: a long sum of small drives does not stall."""
    named = problem(8, 1, 4000, 4, optional=("h0",), scheme="none")
    named["A"] = torch.full((4,), 1 - 1e-4, dtype=torch.complex64)
    named["x"] = torch.full((1, 4000, 8), 2.0**-10, dtype=dtype)
    h, last = leaf(*(named[n] for n in FIELDS), False, "none")
    exact = {n: wide(t) for n, t in named.items()}
    want, end = blocked_diagonal.diagonal_scan(*(exact[n] for n in FIELDS), False, "none")
    assert h.dtype == dtype
    torch.testing.assert_close(wide(last), end, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.double(), want, rtol=4e-3, atol=1e-3)


def test_parameters_of_several_models() -> None:
    """A vmap over parameters: each has its own A and steps."""
    rows = [problem(i, 2, 40, 3) for i in range(3)]
    stacked = {n: None if rows[0][n] is None else torch.stack([r[n] for r in rows]) for n in FIELDS}
    together = everything(stacked, False, "zoh")
    h, last = together[:2]
    for i, row in enumerate(rows):
        want = leaf(*(row[n] for n in FIELDS), False, "zoh")
        torch.testing.assert_close((h[i], last[i]), want)
    plain = everything(stacked, False, "zoh", plain=True)
    for got, want in zip(together, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
