"""Every discretization against the matrix exponential and the identities between schemes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lrnnx_core.discretize import (
    EXPONENTIAL,
    NAMES,
    SCHEMES,
    discretize,
    phi1,
    resolve,
)

F64, C128 = torch.float64, torch.complex128
STEPPED = [n for n in NAMES if n != "none"]
EXACT = 1e-13


def options(name: str, alpha: float = 0.5) -> dict[str, Any]:
    return {"discretization": name} | ({"alpha": alpha} if name == "gbt" else {})


def spectrum(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return A (n,) with Re A < 0 and dt (n,)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, generator=generator, dtype=F64)  # noqa: E731
    return torch.complex(-draw().exp(), 3 * draw()), (draw() - 1).exp()


def close(got: Tensor, want: Tensor, rtol: float = EXACT) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------- against formulas


def exponential(M: Tensor) -> Tensor:
    # a batch of two: PyTorch 2.13 is off by 1e-10 for a single small matrix
    return torch.linalg.matrix_exp(torch.stack([M, M]))[0]


@pytest.mark.parametrize("timed", [1.0, 0.3, 2.5])
def test_zoh_is_the_block_matrix_exponential(timed: float) -> None:
    A, dt = spectrum()
    A_bar, gamma = discretize(A, timed * dt, discretization="zoh")
    for a, step, got, gain in zip(A, timed * dt, A_bar, gamma, strict=True):
        # real form of x' = a x + u for complex x and real u
        block = torch.zeros(3, 3, dtype=F64)
        block[:2, :2] = torch.tensor([[a.real, -a.imag], [a.imag, a.real]])
        block[0, 2] = 1
        E = exponential(step * block)
        close(torch.view_as_real(got), E[:2, 0], 1e-12)
        close(torch.view_as_real(gain), E[:2, 2], 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_gbt_solves_its_implicit_step(alpha: float) -> None:
    A, dt = spectrum()
    A_bar, gamma = discretize(A, dt, discretization="gbt", alpha=alpha)
    x, u = torch.randn(6, dtype=C128), torch.randn(6, dtype=C128)
    new = A_bar * x + gamma * u
    close(new, x + dt * A * ((1 - alpha) * x + alpha * new) + dt * u)


def test_the_table_of_schemes() -> None:
    A, dt = spectrum()
    z = dt * A
    table = {
        "zoh": (z.exp(), (z.exp() - 1) / A),
        "bilinear": ((1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)),
        "euler": (1 + z, dt + 0 * z),
        "dirac": (z.exp(), torch.ones_like(z)),
        "mamba": (z.exp(), dt + 0 * z),
        "async": (z.exp(), (z.exp() - 1) / A),
        "none": (A, torch.ones_like(z)),
        "gbt": (1 / (1 - z), dt / (1 - z)),
    }
    assert set(table) == set(NAMES)
    for name, want in table.items():
        got = discretize(A, dt, **options(name, alpha=1.0))
        for g, w in zip(got, want, strict=True):
            close(g, w, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_real_A_gives_real_results_equal_to_the_complex_ones(name: str) -> None:
    A, dt = spectrum()
    real = discretize(A.real, dt, **options(name))
    for r, c in zip(real, discretize(A.real + 0j, dt, **options(name)), strict=True):
        assert r.dtype == F64
        close(r + 0j, c)


# -------------------------------------------------------------------------------------- identities


def test_gbt_contains_euler_bilinear_and_backward_euler() -> None:
    A, dt = spectrum()
    for alpha, name in ((0.0, "euler"), (0.5, "bilinear")):
        for g, w in zip(
            discretize(A, dt, discretization="gbt", alpha=alpha),
            discretize(A, dt, discretization=name),
            strict=True,
        ):
            close(g, w)


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("mode", ["both", "state_only"])
def test_timesteps_of_one_are_none(name: str, mode: Any) -> None:
    A, dt = spectrum()
    ones = torch.ones(2, 5, dtype=F64)
    got = discretize(A, dt, **options(name), integration_timesteps=ones, timestep_mode=mode)
    for g, w in zip(got, discretize(A, dt, **options(name)), strict=True):
        close(g, w.expand(g.shape))


@pytest.mark.parametrize("name", STEPPED)
def test_timesteps_scale_decay_and_gain_or_the_decay_alone(name: str) -> None:
    A, dt = spectrum()
    gaps = torch.tensor([[0.0, 0.5, 2.0]], dtype=F64)
    both = discretize(A, dt, **options(name), integration_timesteps=gaps)
    only = discretize(
        A, dt, **options(name), integration_timesteps=gaps, timestep_mode="state_only"
    )
    assert both[0].shape == only[0].shape == (1, 3, 6)
    assert only[1].shape == (6,)
    for i, gap in enumerate([0.0, 0.5, 2.0]):
        scaled = discretize(A, gap * dt, **options(name))
        close(only[0][0, i], scaled[0])
        if name == "async":  # is state_only whatever is asked
            close(both[0][0, i], scaled[0])
            continue
        close(both[0][0, i], scaled[0])
        close(both[1][0, i], scaled[1])
    close(only[1], discretize(A, dt, **options(name))[1])
    # no time elapsed: nothing decays, and what an input adds in no time is nothing (but an impulse)
    close(both[0][0, 0], torch.ones(6, dtype=C128))
    if name not in ("async", "dirac"):
        close(both[1][0, 0], torch.zeros(6, dtype=C128))


def test_async_is_zoh_with_state_only() -> None:
    A, dt = spectrum()
    gaps = torch.rand(4, dtype=F64)
    for mode in ("both", "state_only"):
        got = discretize(
            A, dt, discretization="async", integration_timesteps=gaps, timestep_mode=mode
        )
        want = discretize(
            A, dt, discretization="zoh", integration_timesteps=gaps, timestep_mode="state_only"
        )
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)


@pytest.mark.parametrize("name", [n for n in STEPPED if n != "async"])
def test_merging_two_gaps_is_exact_for_exponential_decay_only(name: str) -> None:
    A, dt = spectrum()
    gaps = torch.tensor([0.4, 1.1, 1.5], dtype=F64)
    decay, _ = discretize(A, dt, **options(name), integration_timesteps=gaps)
    error = (decay[0] * decay[1] - decay[2]).abs().max()
    assert error < 1e-14 if name in EXPONENTIAL else error > 1e-4


def test_zoh_over_two_steps_composes() -> None:
    A, dt = spectrum()
    (a, g), (a2, g2) = (discretize(A, s * dt, discretization="zoh") for s in (1.0, 2.0))
    close(a2, a * a)
    close(g2, a * g + g)  # the same input held for two steps


@pytest.mark.parametrize("name", STEPPED)
def test_schemes_agree_to_second_order_for_small_steps(name: str) -> None:
    A, dt = spectrum()
    small = 1e-5 * dt
    decay, gain = discretize(A, small, **options(name))
    close(decay, 1 + small * A, 1e-8)
    if name != "dirac":  # an impulse is not scaled by the step
        close(gain / small, torch.ones(6, dtype=C128), 1e-3)


# -------------------------------------------------------------------------------------- properties

FINITE = {"allow_nan": False, "allow_infinity": False}


@given(
    re=st.floats(-1e3, -1e-3, **FINITE),
    im=st.floats(-1e3, 1e3, **FINITE),
    dt=st.floats(1e-4, 1e2, **FINITE),
    alpha=st.floats(0.5, 1.0, **FINITE),
)
def test_decays_stay_inside_the_unit_circle_for_every_stable_A_and_step(
    re: float, im: float, dt: float, alpha: float
) -> None:
    A, step = torch.tensor(complex(re, im), dtype=C128), torch.tensor(dt, dtype=F64)
    for name in ("zoh", "dirac", "mamba", "async", "bilinear", "gbt"):
        A_bar, gamma = discretize(A, step, **options(name, alpha))
        assert A_bar.abs() < 1, name
        assert torch.isfinite(torch.view_as_real(gamma)).all()
    A_bar, _ = discretize(-A, step, discretization="bilinear")
    assert A_bar.abs() > 1
    A_bar, _ = discretize(A, step, discretization="euler")
    limit = -2 * re / (re * re + im * im)
    if dt < limit * (1 - 1e-9):
        assert A_bar.abs() < 1
    if dt > limit * (1 + 1e-9):
        assert A_bar.abs() > 1


@given(re=st.floats(-50, 0, **FINITE), im=st.floats(-50, 50, **FINITE))
def test_phi1_is_right_everywhere_in_float64_and_complex64(re: float, im: float) -> None:
    z = torch.tensor(complex(re, im), dtype=C128)
    # the quotient is right away from 0; near it the series
    want = (
        (torch.exp(z) - 1) / z
        if z.abs() > 0.5
        else sum(z**k / float(math.factorial(k + 1)) for k in range(25))
    )
    got = phi1(z)
    assert (got - want).abs() <= 1e-13 * want.abs() + 1e-15
    narrow = z.to(torch.complex64)
    exact = phi1(narrow.to(C128))
    assert (phi1(narrow).to(C128) - exact).abs() <= 1e-6 * exact.abs() + 1e-7


@pytest.mark.parametrize("magnitude", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-20, 1e-38, 0.0])
def test_zoh_is_exact_in_complex64_at_tiny_arguments(magnitude: float) -> None:
    for phase in (0.0, 0.7, math.pi / 2, math.pi):
        z = torch.polar(torch.tensor(magnitude), torch.tensor(phase))
        got = phi1(z)
        want = 1 + z.to(C128) / 2 + z.to(C128) ** 2 / 6
        assert (got.to(C128) - want).abs() < 2e-7
        z = z.clone().requires_grad_()
        out = torch.view_as_real(phi1(z))
        (g,) = torch.autograd.grad(out[0], z, create_graph=True)
        assert abs(complex(g.detach()) - 0.5) < 2 * magnitude + 1e-6
        (h,) = torch.autograd.grad(torch.view_as_real(g)[0], z)
        assert abs(complex(h) - 1 / 3) < 2 * magnitude + 1e-6


def test_the_gradient_of_phi1_does_not_jump_where_the_formula_changes() -> None:
    for dtype, tolerance in ((torch.complex64, 3e-5), (C128, 1e-13)):
        for radius in (0.2999, 0.3001):
            z = torch.polar(torch.tensor(radius, dtype=F64), torch.tensor(2.0, dtype=F64))
            exact = sum((k * z ** (k - 1)) / float(math.factorial(k + 1)) for k in range(1, 30))
            z = z.to(dtype).requires_grad_()
            (g,) = torch.autograd.grad(torch.view_as_real(phi1(z))[0], z)
            assert abs(complex(g.conj()) - complex(exact)) < tolerance


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("A", "dt"),
    [
        ([-0.5 + 3j, -2 - 1j], [0.1, 0.7]),
        ([0j, -0.5 + 3j], [0.1, 0.7]),
        ([-0.5 + 3j, 0j], [1e-8, 0.0]),
    ],
    ids=["ordinary", "A is 0", "dt is 0"],
)
def test_first_and_second_derivatives_are_right(
    name: str, A: list[complex], dt: list[float]
) -> None:
    a = torch.tensor(A, dtype=C128, requires_grad=True)
    step = torch.tensor(dt, dtype=F64, requires_grad=True)
    run = lambda a, d: discretize(a, d, **options(name, 0.7))  # noqa: E731
    used = [o for o in run(a, step) if o.requires_grad]
    assert used
    only = lambda a, d: tuple(o for o in run(a, d) if o.requires_grad)  # noqa: E731
    assert gradcheck(only, (a, step))
    assert gradgradcheck(only, (a, step))


@pytest.mark.parametrize("mode", ["both", "state_only"])
@pytest.mark.parametrize("name", STEPPED)
def test_derivatives_of_timesteps_and_alpha_are_right(name: str, mode: Any) -> None:
    A, dt = spectrum(2)
    gaps = torch.tensor([0.0, 0.7], dtype=F64, requires_grad=True)
    alpha = torch.tensor(0.6, dtype=F64, requires_grad=True)

    def run(gaps: Tensor, alpha: Tensor) -> Any:
        more = {"alpha": alpha} if name == "gbt" else {}
        A_bar, gamma = discretize(
            A, dt, discretization=name, integration_timesteps=gaps, timestep_mode=mode, **more
        )
        return (A_bar, gamma) if gamma.requires_grad else A_bar

    inputs = (gaps, alpha) if name == "gbt" else (gaps, alpha.detach())
    assert gradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
def test_float32_gradients_are_finite_and_right_at_zero(dtype: torch.dtype) -> None:
    for value in (0.0, 1e-30, 1e-20, 1e-8):
        A = torch.full((1,), -value, dtype=dtype, requires_grad=True)
        dt = torch.tensor([1.0], requires_grad=True)
        A_bar, gamma = discretize(A, dt, discretization="zoh")
        reals = [x.real if x.is_complex() else x for x in (A_bar, gamma)]
        for out, want in zip(reals, (1.0, 0.5), strict=True):
            (g,) = torch.autograd.grad(out.sum(), A, retain_graph=True)
            assert abs(complex(g) - want) < 1e-6
        (g,) = torch.autograd.grad(reals[1].sum(), dt)
        assert abs(float(g) - 1) < 1e-6


# ---------------------------------------------------------------------------- schemes of one's own


def test_any_pure_callable_is_a_scheme_and_sees_both_steps() -> None:
    A, dt = spectrum()
    seen = []

    def scheme(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((dt_decay.shape, dt_input.shape))
        return torch.exp(dt_decay * A), dt_input * (1 + dt_input * A / 2)

    gaps = torch.rand(2, 4, dtype=F64)
    discretize(A, dt, discretization=scheme)
    discretize(A, dt, discretization=scheme, integration_timesteps=gaps)
    A_bar, gamma = discretize(
        A, dt, discretization=scheme, integration_timesteps=gaps, timestep_mode="state_only"
    )
    assert seen == [((6,), (6,)), ((2, 4, 6), (2, 4, 6)), ((2, 4, 6), (6,))]
    close(A_bar, torch.exp(gaps[..., None] * dt * A))
    assert gamma.shape == (6,)


def test_shapes_broadcast() -> None:
    A = torch.randn(5, 3, dtype=C128)
    dt = torch.rand(5, 1, dtype=F64)
    for name in NAMES:
        A_bar, gamma = discretize(A, dt, **options(name))
        assert A_bar.shape == (5, 3), name
        assert gamma.broadcast_to(5, 3).shape == (5, 3)
        if name != "none":
            gaps = torch.rand(2, 7, dtype=F64)
            A_bar, gamma = discretize(A, dt, **options(name), integration_timesteps=gaps)
            assert A_bar.shape == (2, 7, 5, 3)


# ---------------------------------------------------------------------------------------- bad input


def test_errors_say_what_came_and_what_was_expected() -> None:
    A, dt = spectrum()
    gaps = torch.ones(3, dtype=F64)
    with pytest.raises(
        ValueError, match=r"discretize: unknown discretization 'tustin'; expected one"
    ) as e:
        discretize(A, dt, discretization="tustin")
    assert all(name in str(e.value) for name in NAMES)
    assert "callable (A, dt_decay, dt_input) -> (A_bar, gamma)" in str(e.value)
    with pytest.raises(ValueError, match="discretization='gbt' needs alpha, a number in"):
        discretize(A, dt, discretization="gbt")
    with pytest.raises(ValueError, match="alpha belongs to discretization='gbt', got 'zoh'"):
        discretize(A, dt, discretization="zoh", alpha=0.5)
    with pytest.raises(ValueError, match="timestep_mode 'decay', expected 'both' or 'state_only'"):
        discretize(A, dt, discretization="zoh", timestep_mode="decay")
    with pytest.raises(ValueError, match=r"A \(6,\) and dt \(5,\) do not broadcast"):
        discretize(A, dt[:5], discretization="zoh")
    with pytest.raises(
        ValueError, match="'none' has no step that integration_timesteps could scale"
    ):
        discretize(A, dt, discretization="none", integration_timesteps=gaps)
    with pytest.raises(
        ValueError, match=r"here: unknown discretization 'zoh'; expected one of a, b"
    ):
        resolve("zoh", allowed=("a", "b"), where="here")


def test_every_name_is_a_scheme_or_an_alias() -> None:
    assert set(SCHEMES) | {"gbt", "async"} == set(NAMES)
    assert set(NAMES) > EXPONENTIAL


@pytest.mark.parametrize("alpha", [-0.1, 1.5, 2])
def test_alpha_is_between_euler_and_backward_euler(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha = {alpha}, expected a number in \[0, 1\]"):
        discretize(torch.tensor([-1.0]), torch.tensor([0.1]), discretization="gbt", alpha=alpha)
