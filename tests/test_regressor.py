"""The regressor: values and sequences in the targets' unit, streamed in any split, saved whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import assert_agree, gaps, normal
from torch import Tensor

from lrnnx_nn import LAYERS, Classifier, Mixer, Regressor, RegressorConfig, StageConfig
from lrnnx_nn.generation import rollout
from lrnnx_nn.pooling import VALUE_POOLINGS, pool, pool_groups

F64 = torch.float64
every_layer = pytest.mark.parametrize("layer", [*LAYERS, "attn"])


def regressor(output: str = "sequence", *stages: StageConfig, **options: Any) -> Regressor:
    """Return a small network in float64 with statistics that are not zero and one."""
    values = {"layer": "lru", "d_model": 4, "d_state": 8, "n_layer": 1, "d_input": 2} | options
    config = RegressorConfig(d_target=3, output=output, stages=stages or None, **values)
    model = Regressor(config).double().eval()
    inputs = () if config.n_tokens else (torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]))
    model.set_statistics(
        *inputs, target_mean=torch.tensor([10.0, 0.0, -1.0]),
        target_std=torch.tensor([2.0, 1.0, 0.1]),
    )  # fmt: skip
    return model


def options_of(layer: str) -> dict[str, Any]:
    return {"layer": layer, "layer_options": {"n_heads": 2} if layer == "attn" else {}}


def two_widths(layer: str) -> Regressor:
    return regressor(
        "sequence", StageConfig(), StageConfig(d_model=8, n_layer=2), **options_of(layer)
    )


# ------------------------------------------------------------------------------------- streaming


@every_layer
def test_any_split_is_the_whole(layer: str) -> None:
    model = two_widths(layer)
    u, time = normal(2, 6, 2), gaps(2, 6)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 4] = True
    want = model(u, integration_timesteps=time, reset=reset)
    assert want.shape == (2, 6, 3)
    for k in (0, 1, 4, 6):
        parts, state = [], None
        for part in (slice(0, k), slice(k, 6)):
            y, state = model.prefill(
                u[:, part], state, integration_timesteps=time[:, part], reset=reset[:, part]
            )
            parts.append(y)
        assert_agree(torch.cat(parts, 1), want, 1e-11, f"k = {k}")
    state, ys = model.init_state((2,)), []
    plain = model(u, integration_timesteps=time)
    for t in range(6):
        y, state = model.step(u[:, t], state, integration_timestep=time[:, t])
        ys.append(y)
    assert_agree(torch.stack(ys, 1), plain, 1e-11, "steps")


@every_layer
def test_a_state_knows_nothing_of_padding(layer: str) -> None:
    model = two_widths(layer)
    u, lengths = normal(3, 5, 2), torch.tensor([5, 2, 0])
    keep = torch.arange(5) < lengths[:, None]
    spoiled = u.masked_fill(~keep.unsqueeze(-1), float("nan"))
    y, state = model.prefill(spoiled, lengths=lengths)
    assert_agree(y, model(spoiled, lengths=lengths), 1e-11)
    assert not y[~keep].any()
    following, _ = model.step(u[:, 0], state)
    for i, n in enumerate(lengths.tolist()):
        whole = model(torch.cat([u[i, :n], u[i, :1]]))
        assert_agree(y[i, :n], whole[:n], 1e-11)
        assert_agree(following[i], whole[n], 1e-11)


def test_it_is_a_mixer_that_forecasts() -> None:
    """Predictions fed back one at a time are what one long forward pass of them gives."""
    config = RegressorConfig(2, 2, "s5", d_model=4, d_state=8, output="sequence")
    model = Regressor(config).double().eval()
    assert isinstance(model, Mixer)
    assert (model.d_model, model.d_output) == (2, 2)
    prompt, time = normal(2, 5, 2), gaps(2, 8)
    forecast, _ = rollout(model, prompt, 4, integration_timesteps=time)
    series = torch.cat([prompt, forecast[:, :-1]], 1)
    assert_agree(model(series, integration_timesteps=time)[:, 4:], forecast, 1e-11)


def test_tokens_stream_too() -> None:
    model = regressor(d_input=1, n_tokens=5, n_layer=2)
    ids = torch.randint(5, (2, 4))
    want = model(ids)
    y, state = model.prefill(ids[:, :2])
    last, state = model.step(ids[:, 2], state)
    assert_agree(y, want[:, :2], 1e-12)
    assert_agree(last, want[:, 2], 1e-12)
    alone, _ = model.step(ids[0, 0], model.init_state())  # without a batch
    assert_agree(alone, want[0, 0], 1e-12)


def test_what_cannot_stream_says_so() -> None:
    u, message = normal(1, 4, 2), "Regressor.prefill: output = 'value', expected 'sequence'"
    with pytest.raises(ValueError, match=message):
        regressor("value").prefill(u)
    pooling = regressor("sequence", StageConfig(pooling="mean", stride=2), StageConfig())
    message = "a prediction for every 2 samples, expected stages without pooling"
    with pytest.raises(ValueError, match=message):
        pooling.prefill(u)
    with pytest.raises(ValueError, match=message):
        pooling.step(u[:, 0], ())
    with pytest.raises(ValueError, match=message):
        pooling.init_state()
    backwards = regressor(layer_options={"bidirectional": True})
    with pytest.raises(ValueError, match="a bidirectional layer cannot stream"):
        backwards.prefill(u)
    model = regressor(n_layer=2)
    with pytest.raises(ValueError, match="a state of 1 blocks, expected 2"):
        model.step(u[:, 0], model.init_state((1,))[:1])
    with pytest.raises(ValueError, match=r"u_t \(\), expected"):
        model.step(torch.tensor(1.0), model.init_state())
    with pytest.raises(ValueError, match=r"u \(1, 4, 3\), expected \(\.\.\., L, 2\)"):
        model.prefill(normal(1, 4, 3))


# ----------------------------------------------------------------------------- values and groups


@pytest.mark.parametrize("pooling", VALUE_POOLINGS)
def test_a_value_is_the_pooled_sequence(pooling: str) -> None:
    stages = StageConfig(pooling="mean", stride=2), StageConfig(d_model=6)
    model = regressor("value", *stages, pooling=pooling)
    u, time, lengths = normal(3, 7, 2), gaps(3, 7), torch.tensor([7, 3, 0])
    out = model.encode(u, integration_timesteps=time, lengths=lengths)
    value = pool(out.y, out.valid(), pooling, out.integration_timesteps)
    want = model.decoder(value) * model.target_std + model.target_mean
    got = model(u, integration_timesteps=time, lengths=lengths)
    assert got.shape == (3, 3)
    assert_agree(got, want, 1e-13)
    alone = model(u[1, :3], integration_timesteps=time[1, :3])
    assert_agree(got[1], alone, 1e-11)
    with pytest.raises(ValueError, match="reset with output = 'value', expected none"):
        model(u, reset=torch.zeros(3, 7, dtype=torch.bool))


def test_a_sequence_of_groups_has_a_prediction_each() -> None:
    stages = StageConfig(pooling="mean", stride=2), StageConfig(pooling="max", stride=2)
    model = regressor("sequence", *stages)
    u, lengths = normal(3, 9, 2), torch.tensor([9, 5, 0])
    y = model(u, lengths=lengths)
    target = pool_groups(normal(3, 9, 3), model.stride, "stride", lengths=lengths)
    assert y.shape == target.y.shape == (3, 3, 3)
    assert target.lengths is not None
    assert model.output_lengths(lengths).tolist() == target.lengths.tolist() == [3, 2, 0]
    assert not y[1, 2:].any()
    assert_agree(y[1, :2], model(u[1, :5]), 1e-11)


def test_statistics_are_units() -> None:
    model = regressor("sequence")
    plain = Regressor(model.config).double().eval()
    plain.load_state_dict(dict(model.named_parameters()), strict=False)
    u = normal(2, 5, 2)
    standard = plain((u - model.input_mean) / model.input_std)
    got = model(u)
    assert_agree(got, standard * model.target_std + model.target_mean, 1e-12)
    assert_agree(model.standardize(got), standard, 1e-12)
    model.set_statistics(target_mean=torch.zeros(3))
    assert model.input_std.tolist() == [3.0, 0.5]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"target_std \(2,\), expected \(3,\)"):
        model.set_statistics(mean=torch.ones(2), target_std=torch.ones(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="tokens have no statistics"):
        regressor(d_input=1, n_tokens=3).set_statistics(torch.zeros(1))


def test_it_learns_a_running_mean() -> None:
    torch.manual_seed(0)
    config = RegressorConfig(1, 1, "lru", d_model=8, d_state=8, n_layer=1, output="sequence")
    model = Regressor(dataclasses.replace(config, dropout=0.0))
    u = 5 + 3 * torch.randn(16, 20, 1)
    target = 100 * u.cumsum(1) / torch.arange(1, 21)[:, None]
    model.set_statistics(u.mean((0, 1)), u.std((0, 1)), target.mean((0, 1)), target.std((0, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (model.standardize(model(u)) - model.standardize(target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < 0.5 < losses[0]


# --------------------------------------------------------------------------------------- on disk


def test_config_goes_through_json() -> None:
    stages = [StageConfig(["s5", "attn"], pooling="mean", stride=2)]
    config = RegressorConfig(2, 3, "lru", output="value", pooling="last", stages=stages)
    assert RegressorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": "both"}, "output = 'both', expected one of"),
        ({"pooling": "sum"}, "pooling = 'sum', expected one of"),
        ({"output": "sequence", "pooling": "mean"}, "pooling = 'mean' with output = 'sequence'"),
        ({"d_target": 0}, "d_target = 0, expected an integer >= 1"),
        ({"width": 1}, "RegressorConfig: unknown key 'width'"),
    ],
)
def test_bad_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegressorConfig.from_dict({"d_input": 1, "d_target": 2} | values)


def test_save_and_load(tmp_path: Path) -> None:
    model = regressor("sequence", StageConfig(["lru", "s5"]), StageConfig(d_model=6)).float()
    model.save(tmp_path)
    loaded = Regressor.load(tmp_path)
    u: Tensor = normal(2, 5, 2, dtype=torch.float32)
    assert loaded.config == model.config
    assert torch.equal(loaded(u), model(u))
    assert Regressor.load(tmp_path, dtype=F64).target_std.dtype == F64
    with pytest.raises(ValueError, match="a network of kind 'regressor', expected 'classifier'"):
        Classifier.load(tmp_path)


def test_a_new_draw_keeps_the_units() -> None:
    model = regressor()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_parameters()
    after = model.state_dict()
    assert torch.equal(after["target_mean"], before["target_mean"])
    assert not torch.equal(after["decoder.weight"], before["decoder.weight"])
