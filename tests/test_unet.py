"""U-Nets along time: any layer, any length, any row, any split of a stream; and the published one.

The outside reference is the package attenuate (aTENNuate, Apache-2.0), installed by ``make setup``
without its audio libraries, whose places empty modules take.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lrnnx_nn import LAYERS, UNet, UNetConfig, load_attenuate, param_groups
from lrnnx_nn.architectures import checkpoint

MIXERS = (*LAYERS, "attn")
SMALL: dict[str, Any] = {
    "d_input": 2, "channels": (6, 4), "factors": (3, 2), "d_state": 4, "d_stem": 4
}  # fmt: skip
FRAME = 6
LENGTHS = (0, 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME - 1)


def unet(**changes: Any) -> UNet:
    """Return a small network in float64 whose every parameter has been moved."""
    model = UNet(UNetConfig(**{**SMALL, **changes})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    """Compare at the scale of b."""
    scale = float(b.detach().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


def stream(model: UNet, u: Tensor, cuts: list[int], gaps: Tensor | None = None) -> list[Tensor]:
    """Return the outputs of the pieces of u between the cuts, and of the end."""
    state, ys = None, []
    for a, b in itertools.pairwise([0, *cuts, u.shape[-2]]):
        y, state = model.prefill(
            u[..., a:b, :], state,
            integration_timesteps=None if gaps is None else gaps[..., a:b],
        )  # fmt: skip
        ys.append(y)
    assert state is not None
    return [*ys, model.finish(state)]


# ------------------------------------------------------------------------- what every layer does


@pytest.mark.parametrize("name", MIXERS)
def test_rows_of_a_padded_batch_are_what_they_are_alone(name: str) -> None:
    model = unet(layer=name)
    u, gaps = noise(len(LENGTHS), LENGTHS[-1], 2), 0.5 + torch.rand(len(LENGTHS), LENGTHS[-1])
    u[torch.arange(LENGTHS[-1]) >= torch.tensor(LENGTHS)[:, None]] = float("nan")
    with torch.no_grad():
        for time, rows in ((None, range(len(LENGTHS))), (gaps.double(), (2, 4))):
            y = model(u, lengths=torch.tensor(LENGTHS), integration_timesteps=time)
            for i in rows:
                n = LENGTHS[i]
                own = None if time is None else time[i, :n]
                alone = model(u[i, :n], integration_timesteps=own)
                assert alone.shape == (n, 2)
                close(y[i, :n], alone)
                assert bool((y[i, n:] == 0).all())


CENTRED = [(name, False) for name in MIXERS]
CAUSAL = [(name, True) for name in ("centaurus", "mamba2", "attn")]


@pytest.mark.parametrize(("name", "causal"), CENTRED + CAUSAL)
def test_pieces_of_a_stream_are_one_forward(name: str, causal: bool) -> None:
    model, length = unet(layer=name, causal=causal), 5 * FRAME + 2
    u = noise(2, length, 2)
    cuts = sorted(torch.randint(0, length + 1, (4,)).tolist())
    with torch.no_grad():
        ys = stream(model, u, cuts)
        close(torch.cat(ys, -2), model(u))
    came = list(itertools.accumulate(y.shape[-2] for y in ys))
    latest = [model.config.last_input(t) for t in range(length)]
    for n, count in zip(cuts, came, strict=False):  # as soon as the last input it needs is there
        assert count == sum(need < n for need in latest)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = unet(layer=name)
    u = noise(2, 2 * FRAME + 1, 2).requires_grad_()
    model(u, lengths=torch.tensor([2 * FRAME + 1, 4])).square().sum().backward()
    assert u.grad is not None
    assert bool((u.grad[1, 4:] == 0).all())
    assert bool((u.grad[1, :4] != 0).any())
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert bool(torch.isfinite(p.grad).all()), key
        assert bool((p.grad != 0).any()) or name in ("mamba", "stream"), key


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_length_is_completed_with_zeros_and_cut(length: int, causal: bool) -> None:
    model, u = unet(causal=causal), noise(2, length, 2)
    with torch.no_grad():
        y = model(u)
        assert y.shape == u.shape
        close(y, model(F.pad(u, (0, 0, 0, -length % FRAME)))[:, :length])
        close(torch.cat(stream(model, u, [length // 2]), -2), y)
        close(model(u[0]), y[0])


# -------------------------------------------------------------------------------- looking ahead


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True},
        {"causal": True, "preconv": 4, "n_layer": 2, "residual": True},
        {"preconv": 0},
        {},
        {"preconv": 5, "n_layer": 2, "n_neck": 1, "n_output": 1},
        {"d_input": 1, "d_stem": None},  # level 0 has no convolution then
        {"channels": (3,), "factors": (1,)},
    ],
)
def test_outputs_depend_on_no_later_input_than_stated(changes: dict[str, Any]) -> None:
    model = unet(**changes)
    config = model.config
    frame = config.total_factor
    length = 12 * frame + 8
    middle = range(2 * frame, 3 * frame)
    u = noise(length, config.d_input)
    jacobian = torch.autograd.functional.jacobian(lambda u: model(u)[2 * frame : 3 * frame], u)
    assert isinstance(jacobian, Tensor)
    depends = jacobian.abs().amax((1, 3)) > 1e-30  # far ones pass many taps
    last = (depends * torch.arange(length)).amax(-1)
    latest = [config.last_input(t) for t in middle]
    assert max(latest) < length
    assert last.tolist() == latest
    assert config.lookahead == max(n - t for n, t in zip(latest, middle, strict=True))
    if config.causal:
        assert config.lookahead == frame - 1


def test_the_published_network_looks_ahead_as_documented() -> None:
    assert UNetConfig.named("attenuate").lookahead == 1255
    assert UNetConfig.named("attenuate", causal=True).lookahead == 255
    assert UNetConfig(layer_options={"bidirectional": True}).lookahead is None


# ------------------------------------------------------------------------------------ streaming


def test_a_state_is_a_value_that_can_be_continued_twice() -> None:
    model, u = unet(causal=True), noise(3, 4 * FRAME, 2)
    with torch.no_grad():
        whole = model(u)
        first, state = model.prefill(u[:, : FRAME + 2])
        for _ in range(2):
            rest, end = model.prefill(u[:, FRAME + 2 :], state)
            close(torch.cat([first, rest, model.finish(end)], 1), whole)
        picked = tree_map(lambda x: x[[2, 0]], state)
        rest, end = model.prefill(u[[2, 0], FRAME + 2 :], picked)
        close(torch.cat([rest, model.finish(end)], 1), whole[[2, 0], FRAME:])


def test_a_row_that_has_ended_is_fed_zeros() -> None:
    model, u = unet(causal=True), noise(2, 3 * FRAME, 2)
    u[1, 8:] = 0
    y = model(u, lengths=torch.tensor([3 * FRAME, 8]))
    streamed = torch.cat(stream(model, u, [5, 11]), 1)
    close(streamed[0], y[0])
    close(streamed[1, :8], y[1, :8])


def test_step_takes_frames() -> None:
    model, u = unet(causal=True), noise(2, 3 * FRAME, 2)
    with torch.no_grad():
        state, ys = model.init_state((2,)), []
        for frame in u.split(FRAME, 1):
            y, state = model.step(frame, state, integration_timesteps=torch.ones(FRAME))
            assert y.shape == frame.shape
            ys.append(y)
        close(torch.cat(ys, 1), model(u))
        with pytest.raises(ValueError, match=r"expected .*6, 2.* after none"):
            model.step(u[:, :5], state)
        _, state = model.prefill(u[:, :1], state)
        with pytest.raises(ValueError, match="after 1 samples of a frame"):
            model.step(u[:, :FRAME], state)
    ahead = unet()
    with pytest.raises(ValueError, match="lookahead 27 with frames of 6 samples"):
        ahead.step(u[:, :FRAME], ahead.init_state((2,)))


def test_an_empty_stream_gives_nothing() -> None:
    for causal in (True, False):
        model = unet(causal=causal)
        y, state = model.prefill(noise(2, 0, 2))
        assert y.shape == model.finish(state).shape == (2, 0, 2)


# ------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("causal", [True, False])
def test_gaps(causal: bool) -> None:
    model, length = unet(layer="s5", causal=causal), 3 * FRAME + 2
    u, gaps = noise(2, length, 2), 0.2 + torch.rand(2, length, dtype=torch.float64)
    with torch.no_grad():
        plain = model(u)
        close(model(u, integration_timesteps=torch.ones(length)), plain)
        same = model(u[:, :12], integration_timesteps=torch.full((12,), 2.0), dt_scale=0.5)
        close(same, model(u[:, :12]))
        y = model(u, integration_timesteps=gaps)
        assert float((y - plain).abs().max()) > 1e-3 * float(plain.abs().max())
        for cuts in ([5, 6, 13], [1, 2, 3, 12], [18]):
            close(torch.cat(stream(model, u, cuts, gaps), 1), y)
        close(
            torch.cat(stream(model, u, [4, 9], gaps[0]), 1), model(u, integration_timesteps=gaps[0])
        )
        _, state = model.prefill(u[:, :2], integration_timesteps=gaps[:, :2])
        with pytest.raises(ValueError, match="expected in all or in none"):
            model.prefill(u[:, 2:], state)


def test_dt_scale_reaches_every_layer() -> None:
    model, u = unet(layer="s5"), noise(2, FRAME, 2)
    seen = []
    for module in model.modules():
        if hasattr(module, "d_state"):
            module.register_forward_pre_hook(
                lambda m, a, k: seen.append(k["dt_scale"]), with_kwargs=True
            )
    model(u, dt_scale=0.25)
    assert seen == [0.25] * 8
    halves = stream(model, u, [3])
    close(torch.cat(halves, 1), model(u))
    first, state = model.prefill(u[:, :3], dt_scale=0.25)
    close(torch.cat([first, model.finish(state, dt_scale=0.25)], 1), model(u[:, :3], dt_scale=0.25))


# ------------------------------------------------------------------------------- the published one


@pytest.fixture(scope="module")
def denoiser() -> Any:
    """Return attenuate's Denoiser class."""
    stand_ins = {name: ModuleType(name) for name in ("librosa", "torchaudio")}
    missing = {k: v for k, v in stand_ins.items() if importlib.util.find_spec(k) is None}
    strategy = torch.backends.opt_einsum.strategy
    sys.modules.update(missing)
    try:
        yield pytest.importorskip("attenuate.model").Denoiser
    finally:
        for name in missing:
            del sys.modules[name]
        torch.backends.opt_einsum.strategy = strategy  # which its layers set


def pair(denoiser: Any, **theirs: Any) -> tuple[Any, UNet]:
    """Return a Denoiser with moved parameters, and the U-Net with the same in float64."""
    model = denoiser(**theirs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    states = {"sub_state_dim": theirs.get("num_coeffs", 16)}
    options = {**UNetConfig.named("attenuate").layer_options, **states}
    names = {
        "in_channels": "d_input", "channels": "channels", "resample_factors": "factors",
        "repeat": "d_state",
    }  # fmt: skip
    changes = {names[k]: v for k, v in theirs.items() if k in names}
    preconv = 3 if theirs.get("pre_conv", True) else 0
    ours = UNet(
        UNetConfig.named("attenuate", layer_options=options, preconv=preconv, **changes)
    ).eval()
    load_attenuate(ours, model.state_dict())
    return model, ours.double()


@pytest.mark.parametrize("length", [256, 1536])
def test_the_published_network_agrees_with_attenuate(denoiser: Any, length: int) -> None:
    theirs, ours = pair(denoiser)
    assert sum(p.numel() for p in ours.parameters()) == 844_864
    u = torch.randn(2, length, 1)
    with torch.no_grad():
        want = theirs(u.mT).mT.double()
        close(ours(u.double()), want, 1e-5)
        close(ours.float()(u).double(), want, 5e-5)


def test_a_length_within_a_frame_agrees_with_attenuate(denoiser: Any) -> None:
    theirs, ours = pair(denoiser)
    u = torch.randn(2, 300)
    with torch.no_grad():  # its own padding is right but for multiples of 256
        want = theirs.denoise_single(u).double()
        close(ours(u.double().unsqueeze(-1)).squeeze(-1), want, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"in_channels": 3}, {"pre_conv": False}, {"in_channels": 2, "resample_factors": [3, 1]}],
)
def test_other_sizes_agree_with_attenuate_gradients_too(
    denoiser: Any, changes: dict[str, Any]
) -> None:
    sizes = {"channels": [4, 6], "num_coeffs": 3, "repeat": 5, "resample_factors": [2, 4]}
    theirs, ours = pair(denoiser, **(sizes | changes))
    width, frame = ours.config.d_input, ours.config.total_factor
    u = torch.randn(2, 4 * frame, width)
    want, y = theirs(u.mT).mT, ours(u.double())
    close(y, want.double(), 2e-5)
    want.square().sum().backward()
    y.square().sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    translated = UNet(ours.config)
    load_attenuate(translated, grads)
    values = translated.state_dict()
    for key, p in ours.named_parameters():
        assert p.grad is not None
        close(p.grad, values[key].double(), 2e-3)  # theirs are float32


def test_initial_weights_are_distributed_as_attenuates(denoiser: Any) -> None:
    ours, theirs = UNet(UNetConfig.named("attenuate")), UNet(UNetConfig.named("attenuate"))
    load_attenuate(theirs, denoiser().state_dict())
    values = theirs.state_dict()
    for key, p in ours.state_dict().items():
        if p.numel() > 300:
            assert float(p.std()) == pytest.approx(float(values[key].std()), rel=0.15), key
            assert float(p.mean()) == pytest.approx(float(values[key].mean()), abs=0.05), key


def test_load_attenuate_refuses_what_does_not_fit(denoiser: Any) -> None:
    sizes = {"channels": [4], "num_coeffs": 3, "repeat": 5, "resample_factors": [2]}
    _, ours = pair(denoiser, **sizes)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    good = denoiser(**sizes).state_dict()
    bad = [
        (denoiser(**{**sizes, "repeat": 4}).state_dict(), "A_im is (4, 3)|A_im is (12,)"),
        ({k: v for k, v in good.items() if not k.endswith("bias")}, "absent"),
        (good | {"encoder.weight": torch.zeros(1)}, "is no name"),
    ]
    for state, _ in bad:
        with pytest.raises(ValueError, match="load_attenuate"):
            load_attenuate(ours, state)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key])


# ---------------------------------------------------------------------------------- the structure


def test_it_is_the_formula() -> None:
    model, u = unet(layer="lru", residual=True, n_layer=2, d_output=5), noise(2, 2 * FRAME, 2)

    def block(b: Any, x: Tensor) -> Tensor:
        width = b.conv.weight.shape[-1]
        y = F.conv1d(x.mT, b.conv.weight, b.conv.bias, padding=width // 2, groups=x.shape[-1]).mT
        y = b.norm(b.mixer(y))
        return x + (F.silu(y) if b.activation == "silu" else y)

    stem, head = model.stem, model.head
    assert stem is not None
    assert head is not None
    down: Any = model.down
    up: Any = model.up
    x, skips = stem(u), []
    for blocks, pool in zip(down.blocks, down.down, strict=True):
        skips.append(x)
        for b in blocks:
            x = block(b, x)
        x = pool(x).x
    for b in model.neck:
        x = block(b, x)
    for blocks, spread, skip in reversed(list(zip(up.blocks, up.up, skips, strict=True))):
        x = spread(x) + skip
        for b in blocks:
            x = block(b, x)
    for b in model.output:
        x = block(b, x)
    last: Any = model.output[-1]
    assert isinstance(last.norm, nn.Identity)
    assert last.activation == "none"
    assert len(down.blocks[0]) == len(up.blocks[0]) == 2
    y = model(u)
    assert y.shape == (2, 2 * FRAME, 5)
    close(y, head(x))


def test_each_level_can_have_a_layer_of_its_own() -> None:
    layers = ["S5", {"layer": "mamba", "d_state": 3, "d_conv": 2}, {"layer": "attn", "n_heads": 2}]
    model = unet(layers=layers, n_neck=1)
    kinds = [m for m in model.modules() if hasattr(m, "d_state")]
    assert [type(m).__name__ for m in kinds] == [
        "S5", "Mamba", "Attention", "S5", "Mamba", "S5", "S5"
    ]  # fmt: skip
    assert [m.d_state for m in kinds] == [4, 3, None, 4, 3, 4, 4]
    assert model.config.layers == ("s5", *layers[1:])
    u = noise(2, 3 * FRAME + 1, 2)
    close(torch.cat(stream(model, u, [4, 7]), 1), model(u))


@pytest.mark.parametrize("changes", [{}, {"d_input": 1, "d_stem": None, "norm": "rms"}])
def test_blocks_with_one_channel_have_no_norm_and_no_convolution(changes: dict[str, Any]) -> None:
    model = unet(**changes)
    first: Any = model.down.blocks[0]
    bare = model.config.widths[0] == 1
    assert (first[0].conv is None) == bare
    assert isinstance(first[0].norm, nn.Identity) == bare
    assert (model.stem is None) == (model.head is None) == bare


@pytest.mark.parametrize("norm", ["batch", "rms", "none"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "none"])
def test_norms_and_activations(norm: str, activation: str) -> None:
    model = unet(norm=norm, activation=activation).train()
    u, lengths = noise(3, 2 * FRAME, 2), torch.tensor([12, 7, 3])
    padded = u.clone()
    padded[torch.arange(12) >= lengths[:, None]] = 1e3
    same = unet(norm=norm, activation=activation).train()
    same.load_state_dict(model.state_dict())
    u[torch.arange(12) >= lengths[:, None]] = 0
    close(model(padded, lengths=lengths), same(u, lengths=lengths))
    model.eval()
    close(torch.cat(stream(model, u, [5, 8]), 1), model(u))


def test_both_ways_needs_whole_sequences() -> None:
    model = unet(layer="s5", layer_options={"bidirectional": True})
    u, lengths = noise(2, 2 * FRAME, 2), torch.tensor([12, 7])
    close(model(u, lengths=lengths)[1, :7], model(u[1, :7]))
    state = unet(layer="s5").init_state((2,))
    for call in (
        lambda: model.prefill(u),
        lambda: model.init_state((2,)),
        lambda: model.finish(state),
    ):
        with pytest.raises(ValueError, match="a bidirectional layer cannot stream"):
            call()
    with pytest.raises(ValueError, match="bidirectional layer with causal = True"):
        unet(layer="s5", layer_options={"bidirectional": True}, causal=True)
    with pytest.raises(ValueError, match="bidirectional layer with causal = True"):
        unet(layers=["s5", "s5", {"layer": "lru", "bidirectional": True}], causal=True)


def test_reset_parameters_draws_everything_again() -> None:
    for name in ("centaurus", "mamba"):
        model = UNet(UNetConfig(**SMALL, layer=name, norm="batch"))
        fresh = UNet(UNetConfig(**SMALL, layer=name, norm="batch"))
        with torch.no_grad():
            for p in (*model.parameters(), *model.buffers()):
                p.fill_(float("nan"))
        model.reset_parameters()
        for (key, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
            assert bool(torch.isfinite(p).all()), key
            if p.numel() > 20:  # Mamba's projections are not drawn as nn.Linear draws
                assert bool(p.abs().max() < 3 * q.abs().max() + 1e-6), key
        assert bool(torch.isfinite(model(torch.randn(1, 7, 2))).all())


def test_every_parameter_is_in_one_group() -> None:
    model = unet()
    groups = {g["name"]: g["params"] for g in param_groups(model, 1e-2, weight_decay=0.1)}
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    slow = {id(p) for p in groups["ssm"]}
    names = {key for key, p in model.named_parameters() if id(p) in slow}
    assert {key.rsplit(".", 1)[1] for key in names} == {"A_raw", "A_im", "log_dt"}


# ---------------------------------------------------------------------------- configs and folders


def test_configs_survive_json() -> None:
    for config in (
        UNetConfig.named("attenuate"),
        UNetConfig(**SMALL, layers=["s5", {"layer": "Event-SSM", "d_state": 8}, "attention"]),
    ):
        values = json.loads(json.dumps(config.to_dict()))
        assert UNetConfig.from_dict(values) == config
    assert config.layers == ("s5", {"layer": "event_ssm", "d_state": 8}, "attn")
    assert UNetConfig.named("attenuate", causal=True).causal
    assert UNetConfig.named("attenuate").total_factor == 256


def test_save_and_load(tmp_path: Path) -> None:
    model = unet(layers=["s5", "mamba", "attn"]).float()
    model.save(tmp_path)
    again = UNet.load(tmp_path)
    u = torch.randn(2, 9, 2)
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(u), model(u))
    assert checkpoint.load_architecture(tmp_path) == "unet"
    assert next(UNet.load(tmp_path, dtype=torch.float64).parameters()).dtype == torch.float64
    (tmp_path / checkpoint.WEIGHTS).write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        UNet.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (4, 4, 4)}, "3 channels and 2 factors, expected as many of both"),
        ({"channels": (), "factors": ()}, "at least one"),
        ({"factors": (2, 0)}, "factors[1] = 0, expected an integer >= 1"),
        ({"factors": (2, 1.5)}, "factors[1] = 1.5, expected an integer >= 1"),
        ({"channels": (0, 4)}, "channels[0] = 0"),
        ({"d_input": 0}, "d_input = 0"),
        ({"d_state": 0}, "d_state = 0"),
        ({"d_stem": 0}, "d_stem = 0"),
        ({"d_output": -1}, "d_output = -1"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_neck": 0}, "n_neck = 0"),
        ({"n_output": 0}, "n_output = 0"),
        ({"preconv": 4}, "expected an odd width where causal = False"),
        ({"preconv": -1}, "preconv = -1, expected an integer >= 0"),
        ({"preconv": True}, "preconv = True, expected an integer >= 0"),
        ({"causal": "false"}, "causal = 'false', expected True or False"),
        ({"residual": 1}, "residual = 1, expected True or False"),
        ({"layer_options": {"layer": "lru"}}, "with 'layer', expected those of the mixer alone"),
        ({"norm": "group"}, "norm = 'group', expected one of"),
        ({"activation": "glu"}, "activation = 'glu', expected one of"),
        ({"layer": "lstm"}, "unknown mixer 'lstm'"),
        ({"layers": ["s5", "s5"]}, "2 layers, expected 3"),
        ({"layers": ["s5"] * 3, "layer": "lru"}, "layer = 'lru' beside layers"),
        ({"layers": ["s5"] * 3, "layer_options": {"blocks": 2}}, "layer_options beside layers"),
        ({"layers": ["s5", "s5", {"d_state": 4}]}, "a name or a dict with 'layer' in it"),
        ({"layer_options": {"dropout": 1}}, "has no option 'dropout'"),
        (
            {"layer": "s4d", "layer_options": {"channels": 2}},
            "S4D: 8 channels come out, expected 4",
        ),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        unet(**changes)
    assert message in str(caught.value)


def test_bad_names_and_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .'attenuate'"):
        UNetConfig.named("wavenet")
    with pytest.raises(ValueError, match="unknown key 'depth'"):
        UNetConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="UNetConfig: "):
        UNetConfig.from_dict({"channels": 3})


def test_bad_sequences_are_refused() -> None:
    model = unet()
    bad: list[tuple[Any, str]] = [
        (lambda: model(noise(2, 6, 3)), r"expected real \(..., L, 2\)"),
        (lambda: model(torch.zeros(2, 6, 2, dtype=torch.int64)), "expected real"),
        (lambda: model(noise(2)), r"expected real \(..., L, 2\)"),
        (lambda: model(noise(2, 6, 2), lengths=torch.tensor([7, 1])), "expected 0 ... 6"),
        (lambda: model(noise(2, 6, 2), lengths=torch.tensor([1, 1, 1])), "lengths"),
        (lambda: model(noise(2, 6, 2), integration_timesteps=-torch.ones(6)), "values >= 0"),
        (lambda: model.prefill(noise(2, 6, 3)), r"UNet.prefill: u \(2, 6, 3\)"),
        (lambda: model.prefill(noise(2, 6, 2), model.init_state((3,))), "the same batch"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


# -------------------------------------------------------------------- precision, transforms, graphs


@pytest.mark.parametrize("name", ["centaurus", "mamba", "attn"])
def test_bfloat16(name: str) -> None:
    model = UNet(UNetConfig(**SMALL, layer=name)).eval()
    u = torch.randn(2, 2 * FRAME + 1, 2)
    want = model(u)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(u)
        pieces = torch.cat(stream(model, u, [5, 8]), 1)
    close(y.float(), want, 5e-2)
    close(pieces.float(), want, 5e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    narrow = model.to(torch.bfloat16)
    close(narrow(u.to(torch.bfloat16)).float(), want, 0.1)


def test_under_transforms() -> None:
    model, u = unet(layer="s5"), noise(3, 2 * FRAME, 2)
    params = dict(model.named_parameters())

    def loss(p: Mapping[str, Tensor], u: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(p), (u,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, u)
    for i in range(3):
        alone = torch.func.grad(loss)(params, u[i])
        for key, g in alone.items():
            close(each[key][i], g, 1e-8)


def test_on_the_meta_device_and_without_rows() -> None:
    with torch.device("meta"):
        model = UNet(UNetConfig(**SMALL))
    model.to_empty(device="cpu").reset_parameters()
    model.eval()
    u = torch.randn(2, 7, 2)
    assert bool(torch.isfinite(model(u)).all())
    assert (
        model(u[:0]).shape
        == model(u[:0], lengths=torch.zeros(0, dtype=torch.int64)).shape
        == (0, 7, 2)
    )
    assert torch.cat(stream(model, u[:0], [3, 4]), 1).shape == (0, 7, 2)


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    for name in MIXERS:
        model, u = unet(layer=name, causal=True).float(), torch.randn(2, 4 * FRAME + 1, 2)
        lengths = torch.tensor([4 * FRAME + 1, 7])
        want = model(u, lengths=lengths)
        model, u = model.cuda(), u.cuda()
        y = model(u, lengths=lengths.cuda())
        close(y.cpu(), want, 1e-4)
        y.square().sum().backward()
        with torch.no_grad():
            close(torch.cat(stream(model, u, [5, 9, 20]), 1)[0], y[0], 1e-4)


@pytest.mark.cuda
@torch.no_grad()
def test_step_in_a_cuda_graph_equals_eager() -> None:
    model = unet(causal=True).float().cuda()
    frames = torch.randn(5, 2, FRAME, 2, device="cuda")
    want, state = [], model.init_state((2,))
    kept, frame = tree_map(torch.clone, state), frames[0].clone()
    for f in frames:
        y, state = model.step(f, state)
        want.append(y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.step(frame, kept)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, after = model.step(frame, kept)
        tree_map(lambda old, new: old.copy_(new), kept, after)
    for f, expected in zip(frames, want, strict=True):
        frame.copy_(f)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.compile
def test_compiles_in_one_graph() -> None:
    small = {"channels": (4,), "factors": (3,), "n_neck": 1, "n_output": 1}
    model, u = unet(**small, layer="s5", causal=True), noise(2, 7, 2)
    lengths = torch.tensor([7, 4])
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    step: Any = torch.compile(model.step, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(u, lengths=lengths), model(u, lengths=lengths))
        state = model.init_state((2,))
        for frame in u[:, :6].split(3, 1):
            y, after = step(frame, state)
            close(y, model.step(frame, state)[0])
            state = after
