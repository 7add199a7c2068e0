"""What only the Mamba-2 paper says; everything general is in the registry-walking tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lrnnx_core import mamba2
from lrnnx_core.ops.ssd import ssd
from lrnnx_nn import Mamba2
from lrnnx_nn.convert import load_mixer

DOUBLE = torch.float64
H, N = 6, 5
CONFIGURATIONS = [
    pytest.param({"head_dim": 3}, {}, id="one group"),
    pytest.param({"head_dim": 3, "n_groups": 2}, {"n_groups": 2}, id="two groups"),
    pytest.param({"head_dim": 4, "bias": True}, {"norm_before_gate": True}, id="norm first"),
    pytest.param({"head_dim": 12, "gated_norm": False}, {"dt_limit": (0.01, 0.05)}, id="no norm"),
]


def by_hand(params: dict[str, Tensor], u: Tensor, groups: int, norm_first: bool) -> Tensor:
    """Run one sequence u (L, H) head by head and step by step, from the paper's equations."""
    p = params
    heads, width = p["A_log"].shape[0], p["out_proj.weight"].shape[1]
    per_head, taps = width // heads, p["conv1d.weight"].shape[-1]
    rows = u @ p["in_proj.weight"].mT + p.get("in_proj.bias", torch.zeros((), dtype=u.dtype))
    mixed = p["conv1d.weight"].shape[0]
    z, xBC, r = rows.split([width, mixed, heads], -1)
    states = (mixed - width) // (2 * groups)
    h = [torch.zeros(per_head, states, dtype=u.dtype) for _ in range(heads)]
    outputs = []
    for t in range(u.shape[0]):
        window = [xBC[s] if s >= 0 else torch.zeros(mixed) for s in range(t - taps + 1, t + 1)]
        v = sum(p["conv1d.weight"][:, 0, k] * w for k, w in enumerate(window))
        v = torch.nn.functional.silu(v + p["conv1d.bias"])
        x, B, C = v.split([width, groups * states, groups * states])
        y = []
        for k in range(heads):
            g = k // (heads // groups)
            x_k = x[k * per_head : (k + 1) * per_head]
            delta = torch.log1p(torch.exp(r[t, k] + p["dt_bias"][k]))
            if norm_first is None:
                delta = delta.clamp(0.01, 0.05)
            B_g, C_g = B[g * states : (g + 1) * states], C[g * states : (g + 1) * states]
            h[k] = torch.exp(-delta * p["A_log"][k].exp()) * h[k] + delta * torch.outer(x_k, B_g)
            y.append(h[k] @ C_g + p["D"][k] * x_k)
        y = torch.cat(y)
        gate = z[t] * torch.sigmoid(z[t])
        y = y if norm_first else y * gate
        if "norm.weight" in p:
            parts = [q / torch.sqrt(q.square().mean() + 1e-5) for q in y.chunk(groups)]
            y = torch.cat(parts) * p["norm.weight"]
        y = y * gate if norm_first else y
        outputs.append(p["out_proj.weight"] @ y + p.get("out_proj.bias", torch.zeros(())))
    return torch.stack(outputs)


@pytest.mark.parametrize(("init", "call"), CONFIGURATIONS)
@pytest.mark.parametrize("mode", mamba2.MODES)
def test_block_is_the_papers(init: dict, call: dict, mode: str) -> None:
    params = mamba2.init(H, N, dtype=DOUBLE, **init)
    u = torch.randn(9, H, dtype=DOUBLE)
    first = call.get("norm_before_gate", None if "dt_limit" in call else False)
    y, _ = mamba2.scan(params, u, mode=mode, chunk_size=4, **call)
    torch.testing.assert_close(
        y, by_hand(params, u, init.get("n_groups", 1), first), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 23])
@pytest.mark.parametrize("with_reset", [False, True])
def test_every_chunk_size_gives_the_loop_and_its_gradients(
    chunk_size: int, length: int, with_reset: bool
) -> None:
    params = mamba2.init(H, N, head_dim=3, n_groups=2, dtype=DOUBLE)
    state = mamba2.scan(params, torch.randn(2, 3, H, dtype=DOUBLE), n_groups=2)[1]
    reset = torch.rand(2, length) < 0.3 if with_reset else None
    u = torch.randn(2, length, H, dtype=DOUBLE, requires_grad=True)
    results = []
    for choices in ({"chunk_size": chunk_size}, {"mode": "recurrent"}):
        y, new = mamba2.scan(params, u, state, reset=reset, n_groups=2, **choices)
        loss = y.square().sum() + new.h.square().sum()
        results.append((y, new.h, *torch.autograd.grad(loss, u)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_long_gaps_overflow_nowhere() -> None:
    """Decays over a chunk are exponentials of differences, masked before the exponential."""
    x = torch.randn(1, 16, 2, 3, requires_grad=True)
    B, C = torch.randn(1, 16, 1, 4), torch.randn(1, 16, 1, 4)
    log_decay = torch.full((1, 16, 2), -1e4, requires_grad=True)
    y, last = ssd(x, log_decay, B, C, torch.randn(1, 2, 3, 4), chunk_size=8)
    (y.sum() + last.sum()).backward()
    for t in (y, last, x.grad, log_decay.grad):
        assert t is not None
        assert bool(t.isfinite().all())


def test_initial_values() -> None:
    params = mamba2.init(64, 16, A_min=2.0, A_max=4.0, dt_min=0.01, dt_max=0.02, head_dim=1)
    A = params["A_log"].exp()
    assert bool(((A >= 2) & (A <= 4)).all())
    assert float(A.std()) > 0.4
    dt = torch.nn.functional.softplus(params["dt_bias"])
    assert bool(((dt >= 0.0099) & (dt <= 0.0201)).all())
    assert mamba2.init(40, 4)["A_log"].shape == (2,)  # E = 80: two heads of 40


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"head_dim": 5}, "head_dim = 5"),
        ({"head_dim": 3, "n_groups": 3}, "n_groups = 3"),
        ({"d_conv": 0}, "d_conv = 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamba2.init(H, N, **choices)


def test_calls_that_do_not_fit_are_refused() -> None:
    params = mamba2.init(H, N, head_dim=3)
    u = torch.randn(2, 4, H)
    with pytest.raises(ValueError, match="n_groups = 3 does not fit"):
        mamba2.scan(params, u, n_groups=3)
    with pytest.raises(ValueError, match="dt_limit"):
        mamba2.scan(params, u, dt_limit=(0.2, 0.1))
    with pytest.raises(ValueError, match=r"state.h \(3, 4, 3, 5\)"):
        mamba2.scan(params, u, mamba2.init_state(params, (3,))._replace(conv=torch.zeros(2, 3, 22)))


@pytest.mark.parametrize("groups", [1, 2])
def test_agrees_with_transformers_full_and_stepwise(groups: int) -> None:
    pytest.importorskip("transformers")
    from transformers import DynamicCache, Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Model

    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=4, n_groups=groups, expand=2,
        num_hidden_layers=1, vocab_size=32, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    mixer = Mamba2Model(config).eval().layers[0].mixer
    layer = Mamba2(16, 4, head_dim=8, n_groups=groups)
    load_mixer(layer, mixer.state_dict())
    u = torch.randn(2, 21, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(u), mixer(u), rtol=0, atol=1e-6)
        cache = DynamicCache(config=config)
        theirs = [mixer(u[:, :13], cache_params=cache)]
        theirs += [mixer(u[:, t : t + 1], cache_params=cache) for t in range(13, 21)]
        y, state = layer.prefill(u[:, :13])
        ours = [y]
        for t in range(13, 21):
            y_t, state = layer.step(u[:, t], state)
            ours.append(y_t.unsqueeze(1))
        torch.testing.assert_close(torch.cat(ours, 1), torch.cat(theirs, 1), rtol=0, atol=1e-6)
        held = cache.get_recurrent_state(0, state_idx=0)
        torch.testing.assert_close(state.h, held.reshape(state.h.shape), rtol=0, atol=1e-6)


def test_limits_hold_in_steps_too() -> None:
    layer = Mamba2(H, N, head_dim=3, dt_limit=(0.0, 1e-3))
    free = Mamba2(H, N, head_dim=3)
    free.load_state_dict(layer.state_dict())
    u = torch.randn(2, 6, H)
    y, state = layer(u), layer.init_state((2,))
    for t in range(6):
        y_t, state = layer.step(u[:, t], state)
    torch.testing.assert_close(y_t, y[:, -1])
    assert not torch.allclose(free(u), y)
    assert math.isinf(mamba2.scan.__kwdefaults__["dt_limit"][1])
