"""RG-LRU: the paper's formulas step by step, starts of documents, the root, RecurrentGemma.

The oracle is `document`: one document, one sample at a time, in float64, without a line of the
library.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import transform_table as table
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from lrnnx_core.models import rglru
from lrnnx_core.ops.guarded_sqrt import guarded_sqrt
from lrnnx_core.sequences import reset_from_cu_seqlens

F32, F64 = torch.float32, torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-13}
H, W, K, B, L = 3, 6, 4, 3, 9
LENGTHS = torch.tensor([5, 0, 9])


def parameters(
    d_model: int = H, width: int = W, heads: int = 2, d_conv: int = K, dtype: torch.dtype = F64
) -> dict[str, Tensor]:
    """Draw parameters, none of them zero, with a convolution that is not tiny."""
    generator = torch.Generator().manual_seed(0)
    params = rglru.init(d_model, width, heads=heads, d_conv=d_conv, generator=generator, dtype=F64)
    return {
        k: (v + 0.3 * torch.randn(v.shape, generator=generator, dtype=F64)).to(dtype)
        for k, v in params.items()
    }


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def gaps(*shape: int) -> Tensor:
    t = 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    return torch.where(t < 0.3, torch.zeros_like(t), t)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def document(
    p: dict[str, Tensor],
    u: Tensor,
    elapsed: Tensor | None = None,
    *,
    c: float | Tensor = 8.0,
    dt_scale: float | Tensor = 1.0,
    state_only: bool = False,
    start_rule: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run one document u (L, H); return y (L, H) and the last h (W,)."""
    weight = p["rg_lru.input_gate_weight"]
    heads, block, _ = weight.shape
    width, taps = heads * block, p["conv_1d.weight"].shape[-1]
    x_rows = [p["linear_x.weight"] @ s + p["linear_x.bias"] for s in u]
    h, ys = u.new_zeros(width), []
    for t, sample in enumerate(u):
        v = p["conv_1d.bias"]
        for k in range(min(taps, t + 1)):
            v = v + p["conv_1d.weight"][:, 0, taps - 1 - k] * x_rows[t - k]
        gates = []
        for name in ("input_gate", "recurrent_gate"):
            full = torch.block_diag(*p[f"rg_lru.{name}_weight"])
            gates.append(sigmoid(v @ full + p[f"rg_lru.{name}_bias"].reshape(-1)))
        i, r = gates
        log_a = -c * r * torch.log(1 + torch.exp(p["rg_lru.recurrent_param"])) * dt_scale
        timed = log_a if elapsed is None else elapsed[t] * log_a
        a = torch.exp(timed)
        m = torch.sqrt(1 - torch.exp(2 * (log_a if state_only else timed)))
        if t == 0 and start_rule:
            a, m = torch.zeros_like(a), torch.ones_like(m)
        h = a * h + m * (i * v)
        z = p["linear_y.weight"] @ sample + p["linear_y.bias"]
        gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        ys.append(p["linear_out.weight"] @ (gelu * h) + p["linear_out.bias"])
    return torch.stack(ys) if ys else u, h


def documents(
    p: dict[str, Tensor],
    u: Tensor,
    valid: Tensor,
    reset: Tensor | None = None,
    elapsed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run every document of every row alone, without padding."""
    y, last = torch.zeros_like(u), u.new_zeros(len(u), W)
    for row in range(len(u)):
        index = valid[row].nonzero()[:, 0].tolist()
        starts = [k for k, t in enumerate(index) if reset is not None and bool(reset[row, t])]
        bounds = sorted({0, *starts, len(index)})
        for first, after in pairwise(bounds):
            own = index[first:after]
            time = None if elapsed is None else elapsed[row, own]
            y[row, own], last[row] = document(p, u[row, own], time, **options)
    return y, last


def same(got: Any, want: Any, **tolerance: float) -> None:
    torch.testing.assert_close(got, want, **(tolerance or EXACT))


# -------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("mode", rglru.MODES)
@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 40])
def test_scan_is_the_papers_recurrence(length: int, heads: int, mode: str) -> None:
    params, u = parameters(heads=heads), normal(2, length, H)
    y, state = rglru.scan(params, u, mode=mode)
    for row in range(2):
        want, last = document(params, u[row])
        same(y[row], want)
        same(state.h[row], last)
    tail = torch.nn.functional.linear(u, params["linear_x.weight"], params["linear_x.bias"])
    tail = torch.nn.functional.pad(tail, (0, 0, K - 1, 0))[:, -(K - 1) :]
    same(state.conv, tail)
    assert state.started.all()


@pytest.mark.parametrize("options", [{}, {"c": 3.0}, {"dt_scale": 0.4}, {"start_rule": False}])
@pytest.mark.parametrize("timestep_mode", rglru.TIMESTEP_MODES)
def test_options_and_elapsed_time(timestep_mode: str, options: dict[str, Any]) -> None:
    params, u, elapsed = parameters(), normal(2, L, H), gaps(2, L)
    want = documents(
        params, u, torch.ones(2, L, dtype=torch.bool), elapsed=elapsed,
        state_only=timestep_mode == "state_only", **options,
    )  # fmt: skip
    for mode in rglru.MODES:
        y, state = rglru.scan(
            params, u, integration_timesteps=elapsed, timestep_mode=timestep_mode, mode=mode,
            **options,
        )  # fmt: skip
        same((y, state.h), want)
    state, ys = rglru.init_state(params, (2,)), []
    for t in range(L):
        y, state = rglru.step(
            params, u[:, t], state, integration_timestep=elapsed[:, t],
            timestep_mode=timestep_mode, **options,
        )  # fmt: skip
        ys.append(y)
    same((torch.stack(ys, 1), state.h), want)


def test_discretize_gives_decay_and_multiplier() -> None:
    params, v, elapsed = parameters(), normal(2, 5, W), gaps(2, 5)
    a, m = rglru.discretize(params, v)
    full = torch.block_diag(*params["rg_lru.recurrent_gate_weight"])
    r = sigmoid(v @ full + params["rg_lru.recurrent_gate_bias"].reshape(-1))
    same(a, torch.exp(-8 * r * torch.log(1 + params["rg_lru.recurrent_param"].exp())))
    same(m, torch.sqrt(1 - a**2))
    timed, m_both = rglru.discretize(params, v, integration_timesteps=elapsed)
    same(timed, a ** elapsed.unsqueeze(-1))
    same(m_both, torch.sqrt(1 - timed**2))
    async_a, m_async = rglru.discretize(
        params, v, integration_timesteps=elapsed, timestep_mode="state_only"
    )
    same((async_a, m_async), (timed, m))
    assert all(t.dtype == F32 for t in rglru.discretize(parameters(dtype=F32), v.bfloat16()))


@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("mode", rglru.MODES)
def test_every_split_then_steps_is_the_whole(mode: str, d_conv: int) -> None:
    params, u = parameters(d_conv=d_conv), normal(2, 7, H)
    want = rglru.scan(params, u)
    same(want[0][0], document(params, u[0])[0])
    for k in range(8):
        y1, state = rglru.scan(params, u[:, :k], mode=mode)
        same(state.started, torch.full((2,), k > 0))
        y2, last = rglru.scan(params, u[:, k:], state, mode=mode)
        same((torch.cat([y1, y2], 1), last), want)
        ys = [y1]
        for t in range(k, 7):
            y, state = rglru.step(params, u[:, t], state)
            ys.append(y.unsqueeze(1))
        same((torch.cat(ys, 1), state), want)


def test_batch_axes_are_free() -> None:
    params, u = parameters(), normal(2, 3, 5, H)
    y, state = rglru.scan(params, u)
    assert (state.conv.shape, state.h.shape) == ((2, 3, K - 1, W), (2, 3, W))
    one, last = rglru.scan(params, u[1, 2])
    same((one, last), (y[1, 2], type(state)(*(s[1, 2] for s in state))))
    empty, back = rglru.scan(params, u[:, :, :0], state)
    assert empty.shape == (2, 3, 0, H)
    same(back, state)
    same(rglru.scan(params, u[:, :, :0])[1], rglru.init_state(params, (2, 3)))


# -------------------------------------------------------------------------- padding and documents


def flags(*shape: int, seed: int, p: float) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < p


@pytest.mark.parametrize("mode", rglru.MODES)
@pytest.mark.parametrize("given", ["lengths", "mask", "reset", "lengths reset", "all"])
def test_padding_and_resets_are_separate_documents(given: str, mode: str) -> None:
    params, u, elapsed = parameters(), normal(B, L, H), gaps(B, L)
    valid = torch.ones(B, L, dtype=torch.bool)
    arguments: dict[str, Tensor] = {}
    if "lengths" in given or given == "all":
        arguments["lengths"] = LENGTHS
        valid = valid & (torch.arange(L) < LENGTHS[:, None])
    if given in ("mask", "all"):
        arguments["mask"] = flags(B, L, seed=5, p=0.7)
        arguments["mask"][0, :2] = False
        valid = valid & arguments["mask"]
    reset = None
    if "reset" in given or given == "all":
        reset = arguments["reset"] = flags(B, L, seed=6, p=0.4)
    want = documents(params, u, valid, reset, elapsed)
    y, state = rglru.scan(params, u, integration_timesteps=elapsed, mode=mode, **arguments)
    same((y, state.h), want)
    same(state.started, valid.any(-1))
    # what comes next in the stream is not a start of a document, except in the empty row
    more = normal(B, 4, H, seed=8)
    y, after = rglru.scan(params, more, state)
    for row in range(B):
        index = valid[row].nonzero()[:, 0]
        if reset is not None and reset[row, index].any():
            index = index[int(reset[row, index].nonzero()[-1]) :]
        time = torch.cat([elapsed[row, index], torch.ones(4, dtype=F64)])
        joined, last = document(params, torch.cat([u[row, index], more[row]]), time)
        same((y[row], after.h[row]), (joined[-4:], last))


def test_packed_documents_an_empty_one_among_them() -> None:
    params, u = parameters(), normal(12, H)
    cu_seqlens = torch.tensor([0, 2, 2, 3, 9, 12])
    y, state = rglru.scan(params, u, reset=reset_from_cu_seqlens(cu_seqlens, 12))
    last = None
    for a, b in pairwise(cu_seqlens.tolist()):
        if a < b:
            want, last = document(params, u[a:b])
            same(y[a:b], want)
    same(state.h, last)


def test_a_reset_without_batch_axes_fits_lengths() -> None:
    params, u = parameters(), normal(B, L, H)
    reset = torch.arange(L) == 3
    got = rglru.scan(params, u, lengths=LENGTHS, reset=reset)
    same(got, rglru.scan(params, u, lengths=LENGTHS, reset=reset.expand(B, L)))


def test_the_start_rule_follows_documents_and_not_calls() -> None:
    params, u = parameters(), normal(4, H)
    fresh = rglru.init_state(params)
    same(rglru.scan(params, u, fresh), rglru.scan(params, u))
    # a state that has begun goes on; one that has not is empty, whatever stands in h
    other = fresh._replace(h=normal(W))
    same(rglru.scan(params, u, other)[0], rglru.scan(params, u)[0])
    begun = rglru.scan(params, u, other._replace(started=torch.tensor(True)))[0]
    assert not torch.allclose(begun, rglru.scan(params, u)[0])
    # a reset at the first sample of a call clears a state that goes on
    first = torch.arange(4) == 0
    _, state = rglru.scan(params, normal(3, H, seed=7))
    same(rglru.scan(params, u, state, reset=first)[0], rglru.scan(params, u)[0])
    without = rglru.scan(params, u, state, reset=first, start_rule=False)[0]
    same(without, rglru.scan(params, u, start_rule=False)[0])
    same(without, document(params, u, start_rule=False)[0])


# -------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("power", [1.0, 4.0, 8.0])
def test_the_square_of_the_decay_starts_uniform_on_the_ring(power: float) -> None:
    n = 4000
    params = rglru.init(2, n, heads=n, init_power=power, dtype=F64)
    ring = torch.exp(-power * torch.nn.functional.softplus(params["rg_lru.recurrent_param"]))
    assert ring.min() >= 0.9
    assert ring.max() <= 0.999
    u = ((ring**2 - 0.9**2) / (0.999**2 - 0.9**2)).sort().values
    distance = (u - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov, 1 %
    counts = torch.histc(u, bins=10, min=0, max=1)
    assert ((counts - n / 10).abs() < 5 * math.sqrt(n / 10)).all()


def test_the_power_says_which_decay_starts_on_the_ring() -> None:
    params = rglru.init(4, 64, heads=1, init_power=8.0, dtype=F64)
    params["rg_lru.recurrent_gate_weight"] = torch.zeros_like(
        params["rg_lru.recurrent_gate_weight"]
    )
    params["rg_lru.recurrent_gate_bias"] = torch.full_like(
        params["rg_lru.recurrent_gate_bias"], 40.0
    )
    a, _ = rglru.discretize(params, normal(5, 64))  # the gate is open: a = a0^c
    assert a.min() >= 0.9
    assert a.max() <= 0.999
    # as published: the gate starts at 1/2, the decay is the fourth power
    params = rglru.init(4, 64, heads=1, dtype=F64)
    a, _ = rglru.discretize(params, torch.zeros(5, 64, dtype=F64))
    assert a.min() >= 0.9**4
    assert a.max() <= 0.999**4


def test_no_decay_starts_at_one_even_on_the_full_disk() -> None:
    params = rglru.init(2, 20000, heads=20000, r_min=0.9, r_max=1.0, dtype=F32)
    assert params["rg_lru.recurrent_param"].isfinite().all()


def test_deviations_and_shapes_are_those_of_the_published_code() -> None:
    params = rglru.init(400, 600, heads=2, out_variance=0.25, generator=torch.Generator())
    deviations = {
        "linear_x.weight": ((600, 400), 400**-0.5),
        "linear_y.weight": ((600, 400), 400**-0.5),
        "conv_1d.weight": ((600, 1, 4), 0.05),
        "rg_lru.input_gate_weight": ((2, 300, 300), 300**-0.5),
        "rg_lru.recurrent_gate_weight": ((2, 300, 300), 300**-0.5),
        "linear_out.weight": ((400, 600), 0.5 * 600**-0.5),
    }
    for key, (shape, deviation) in deviations.items():
        assert params[key].shape == shape
        assert abs(params[key].std().item() / deviation - 1) < 0.05, key
        assert abs(params[key].mean().item()) < 0.1 * deviation, key
    zero = {k for k, v in params.items() if not v.any()}
    assert zero == {k for k in params if k.endswith("bias")}
    assert len(zero) == 6
    bare = rglru.init(4, bias=False, conv_bias=False)
    assert {k for k in bare if "bias" in k} == {
        "rg_lru.input_gate_bias",
        "rg_lru.recurrent_gate_bias",
    }
    y, _ = rglru.scan(bare, torch.randn(5, 4))
    assert y.shape == (5, 4)


def test_widths_and_blocks() -> None:
    def blocks(*sizes: int | None, **options: Any) -> tuple[int, ...]:
        return tuple(rglru.init(*sizes, **options)["rg_lru.input_gate_weight"].shape)

    assert blocks(4) == (1, 4, 4)
    assert blocks(4, 6, heads=3) == (3, 2, 2)
    assert blocks(4, expand=2) == (1, 8, 8)
    assert blocks(2, 2560) == (10, 256, 256)  # RecurrentGemma-2B
    assert blocks(2, 520) == (4, 130, 130)
    with pytest.raises(ValueError, match="heads = 4 does not divide the width 6"):
        rglru.init(4, 6, heads=4)
    with pytest.raises(ValueError, match="d_state = 6 and expand = 2, expected one of them"):
        rglru.init(4, 6, expand=2)
    with pytest.raises(ValueError, match="expected 0 <= r_min < r_max <= 1"):
        rglru.init(4, r_min=0.99, r_max=0.9)
    for name in ("d_model", "d_state", "heads", "d_conv", "expand"):
        sizes: dict[str, Any] = {"d_model": 4, name: 0}
        with pytest.raises(ValueError, match=f"rglru.init: {name} = 0, expected an integer >= 1"):
            rglru.init(**sizes)


# ------------------------------------------------------------------------------ guarded square root


def test_guarded_sqrt_and_its_slope() -> None:
    v = torch.tensor([0.0, 1e-12, 2e-7, 3e-7, 1e-3, 0.7], dtype=F64, requires_grad=True)
    y = guarded_sqrt(v)
    assert torch.equal(y, torch.sqrt(v))
    slope = 1 / torch.clamp(2 * torch.sqrt(v), min=1e-3)
    (first,) = torch.autograd.grad(y.sum(), v, create_graph=True)
    same(first, slope)
    (second,) = torch.autograd.grad(first.sum(), v)
    curvature = torch.where(v < 2.5e-7, 0, -0.25 * v.detach() ** -1.5)
    same(second, curvature)
    away = torch.tensor([1e-3, 0.2, 0.9], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(guarded_sqrt, away, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(guarded_sqrt, away)


SECOND = {
    "hessian": hessian,
    "grad(grad)": lambda f: grad(grad(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(grad)": lambda f: jacfwd(grad(f)),
}


@pytest.mark.parametrize("name", SECOND)
def test_guarded_sqrt_has_one_derivative_under_every_transform(name: str) -> None:
    """Above the clip that of the root, below it that of a line of slope 1000."""

    def f(v: Tensor) -> Tensor:
        return guarded_sqrt(v) ** 2 * torch.cos(v)  # its derivative mixes value and slope

    def expected(v: Tensor) -> Tensor:
        s = torch.sqrt(v)
        slope, curve = (torch.full_like(v, 1e3), 0 * v) if v < 2.5e-7 else (0.5 / s, -0.25 / s**3)
        square, first, second = s**2, 2 * s * slope, 2 * slope**2 + 2 * s * curve
        return second * torch.cos(v) - 2 * first * torch.sin(v) - square * torch.cos(v)

    points = torch.tensor([1e-9, 1e-7, 1e-4, 0.3], dtype=F64)
    want = torch.stack([expected(v) for v in points])
    close = {"rtol": 1e-12, "atol": 1e-11}  # terms of 1e4 cancel where the root is curved
    same(torch.stack([SECOND[name](f)(v) for v in points]), want, **close)
    same(vmap(SECOND[name](f))(points), want, **close)
    first = torch.stack([grad(f)(v) for v in points])
    same(vmap(lambda v: jvp(f, (v,), (torch.ones_like(v),))[1])(points), first)


@pytest.mark.compile
def test_guarded_sqrt_compiles_whole() -> None:
    v = torch.tensor([1e-9, 0.1, 0.9], dtype=F64)
    for f in (guarded_sqrt, vmap(grad(guarded_sqrt)), jacfwd(guarded_sqrt), jacrev(guarded_sqrt)):
        same(torch.compile(f, fullgraph=True, backend="aot_eager")(v), f(v))


@pytest.mark.parametrize("Lambda", [-20.0, -12.0, -5.0, 3.0])
def test_decays_near_one_lose_no_digits_of_the_multiplier(Lambda: float) -> None:
    params = parameters(dtype=F32)
    params["rg_lru.recurrent_param"] = torch.full((W,), Lambda)
    v = normal(5, W, dtype=F32)
    wide = {k: x.double() for k, x in params.items()}
    want = rglru.discretize(wide, v.double())
    same(rglru.discretize(params, v)[1].double(), want[1], rtol=3e-6, atol=0)
    same(want[1], torch.sqrt(-torch.expm1(2 * torch.log(want[0]))), rtol=1e-6, atol=0)


# -------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("start_rule", [True, False])
def test_gradients_of_everything_are_right(start_rule: bool) -> None:
    params = parameters(2, 4)
    keys = list(params)
    started = torch.tensor([True, False])
    reset = torch.tensor([False, False, True, False, False])

    def run(u: Tensor, elapsed: Tensor, conv: Tensor, h: Tensor, *values: Tensor) -> Any:
        y, last = rglru.scan(
            dict(zip(keys, values, strict=True)), u, rglru.State(conv, h, started),
            integration_timesteps=elapsed, reset=reset, lengths=torch.tensor([5, 4]),
            start_rule=start_rule,
        )  # fmt: skip
        return y, last.conv, last.h

    inputs = (
        normal(2, 5, 2),
        0.5 + gaps(2, 5),
        normal(2, K - 1, 4),
        normal(2, 4),
        *params.values(),
    )
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("gate", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("Lambda", [-1e3, -50.0, 5.0, 1e3])
@pytest.mark.parametrize("timestep_mode", rglru.TIMESTEP_MODES)
def test_gradients_stay_finite_at_the_ends(
    timestep_mode: str, Lambda: float, gate: float, dtype: torch.dtype
) -> None:
    params = parameters(dtype=dtype)
    params["rg_lru.recurrent_param"] = torch.full((W,), Lambda, dtype=dtype)
    params["rg_lru.recurrent_gate_bias"] = torch.full((2, W // 2), gate, dtype=dtype)
    params = {k: v.requires_grad_() for k, v in params.items()}
    u = normal(2, L, H, dtype=dtype).requires_grad_()
    elapsed = gaps(2, L).to(dtype)
    y, state = rglru.scan(
        params, u, integration_timesteps=elapsed, timestep_mode=timestep_mode,
        lengths=torch.tensor([4, 9]),
    )  # fmt: skip
    grads = torch.autograd.grad(y.sum() + state.h.sum(), [u, *params.values()])
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_the_slope_is_clipped_where_the_decay_is_one() -> None:
    """Through log a: d m / d log a = -a^2 / max(m, 5e-4), so zero at m = 0 in the input's path."""
    log_a = torch.tensor([0.0, -1e-8, -1e-3], dtype=F64, requires_grad=True)
    m = guarded_sqrt(-torch.expm1(2 * log_a))
    (got,) = torch.autograd.grad(m.sum(), log_a)
    same(got, (-torch.exp(2 * log_a) / torch.clamp(m, min=5e-4)).detach())


TRANSFORMS = (
    *("backward", "double backward", "grad", "grad(grad)", "jvp", "jvp(jvp)", "jvp(grad)"),
    *("jacrev", "jacfwd", "hessian", "jacfwd(jacfwd)", "jacrev(jacfwd)", "checkpoint"),
    *("vmap", "vmap(grad)", "vmap(jvp)", "vmap(hessian)", "grad(vmap)", "per-sample gradients"),
)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_agrees_with_the_papers_loop(name: str) -> None:
    params = parameters(2, 4, d_conv=2)
    keys = ("rg_lru.recurrent_param", "rg_lru.recurrent_gate_bias", "conv_1d.weight")
    reset = torch.tensor([False, False, True, False])

    def with_values(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return params | dict(zip(keys, values, strict=True))

    def library(u: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        y, state = rglru.scan(with_values(values), u, reset=reset)
        return y, state.h

    def loop(u: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        p = with_values(values)
        first, (second, h) = document(p, u[:2])[0], document(p, u[2:])
        return torch.cat([first, second]), h

    point = (normal(4, 2), *(params[k] for k in keys))
    transform = table.TRANSFORMS[name]
    table.assert_equal(transform(library, point), transform(loop, point))


def test_numbers_map_and_differentiate() -> None:
    params, u = parameters(), normal(5, H)
    values = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    for option, scale in (("dt_scale", 1.0), ("c", 8.0)):

        def run(x: Tensor, option: str = option) -> Tensor:
            return rglru.scan(params, u, **{option: x})[0]

        def loop(x: Tensor, option: str = option) -> Tensor:
            return document(params, u, **{option: x})[0]

        same(vmap(run)(scale * values), torch.stack([loop(scale * x) for x in values]))
        same(jacfwd(run)(scale * values[0]), jacrev(loop)(scale * values[0]))
    for option, point in (
        ("r_min", 0.9),
        ("r_max", 0.99),
        ("init_power", 2.0),
        ("out_variance", 0.5),
    ):

        def make(x: Tensor, option: str = option) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(0)
            return rglru.init(3, 4, generator=generator, dtype=F64, **{option: x})

        x = point * torch.tensor([0.98, 1.0], dtype=F64)
        many = vmap(make, randomness="same")(x)
        one = make(x[1])
        same({k: v[1] for k, v in many.items()}, one)
        moved = {k for k, v in many.items() if not torch.equal(v[0], v[1])}
        expected = "linear_out.weight" if option == "out_variance" else "rg_lru.recurrent_param"
        assert moved == {expected}
        same(make(point)[expected], one[expected])


# ------------------------------------------------------------------------------- dtypes, bad input


def test_states_are_float32_under_half_precision_activations() -> None:
    params, u = parameters(dtype=F32), normal(2, 200, H).bfloat16()
    want, _ = rglru.scan({k: v.double() for k, v in params.items()}, u.double())
    y, state = rglru.scan(params, u)
    assert (y.dtype, state.h.dtype) == (torch.bfloat16, F32)
    same(y.double(), want, rtol=2e-2, atol=2e-2)
    # everything but Lambda in bfloat16, as a cast Module has it
    low = {k: v if k == "rg_lru.recurrent_param" else v.bfloat16() for k, v in params.items()}
    y, state = rglru.scan(low, u)
    assert (y.dtype, state.h.dtype, state.conv.dtype) == (torch.bfloat16, F32, torch.bfloat16)
    start = rglru.init_state(low, (2,))
    assert [s.dtype for s in start] == [s.dtype for s in state]
    same(y.double(), want, rtol=5e-2, atol=5e-2)
    stepped, _ = rglru.step(low, u[:, 0], start)
    assert stepped.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = rglru.scan(params, u.float())
    assert state.h.dtype == F32
    same(y.double(), want, rtol=5e-2, atol=5e-2)


def test_bad_input_says_what_came_and_what_was_expected() -> None:
    params, u = parameters(dtype=F32), torch.randn(2, 6, H)
    state = rglru.init_state(params, (2,))
    other = rglru.init_state(rglru.init(H, 8), (2,))
    three, number = rglru.init_state(params, (3,)), state._replace(started=torch.ones(2))
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        (r"rglru.scan: state.conv \(3, 3, 6\), expected \(2, 3, 6\)", {"state": three}),
        (r"rglru.scan: state.conv \(2, 3, 8\), expected \(2, 3, 6\)", {"state": other}),
        (r"rglru.scan: state.h \(2, 8\), expected \(2, 6\)", {"state": state._replace(h=other.h)}),
        (r"rglru.scan: state is a Tensor, expected State", {"state": state.h}),
        (r"rglru.scan: state.h is on meta", {"state": state._replace(h=state.h.to("meta"))}),
        (r"rglru.scan: state.started has dtype torch.float32", {"state": number}),
        (r"rglru.scan: mode = 'conv', expected one of", {"mode": "conv"}),
        (r"rglru.scan: discretization = 'zoh', expected .*'none'", {"discretization": "zoh"}),
        (r"rglru.scan: timestep_mode = 'neither', expected one of", {"timestep_mode": "neither"}),
        (r"rglru.scan: lengths \(3,\) does not fit", {"lengths": torch.ones(3, dtype=torch.long)}),
        (r"rglru.scan: reset has dtype torch.int64", {"reset": torch.ones(6, dtype=torch.long)}),
    )  # fmt: skip
    for message, options in cases:
        with pytest.raises(ValueError, match=message):
            rglru.scan(params, u, **options)
    with pytest.raises(ValueError, match=r"rglru.scan: u \(2, 6, 2\), expected .* H = 3"):
        rglru.scan(params, u[..., :2])
    with pytest.raises(ValueError, match=r"rglru.step: u \(2, 2\), expected .* H = 3"):
        rglru.step(params, u[:, 0, :2], state)
    with pytest.raises(ValueError, match=r"rglru.step: integration_timestep \(3,\)"):
        rglru.step(params, u[:, 0], state, integration_timestep=torch.ones(3))
    with pytest.raises(ValueError, match=r"rglru.discretize: v \(5, 4\), expected .*W = 6"):
        rglru.discretize(params, torch.randn(5, 4))
    mixed = params | {k: v for k, v in rglru.init(H, 8).items() if "gate" in k}
    with pytest.raises(ValueError, match="1 gate blocks of width 8 do not make up the width 6"):
        rglru.scan(mixed, u)
    narrow = params | {k: v for k, v in rglru.init(H, 8).items() if k.startswith("linear_y")}
    with pytest.raises(ValueError, match=r"linear_y gives \(2, 6, 8\), expected \(2, 6, 6\)"):
        rglru.scan(narrow, u)


def test_a_long_stream_does_not_drift() -> None:
    params, u = parameters(dtype=F32), normal(20_000, H)
    y, state = rglru.scan(params, u.float())
    wide = {k: v.double() for k, v in params.items()}
    want, last = rglru.scan(wide, u)
    same(y.double(), want, rtol=1e-4, atol=1e-4)
    same(state.h.double(), last.h, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------- RecurrentGemma


@pytest.fixture(scope="module")
def recurrent_gemma() -> Any:
    """Return a function that makes a tiny random block of `transformers` and our copy of it."""
    pytest.importorskip("transformers")
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma

    def make(heads: int) -> tuple[Any, dict[str, Tensor]]:
        width = 8
        config = RecurrentGemmaConfig(
            hidden_size=width, lru_width=width, num_attention_heads=heads, conv1d_width=4,
            num_hidden_layers=1, vocab_size=7, intermediate_size=16,
        )  # fmt: skip
        block = modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock(config, 0)
        ours = rglru.init(width, heads=heads)
        theirs = dict(block.named_parameters())
        assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}
        with torch.no_grad():
            for key, value in theirs.items():
                spread = 0.3 * torch.randn(value.shape)
                value.copy_(ours[key] + (0 if key == "rg_lru.recurrent_param" else spread))
        return block, {k: v.detach().clone() for k, v in theirs.items()}

    return make


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_a_recurrent_gemma_block_agrees(recurrent_gemma: Any, heads: int) -> None:
    block, params = recurrent_gemma(heads)
    u, k = torch.randn(2, 11, 8), 7
    positions = torch.arange(11).expand(2, 11)
    tolerance = {"rtol": 0.0, "atol": 1e-6}
    with torch.no_grad():
        want = block(u, positions, None, use_cache=False)[0]
        y, _ = rglru.scan(params, u)
        same(y, want, **tolerance)
        prefill = block(u[:, :k], positions[:, :k], None, use_cache=True)[0]
        y, state = rglru.scan(params, u[:, :k])
        for t in range(k, 12):
            same(y, prefill, **tolerance)
            same(state.h, block.rg_lru.recurrent_states, **tolerance)
            same(state.conv, block.conv1d_state.mT, **tolerance)
            if t == 11:
                break
            prefill = block(u[:, t : t + 1], positions[:, t : t + 1], None, use_cache=True)[0][:, 0]
            y, state = rglru.step(params, u[:, t], state)


def test_gradients_agree_with_recurrent_gemma(recurrent_gemma: Any) -> None:
    block, params = recurrent_gemma(2)
    u = torch.randn(2, 9, 8)
    block(u, torch.arange(9).expand(2, 9), None, use_cache=False)[0].square().sum().backward()
    params = {k: v.requires_grad_() for k, v in params.items()}
    rglru.scan(params, u)[0].square().sum().backward()
    for key, value in block.named_parameters():
        scale = max(1.0, float(value.grad.abs().max()))
        same(params[key].grad / scale, value.grad / scale, rtol=0, atol=1e-5)


def test_the_gate_may_take_the_exact_gelu() -> None:
    params, u = parameters(), torch.randn(B, L, H, dtype=F64)
    opened = {k: v for k, v in params.items() if not k.startswith("linear_out")}
    identity = opened | {"linear_out.weight": torch.eye(W, dtype=F64)}
    z = torch.nn.functional.linear(u, params["linear_y.weight"], params["linear_y.bias"])
    gelu = torch.nn.functional.gelu
    exact, state = rglru.scan(identity, u, gelu="erf")
    published, _ = rglru.scan(identity, u)
    torch.testing.assert_close(exact * gelu(z, approximate="tanh"), published * gelu(z), **EXACT)
    assert not torch.allclose(exact, published, rtol=1e-5)
    y, _ = rglru.scan(identity, u[:, :-1], gelu="erf")
    _, before = rglru.scan(identity, u[:, :-1])
    y_t, after = rglru.step(identity, u[:, -1], before, gelu="erf")
    torch.testing.assert_close(torch.cat([y, y_t.unsqueeze(1)], dim=1), exact, **EXACT)
    torch.testing.assert_close(after.h, state.h, **EXACT)
    with pytest.raises(ValueError, match=r"rglru.scan: gelu = 'fast', expected one of \('tanh', "):
        rglru.scan(params, u, gelu="fast")  # type: ignore[arg-type]
