"""Models that vary in time read backwards too: two causal models, one on each row reversed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import assert_agree, error, gaps, normal
from torch import Tensor

from lrnnx_core import registry
from lrnnx_core.sequences import Layout
from lrnnx_nn import LAYERS, Block, Classifier, ClassifierConfig, Gated, Mamba, param_groups

H, N, EXACT = 3, 8, 1e-11
# model, options of init, options of scan; the last two share their recurrence or everything else
SETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mamba": ("mamba", {"bias": True, "inner_norm": "learned"}, {"inner_norm": "learned"}),
    "mamba2": ("mamba2", {"n_groups": 2, "head_dim": 4}, {"n_groups": 2, "chunk_size": 4}),
    "stream": ("stream", {}, {"discretization": "zoh"}),
    "rglru": ("rglru", {"heads": 2}, {}),
    "s7_full": ("s7", {"variant": "full"}, {"variant": "full"}),
    "s7_delta": ("s7", {}, {}),
}
every_set = pytest.mark.parametrize("name", SETS)
PROJECTIONS = {"in_proj", "out_proj", "linear_x", "linear_y", "linear_out", "gate_proj"}
PADDED: dict[str, dict[str, Tensor]] = {
    "whole": {},
    "lengths": {"lengths": torch.tensor([9, 4, 0, 1])},
    "left": {"mask": torch.arange(9) >= torch.tensor([[0], [3], [9], [8]])},
    "holes": {"mask": normal(4, 9, seed=4) > -0.5},
    "packed": {"reset": normal(4, 9, seed=5) > 0.6},
    "all": {
        "lengths": torch.tensor([9, 7, 0, 5]),
        "mask": normal(4, 9, seed=4) > -1,
        "reset": normal(4, 9, seed=5) > 0.6,
    },
}


def make(name: str, width: int = 4) -> dict[str, Tensor]:
    """Return parameters of both directions, none of them as it starts."""
    model, init, _ = SETS[name]
    generator = torch.Generator().manual_seed(0)
    params = registry.get(model).init(
        width, N, bidirectional=True, generator=generator, dtype=torch.float64, **init
    )
    return {k: v + 0.2 * normal(*v.shape, seed=i) for i, (k, v) in enumerate(params.items())}


def one_way(params: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of two causal models; only the first has the bias of the output."""
    first = {k: v for k, v in params.items() if not k.startswith(("reverse.", "C2"))}
    second = {k.removeprefix("reverse."): v for k, v in params.items() if k.startswith("reverse.")}
    second |= {k.replace("C2", "C"): v for k, v in params.items() if k.startswith("C2")}
    if "C2_re" in params:
        second["D"] = torch.zeros_like(params["D"])
    for bias in {"out_proj.bias", "linear_out.bias"} & set(first):
        second[bias] = torch.zeros_like(first[bias])
    return first, first | second


def full_loop(params: dict[str, Tensor], u: Tensor) -> Tensor:
    """Run S7's full variant over u (L, H) up to its gate, written from its equations."""
    width, states = u.shape[1], len(params["base"])
    sizes = [states, width * states, width * states, width, states]
    h, ys = torch.zeros(states, dtype=u.dtype), []
    for v in u @ params["in_proj.weight"].mT:
        a, B, C, d, beta = (params["x_proj.weight"] @ v).split(sizes)
        B, C = B.view(width, states), C.view(width, states)
        h = (1 - 1 / ((a + params["base"]) ** 2 + 0.5)) * h + v @ B + beta
        ys.append(C @ h + d * v)
    return torch.stack(ys)


def document(name: str, params: dict[str, Tensor], u: Tensor, elapsed: Tensor | None) -> Tensor:
    """Run one document (L, H) both ways by the plain loop; elapsed are the gaps before samples."""
    model, _, options = SETS[name]
    entry = registry.get(model)
    ahead, back = {}, {}
    if elapsed is not None:
        ahead["integration_timesteps"] = elapsed
        back["integration_timesteps"] = torch.cat([elapsed[:1], elapsed[1:].flip(0)])
    first, second = one_way(params)
    if name == "s7_full":  # the sum stands in front of the gate
        y = full_loop(first, u) + full_loop(second, u.flip(0)).flip(0)
        opening = torch.nn.functional.gelu(y) @ first["gate_proj.weight"].mT
        return y * torch.sigmoid(opening)
    forward, _ = entry.scan(first, u, mode="recurrent", **ahead, **options)
    backward, _ = entry.scan(second, u.flip(0), mode="recurrent", **back, **options)
    return forward + backward.flip(0)


def by_documents(
    name: str,
    params: dict[str, Tensor],
    u: Tensor,
    elapsed: Tensor | None,
    given: dict[str, Tensor],
) -> Tensor:
    """Cut every row of u (B, L, H) into documents without padding, and run each by itself."""
    y = torch.zeros_like(u)
    length = u.shape[1]
    layout = Layout(*(given.get(k) for k in ("lengths", "mask", "reset")), None)
    valid, reset = layout.valid(length), layout.resets(length)
    for i, row in enumerate(u):
        counted = torch.arange(length) if valid is None else valid[i].nonzero()[:, 0]
        starts = [] if reset is None else [k for k in range(len(counted)) if reset[i, counted[k]]]
        for part in torch.tensor_split(counted, starts):
            if len(part):
                gap = None if elapsed is None else elapsed[i, part]
                y[i, part] = document(name, params, row[part], gap)
    return y


# ----------------------------------------------------------------------------- the core


@pytest.mark.parametrize("timed", [False, True], ids=["uniform", "timed"])
@pytest.mark.parametrize("layout", PADDED)
@every_set
def test_both_directions_are_two_causal_models_on_every_document(
    name: str, layout: str, timed: bool
) -> None:
    if timed and name == "s7_full":
        pytest.skip("takes no integration_timesteps")
    model, _, options = SETS[name]
    params, u, given = make(name), normal(4, 9, 4), PADDED[layout]
    elapsed = gaps(4, 9) if timed else None
    want = by_documents(name, params, u, elapsed, given)
    sequence = given if elapsed is None else given | {"integration_timesteps": elapsed}
    layer = LAYERS[model](4, N, bidirectional=True, **SETS[name][1] | options).double()
    layer.load_state_dict(params)
    for mode in ("auto", "recurrent"):
        y, _ = registry.get(model).scan(
            params, u, bidirectional=True, mode=mode, **sequence, **options
        )
        assert_agree(y, want, EXACT, mode)
    assert_agree(layer(u, **sequence), want, EXACT, "layer")


@every_set
def test_what_stands_in_padding_does_not_matter(name: str) -> None:
    model, _, options = SETS[name]
    entry, params, u = registry.get(model), make(name), normal(4, 9, 4)
    lengths, elapsed = PADDED["lengths"]["lengths"], gaps(4, 9)
    padding = torch.arange(9) >= lengths[:, None]
    spoilt = u.masked_fill(padding.unsqueeze(-1), float("nan"))
    sequence = {} if name == "s7_full" else {"integration_timesteps": elapsed}
    worse = {k: v.masked_fill(padding, 1e3) for k, v in sequence.items()}
    for given in ({"lengths": lengths}, {"mask": ~padding}):
        run = lambda x, p, s, g=given: entry.scan(p, x, bidirectional=True, **g, **s, **options)[0]  # noqa: E731
        want = run(u, params, sequence)
        assert torch.equal(run(spoilt, params, worse), want)
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        run(spoilt, leaves, worse).square().sum().backward()
        assert all(v.grad is not None and v.grad.isfinite().all() for v in leaves.values())


@every_set
def test_the_sum_of_both_directions_is_reversed_by_exchanging_them(name: str) -> None:
    model, _, options = SETS[name]
    entry, params, u = registry.get(model), make(name), normal(2, 9, 4)
    pairs = [("C2_re", "C_re"), ("C2_im", "C_im")] if "C2_re" in params else [
        (k, k.removeprefix("reverse.")) for k in params if k.startswith("reverse.")
    ]  # fmt: skip
    exchanged = params | {a: params[b] for a, b in pairs} | {b: params[a] for a, b in pairs}
    y, _ = entry.scan(params, u, bidirectional=True, **options)
    other, _ = entry.scan(exchanged, u.flip(1), bidirectional=True, **options)
    assert_agree(other.flip(1), y, EXACT)
    assert error(entry.scan(params, u, **options)[0], y) > 1e-3


@every_set
def test_every_parameter_of_both_directions_has_a_gradient(name: str) -> None:
    model, _, options = SETS[name]
    params = {k: v.requires_grad_() for k, v in make(name).items()}
    y, _ = registry.get(model).scan(params, normal(2, 9, 4), bidirectional=True, **options)
    y.square().sum().backward()
    for key, value in params.items():
        assert value.grad is not None
        assert float(value.grad.abs().max()) > 1e-12, key


@every_set
def test_the_second_set_is_that_of_a_causal_model_but_for_the_projections(name: str) -> None:
    model, init, options = SETS[name]
    entry = registry.get(model)
    draw = lambda **more: entry.init(  # noqa: E731
        4, N, generator=torch.Generator().manual_seed(3), **init, **more
    )
    causal, both = draw(), draw(bidirectional=True)
    second = {"C2_re", "C2_im"} if name == "s7_delta" else {
        "reverse." + k for k in causal if k.split(".")[0] not in PROJECTIONS
    }  # fmt: skip
    assert set(both) == set(causal) | second
    for key in second:
        forward = key.removeprefix("reverse.").replace("C2", "C")
        assert both[key].shape == both[forward].shape
        assert both[key].dtype == both[forward].dtype
        assert both[key].untyped_storage().data_ptr() != both[forward].untyped_storage().data_ptr()
    drawn = [k for k in second if "proj.weight" in k or k.startswith("C2")]
    assert all(not torch.equal(both[k], both[k[8:]]) for k in drawn if k.startswith("reverse."))
    # without the option the second set lies there unused
    u = torch.randn(2, 5, 4)
    forward = {k: v for k, v in both.items() if k not in second}
    assert torch.equal(entry.scan(both, u, **options)[0], entry.scan(forward, u, **options)[0])


@every_set
def test_a_state_and_a_missing_set_are_refused(name: str) -> None:
    model, init, options = SETS[name]
    entry = registry.get(model)
    params, u = entry.init(4, N, **init), torch.randn(2, 5, 4)
    with pytest.raises(
        ValueError, match=rf"{model}.scan: params have no (reverse\.\*|C2_re); make"
    ):
        entry.scan(params, u, bidirectional=True, **options)
    params = entry.init(4, N, bidirectional=True, **init)
    _, state = entry.scan(params, u, bidirectional=True, **options)
    with pytest.raises(ValueError, match=f"{model}.scan: a bidirectional model reads whole"):
        entry.scan(params, u, state, bidirectional=True, **options)


def test_empty_sequences_and_missing_batches() -> None:
    for name in SETS:
        model, _, options = SETS[name]
        entry, params = registry.get(model), make(name)
        for shape in ((0, 4), (2, 0, 4), (0, 5, 4)):
            y, _ = entry.scan(params, normal(*shape), bidirectional=True, **options)
            assert y.shape == shape
        y, _ = entry.scan(
            params, normal(2, 0, 4), bidirectional=True, lengths=torch.tensor([0, 0]), **options
        )
        assert y.shape == (2, 0, 4)
        one = normal(2, 1, 4)
        want = torch.stack([document(name, params, x, None) for x in one])
        assert_agree(entry.scan(params, one, bidirectional=True, **options)[0], want, EXACT)


# ------------------------------------------------------------------- layers and what holds them


def layer_of(name: str, **options: Any) -> Any:
    sizes = {"sub_state_dim": 2} if name == "centaurus" else {}
    return LAYERS[name](H, N, bidirectional=True, **sizes, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_reads_both_ways_within_its_own_length(name: str) -> None:
    layer, u = layer_of(name, dtype=torch.float64), normal(3, 9, H)
    lengths = torch.tensor([9, 4, 1])
    want = torch.zeros_like(u)
    for i, n in enumerate(lengths.tolist()):
        want[i, :n] = layer(u[i, :n])
    assert_agree(layer(u, lengths=lengths), want, EXACT, "right")
    left = torch.arange(9) >= 9 - lengths[:, None]
    moved = torch.zeros_like(u)
    moved[left] = u[torch.arange(9) < lengths[:, None]]
    got = layer(moved, mask=left)
    assert_agree(got[left], want[torch.arange(9) < lengths[:, None]], EXACT, "left")
    # the first output knows the last sample, and nothing beyond the row's own end
    assert error(layer(u)[0, 0], layer(u[:, :8])[0, 0]) > 1e-9


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_gates_and_classifiers_of_every_layer_take_it(name: str) -> None:
    u, lengths = normal(3, 9, H), torch.tensor([9, 4, 1])
    sizes = {"sub_state_dim": 2} if name == "centaurus" else {}
    block = Block(H, layer_of(name)).double().eval()
    gated = Gated(H, name, N, gate=2, bottleneck=None, bidirectional=True, **sizes).double().eval()
    options = {"bidirectional": True, **sizes}
    config = ClassifierConfig(H, 2, name, d_model=4, d_state=N, n_layer=2, layer_options=options)
    for model in (block, gated, Classifier(config).double().eval()):
        y = model(u, lengths=lengths)
        for i, n in enumerate(lengths.tolist()):
            alone = model(u[i : i + 1, :n])[0]
            assert_agree(y[i, :n] if y.ndim == 3 else y[i], alone, 1e-10, type(model).__name__)
    for model in (block, gated):
        with pytest.raises(ValueError, match="a bidirectional layer cannot stream"):
            model.prefill(u)
        with pytest.raises(ValueError, match="a bidirectional layer cannot stream"):
            model.step(u[:, 0], model.init_state((3,)))


@every_set
def test_projections_are_called_once_and_the_second_set_is_state_space(name: str) -> None:
    model, init, options = SETS[name]
    layer = LAYERS[model](4, N, bidirectional=True, **init | options)
    calls: list[str] = []
    for key, child in layer.named_modules():
        if isinstance(child, torch.nn.Linear):
            child.register_forward_hook(lambda *_, key=key: calls.append(key))
    layer(torch.randn(2, 5, 4))
    assert sorted(calls) == sorted({k.split(".")[0] for k in layer.params} & PROJECTIONS)
    groups = {id(p): g["name"] for g in param_groups(layer, 1e-2) for p in g["params"]}
    half = LAYERS[model](4, N, bidirectional=True, **init | options).bfloat16()
    for key in layer.params:
        if not key.startswith("reverse."):
            continue
        forward = key.removeprefix("reverse.")
        assert groups[id(layer.get_parameter(key))] == groups[id(layer.get_parameter(forward))], key
        assert half.get_parameter(key).dtype == half.get_parameter(forward).dtype, key


def test_a_file_of_a_causal_model_does_not_load_by_half() -> None:
    layer = Mamba(4, N, bidirectional=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*reverse\.A_log"):
        layer.load_state_dict(Mamba(4, N).state_dict())


# -------------------------------------------------------------------------------- reversed rows


def test_mirroring_reverses_each_row_within_its_length_and_twice_is_nothing() -> None:
    lengths = torch.tensor([4, 2, 0])
    x = torch.arange(12.0).view(3, 4, 1)
    layout = Layout(lengths, None, None, None)
    assert layout.mirror(x)[..., 0].tolist() == [[3, 2, 1, 0], [5, 4, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(layout.mirror(layout.mirror(x)), x)
    assert torch.equal(Layout(None, None, None, None).mirror(x), x.flip(1))
    masked = Layout(None, torch.tensor([True, False, True, True]), None, None)
    assert torch.equal(masked.mirror(x), x.flip(1))


def test_a_mirrored_layout_keeps_padding_on_the_right() -> None:
    elapsed = torch.tensor([[10.0, 1.0, 2.0, 3.0], [20.0, 4.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    reset = torch.tensor([[False, True, False, False], [False, True, True, False], [True] * 4])
    lengths = torch.tensor([4, 2, 0])
    got = Layout(lengths, None, reset, elapsed).mirrored(4)
    assert got.lengths is lengths
    assert got.mask is None
    assert got.timesteps is not None
    assert got.timesteps[0].tolist() == [1, 3, 2, 10]  # documents of 1 and 3
    assert got.timesteps[1, :2].tolist() == [4, 20]  # two of one sample, each with its own gap
    assert got.resets(4) is not None
    assert got.resets(4)[0].tolist() == [False, False, False, True]
    assert got.resets(4)[1, :2].tolist() == [False, True]
    assert not got.resets(4)[2].any()
    whole = Layout(None, None, reset, elapsed)
    assert torch.equal(whole.mirrored(4).timesteps, whole.reversed(4).timesteps)
