"""The language model: forward, prefill and step agree for every mixer; what is padded, packed,
tied, scaled and kept in float32 is so."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lrnnx_core import registry
from lrnnx_nn import (
    LAYERS,
    Block,
    LRNNLMConfig,
    LRNNLMHeadModel,
    ResidualBlock,
    param_groups,
)

H, N, V, L = 8, 4, 11, 7
CASES: dict[str, dict[str, Any]] = {name: {"mixer_types": [name]} for name in LAYERS}
CASES |= {
    "s7 full": {"mixer_types": ["s7"], "mixer_kwargs": {"S7": {"variant": "full"}}},
    "attn": {"mixer_types": ["attn"], "mixer_kwargs": {"attn": {"n_heads": 2}}},
    "window": {"mixer_types": ["attn"], "mixer_kwargs": {"attn": {"n_heads": 2, "window": 3}}},
    "s5 s7 attn": {
        "mixer_types": ["S5", "S7", "attn"],
        "mixer_kwargs": {"attn": {"n_heads": 4, "n_kv_heads": 2}},
        "mlp": "geglu",
        "mlp_bias": True,
        "norm": "layer",
        "tie_embeddings": False,
        "pad_vocab_size_multiple": 8,
        "logit_soft_cap": 3.0,
    },
    "griffin": {
        "mixer_types": ["RG-LRU", "rglru", "attention"],
        "mixer_kwargs": {"attn": {"n_heads": 2, "n_kv_heads": 1, "window": 4, "rotary": 0.5}},
        "mlp": "geglu",
        "embedding_scale": 2.5,
    },
    "mamba s4d parallel": {
        "mixer_types": ["mamba", "S4D"], "block": "parallel", "mlp": "gelu", "dropout": 0.1,
    },
}  # fmt: skip
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-11}
case = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(case: str, dtype: torch.dtype = torch.float64, **options: Any) -> LRNNLMHeadModel:
    """Return a model in evaluation whose every part matters: embeddings and gains not small."""
    torch.manual_seed(0)
    values = {"n_layer": max(2, len(CASES[case]["mixer_types"])), "d_intermediate": 6}
    values |= {"max_positions": 40, **CASES[case], **options}
    model = LRNNLMHeadModel(H, N, values.pop("n_layer"), V, dtype=dtype, **values)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith(("embedding", "positions", "head")):
                parameter.copy_(torch.randn_like(parameter))
            elif "norm" in key or key.endswith("proj.bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


cached = functools.cache(make)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def same(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float64) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.numel():
        got, want = got.detach(), want.detach()
        error = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
        assert error <= DTYPES[dtype], error


def stepped(model: LRNNLMHeadModel, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    found = []
    for t in range(ids.shape[-1]):
        logits, state = model.step(ids[..., t], state)
        found.append(logits)
    return torch.stack(found, -2), state


# -------------------------------------------------------------------------- forward, prefill, step


@case
@dtypes
@torch.no_grad()
def test_every_split_is_the_whole(case: str, dtype: torch.dtype) -> None:
    model, ids = cached(case, dtype), tokens(2, L)
    whole = model(ids)
    assert whole.shape == (2, L, V)
    assert float(whole.std()) > 0.1
    y, last = model.prefill(ids)
    same(y, whole, dtype)
    follow, _ = model.step(ids[:, 0], last)
    for k in range(L + 1) if dtype == torch.float64 else (0, 3):
        first, state = model.prefill(ids[:, :k])
        if k % 2:
            second, state = model.prefill(ids[:, k:], state)
        elif k < L:
            second, state = stepped(model, ids[:, k:], state)
        else:
            second = whole[:, :0]
        same(torch.cat([first, second], 1), whole, dtype)
        same(model.step(ids[:, 0], state)[0], follow, dtype)
        assert state.position.tolist() == [L, L]
    same(stepped(model, ids, model.init_state((2,)))[0], whole, dtype)


@case
@torch.no_grad()
def test_padded_rows_are_the_rows_alone(case: str) -> None:
    model, ids = cached(case), tokens(3, L)
    lengths = torch.tensor([L, 0, 4])
    garbage = torch.where(torch.arange(L) < lengths[:, None], ids, -100)
    y, state = model.prefill(garbage, lengths=lengths)
    same(model(garbage, lengths=lengths), y)
    final = model(garbage, lengths=lengths, last_only=True)
    left = (torch.arange(L) >= L - lengths[:, None]) & (torch.arange(L) < L)
    shifted = torch.stack([ids[i].roll(L - int(n)) for i, n in enumerate(lengths)])
    holes = torch.tensor([True, False, True, True, False, True, False])  # padding anywhere
    z, moved = model.prefill(torch.where(left, shifted, -1), mask=left)
    after, _ = model.step(ids[:, 0], state)
    same(model.step(ids[:, 0], moved)[0], after)
    for i, n in enumerate(lengths.tolist()):
        alone, own = model.prefill(ids[i, :n])
        same(y[i, :n], alone)
        same(z[i, L - n :], alone)
        assert not y[i, n:].any()
        assert not z[i, : L - n].any()
        same(final[i], alone[-1] if n else torch.zeros(V, dtype=torch.float64))
        same(after[i], model.step(ids[i, 0], own)[0])
        assert int(state.position[i]) == n
    y = model(ids, mask=holes)
    same(y[:, holes], model(ids[:, holes]))
    assert not y[:, ~holes].any()
    same(model(ids, mask=holes, last_only=True), y[:, 5])


@case
@torch.no_grad()
def test_packed_documents_are_separate_documents(case: str) -> None:
    model, ids = cached(case), tokens(2, L)
    reset = torch.zeros(2, L, dtype=torch.bool)
    reset[0, 2] = reset[0, 5] = reset[1, 0] = reset[1, 4] = True
    parts = {0: [(0, 2), (2, 5), (5, L)], 1: [(0, 4), (4, L)]}
    want = torch.stack(
        [torch.cat([model(ids[i, a:b]) for a, b in cuts]) for i, cuts in parts.items()]
    )
    same(model(ids, reset=reset), want)
    y, state = model.prefill(ids, reset=reset)
    same(y, want)
    assert state.position.tolist() == [2, 3]
    for k in (1, 2, 3, 5):
        first, state = model.prefill(ids[:, :k], reset=reset[:, :k])
        second, state = model.prefill(ids[:, k:], state, reset=reset[:, k:])
        same(torch.cat([first, second], 1), want)
        assert state.position.tolist() == [2, 3]
    # together with padding: a reset at padding is none
    lengths = torch.tensor([6, 4])
    y, state = model.prefill(ids, lengths=lengths, reset=reset)
    same(y[0, :6], want[0, :6])
    same(y[1, :4], want[1, :4])
    assert state.position.tolist() == [1, 4]
    carried, _ = model.prefill(ids[:, :2], model.prefill(ids)[1], reset=reset[:, 4:6])
    same(carried[0, 1], model(ids[0, 1:2])[0])
    same(carried[1], model(ids[1, :2]))


@case
@torch.no_grad()
def test_any_batch_shape_and_no_tokens(case: str) -> None:
    model, ids = cached(case), tokens(2, 3, L)
    want = model(ids)
    same(want[1, 2], model(ids[1, 2]))
    _, state = model.prefill(ids)
    y, _ = model.step(ids[..., 0], state)
    assert y.shape == (2, 3, V)
    same(y[1, 2], model.step(ids[1, 2, 0], model.prefill(ids[1, 2])[1])[0])
    for shape in ((), (2, 3)):
        nothing = torch.zeros(*shape, 0, dtype=torch.int64)
        y, empty = model.prefill(nothing)
        assert y.shape == (*shape, 0, V)
        same(model(nothing), y)
        assert not model(nothing, last_only=True).any()
        assert model(nothing, last_only=True).shape == (*shape, V)
        first, _ = model.step(ids[(0,) * (2 - len(shape))][..., 0], empty)
        same(first, want[(0,) * (2 - len(shape))][..., 0, :])
        _, again = model.prefill(nothing, state if shape else model.prefill(ids[0, 0])[1])
        assert again.position.tolist() == (state.position.tolist() if shape else L)


@case
@torch.no_grad()
def test_time_reaches_every_layer(case: str) -> None:
    model, ids = cached(case), tokens(2, L)
    gaps = torch.rand(2, L, dtype=torch.float64) * 3
    if case == "s7 full":
        with pytest.raises(ValueError, match="takes no integration_timesteps"):
            model(ids, integration_timesteps=gaps)
        return
    y = model(ids, integration_timesteps=gaps)
    timeless = set(model.config.mixers) == {"attn"}
    assert torch.allclose(y, model(ids), atol=1e-6) is timeless
    first, state = model.prefill(ids[:, :3], integration_timesteps=gaps[:, :3])
    second, state = model.prefill(ids[:, 3:6], state, integration_timesteps=gaps[:, 3:6])
    last, _ = model.step(ids[:, 6], state, integration_timestep=gaps[:, 6])
    same(torch.cat([first, second, last[:, None]], 1), y)
    scaled = model(ids, dt_scale=2.0)
    step, _ = model.step(ids[:, 0], model.init_state((2,)), dt_scale=2.0)
    same(step, scaled[:, 0])
    whole, _ = model.prefill(ids, dt_scale=2.0)
    same(whole, scaled)


@torch.no_grad()
def test_a_state_of_bounded_capacity_has_one_shape() -> None:
    model, ids = cached("s5 s7 attn"), tokens(2, L)
    state = model.init_state((2,), capacity=9)
    shapes = [t.shape for t in pytree.tree_leaves(state)]
    y, state = model.prefill(ids[:, :3], state)
    rest, state = stepped(model, ids[:, 3:], state)
    same(torch.cat([y, rest], 1), model(ids))
    assert [t.shape for t in pytree.tree_leaves(state)] == shapes
    grown = model.prefill(ids)[1]
    assert [t.shape for t in pytree.tree_leaves(grown)] != shapes
    own = LRNNLMHeadModel(H, N, 2, V, ["s5", "attn"], block=Block)
    sizes = [sum(t.numel() for t in pytree.tree_leaves(b)) for b in own.init_state((2,)).blocks]
    bounded = own.init_state((2,), capacity=9).blocks
    assert sum(t.numel() for t in pytree.tree_leaves(bounded[0])) == sizes[0]
    assert sum(t.numel() for t in pytree.tree_leaves(bounded[1])) > sizes[1]


@torch.no_grad()
def test_states_are_values() -> None:
    model, ids = cached("s5 s7 attn"), tokens(2, L)
    _, state = model.prefill(ids[:, :3])
    kept = pytree.tree_map(torch.clone, state)
    first = model.step(ids[:, 3], state)[0]
    model.prefill(ids[:, 4:], state)
    assert torch.equal(model.step(ids[:, 3], state)[0], first)
    pytree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), state, kept)
    swapped = pytree.tree_map(lambda t: t[[1, 0, 1]], state)  # rows of a state are rows of a batch
    same(model.step(ids[[1, 0, 1], 3], swapped)[0], first[[1, 0, 1]])


# ----------------------------------------------------------------------------------------- dtypes


@case
@torch.no_grad()
def test_a_bfloat16_model_keeps_stream_and_states_in_float32(case: str) -> None:
    exact = cached(case, torch.float32)
    model = copy.deepcopy(exact).bfloat16()
    seen: list[torch.dtype] = []
    for block in model.layers:
        block.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    ids = tokens(2, L)
    y = model(ids)
    assert set(seen) == {torch.float32}
    assert y.dtype == torch.bfloat16
    want = exact(ids)
    assert float((y.float() - want).norm() / want.norm()) < 0.05
    steps, state = stepped(model, ids, model.init_state((2,)))
    assert float((steps.float() - y.float()).norm() / y.float().norm()) < 0.03
    for name, block in zip(model.config.mixers, state.blocks, strict=True):
        held = block if isinstance(block, Tensor) else getattr(block, "h", None)
        assert (held is None) is (name == "attn")
        assert held is None or held.dtype in (torch.float32, torch.complex64)


def test_autocast_leaves_the_stream_wide() -> None:
    model, ids = make("s5 s7 attn", torch.float32).train(), tokens(2, L)
    seen: list[torch.dtype] = []
    for block in model.layers:
        block.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    want = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(ids)
        loss = F.cross_entropy(y.float().flatten(0, 1), ids.flatten())
    assert set(seen) == {torch.float32}
    assert y.dtype == torch.bfloat16
    assert float((y - want).detach().norm() / want.detach().norm()) < 0.05
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())


def test_a_stream_as_narrow_as_its_activations_on_request() -> None:
    model = make("s5 s7 attn", torch.bfloat16, residual_in_fp32=False)
    seen: list[torch.dtype] = []
    model.layers[1].register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    model(tokens(2, L))
    assert seen == [torch.bfloat16]


# ------------------------------------------------------------------------------ parts of the model


def test_the_model_is_its_formula() -> None:
    model = cached("griffin")
    ids, config = tokens(2, L), model.config
    assert model.positions is not None
    x = config.embedding_scale * model.embedding.weight[ids] + model.positions.weight[:L]
    for block in model.layers:
        assert isinstance(block, ResidualBlock)
        assert block.norm2 is not None
        assert block.mlp is not None
        x = x + block.mixer(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    same(model(ids), model.norm(x) @ model.embedding.weight.T)
    capped = cached("s5 s7 attn")
    free = LRNNLMHeadModel.from_config(capped.config, dtype=torch.float64).eval()
    free.load_state_dict(capped.state_dict())
    object.__setattr__(free.config, "logit_soft_cap", None)
    same(capped(ids), 3.0 * torch.tanh(free(ids) / 3.0))
    object.__setattr__(free.config, "logit_soft_cap", 3.0)


def test_padding_of_the_vocabulary_never_comes_out_and_never_learns() -> None:
    for tied in (True, False):
        model = make("s5", tie_embeddings=tied, pad_vocab_size_multiple=8).train()
        plain = make("s5", tie_embeddings=tied).train()
        state = {k: v[:V] if v.shape[0] == 16 else v for k, v in model.state_dict().items()}
        plain.load_state_dict(state)
        ids = tokens(2, L)
        y = model(ids)
        assert model.embedding.weight.shape == (16, H)
        assert y.shape == (2, L, V)
        same(y, plain(ids))
        F.cross_entropy(y.flatten(0, 1), tokens(2 * L)).backward()
        tables = [model.embedding] if tied else [model.embedding, model.head]
        for table in tables:
            assert table is not None
            assert table.weight.grad is not None
            assert bool(table.weight.grad[:V].any())
            assert not table.weight.grad[V:].any()
    fresh = LRNNLMHeadModel(H, N, 1, V, pad_vocab_size_multiple=8, tie_embeddings=False)
    assert fresh.head is not None
    assert not fresh.embedding.weight[V:].any()
    assert not fresh.head.weight[V:].any()


def test_learned_positions_end() -> None:
    model = make("s5", max_positions=5)
    ids = tokens(2, L)
    for call in (model, model.prefill):
        with pytest.raises(ValueError, match="at most max_positions = 5 tokens a document"):
            call(ids)
        with pytest.raises(ValueError, match=r"position 5, expected 0 \.\.\. 4 \(max_positions"):
            call(ids, lengths=torch.tensor([5, 6]))
    model(ids, lengths=torch.tensor([5, 2]))
    reset = torch.arange(L) == 3
    model(ids, reset=reset)
    state = model.prefill(ids[:, :4])[1]
    with pytest.raises(ValueError, match=r"prefill: position 5"):
        model.prefill(ids[:, :2], state)
    model.prefill(ids[:, :2], state, reset=torch.tensor([False, True]))
    state = model.step(ids[:, 0], state)[1]
    with pytest.raises(ValueError, match=r"step: position 5"):
        model.step(ids[:, 0], state)


def test_norm_mlp_and_block_of_ones_own() -> None:
    model = LRNNLMHeadModel(
        H, N, 2, V, ["s5", "attn"], d_intermediate=5,
        norm=lambda width: nn.LayerNorm(width, bias=False),
        mlp=lambda width, inner: nn.Sequential(
            nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)
        ),
    ).eval()  # fmt: skip
    block = model.layers[0]
    assert isinstance(block, ResidualBlock)
    assert isinstance(block.norm1, nn.LayerNorm)
    assert isinstance(block.mlp, nn.Sequential)
    assert isinstance(model.norm, nn.LayerNorm)
    ids = tokens(2, L)
    torch.testing.assert_close(stepped(model, ids, model.init_state((2,)))[0], model(ids))
    glu = LRNNLMHeadModel(
        H, N, 2, V, ["s5", "lru"], block=lambda width, mixer: Block(width, mixer, activation="glu")
    ).eval()
    assert [type(b) for b in glu.layers] == [Block, Block]
    torch.testing.assert_close(stepped(glu, ids, glu.init_state((2,)))[0], glu(ids))
    glu.reset_parameters()
    for custom in (model, glu):
        with pytest.raises(ValueError, match=r"is a callable.*cannot be saved"):
            custom.config.to_dict()


def test_types_repeat_and_sizes_reach_the_mixers_that_mean_them() -> None:
    model = LRNNLMHeadModel(
        16, 6, 7, V, ["S4D", "mamba", "RG_LRU", "Attention", "S5"],
        mixer_kwargs={"S5": {"d_state": 4}, "rglru": {"d_state": 32}, "attn": {"n_heads": 4}},
    )  # fmt: skip
    names = [block.mixer.name for block in model.layers]
    assert names == ["s4d", "mamba", "rglru", "attn", "s5", "s4d", "mamba"]
    assert [b.mixer.d_state for b in model.layers] == [6, 6, 32, None, 4, 6, 6]
    assert LRNNLMHeadModel(16, 6, 1, V, ["rglru"]).layers[0].mixer.d_state == 16
    assert LRNNLMHeadModel(16, None, 1, V, ["mamba"]).layers[0].mixer.d_state == 16
    for name in set(LAYERS) - {"rglru"}:
        assert LRNNLMHeadModel(16, 6, 1, V, [name]).layers[0].mixer.d_state == 6


# ----------------------------------------------------------------------------------- initial values


def test_initial_values_follow_gpt2_and_leave_the_state_space_alone() -> None:
    types = [*LAYERS, "attn"]
    options: dict[str, Any] = {"d_intermediate": 40, "max_positions": 50}
    torch.manual_seed(5)
    model = LRNNLMHeadModel(32, 16, len(types), 500, types, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidualBlock, "output_projections", lambda self: [])
        torch.manual_seed(5)
        unscaled = LRNNLMHeadModel(32, 16, len(types), 500, types, **options)
    plain, scaled = unscaled.state_dict(), set()
    for key, value in model.state_dict().items():
        if torch.equal(value, plain[key]):
            continue
        torch.testing.assert_close(value, plain[key] / math.sqrt(2 * len(types)))
        scaled.add(key)
    blocks = {name: f"layers.blocks.{i}." for i, name in enumerate(types)}
    ends = {"mamba": "out_proj", "mamba2": "out_proj", "stream": "out_proj"}
    ends |= {"rglru": "linear_out", "attn": "o_proj"}
    want = {f"{blocks[name]}mixer.{end}.weight" for name, end in ends.items()}
    want |= {f"{prefix}mlp.down_proj.weight" for prefix in blocks.values()}
    assert scaled == want
    assert model.positions is not None
    for table in (model.embedding, model.positions):
        assert float(table.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", LAYERS)
def test_state_space_parameters_are_as_init_made_them(name: str) -> None:
    made: list[dict[str, Tensor]] = []

    def block(width: int, mixer: Any) -> nn.Module:
        made.append({k: v.detach().clone() for k, v in mixer.params.items()})
        return ResidualBlock(width, mixer)

    model = LRNNLMHeadModel(H, N, 2, V, [name], block=block)
    for values, layer in zip(made, model.layers, strict=True):
        for key in layer.mixer.ssm_parameters & values.keys():
            assert torch.equal(layer.mixer.params[key], values[key]), key


@case
def test_reset_parameters_draws_the_same_as_construction_also_from_meta(case: str) -> None:
    options = {"d_intermediate": 6, "max_positions": 9, "n_layer": 3, **CASES[case]}
    model = LRNNLMHeadModel(H, N, vocab_size=V, **options)
    empty = LRNNLMHeadModel(H, N, vocab_size=V, **options, device="meta")
    assert {t.device.type for t in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    empty = empty.to_empty(device="cpu")
    for value in empty.state_dict().values():
        value.fill_(float("nan"))
    torch.manual_seed(3)
    empty.reset_parameters()
    torch.manual_seed(3)
    model.reset_parameters()
    for key, value in model.state_dict().items():
        assert torch.equal(value, empty.state_dict()[key]), key
        assert bool(value.isfinite().all())
    assert bool(empty(tokens(1, 4)).isfinite().all())


def test_a_seed_fixes_the_model() -> None:
    first, second = make("s5 s7 attn"), make("s5 s7 attn")
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


# ----------------------------------------------------------------------------------------- training


def test_gradient_checkpointing_changes_no_bit() -> None:
    options: dict[str, Any] = {"dropout": 0.2, "mixer_types": ["S5", "mamba", "attn"]}
    options["mixer_kwargs"] = {"attn": {"n_heads": 2}}
    ids, lengths = tokens(2, L), torch.tensor([L, 4])
    found = []
    for checkpointing in (False, True):
        model = make("s5 s7 attn", torch.float32, gradient_checkpointing=checkpointing, **options)
        model.train()
        calls: list[int] = []
        model.layers[1].mixer.register_forward_hook(lambda *_, c=calls: c.append(1))
        torch.manual_seed(9)
        y = model(ids, lengths=lengths)
        F.cross_entropy(y.flatten(0, 1), ids.flatten()).backward()
        assert len(calls) == (2 if checkpointing else 1)
        found.append({key: p.grad for key, p in model.named_parameters()})
    for key, want in found[0].items():
        assert want is not None
        assert torch.equal(found[1][key], want), key


@case
def test_every_parameter_learns(case: str) -> None:
    model = make(case, torch.float32).train()
    y = model(tokens(3, L))
    F.cross_entropy(y.flatten(0, 1), tokens(3 * L, seed=2)).backward()
    missing = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == set()


def test_param_groups_know_the_parts() -> None:
    model = make("s5 s7 attn", torch.float32)
    groups = param_groups(model, 1e-2, 1e-4, 0.1)
    names = {id(p): key for key, p in model.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert sorted(key for keys in found.values() for key in keys) == sorted(names.values())
    assert {"layers.blocks.0.mixer.Lambda_re", "layers.blocks.1.mixer.Lambda_w"} <= found["ssm"]
    assert {
        "norm.weight",
        "layers.blocks.2.norm1.weight",
        "layers.blocks.0.mlp.down_proj.bias",
    } <= (found["no_decay"])
    assert {"embedding.weight", "head.weight", "layers.blocks.2.mixer.o_proj.weight"} <= (
        found["normal"]
    )


def test_a_mixture_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = LRNNLMHeadModel(
        16, 16, 2, 6, ["s5", "attn"], mixer_kwargs={"attn": {"n_heads": 2}}, d_intermediate=32
    )
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 1e-2))
    losses = []
    for _ in range(60):
        ids = torch.randint(6, (16, 1)).repeat(1, 8) + torch.arange(8)  # counts modulo 6
        y = model(ids[:, :-1] % 6)
        loss = F.cross_entropy(y.flatten(0, 1), ids[:, 1:].flatten() % 6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(6), abs=0.1)  # small embeddings: all alike
    assert losses[-1] < 0.1


# --------------------------------------------------------------------------------- torch around it


@pytest.mark.parametrize("name", ["s5", "mamba"])
def test_per_sample_gradients_are_a_loop(name: str) -> None:
    model = make(name)
    params = {k: v.detach() for k, v in model.named_parameters()}
    ids, target = tokens(3, L), tokens(3, L, seed=2)

    def loss(params: dict[str, Tensor], ids: Tensor, target: Tensor) -> Tensor:
        y = torch.func.functional_call(model, params, (ids,))
        return F.cross_entropy(y, target)

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, ids, target)
    for i in range(3):
        alone = torch.func.grad(loss)(params, ids[i], target[i])
        for key, value in alone.items():
            torch.testing.assert_close(gradients[key][i], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["s5 s7 attn", "griffin"])
def test_a_model_survives_state_dict_deepcopy_and_pickle(case: str) -> None:
    model, ids = cached(case), tokens(2, L)
    want = model(ids)
    other = LRNNLMHeadModel.from_config(model.config, dtype=torch.float64).eval()
    assert not torch.equal(other(ids), want)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids), want)


@pytest.mark.compile
def test_compiled_whole_it_is_the_same() -> None:
    options = {"mixer_types": ["S5", "attn"], "mixer_kwargs": {"attn": {"n_heads": 2}}}
    model, ids = make("s5", torch.float32, **options), tokens(2, L)
    with torch.no_grad():
        whole = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(whole(ids), model(ids), rtol=1e-4, atol=1e-5)
    # one graph each, without the time of code generation
    traced = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    sequence = {"lengths": torch.tensor([L, 4]), "reset": torch.arange(L) == 2, "last_only": True}
    want = torch.autograd.grad(model(ids, **sequence).square().sum(), list(model.parameters()))
    whole = traced(model)(ids, **sequence)
    got = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        state = model.init_state((2,), capacity=9)
        y, new = traced(model.step)(ids[:, 0], state)
        want_y, want_new = model.step(ids[:, 0], state)
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(pytree.tree_leaves(new), pytree.tree_leaves(want_new))


def test_the_state_is_a_pytree_that_vmap_takes() -> None:
    model, ids = cached("s5"), tokens(3, L)
    state = model.prefill(ids)[1]
    y, _ = torch.func.vmap(model.step)(ids[:, 0], state)
    same(y, model.step(ids[:, 0], state)[0])


# ------------------------------------------------------------------------------------------- config


@case
def test_config_goes_through_json(case: str) -> None:
    import json

    config = cached(case).config
    assert LRNNLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model = 0, expected an integer >= 1"),
        ({"n_layer": 0}, "n_layer = 0, expected an integer >= 1"),
        ({"n_layer": 1.5}, "n_layer = 1.5, expected"),
        ({"vocab_size": True}, "vocab_size = True, expected"),
        ({"d_state": -1}, "d_state = -1, expected an integer >= 1 or None"),
        ({"max_positions": 0}, "max_positions = 0, expected an integer >= 1 or None"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple = 0"),
        ({"dropout": 1.0}, "dropout = 1.0, expected 0 <= dropout < 1"),
        ({"dropout": "much"}, "dropout = 'much', expected 0 <= dropout < 1"),
        ({"dropout": True}, "dropout = True, expected"),
        ({"tie_embeddings": "false"}, "tie_embeddings = 'false', expected True or False"),
        ({"residual_in_fp32": 0}, "residual_in_fp32 = 0, expected True or False"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing = 'no', expected"),
        ({"mlp_bias": "no", "d_intermediate": 4}, "mlp_bias = 'no', expected True or False"),
        ({"embedding_scale": "2"}, "embedding_scale = '2', expected a finite number"),
        ({"embedding_scale": float("nan")}, "embedding_scale = nan, expected a finite number"),
        ({"logit_soft_cap": float("inf")}, "logit_soft_cap = inf, expected a number > 0 or None"),
        ({"norm_eps": "1e-5"}, "norm_eps = '1e-5', expected a number > 0 or None"),
        ({"mixer_types": None}, "mixer_types = None, expected a list of names"),
        ({"mixer_kwargs": [("s5", {})]}, "expected a dict of options by type"),
        ({"mixer_kwargs": {"s5": {"d_model": 4}}}, "'d_model', expected options of the mixer"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap = 0.0, expected a number > 0 or None"),
        ({"norm_eps": -1e-6}, "norm_eps = -1e-06, expected"),
        ({"norm": "batch"}, r"norm = 'batch', expected one of \('layer', 'rms', 'none'\)"),
        ({"mlp": "relu"}, "mlp = 'relu', expected one of"),
        ({"block": "post"}, "block = 'post', expected one of"),
        ({"block": "parallel"}, "d_intermediate = None, expected a width"),
        ({"mlp_bias": True}, "d_intermediate = None, expected a width"),
        ({"mlp": nn.Linear}, "d_intermediate = None, expected a width"),
        ({"block": Block, "d_intermediate": 8}, "expected None with a block of one's own"),
        ({"mixer_types": []}, "expected between 1 and n_layer = 2"),
        ({"mixer_types": ["s5"] * 3}, "expected between 1 and n_layer = 2"),
        ({"mixer_types": "s5"}, "mixer_types = 's5', expected a list of names"),
        ({"mixer_types": ["lstm"]}, "unknown mixer 'lstm'; expected one of s4, .*attn"),
        ({"mixer_types": [3]}, "mixer 3, expected the name of one"),
        ({"mixer_kwargs": {"lstm": {}}}, "unknown mixer 'lstm'"),
        ({"mixer_kwargs": {"mamba": {}}}, r"'mamba', expected a type of mixer_types, \('s5',\)"),
        ({"mixer_kwargs": {"S5": {}, "s5": {}}}, "'s5', expected every type once"),
        ({"mixer_kwargs": {"s5": 3}}, r"mixer_kwargs\['s5'\] = 3, expected a dict"),
        ({"mixer_kwargs": {"s5": {"bidirectional": True}}}, "expected a mixer that reads forwards"),
        ({"mixer_kwargs": {"s5": {"dtype": 3}}}, "'dtype', expected options of the mixer alone"),
        ({"width": 3}, "unknown key 'width'"),
    ],
)
def test_config_refuses(values: dict[str, Any], message: str) -> None:
    base = {"d_model": H, "d_state": N, "n_layer": 2, "vocab_size": V}
    with pytest.raises(ValueError, match=message):
        LRNNLMConfig.from_dict(base | values)


def test_config_needs_its_sizes() -> None:
    with pytest.raises(ValueError, match="LRNNLMConfig: vocab_size is missing"):
        LRNNLMConfig.from_dict({"d_model": H, "d_state": N, "n_layer": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer_kwargs": {"s5": {"rank": 2}}}, "S5 has no option 'rank'"),
        ({"mixer_types": ["attn"], "mixer_kwargs": {"attn": {"rank": 2}}}, "no option 'rank'"),
        ({"mixer_types": ["attn"], "mixer_kwargs": {"attn": {"d_state": 2}}}, "no state size"),
        ({"d_state": None}, "S5: no d_state given"),
        ({"width": 3}, "unknown option 'width'"),
        ({"norm_eps": 1e-5, "norm": "none"}, "norm 'none' takes none"),
        ({"mixer_types": ["s4d"], "mixer_kwargs": {"s4d": {"channels": 2}}}, "d_output 16"),
    ],
)
def test_construction_refuses(options: dict[str, Any], message: str) -> None:
    values = {"d_state": N, **options}
    with pytest.raises(ValueError, match=message):
        LRNNLMHeadModel(H, values.pop("d_state"), 1, V, **values)


# -------------------------------------------------------------------------------------------- calls


def test_bad_tokens_and_states_are_refused() -> None:
    model, ids = cached("s5"), tokens(2, L)
    state = model.init_state((2,))
    bad = ids.clone()
    for value in (V, -1):
        bad[1, 2] = value
        for call in (model, model.prefill):
            with pytest.raises(ValueError, match=rf"id {value}, expected 0 \.\.\. 10 \(vocab_size"):
                call(bad)
        with pytest.raises(ValueError, match=rf"step: id {value}"):
            model.step(bad[:, 2], state)
    model(bad, lengths=torch.tensor([L, 2]))  # at padding any
    with pytest.raises(ValueError, match=r"ids \(\), expected \(\.\.\., L\)"):
        model(ids[0, 0])
    for dtype in (torch.float32, torch.bool, torch.int16):
        with pytest.raises(ValueError, match=f"ids of dtype {dtype}, expected int64 or int32"):
            model(ids.to(dtype))
    with pytest.raises(ValueError, match="forward: ids is a list, expected a Tensor"):
        model(ids.tolist())
    with pytest.raises(ValueError, match="ids on meta, and the model on cpu"):
        model(ids.to("meta"))
    with pytest.raises(ValueError, match=r"lengths \(3,\) does not fit"):
        model(ids, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"state of rows \(2,\), ids of rows \(3,\)"):
        model.prefill(tokens(3, L), state)
    with pytest.raises(ValueError, match=r"state of rows \(2,\), ids of rows \(\)"):
        model.step(ids[0, 0], state)
    with pytest.raises(ValueError, match="a state of type tuple, expected that of init_state"):
        model.step(ids[:, 0], tuple(state))
    with pytest.raises(ValueError, match="a state of 1 blocks, the model has 2"):
        model.step(ids[:, 0], state._replace(blocks=state.blocks[:1]))
    other = LRNNLMHeadModel(H, N, 2, V, ["mamba"], dtype=torch.float64).init_state((2,))
    for call in (model.step, lambda one, state: model.prefill(one.unsqueeze(-1), state)):
        with pytest.raises(ValueError, match="state is a State, expected a Tensor"):
            call(ids[:, 0], other)
    same(model(ids.int()), model(ids))


def test_the_registry_is_walked() -> None:
    assert set(LAYERS) == set(registry.MODELS)
    assert set(LAYERS) <= set(CASES)
