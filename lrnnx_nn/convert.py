# SPDX-License-Identifier: MIT
"""Load the weights of published checkpoints, by name: whole language models, or single layers.

Mixers keep the names of the published files (Hugging Face's spelling), so loading one is finding
the prefix; what is spelled otherwise elsewhere is translated here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lrnnx_core.types import Params
from lrnnx_nn.convert_lrnnx import from_lrnnx
from lrnnx_nn.convert_models import language_model
from lrnnx_nn.layers.base import Layer

__all__ = ["from_lrnnx", "language_model", "load_mixer", "mixer_params"]

# DeepMind's names of a Griffin block -> ours.
_DEEPMIND = {
    "conv_1d.w": "conv_1d.weight",
    "conv_1d.b": "conv_1d.bias",
    "rg_lru.a_param": "rg_lru.recurrent_param",
    "rg_lru.input_gate.w": "rg_lru.input_gate_weight",
    "rg_lru.input_gate.b": "rg_lru.input_gate_bias",
    "rg_lru.a_gate.w": "rg_lru.recurrent_gate_weight",
    "rg_lru.a_gate.b": "rg_lru.recurrent_gate_bias",
}


def mixer_params(state_dict: Mapping[str, Tensor], prefix: str) -> Params:
    """Return the tensors of one mixer as the flat dict that core functions take.

    Args:
        state_dict: of a whole model or of a mixer; published Mamba, FalconMamba, Jamba,
            RecurrentGemma names, DeepMind's names of a Griffin block too.
        prefix: what precedes the mixer's own names, for instance ``"backbone.layers.0.mixer."``.

    Raises:
        ValueError: nothing has that prefix; the message lists prefixes that mixers have there.
    """
    found = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not found:
        heads = sorted({k.rsplit(".", 2)[0] + "." for k in state_dict})
        raise ValueError(
            f"convert: no tensor under {prefix!r}; prefixes are {', '.join(heads[:12])}"
        )
    params: Params = {}
    for key, value in found.items():
        name = _DEEPMIND.get(key, key)
        if key == "conv_1d.w":  # (K, W) there, (W, 1, K) here
            value = value.mT.unsqueeze(1)
        params[name] = value
    return params


def load_mixer(layer: Layer, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the weights of a published mixer into a layer, in place.

    Parameters keep the layer's dtype, so decays, steps and their biases stay at least float32 when
    the file is in bfloat16.

    Args:
        layer: of the right model and sizes.
        state_dict: see `mixer_params`.
        prefix: see `mixer_params`.

    Raises:
        ValueError: a name that is missing or too many, or another shape; nothing has been written
            then.
    """
    params = mixer_params(state_dict, prefix)
    own = layer.params
    missing, extra = sorted(set(own) - set(params)), sorted(set(params) - set(own))
    if missing or extra:
        raise ValueError(
            f"convert: {type(layer).__name__} and the file differ: missing {missing}, "
            f"not known {extra}"
        )
    for key, value in params.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"convert: {key} is {tuple(value.shape)} in the file, {tuple(own[key].shape)} in "
                f"{type(layer).__name__}"
            )
    with torch.no_grad():
        for key, value in params.items():
            own[key].copy_(value)
