"""Stages of blocks: their config, padding under every layer and pooling, gaps, resets, tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from model_cases import assert_agree, gaps, normal
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lrnnx_core import registry
from lrnnx_core.registry import MODELS
from lrnnx_nn import LAYERS, Block, EventStage
from lrnnx_nn.architectures import Encoder, EncoderConfig, StageConfig
from lrnnx_nn.pooling import GROUP_POOLINGS, VALUE_POOLINGS, Grouped, grouped_lengths, pool

F64 = torch.float64
STRIDE, LENGTH = 3, 7
LENGTHS = torch.tensor([7, 4, 3, 2, 1, 0])  # stride + 1, stride, stride - 1, 1, 0
OPTIONS = {"attn": {"n_heads": 2}}
every_layer = pytest.mark.parametrize("layer", [*LAYERS, "attn"])


def network(*stages: StageConfig, **options: Any) -> Encoder:
    """Return a small network in float64; stages without layers are LRUs."""
    values = {"layer": "lru", "d_model": 4, "d_state": 8, "n_layer": 1} | options
    config = EncoderConfig(values.pop("d_input", 2), stages=stages or None, **values)
    return Encoder(config).double().eval()


def two_stages(layer: str, pooling: str, **options: Any) -> Encoder:
    stride = 1 if pooling == "none" else STRIDE
    return network(
        StageConfig(pooling=pooling, stride=stride), StageConfig(d_model=8), layer=layer,
        layer_options={**OPTIONS.get(layer, {}), **options},
    )  # fmt: skip


def values_of(model: Encoder, u: Tensor, **sequence: Any) -> dict[str, Tensor]:
    """Return what every head sees."""
    out = model(u, **sequence)
    return {p: pool(out.y, out.valid(), p, out.integration_timesteps) for p in VALUE_POOLINGS}


def alone(model: Encoder, u: Tensor, time: Tensor | None, keep: Tensor) -> dict[str, Tensor]:
    """Run every row by itself, cut to the samples that ``keep`` (B, L) names."""
    rows = []
    for i, kept in enumerate(keep):
        given = {} if time is None else {"integration_timesteps": time[i, kept]}
        rows.append(values_of(model, u[i, kept], **given))
    return {p: torch.stack([row[p] for row in rows]) for p in VALUE_POOLINGS}


# ------------------------------------------------------------------------------------ every layer


@every_layer
@pytest.mark.parametrize("pooling", GROUP_POOLINGS)
def test_padded_equals_unpadded(layer: str, pooling: str) -> None:
    """For every layer, pooling of stages and head, and rows of 0, 1, stride - 1 ... samples."""
    model = two_stages(layer, pooling)
    keep = torch.arange(LENGTH) < LENGTHS[:, None]
    u, time = normal(6, LENGTH, 2), gaps(6, LENGTH)
    spoiled = u.masked_fill(~keep.unsqueeze(-1), float("nan"))
    for given in (time, None) if pooling in ("none", "mean") else (time,):
        want = alone(model, u, given, keep)
        shown = None if given is None else given.masked_fill(~keep, float("nan"))
        got = values_of(model, spoiled, lengths=LENGTHS, integration_timesteps=shown)
        assert_agree(got, want, 1e-11, f"gaps {given is not None}")


@every_layer
def test_masks_on_either_side_are_as_if_padding_were_not_there(layer: str) -> None:
    model = two_stages(layer, "mean")
    keep = torch.ones(4, LENGTH, dtype=torch.bool)
    keep[0, :3], keep[1, 5:], keep[2, 1], keep[3] = False, False, False, False
    u, time = normal(4, LENGTH, 2), gaps(4, LENGTH)
    spoiled = u.masked_fill(~keep.unsqueeze(-1), float("nan"))
    shown = time.masked_fill(~keep, float("nan"))
    got = values_of(model, spoiled, mask=keep, integration_timesteps=shown)
    assert_agree(got, alone(model, u, time, keep), 1e-11)


@every_layer
def test_the_order_of_a_batch_does_not_matter(layer: str) -> None:
    model = two_stages(layer, "max")
    u, time, order = normal(6, LENGTH, 2), gaps(6, LENGTH), torch.tensor([3, 0, 5, 1, 4, 2])
    out = model(u, lengths=LENGTHS, integration_timesteps=time)
    other = model(u[order], lengths=LENGTHS[order], integration_timesteps=time[order])
    assert_agree(other.y, out.y[order], 1e-12)
    assert torch.equal(other.lengths, out.lengths[order])


@every_layer
def test_gradients_stop_at_padding(layer: str) -> None:
    model = two_stages(layer, "time_weighted")
    keep = torch.arange(LENGTH) < LENGTHS[:, None]
    u = normal(6, LENGTH, 2).masked_fill(~keep.unsqueeze(-1), float("nan")).requires_grad_()
    time = gaps(6, LENGTH)
    y = model(u, lengths=LENGTHS, integration_timesteps=time).y
    (y * torch.randn_like(y)).sum().backward()  # a square would be constant behind the norm
    assert u.grad is not None
    assert not u.grad[~keep].any()
    assert bool((u.grad[0].abs() > 1e-9).any())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


BIDIRECTIONAL = [n for n in LAYERS if "bidirectional" in registry.options(MODELS[n], "scan")]


@pytest.mark.parametrize("layer", BIDIRECTIONAL)
def test_bidirectional_layers_reverse_within_their_length(layer: str) -> None:
    model = two_stages(layer, "stride", bidirectional=True)
    keep = torch.arange(LENGTH) < LENGTHS[:, None]
    u, time = normal(6, LENGTH, 2), gaps(6, LENGTH)
    got = values_of(model, u, lengths=LENGTHS, integration_timesteps=time)
    assert_agree(got, alone(model, u, time, keep), 1e-11)


# ---------------------------------------------------------------------------------------- stages


def test_a_network_is_its_stages_one_after_another() -> None:
    """Projection, blocks and pooling by hand, with each layer's own arguments."""
    layers = ["S5", {"layer": "mamba", "d_state": 16, "d_conv": 2}, {"layer": "attn", "n_heads": 2}]
    model = network(
        StageConfig(layers, pooling="mean", stride=2),
        StageConfig({"layer": "s4d", "d_state": 4}, d_model=6, n_layer=2, pooling="max", stride=2),
        StageConfig(d_model=6),
    )
    names = [block.mixer.name for block in model.blocks]  # type: ignore[union-attr]
    assert names == ["s5", "mamba", "attn", "s4d", "s4d", "lru"]
    mixers: list[Any] = [block.mixer for block in model.blocks]
    assert (mixers[0].d_state, mixers[1].d_state, mixers[3].d_state) == (8, 16, 4)
    assert mixers[1].conv1d.weight.shape[-1] == 2
    assert [type(p) for p in model.projections] == [nn.Identity, nn.Linear, nn.Identity]
    assert (model.stride, model.d_encoded) == (4, 6)

    u = normal(2, 8, 2)
    blocks: list[Any] = list(model.blocks)
    x = model.encoder(u)
    for block in blocks[:3]:
        x = block(x)
    x = model.projections[1](x.unflatten(1, (4, 2)).mean(2))
    for block in blocks[3:5]:
        x = block(x)
    x = blocks[5](x.unflatten(1, (2, 2)).amax(2))
    out = model(u)
    assert_agree(out.y, model.norm(x), 1e-13)
    assert out[1:] == (None, None, None, None)


def test_later_stages_get_the_gaps_of_their_groups() -> None:
    model = network(StageConfig(pooling="stride", stride=3), StageConfig(pooling="mean", stride=2))
    u, time = normal(2, 8, 2), gaps(2, 8)
    out = model(u, integration_timesteps=time, lengths=torch.tensor([8, 4]))
    assert out.integration_timesteps is not None
    want = [[time[0, :6].sum(), time[0, 6:].sum()], [time[1, :4].sum(), 0.0]]
    torch.testing.assert_close(out.integration_timesteps, torch.tensor(want, dtype=F64))
    assert out.lengths is not None
    assert out.lengths.tolist() == [2, 1] == model.output_lengths(torch.tensor([8, 4])).tolist()
    assert not torch.allclose(model(u).y, model(u, integration_timesteps=time).y)


@pytest.mark.parametrize("layer", ["lru", "s5", "attn"])
def test_packed_documents_are_what_they_are_alone(layer: str) -> None:
    """Each starts a group; `pool_groups` says what happens to others."""
    model = two_stages(layer, "mean")
    u, time = normal(1, 11, 2), gaps(1, 11)
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, [0, 6]] = True
    out = model(u, reset=reset, integration_timesteps=time)
    first = model(u[:, :6], integration_timesteps=time[:, :6])
    second = model(u[:, 6:], integration_timesteps=time[:, 6:])
    assert_agree(out.y, torch.cat([first.y, second.y], 1), 1e-12)
    assert out.reset.tolist() == [[True, False, True, False]]


def test_dt_scale_reaches_every_stage() -> None:
    model = two_stages("s5", "mean")
    u, time = normal(2, 7, 2), gaps(2, 7)
    twice = model(u, integration_timesteps=2 * time)
    scaled = model(u, integration_timesteps=time, dt_scale=2.0)
    assert_agree(twice.y, scaled.y, 1e-12)
    assert not torch.allclose(model(u).y, model(u, dt_scale=2.0).y)


def test_event_stages_are_event_stages() -> None:
    """The same parameters in `EventStage` give the same, groups that do not fill included."""
    options = {"blocks": 2, "dt_max": 0.2}
    layer = {"layer": "event_ssm", "d_state": 16, **options}
    model = network(
        StageConfig(layer, n_layer=2, pooling="time_weighted", stride=2, event=True),
        StageConfig(layer, d_model=6, n_layer=1, pooling="stride", stride=2, event=True),
        activation="half_glu2", final_norm=False,
    )  # fmt: skip
    around = {"stride": 2, "activation": "half_glu2", **options}
    first = EventStage(4, 16, n_layer=2, pooling="time_weighted", **around).double()
    second = EventStage(6, 16, n_layer=1, **around).double()
    blocks: list[Any] = list(model.blocks)
    first.pooling.load_state_dict(blocks[0].state_dict())
    first.blocks[0].load_state_dict(blocks[1].state_dict())
    second.pooling.load_state_dict(blocks[2].state_dict())

    u, time, lengths = normal(3, 11, 2), gaps(3, 11), torch.tensor([11, 5, 1])
    out = model(u, lengths=lengths, integration_timesteps=time)
    a = first(model.encoder(u), lengths=lengths, integration_timesteps=time)
    b = second(model.projections[1](a.y), lengths=a.lengths, integration_timesteps=a[1])
    assert_agree(out.y, b.y, 1e-13)
    assert torch.equal(out.lengths, b.lengths)
    assert model.output_lengths(lengths).tolist() == b.lengths.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="reset, expected none"):
        model(u, reset=torch.zeros(3, 11, dtype=torch.bool))


# ---------------------------------------------------------------------------------------- tokens


def test_tokens_are_embedded_and_padding_may_hold_anything() -> None:
    model = network(StageConfig(pooling="mean", stride=2), StageConfig(), d_input=1, n_tokens=5)
    ids, lengths = torch.tensor([[0, 4, 2, 1], [3, 3, -1, 99]]), torch.tensor([4, 2])
    out = model(ids, lengths=lengths)
    assert isinstance(model.encoder, nn.Embedding)
    assert out.y.shape == (2, 2, 4)
    assert_agree(model(ids[1, :2]).y, out.y[1, :1], 1e-13)
    by_hand = network(StageConfig(pooling="mean", stride=2), StageConfig(), d_input=5)
    with torch.no_grad():
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder")}
        by_hand.load_state_dict(state, strict=False)
        by_hand.encoder.weight.copy_(model.encoder.weight.T)  # type: ignore[union-attr]
        by_hand.encoder.bias.zero_()  # type: ignore[union-attr]
    one_hot = torch.nn.functional.one_hot(ids[:1], 5).double()
    assert_agree(by_hand(one_hot).y, out.y[:1], 1e-13)


@pytest.mark.parametrize("bad", [5, -1])
def test_tokens_outside_the_vocabulary_are_refused(bad: int) -> None:
    model = network(d_input=1, n_tokens=5)
    ids = torch.tensor([[0, 1, 2], [3, 4, bad]])
    with pytest.raises(ValueError, match=rf"token {bad} at \(1, 2\), expected 0 \.\.\. 4"):
        model(ids)
    assert model(ids, lengths=torch.tensor([3, 2])).y.shape == (2, 3, 4)
    for dtype in (torch.uint8, torch.int8, torch.int32):
        assert torch.equal(model(ids[:1].to(dtype)).y, model(ids[:1]).y)
    with pytest.raises(ValueError, match=r"forward: u is a list, expected a Tensor"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"torch\.float32, expected tokens"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="tokens have no statistics"):
        model.set_statistics(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"u \(2, 3, 1\), expected \(\.\.\., L, 2\)"):
        network()(torch.zeros(2, 3, 1, dtype=F64))


# ---------------------------------------------------------------------------------------- config

STAGES = (
    StageConfig(["S-5", {"layer": "S6", "d_state": 4}], d_model=8, pooling="mean", stride=4),
    StageConfig({"layer": "Attention", "n_heads": 2}, n_layer=3),
    StageConfig(d_state=6),
)


def test_config_goes_through_json() -> None:
    config = EncoderConfig(1, "lru", d_model=4, stages=STAGES, n_tokens=9)
    assert config.stages is not None
    assert config.stages[0].layers == ("s5", {"layer": "mamba", "d_state": 4})
    assert config.stages[1].layers == {"layer": "attn", "n_heads": 2}
    written = json.loads(json.dumps(config.to_dict()))
    assert EncoderConfig.from_dict(written) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        STAGES[0].stride = 2  # type: ignore[misc]


def test_a_plan_fills_in_what_stages_leave_out() -> None:
    plan = EncoderConfig(1, "lru", d_model=4, d_state=5, n_layer=2, stages=STAGES).plan()
    assert [s.d_model for s in plan] == [8, 4, 4]
    assert [[(x["layer"], x.get("d_state")) for x in s.layers] for s in plan] == [
        [("s5", 5), ("mamba", 4)],
        [("attn", None)] * 3,
        [("lru", 6)] * 2,
    ]
    stages = [StageConfig(["s5", "lru"], n_layer=3)]
    repeated = EncoderConfig(1, stages=stages).plan()[0]
    assert [x["layer"] for x in repeated.layers] == ["s5", "lru", "s5"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": []}, r"layers = \[\], expected at least one layer"),
        ({"layers": ["lstm"]}, "unknown mixer 'lstm'; expected one of .*, attn"),
        ({"layers": [{"d_state": 3}]}, "expected a name or a dict with 'layer' in it"),
        ({"layers": [3]}, "a layer 3, expected a name"),
        ({"layers": {"layer": "attn", "d_state": 3}}, "d_state = 3 of 'attn', which has none"),
        ({"layers": ["s5", "lru"], "n_layer": 1}, "2 layers with n_layer = 1"),
        ({"n_layer": 0}, "n_layer = 0, expected an integer >= 1"),
        ({"d_model": 1.5}, "d_model = 1.5, expected an integer >= 1"),
        ({"d_state": "4"}, "d_state = '4', expected an integer >= 1"),
        ({"pooling": "sum"}, "pooling = 'sum', expected one of"),
        ({"stride": 2}, "stride = 2 with pooling = 'none'"),
        ({"pooling": "mean", "stride": 0}, "stride = 0, expected an integer >= 1"),
        ({"pooling": "max", "stride": 2, "event": True}, "pooling = 'max' with event = True"),
        ({"pooling": "mean", "stride": 2, "event": True}, "every layer to be 'event_ssm'"),
        ({"event": "false"}, "event = 'false', expected True or False"),
        ({"width": 3}, "StageConfig: unknown key 'width'"),
    ],
)
def test_bad_stages_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_dict({"d_input": 1, "stages": [values]})


def test_bad_sequences_are_refused() -> None:
    model, u = network(), normal(2, 4, 2)
    with pytest.raises(ValueError, match=r"Encoder\.forward: integration_timesteps \(3,\)"):
        model(u, integration_timesteps=torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match=r"Encoder\.forward: lengths has dtype torch\.float32"):
        model(u, lengths=torch.ones(2))
    with pytest.raises(ValueError, match="lengths: between 4 and 5, expected 0"):
        model(u, lengths=torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="values >= 0"):
        model(u, integration_timesteps=-torch.ones(4, dtype=F64))


def test_bad_networks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"EncoderConfig: stages = \[\], expected at least one"):
        EncoderConfig(1, stages=[])
    with pytest.raises(ValueError, match="d_input = 2 with n_tokens = 5, expected 1"):
        EncoderConfig(2, n_tokens=5)
    with pytest.raises(ValueError, match="n_tokens = 0, expected an integer >= 1"):
        EncoderConfig(1, n_tokens=0)
    with pytest.raises(ValueError, match="EncoderConfig: d_input is missing"):
        EncoderConfig.from_dict({"layer": "s5"})
    with pytest.raises(ValueError, match="Mamba has no option 'blocks'"):
        Encoder(EncoderConfig(1, stages=[StageConfig({"layer": "mamba", "blocks": 2})]))
    for mean, std in (([0.0, math.nan], [1.0, 1.0]), ([0.0, 0.0], [1.0, math.inf])):
        with pytest.raises(ValueError, match="expected finite numbers"):
            network().set_statistics(torch.tensor(mean), torch.tensor(std))


def test_reset_parameters_draws_every_stage_again() -> None:
    model = network(StageConfig(pooling="mean", stride=2), StageConfig(d_model=6))
    model.set_statistics(torch.ones(2), 2 * torch.ones(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_parameters()
    for key in ("encoder.weight", "projections.1.weight", "blocks.1.mixer.nu_log"):
        assert not torch.equal(model.state_dict()[key], before[key])
    assert torch.equal(model.input_std, before["input_std"])


# ------------------------------------------------------------------------------------ transforms


def test_per_sample_gradients() -> None:
    model = network(StageConfig(["s5", "mamba"], pooling="mean", stride=2), StageConfig())
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    u, time, lengths = normal(3, 5, 2), gaps(3, 5), torch.tensor([5, 2, 0])

    def loss(parameters: dict[str, Tensor], u: Tensor, time: Tensor, n: Tensor) -> Tensor:
        sequence = {"integration_timesteps": time, "lengths": n}
        out: Grouped = functional_call(model, parameters, (u,), sequence)
        return pool(out.y, out.valid(), "time_weighted", out.integration_timesteps).square().sum()

    each = vmap(grad(loss), (None, 0, 0, 0))(parameters, u, time, lengths)
    for i in range(3):
        alone = grad(loss)(parameters, u[i], time[i], lengths[i])
        assert_agree({k: v[i] for k, v in each.items()}, alone, 1e-9, f"row {i}")


@pytest.mark.compile
def test_a_network_compiles_in_one_graph() -> None:
    model = network(
        StageConfig("s5", pooling="mean", stride=2), StageConfig(d_model=6), d_input=1, n_tokens=5
    )  # fmt: skip
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = torch.randint(5, (3, 7)), torch.rand(3, 7) < 0.7
    want, got = model(ids, mask=mask), compiled(ids, mask=mask)
    assert_agree(got.y, want.y, 1e-11)
    assert torch.equal(got.lengths, want.lengths)


def test_grouped_lengths_compose() -> None:
    n = torch.arange(40)
    assert torch.equal(grouped_lengths(grouped_lengths(n, 3), 4), grouped_lengths(n, 12))
    assert grouped_lengths(torch.tensor([255], dtype=torch.uint8), 10).tolist() == [26]
    assert isinstance(network().blocks[0], Block)


@pytest.mark.cuda
@every_layer
def test_a_gpu_gives_what_the_cpu_gives(layer: str) -> None:
    model = two_stages(layer, "time_weighted")
    with torch.no_grad():  # a constant B reads nothing of what LayerNorm gives
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    u, time, mask = normal(3, LENGTH, 2), gaps(3, LENGTH), torch.rand(3, LENGTH) < 0.7
    want = model(u, integration_timesteps=time, mask=mask)
    weights = torch.randn_like(want.y)  # a square would be constant behind the norm
    (want.y * weights).sum().backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    got = model(u.cuda(), integration_timesteps=time.cuda(), mask=mask.cuda())
    (got.y * weights.cuda()).sum().backward()
    assert_agree(got.y.cpu(), want.y, 1e-9)
    assert got.lengths.cpu().tolist() == want.lengths.tolist()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_agree(parameter.grad.cpu(), gradients[key], 1e-8, key)
