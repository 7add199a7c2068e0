"""The residual block and its MLPs: formulas, dtypes, and the three ways to run them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_nn import MLP, S5, Attention, Gated, GatedMLP, Mamba, Mixer, ResidualBlock, Stack
from lrnnx_nn.mixers import make_mixer, mixer_name
from lrnnx_nn.mlp import make_mlp
from lrnnx_nn.norms import LayerNorm, RMSNorm, make_norm

H = 6
WIDE: dict[str, Any] = {"dtype": torch.float64}


def mixer(name: str) -> nn.Module:
    made = {
        "s5": lambda: S5(H, 8, **WIDE),
        "mamba": lambda: Mamba(H, 4, **WIDE),
        "attn": lambda: Attention(H, n_heads=3, window=3, **WIDE),
        "gated": lambda: Gated(H, "s4d", 4, bottleneck=2, **WIDE),
    }
    return made[name]()


def block(name: str = "s5", mlp: nn.Module | None = None, **options: Any) -> ResidualBlock:
    made = ResidualBlock(H, mixer(name), mlp, **{**WIDE, **options})
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.startswith("norm"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("name", ["s5", "mamba", "attn", "gated"])
@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_forward_prefill_and_step_agree(name: str, parallel: bool) -> None:
    layer = block(name, GatedMLP(H, 9, **WIDE), parallel=parallel, dropout=0.5)
    assert isinstance(layer, Mixer)
    u = torch.randn(2, 7, H, **WIDE)
    whole = layer(u)
    first, state = layer.prefill(u[:, :3])
    second, state = layer.prefill(u[:, 3:5], state)
    last = []
    for t in (5, 6):
        y, state = layer.step(u[:, t], state)
        last.append(y)
    pieces = torch.cat([first, second, torch.stack(last, 1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-11)
    start = layer.init_state((2,), capacity=9)
    torch.testing.assert_close(layer.step(u[:, 0], start)[0], whole[:, 0], rtol=1e-11, atol=1e-11)
    lengths = torch.tensor([7, 4])
    padded = layer(
        torch.where(torch.arange(7)[:, None] < lengths[:, None, None], u, 1e3), lengths=lengths
    )
    torch.testing.assert_close(padded[1, :4], whole[1, :4], rtol=1e-11, atol=1e-11)
    assert not padded[1, 4:].any()


def test_it_is_the_formula() -> None:
    u = torch.randn(2, 5, H, **WIDE)
    both = block("s5", MLP(H, 9, bias=True, **WIDE), norm="layer")
    assert both.norm2 is not None
    assert both.mlp is not None
    x = u + both.mixer(both.norm1(u))
    torch.testing.assert_close(both(u), x + both.mlp(both.norm2(x)))
    parallel = block("s5", MLP(H, 9, **WIDE), parallel=True)
    assert parallel.norm2 is None
    assert parallel.mlp is not None
    z = parallel.norm1(u)
    torch.testing.assert_close(parallel(u), u + parallel.mixer(z) + parallel.mlp(z))
    alone = block("s5", norm="none")
    torch.testing.assert_close(alone(u), u + alone.mixer(u))


def test_mlps_are_their_formulas() -> None:
    x = torch.randn(3, H)
    for name, act in (("swiglu", F.silu), ("geglu", lambda g: F.gelu(g, approximate="tanh"))):
        made = make_mlp(name, H, 9, bias=True)
        assert isinstance(made, GatedMLP)
        nn.init.normal_(made.gate_proj.bias)
        want = made.down_proj(act(made.gate_proj(x)) * made.up_proj(x))
        torch.testing.assert_close(made(x), want)
    plain = make_mlp("gelu", H, 9)
    assert isinstance(plain, MLP)
    assert plain.up_proj.bias is None
    want = plain.down_proj(F.gelu(plain.up_proj(x), approximate="tanh"))
    torch.testing.assert_close(plain(x), want)
    own = make_mlp(lambda h, e: nn.Linear(h, h), H, 9)
    assert isinstance(own, nn.Linear)


@pytest.mark.parametrize("made", [GatedMLP(H, 9, bias=True), MLP(H, 9, bias=True)])
def test_mlps_are_linear_modules_that_are_called(made: nn.Module) -> None:
    seen: list[Tensor] = []
    for module in made.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            module.register_forward_hook(lambda m, i, y: seen.append(y))
    made(torch.randn(2, H))
    assert len(seen) == len(list(made.children()))
    weights = copy.deepcopy(made.state_dict())
    made.reset_parameters()  # type: ignore[operator]
    changed = {k for k, v in made.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {k for k in weights if k.endswith("weight")}


@pytest.mark.parametrize("name", ["s5", "mamba", "attn", "gated"])
def test_the_stream_stays_wide_in_a_narrow_block(name: str) -> None:
    layer = block(name, GatedMLP(H, 9, **WIDE)).float()
    narrow = copy.deepcopy(layer).bfloat16()
    u = torch.randn(2, 7, H)
    want, got = layer(u), narrow(u)
    assert got.dtype == torch.float32
    assert narrow(u.bfloat16()).dtype == torch.float32
    assert float((got - want).detach().norm() / want.detach().norm()) < 0.02
    state = narrow.init_state((2,))
    y, _ = narrow.step(u[:, 0], state)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, got[:, 0], rtol=0.03, atol=0.03)
    with torch.no_grad():  # a mixer that adds nothing: 256.25 would be 256 in bfloat16
        for parameter in narrow.parameters():
            parameter.zero_()
    large = torch.full((1, 2, H), 256.25)
    assert torch.equal(narrow(large), large)
    low = ResidualBlock(H, mixer(name).bfloat16(), residual_in_fp32=False).bfloat16()
    assert low(u.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_norms_are_computed_wide(name: str) -> None:
    norm = make_norm(name, H, 1e-3)
    assert isinstance(norm, LayerNorm | RMSNorm)
    assert norm.eps == 1e-3
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    plain = nn.LayerNorm(H, eps=1e-3) if name == "layer" else nn.RMSNorm(H, eps=1e-3)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(3, 5, H)
    assert torch.equal(norm(x), plain(x))
    low = copy.deepcopy(norm).bfloat16()
    rounded = copy.deepcopy(low).float()
    assert low(x).dtype == torch.float32
    assert torch.equal(low(x), rounded(x))  # nothing rounded but the gain
    assert torch.equal(low(x.bfloat16()), rounded(x.bfloat16().float()).bfloat16())
    with pytest.raises(ValueError, match=r"norm_eps = 0\.001, and norm 'none' takes none"):
        make_norm("none", H, 1e-3)
    with pytest.raises(ValueError, match="takes none"):
        make_norm(nn.LayerNorm, H, 1e-3)


def test_reset_parameters_reaches_every_part() -> None:
    layer = ResidualBlock(H, Mamba(H, 4), nn.Sequential(nn.Linear(H, H)), norm="layer")
    for value in layer.parameters():
        value.data.fill_(float("nan"))
    layer.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def test_dropout_acts_at_the_end_of_both_branches() -> None:
    layer = ResidualBlock(H, S5(H, 8), MLP(H, 9), dropout=0.5).train()
    seen: list[Tensor] = []
    layer.dropout.register_forward_hook(lambda m, i, y: seen.append(y))
    layer(torch.randn(4, 50, H))
    assert len(seen) == 2
    for y in seen:
        assert 0.4 < float((y == 0).float().mean()) < 0.6


def test_a_stack_of_blocks_is_a_mixer() -> None:
    stack = Stack([block("s5"), block("attn", MLP(H, 9, **WIDE))]).eval()
    u = torch.randn(2, 7, H, **WIDE)
    _, state = stack.prefill(u[:, :6])
    torch.testing.assert_close(stack.step(u[:, 6], state)[0], stack(u)[:, 6])


def test_mixers_by_name() -> None:
    assert mixer_name("RG-LRU") == "rglru"
    assert mixer_name("Attention") == mixer_name("ATTN") == "attn"
    assert mixer_name("S6") == "mamba"
    made = make_mixer("S5", H, 8, {"blocks": 2}, dtype=torch.float64)
    assert isinstance(made, S5)
    assert made.params["Lambda_re"].dtype == torch.float64
    with pytest.raises(ValueError, match="unknown mixer 'gru'; expected one of s4, "):
        make_mixer("gru", H)
    for key in ("d_model", "dtype", "device", "generator", "layer"):
        for name in ("s5", "attn"):
            with pytest.raises(ValueError, match=f"'{key}', expected those of the mixer alone"):
                make_mixer(name, H, options={key: None})


def test_errors_say_what_came_and_what_was_expected() -> None:
    with pytest.raises(ValueError, match="d_model = 5, the mixer's d_model 6"):
        ResidualBlock(5, S5(6, 8))
    with pytest.raises(ValueError, match="d_model = 6, the mixer's d_output 12"):
        ResidualBlock(6, make_mixer("s4d", 6, 4, {"channels": 2}))
    with pytest.raises(ValueError, match="parallel = True without an mlp"):
        ResidualBlock(6, S5(6, 8), parallel=True)
    with pytest.raises(ValueError, match="norm 'instance', expected one of"):
        ResidualBlock(6, S5(6, 8), norm="instance")
    layer = block()
    with pytest.raises(ValueError, match=r"u \(6,\), expected \(\.\.\., L, 6\)"):
        layer(torch.randn(H))
    with pytest.raises(ValueError, match=r"u \(2, 3, 5\), expected \(\.\.\., L, 6\)"):
        layer(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"u \(2, 5\), expected \(\.\.\., 6\)"):
        layer.step(torch.randn(2, 5), layer.init_state((2,)))
    with pytest.raises(ValueError, match="mlp 'relu', expected one of"):
        make_mlp("relu", H, 9)
    with pytest.raises(ValueError, match="mlp_bias = True, and mlp is a callable"):
        make_mlp(lambda h, e: nn.Linear(h, h), H, 9, bias=True)
    for width, inner in ((0, 3), (3, 0), (3, 1.5)):
        with pytest.raises(ValueError, match=r"GatedMLP: d_\w+ = .*, expected an integer >= 1"):
            GatedMLP(width, inner)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation 'relu', expected one of"):
        GatedMLP(H, 9, "relu")
