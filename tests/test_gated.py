"""Gating around a layer: any layer, in whole sequences and in parts, with the sizes it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import assert_agree, normal
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_nn import LAYERS, Gated

F64 = torch.float64
H, N = 8, 8
every_layer = pytest.mark.parametrize("layer", LAYERS)


def gated(layer: str = "s4", **options: Any) -> Gated:
    torch.manual_seed(0)
    return Gated(H, layer, N, **{"gate": 3, "bottleneck": 2, "dtype": F64, **options}).eval()


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


@every_layer
def test_prefills_and_steps_are_the_whole(layer: str) -> None:
    net, u = gated(layer), normal(2, 9, H)
    want = net(u)
    assert want.shape == u.shape
    for k in range(10):
        first, state = net.prefill(u[:, :k], net.init_state((2,)))
        ys = list(first.unbind(1))
        for t in range(k, 9):
            y, state = net.step(u[:, t], state)
            ys.append(y)
        assert_agree(torch.stack(ys, 1), want, 1e-12, f"k = {k}")
        rest, _ = net.prefill(u[:, k:], net.prefill(u[:, :k])[1])
        assert_agree(torch.cat([first, rest], 1), want, 1e-12, f"k = {k}")


@every_layer
@pytest.mark.parametrize("gate", [None, 1, 4])
@pytest.mark.parametrize("bottleneck", [None, 2])
def test_the_layer_is_narrow_and_the_projections_have_its_width(
    layer: str, gate: int | None, bottleneck: int | None
) -> None:
    net = gated(layer, gate=gate, bottleneck=bottleneck)
    narrow = H // (bottleneck or 1)
    assert net.layer.d_model == narrow
    assert type(net.layer) is LAYERS[layer]
    wide = narrow if gate is None else gate * H
    count = linear(wide, 2 * H)
    count += 0 if bottleneck is None else linear(H, narrow)
    count += 0 if gate is None else linear(H, wide) + linear(narrow, wide)
    count += sum(p.numel() for p in LAYERS[layer](narrow, N).parameters())
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(normal(3, H)).shape == (3, H)


def test_it_is_the_formula() -> None:
    net, u = gated("s4", channels=3, mult_act="silu"), normal(2, 20, H)
    x = F.gelu(F.linear(u, net.input.weight, net.input.bias))
    y = F.gelu(net.layer(x))
    assert y.shape[-1] == 3 * H // 2
    y = F.linear(y, net.expand.weight, net.expand.bias)
    y = F.silu(y * F.gelu(F.linear(u, net.gate.weight, net.gate.bias)))
    a, b = F.linear(y, net.output.weight, net.output.bias).chunk(2, -1)
    assert_agree(net(u), a * torch.sigmoid(b), 1e-12)
    plain = gated("s4", gate=None, bottleneck=None, activation="none")
    a, b = plain.output(plain.layer(u)).chunk(2, -1)
    assert_agree(plain(u), a * torch.sigmoid(b), 1e-12)


@pytest.mark.parametrize("layer", ["s4", "mamba"])
def test_padding_is_zero_and_reaches_nothing(layer: str) -> None:
    net, u = gated(layer), normal(2, 9, H)
    lengths, valid = torch.tensor([9, 4]), torch.arange(9) < torch.tensor([[9], [4]])
    dirty = torch.where(valid[..., None], u, torch.full_like(u, float("nan")))
    for given in ({"lengths": lengths}, {"mask": valid}):
        y, state = net.prefill(dirty, **given)
        assert torch.equal(y, net(dirty, **given))
        assert not y[~valid].any()
        alone, last = net.prefill(u[1, :4])
        assert_agree(y[1, :4], alone, 1e-12)
        rows = [(s[1], t) for s, t in zip(_leaves(state), _leaves(last), strict=True)]
        for got, want in rows:
            assert_agree(got, want, 1e-12)


def _leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def test_sequence_arguments_reach_the_layer() -> None:
    net, u = gated(), normal(2, 9, H)
    elapsed = 0.5 + normal(2, 9, seed=4).abs()
    reset = torch.arange(9) == 4
    assert not torch.allclose(net(u, integration_timesteps=elapsed), net(u))
    assert not torch.allclose(net(u, dt_scale=2.0), net(u))
    assert_agree(net(u, reset=reset)[:, 4:], net(u[:, 4:]), 1e-12)
    y, _ = net.prefill(u[:, :1], integration_timesteps=elapsed[:, :1], dt_scale=2.0)
    got, _ = net.step(
        u[:, 0], net.init_state((2,)), integration_timestep=elapsed[:, 0], dt_scale=2.0
    )
    assert_agree(got, y[:, 0], 1e-12)


def test_dropout_is_for_training_and_parameters_can_be_drawn_again() -> None:
    net, u = gated(dropout=0.5), normal(2, 9, H)
    assert torch.equal(net(u), net(u))
    net.train()
    assert not torch.equal(net(u), net(u))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.reset_parameters()
    same = {k for k, v in net.state_dict().items() if torch.equal(v, before[k])}
    assert same == {f"layer.{k}" for k in ("A_log", "A_im", "B_re", "B_im", "P_re", "P_im")}
    loss = nn.Sequential(net, net)(u).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_bad_choices_are_refused() -> None:
    for options, said in (
        ({"gate": 0}, "gate = 0, expected an integer >= 1 or None"),
        ({"bottleneck": 3}, "bottleneck = 3 does not divide d_model = 8"),
        ({"activation": "swish"}, "activation = 'swish', expected one of"),
        ({"mult_act": "glu"}, "mult_act = 'glu', expected one of"),
        ({"dropout": 1.0}, "dropout = 1.0, expected"),
        ({"widht": 3}, "S4 has no option 'widht'"),
    ):
        with pytest.raises(ValueError, match=said):
            Gated(H, "s4", N, **options)
    with pytest.raises(ValueError, match="unknown model 'transformer'"):
        Gated(H, "transformer")
    with pytest.raises(ValueError, match=r"Gated: u \(2, 7\), expected \(\.\.\., L, 8\)"):
        gated()(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="a bidirectional layer cannot stream"):
        gated(bidirectional=True).prefill(normal(2, 9, H))


def test_a_generator_is_refused_where_it_could_not_decide_everything() -> None:
    with pytest.raises(ValueError, match=r"use torch.manual_seed"):
        Gated(8, d_state=8, generator=torch.Generator())
