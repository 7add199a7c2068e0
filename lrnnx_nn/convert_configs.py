# SPDX-License-Identifier: MIT
"""What the ``config.json`` of a published language model says, as a config of ours.

Every key is read, checked, or listed as one that does not change what the model computes. Any
other key is an error: it may stand for something the model would then lack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lrnnx_core.models import _ssd
from lrnnx_nn.architectures.language_config import LRNNLMConfig


class Recipe(NamedTuple):
    """How a published model is rebuilt.

    Attributes:
        config: of the model to build.
        names: (pattern, replacement) pairs from the file's names to ours; the first that matches.
        ignored: pattern of the file's names that hold nothing the model needs.
        one_more: pattern of our names whose values are one more than the file's.
    """

    config: LRNNLMConfig
    names: tuple[tuple[str, str], ...]
    ignored: str
    one_more: str | None = None

    def name(self, key: str) -> str | None:
        """Return our name of a tensor in the file, or None if there is none."""
        for pattern, replacement in self.names:
            if match := re.fullmatch(pattern, key):
                return match.expand(replacement)
        return None


_MISSING = object()

# Of every transformers config: what surrounds a model rather than what it computes.
_AROUND = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "layer_types",
    "layers_block_type", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
})  # fmt: skip
# How weights were drawn, and which code runs them.
_DRAWN = frozenset({
    "initializer_range", "rescale_prenorm_residual", "time_step_floor", "time_step_init_scheme",
    "time_step_max", "time_step_min", "time_step_scale", "use_associative_scan",
    "use_falcon_mambapy", "use_mambapy",
})  # fmt: skip


class _Fields:
    """A config that is taken apart key by key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where
        self.left = set(values)

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """Return a value, or the default where the config says nothing or null."""
        self.left.discard(name)
        value = self.values.get(name)
        if value is None:
            if default is _MISSING:
                raise ValueError(f"{self.where}: {name} is missing")
            return default
        return value

    def count(self, name: str, default: Any = _MISSING) -> int:
        """Return an integer >= 1."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(name, value, "an integer >= 1")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number."""
        value = self.take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(name, value, "a number")
        return float(value)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a value other than these; the first is what a silent config means."""
        value = self.take(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            expected = " or ".join(repr(one) for one in allowed)
            self.refuse(name, value, f"{expected}: the layer has nothing else")

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Raise a ValueError about one key."""
        raise ValueError(f"{self.where}: {name} = {value!r}, expected {expected}")

    def done(self, ignored: frozenset[str]) -> None:
        """Refuse keys that nobody has asked for."""
        if unknown := sorted(self.left - ignored):
            raise ValueError(
                f"{self.where}: unknown key {unknown[0]!r} = {self.values[unknown[0]]!r}; it might "
                "change what the model computes"
            )


def recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Return how to rebuild the model of a config.

    Args:
        values: ``config.json``, of transformers or of the original state-spaces repository.
        where: what errors call it.

    Raises:
        ValueError: another kind of model, a missing or unknown key, a value the layers do not have.
    """
    fields = _Fields(values, where)
    kind = fields.take("model_type", None)
    if kind in _KINDS:
        return _KINDS[kind](fields)
    if kind is None and {"d_model", "n_layer"} <= set(values):
        return _original(fields)
    known = ", ".join(repr(name) for name in _KINDS)
    if kind is None:
        raise ValueError(
            f"{where}: neither model_type ({known}), as transformers writes it, nor d_model and "
            "n_layer, as state-spaces does"
        )
    raise ValueError(f"{where}: model_type = {kind!r}, expected one of {known}")


# ------------------------------------------------------------------------------------------ Mamba

_MAMBA_NAMES = (
    (r"(?:backbone\.)?embeddings?\.weight", "embedding.weight"),
    (r"(?:backbone\.)?layers\.(\d+)\.norm\.(\w+)", r"layers.blocks.\1.norm1.\2"),
    (r"(?:backbone\.)?layers\.(\d+)\.mixer\.(.+)", r"layers.blocks.\1.mixer.\2"),
    (r"(?:backbone\.)?norm_f\.(\w+)", r"norm.\1"),
    (r"lm_head\.weight", "head.weight"),
)
_NOTHING = r"(?!)"


def _mamba(f: _Fields, inner_norm: str = "none") -> Recipe:
    """Read transformers' MambaConfig, or FalconMambaConfig."""
    f.only("hidden_act", "silu")
    options: dict[str, Any] = {
        "d_state": f.count("state_size", 16), "d_conv": f.count("conv_kernel", 4),
        "expand": f.count("expand", 2), "conv_bias": f.flag("use_conv_bias", True),
        "bias": f.flag("use_bias", False),
    }  # fmt: skip
    if f.take("time_step_rank", "auto") != "auto":
        options["dt_rank"] = f.count("time_step_rank")
    if inner_norm != "none":
        f.only("mixer_rms_eps", 1e-6)
        options["inner_norm"] = inner_norm
    return _mamba_skeleton(f, "mamba", options, tied=True)


def _falcon_mamba(f: _Fields) -> Recipe:
    return _mamba(f, "rms")


def _mamba2(f: _Fields) -> Recipe:
    """Read transformers' Mamba2Config."""
    f.only("hidden_act", "silu")
    f.only("layer_norm_epsilon", _ssd.NORM_EPS)  # of the gated norm too, where it is fixed
    options: dict[str, Any] = {
        "d_state": f.count("state_size", 128), "d_conv": f.count("conv_kernel", 4),
        "expand": f.count("expand", 2), "conv_bias": f.flag("use_conv_bias", True),
        "bias": f.flag("use_bias", False), "head_dim": f.count("head_dim", 64),
        "n_groups": f.count("n_groups", 8),
    }  # fmt: skip
    width, heads = f.count("hidden_size", 4096) * options["expand"], f.count("num_heads", 128)
    if heads * options["head_dim"] != width:
        f.refuse("num_heads", heads, f"expand * hidden_size / head_dim = {width}/head_dim")
    _limit(f, "time_step_limit", options)
    f.only("rms_norm", True)
    # older configs say norm_before_gate = true, and no version of the model has read it
    f.left -= {"chunk_size", "time_step_rank", "norm_before_gate"}
    return _mamba_skeleton(f, "mamba2", options, tied=False)


def _mamba_skeleton(f: _Fields, mixer: str, options: dict[str, Any], tied: bool) -> Recipe:
    """Read what transformers' models of Mamba's family share.

    Converted checkpoints carry the original's keys along, which transformers does not read.
    """
    config = LRNNLMConfig(
        d_model=f.count("hidden_size"), d_state=None, n_layer=f.count("num_hidden_layers"),
        vocab_size=f.count("vocab_size"), mixer_types=(mixer,), mixer_kwargs={mixer: options},
        norm="rms", norm_eps=f.number("layer_norm_epsilon", 1e-5),
        residual_in_fp32=f.flag("residual_in_fp32", True),
        tie_embeddings=f.flag("tie_word_embeddings", tied),
    )  # fmt: skip
    for name in ("d_model", "n_layer"):
        if (value := f.take(name, getattr(config, name))) != getattr(config, name):
            f.refuse(name, value, f"{getattr(config, name)}, as the key beside it says")
    carried = {"d_inner", "fused_add_norm", "intermediate_size", "pad_vocab_size_multiple",
               "rms_norm", "ssm_cfg"}  # fmt: skip
    f.done(_AROUND | _DRAWN | carried)
    return Recipe(config, _MAMBA_NAMES, _NOTHING)


def _original(f: _Fields) -> Recipe:
    """Read the config of the state-spaces repository, of Mamba and Mamba-2."""
    cfg = f.take("ssm_cfg", {})
    if not isinstance(cfg, Mapping):
        f.refuse("ssm_cfg", cfg, "an object")
    s = _Fields(cfg, f"{f.where}: ssm_cfg")
    layer = s.take("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        s.refuse("layer", layer, "'Mamba1' or 'Mamba2'")
    second = layer == "Mamba2"
    options: dict[str, Any] = {
        "d_state": s.count("d_state", 128 if second else 16), "d_conv": s.count("d_conv", 4),
        "expand": s.count("expand", 2), "conv_bias": s.flag("conv_bias", True),
        "bias": s.flag("bias", False),
    }  # fmt: skip
    drawn = {"dt_min", "dt_max", "dt_init_floor", "use_fast_path", "use_mem_eff_path"}
    if second:
        options |= {
            "head_dim": s.count("headdim", 64), "n_groups": s.count("ngroups", 1),
            "gated_norm": s.flag("rmsnorm", True),
            "norm_before_gate": s.flag("norm_before_gate", False),
        }  # fmt: skip
        s.only("D_has_hdim", False)
        if s.take("d_ssm", None) is not None:
            s.refuse("d_ssm", s.values["d_ssm"], "null: the layer has no gated MLP of its own")
        _limit(s, "dt_limit", options)
        drawn |= {"A_init_range", "chunk_size", "conv_init"}
    else:
        if s.take("dt_rank", "auto") != "auto":
            options["dt_rank"] = s.count("dt_rank")
        drawn |= {"dt_init", "dt_scale"}
    s.done(frozenset(drawn))
    mixer = layer.lower().removesuffix("1")
    if (mlp := f.take("d_intermediate", 0)) != 0:
        f.refuse("d_intermediate", mlp, "0: MLPs in between are not converted")
    if attention := f.take("attn_layer_idx", []):
        f.refuse("attn_layer_idx", attention, "[]: attention in between is not converted")
    config = LRNNLMConfig(
        d_model=f.count("d_model"), d_state=None, n_layer=f.count("n_layer"),
        vocab_size=f.count("vocab_size"), mixer_types=(mixer,), mixer_kwargs={mixer: options},
        norm="rms" if f.flag("rms_norm", True) else "layer", norm_eps=1e-5,
        residual_in_fp32=f.flag("residual_in_fp32", True),
        tie_embeddings=f.flag("tie_embeddings", True),
        pad_vocab_size_multiple=f.count("pad_vocab_size_multiple", 8),
    )  # fmt: skip
    f.done(frozenset({"attn_cfg", "fused_add_norm", "initializer_cfg"}))
    return Recipe(config, _MAMBA_NAMES, _NOTHING)


def _limit(f: _Fields, name: str, options: dict[str, Any]) -> None:
    """Read the bounds (low, high) of Mamba-2's steps; JSON has several spellings of infinity."""
    given = f.take(name, (0.0, float("inf")))
    try:
        low, high = (float(v["__float__"] if isinstance(v, Mapping) else v) for v in given)
    except (TypeError, ValueError, KeyError):
        f.refuse(name, given, "two numbers")
        return
    if (low, high) != (0.0, float("inf")):
        options["dt_limit"] = (low, high)


# ---------------------------------------------------------------------------------- RecurrentGemma

_GEMMA_NAMES = (
    (r"(?:model\.)?embed_tokens\.weight", "embedding.weight"),
    (r"(?:model\.)?layers\.(\d+)\.temporal_pre_norm\.weight", r"layers.blocks.\1.norm1.weight"),
    (r"(?:model\.)?layers\.(\d+)\.temporal_block\.(.+)", r"layers.blocks.\1.mixer.\2"),
    (r"(?:model\.)?layers\.(\d+)\.channel_pre_norm\.weight", r"layers.blocks.\1.norm2.weight"),
    (r"(?:model\.)?layers\.(\d+)\.mlp_block\.(.+)", r"layers.blocks.\1.mlp.\2"),
    (r"(?:model\.)?final_norm\.weight", "norm.weight"),
    (r"lm_head\.weight", "head.weight"),
)
# Buffers that older versions saved, and that are computed here.
_GEMMA_IGNORED = r"(?:model\.)?normalizer|.*\.rotary_emb\.(?:original_)?inv_freq"
_GEMMA_BLOCKS = {"recurrent": "rglru", "attention": "attn"}


def _recurrent_gemma(f: _Fields) -> Recipe:
    """Read transformers' RecurrentGemmaConfig."""
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.only("embeddings_scale_by_sqrt_dim", True)
    width, n_layer = f.count("hidden_size", 2560), f.count("num_hidden_layers", 26)
    heads = f.count("num_attention_heads", 10)
    pattern = f.take("block_types", f.take("_block_types", ["recurrent", "recurrent", "attention"]))
    if not pattern or not all(isinstance(b, str) and b in _GEMMA_BLOCKS for b in pattern):
        f.refuse("block_types", pattern, f"a list of {tuple(_GEMMA_BLOCKS)}")
    types = tuple(_GEMMA_BLOCKS[name] for name in pattern)[:n_layer]
    inner = f.count("intermediate_size", 3 * 2560)
    if inner % 2:
        f.refuse("intermediate_size", inner, "an even number, twice the width of the gate")
    fraction, base = _rotary(f)
    options: dict[str, dict[str, Any]] = {
        "rglru": {
            "d_state": f.count("lru_width", width), "heads": heads,
            "d_conv": f.count("conv1d_width", 4),
        },
        "attn": {
            "n_heads": heads, "n_kv_heads": f.count("num_key_value_heads", heads),
            "head_dim": f.count("head_dim", width // heads), "rotary": fraction,
            "rotary_base": base, "window": f.count("attention_window_size", 2048),
            "bias": f.flag("attention_bias", False), "out_bias": True,
            "dropout": f.number("attention_dropout", 0.0),
        },
    }  # fmt: skip
    config = LRNNLMConfig(
        d_model=width, d_state=None, n_layer=n_layer, vocab_size=f.count("vocab_size", 256000),
        mixer_types=types, mixer_kwargs={k: v for k, v in options.items() if k in types},
        d_intermediate=inner // 2, mlp="geglu", mlp_bias=True, norm="rms",
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tie_embeddings=f.flag("tie_word_embeddings", True),
        # the published model rounds the scale to bfloat16, whatever the dtype of the rest
        embedding_scale=float(torch.tensor(width**0.5, dtype=torch.bfloat16)),
        logit_soft_cap=f.number("logits_soft_cap", 30.0), residual_in_fp32=False,
    )  # fmt: skip
    drawn = {"final_w_init_variance_scale", "initializer_range", "w_init_variance_scale"}
    f.done(_AROUND | drawn)
    one_more = r"norm\.weight|layers\.blocks\.\d+\.norm[12]\.weight"
    return Recipe(config, _GEMMA_NAMES, _GEMMA_IGNORED, one_more)


def _rotary(f: _Fields) -> tuple[float, float]:
    """Return the rotated fraction and the base, which older configs hold outside."""
    given = f.take("rope_parameters", {})
    f.left.discard("rope_scaling")
    if f.values.get("rope_scaling"):
        f.refuse("rope_scaling", f.values["rope_scaling"], "null")
    if not isinstance(given, Mapping):
        f.refuse("rope_parameters", given, "an object")
    inside = _Fields(given, f"{f.where}: rope_parameters")
    inside.only("rope_type", "default")
    fraction = f.number("partial_rotary_factor", 0.5)
    base = f.number("rope_theta", 10000.0)
    fraction = inside.number("partial_rotary_factor", fraction)
    base = inside.number("rope_theta", base)
    inside.done(frozenset())
    return fraction, base


_KINDS: dict[str, Callable[[_Fields], Recipe]] = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "falcon_mamba": _falcon_mamba,
    "recurrent_gemma": _recurrent_gemma,
}
