"""The classifier: config, pooling over valid samples, and checkpoints that are whole or refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from lrnnx_nn import Classifier, ClassifierConfig, StageConfig
from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.architectures.classifier import POOLINGS
from lrnnx_nn.files import write_atomically

CONFIG = ClassifierConfig(3, 4, "lru", d_model=6, d_state=4, layer_options={"r_max": 0.9})


def test_config_goes_through_json() -> None:
    assert ClassifierConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    assert ClassifierConfig(3, 4, "S-5").layer == "s5"
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model = 0, expected an integer >= 1"),
        ({"n_layer": 1.5}, "n_layer = 1.5, expected an integer >= 1"),
        ({"n_classes": True}, "n_classes = True"),
        ({"norm": "instance"}, "norm = 'instance', expected one of"),
        ({"activation": "relu"}, "activation = 'relu', expected one of"),
        ({"pooling": "sum"}, "pooling = 'sum', expected one of"),
        ({"dropout": 1.0}, "dropout = 1.0, expected 0 <= dropout < 1"),
        ({"layer": "lstm"}, "unknown mixer 'lstm'; expected one of"),
        ({"width": 3}, "unknown key 'width'"),
        ({"dropout": "much"}, "dropout = 'much', expected 0 <= dropout < 1"),
        ({"prenorm": "false"}, "prenorm = 'false', expected True or False"),
        ({"final_norm": 1}, "final_norm = 1, expected True or False"),
        ({"tie_dropout": "no"}, "tie_dropout = 'no', expected True or False"),
        ({"layer_options": {"layer": "lru"}}, "'layer' = 'lru' beside layer = 's5'"),
    ],
)
def test_config_refuses(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig.from_dict({"d_input": 1, "n_classes": 2} | values)


def test_config_needs_its_sizes() -> None:
    with pytest.raises(ValueError, match="n_classes is missing"):
        ClassifierConfig.from_dict({"d_input": 1})
    with pytest.raises(ValueError, match="LRU has no option 'blocks'"):
        Classifier(ClassifierConfig(1, 2, "lru", layer_options={"blocks": 2}))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_no_logit(pooling: str, norm: str, bidirectional: bool) -> None:
    config = dataclasses.replace(
        CONFIG, pooling=pooling, norm=norm, layer_options={"bidirectional": bidirectional}
    )
    model = Classifier(config).eval()
    u, lengths = torch.randn(3, 7, 3), torch.tensor([7, 1, 4])
    logits = model(u, lengths=lengths)
    alone = [model(row[None, :n])[0] for row, n in zip(u, lengths.tolist(), strict=True)]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-5)
    mask = torch.arange(7) < lengths[:, None]
    torch.testing.assert_close(model(u, mask=mask), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("timed", [False, True])
def test_padding_changes_no_logit_of_stages(pooling: str, timed: bool) -> None:
    """The other layers and poolings: tests/test_encoder.py."""
    stages = [
        StageConfig(["s5", "mamba"], pooling="mean", stride=2),
        StageConfig({"layer": "attn", "n_heads": 2}, d_model=8, pooling="max", stride=2),
        StageConfig(),
    ]
    model = Classifier(dataclasses.replace(CONFIG, pooling=pooling, stages=stages)).double().eval()
    u, gaps = torch.randn(8, 7, 3, dtype=torch.float64), torch.rand(8, 7, dtype=torch.float64)
    lengths = torch.arange(8)
    given = {"integration_timesteps": gaps} if timed else {}
    logits = model(u, lengths=lengths, **given)
    for i in range(8):
        alone = model(u[i, :i], **{k: v[i, :i] for k, v in given.items()})
        torch.testing.assert_close(logits[i], alone, rtol=1e-11, atol=1e-11)


def test_the_head_reads_the_last_stage() -> None:
    stages = [StageConfig(pooling="mean", stride=2), StageConfig()]
    config = dataclasses.replace(CONFIG, stages=stages, pooling="time_weighted")
    model = Classifier(config).double().eval()
    u, gaps = torch.randn(2, 5, 3, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    x = model.encode(u, integration_timesteps=gaps).y
    weight = torch.stack([gaps[:, :2].sum(1), gaps[:, 2:4].sum(1), gaps[:, 4]], 1)
    value = (weight.unsqueeze(-1) * x).sum(1) / weight.sum(1, keepdim=True)
    logits = model(u, integration_timesteps=gaps)
    torch.testing.assert_close(logits, model.decoder(value))
    assert not torch.allclose(logits, model.decoder(x.mean(1)))


def test_tokens_are_classified() -> None:
    config = ClassifierConfig(1, 4, "s5", d_model=6, d_state=4, n_tokens=9)
    model = Classifier(config).eval()
    ids, lengths = torch.randint(9, (3, 5)), torch.tensor([5, 2, 3])
    logits = model(ids, lengths=lengths)
    assert logits.shape == (3, 4)
    torch.testing.assert_close(logits[1], model(ids[1, :2]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Classifier\.forward: token 9 at \(0, 0\)"):
        model(ids.index_fill(1, torch.tensor(0), 9))


def test_statistics_standardise_the_input() -> None:
    model = Classifier(CONFIG).eval()
    u = torch.randn(2, 5, 3)
    expected = model(u)
    mean, std = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 0.5])
    model.set_statistics(mean, std)
    torch.testing.assert_close(model(u * std + mean), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"mean \(2,\), expected \(3,\)"):
        model.set_statistics(mean[:2], std)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"std = \[.*\], expected numbers above 0"):
            model.set_statistics(0 * mean, torch.tensor([1.0, bad, 1.0]))
    assert torch.equal(model.input_mean, mean)
    with pytest.raises(ValueError, match=r"u \(2, 5, 4\), expected \(\.\.\., L, 3\)"):
        model(torch.randn(2, 5, 4))


def test_reset_parameters_keeps_the_statistics() -> None:
    model = Classifier(CONFIG)
    model.set_statistics(torch.ones(3), torch.ones(3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_parameters()
    after = model.state_dict()
    assert torch.equal(after["input_mean"], before["input_mean"])
    for key in ("encoder.weight", "decoder.weight", "blocks.1.mixer.nu_log"):
        assert not torch.equal(after[key], before[key])


def test_save_and_load(tmp_path: Path) -> None:
    model = Classifier(CONFIG).eval()
    model.set_statistics(torch.randn(3), torch.ones(3))
    model.save(tmp_path / "net")
    loaded = Classifier.load(tmp_path / "net")
    u = torch.randn(2, 5, 3)
    assert loaded.config == CONFIG
    assert torch.equal(loaded(u), model(u))
    assert not loaded.training
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def test_a_hierarchical_network_is_saved_whole(tmp_path: Path) -> None:
    stages = [StageConfig(["lru", {"layer": "s5", "d_state": 8}], pooling="mean", stride=2)]
    config = dataclasses.replace(
        CONFIG, d_input=1, stages=[*stages, StageConfig(d_model=8)], n_tokens=7
    )
    model = Classifier(config).eval()
    model.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    ids = torch.randint(7, (2, 5))
    assert loaded.config == config
    assert torch.equal(loaded(ids), model(ids))


def test_a_file_of_before_there_were_stages_loads(tmp_path: Path) -> None:
    """Its config has neither stages nor tokens nor an architecture, and its weights say nothing."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = Classifier(CONFIG).eval()
    state = model.state_dict()
    assert sorted(k for k in state if not k.startswith("blocks.")) == [
        "decoder.bias", "decoder.weight", "encoder.bias", "encoder.weight", "input_mean",
        "input_std", "norm.bias", "norm.weight",
    ]  # fmt: skip
    assert {k.split(".", 3)[0] + "." + k.split(".")[2] for k in state if k[0] == "b"} == {
        "blocks.norm", "blocks.mixer", "blocks.activation",
    }  # fmt: skip
    before = {
        "d_input": 3, "n_classes": 4, "layer": "lru", "d_model": 6, "d_state": 4, "n_layer": 2,
        "layer_options": {"r_max": 0.9}, "norm": "layer", "activation": "half_glu1",
        "dropout": 0.1, "tie_dropout": True, "prenorm": True, "pooling": "mean",
        "final_norm": True,
    }  # fmt: skip
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(before))
    save_file(state, tmp_path / checkpoint.WEIGHTS)
    loaded = Classifier.load(tmp_path)
    u = torch.randn(2, 5, 3)
    assert loaded.config == CONFIG
    assert torch.equal(loaded(u), model(u))


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: int) -> None:
    Classifier(CONFIG).save(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt checkpoint"):
        Classifier.load(tmp_path)


def test_other_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a saved network, it has no model\.json"):
        Classifier.load(tmp_path)
    Classifier(CONFIG).save(tmp_path)
    Classifier(dataclasses.replace(CONFIG, d_model=8)).save(tmp_path / "other")
    weights = (tmp_path / "other" / checkpoint.WEIGHTS).read_bytes()
    (tmp_path / checkpoint.WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=r"blocks\.0\..* is \(8,\), expected \(6,\)"):
        Classifier.load(tmp_path)
    (tmp_path / checkpoint.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"model\.json: not a readable JSON file"):
        Classifier.load(tmp_path)
    (tmp_path / checkpoint.CONFIG).write_text("[]")
    with pytest.raises(ValueError, match=r"model\.json: a JSON list, expected an object"):
        Classifier.load(tmp_path)
    (tmp_path / checkpoint.CONFIG).write_text('{"d_input": 3, "n_classes": 2, "norm": "x"}')
    with pytest.raises(ValueError, match=r"model\.json: ClassifierConfig: norm = 'x'"):
        Classifier.load(tmp_path)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fails(*args: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="disk full"):
                write_atomically(path, "new and longer")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_gradients_reach_every_parameter() -> None:
    model = Classifier(dataclasses.replace(CONFIG, layer="s5", layer_options={}))
    model(torch.randn(4, 6, 3), lengths=torch.tensor([6, 5, 2, 1])).square().sum().backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert missing == []
