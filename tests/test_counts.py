"""Parameters and operations, against PyTorch's own counter of matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lrnnx_core import registry
from lrnnx_nn import LAYERS, LRU, S5, Attention, LRNNLMHeadModel, Mamba
from lrnnx_nn.counts import Flops, flops, parameters

H, N, L, V = 8, 16, 12, 11
VARIANTS = [
    pytest.param(name, {**v.init, **v.call}, id=f"{name}-{v.name}")
    for name in LAYERS
    for v in registry.MODELS[name].variants
    if not v.init.get("bidirectional") and "l_kernel" not in v.init  # C is made once a sequence
]


def counted(module: nn.Module, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_matrix_products_are_those_pytorch_counts(name: str, options: dict[str, Any]) -> None:
    layer = LAYERS[name](H, N, mode="recurrent", **options)
    found = flops(layer, L)
    seen = counted(layer, torch.randn(1, L, H))
    if name == "s4d":  # its readout of each channel's states runs as a matrix product
        state = layer.init_state()
        seen -= (
            L * state.numel() * int(options.get("channels", 1)) * (4 if state.is_complex() else 2)
        )
    assert found.matrix == seen
    assert found.recurrence > 0
    assert found == flops(layer, 1).times(L)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv", [1, 4])
def test_attention_step_by_step(window: int | None, kv: int) -> None:
    attention = Attention(H, n_heads=4, n_kv_heads=kv, window=window, use_fast_path=False)
    total = 0
    for context in range(6):
        seen = context + 1 if window is None else min(context + 1, window)
        want = 2 * sum(p.numel() for p in attention.parameters()) + 2 * 2 * H * seen
        assert flops(attention, 1, context) == Flops(want, 0)
        total += want
        assert flops(attention, context + 1) == Flops(total, 0)
        assert flops(attention, 3, context).matrix == sum(
            flops(attention, 1, context + t).matrix for t in range(3)
        )
    if window is None:  # the cache grows: a step computes the pairs it may see
        _, state = attention.prefill(torch.randn(1, 5, H))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            attention.step(torch.randn(1, H), state)
        assert counter.get_total_flops() == flops(attention, 1, 5).matrix


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(tied: bool) -> None:
    options = {"mixer_kwargs": {"s5": {"mode": "recurrent"}}, "tie_embeddings": tied}
    model = LRNNLMHeadModel(
        H, N, 3, V, ["s5", "mamba"], d_intermediate=6, pad_vocab_size_multiple=4, **options
    )
    ids = torch.randint(V, (2, L))
    assert model.flops(L, batch=2).matrix == counted(model, ids)
    assert model.flops_per_token().matrix * 2 * L == counted(model, ids)
    assert model.flops_per_token(1000) == model.flops_per_token()
    parts = flops(S5(H, N), 1).recurrence * 2 + flops(Mamba(H, N), 1).recurrence
    assert model.flops_per_token().recurrence == parts
    assert model.flops(0) == Flops(0, 0)
    mixed = LRNNLMHeadModel(H, N, 2, V, ["attn", "lru"], mixer_kwargs={"attn": {"n_heads": 2}})
    grown = mixed.flops_per_token(100).total - mixed.flops_per_token(50).total
    assert grown == 50 * 4 * H


def test_recurrences_by_hand() -> None:
    assert flops(LRU(H, N), 1) == Flops(2 * 4 * N * H, 8 * N)
    inner = 2 * H
    mamba = flops(Mamba(H, N, d_conv=3), 1)
    assert mamba.recurrence == 5 * inner * N + 2 * 3 * inner
    assert flops(LAYERS["s4d"](H, N), 1) == Flops(0, 14 * H * N // 2)
    assert flops(LAYERS["s4"](H, N, rank=2, A_init="legt"), 1) == Flops(0, (14 + 32) * H * N // 2)
    assert Flops(3, 4).total == 7


def test_parameters_count_once() -> None:
    model = LRNNLMHeadModel(
        H, N, 2, V, ["s5"], max_positions=9, pad_vocab_size_multiple=4, d_intermediate=6
    )
    everything = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == everything
    assert model.num_parameters(non_embedding=True) == everything - 12 * H - 9 * H
    untied = LRNNLMHeadModel(H, N, 2, V, ["s5"], tie_embeddings=False)
    assert untied.num_parameters() - untied.num_parameters(non_embedding=True) == V * H
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    assert parameters(shared) == 9 + 6
    assert parameters(shared, [shared[0]]) == 3


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="S5 is bidirectional, which is not counted"):
        flops(nn.Sequential(S5(H, N, bidirectional=True)), 3)
    for options in ({"length": -1}, {"length": 1.5}, {"length": 1, "context": -2}):
        with pytest.raises(ValueError, match=r"flops: \w+ = .*, expected an integer >= 0"):
            flops(nn.Linear(2, 2), **options)  # type: ignore[arg-type]
