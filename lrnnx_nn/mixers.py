# SPDX-License-Identifier: MIT
"""What mixes samples in time, by name: every registered layer, and attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrnnx_core import registry
from lrnnx_nn.attention import Attention
from lrnnx_nn.layers import LAYERS

ATTENTION = "attn"
_ATTENTION_NAMES = frozenset({"attn", "attention"})

WITHOUT_D_STATE = frozenset({ATTENTION, "rglru"})
"""Mixers that a network's ``d_state`` does not reach: attention has no state size, and RG-LRU's
``d_state`` is the width of its recurrence."""


def mixer_name(name: str) -> str:
    """Return the registry's name of a mixer, or ``attn``; case, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: no such mixer; the message lists what there is.
    """
    if not isinstance(name, str):
        raise ValueError(f"mixer {name!r}, expected the name of one")
    if name.lower().replace("-", "").replace("_", "") in _ATTENTION_NAMES:
        return ATTENTION
    try:
        return registry.get(name).name
    except ValueError:
        known = ", ".join((*LAYERS, ATTENTION))
        raise ValueError(f"unknown mixer {name!r}; expected one of {known}") from None


def make_mixer(
    name: str,
    d_model: int,
    d_state: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return a mixer of d_model channels.

    Args:
        name: of a registered layer or ``attn``, see `mixer_name`.
        d_model: channels H.
        d_state: states a channel or of the layer, for the mixers that have such; not for those in
            `WITHOUT_D_STATE`. The layer's own default if None.
        options: of the mixer, by the names of its constructor; a ``d_state`` for this one too.
        device: where the parameters are made.
        dtype: their dtype; state-space parameters are at least float32.

    Raises:
        ValueError: no such mixer, an option that it does not have or that is not its own to set,
            no d_state where it needs one.
    """
    name = mixer_name(name)
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    own = dict(options or {})
    if given := sorted({"layer", "d_model", "generator", *place} & set(own)):
        raise ValueError(
            f"options of {name!r} with {given[0]!r}, expected those of the mixer alone"
        )
    if name not in WITHOUT_D_STATE and d_state is not None:
        own.setdefault("d_state", d_state)
    if name == ATTENTION:
        allowed = set(inspect.signature(Attention).parameters) - {"d_model", *place}
        if unknown := sorted(set(own) - allowed):
            known = ", ".join(sorted(allowed))
            raise ValueError(f"Attention has no option {unknown[0]!r}; expected one of {known}")
        return Attention(d_model, **place, **own)
    layer = LAYERS[name]
    needs = inspect.signature(layer).parameters["d_state"].default is inspect.Parameter.empty
    if needs and own.get("d_state") is None:
        raise ValueError(f"{layer.__name__}: no d_state given, expected an integer >= 1")
    return layer(d_model, **place, **own)
