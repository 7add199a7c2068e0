"""S7 in both variants, against step-by-step loops written from the equations, and by itself."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import transform_table as table
from backends_both import both_backends  # noqa: F401
from model_cases import assert_agree, gaps, normal
from op_cases import as_real
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

from lrnnx_core import s5, sequences
from lrnnx_core.models import s7
from lrnnx_core.ops.trilinear import trilinear

F64 = torch.float64
EXACT = 1e-12
H, N = 3, 8

VARIANTS: dict[str, dict[str, Any]] = {
    "delta": {},
    "delta_plain": {"stable_reparam": False, "C_init": "lecun_normal"},
    "delta_blocks_all_states": {"blocks": 2, "conj_sym": False, "C_init": "complex_normal"},
    "full": {"variant": "full"},
    "full_upstream": {"variant": "full", "init_memory": "upstream"},
}
every_variant = pytest.mark.parametrize("choices", VARIANTS.values(), ids=VARIANTS)
one_of_each = pytest.mark.parametrize("variant", ["delta", "full"])


def call(choices: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in choices.items() if k in ("variant", "conj_sym")}


def make(
    choices: dict[str, Any], d_model: int = H, d_state: int = N, seed: int = 0, spread: float = 0.2
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = s7.init(d_model, d_state, generator=generator, dtype=F64, **choices)
    return {
        k: v + spread * torch.randn(v.shape, generator=generator, dtype=F64)
        for k, v in params.items()
    }


def first_state(params: dict[str, Tensor], batch: tuple[int, ...], variant: str) -> Tensor:
    like = s7.init_state(params, batch, variant=variant)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def step_of(choices: dict[str, Any]) -> Any:
    return lambda p, u, h, **o: s7.step(p, u, h, **call(choices), **o)


def looped(f: Any, params: Any, u: Tensor, state: Tensor, elapsed: Tensor | None = None) -> Any:
    ys = []
    for t in range(u.shape[-2]):
        gap = {} if elapsed is None else {"integration_timestep": elapsed[..., t]}
        y, state = f(params, u[..., t, :], state, **gap)
        ys.append(y)
    return torch.stack(ys, dim=-2), state


# ------------------------------------------------------------------ the equations, sample by sample


def equations_delta(
    p: dict[str, Tensor],
    u: Tensor,
    x: Tensor,
    *,
    scheme: str = "zoh",
    conj_sym: bool = True,
    elapsed: Tensor | None = None,
    state_only: bool = False,
    alpha: float = 0.5,
) -> tuple[Tensor, Tensor]:
    re = -1 / (p["Lambda_w"] ** 2 + 0.5) if "Lambda_w" in p else p["Lambda_re"]
    lam = torch.complex(re, p["Lambda_im"])
    B, C = (torch.complex(p[k + "_re"], p[k + "_im"]) for k in "BC")
    ys = []
    for t in range(u.shape[0]):
        dt = torch.log(1 + torch.exp(p["step_proj.weight"] @ u[t] + p["step_proj.bias"]))
        tau = 1.0 if elapsed is None else elapsed[t]
        da, db = tau * dt, dt if state_only else tau * dt
        if scheme in ("zoh", "dirac", "mamba"):
            a = torch.exp(lam * da)
        elif scheme == "euler":
            a = 1 + lam * da
        else:
            a = (1 + (1 - alpha) * lam * da) / (1 - alpha * lam * da)
        gain = {
            "zoh": (torch.exp(lam * db) - 1) / lam,
            "dirac": torch.ones_like(lam),
            "mamba": db,
            "euler": db,
            "gbt": db / (1 - alpha * lam * db),
            "bilinear": db / (1 - 0.5 * lam * db),
        }[scheme]
        x = a * x + gain * (B @ u[t].to(B.dtype))
        ys.append((2 if conj_sym else 1) * (C @ x).real + p["D"] * u[t])
    return torch.stack(ys), x


def equations_full(p: dict[str, Tensor], u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    width, states = u.shape[-1], len(h)
    ys = []
    for t in range(u.shape[0]):
        v = p["in_proj.weight"] @ u[t]
        rows = p["x_proj.weight"] @ v
        a = rows[:states] + p["base"]
        B = rows[states : states + width * states].reshape(width, states)
        C = rows[states + width * states : states + 2 * width * states].reshape(width, states)
        d, beta = rows[-width - states : -states], rows[-states:]
        h = (1 - 1 / (a**2 + 0.5)) * h + B.T @ v + beta
        y = C @ h + d * v
        gelu = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        ys.append(y / (1 + torch.exp(-(p["gate_proj.weight"] @ gelu))))
    return torch.stack(ys), h


@every_variant
@pytest.mark.parametrize("length", [1, 2, 7, 33, 130])
def test_every_mode_is_the_recurrence_of_the_equations(
    choices: dict[str, Any], length: int
) -> None:
    params, u = make(choices), normal(length, H)
    variant = choices.get("variant", "delta")
    state = first_state(params, (), variant)
    if variant == "full":
        want = equations_full(params, u, state)
    else:
        want = equations_delta(params, u, state, conj_sym=choices.get("conj_sym", True))
    for mode in s7.MODES:
        assert_agree(s7.scan(params, u, state, mode=mode, **call(choices)), want, EXACT, mode)
    assert_agree(looped(step_of(choices), params, u, state), want, EXACT, "step")
    batched = s7.scan(params, u.expand(2, 1, length, H), state.expand(2, 1, -1), **call(choices))
    assert_agree((batched[0][1, 0], batched[1][1, 0]), want, EXACT, "batch")


@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
@pytest.mark.parametrize("timed", [False, True], ids=["uniform", "irregular"])
def test_every_discretization_of_delta_is_the_equations(timestep_mode: str, timed: bool) -> None:
    params, u = make({}), normal(9, H)
    state, elapsed = first_state(params, (), "delta"), gaps(9) if timed else None
    for scheme in s7.DISCRETIZATIONS:
        alpha = {"alpha": 0.3} if scheme == "gbt" else {}
        want = equations_delta(
            params, u, state, scheme="zoh" if scheme == "async" else scheme, elapsed=elapsed,
            state_only=timestep_mode == "state_only" or scheme == "async", **alpha,
        )  # fmt: skip
        options = {"discretization": scheme, "timestep_mode": timestep_mode, **alpha}
        for mode in s7.MODES:
            got = s7.scan(params, u, state, integration_timesteps=elapsed, mode=mode, **options)
            assert_agree(got, want, EXACT, f"{scheme} {mode}")
        got = looped(lambda *a, o=options, **k: s7.step(*a, **o, **k), params, u, state, elapsed)
        assert_agree(got, want, EXACT, f"{scheme} step")


def test_a_scheme_of_ones_own_runs_and_dt_scale_is_a_constant_gap() -> None:
    params, u = make({}), normal(2, 12, H)

    def backward_euler(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 - dt_decay * A), dt_input / (1 - dt_input * A)

    want = s7.scan(params, u, discretization="gbt", alpha=1.0)
    assert_agree(s7.scan(params, u, discretization=backward_euler), want, EXACT)
    scaled = s7.scan(params, u, dt_scale=1.7)
    elapsed = torch.full((12,), 1.7, dtype=F64)
    assert_agree(s7.scan(params, u, integration_timesteps=elapsed), scaled, EXACT)


@one_of_each
def test_discretize_is_what_scan_runs(variant: str) -> None:
    params, u = make({"variant": variant}), normal(2, 6, H)
    A_bar, B_bar = s7.discretize(params, u, variant=variant)
    beta: Tensor | float = 0.0
    x = u
    if variant == "full":
        x = u @ params["in_proj.weight"].mT
        beta = x @ params["x_proj.weight"][-N:].mT
    drive = (B_bar @ x.unsqueeze(-1).to(B_bar.dtype)).squeeze(-1) + beta
    state = torch.zeros_like(A_bar[:, 0])
    for t in range(6):
        state = A_bar[:, t] * state + drive[:, t]
    assert_agree(state, s7.scan(params, u, variant=variant)[1], EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"discretization": "bilinear"}, {"dt_scale": 0.7}], ids=str
)
def test_delta_with_a_constant_step_is_s5(options: dict[str, Any]) -> None:
    params, u = make({}), normal(2, 40, H)
    params["step_proj.weight"] = torch.zeros_like(params["step_proj.weight"])
    plain = {k: v for k, v in params.items() if not k.startswith("step_proj") and k != "Lambda_w"}
    plain["Lambda_re"] = -1 / (params["Lambda_w"] ** 2 + 0.5)
    plain["log_dt"] = torch.nn.functional.softplus(params["step_proj.bias"]).log()
    state, elapsed = first_state(params, (2,), "delta"), gaps(2, 40)
    assert_agree(s7.scan(params, u, state, **options), s5.scan(plain, u, state, **options), EXACT)
    assert_agree(
        s7.scan(params, u, state, integration_timesteps=elapsed, **options),
        s5.scan(plain, u, state, integration_timesteps=elapsed, **options),
        EXACT,
    )


def test_delta_starts_where_s5_starts() -> None:
    generator = torch.Generator().manual_seed(3)
    params = s7.init(H, N, generator=generator, dtype=F64)
    generator = torch.Generator().manual_seed(3)
    like = s5.init(H, N, generator=generator, dtype=F64)
    for key in ("Lambda_im", "B_re", "B_im", "C_re", "C_im", "D"):
        assert torch.equal(params[key], like[key])
    torch.testing.assert_close(params["Lambda_w"], torch.full((N // 2,), 1.5**0.5, dtype=F64))
    steps = torch.nn.functional.softplus(params["step_proj.bias"])
    torch.testing.assert_close(steps.log(), like["log_dt"])
    assert params["step_proj.weight"].abs().max() <= 1  # ceil(3 / 16) ** -0.5
    assert s7.init(33, N)["step_proj.weight"].abs().max() <= 3**-0.5


# ------------------------------------------------------------------------------ state and layout


@every_variant
def test_every_split_then_steps_give_what_the_whole_gives(choices: dict[str, Any]) -> None:
    params, u = make(choices), normal(2, 7, H)
    state = first_state(params, (2,), choices.get("variant", "delta"))
    want = s7.scan(params, u, state, **call(choices))
    for k in range(8):
        y1, x = s7.scan(params, u[:, :k], state, **call(choices))
        y2, last = s7.scan(params, u[:, k:], x, **call(choices))
        assert_agree((torch.cat([y1, y2], 1), last), want, EXACT, f"split at {k}")
        if k < 7:
            y2, last = looped(step_of(choices), params, u[:, k:], x)
            assert_agree((torch.cat([y1, y2], 1), last), want, EXACT, f"steps from {k}")


@every_variant
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_touches_nothing_and_gives_zero(choices: dict[str, Any], poison: float) -> None:
    params, u = make(choices), normal(4, 9, H)
    state = first_state(params, (4,), choices.get("variant", "delta"))
    lengths = torch.tensor([9, 4, 0, 1])
    holes = normal(4, 9, seed=7) > -0.3
    reset = normal(4, 9, seed=8) > 0.8
    elapsed = gaps(4, 9) + 0.1
    within = torch.arange(9) < lengths[:, None]
    timed = choices.get("variant") != "full"
    for given, valid in (
        ({"lengths": lengths}, within),
        ({"mask": holes}, holes),
        ({"lengths": lengths, "mask": holes, "reset": reset}, within & holes),
    ):
        extra = dict(given) | ({"integration_timesteps": elapsed} if timed else {})
        dirty = torch.where(valid[..., None], u, torch.full_like(u, poison))
        for mode in s7.MODES:
            x = dirty.clone().requires_grad_()
            p = {k: v.clone().requires_grad_() for k, v in params.items()}
            y, last = s7.scan(p, x, state, mode=mode, **extra, **call(choices))
            assert not y[~valid].any()
            for i in range(4):
                own = valid[i]
                alone = {}
                if timed:
                    alone["integration_timesteps"] = elapsed[i, own]
                if "reset" in given:
                    alone["reset"] = reset[i, own]
                want = s7.scan(params, u[i, own], state[i], mode=mode, **alone, **call(choices))
                assert_agree((y[i, own], last[i]), want, EXACT, f"{mode} row {i}")
            (y.square().sum() + last.abs().square().sum()).backward()
            assert all(v.grad.isfinite().all() for v in p.values() if v.grad is not None)
            assert x.grad is not None
            assert not x.grad[~valid].any()
            assert x.grad.isfinite().all()


@every_variant
def test_packed_documents_are_the_documents_alone(choices: dict[str, Any]) -> None:
    params, u = make(choices), normal(12, H)
    cu = torch.tensor([0, 4, 4, 5, 12])
    y, last = s7.scan(params, u, reset=sequences.reset_from_cu_seqlens(cu, 12), **call(choices))
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if a < b:
            own, final = s7.scan(params, u[a:b], **call(choices))
            assert_agree(y[a:b], own, EXACT)
    assert_agree(last, final, EXACT)


@every_variant
@pytest.mark.parametrize("batch", [(), (0,), (2,)], ids=str)
def test_no_samples_give_the_state_back(choices: dict[str, Any], batch: tuple[int, ...]) -> None:
    params = make(choices)
    state = first_state(params, batch, choices.get("variant", "delta"))
    for mode in s7.MODES:
        y, last = s7.scan(params, normal(*batch, 0, H), state, mode=mode, **call(choices))
        assert y.shape == (*batch, 0, H)
        assert torch.equal(last, state)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_state_is_float32_whatever_the_activations(
    choices: dict[str, Any], dtype: torch.dtype
) -> None:
    params = {k: v.float() for k, v in make(choices).items()}
    u = normal(2, 40, H).to(dtype)
    want = s7.scan({k: v.double() for k, v in params.items()}, u.double(), **call(choices))
    y, last = s7.scan(params, u, **call(choices))
    assert y.dtype == dtype
    assert last.real.dtype == torch.float32
    assert_agree(y, want[0], 8e-3 if dtype == torch.bfloat16 else 2e-5)
    assert_agree(last, want[1], 2e-5)
    _, stepped = s7.step(params, u[:, 0], s7.init_state(params, (2,), variant=choices.get(
        "variant", "delta")), **call(choices))  # fmt: skip
    assert stepped.dtype == last.dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = s7.scan(params, u.float(), **call(choices))
    assert last.real.dtype == torch.float32
    assert_agree(y, want[0], 3e-2)


@every_variant
def test_a_stream_of_100_000_steps_does_not_drift(choices: dict[str, Any]) -> None:
    params = {k: v.float() for k, v in make(choices, 2, 4, spread=0.05).items()}
    u = normal(100_000, 2).float()
    wide = {k: v.double() for k, v in params.items()}
    want = s7.scan(wide, u.double(), **call(choices))
    state = s7.init_state(params, variant=choices.get("variant", "delta"))
    for part in u.split(7_000):
        _, state = s7.scan(params, part, state, **call(choices))
    assert_agree(state, want[1], 2e-5)


# ------------------------------------------------------------------------------ memory, stability


def test_reparametrised_delta_stays_stable_under_large_random_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    params = s7.init(4, 16, generator=generator)
    for _ in range(200):
        for key, value in params.items():
            params[key] = value + 3 * torch.randn(value.shape, generator=generator)
    u = torch.randn(50, 4, generator=generator)
    real = -1 / (params["Lambda_w"] ** 2 + 0.5)
    assert (real < 0).all()
    A_bar, _ = s7.discretize(params, u)
    assert (A_bar.abs() <= 1).all()
    assert s7.scan(params, u)[0].isfinite().all()
    # what the choice is for: the plain form does not survive this
    plain = s7.init(4, 16, stable_reparam=False, generator=generator)
    plain["Lambda_re"] = plain["Lambda_re"] + 3 * 200**0.5 * torch.randn(8, generator=generator)
    assert s7.discretize(plain, u)[0].abs().max() > 1
    assert s7.discretize(plain, u, clip_eigs=True)[0].abs().max() <= 1


def test_full_starts_with_memories_on_a_geometric_grid() -> None:
    def decays(**options: Any) -> Tensor:
        params = s7.init(H, 16, variant="full", dtype=F64, **options)
        return s7.discretize(params, torch.zeros(1, H, dtype=F64), variant="full")[0][0]

    got = decays()
    torch.testing.assert_close(got[[0, -1]], torch.tensor([0.9, 0.999], dtype=F64))
    ratios = (1 - got[1:]) / (1 - got[:-1])
    torch.testing.assert_close(ratios, torch.full((15,), 0.01 ** (1 / 15), dtype=F64))
    params = s7.init(H, 16, variant="full", dtype=F64)
    with_input = s7.discretize(params, normal(100, H), variant="full")[0]
    assert (with_input > 0.88).all()
    assert (with_input < 1).all()
    bounds = decays(abar_min=0.5, abar_max=0.75)
    torch.testing.assert_close(bounds[[0, -1]], torch.tensor([0.5, 0.75], dtype=F64))
    torch.testing.assert_close(decays(init_memory="upstream"), torch.full((16,), -1 / 3, dtype=F64))
    assert s7.init(H, 1, variant="full")["base"].shape == (1,)


def test_upstream_memory_is_short_and_the_default_is_long() -> None:
    impulse = torch.zeros(200, H, dtype=F64)
    impulse[0] = 1.0
    for memory, long in (("log", True), ("upstream", False)):
        torch.manual_seed(0)
        params = s7.init(H, N, variant="full", init_memory=memory, dtype=F64)
        first = s7.scan(params, impulse[:1], variant="full")[1]
        last = s7.scan(params, impulse, variant="full")[1]
        assert bool(last.abs().max() > 0.3 * first.abs().max()) == long


# ------------------------------------------------------------------------------ transforms


def problem(choices: dict[str, Any], mode: str, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Return scan as a function of real tensors, and a point."""
    params = make(choices, 2, 4)
    keys = list(params)
    state = first_state(params, (), choices.get("variant", "delta"))

    def f(u: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        x = torch.complex(*x.unbind(-1)) if state.is_complex() else x
        p = dict(zip(keys, values, strict=True))
        y, last = s7.scan(p, u, x, mode=mode, **call(choices), **options)
        return y, as_real(last)

    return f, (normal(5, 2), as_real(state), *params.values())


NAMES = [
    "backward",
    "double backward",
    "grad",
    "grad(grad)",
    "jvp",
    "jvp(grad)",
    "vmap",
    "vmap(grad)",
    "vmap(jvp)",
    "per-sample gradients",
    "hessian",
    "jacrev(jacfwd)",
    "jacfwd(jacfwd)",
    "checkpoint",
]
SMALL = {"chunk_size": 2}


@pytest.mark.parametrize("name", NAMES)
@one_of_each
def test_transforms_agree_with_the_loop(variant: str, name: str) -> None:
    choices, options = {"variant": variant}, SMALL if variant == "full" else {}
    f, x = problem(choices, "scan", **options)
    loop, _ = problem(choices, "recurrent")
    transform = table.TRANSFORMS[name]
    table.assert_equal(transform(f, x), transform(loop, x), 1e-9)


@pytest.mark.parametrize("name", ["backward", "call"])
@one_of_each
def test_compiled_functions_agree_with_the_loop(variant: str, name: str) -> None:
    f, x = problem({"variant": variant}, "scan")
    loop, _ = problem({"variant": variant}, "recurrent")
    transform = table.TRANSFORMS[name]
    got = table.compiled_function(transform, "aot_eager")(f, x)
    table.assert_equal(got, transform(loop, x), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({"grad", "vmap(grad)", "jvp", "jacrev", "jacfwd", "hessian"} & {*table.COMPILED})
)
@one_of_each
def test_compiled_transforms_agree_with_the_loop(variant: str, name: str) -> None:
    f, x = problem({"variant": variant}, "scan")
    loop, _ = problem({"variant": variant}, "recurrent")
    transform = table.TRANSFORMS[name]
    table.assert_equal(table.compiled(transform, "aot_eager")(f, x), transform(loop, x), 1e-9)


@one_of_each
def test_gradients_are_those_of_finite_differences(variant: str) -> None:
    f, x = problem({"variant": variant}, "scan")
    x = tuple(v.detach().requires_grad_() for v in x)
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_gradients_of_the_gaps_are_right_at_zero_too() -> None:
    params, u = make({}, 2, 4), normal(4, 2)
    elapsed = torch.tensor([0.5, 0.0, 1.3, 0.0], dtype=F64).requires_grad_()
    for timestep_mode in ("both", "state_only"):
        assert torch.autograd.gradcheck(
            lambda g, m=timestep_mode: s7.scan(params, u, integration_timesteps=g, timestep_mode=m)[
                0
            ],
            (elapsed,),
        )


@one_of_each
def test_ensembles_and_batches_map(variant: str) -> None:
    members = [make({"variant": variant}, seed=s) for s in range(3)]
    stacked = {k: torch.stack([m[k] for m in members]) for k in members[0]}
    u = normal(2, 9, H)
    y, last = vmap(lambda p: s7.scan(p, u, variant=variant))(stacked)
    for i, member in enumerate(members):
        assert_agree((y[i], last[i]), s7.scan(member, u, variant=variant), EXACT)
    got = vmap(lambda x: s7.scan(members[0], x, variant=variant)[0])(u)
    assert_agree(got, s7.scan(members[0], u, variant=variant)[0], EXACT)


CALL_NUMBERS = {"dt_scale": (0.5, 1.0, 1.7), "alpha": (0.5, 0.7, 1.0)}


@pytest.mark.parametrize("option", CALL_NUMBERS)
def test_numbers_of_a_call_map_and_differentiate(option: str) -> None:
    params, u = make({}), normal(2, 6, H)
    scheme: Any = {"discretization": "gbt"} if option == "alpha" else {}
    values = torch.tensor(CALL_NUMBERS[option], dtype=F64)
    state = first_state(params, (2,), "delta")

    def scan(value: Any) -> tuple[Tensor, ...]:
        return tuple(map(as_real, s7.scan(params, u, state, **scheme, **{option: value})))

    def step(value: Any) -> tuple[Tensor, ...]:
        return tuple(map(as_real, s7.step(params, u[:, 0], state, **scheme, **{option: value})))

    def matrices(value: Any) -> tuple[Tensor, ...]:
        return tuple(map(as_real, s7.discretize(params, u, **scheme, **{option: value})))

    for f in (scan, step, matrices):
        got = vmap(f)(values)
        for i, value in enumerate(CALL_NUMBERS[option]):
            for part, want in zip(got, f(value), strict=True):
                assert_agree(part[i], want, EXACT)
        slope = vmap(grad(lambda v, f=f: table.weigh(f(v))))(values)
        forward = torch.stack([jvp(f, (v,), (torch.ones_like(v),))[1][0].sum() for v in values])
        assert forward.isfinite().all()
        want = torch.stack([jacfwd(lambda v, f=f: table.weigh(f(v)))(v) for v in values])
        assert_agree(slope, want, 1e-11)


@pytest.mark.parametrize(
    ("variant", "option", "default"),
    [
        ("delta", "dt_min", 1e-3),
        ("delta", "dt_max", 1e-1),
        ("delta", "dt_init_scale", 1.0),
        ("full", "abar_min", 0.9),
        ("full", "abar_max", 0.999),
    ],
)
def test_numbers_of_init_map_and_differentiate(variant: str, option: str, default: float) -> None:
    values = torch.tensor([0.95, 0.97, 0.99], dtype=F64) * default

    def build(value: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        return s7.init(4, 8, variant=variant, generator=generator, dtype=F64, **{option: value})

    got = vmap(build, randomness="same")(values)
    for i, value in enumerate(values.tolist()):
        for key, want in build(value).items():
            torch.testing.assert_close(got[key][i], want)
    assert any(not torch.equal(v[0], v[1]) for v in got.values())
    loss = lambda v: sum(torch.sin(p).sum() for p in build(v).values())  # noqa: E731
    step = 1e-6 * values[1]
    difference = (loss(values[1] + step) - loss(values[1] - step)) / (2 * step)
    torch.testing.assert_close(grad(loss)(values[1]), difference, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ trilinear


@pytest.mark.parametrize("sizes", [(2, 3, 4), (4, 3, 2), (3, 4, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.usefixtures("both_backends")
def test_trilinear_is_the_sum_it_says(sizes: tuple[int, int, int], chunk_size: int) -> None:
    i, j, k = sizes
    w, p, q = normal(i, j, k), normal(2, 5, j, seed=3), normal(5, k, seed=4)
    want = torch.einsum("ijk,btj,tk->bti", w, p, q)
    for backend in ("auto", "reference"):
        got = trilinear(w, p, q, chunk_size=chunk_size, backend=backend)
        assert_agree(got, want, EXACT)
    assert torch.autograd.gradcheck(
        lambda *x: trilinear(*x, chunk_size=chunk_size),
        tuple(x.requires_grad_() for x in (w, p, q)),
    )
    empty = trilinear(w, p[:, :0], q[:0])
    assert empty.shape == (2, 0, i)
    empty.sum().backward()
    assert not w.grad.any()


@pytest.mark.parametrize("name", table.TRANSFORMS)
@pytest.mark.usefixtures("both_backends")
def test_trilinear_under_every_transform(name: str) -> None:
    x = (normal(2, 3, 2), normal(5, 3, seed=3), normal(5, 2, seed=4))
    transform = table.TRANSFORMS[name]
    got = transform(lambda *v: (trilinear(*v, chunk_size=2),), x)
    want = transform(lambda *v: (trilinear(*v, backend="reference"),), x)
    table.assert_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", table.COMPILED)
def test_trilinear_under_compiled_transforms(name: str) -> None:
    x = (normal(2, 3, 2), normal(5, 3, seed=3), normal(5, 2, seed=4))
    transform = table.TRANSFORMS[name]
    got = table.compiled(transform, "aot_eager")(lambda *v: (trilinear(*v),), x)
    want = transform(lambda *v: (trilinear(*v, backend="reference"),), x)
    table.assert_equal(got, want)


@pytest.mark.parametrize("name", table.RIGHT_OR_RAISES)
@pytest.mark.usefixtures("both_backends")
def test_trilinear_is_right_or_raises(name: str) -> None:
    x = (normal(2, 3, 2), normal(5, 3, seed=3), normal(5, 2, seed=4))
    transform = table.RIGHT_OR_RAISES[name]
    try:
        got = transform(lambda *v: (trilinear(*v, chunk_size=2),), x)
    except (RuntimeError, NotImplementedError):
        return
    table.assert_equal(got, transform(lambda *v: (trilinear(*v, backend="reference"),), x))


def test_chunk_size_changes_no_result_and_no_second_run_differs() -> None:
    params, u = make({"variant": "full"}), normal(2, 30, H)
    want = s7.scan(params, u, variant="full")
    for chunk_size in (1, 7, 1000):
        assert_agree(s7.scan(params, u, variant="full", chunk_size=chunk_size), want, EXACT)
    low = {k: v.float().requires_grad_() for k, v in params.items()}
    runs = []
    for _ in range(2):
        y, _ = s7.scan(low, u.float(), variant="full")
        runs.append(torch.autograd.grad(y.square().sum(), list(low.values())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


MEASURE = """
import resource, sys, torch
from lrnnx_core.models import s7
torch.set_num_threads(1)
mode, length = sys.argv[1], int(sys.argv[2])
params = {k: v.requires_grad_() for k, v in s7.init(64, 32, variant="full").items()}
u = torch.randn(1, length, 64)
def train(u):
    y, _ = s7.scan(params, u, variant="full", mode=mode)
    y.square().mean().backward()
train(u[:, :8])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train(u)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_training_full_never_holds_the_matrices_of_the_whole_sequence() -> None:
    """B_t and C_t of 8192 samples with H = 64, N = 32 are 64 MiB each."""

    def mebibytes(length: int) -> float:
        run = [sys.executable, "-c", MEASURE, "scan", str(length)]
        return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) / 1024

    assert mebibytes(8192) < 64


# ------------------------------------------------------------------------------ bad input


def refuses(message: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args, **kwargs)


def test_options_of_the_other_variant_are_refused() -> None:
    full, delta = s7.init(H, N, variant="full"), s7.init(H, N)
    u = torch.randn(2, 6, H)
    gaps_full = {"integration_timesteps": torch.ones(6), "variant": "full"}
    refuses("s7.scan: variant='full' takes no integration_timesteps", s7.scan, full, u, **gaps_full)
    refuses("s7.discretize: variant='full' takes no", s7.discretize, full, u, **gaps_full)
    state = s7.init_state(full, (2,), variant="full")
    refuses(
        "s7.step: variant='full' takes no integration_timesteps",
        s7.step, full, u[:, 0], state, variant="full", integration_timestep=torch.ones(2),
    )  # fmt: skip
    for option, value in (
        ("dt_scale", 2.0),
        ("dt_scale", torch.tensor(1.0)),
        ("alpha", 0.5),
        ("conj_sym", False),
        ("clip_eigs", True),
    ):
        refuses(
            f"s7.scan: {option} belongs to variant='delta'",
            s7.scan, full, u, variant="full", **{option: value},
        )  # fmt: skip
    refuses("discretization = 'zoh', expected one of", s7.scan, full, u, variant="full",
            discretization="zoh")  # fmt: skip
    refuses("s7.init: dt_min belongs to variant='delta'", s7.init, H, N, variant="full", dt_min=0.1)
    refuses("s7.init: abar_min belongs to variant='full'", s7.init, H, N, abar_min=0.1)
    refuses("params have no step_proj.weight.*variant='full'", s7.scan, full, u)
    refuses("params have no .*base.*variant='delta'", s7.scan, delta, u, variant="full")
    for f in (s7.scan, s7.discretize):
        refuses(
            r"variant = 'half', expected one of \('delta', 'full'\)", f, delta, u, variant="half"
        )
    refuses("variant = 'half'", s7.init, H, N, variant="half")
    refuses("variant = 'half'", s7.init_state, delta, variant="half")


@one_of_each
def test_bad_input_is_named(variant: str) -> None:
    params, u = s7.init(H, N, variant=variant), torch.randn(2, 6, H)
    state = s7.init_state(params, (2,), variant=variant)
    scan = lambda *a, **k: s7.scan(*a, variant=variant, **k)  # noqa: E731
    refuses(r"s7.scan: u \(2, 6, 2\), expected .* H = 3", scan, params, u[..., :2])
    refuses("s7.scan: u has dtype torch.int64", scan, params, u.long())
    refuses(r"s7.scan: state \(2, .*\), expected \(2, .*\) for this input",
            scan, params, u, state[..., :-1])  # fmt: skip
    refuses("s7.scan: mode = 'conv', expected one of", scan, params, u, mode="conv")
    refuses("s7.scan: chunk_size = 0, expected", scan, params, u, chunk_size=0)
    refuses("lengths has dtype", scan, params, u, lengths=torch.ones(2))
    refuses("timestep_mode", scan, params, u, timestep_mode="neither")
    refuses("'zog'", scan, params, u, discretization="zog")
    refuses(r"s7.step: u \(2, 4\), expected .* H = 3", s7.step, params, torch.randn(2, 4), state,
            variant=variant)  # fmt: skip
    refuses("s7.step: state .*expected", s7.step, params, u[:, 0], state[0], variant=variant)
    if variant == "full":
        refuses("s7.scan: state has dtype .*, expected a real one", scan, params, u, state + 0j)
        refuses("s7.step: state has dtype .*, expected a real one",
                s7.step, params, u[:, 0], state + 0j, variant=variant)  # fmt: skip
    for bad in (0, -1, 2.0, True):
        refuses(f"s7.init: d_model = {bad}, expected an integer >= 1", s7.init, bad, 8)
        refuses(f"s7.init: d_state = {bad}, expected", s7.init, 3, bad, variant=variant)


def test_trilinear_names_what_does_not_fit() -> None:
    w, p, q = torch.randn(2, 3, 4), torch.randn(5, 3), torch.randn(5, 4)
    said = r"trilinear: w \(2, 3, 4\), p \(5, 4\) and q \(5, 4\), expected \(I, J, K\), .*"
    refuses(said, trilinear, w, q, q)
    refuses("trilinear: dtypes torch.float32, torch.float64, .*", trilinear, w, p.double(), q)
    for dtype in (torch.complex64, torch.int64):
        refuses(
            f"dtypes {dtype}, .* real and floating", trilinear, *(t.to(dtype) for t in (w, p, q))
        )
    refuses("trilinear: w, p, q on cpu, meta, cpu", trilinear, w, p.to("meta"), q)
    for bad in (0, 2.5, "all"):
        refuses(f"trilinear: chunk_size = {bad!r}, expected", trilinear, w, p, q, chunk_size=bad)


def test_delta_sizes_and_choices_are_checked() -> None:
    refuses("s7.init: d_state = 8 with blocks = 3", s7.init, 3, 8, blocks=3)
    refuses("s7.init: d_state = 9 with blocks = 1", s7.init, 3, 9)
    refuses("s7.init: C_init = 'nothing', expected one of", s7.init, 3, 8, C_init="nothing")
    refuses("abar_max = 1.0, expected 0", s7.init, 3, 8, variant="full", abar_max=1.0)
    refuses("s7.init: init_memory = 'no'", s7.init, 3, 8, variant="full", init_memory="no")
    params, u = s7.init(3, 8), torch.randn(2, 6, 3)
    refuses("discretization='gbt' needs alpha", s7.scan, params, u, discretization="gbt")
    refuses("alpha belongs to discretization='gbt'", s7.scan, params, u, alpha=0.5)


@one_of_each
def test_everything_runs_on_the_meta_device(variant: str) -> None:
    params = s7.init(H, N, variant=variant, device="meta")
    real = s7.init(H, N, variant=variant)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in real.items()}
    u = torch.empty(2, 40, H, device="meta")
    want = s7.scan(real, torch.randn(2, 40, H), variant=variant)
    for mode in s7.MODES:
        y, last = s7.scan(params, u, variant=variant, mode=mode)
        assert (y.shape, last.shape, last.dtype) == (want[0].shape, want[1].shape, want[1].dtype)
    assert s7.discretize(params, u, variant=variant)[0].device.type == "meta"
