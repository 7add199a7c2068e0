"""Mamba: the paper's equations sample by sample, its initialisation, what elapsed time means."""

from __future__ import annotations

import math
from typing import Any

import mamba_loop
import pytest
import torch
from torch import Tensor

import lrnnx_core
from lrnnx_core import mamba, registry, rglru, stream
from lrnnx_nn import Mamba

F64 = torch.float64
H, N, K, L = 3, 5, 4, 11
SCHEMES = [s for s in mamba.DISCRETIZATIONS if s != "gbt"]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters(**options: Any) -> dict[str, Tensor]:
    """Draw parameters and move each, so that none is a constant."""
    generator = torch.Generator().manual_seed(0)
    params = mamba.init(H, N, generator=generator, dtype=F64, **options)
    return {
        k: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=F64) for k, v in params.items()
    }


def gaps(*shape: int) -> Tensor:
    t = 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    return torch.where(t < 0.5, torch.zeros_like(t), t)


def same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def loop(params: dict[str, Tensor], u: Tensor, gaps: Tensor | None = None, **options: Any) -> tuple:
    rows = [
        mamba_loop.block(params, u[i], gaps=None if gaps is None else gaps[i], **options)
        for i in range(len(u))
    ]
    y, conv, h = (torch.stack(part) for part in zip(*rows, strict=True))
    return y, mamba.State(conv, h)


def every_way(params: dict[str, Tensor], u: Tensor, want: tuple, **options: Any) -> None:
    """Compare scan, the loop of the library, halves and steps with what is wanted."""
    for mode in mamba.MODES:
        same(mamba.scan(params, u, mode=mode, **options), want)
    time = options.pop("integration_timesteps", None)
    state, ys = mamba.init_state(params, u.shape[:-2]), []
    for t in range(u.shape[-2]):
        gap = None if time is None else time[:, t]
        y, state = mamba.step(params, u[:, t], state, integration_timestep=gap, **options)
        ys.append(y)
    same((torch.stack(ys, -2), state), want)


# ------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize(
    "init",
    [
        {}, {"d_conv": 1}, {"d_conv": 2, "bias": True}, {"conv_bias": False, "expand": 3},
        {"dt_rank": 3, "expand": 1},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("length", [1, 2, L])
def test_the_block_is_the_papers(length: int, init: dict[str, Any]) -> None:
    params, u = parameters(**init), normal(2, length, H)
    every_way(params, u, loop(params, u))


@pytest.mark.parametrize("scheme", [*SCHEMES, "gbt"])
@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
@pytest.mark.parametrize("timed", [False, True], ids=["uniform", "timed"])
def test_every_discretization_in_both_modes(timed: bool, timestep_mode: str, scheme: str) -> None:
    params, u, time = parameters(), normal(2, L, H), gaps(2, L)
    options = {"alpha": 0.7} if scheme == "gbt" else {}
    want = loop(
        params, u, time if timed else None, scheme=scheme,
        state_only=timestep_mode == "state_only", **options,
    )  # fmt: skip
    options |= {"discretization": scheme, "timestep_mode": timestep_mode}
    if timed:
        options["integration_timesteps"] = time
    every_way(params, u, want, **options)


@pytest.mark.parametrize("inner_norm", ["none", "rms", "learned"])
@pytest.mark.parametrize("dt_scale", [1.0, 0.3])
def test_norms_and_scaled_steps(dt_scale: float, inner_norm: str) -> None:
    params, u, time = parameters(inner_norm=inner_norm), normal(2, L, H), gaps(2, L)
    want = loop(params, u, time, inner_norm=inner_norm, dt_scale=dt_scale)
    options = {"inner_norm": inner_norm, "integration_timesteps": time}
    every_way(params, u, want, dt_scale=dt_scale, **options)
    number = torch.tensor(dt_scale, dtype=F64)
    every_way(params, u, want, dt_scale=number, **options)


def test_a_scaled_step_is_a_constant_gap() -> None:
    params, u = parameters(), normal(2, L, H)
    for scheme in SCHEMES:
        scaled = mamba.scan(params, u, dt_scale=0.4, discretization=scheme)
        if scheme != "async":
            constant = torch.full((2, L), 0.4, dtype=F64)
            timed = mamba.scan(params, u, integration_timesteps=constant, discretization=scheme)
            same(scaled, timed)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
def test_discretize_gives_what_scan_runs_on(timestep_mode: str, scheme: str) -> None:
    params, u, time = parameters(), normal(L, H), gaps(L)
    collected: list[tuple[Tensor, Tensor, Tensor]] = []
    mamba_loop.block(
        params, u, gaps=time, scheme=scheme, state_only=timestep_mode == "state_only",
        collect=lambda *x: collected.append(x),
    )  # fmt: skip
    v, A_bar, B_bar = (torch.stack(x) for x in zip(*collected, strict=True))
    got = mamba.discretize(
        params, v, integration_timesteps=time, timestep_mode=timestep_mode, discretization=scheme
    )
    assert got[0].shape == got[1].shape == (L, 2 * H, N)
    same(got, (A_bar, B_bar))
    # h of scan is the recurrence of these matrices
    h = torch.zeros(2 * H, N, dtype=F64)
    for t in range(L):
        h = got[0][t] * h + got[1][t] * v[t, :, None]
    _, state = mamba.scan(
        params, u, integration_timesteps=time, timestep_mode=timestep_mode, discretization=scheme
    )
    same(state.h, h)
    batch = mamba.discretize(params, v.expand(2, 3, L, 2 * H), discretization=scheme)
    assert batch[0].shape == batch[1].shape == (2, 3, L, 2 * H, N)


@pytest.mark.parametrize("inner_norm", ["none", "rms", "learned"])
def test_discretize_knows_norms_and_scaled_steps(inner_norm: str) -> None:
    params, u = parameters(inner_norm=inner_norm), normal(L, H)
    collected: list[Any] = []
    mamba_loop.block(
        params, u, inner_norm=inner_norm, dt_scale=0.3, collect=lambda *x: collected.append(x)
    )
    v, A_bar, B_bar = (torch.stack(x) for x in zip(*collected, strict=True))
    same(mamba.discretize(params, v, inner_norm=inner_norm, dt_scale=0.3), (A_bar, B_bar))


def test_norms_make_steps_and_matrices_blind_to_the_scale_of_x_proj() -> None:
    params, u = parameters(inner_norm="rms"), normal(2, L, H)
    larger = params | {"x_proj.weight": 1e3 * params["x_proj.weight"]}
    y, _ = mamba.scan(params, u, inner_norm="rms")
    same(mamba.scan(larger, u, inner_norm="rms")[0], y, 1e-3)
    assert not torch.allclose(mamba.scan(params, u)[0], y, rtol=1e-2)


# --------------------------------------------------------------------------------- elapsed time


@pytest.mark.parametrize("scheme", ["mamba", "zoh", "bilinear", "gbt", "euler"])
def test_a_gap_of_zero_drops_the_sample_in_both_and_counts_it_in_state_only(scheme: str) -> None:
    params = parameters(d_conv=1)  # so that the sample is seen by the recurrence alone
    options = {"discretization": scheme, **({"alpha": 0.7} if scheme == "gbt" else {})}
    u, time = normal(2, L, H), torch.ones(2, L, dtype=F64)
    time[:, 4] = 0
    other = u.clone()
    other[:, 4] += 1
    kept = torch.arange(L) != 4
    for mode, counts in (("both", False), ("state_only", True)):
        call = {"integration_timesteps": time, "timestep_mode": mode, **options}
        y, state = mamba.scan(params, u, **call)
        y2, changed = mamba.scan(params, other, **call)
        assert torch.equal(state.h, changed.h) is not counts
        assert torch.equal(y[:, 5:], y2[:, 5:]) is not counts
        if not counts:
            call["integration_timesteps"] = time[:, kept]
            without, last = mamba.scan(params, u[:, kept], **call)
            same((y[:, kept], state.h), (without, last.h))


def test_under_dirac_a_gap_of_zero_counts_in_both_modes() -> None:
    params, u, time = parameters(d_conv=1), normal(1, L, H), torch.zeros(1, L, dtype=F64)
    other = u.clone()
    other[:, 4] += 1
    for mode in ("both", "state_only"):
        call: Any = {
            "integration_timesteps": time,
            "timestep_mode": mode,
            "discretization": "dirac",
        }
        a, b = (mamba.scan(params, x, **call)[1].h for x in (u, other))
        assert not torch.allclose(a, b)


def test_silence_fades_the_state_by_the_gap() -> None:
    params, u = parameters(d_conv=1), normal(1, 1, H)
    _, start = mamba.scan(params, normal(1, 5, H, seed=2))
    for mode in ("both", "state_only"):
        last = [
            mamba.scan(
                params, u, start, integration_timesteps=torch.full((1, 1), gap, dtype=F64),
                timestep_mode=mode, discretization="dirac",
            )[1].h
            for gap in (0.0, 1.0, 3.0)
        ]  # fmt: skip
        # h(gap) = exp(gap dA) h0 + B u: geometric in the gap
        inputs = last[0] - start.h
        ratio = (last[1] - inputs) / start.h
        same(last[2] - inputs, ratio**3 * start.h, 1e-9)


# ---------------------------------------------------------------------------------------- init


def test_steps_start_log_uniform_in_their_bounds() -> None:
    n = 4000
    params = mamba.init(n // 100, 1, expand=100, dt_rank=1, dt_min=1e-3, dt_max=0.1, dtype=F64)
    steps = torch.nn.functional.softplus(params["dt_proj.bias"])
    assert steps.min() >= 1e-3 * (1 - 1e-9)
    assert steps.max() <= 0.1 * (1 + 1e-9)
    u = (steps.log() - math.log(1e-3)) / math.log(100)
    distance = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %


def test_the_floor_holds() -> None:
    params = mamba.init(200, 1, dt_min=1e-6, dt_max=1e-2, dt_floor=1e-4, dtype=F64)
    steps = torch.nn.functional.softplus(params["dt_proj.bias"])
    assert abs(float(steps.min()) - 1e-4) < 1e-9
    assert 0.3 < (steps < 1.0001e-4).double().mean() < 0.7


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_weight_of_dt_proj(scale: float) -> None:
    for rank in (1, 4, 9):
        bound = scale * rank**-0.5
        constant = mamba.init(100, 1, dt_rank=rank, dt_init="constant", dt_init_scale=scale)
        same(constant["dt_proj.weight"], torch.full((200, rank), bound), 1e-6)
        random = mamba.init(100, 1, dt_rank=rank, dt_init_scale=scale)["dt_proj.weight"]
        assert random.abs().max() <= bound
        assert random.max() > 0.9 * bound
        assert random.min() < -0.9 * bound


def test_rates_skips_and_shapes() -> None:
    params = mamba.init(20, 7, d_conv=3)
    rows = torch.arange(1.0, 8.0).log().expand(40, 7)
    same(params["A_log"], rows, 1e-6)
    assert torch.equal(params["D"], torch.ones(40))
    shapes = {k: tuple(v.shape) for k, v in params.items()}
    assert shapes == {
        "in_proj.weight": (80, 20), "conv1d.weight": (40, 1, 3), "conv1d.bias": (40,),
        "x_proj.weight": (2 + 14, 40), "dt_proj.weight": (40, 2), "dt_proj.bias": (40,),
        "A_log": (40, 7), "D": (40,), "out_proj.weight": (20, 40),
    }  # fmt: skip
    for key, width in {"in_proj": 20, "x_proj": 40, "out_proj": 40}.items():
        weight = params[key + ".weight"]
        assert weight.abs().max() <= width**-0.5
        assert weight.abs().max() > 0.9 * width**-0.5
    for key in ("conv1d.weight", "conv1d.bias"):
        assert 0.9 * 3**-0.5 < params[key].abs().max() <= 3**-0.5
    assert params["dt_proj.weight"].shape == (40, math.ceil(20 / 16))
    more = mamba.init(20, 7, bias=True, conv_bias=False, inner_norm="learned", dt_rank=5)
    assert "conv1d.bias" not in more
    assert not more["in_proj.bias"].any()
    assert not more["out_proj.bias"].any()
    for name, size in {"dt": 5, "b": 7, "c": 7}.items():
        assert torch.equal(more[f"{name}_layernorm.weight"], torch.ones(size))
    assert mamba.init(20)["A_log"].shape == (40, 16)


# --------------------------------------------------------------------------------------- errors


def test_states_of_other_models_sizes_and_batches_are_refused() -> None:
    params, u = parameters(), normal(2, L, H)
    state = mamba.init_state(params, (2,))
    mamba.scan(params, u, state)
    bad = {
        "of another batch": (mamba.init_state(params, (3,)), r"state.conv \(3, 3, 6\), expected"),
        "without a batch": (mamba.init_state(params), r"state.conv \(3, 6\), expected \(2, 3, 6\)"),
        "of another size": (
            mamba.init_state(mamba.init(H, 4), (2,)), r"state.h \(2, 6, 4\), expected \(2, 6, 5\)",
        ),
        "of another convolution": (
            mamba.init_state(mamba.init(H, N, d_conv=2), (2,)), r"state.conv \(2, 1, 6\)",
        ),
        "of another model": (rglru.init_state(rglru.init(H, 6), (2,)), "expected State"),
        "a tensor": (state.h, "state is a Tensor, expected State"),
    }  # fmt: skip
    for state, message in bad.values():
        with pytest.raises(ValueError, match="^mamba.*" + message):
            mamba.scan(params, u, state)
        with pytest.raises(ValueError, match="^mamba.*" + message):
            mamba.step(params, u[:, 0], state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mamba.init(H, 0), r"mamba.init: d_state = 0, expected an integer >= 1"),
        (lambda: mamba.init(0, N), "d_model = 0"),
        (lambda: mamba.init(H, N, d_conv=0), "d_conv = 0"),
        (lambda: mamba.init(H, N, expand=0), "expand = 0"),
        (lambda: mamba.init(H, N, expand=1.5), "expand = 1.5"),
        (lambda: mamba.init(H, N, dt_rank=0), "dt_rank = 0"),
        (lambda: mamba.init(H, N, dt_init="zero"), r"dt_init = 'zero', expected one of \('random'"),
        (lambda: mamba.init(H, N, inner_norm="layer"), r"inner_norm = 'layer', expected one of"),
        (lambda: scan(u=normal(L, 4)), r"mamba.scan: u \(11, 4\), expected .* H = 3"),
        (lambda: scan(u=normal(H)), r"mamba.scan: u \(3,\)"),
        (lambda: scan(u=normal(L, H).long()), "dtype torch.int64"),
        (lambda: scan(mode="conv"), r"mode = 'conv', expected one of \('auto', 'scan'"),
        (lambda: scan(discretization="none"), "unknown discretization 'none'; expected"),
        (lambda: scan(discretization="gbt"), "needs alpha"),
        (lambda: scan(alpha=0.5), "alpha belongs to discretization='gbt'"),
        (lambda: scan(timestep_mode="decay"), "timestep_mode 'decay', expected"),
        (lambda: scan(inner_norm="layer"), "inner_norm = 'layer'"),
        (lambda: scan(integration_timesteps=torch.ones(4)), r"integration_timesteps \(4,\)"),
        (
            lambda: mamba.discretize(parameters(), normal(L, 6), discretization="none"),
            "mamba.discretize: unknown",
        ),
        (
            lambda: mamba.discretize(parameters(), normal(L, 6), inner_norm="layer"),
            "inner_norm = 'layer'",
        ),
        (lambda: Mamba(H, 0), "d_state = 0"),
        (lambda: Mamba(H, N)(torch.randn(L, 4)), r"Mamba: u \(11, 4\), expected"),
        (lambda: Mamba(H, N, inner_norm="layer"), "inner_norm = 'layer'"),
    ],
)  # fmt: skip
def test_bad_calls_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def scan(u: Tensor | None = None, **options: Any) -> Any:
    return mamba.scan(parameters(), normal(L, H) if u is None else u, **options)


# ------------------------------------------------------------------------------ registry, Module


def test_names() -> None:
    assert lrnnx_core.registry.get("s6") is registry.get("Mamba")
    assert "arXiv:2312.00752" in lrnnx_core.citation("S6")
    assert lrnnx_core.mamba is mamba
    assert lrnnx_core.stream is stream


def test_the_module_has_the_papers_default_of_sixteen_states() -> None:
    layer = Mamba(H)
    assert layer.A_log.shape == (2 * H, 16)
    assert layer.d_state == 16


def test_state_bytes_do_not_grow_with_the_sequence() -> None:
    params = parameters()
    for length in (1, 100):
        _, state = mamba.scan(params, normal(length, H))
        assert [tuple(s.shape) for s in state] == [(K - 1, 2 * H), (2 * H, N)]
        # storages of their own, not views of the sequence
        held = sum(s.untyped_storage().nbytes() for s in state)
        assert held == 8 * ((K - 1) * 2 * H + 2 * H * N)


def test_a_bfloat16_layer_keeps_its_recurrence_in_float32() -> None:
    layer = Mamba(H, N, dtype=torch.float32).bfloat16()
    wide = {k for k, v in layer.params.items() if v.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_proj.bias"}
    u = normal(2, 40, H).bfloat16()
    y, state = layer.prefill(u)
    assert (y.dtype, state.conv.dtype, state.h.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32,
    )  # fmt: skip
    exact = {k: v.detach().double() for k, v in layer.params.items()}
    want, last = mamba.scan(exact, u.double())
    assert (y - want).abs().max() < 0.03 * want.abs().max()
    assert (state.h - last.h).abs().max() < 0.03 * last.h.abs().max()
