"""The frequency view of every time-invariant model: closed forms against what the models compute.

The oracle of most tests is the dense float64 system of `dense_models`, which uses nothing of the
library; comparisons with scipy and python-control stand in `test_frequency_packages.py`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import dense_models
import pytest
import torch
from model_cases import CASES, INVARIANT, Case, assert_agree, every_invariant_case
from torch import Tensor
from torch.func import grad, jacfwd, vmap

from lrnnx_core import frequency, registry
from lrnnx_core.registry import MODELS

F32, F64 = torch.float32, torch.float64
EXACT = 1e-12
OMEGA = torch.tensor([0.0, 1e-3, 0.05, 0.7, 2.2, math.pi, -0.7], dtype=F64)
FIRST_INVARIANT = [next(c for c in INVARIANT if c.entry is m) for m in MODELS.values() if
                   m.kind == "lti"]  # fmt: skip
BIDIRECTIONAL = [c for c in INVARIANT if c.bidirectional]

first_invariant_case = pytest.mark.parametrize("case", FIRST_INVARIANT, ids=str)
two_sided = pytest.mark.parametrize("case", BIDIRECTIONAL, ids=str)
with_equations = pytest.mark.parametrize(
    "case", [c for c in INVARIANT if c.entry.name in dense_models.DENSE], ids=str
)
at_two_rates = pytest.mark.parametrize("dt_scale", [1.0, 1.7])


@cache
def damped(case: Case) -> dict[str, Tensor]:
    """Return parameters of which the slowest mode forgets 1e-17 of itself in few samples."""
    for seed in range(50):
        params = case.params(3, 4, seed=seed)
        if "log_dt" in params:
            params["log_dt"] = params["log_dt"] + 2
        if 0 < frequency.summary(case.model, params).slowest < 400:
            return params
    raise AssertionError(f"{case}: no draw is damped")


def memory(case: Case, params: dict[str, Tensor], **options: Any) -> int:
    """Return the samples after which exp(-40) of the slowest mode is left."""
    return math.ceil(40 * float(frequency.summary(case.model, params, **options).slowest)) + 1


def transform(h: Tensor, lags: Tensor, axis: int, omega: Tensor = OMEGA) -> Tensor:
    """Return sum_t h_t exp(-i omega t), with the frequencies in the place of time."""
    waves = torch.exp(-1j * omega[:, None] * lags)
    return torch.tensordot(waves, h.movedim(axis, 0) + 0j, dims=1).movedim(0, axis)


def axis(case: Case) -> int:
    return -2 if case.entry.connectivity == "siso" else -3


# ---------------------------------------------------------------------------- frequency responses


@at_two_rates
@every_invariant_case
def test_it_is_the_fourier_transform_of_a_long_kernel(case: Case, dt_scale: float) -> None:
    params = damped(case)
    length = memory(case, params, dt_scale=dt_scale)
    h = frequency.impulse_response(case.model, params, length, dt_scale=dt_scale)
    first = 1 - length if case.bidirectional else 0
    want = transform(h, torch.arange(first, length, dtype=F64), axis(case))
    got = frequency.frequency_response(case.model, params, OMEGA, dt_scale=dt_scale)
    assert_agree(got, want, EXACT)


@at_two_rates
@every_invariant_case
def test_a_sinusoid_comes_out_scaled_and_shifted(case: Case, dt_scale: float) -> None:
    params = damped(case)
    settled = memory(case, params, dt_scale=dt_scale)
    length = settled + 8 + settled * case.bidirectional
    t = torch.arange(length, dtype=F64)
    seen = slice(settled, settled + 8)
    for omega in (0.0, 0.3, 2.0):
        at = torch.tensor(omega, dtype=F64)
        H = case.model.frequency_response(params, at, dt_scale=dt_scale)
        for channel in range(3):
            u = torch.zeros(length, 3, dtype=F64)
            u[:, channel] = torch.cos(omega * t + 0.4)
            y, _ = case.model.scan(params, u, dt_scale=dt_scale, mode="scan")
            gain = H[..., channel]  # (), (Ch,) or (H_out,)
            want = (torch.exp(1j * (omega * t[seen] + 0.4))[:, None] * gain.reshape(1, -1)).real
            heard = y[seen]
            if case.entry.connectivity == "siso":
                heard = heard.unflatten(-1, (-1, 3))[..., channel]
            assert_agree(heard, want, 1e-11, f"omega = {omega}, channel {channel}")


def discrete_system(case: Case, params: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
    """Return the dense system and its full matrices A_bar (S, N, N), B_bar (S, N, I)."""
    system = dense_models.joined(dense_models.DENSE[case.entry.name](params, case.choices))
    one = torch.ones((), dtype=F64)
    scheme = "zoh" if case.scheme == "async" else case.scheme  # the same in uniform time
    pair = dense_models.steps(system, scheme, one, one, case.choices.get("alpha"))
    A_bar, B_bar = (m.reshape(m.shape[-3:]) for m in pair)
    return system, A_bar, B_bar


@with_equations
def test_it_is_the_resolvent_of_the_dense_system(case: Case) -> None:
    params = case.params()
    system, A_bar, B_bar = discrete_system(case, params)
    eye = torch.eye(A_bar.shape[-1], dtype=A_bar.dtype)
    for omega in OMEGA:
        turn = torch.exp(1j * omega)

        def one_way(C: Tensor, turn: Tensor) -> Tensor:
            # of a real output Re(C x): half of the system and half of its conjugate at -omega
            ahead = turn * C @ torch.linalg.solve(turn * eye - A_bar, B_bar)
            back = turn.conj() * C @ torch.linalg.solve(turn.conj() * eye - A_bar, B_bar)
            return (ahead + back.conj()) / 2  # (S, O, I)

        H = one_way(system.C, turn)
        if system.C2 is not None:
            H = H + turn**system.lag * one_way(system.C2, turn.conj())
        if system.siso:
            want = H[..., 0].mT + system.D.reshape(-1, 3)  # (Ch, H)
            want = want if params["D"].ndim == 2 else want[0]
        else:
            want = H[0] + (torch.diag(system.D) if system.D.ndim == 1 else system.D)
        assert_agree(case.model.frequency_response(params, omega), want, EXACT, f"{omega}")


@two_sided
def test_of_both_directions_it_is_the_sum(case: Case) -> None:
    params, m = case.params(), case.entry
    options = {k: v for k, v in case.choices.items() if k in registry.options(m, "kernel")}
    one_way = {k: v for k, v in params.items() if not k.startswith("C2")}
    other = one_way | {k.replace("C2", "C"): v for k, v in params.items() if k.startswith("C2")}
    other |= {k: torch.zeros_like(v) for k, v in params.items() if k == "D"}
    options["bidirectional"] = False
    forward = m.frequency_response(one_way, OMEGA, **options)
    backward = m.frequency_response(other, -OMEGA, **options)
    if m.connectivity == "siso":  # the reverse half starts at the next sample
        backward = backward * torch.exp(1j * OMEGA)[:, None]
    assert_agree(case.model.frequency_response(params, OMEGA), forward + backward, EXACT)


@every_invariant_case
def test_any_shape_of_omega(case: Case) -> None:
    params = case.params()
    row = case.model.frequency_response(params, OMEGA[:6])
    assert row.dtype == torch.complex128
    where = axis(case)
    grid = case.model.frequency_response(params, OMEGA[:6].reshape(2, 3))
    at = row.ndim + where
    assert_agree(grid, row.unflatten(at, (2, 3)), 0.0)
    assert_agree(case.model.frequency_response(params, OMEGA[3]), row.select(at, 3), EXACT)
    empty = case.model.frequency_response(params, OMEGA[:0])
    assert empty.shape == row.narrow(at, 0, 0).shape
    mapped = vmap(lambda w: case.model.frequency_response(params, w), out_dims=at)(OMEGA[:6])
    assert_agree(mapped, row, EXACT)


@every_invariant_case
def test_the_response_at_minus_omega_is_the_conjugate(case: Case) -> None:
    params = case.params()
    got = case.model.frequency_response(params, -OMEGA)
    assert_agree(got, case.model.frequency_response(params, OMEGA).conj(), EXACT)


@every_invariant_case
def test_gradients_of_parameters_and_omega_are_right(case: Case) -> None:
    params = case.params(2, 2)
    keys = list(params)

    def run(omega: Tensor, *values: Tensor) -> Tensor:
        return torch.view_as_real(
            case.model.frequency_response(dict(zip(keys, values, strict=True)), omega)
        )

    inputs = [OMEGA[1:4].clone(), *params.values()]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


@first_invariant_case
def test_second_derivatives_in_omega_agree_in_both_modes(case: Case) -> None:
    params = case.params()

    def power(omega: Tensor) -> Tensor:
        return case.model.frequency_response(params, omega).abs().square().sum()

    forward = vmap(jacfwd(jacfwd(power)))(OMEGA)
    assert_agree(forward, vmap(grad(grad(power)))(OMEGA), 1e-11)


@every_invariant_case
def test_float32_keeps_its_digits(case: Case) -> None:
    params = case.params(2, 4, dtype=F32)
    wide = {k: v.double() for k, v in params.items()}
    want = case.model.frequency_response(wide, OMEGA)
    got = case.model.frequency_response(params, OMEGA.float())
    assert got.dtype == torch.complex64
    # measured over four draws: 4e-6, and 1.2e-4 where the scheme gives A_bar and not its logarithm:
    # rounding A_bar alone then moves 1 - A_bar by eps / |1 - A_bar|
    assert_agree(got, want, 1e-5 if case.exponential else 2e-4)
    assert_agree(case.model.frequency_response(params, OMEGA), want, EXACT, "a float64 omega")


@pytest.mark.parametrize("case", [c for c in FIRST_INVARIANT if c.exponential], ids=str)
def test_a_mode_near_the_unit_circle_keeps_its_digits_in_float32(case: Case) -> None:
    """1 - A_bar itself would keep two: eps / (1 - |A_bar|) = 1e-7 / 1e-5."""
    params = case.params(2, 4, dtype=F32)
    wide = {k: v.double() for k, v in params.items()}
    omega = torch.tensor([0.0, 1e-5], dtype=F32)
    got = case.model.frequency_response(params, omega, dt_scale=1e-5)
    want = case.model.frequency_response(wide, omega.double(), dt_scale=1e-5)
    assert_agree(got, want, 1e-6)


@first_invariant_case
def test_a_bad_omega_is_refused(case: Case) -> None:
    params = case.params()
    name = case.entry.name
    for bad in (torch.arange(3), OMEGA + 0j):
        with pytest.raises(ValueError, match=rf"{name}.frequency_response: omega has dtype .*real"):
            case.model.frequency_response(params, bad)
    with pytest.raises(ValueError, match=rf"{name}.frequency_response: omega is on meta"):
        case.model.frequency_response(params, OMEGA.to("meta"))
    if case.takes("frequency_response", "bidirectional"):
        with pytest.raises(ValueError, match=rf"{name}.frequency_response: params have no C2"):
            case.model.frequency_response(params, OMEGA, bidirectional=True)


@pytest.mark.compile
@first_invariant_case
def test_it_compiles(case: Case) -> None:
    params = case.params()
    f = torch.compile(case.model.frequency_response, fullgraph=True, backend="aot_eager")
    assert_agree(f(params, OMEGA), case.model.frequency_response(params, OMEGA), EXACT)


# ------------------------------------------------------------------- impulse and step responses


def loud(case: Case, params: dict[str, Tensor], u: Tensor) -> Tensor:
    """Run over u (n, L, 3) of n inputs; return y as (L, H), (Ch, L, H) or (L, H_out, H)."""
    y, _ = case.model.scan(params, u, mode="scan")
    if case.entry.connectivity == "mimo":
        return y.movedim(0, -1)
    y = y.unflatten(-1, (-1, 3))  # (input, t, Ch, H)
    y = torch.stack([y[h, ..., h] for h in range(3)], dim=-1).movedim(1, 0)
    return y if case.choices.get("channels", 1) > 1 else y[0]


@every_invariant_case
def test_impulse_response_is_what_scan_does(case: Case) -> None:
    params = case.params()
    for length in (1, 7):
        start = length - 1 if case.bidirectional else 0
        u = torch.zeros(3, length + start, 3, dtype=F64)
        u[:, start] = torch.eye(3)
        got = frequency.impulse_response(case.model, params, length)
        assert_agree(got, loud(case, params, u), EXACT)


@every_invariant_case
def test_step_response_is_what_scan_does(case: Case) -> None:
    params = damped(case)
    after = memory(case, params) if case.bidirectional else 0
    for length in (1, 7):
        before = length - 1 if case.bidirectional else 0
        u = torch.zeros(3, before + length + after, 3, dtype=F64)
        u[:, before:] = torch.eye(3)[:, None]
        got = frequency.step_response(case.model, params, length)
        where = axis(case)
        assert_agree(got, loud(case, params, u).narrow(where, 0, before + length), 1e-11)


@every_invariant_case
def test_a_step_settles_at_the_response_at_zero(case: Case) -> None:
    params = damped(case)
    end = frequency.step_response(case.model, params, memory(case, params)).select(axis(case), -1)
    still = frequency.frequency_response(case.model, params, torch.zeros((), dtype=F64))
    assert_agree(end + 0j, still, 1e-11)


@pytest.mark.parametrize("case", FIRST_INVARIANT, ids=str)
def test_options_may_be_given_or_bound(case: Case) -> None:
    params = case.params()
    by_name = frequency.impulse_response(case.entry.title, params, 5, dt_scale=0.5)
    bound = registry.bind(case.entry.name, **case.choices)._replace()
    assert_agree(frequency.impulse_response(bound, params, 5, dt_scale=0.5), by_name, 0.0)


# -------------------------------------------------------------------- eigenvalues, time constants


@with_equations
def test_eigenvalues_are_those_of_the_dense_matrix(case: Case) -> None:
    params = case.params()
    system, A_bar, _ = discrete_system(case, params)
    want = torch.linalg.eigvals(A_bar)
    got = frequency.eigenvalues(case.model, params, conjugates=True)
    if want.shape[-1] == system.stored and got.is_complex():  # no pairs: the real system has them
        want = torch.cat([want, want.conj()], dim=-1)
    got = got + 0j
    got = got if system.siso else got.reshape(want.shape)
    assert got.shape == want.shape
    for mine, theirs in zip(got, want, strict=True):
        distance = (mine[:, None] - theirs).abs()
        assert distance.min(0).values.max() < 1e-10
        assert distance.min(1).values.max() < 1e-10


@every_invariant_case
def test_time_constants_are_when_a_mode_has_fallen_to_one_over_e(case: Case) -> None:
    params = case.params()
    values = frequency.eigenvalues(case.model, params)
    times = frequency.time_constants(case.model, params)
    assert times.shape == values.shape
    assert not times.is_complex()
    assert_agree(values.abs() ** times, torch.full_like(times, math.exp(-1)), 1e-9)
    turns = frequency.periods(case.model, params)
    assert (turns >= 2 - 1e-12).all()
    spun = torch.polar(torch.ones_like(turns), values.angle().abs() * turns)
    oscillates = turns.isfinite()
    one = torch.ones((), dtype=torch.complex128)
    assert_agree(spun[oscillates], one.expand_as(spun[oscillates]), 1e-9)


def s5_with(re: list[float], im: list[float]) -> dict[str, Tensor]:
    """Return an S5 whose A_bar is exp(re + i im), or 1 + re + i im under Euler."""
    params = MODELS["s5"].init(2, 2 * len(re), dtype=F64)
    zeros = torch.zeros(len(re), dtype=F64)
    return params | {"Lambda_re": zeros + torch.tensor(re).double(), "log_dt": zeros,
                     "Lambda_im": zeros + torch.tensor(im).double()}  # fmt: skip


def test_time_constants_on_outside_and_at_the_centre_of_the_circle() -> None:
    params = s5_with([-0.5, 0.0, 0.25], [0.0, 1.0, 0.0])
    got = frequency.time_constants("s5", params)
    torch.testing.assert_close(got, torch.tensor([2.0, math.inf, -4.0], dtype=F64))
    params = s5_with([-1.0, -2.0], [0.0, 0.0])  # Euler: 0 and -1
    got = frequency.time_constants("s5", params, discretization="euler")
    torch.testing.assert_close(got, torch.tensor([0.0, math.inf], dtype=F64))
    got = frequency.periods("s5", params, discretization="euler")
    assert got[1] == 2


def test_a_summary() -> None:
    params = s5_with([-0.5, -0.01], [0.1, -math.pi / 4])
    s = frequency.summary("s5", params)
    want = frequency.Summary(
        *(torch.tensor(x).double() for x in (math.exp(-0.01), 100.0, 2.0, 8.0, 20 * math.pi))
    )
    torch.testing.assert_close(s, want)
    unstable = frequency.summary("s5", s5_with([0.1, -0.5], [0.0, 1.0]))
    assert unstable.spectral_radius > 1
    torch.testing.assert_close(unstable.slowest, torch.tensor(-10.0).double())
    assert unstable.longest_period.isinf()


def test_a_sweep_and_a_gradient_of_a_time_constant() -> None:
    """The idiom: what step size gives a memory of 50 samples?"""
    params = MODELS["lru"].init(2, 4, dtype=F64)
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    got = vmap(lambda s: frequency.summary("lru", params, dt_scale=s).slowest)(scales)
    torch.testing.assert_close(got, got[1] / scales)
    slope = grad(lambda s: frequency.summary("lru", params, dt_scale=s).slowest)(scales[1])
    torch.testing.assert_close(slope, -got[1])


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call",
    [
        lambda m, p: frequency.frequency_response(m, p, OMEGA),
        lambda m, p: frequency.impulse_response(m, p, 4),
        lambda m, p: frequency.step_response(m, p, 4),
        frequency.eigenvalues,
        frequency.time_constants,
        frequency.periods,
        frequency.summary,
    ],
    ids=["frequency", "impulse", "step", "eigenvalues", "times", "periods", "summary"],
)
def test_time_varying_and_unknown_models_are_refused(call: Any) -> None:
    for case in CASES:
        if case.entry.kind == "ltv" and case.variant.name == "default":
            with pytest.raises(ValueError, match=f"{case.entry.title} varies in time; expected"):
                call(case.entry, case.params())
    with pytest.raises(ValueError, match="unknown model 'ss5'"):
        call("ss5", {})


def test_other_bad_input_is_refused() -> None:
    params = MODELS["s5"].init(2, 4)
    for call in (frequency.impulse_response, frequency.step_response):
        with pytest.raises(ValueError, match=r"length = 0, expected >= 1"):
            call("s5", params, 0)
    with pytest.raises(ValueError, match="eigenvalues: integration_timesteps vary in time"):
        frequency.eigenvalues("s5", params, integration_timesteps=torch.ones(3))
