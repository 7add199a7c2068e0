"""STREAM: a decay by elapsed time alone, beside Mamba's input-dependent gain."""

from __future__ import annotations

import math
from typing import Any

import mamba_loop
import pytest
import torch
from test_mamba import H, L, N, gaps, loop, normal, same
from torch import Tensor

import lrnnx_core
from lrnnx_core import mamba, registry, stream
from lrnnx_nn import STREAM, Mamba

F64 = torch.float64
SCHEMES = [s for s in stream.DISCRETIZATIONS if s != "gbt"]


def parameters(**options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = stream.init(H, N, generator=generator, dtype=F64, dt_min=0.1, dt_max=1.0, **options)
    return {
        k: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=F64) for k, v in params.items()
    }


def every_way(params: dict[str, Tensor], u: Tensor, want: tuple, **options: Any) -> None:
    for mode in stream.MODES:
        same(stream.scan(params, u, mode=mode, **options), want)
    time = options.pop("integration_timesteps", None)
    state, ys = stream.init_state(params, u.shape[:-2]), []
    for t in range(u.shape[-2]):
        gap = None if time is None else time[:, t]
        y, state = stream.step(params, u[:, t], state, integration_timestep=gap, **options)
        ys.append(y)
    same((torch.stack(ys, -2), state), want)


# ------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("scheme", [*SCHEMES, "gbt"])
@pytest.mark.parametrize("timed", [False, True], ids=["uniform", "timed"])
def test_every_discretization(timed: bool, scheme: str) -> None:
    params, u, time = parameters(), normal(2, L, H), gaps(2, L)
    options = {"alpha": 0.7} if scheme == "gbt" else {}
    want = loop(params, u, time if timed else None, scheme=scheme, **options)
    options |= {"discretization": scheme}
    if timed:
        options["integration_timesteps"] = time
    every_way(params, u, want, **options)


@pytest.mark.parametrize(
    "init", [{"d_conv": 1}, {"bias": True, "conv_bias": False}, {"inner_norm": "learned"}], ids=str
)
def test_the_options_of_the_block_and_scaled_steps(init: dict[str, Any]) -> None:
    params, u, time = parameters(**init), normal(2, L, H), gaps(2, L)
    norm = {"inner_norm": init.get("inner_norm", "none")}
    want = loop(params, u, time, dt_scale=0.4, **norm)
    every_way(params, u, want, integration_timesteps=time, dt_scale=0.4, **norm)


def test_the_decay_is_elapsed_time_times_a_constant_of_the_channel() -> None:
    params, v, time = parameters(), normal(2, L, 2 * H), gaps(2, L)
    A_bar, B_bar = stream.discretize(params, v, integration_timesteps=time)
    assert A_bar.shape == B_bar.shape == (2, L, 2 * H, N)
    step = torch.log1p(torch.exp(params["dtA_bias"]))
    rate = torch.exp(params["A_log"]) * step[:, None]
    same(A_bar, torch.exp(-time[..., None, None] * rate))
    # the decay knows nothing of the input, the gain nothing of the time
    same(stream.discretize(params, 5 * v, integration_timesteps=time)[0], A_bar)
    same(stream.discretize(params, v, integration_timesteps=3 * time)[1], B_bar)
    # the gain is Mamba's
    own = {k: p for k, p in params.items() if k != "dtA_bias"}
    same(B_bar, mamba.discretize(own, v)[1])
    uniform = stream.discretize(params, v)
    same(uniform[0], torch.exp(-rate).expand(2, L, 2 * H, N))
    same(uniform, stream.discretize(params, v, integration_timesteps=torch.ones(2, L, dtype=F64)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_discretize_gives_what_scan_runs_on(scheme: str) -> None:
    params, u, time = parameters(), normal(L, H), gaps(L)
    collected: list[Any] = []
    mamba_loop.block(
        params, u, gaps=time, scheme=scheme, dt_scale=0.7,
        collect=lambda *x: collected.append(x),
    )  # fmt: skip
    v, A_bar, B_bar = (torch.stack(x) for x in zip(*collected, strict=True))
    options = {"integration_timesteps": time, "discretization": scheme, "dt_scale": 0.7}
    got = stream.discretize(params, v, **options)
    same(got, (A_bar, B_bar))
    h = torch.zeros(2 * H, N, dtype=F64)
    for t in range(L):
        h = got[0][t] * h + got[1][t] * v[t, :, None]
    same(stream.scan(params, u, **options)[1].h, h)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_events_at_the_same_time_all_count_and_silence_fades_them(scheme: str) -> None:
    params, u = parameters(d_conv=1), normal(1, L, H)
    together = torch.zeros(1, L, dtype=F64)
    call = {"discretization": scheme}
    _, state = stream.scan(params, u, integration_timesteps=together, **call)
    # no decay between them: their order does not matter, the state is their sum
    order = torch.randperm(L, generator=torch.Generator().manual_seed(0))
    _, other = stream.scan(params, u[:, order], integration_timesteps=together, **call)
    same(state.h, other.h)
    each = [
        stream.scan(params, u[:, t : t + 1], integration_timesteps=together[:, :1], **call)[1].h
        for t in range(L)
    ]
    same(state.h, torch.stack(each).sum(0))
    if scheme in ("mamba", "zoh", "dirac", "async"):
        late = together.clone()
        late[:, -1] = 1e4
        _, faded = stream.scan(params, u, integration_timesteps=late, **call)
        same(faded.h, each[-1])


def test_gaps_of_one_are_not_mamba() -> None:
    params, u = parameters(), normal(2, L, H)
    own = {k: p for k, p in params.items() if k != "dtA_bias"}
    assert not torch.allclose(stream.scan(params, u)[0], mamba.scan(own, u)[0], rtol=1e-2)


# ---------------------------------------------------------------------------------------- init


def test_the_parameters_are_mambas_and_one_bias() -> None:
    def draw(model: Any) -> dict[str, Tensor]:
        return model.init(20, 7, generator=torch.Generator().manual_seed(5))

    ours, theirs = draw(stream), draw(mamba)
    assert ours.keys() - theirs.keys() == {"dtA_bias"}
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert ours["dtA_bias"].shape == (40,)
    assert not torch.equal(ours["dtA_bias"], ours["dt_proj.bias"])  # drawn independently


def test_the_decays_steps_start_log_uniform_in_their_bounds() -> None:
    n = 4000
    params = stream.init(n // 100, 1, expand=100, dt_min=1e-3, dt_max=0.1, dtype=F64)
    steps = torch.nn.functional.softplus(params["dtA_bias"])
    assert steps.min() >= 1e-3 * (1 - 1e-9)
    assert steps.max() <= 0.1 * (1 + 1e-9)
    u = (steps.log() - math.log(1e-3)) / math.log(100)
    distance = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.63 / math.sqrt(n)
    floored = stream.init(40, 1, dt_min=1e-6, dt_max=1e-5, dt_floor=1e-4, dtype=F64)
    same(torch.nn.functional.softplus(floored["dtA_bias"]), torch.full((80,), 1e-4).double(), 1e-9)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_there_is_no_unused_parameter(scheme: str | None) -> None:
    layer = STREAM(H, N, scheme, inner_norm="learned", bias=True, dtype=F64)
    layer(normal(2, L, H), integration_timesteps=gaps(2, L)).square().sum().backward()
    assert [k for k, p in layer.named_parameters() if p.grad is None] == []
    zero = {k for k, p in layer.named_parameters() if not p.grad.any()}
    # an impulse's gain is 1 whatever dt_proj says: zeros, but nothing that DDP would miss
    impulse = {"dt_proj.weight", "dt_proj.bias", "dt_layernorm.weight"}
    assert zero == (impulse if scheme == "dirac" else set())
    assert not [k for k in layer.state_dict() if "dtA_proj" in k]


def test_the_constant_of_the_decay_stays_in_float32() -> None:
    layer = STREAM(H).bfloat16()
    assert layer.dtA_bias.dtype == torch.float32
    assert "dtA_bias" in layer.ssm_parameters
    assert layer.d_state == 16


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream.init(H, 0), "d_state = 0, expected an integer >= 1"),
        (lambda: stream.init(H, N, dt_init="zero"), "dt_init = 'zero'"),
        (
            lambda: stream.scan(parameters(), normal(L, H), timestep_mode="both"),
            r"stream.scan: timestep_mode = 'both', expected one of \('state_only',\)",
        ),
        (
            lambda: stream.step(parameters(), normal(H), None, timestep_mode="both"),
            "timestep_mode = 'both', expected one of",
        ),
        (
            lambda: stream.discretize(parameters(), normal(L, 6), timestep_mode="both"),
            "stream.discretize: timestep_mode = 'both'",
        ),
        (
            lambda: stream.scan(mamba.init(H, N), normal(L, H)),
            "params have no dtA_bias; make them with stream.init",
        ),
        (
            lambda: stream.discretize(mamba.init(H, N), normal(L, 6)),
            "params have no dtA_bias; make them with stream.init",
        ),
        (lambda: stream.scan(parameters(), normal(L, 4)), r"u \(11, 4\), expected .* H = 3"),
        (
            lambda: stream.scan(parameters(), normal(L, H), discretization="none"),
            "unknown discretization 'none'",
        ),
        (
            lambda: stream.scan(
                parameters(), normal(2, L, H), stream.init_state(parameters(), (3,))
            ),
            r"state.conv \(3, 3, 6\), expected \(2, 3, 6\)",
        ),
        (lambda: STREAM(H, N, timestep_mode="both"), "timestep_mode = 'both'"),
        (
            lambda: STREAM(H, N)(
                torch.randn(2, L, H), integration_timesteps=-torch.ones(2, L)
            ),
            r"integration_timesteps: -1 at \(0, 0\), expected values >= 0",
        ),
    ],
)  # fmt: skip
def test_bad_calls_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_names() -> None:
    assert "arXiv" in lrnnx_core.citation("STREAM")
    assert registry.get("stream").timestep_modes == ("state_only",)
    assert issubclass(STREAM, Mamba)
