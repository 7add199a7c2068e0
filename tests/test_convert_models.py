"""convert.language_model: tiny random models of `transformers`, and files as they are published.

Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_nn import LRNNLMHeadModel
from lrnnx_nn.convert import language_model

H, N, V, L = 16, 5, 23, 11
SIZES = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2}
SECOND = {"state_size": N, "num_heads": 4, "head_dim": 8, "n_groups": 2, "expand": 2}
GEMMA: dict[str, Any] = {  # the root of 48 is one that bfloat16 rounds
    "vocab_size": V, "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 40,
    "num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 24,
    "attention_window_size": 4,
}  # fmt: skip

Make = Callable[[Any], nn.Module]


@pytest.fixture(scope="module")
def transformers() -> Any:
    package = pytest.importorskip("transformers")
    package.logging.set_verbosity_error()  # it says at length that it has no compiled kernels
    package.logging.disable_progress_bar()
    return package


def mamba(**options: Any) -> Make:
    return lambda t: t.MambaForCausalLM(
        t.MambaConfig(**SIZES, state_size=N, time_step_rank=3, **options)
    )


def falcon(t: Any) -> nn.Module:
    return t.FalconMambaForCausalLM(t.FalconMambaConfig(**SIZES, state_size=N, time_step_rank=3))


def mamba2(**options: Any) -> Make:
    return lambda t: t.Mamba2ForCausalLM(t.Mamba2Config(**SIZES, **{**SECOND, **options}))


def gemma(**options: Any) -> Make:
    def make(t: Any) -> nn.Module:
        return t.RecurrentGemmaForCausalLM(t.RecurrentGemmaConfig(**{**GEMMA, **options}))

    return make


MAKERS: dict[str, Make] = {
    "mamba": mamba(),
    "mamba biased, untied": mamba(use_bias=True, tie_word_embeddings=False, conv_kernel=3),
    "falcon mamba": falcon,
    "mamba2": mamba2(),
    "mamba2 limited, tied": mamba2(
        time_step_limit=(0.01, 0.5), tie_word_embeddings=True, use_bias=True, n_groups=1
    ),
    "recurrent gemma": gemma(),
    "recurrent gemma, attention first": gemma(
        block_types=["attention", "recurrent"], num_key_value_heads=2, attention_bias=True,
        logits_soft_cap=2.0, rope_theta=50.0, partial_rotary_factor=1.0, lru_width=None,
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MAKERS)


def scattered(package: Any, name: str) -> Any:
    """Make a model and move every weight, so that none is a constant and logits differ."""
    model = MAKERS[name](package)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    scale = float(want.detach().abs().max().clamp(min=1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * scale)


# --------------------------------------------------------------------------------------- agreement


@every_model
def test_logits_are_those_of_transformers(transformers: Any, name: str) -> None:
    theirs = scattered(transformers, name)
    ours = language_model(theirs.state_dict(), theirs.config)
    assert isinstance(ours, LRNNLMHeadModel)
    assert not ours.training
    tokens = ids(2, L)
    with torch.no_grad():
        want = theirs(tokens, use_cache=False).logits
        assert float(want.std()) > 0.05  # not all alike
        close(ours(tokens), want)
        close(ours(tokens, last_only=True), want[:, -1])


@every_model
def test_prefill_and_steps_are_those_of_transformers(transformers: Any, name: str) -> None:
    theirs = scattered(transformers, name)
    ours = language_model(theirs.state_dict(), theirs.config)
    tokens, k = ids(2, L), 6
    with torch.no_grad():
        want = theirs(tokens, use_cache=False).logits
        logits, state = ours.prefill(tokens[:, :k])
        close(logits, want[:, :k])
        for t in range(k, L):
            logits, state = ours.step(tokens[:, t], state)
            close(logits, want[:, t])


def test_generation_by_transformers_own_cache(transformers: Any) -> None:
    """Their greedy tokens, which come out of their cache, are ours."""
    for name in ("mamba", "mamba2", "recurrent gemma"):
        theirs = scattered(transformers, name)
        ours = language_model(theirs.state_dict(), theirs.config)
        prompt = ids(1, 5)
        with torch.no_grad():
            want = theirs.generate(
                prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            logits, state = ours.prefill(prompt, last_only=True)
            tokens = [prompt]
            for _ in range(8):
                tokens.append(logits.argmax(-1, keepdim=True))
                logits, state = ours.step(tokens[-1][:, 0], state)
        assert torch.equal(torch.cat(tokens, 1), want), name


# ------------------------------------------------------------------------------------------- files


@every_model
def test_folders_of_transformers(transformers: Any, name: str, tmp_path: Path) -> None:
    theirs = scattered(transformers, name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = language_model(tmp_path / "theirs")
    tokens = ids(2, L)
    with torch.no_grad():
        want = ours(tokens)
        close(want, theirs(tokens, use_cache=False).logits)
        ours.save_pretrained(tmp_path / "ours")
        assert torch.equal(LRNNLMHeadModel.from_pretrained(tmp_path / "ours")(tokens), want)


def test_shards_and_pickled_weights(transformers: Any, tmp_path: Path) -> None:
    theirs = scattered(transformers, "mamba2")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    want = language_model(theirs.state_dict(), theirs.config).state_dict()
    got = language_model(tmp_path / "shards").state_dict()
    assert all(torch.equal(got[k], v) for k, v in want.items())
    theirs.config.save_pretrained(tmp_path / "pickled")
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    got = language_model(tmp_path / "pickled").state_dict()
    assert all(torch.equal(got[k], v) for k, v in want.items())
    first = sorted((tmp_path / "shards").glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match="is not a file of that folder"):
        language_model(tmp_path / "shards")


def original(second: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return state-spaces' config of a tiny model, and that of transformers for the same one."""
    cfg: dict[str, Any] = {
        "d_model": H, "n_layer": 2, "vocab_size": V - 3, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
        "ssm_cfg": {"d_state": N},
    }  # fmt: skip
    theirs: dict[str, Any] = {**SIZES, "vocab_size": 24, "state_size": N}
    if second:
        more = {"layer": "Mamba2", "headdim": 8, "ngroups": 2, "chunk_size": 4, "d_state": N}
        cfg |= {"ssm_cfg": more, "attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0}
        theirs |= {**SECOND, "tie_word_embeddings": True}
    return cfg, theirs


@pytest.mark.parametrize("second", [False, True])
def test_original_names_and_configs(transformers: Any, second: bool, tmp_path: Path) -> None:
    """The files of state-spaces: `embedding`, their own config, and a vocabulary that is padded."""
    cfg, options = original(second)
    t = transformers
    theirs = t.Mamba2ForCausalLM(t.Mamba2Config(**options)) if second else t.MambaForCausalLM(
        t.MambaConfig(**options)
    )  # fmt: skip
    weights = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    assert "lm_head.weight" in weights  # these files hold it although it is tied
    ours = language_model(weights, cfg)
    tokens = torch.remainder(ids(2, L), V - 3)
    with torch.no_grad():
        want = theirs(tokens, use_cache=False).logits[..., : V - 3]
        close(ours(tokens), want)
        (tmp_path / "config.json").write_text(json.dumps(cfg))
        torch.save(weights, tmp_path / "pytorch_model.bin")
        close(language_model(tmp_path)(tokens), want)


def test_half_precision_keeps_what_it_must(transformers: Any, tmp_path: Path) -> None:
    for name, wide in (
        ("mamba", {"A_log", "D", "dt_proj.bias"}),
        ("mamba2", {"A_log", "D", "dt_bias"}),
        ("recurrent gemma", {"rg_lru.recurrent_param"}),
    ):
        theirs = scattered(transformers, name).bfloat16()
        theirs.save_pretrained(tmp_path / name)
        from_file = language_model(tmp_path / name)
        cast = language_model(scattered(transformers, name).state_dict(), theirs.config,
                              dtype=torch.bfloat16)  # fmt: skip
        for model in (from_file, cast):
            for key, value in model.state_dict().items():
                kept = any(key.endswith(".mixer." + k) for k in wide)
                folded = name == "recurrent gemma" and "norm" in key and model is from_file
                expected = torch.float32 if kept or folded else torch.bfloat16
                assert value.dtype == expected, key
        tokens = ids(2, L)
        with torch.no_grad():
            want = language_model(theirs.float().state_dict(), theirs.config)(tokens)
            got = from_file(tokens).float()
        assert float((got - want).abs().max()) < 0.1 * float(want.abs().max())


def test_the_state_dict_stays_its_owners(transformers: Any) -> None:
    theirs = scattered(transformers, "mamba")
    ours = language_model(theirs.state_dict(), theirs.config)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert all(bool(p.any()) for p in theirs.parameters())
    assert all(p.requires_grad for p in ours.parameters())


# ----------------------------------------------------------------------------------------- refusal


@pytest.fixture(scope="module")
def plain(transformers: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    theirs = scattered(transformers, "mamba")
    return theirs.state_dict(), theirs.config.to_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 40}, r"embedding.weight \(23, 16\), and the config's vocabulary of 40"),
        ({"vocab_size": None}, "config: vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size = 'many', expected an integer >= 1"),
        ({"model_type": "llama"}, "model_type = 'llama', expected one of 'mamba'"),
        ({"model_type": None}, "neither model_type .* nor d_model and n_layer"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "unknown key 'quantization_config'"),
        ({"num_hidden_layers": 3}, r"differ: missing \['layers.blocks.2.*and .* more"),
        ({"num_hidden_layers": 1}, r"not known \['layers.blocks.1"),
        ({"state_size": 6}, r"A_log \(32, 5\), and the config makes \(32, 6\)"),
        ({"use_conv_bias": 1}, "use_conv_bias = 1, expected true or false"),
        ({"d_model": 32}, "d_model = 32, expected 16"),
        ({"model_type": "falcon_mamba", "mixer_rms_eps": 1e-5}, "mixer_rms_eps = 1e-05, expected"),
    ],
)
def test_configs_that_do_not_fit(plain: Any, change: dict[str, Any], said: str) -> None:
    weights, config = plain
    with pytest.raises(ValueError, match=said):
        language_model(weights, {**config, **change})


def test_weights_that_do_not_fit(plain: Any) -> None:
    weights, config = plain
    head, embedding = "lm_head.weight", "backbone.embeddings.weight"
    for changed, said in (
        ({**weights, "backbone.extra": torch.ones(2)}, r"not known: \['backbone.extra'\]"),
        ({k: v for k, v in weights.items() if "norm_f" not in k}, r"missing \['norm.weight'\]"),
        ({**weights, head: weights[head] + 1}, "differs from the embedding, and the config ties"),
        ({**weights, "backbone.embedding.weight": weights[embedding]}, "are both embedding.weight"),
        ({**weights, "backbone.norm_f.weight": torch.ones(H, dtype=torch.int8)},
         "norm.weight has dtype torch.int8, expected a floating one"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            language_model(changed, config)
    with pytest.raises(ValueError, match="a state dict, expected its config too"):
        language_model(weights)
    with pytest.raises(ValueError, match="config is a int, expected a dict"):
        language_model(weights, 3)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mamba2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06, expected 1e-05"),
        ("mamba2", {"num_heads": 3}, "num_heads = 3, expected expand"),
        ("mamba2", {"time_step_limit": 3}, "time_step_limit = 3, expected two numbers"),
        ("recurrent gemma", {"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ("recurrent gemma", {"block_types": ["mlp"]}, r"block_types = \['mlp'\], expected a list"),
        ("recurrent gemma", {"intermediate_size": 41}, "expected an even number"),
        ("recurrent gemma", {"rope_scaling": {"factor": 2}}, "rope_scaling = .*, expected null"),
        ("recurrent gemma", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ("recurrent gemma", {"num_key_value_heads": 3}, "n_kv_heads = 3 does not divide"),
        ("recurrent gemma", {"embeddings_scale_by_sqrt_dim": False}, "expected True"),
    ],
)
def test_values_the_layers_do_not_have(
    transformers: Any, name: str, change: dict[str, Any], said: str
) -> None:
    theirs = MAKERS[name](transformers)
    with pytest.raises(ValueError, match=said):
        language_model(theirs.state_dict(), {**theirs.config.to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_intermediate": 64}, "d_intermediate = 64, expected 0"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx = \[1\], expected \[\]"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer = 'Mamba3', expected 'Mamba1' or 'Mamba2'"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim = True, expected False"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "d_ssm = 8, expected null"),
        ({"ssm_cfg": {"d_stat": 8}}, "ssm_cfg: unknown key 'd_stat' = 8"),
        ({"ssm_cfg": 3}, "ssm_cfg = 3, expected an object"),
        ({"n_layers": 8}, "unknown key 'n_layers'"),
    ],
)
def test_original_configs_that_have_more(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        language_model({}, {**original(False)[0], **change})


def test_older_spellings(transformers: Any) -> None:
    """Configs and files of earlier versions of transformers."""
    theirs = scattered(transformers, "recurrent gemma")
    config, weights = theirs.config.to_dict(), dict(theirs.state_dict())
    del config["rope_parameters"]
    config |= {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_scaling": None}
    config |= {"embeddings_scale_by_sqrt_dim": True, "_block_types": config.pop("block_types")}
    weights["model.layers.2.temporal_block.rotary_emb.inv_freq"] = torch.ones(1)
    del weights["lm_head.weight"]
    tokens = ids(1, L)
    with torch.no_grad():
        close(language_model(weights, config)(tokens), theirs(tokens, use_cache=False).logits)
    second = scattered(transformers, "mamba2 limited, tied")
    config = second.config.to_dict() | {"norm_before_gate": True, "rms_norm": True}
    config["time_step_limit"] = [0.01, {"__float__": "0.5"}]
    with torch.no_grad():
        got = language_model(second.state_dict(), config)(tokens)
        close(got, second(tokens, use_cache=False).logits)


def test_folders_that_are_none(plain: Any, tmp_path: Path) -> None:
    _, config = plain
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        language_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        language_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a readable JSON file"):
        language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no weights, expected model.safetensors, "):
        language_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: truncated or corrupt"):
        language_model(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: holds no dict of tensors"):
        language_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"model.safetensors: truncated or corrupt"):
        language_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json: no weight_map"):
        language_model(tmp_path)
    outside = {"weight_map": {"backbone.norm_f.weight": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(ValueError, match=r"../secret.safetensors is not a file of that folder"):
        language_model(tmp_path)
