"""Blocks, gates, dropout, norms: forward, prefill and step agree, and padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_nn import LAYERS, LRU, S4D, S5, Attention, BatchNorm, Block, Gated
from lrnnx_nn.blocks import ACTIVATIONS, Activation, Dropout, SizedMixer
from lrnnx_nn.layers.base import Layer
from lrnnx_nn.norms import NORMS, make_norm

H = 6
MIXERS: dict[str, Callable[[], Layer]] = {
    "s5": lambda: S5(H, 8, dtype=torch.float64),
    "lru": lambda: LRU(H, 5, dtype=torch.float64),
    "s4d": lambda: S4D(H, 4, dtype=torch.float64),
}


def block(mixer: str = "s5", **options: object) -> Block:
    made = Block(H, MIXERS[mixer](), **options).double()  # type: ignore[arg-type]
    for parameter in made.parameters():  # biases and gains that are not zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_prefill_and_step_agree(mixer: str, activation: str) -> None:
    layer = block(mixer, activation=activation, dropout=0.5)
    u = torch.randn(2, 7, H, dtype=torch.float64)
    whole = layer(u)
    first, state = layer.prefill(u[:, :3])
    second, state = layer.prefill(u[:, 3:5], state)
    steps = []
    for t in (5, 6):
        y, state = layer.step(u[:, t], state)
        steps.append(y)
    pieces = torch.cat([first, second, torch.stack(steps, 1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    state = layer.init_state((2,))
    torch.testing.assert_close(layer.step(u[:, 0], state)[0], whole[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prenorm", [True, False])
def test_norms_agree_in_forward_and_step(norm: str, prenorm: bool) -> None:
    layer = block(norm=norm, prenorm=prenorm)
    u = 3 + torch.randn(2, 5, H, dtype=torch.float64)
    layer.train()
    layer(u)  # running statistics that are not zero and one
    layer.eval()
    state = layer.init_state((2,))
    ys = []
    for t in range(5):
        y, state = layer.step(u[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), layer(u), rtol=1e-12, atol=1e-12)


def test_block_is_the_formula() -> None:
    layer = block("lru", norm="layer", activation="half_glu1")
    u = torch.randn(3, 4, H, dtype=torch.float64)
    gate = layer.activation.gate
    assert gate is not None
    g = F.gelu(layer.mixer(layer.norm(u)), approximate="tanh")
    torch.testing.assert_close(layer(u), u + g * torch.sigmoid(gate(g)))
    post = block("lru", norm="rms", activation="none", prenorm=False)
    torch.testing.assert_close(post(u), post.norm(u + post.mixer(u)))


def test_activations_are_their_formulas() -> None:
    y = torch.randn(2, 3, H, dtype=torch.float64)
    made = {name: Activation(name, H, H).double() for name in ACTIVATIONS}
    g = F.gelu(y, approximate="tanh")

    def sigmoid(linear: nn.Linear | None) -> Tensor:
        assert linear is not None
        return torch.sigmoid(linear(g))

    full, glu = made["full_glu"], made["glu"]
    assert full.value is not None
    assert glu.output is not None
    expected = {
        "none": y,
        "gelu": g,
        "half_glu1": g * sigmoid(made["half_glu1"].gate),
        "half_glu2": y * sigmoid(made["half_glu2"].gate),
        "full_glu": full.value(g) * sigmoid(full.gate),
        "glu": F.glu(glu.output(F.gelu(y))),
    }
    for name, value in expected.items():
        torch.testing.assert_close(made[name](y), value)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(norm: str, training: bool) -> None:
    u = torch.randn(2, 6, H, dtype=torch.float64)
    lengths = torch.tensor([6, 4])
    padded = torch.where(
        torch.arange(6)[None, :, None] < lengths[:, None, None], u, torch.tensor(1e3)
    )
    by_lengths, by_mask, clean = (block(norm=norm).train(training) for _ in range(3))
    by_mask.load_state_dict(by_lengths.state_dict())
    clean.load_state_dict(by_lengths.state_dict())
    y = by_lengths(padded, lengths=lengths)
    mask = torch.arange(6) < lengths[:, None]
    torch.testing.assert_close(by_mask(padded, mask=mask), y, rtol=1e-12, atol=1e-12)
    assert bool((y[1, 4:] == 0).all())
    if norm != "batch" or not training:
        torch.testing.assert_close(clean(u[1:, :4])[0], y[1, :4], rtol=1e-10, atol=1e-12)


def test_batch_norm_counts_valid_samples_alone() -> None:
    norm, reference = BatchNorm(H, momentum=0.1).double(), nn.BatchNorm1d(H, momentum=0.1).double()
    x = 2 + 3 * torch.randn(3, 5, H, dtype=torch.float64)
    valid = torch.rand(3, 5) < 0.6
    y = norm(x, valid)
    torch.testing.assert_close(y[valid], reference(x[valid]))
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    norm.eval(), reference.eval()
    torch.testing.assert_close(norm(x)[valid], reference(x[valid]))


def test_batch_norm_survives_a_batch_without_samples() -> None:
    norm = BatchNorm(H)
    norm(torch.randn(2, 3, H), torch.zeros(2, 3, dtype=torch.bool))
    assert bool((norm.running_mean == 0).all())
    assert bool((norm.running_var == 1).all())
    with pytest.raises(ValueError, match=r"x \(2, 3, 5\), expected"):
        norm(torch.randn(2, 3, 5))


def test_tied_dropout_drops_whole_channels() -> None:
    x = torch.ones(4, 50, 8)
    tied, free = Dropout(0.5, tie=True)(x), Dropout(0.5)(x)
    assert bool((tied == tied[:, :1]).all())
    assert not bool((free == free[:, :1]).all())
    assert set(tied.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(Dropout(0.5, tie=True).eval()(x), x)


def test_reset_starts_a_new_document() -> None:
    layer = block("s5")
    u = torch.randn(1, 6, H, dtype=torch.float64)
    reset = torch.tensor([[False, False, True, False, False, False]])
    expected = torch.cat([layer(u[:, :2]), layer(u[:, 2:])], 1)
    torch.testing.assert_close(layer(u, reset=reset), expected, rtol=1e-12, atol=1e-12)


def test_timesteps_and_dt_scale_reach_the_mixer() -> None:
    layer = block("s5")
    u, two = torch.randn(1, 4, H, dtype=torch.float64), torch.full((1, 4), 2.0, dtype=torch.float64)
    scaled = layer(u, dt_scale=2.0)
    torch.testing.assert_close(layer(u, integration_timesteps=two), scaled, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(u), scaled)
    state = layer.init_state((1,))
    torch.testing.assert_close(
        layer.step(u[:, 0], state, integration_timestep=two[:, 0])[0], scaled[:, 0]
    )
    torch.testing.assert_close(layer.step(u[:, 0], state, dt_scale=2.0)[0], scaled[:, 0])


@pytest.mark.parametrize("activation", ["glu", "full_glu"])
def test_several_channels_are_projected(activation: str) -> None:
    mixer = S4D(H, 4, channels=3)
    layer = Block(H, mixer, activation=activation).eval()
    u = torch.randn(2, 5, H)
    y, _ = layer.prefill(u)
    assert y.shape == u.shape
    torch.testing.assert_close(layer(u), y)
    with pytest.raises(ValueError, match="the mixer gives 18 channels and the block has 6"):
        Block(H, mixer, activation="half_glu1")


@pytest.mark.parametrize("name", ["attention", "gated", "block"])
def test_any_mixer_goes_into_a_block(name: str) -> None:
    mixers: dict[str, Callable[[], SizedMixer]] = {
        "attention": lambda: Attention(H, n_heads=3),
        "gated": lambda: Gated(H, "lru", 4, bottleneck=2),
        "block": lambda: Block(H, LRU(H, 4)),  # has no d_output: it is d_model
    }
    layer = Block(H, mixers[name]()).double().eval()
    u = torch.randn(2, 5, H, dtype=torch.float64)
    whole = layer(u)
    first, state = layer.prefill(u[:, :2])
    second, state = layer.prefill(u[:, 2:4], state)
    last, state = layer.step(u[:, 4], state)
    pieces = torch.cat([first, second, last.unsqueeze(1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


def test_bidirectional_blocks_run_forward_only() -> None:
    layer = Block(H, S5(H, 8, bidirectional=True)).eval()
    u, lengths = torch.randn(2, 6, H), torch.tensor([6, 3])
    y = layer(u, lengths=lengths)
    torch.testing.assert_close(y[1, :3], layer(u[1:, :3])[0])
    with pytest.raises(ValueError, match="cannot stream"):
        layer.prefill(u)
    with pytest.raises(ValueError, match="cannot stream"):
        layer.step(u[:, 0], layer.init_state((2,)))


def test_projections_are_modules_that_are_called() -> None:
    """What LoRA and quantisation need: a hook on the Linear sees the data."""
    layer, seen = block("lru", activation="full_glu"), []
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *args: seen.append(args[0]))
    layer(torch.randn(1, 3, H, dtype=torch.float64))
    assert len(set(seen)) == 2


def test_reset_parameters_draws_again_also_from_meta() -> None:
    layer = Block(H, S5(H, 8), norm="batch", activation="glu")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.reset_parameters()
    changed = {
        key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])
    }
    assert {"mixer.B_re", "activation.output.weight"} <= changed
    torch.testing.assert_close(layer.mixer.params["Lambda_re"], before["mixer.Lambda_re"])
    empty = layer.to("meta").to_empty(device="cpu")
    for value in empty.state_dict().values():
        value.fill_(float("nan"))
    empty.reset_parameters()
    assert all(bool(value.isfinite().all()) for value in empty.state_dict().values())
    assert bool(empty.eval()(torch.randn(1, 3, H)).isfinite().all())


def test_a_norm_of_ones_own() -> None:
    layer = Block(H, LRU(H, 4), norm=lambda width: nn.GroupNorm(1, width, affine=False))
    assert isinstance(layer.norm, nn.GroupNorm)


def test_errors_say_what_came_and_what_was_expected() -> None:
    with pytest.raises(ValueError, match="d_model = 5, and the mixer's is 6"):
        Block(5, LRU(6, 4))
    with pytest.raises(ValueError, match=r"norm 'instance', expected one of .*layer"):
        make_norm("instance", 4)
    with pytest.raises(ValueError, match=r"activation 'relu', expected one of .*half_glu1"):
        Block(H, LRU(H, 4), activation="relu")
    with pytest.raises(ValueError, match=r"dropout = 1\.0"):
        Block(H, LRU(H, 4), dropout=1.0)
    with pytest.raises(ValueError, match=r"u \(6,\), expected"):
        Block(H, LRU(H, 4))(torch.randn(H))


@pytest.mark.parametrize("name", LAYERS)
def test_a_block_draws_its_layer_again_as_the_layer_does(name: str) -> None:
    torch.manual_seed(0)
    block = Block(64, LAYERS[name](64, 64), norm="none", activation="none")
    torch.manual_seed(1)
    block.reset_parameters()
    torch.manual_seed(1)
    block.mixer.reset_parameters()
    again = {k: v.clone() for k, v in block.mixer.state_dict().items()}
    torch.manual_seed(1)
    block.reset_parameters()
    for key, value in block.mixer.state_dict().items():
        assert torch.equal(value, again[key]), key
