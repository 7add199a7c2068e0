"""Networks on disk: what is read is what was written, and everything broken is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lrnnx_nn import LAYERS, Classifier, ClassifierConfig, LRNNLMConfig, LRNNLMHeadModel
from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.norms import LayerNorm

V = 11
MIXED: dict[str, Any] = {
    "mixer_types": ["S5", "mamba", "attn"],
    "mixer_kwargs": {"attn": {"n_heads": 2, "window": 3}, "s5": {"dt_max": 0.2}},
    "d_intermediate": 6,
    "max_positions": 9,
}


def make(**options: Any) -> LRNNLMHeadModel:
    torch.manual_seed(0)
    return LRNNLMHeadModel(8, 4, 3, V, **({"mixer_types": ["s5"]} | options)).eval()


def ids() -> Tensor:
    return torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*LAYERS, "attn", "mixed"])
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    model = make(**(MIXED if name == "mixed" else {"mixer_types": [name]}))
    model.train().save_pretrained(tmp_path / "a" / "model")
    random = torch.get_rng_state()
    loaded = LRNNLMHeadModel.from_pretrained(tmp_path / "a" / "model")
    assert torch.equal(torch.get_rng_state(), random)
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(ids()), model.eval()(ids()))
    torch.testing.assert_close(loaded.prefill(ids())[1], model.prefill(ids())[1], rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "a" / "model").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    for tied in (True, False):
        make(tie_embeddings=tied).save_pretrained(tmp_path)
        with safe_open(tmp_path / checkpoint.WEIGHTS, framework="pt") as file:
            keys = set(file.keys())
        assert "embedding.weight" in keys
        assert ("head.weight" in keys) is not tied


def test_a_loaded_model_owns_its_weights(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    before = (tmp_path / checkpoint.WEIGHTS).read_bytes()
    loaded = LRNNLMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (tmp_path / checkpoint.WEIGHTS).read_bytes() == before
    kept = {key: value.clone() for key, value in loaded.state_dict().items()}
    with (tmp_path / checkpoint.WEIGHTS).open("r+b") as file:  # somebody writes over the file
        file.write(bytes(len(before)))
    assert all(torch.equal(value, kept[key]) for key, value in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path)  # over the file it came from
    again = LRNNLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids()), loaded(ids()))


def test_dtype_and_device_on_load(tmp_path: Path) -> None:
    model = make(**MIXED)
    model.save_pretrained(tmp_path / "wide")
    low = LRNNLMHeadModel.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    assert low.embedding.weight.dtype == torch.bfloat16
    kept = {k: v.dtype for k, v in low.named_parameters() if v.dtype == torch.float32}
    assert {"layers.blocks.0.mixer.Lambda_re", "layers.blocks.1.mixer.A_log"} <= set(kept)
    assert "layers.blocks.1.mixer.in_proj.weight" not in kept
    double = LRNNLMHeadModel.from_pretrained(tmp_path / "wide", dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    torch.testing.assert_close(double(ids()).float(), model(ids()))
    low.save_pretrained(tmp_path / "low")  # and as it is in the file
    same = LRNNLMHeadModel.from_pretrained(tmp_path / "low")
    assert {k: v.dtype for k, v in same.named_parameters()} == {
        k: v.dtype for k, v in low.named_parameters()
    }
    assert torch.equal(same(ids()), low(ids()))
    gone = LRNNLMHeadModel.from_pretrained(tmp_path / "wide", device="meta")
    assert {p.device.type for p in gone.parameters()} == {"meta"}


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert LRNNLMHeadModel.from_pretrained(tmp_path, vocab_size=V).config.vocab_size == V
    with pytest.raises(ValueError, match=r"model\.json: a model of vocab_size = 11, and .* of 12"):
        LRNNLMHeadModel.from_pretrained(tmp_path, vocab_size=12)
    edit(tmp_path, vocab_size=12)
    with pytest.raises(ValueError, match=r"embedding\.weight is \(11, 8\), expected \(12, 8\)"):
        LRNNLMHeadModel.from_pretrained(tmp_path)


def edit(folder: Path, **values: Any) -> None:
    path = folder / checkpoint.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "lm")
    Classifier(ClassifierConfig(3, 2, "lru", d_model=4, d_state=4)).save(tmp_path / "classifier")
    assert checkpoint.load_architecture(tmp_path / "lm") == "language_model"
    assert checkpoint.load_architecture(tmp_path / "classifier") == "classifier"
    with pytest.raises(ValueError, match="of kind 'classifier', expected 'language_model'"):
        LRNNLMHeadModel.from_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="of kind 'language_model', expected 'classifier'"):
        Classifier.load(tmp_path / "lm")


def test_folders_of_before_there_were_architectures_load(tmp_path: Path) -> None:
    model = Classifier(ClassifierConfig(3, 2, "lru", d_model=4, d_state=4)).eval()
    model.save(tmp_path)
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(model.config.to_dict()))
    from safetensors.torch import save_file

    save_file(dict(model.state_dict()), tmp_path / checkpoint.WEIGHTS)
    u = torch.randn(1, 4, 3)
    assert torch.equal(Classifier.load(tmp_path)(u), model(u))
    assert checkpoint.load_architecture(tmp_path) == "classifier"
    with pytest.raises(ValueError, match="of kind 'classifier', expected 'language_model'"):
        LRNNLMHeadModel.from_pretrained(tmp_path)


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "one")
    make(mixer_types=["s5"], norm_eps=1e-3).save_pretrained(tmp_path / "two")  # the same shapes
    weights = (tmp_path / "two" / checkpoint.WEIGHTS).read_bytes()
    (tmp_path / "one" / checkpoint.WEIGHTS).write_bytes(weights)
    with pytest.raises(
        ValueError, match=r"weights of another config, saved with norm_eps = 0\.001; .* says None"
    ):
        LRNNLMHeadModel.from_pretrained(tmp_path / "one")
    make(mixer_types=["lru"]).save_pretrained(tmp_path / "three")
    (tmp_path / "one" / checkpoint.WEIGHTS).write_bytes(
        (tmp_path / "three" / checkpoint.WEIGHTS).read_bytes()
    )
    with pytest.raises(ValueError, match=r"mixer\.B_im is \(4, 8\), expected \(2, 8\)"):
        LRNNLMHeadModel.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights_are_refused(tmp_path: Path, kept: int) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt checkpoint"):
        LRNNLMHeadModel.from_pretrained(tmp_path)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a saved network, it has no model\.json"):
        LRNNLMHeadModel.from_pretrained(tmp_path / "nowhere")
    make().save_pretrained(tmp_path)
    edit(tmp_path, d_modle=3)
    with pytest.raises(ValueError, match=r"model\.json: LRNNLMConfig: unknown key 'd_modle'"):
        LRNNLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / checkpoint.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"model\.json: not a readable JSON file"):
        LRNNLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"it has no model\.safetensors"):
        LRNNLMHeadModel.from_pretrained(tmp_path)


def scheme(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.exp(dt_decay * A), dt_input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": LayerNorm}, "norm is a callable.*cannot be saved"),
        ({"mlp": lambda h, e: nn.Linear(h, h), "d_intermediate": 3}, "mlp is a callable"),
        ({"block": lambda h, m: m}, "block is a callable"),
        ({"mixer_kwargs": {"s5": {"discretization": scheme}}}, "mixer_kwargs = .* as JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make(**options)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_save_leaves_no_mixture(
    name: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make(), make(norm_eps=1e-3)
    old.save_pretrained(tmp_path)
    real, calls = getattr(os, name), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise OSError("disk full")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        with pytest.raises(OSError, match="disk full"):
            new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    if name == "replace" and after == 1:  # new weights, old config: told apart
        with pytest.raises(ValueError, match="weights of another config"):
            LRNNLMHeadModel.from_pretrained(tmp_path)
        new.save_pretrained(tmp_path)
        assert LRNNLMHeadModel.from_pretrained(tmp_path).config == new.config
    else:
        assert torch.equal(LRNNLMHeadModel.from_pretrained(tmp_path)(ids()), old(ids()))


def test_the_generic_pair_serves_any_network(tmp_path: Path) -> None:
    built: list[Any] = []

    def build(values: dict[str, Any]) -> nn.Linear:
        built.append(values)
        return nn.Linear(values["width"], 2)

    checkpoint.save(tmp_path, "thing", {"width": 3}, nn.Linear(3, 2))
    loaded = checkpoint.load(tmp_path, "thing", build, dtype=torch.float64)
    assert built == [{"width": 3}]
    assert loaded.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="of kind 'thing', expected 'other'"):
        checkpoint.load(tmp_path, "other", build)
    with pytest.raises(ValueError, match="a key 'architecture' of its own"):
        checkpoint.save(tmp_path, "thing", {"architecture": 3}, nn.Linear(3, 2))


def test_values_that_json_changes_come_back(tmp_path: Path) -> None:
    config = LRNNLMConfig(
        8, 4, 1, V, ["mamba2"], {"Mamba-2": {"dt_limit": [0.0, float("inf")], "head_dim": 4}}
    )
    model = LRNNLMHeadModel.from_config(config)
    model.save_pretrained(tmp_path)
    assert LRNNLMHeadModel.from_pretrained(tmp_path).config == config
