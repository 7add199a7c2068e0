"""Causal attention as a mixer: the whole, its parts and its steps against a loop over samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import assert_agree, normal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lrnnx_nn import LAYERS, Attention, Block, Stack
from lrnnx_nn.attention import AttentionRing, AttentionState

F64 = torch.float64
H, L = 12, 9
SMALL: dict[str, Any] = {"n_heads": 6, "n_kv_heads": 2, "head_dim": 4, "rotary": 0.5}
WINDOWS = [None, 1, 3, L + 4]
every_window = pytest.mark.parametrize("window", WINDOWS)


def attention(**options: Any) -> Attention:
    torch.manual_seed(0)
    net = Attention(H, **{**SMALL, "dtype": F64, **options}).eval()
    with torch.no_grad():
        for p in net.parameters():  # sharper than the initial values, so that masks matter
            p.add_(0.5 * torch.randn_like(p))
    return net


# ------------------------------------------------------------------------------- the specification


def turned(x: Tensor, position: int, size: int, base: float) -> Tensor:
    """Rotate the pairs (i, i + size/2) of a head x (head_dim,) as complex numbers."""
    if not size:
        return x
    half = size // 2
    z = torch.complex(x[:half], x[half:size])
    rates = torch.tensor([base ** (-2 * i / size) for i in range(half)], dtype=F64)
    z = z * torch.polar(torch.ones_like(rates), position * rates)
    return torch.cat([z.real, z.imag, x[size:]])


def loop(
    net: Attention, u: Tensor, valid: Tensor | None = None, reset: Tensor | None = None
) -> Tensor:
    """Attend sample by sample over one sequence u (L, H), each head by itself."""
    hd, size = net.head_dim, int(net.head_dim * net.rotary)
    group = net.n_heads // net.n_kv_heads
    seen: list[tuple[int, Tensor, Tensor]] = []
    y = torch.zeros_like(u)
    position = 0

    def project(module: nn.Linear, x: Tensor, heads: int) -> Tensor:
        return F.linear(x, module.weight, module.bias).reshape(heads, hd)

    def normed(x: Tensor, norm: nn.Module) -> Tensor:
        if isinstance(norm, nn.Identity):
            return x
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight

    for t in range(u.shape[0]):
        if valid is not None and not valid[t]:
            continue
        if reset is not None and reset[t]:
            seen, position = [], 0
        q = normed(project(net.q_proj, u[t], net.n_heads), net.q_norm)
        k = normed(project(net.k_proj, u[t], net.n_kv_heads), net.k_norm)
        v = project(net.v_proj, u[t], net.n_kv_heads)
        q = torch.stack([turned(h, position, size, net.rotary_base) for h in q])
        k = torch.stack([turned(h, position, size, net.rotary_base) for h in k])
        seen.append((position, k, v))
        near = [s for s in seen if net.window is None or position - s[0] < net.window]
        heads = []
        for h in range(net.n_heads):
            score = torch.stack([q[h] @ s[1][h // group] for s in near]) / math.sqrt(hd)
            weight = torch.exp(score - score.max())
            weight = weight / weight.sum()
            heads.append(sum(w * s[2][h // group] for w, s in zip(weight, near, strict=True)))
        y[t] = F.linear(torch.cat(heads), net.o_proj.weight, net.o_proj.bias)
        position += 1
    return y


def rows(net: Attention, u: Tensor, **masks: Tensor) -> Tensor:
    """Return `loop` of every row of u (B, L, H)."""
    return torch.stack(
        [loop(net, x, **{k: m[i] for k, m in masks.items()}) for i, x in enumerate(u)]
    )


def holes(batch: int, length: int = L, seed: int = 5) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6


# --------------------------------------------------------------------------------------- the whole

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one head of keys": {"n_kv_heads": 1},
    "as many keys as queries": {"n_kv_heads": None},
    "full rotation": {"rotary": 1.0, "rotary_base": 100.0},
    "no rotation": {"rotary": 0.0},
    "biased": {"bias": True},
    "out bias": {"out_bias": True},
    "normed": {"qk_norm": True},
    "the loop of the softmax": {"use_fast_path": False},
}


@every_window
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_loop(variant: str, window: int | None) -> None:
    net, u = attention(window=window, **VARIANTS[variant]), normal(2, L, H)
    assert_agree(net(u), rows(net, u), 1e-12)
    out = net.o_proj.bias is not None
    assert (net.q_proj.bias is not None, out) == (variant == "biased", "bias" in variant)


@every_window
@pytest.mark.parametrize("fast", [True, False])
def test_padding_holes_and_documents(window: int | None, fast: bool) -> None:
    net, u = attention(window=window, bias=True, use_fast_path=fast), normal(4, L, H)
    lengths = torch.tensor([L, 0, 4, 1])
    right = torch.arange(L) < lengths[:, None]
    reset = torch.zeros(4, L, dtype=torch.bool)
    reset[0, [0, 3, 4]] = reset[2, [2, 7]] = reset[3, :] = True
    every = torch.ones_like(right)
    for valid in (every, right, right.flip(-1), holes(4)):
        for starts in (torch.zeros_like(reset), reset):
            dirty = torch.where(valid[..., None], u, torch.full_like(u, float("nan")))
            got = net(dirty, mask=valid, reset=starts)
            assert_agree(got, rows(net, u, valid=valid, reset=starts), 1e-12)
            assert not got[~valid].any()
    dirty = torch.where(right[..., None], u, torch.full_like(u, float("nan")))
    assert_agree(net(dirty, lengths=lengths), rows(net, u, valid=right), 1e-12)
    got = net(dirty, lengths=lengths, reset=reset)
    assert_agree(got, rows(net, u, valid=right, reset=reset), 1e-12)
    mask = holes(4)
    got = net(dirty, lengths=lengths, mask=mask)
    assert_agree(got, rows(net, u, valid=right & mask), 1e-12)


def test_packed_documents_are_documents_alone() -> None:
    net, u = attention(), normal(L, H)
    got = net(u, reset=torch.arange(L) == 4)
    assert_agree(got, torch.cat([net(u[:4]), net(u[4:])]), 1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_leading_dimensions_are_free(batch: tuple[int, ...], window: int | None) -> None:
    net, u = attention(window=window), normal(*batch, L, H)
    flat = u.reshape(math.prod(batch), L, H)
    want = torch.stack([net(x) for x in flat]) if len(flat) else flat
    assert_agree(net(u), want.reshape(u.shape), 1e-12)
    y, state = net.prefill(u[..., :5, :], net.init_state(batch))
    assert state.next.shape == batch
    for t in range(5, L):
        last, state = net.step(u[..., t, :], state)
        assert_agree(last, net(u)[..., t, :], 1e-12)
    assert_agree(y, net(u)[..., :5, :], 1e-12)
    reset = torch.arange(L) == 2  # arguments may have fewer dimensions
    assert_agree(net(u, reset=reset, mask=~reset), net(u, reset=reset.expand(u.shape[:-1]),
                 mask=~reset.expand(u.shape[:-1])), 1e-12)  # fmt: skip


# --------------------------------------------------------------------------------------- the parts

KINDS: list[tuple[int | None, int | None]] = [
    (None, None), (None, L), (None, 2 * L), (1, None), (3, None), (3, L), (L + 4, None), (L + 4, L),
]  # fmt: skip
every_kind = pytest.mark.parametrize(("window", "capacity"), KINDS)


def begin(net: Attention, capacity: int | None, batch: tuple[int, ...]) -> Any:
    return None if capacity is None else net.init_state(batch, capacity=capacity)


@every_kind
def test_every_split_is_the_whole(window: int | None, capacity: int | None) -> None:
    net, u = attention(window=window), normal(2, L, H)
    want = rows(net, u)
    for k in range(L + 1):
        first, state = net.prefill(u[:, :k], begin(net, capacity, (2,)))
        kept = pytree.tree_map(torch.clone, state)
        rest, after = net.prefill(u[:, k:], state)
        assert_agree(torch.cat([first, rest], 1), want, 1e-12, f"k = {k}")
        ys, stepped = [first], state
        for t in range(k, L):
            y, stepped = net.step(u[:, t], stepped)
            ys.append(y[:, None])
        assert_agree(torch.cat(ys, 1), want, 1e-12, f"k = {k}")
        for a, b in zip(after, stepped, strict=True):
            assert_agree(a, b, 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True)), "state written to"


@every_kind
@pytest.mark.parametrize("chunk", [1, 2, 4, 7])
def test_ragged_chunks_with_documents(window: int | None, capacity: int | None, chunk: int) -> None:
    net, u = attention(window=window), normal(3, L, H)
    valid, reset = holes(3), ~holes(3, seed=8)
    valid[1], reset[0] = torch.arange(L) >= 5, False  # a left padded row; one document
    want = rows(net, u, valid=valid, reset=reset)
    state, ys = begin(net, capacity, (3,)), []
    for t in range(0, L, chunk):
        part = slice(t, t + chunk)
        y, state = net.prefill(u[:, part], state, mask=valid[:, part], reset=reset[:, part])
        ys.append(y)
    assert_agree(torch.cat(ys, 1), want, 1e-12)


@every_kind
def test_ragged_rows_then_steps(window: int | None, capacity: int | None) -> None:
    net, u, more = attention(window=window), normal(4, 5, H), normal(4, 4, H, seed=2)
    lengths = torch.tensor([5, 0, 2, 3])
    _, state = net.prefill(u, begin(net, capacity, (4,)), lengths=lengths)
    ys = []
    for t in range(4):
        y, state = net.step(more[:, t], state)
        ys.append(y)
    for row, n in enumerate(lengths.tolist()):
        want = loop(net, torch.cat([u[row, :n], more[row]]))[n:]
        assert_agree(torch.stack(ys, 1)[row], want, 1e-12, f"row {row}")
    assert state.next.tolist() == (lengths + 4).tolist()


@pytest.mark.parametrize("length", [23, 24, 25])
def test_long_sequences_with_a_short_window(length: int) -> None:
    net, u = attention(window=4), normal(2, length, H)
    assert_agree(net(u), rows(net, u), 1e-12)
    valid, reset = holes(2, length), ~holes(2, length, seed=8)
    want = rows(net, u, valid=valid, reset=reset)
    assert_agree(net(u, mask=valid, reset=reset), want, 1e-12)
    for capacity in (None, length, 4):
        for k in (0, 1, 3, 6):
            parts = [slice(0, k), slice(k, length)]
            state, ys = begin(net, capacity, (2,)), []
            for part in parts:
                y, state = net.prefill(u[:, part], state, mask=valid[:, part], reset=reset[:, part])
                ys.append(y)
            assert_agree(torch.cat(ys, 1), want, 1e-12)


def test_states_hold_what_they_say() -> None:
    u = normal(2, 7, H)
    grown = attention().prefill(u)[1]
    assert isinstance(grown, AttentionState)
    assert grown.k.shape == grown.v.shape == (2, 7, 2, 4)
    assert grown.position.tolist() == [list(range(7))] * 2
    net = attention(window=3)
    ring = net.prefill(u)[1]
    assert isinstance(ring, AttentionRing)
    assert ring.position.tolist() == [[6, 4, 5]] * 2
    assert ring.next.tolist() == [7, 7]
    assert net.init_state((2,)).k.shape == ring.k.shape == (2, 3, 2, 4)
    assert net.init_state(capacity=2).k.shape == (2, 2, 4)
    assert net.init_state(capacity=9).k.shape == (3, 2, 4)
    fixed = attention().init_state((2,), capacity=8)
    assert fixed.position.tolist() == [[-1] * 8] * 2
    assert fixed.position.dtype == fixed.next.dtype == torch.int64
    after = attention().prefill(u, fixed, reset=torch.arange(7) == 5)[1]
    assert after.position.tolist() == [[0, 1] + [-1] * 6] * 2
    assert not after.k[:, 2:].any()
    untouched = net.prefill(u, ring, lengths=torch.tensor([0, 1]))[1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(untouched, ring, strict=True))


def test_a_document_longer_than_the_capacity_is_refused() -> None:
    net, u = attention(), normal(2, 6, H)
    state = net.init_state((2,), capacity=5)
    with pytest.raises(ValueError, match="a document of 6 samples, and the state has room for 5"):
        net.prefill(u, state)
    net.prefill(u, state, lengths=torch.tensor([5, 0]))
    net.prefill(u, state, reset=torch.arange(6) == 1)
    _, state = net.prefill(u[:, :5], state)
    with pytest.raises(ValueError, match=r"Attention.step: a document of 6 samples"):
        net.step(u[:, 5], state)
    short = attention(window=4)
    with pytest.raises(ValueError, match="a document of 6 samples, and the state has room for 3"):
        short.prefill(u, short.init_state((2,), capacity=3))
    short.prefill(u, short.init_state((2,), capacity=4))  # a full window is room for ever


# ------------------------------------------------------------------------------ precision, autograd


@pytest.mark.parametrize("window", [None, 3])
def test_float32_and_half(window: int | None) -> None:
    net, u = attention(window=window, bias=True), normal(2, L, H)
    want = net(u)
    single = attention(window=window, bias=True, dtype=torch.float32)
    single.load_state_dict(net.state_dict())
    assert_agree(single(u.float()), want.float(), 1e-5)
    half = single.bfloat16()
    y, state = half.prefill(u.float())  # activations take the weights' dtype
    assert (y.dtype, state.k.dtype) == (torch.float32, torch.bfloat16)
    assert_agree(y, want.float(), 5e-2)
    assert half(u.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 3])
def test_autocast(window: int | None) -> None:
    net, u = attention(window=window, qk_norm=True, dtype=torch.float32), normal(2, L, H).float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = net(u)
        y, state = net.prefill(u[:, :4])
        ys = [y]
        for t in range(4, L):
            y, state = net.step(u[:, t], state)
            ys.append(y[:, None])
        fixed = net.prefill(u[:, :4], net.init_state((2,), capacity=L))[1]
    assert whole.dtype == torch.float32
    assert (state.k.dtype, fixed.k.dtype) == (torch.bfloat16, torch.float32)
    assert_agree(torch.cat(ys, 1), whole, 2e-2)
    assert_agree(whole, net(u), 5e-2)


def test_angles_of_far_positions_keep_float32() -> None:
    """Keys of bfloat16 weights turn by what float32 gives, not by bfloat16's eight bits."""
    net, u = attention(rotary=1.0, window=4, dtype=torch.float32), normal(1, 6, H).float()
    reference = net.double()
    state = reference.init_state((1,))._replace(next=torch.tensor([1001]))
    want, _ = reference.prefill(u.double(), state)
    net = attention(rotary=1.0, window=4, dtype=torch.float32).bfloat16()
    net.load_state_dict(reference.state_dict())
    got, _ = net.prefill(u, net.init_state((1,))._replace(next=torch.tensor([1001])))
    assert_agree(got.double(), want, 5e-2)
    early, _ = net.prefill(u)  # rotation is relative: where a document starts does not matter
    assert_agree(early, got, 5e-2)


@pytest.mark.parametrize(("window", "capacity"), [(None, None), (None, 4), (2, None)])
def test_gradients_flow_through_states(window: int | None, capacity: int | None) -> None:
    torch.manual_seed(1)
    net = Attention(4, n_heads=2, n_kv_heads=1, window=window, dtype=F64)
    keys = dict(net.named_parameters())

    def run(u: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Any:
        state = net.init_state((1,), capacity=capacity)
        if capacity is None and window is None:
            state = AttentionState(k, v, torch.tensor([[0]]), torch.tensor([1]))
        else:
            slots = state.k.shape[1]
            put = F.pad(k, (0, 0, 0, 0, 0, slots - 1)), F.pad(v, (0, 0, 0, 0, 0, slots - 1))
            where = torch.tensor([[0] + [-1] * (slots - 1)])
            state = AttentionRing(*put, where, torch.tensor([1]))
        given = dict(zip(keys, weights, strict=True))
        bound = torch.func.functional_call
        y, state = bound(_Parts(net), {f"net.{n}": w for n, w in given.items()}, (u, state))
        return y, state.k, state.v

    u, k, v = (normal(1, *s, seed=i).requires_grad_() for i, s in
               enumerate([(3, 4), (1, 1, 2), (1, 1, 2)]))  # fmt: skip
    weights = [p.detach().requires_grad_() for p in keys.values()]
    assert torch.autograd.gradcheck(run, (u, k, v, *weights))


class _Parts(nn.Module):
    """A prefill and a step, as one function of all parameters."""

    def __init__(self, net: Attention) -> None:
        super().__init__()
        self.net = net

    def forward(self, u: Tensor, state: Any) -> Any:
        y, state = self.net.prefill(u[:, :-1], state)
        last, state = self.net.step(u[:, -1], state)
        return torch.cat([y, last[:, None]], 1), state


@pytest.mark.parametrize("window", [None, 2])
def test_transforms(window: int | None) -> None:
    """Under torch.func the softmax is written out: what a fused one lacks, this one has."""
    net, u = attention(window=window), normal(3, 5, H)
    params = dict(net.named_parameters())

    def loss(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, u)
    alone = torch.func.grad(loss)(params, u[1])
    for name, g in each.items():
        assert_agree(g[1], alone[name], 1e-11)
    direction = normal(5, H, seed=4)
    tangent = torch.func.jvp(net, (u[0],), (direction,))[1]
    step = 1e-6
    with torch.no_grad():
        slope = (net(u[0] + step * direction) - net(u[0] - step * direction)) / (2 * step)
    assert_agree(tangent, slope, 1e-7)
    hessian = torch.func.hessian(lambda x: net(x).square().sum())(u[0, :2])
    assert_agree(hessian.reshape(2 * H, 2 * H), hessian.reshape(2 * H, 2 * H).T, 1e-10)
    y = torch.func.vmap(lambda x, m: net(x, mask=m))(u, holes(3, 5))
    assert_agree(y, net(u, mask=holes(3, 5)), 1e-12)


@pytest.mark.compile
@pytest.mark.parametrize(("window", "capacity"), [(None, 16), (3, None)])
def test_compiles_in_one_piece(window: int | None, capacity: int | None) -> None:
    net, u = attention(window=window), normal(2, L, H).requires_grad_()
    compiled = {"fullgraph": True, "backend": "aot_eager"}
    lengths = torch.tensor([L, 3])
    whole = torch.compile(lambda x: net(x, lengths=lengths).square().sum(), **compiled)
    got, want = whole(u), net(u, lengths=lengths).square().sum()
    assert_agree(got, want, 1e-12)
    assert_agree(torch.autograd.grad(got, u)[0], torch.autograd.grad(want, u)[0], 1e-11)
    with torch.no_grad():
        step, want = torch.compile(net.step, **compiled), net(u)
        state = net.init_state((2,), capacity=capacity)
        for t in range(5):
            y, state = step(u[:, t], state)
            assert_agree(y, want[:, t], 1e-12)


# ---------------------------------------------------------------------------- as part of a network


@pytest.mark.parametrize("beside", ["s5", "mamba", "rglru"])
def test_in_a_stack_with_recurrent_layers(beside: str) -> None:
    torch.manual_seed(0)
    net = Stack(
        [Attention(H, **SMALL, dtype=F64), Block(H, LAYERS[beside](H, 8, dtype=F64)).double(),
         Attention(H, **SMALL, window=3, dtype=F64)]
    ).eval()  # fmt: skip
    u, mask = normal(2, L, H), holes(2)
    whole = net(u, mask=mask)
    for k in (0, 2, 5):
        y, state = net.prefill(u[:, :k], net.init_state((2,)), mask=mask[:, :k])
        rest, _ = net.prefill(u[:, k:], state, mask=mask[:, k:])
        assert_agree(torch.cat([y, rest], 1), whole, 1e-12)
    state, ys = net.init_state((2,)), []
    for t in range(L):
        y, state = net.step(u[:, t], state)
        ys.append(y)
    assert_agree(torch.stack(ys, 1), net(u), 1e-12)


def test_time_does_not_reach_attention() -> None:
    net, u = attention(), normal(2, L, H)
    gaps = normal(2, L, seed=3).abs()
    assert torch.equal(net(u, integration_timesteps=gaps, dt_scale=2.0), net(u))
    y, state = net.prefill(u[:, :1], integration_timesteps=gaps[:, :1], dt_scale=0.5)
    assert torch.equal(y, net.prefill(u[:, :1])[0])
    got, _ = net.step(u[:, 1], state, integration_timestep=gaps[:, 1], dt_scale=0.5)
    assert_agree(got, net(u)[:, 1], 1e-12)


def test_projections_are_modules_and_can_be_drawn_again() -> None:
    net, u = attention(bias=True, qk_norm=True), normal(2, L, H)
    assert net.d_output == net.d_model == H
    assert (net.d_state, net.name, Attention.name) == (None, "attn", "attn")
    called: list[str] = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = net.get_submodule(name)
        assert type(module) is nn.Linear
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    net(u)
    assert sorted(called) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.reset_parameters()
    assert not any(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.q_norm.weight, torch.ones(4, dtype=F64))
    meta = Attention(H, **SMALL, device="meta")
    meta.reset_parameters()
    assert meta.q_proj.weight.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(meta(u.float())).all()


class _Hidden(nn.Module):
    """A projection in a wrapper that shows no weight, as adapters and quantisation have them."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def test_projections_can_be_wrapped() -> None:
    net, u = attention(window=3), normal(2, L, H)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(net, name, _Hidden(net.get_submodule(name)))
    wrapped = net(u)
    y, state = net.prefill(u[:, :4], net.init_state((2,)))
    assert_agree(y, wrapped[:, :4], 1e-12)
    assert_agree(net.step(u[:, 4], state)[0], wrapped[:, 4], 1e-12)
    twice = attention(window=3)
    with torch.no_grad():
        for p in twice.parameters():
            p.mul_(2)
    assert_agree(wrapped, twice(u), 1e-12)


def test_dropout_is_for_training() -> None:
    for fast in (True, False):
        net, u = attention(dropout=0.5, use_fast_path=fast), normal(2, L, H)
        assert torch.equal(net(u), net(u))
        net.train()
        assert not torch.equal(net(u), net(u))


def test_heads_by_default() -> None:
    for given, want in (
        ((128, None, None), (2, 2, 64)),
        ((96, None, None), (1, 1, 96)),
        ((96, 4, None), (4, 4, 24)),
        ((96, None, 16), (6, 6, 16)),
        ((96, 4, 8), (4, 4, 8)),
    ):
        net = Attention(given[0], n_heads=given[1], head_dim=given[2], device="meta")
        assert (net.n_heads, net.n_kv_heads, net.head_dim) == want


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_heads": 5}, "n_heads = 5 does not divide d_model = 12"),
        ({"head_dim": 5}, "head_dim = 5 does not divide d_model = 12"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3 does not divide n_heads = 4"),
        ({"n_heads": 0}, "n_heads = 0, expected an integer >= 1"),
        ({"n_heads": 4}, "rotary = 1.0 of head_dim = 3 turns 3 channels, expected an even number"),
        ({"head_dim": 6, "rotary": 0.5}, "turns 3 channels, expected an even number"),
        ({"rotary": 1.5}, "rotary = 1.5, expected 0 <= rotary <= 1"),
        ({"rotary_base": 0.0}, "rotary_base = 0.0, expected a number > 0"),
        ({"window": 0}, "window = 0, expected an integer >= 1"),
        ({"dropout": 1.0}, "dropout = 1.0, expected 0 <= dropout < 1"),
        ({"d_state": 16}, "d_state = 16, expected None: attention has no state size"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"Attention: .*{said}"):
        Attention(H, **options)


def test_bad_input_is_refused() -> None:
    net, ring, u = attention(), attention(window=3), normal(2, L, H)
    state = net.prefill(u)[1]
    for call, said in (
        (lambda: net(u[..., :5]), r"Attention.forward: u \(2, 9, 5\), expected .* H = 12"),
        (lambda: net(u[0, 0]), r"Attention.forward: u \(12,\), expected"),
        (lambda: net(u.long()), "u has dtype torch.int64, expected a real floating one"),
        (lambda: net(u, lengths=torch.tensor([3, L + 1])), "lengths: between 3 and 10"),
        (lambda: net(u, mask=torch.ones(2, 3).bool()), r"mask \(2, 3\) does not fit"),
        (lambda: net.prefill(u[:1], state), r"state.k \(2, 9, 2, 4\), expected \(1, 9, 2, 4\)"),
        (lambda: net.step(u[0, 0], state), r"Attention.step: state.k .*expected \(9, 2, 4\)"),
        (lambda: ring.step(u[:, 0], state), "state is a AttentionState, expected AttentionRing"),
        (lambda: net.prefill(u, u), "state is a Tensor, expected AttentionState or AttentionRing"),
        (lambda: net.step(u[:, 0], state._replace(next=state.next.float())),
         "state.next has dtype torch.float32, expected torch.int64"),
        (lambda: ring.prefill(u, ring.init_state((2,))._replace(position=state.position)),
         r"state.position \(2, 9\), expected \(2, 3\)"),
        (lambda: ring.prefill(u, attention(window=4).init_state((2,))),
         "state of 4 slots, expected 1 ... 3"),
        (lambda: net.init_state(capacity=0), "capacity = 0, expected an integer >= 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()
