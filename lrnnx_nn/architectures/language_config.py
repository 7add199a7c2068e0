# SPDX-License-Identifier: MIT
"""What a language model is built from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lrnnx_nn.mixers import mixer_name
from lrnnx_nn.mlp import MLPS, MakeMLP
from lrnnx_nn.norms import NORMS

BLOCKS = ("residual", "parallel")
MakeBlock = Callable[[int, nn.Module], nn.Module]
"""``(d_model, mixer) -> Module``, a `Mixer` of H channels."""


@dataclasses.dataclass(frozen=True)
class LRNNLMConfig:
    """What an `LRNNLMHeadModel` is built from.

    Attributes:
        d_model: width H of the residual stream.
        d_state: states a channel, or of the layer, as each mixer means it. Attention has none, and
            RG-LRU's is the width of its recurrence: they do not get it. None leaves every layer
            its own default.
        n_layer: number of blocks.
        vocab_size: number of token ids.
        mixer_types: for each block, or repeated in turn over all blocks, the name of a registered
            layer or ``attn``. Case, ``-`` and ``_`` do not matter.
        mixer_kwargs: options of the mixers, by type: ``{"S5": {"blocks": 2}}``. A ``d_state`` here
            goes before that of the model.
        d_intermediate: width of the MLP in each block; None or 0 for no MLP. Time-invariant layers
            are linear: without MLP only the norms are not.
        norm: ``rms``, ``layer``, ``none``, or a callable ``d_model -> Module``.
        norm_eps: added to the variance; the norm's own if None.
        mlp: ``swiglu``, ``geglu``, ``gelu``, or a callable ``(d_model, d_intermediate) -> Module``.
        mlp_bias: whether its projections have a bias.
        block: ``residual`` (mixer, then MLP), ``parallel`` (side by side), or a callable
            ``(d_model, mixer) -> Module`` such as `lrnnx_nn.Block`, which brings its own norm.
        dropout: probability of a zero, in the embeddings and at the end of each branch of the named
            blocks.
        max_positions: length of the table of learned positions; None for no positions.
        tie_embeddings: read the logits with the embedding's weights.
        pad_vocab_size_multiple: the embedding's rows are rounded up to a multiple of this. Logits
            of the rows added never come out, and these get no gradient.
        embedding_scale: multiplies the embeddings of tokens.
        logit_soft_cap: c in c tanh(logits / c); None for none.
        residual_in_fp32: keep the residual stream in at least float32 under bfloat16.
        gradient_checkpointing: keep only the input of each block for the backward pass.

    Raises:
        ValueError: a value out of range, an unknown choice or mixer, ``mixer_kwargs`` of a type
            that ``mixer_types`` does not have.
    """

    d_model: int
    d_state: int | None
    n_layer: int
    vocab_size: int
    mixer_types: Sequence[str] = ("s5",)
    mixer_kwargs: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    d_intermediate: int | None = None
    norm: str | Callable[[int], nn.Module] = "rms"
    norm_eps: float | None = None
    mlp: str | MakeMLP = "swiglu"
    mlp_bias: bool = False
    block: str | MakeBlock = "residual"
    dropout: float = 0.0
    max_positions: int | None = None
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1
    embedding_scale: float = 1.0
    logit_soft_cap: float | None = None
    residual_in_fp32: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.mixer_types, str) or not isinstance(self.mixer_types, Sequence):
            _refuse("mixer_types", self.mixer_types, "a list of names")
        if not isinstance(self.mixer_kwargs or {}, Mapping):
            _refuse("mixer_kwargs", self.mixer_kwargs, "a dict of options by type")
        types = tuple(mixer_name(name) for name in self.mixer_types)
        object.__setattr__(self, "mixer_types", types)
        object.__setattr__(self, "mixer_kwargs", _by_type(self.mixer_kwargs or {}, types))
        if self.d_intermediate == 0:
            object.__setattr__(self, "d_intermediate", None)
        self._check_numbers()
        for name in ("mlp_bias", "tie_embeddings", "residual_in_fp32", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        self._check_choices()
        if not 1 <= len(types) <= self.n_layer:
            _refuse("mixer_types", self.mixer_types, f"between 1 and n_layer = {self.n_layer}")

    @property
    def mixers(self) -> tuple[str, ...]:
        """The type of each block's mixer."""
        return tuple(self.mixer_types[i % len(self.mixer_types)] for i in range(self.n_layer))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON can hold it.

        Raises:
            ValueError: ``norm``, ``mlp`` or ``block`` is a callable.
        """
        for name in ("norm", "mlp", "block"):
            value = getattr(self, name)
            if callable(value):
                raise ValueError(
                    f"LRNNLMConfig: {name} is a callable, {value!r}; a config with one cannot be "
                    "saved. Expected a name; or save the model's state_dict instead"
                )
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LRNNLMConfig:
        """Make a config from `to_dict`'s result.

        Raises:
            ValueError: a missing or unknown key, or a bad value.
        """
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"LRNNLMConfig: unknown key {unknown[0]!r}, expected {sorted(known)}")
        needed = {"d_model", "d_state", "n_layer", "vocab_size"}
        if missing := sorted(needed - set(values)):
            raise ValueError(f"LRNNLMConfig: {missing[0]} is missing")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"LRNNLMConfig: {error}") from error

    def _check_numbers(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            if not _integer(getattr(self, name)):
                _refuse(name, getattr(self, name), "an integer >= 1")
        for name in ("d_state", "d_intermediate", "max_positions"):
            value = getattr(self, name)
            if value is not None and not _integer(value):
                _refuse(name, value, "an integer >= 1 or None")
        if not _number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            _refuse("dropout", self.dropout, "0 <= dropout < 1")
        if not _number(self.embedding_scale):
            _refuse("embedding_scale", self.embedding_scale, "a finite number")
        for name in ("norm_eps", "logit_soft_cap"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and value > 0):
                _refuse(name, value, "a number > 0 or None")

    def _check_choices(self) -> None:
        # the statistics of a batch would let a token see later ones
        norms = tuple(name for name in NORMS if name != "batch")
        for name, allowed in (("norm", norms), ("mlp", MLPS), ("block", BLOCKS)):
            value = getattr(self, name)
            if not callable(value) and value not in allowed:
                _refuse(name, value, f"one of {allowed} or a callable")
        if self.d_intermediate is None:
            if callable(self.mlp) or self.mlp_bias:
                _refuse("d_intermediate", None, "a width for the mlp that is asked for")
            if self.block == "parallel":
                _refuse("d_intermediate", None, "a width for the mlp of block = 'parallel'")
        elif callable(self.block):
            _refuse("d_intermediate", self.d_intermediate, "None with a block of one's own")


def _by_type(
    kwargs: Mapping[str, Mapping[str, Any]], types: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Return mixer_kwargs under the names of the registry."""
    found: dict[str, dict[str, Any]] = {}
    for given, options in kwargs.items():
        name = mixer_name(given)
        if name not in types:
            _refuse("mixer_kwargs", given, f"a type of mixer_types, {types}")
        if name in found:
            _refuse("mixer_kwargs", given, "every type once")
        if not isinstance(options, Mapping):
            _refuse(f"mixer_kwargs[{given!r}]", options, "a dict of options")
        for key in ("d_model", "generator", "device", "dtype"):
            if key in options:
                _refuse(f"mixer_kwargs[{given!r}]", key, "options of the mixer alone")
        if options.get("bidirectional"):
            _refuse(f"mixer_kwargs[{given!r}]", "bidirectional", "a mixer that reads forwards")
        found[name] = {key: _frozen(value) for key, value in options.items()}
    return found


def _frozen(value: Any) -> Any:
    """Return the value with tuples for lists, which is what JSON makes of tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"LRNNLMConfig: {name} = {value!r}, expected {expected}")
