# SPDX-License-Identifier: MIT
"""What the hierarchical networks are built from, as frozen configs that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

from lrnnx_nn.blocks import ACTIVATIONS
from lrnnx_nn.mixers import ATTENTION, mixer_name
from lrnnx_nn.norms import NORMS
from lrnnx_nn.pooling import check_grouping

EVENT_POOLINGS = {"stride": "last", "mean": "mean", "time_weighted": "time_weighted"}
"""What an Event-SSM stage can do with a group, and what `lrnnx_nn.EventPooling` calls it."""

LayerChoice: TypeAlias = "str | Mapping[str, Any]"
"""A layer's name, or ``{"layer": name}`` and arguments of the layer, ``d_state`` among them."""


class Stage(NamedTuple):
    """A stage with every size filled in.

    Attributes:
        layers: the name, ``layer``, and the arguments of each layer in order, ``d_state`` among
            them but for attention.
        d_model: width H of the blocks.
        pooling: what each group of the stage becomes.
        stride: samples a group.
        event: whether the first block pools, as in Event-SSM.
    """

    layers: tuple[dict[str, Any], ...]
    d_model: int
    pooling: str
    stride: int
    event: bool


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A part of a network at one rate: blocks, then pooling over time.

    Attributes:
        layers: a layer, or a list of layers, each a name or a dict of its own arguments, as in
            ``["s5", {"layer": "mamba", "d_state": 16, "d_conv": 2}, {"layer": "attn"}]``. A list
            shorter than n_layer repeats. The network's layer if None.
        d_model: width of the blocks; the network's if None. Where it differs from that of the stage
            before, a linear map stands between.
        d_state: state size of the layers that do not say their own; the network's if None.
        n_layer: number of blocks. If None, one for each entry of a list, and the network's number
            for a single layer.
        pooling: ``none``, ``stride`` (the last sample of each group), ``mean``, ``max`` or
            ``time_weighted``, after the blocks: see `lrnnx_nn.pooling`.
        stride: samples a group.
        event: the stage is an Event-SSM one: its first block pools, every layer is ``event_ssm``,
            and what fills no group is dropped, as `lrnnx_nn.EventStage` does.

    Raises:
        ValueError: an empty list, an unknown layer, a size < 1, a pooling that does not go with the
            stride.
    """

    layers: LayerChoice | Sequence[LayerChoice] | None = None
    d_model: int | None = None
    d_state: int | None = None
    n_layer: int | None = None
    pooling: str = "none"
    stride: int = 1
    event: bool = False

    def __post_init__(self) -> None:
        where = "StageConfig"
        for name in ("d_model", "d_state", "n_layer"):
            if getattr(self, name) is not None:
                check_size(where, name, getattr(self, name))
        check_flags(where, event=self.event)
        if isinstance(self.layers, (str, Mapping)):
            object.__setattr__(self, "layers", _choice(where, self.layers))
        elif self.layers is not None:
            object.__setattr__(self, "layers", tuple(_choice(where, c) for c in self.layers))
            if not self.layers:
                raise ValueError(f"{where}: layers = [], expected at least one layer")
            if self.n_layer is not None and self.n_layer < len(self.layers):
                raise ValueError(
                    f"{where}: {len(self.layers)} layers with n_layer = {self.n_layer}, expected "
                    "n_layer to be at least as many"
                )
        check_grouping(where, self.pooling, self.stride)
        if self.event and self.pooling not in EVENT_POOLINGS:
            raise ValueError(
                f"{where}: pooling = {self.pooling!r} with event = True, expected one of "
                f"{tuple(EVENT_POOLINGS)}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageConfig:
        """Make a stage from a dict of its attributes.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        check_keys("StageConfig", cls, values)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """What a network is built from but for its ends: see `EncoderConfig`."""

    layer: str = "s5"
    d_model: int = 64
    d_state: int = 64
    n_layer: int = 2
    layer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    norm: str = "layer"
    activation: str = "half_glu1"
    dropout: float = 0.1
    tie_dropout: bool = True
    prenorm: bool = True
    final_norm: bool = True
    stages: Sequence[StageConfig] | None = None
    n_tokens: int | None = None

    def __post_init__(self) -> None:
        where = type(self).__name__
        object.__setattr__(self, "layer", mixer_name(self.layer))
        object.__setattr__(self, "layer_options", dict(self.layer_options))
        if "layer" in self.layer_options:
            other = self.layer_options["layer"]
            raise ValueError(
                f"{where}: layer_options with 'layer' = {other!r} beside layer = {self.layer!r}, "
                "expected options of that layer"
            )
        if self.stages is not None:
            stages = [s if isinstance(s, StageConfig) else StageConfig.from_dict(s)
                      for s in self.stages]  # fmt: skip
            object.__setattr__(self, "stages", tuple(stages))
            if not stages:
                raise ValueError(f"{where}: stages = [], expected at least one stage")
        for name in ("d_model", "d_state", "n_layer", *_sizes(type(self))):
            check_size(where, name, getattr(self, name))
        for name, allowed in {"norm": NORMS, "activation": ACTIVATIONS}.items():
            check_choice(where, name, getattr(self, name), allowed)
        check_flags(
            where, tie_dropout=self.tie_dropout, prenorm=self.prenorm, final_norm=self.final_norm
        )
        if isinstance(self.dropout, bool | str) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{where}: dropout = {self.dropout!r}, expected 0 <= dropout < 1")
        if self.n_tokens is not None:
            check_size(where, "n_tokens", self.n_tokens)
            if (d_input := getattr(self, "d_input", 1)) != 1:
                raise ValueError(
                    f"{where}: d_input = {d_input} with n_tokens = {self.n_tokens}, expected 1: a "
                    "sample is one token"
                )
        self.plan()

    def plan(self) -> tuple[Stage, ...]:
        """Return the stages with every size filled in.

        Raises:
            ValueError: a layer other than ``event_ssm`` in an Event-SSM stage.
        """
        if self.stages is None:
            own = _with_d_state({"layer": self.layer, **self.layer_options}, self.d_state)
            return (Stage((own,) * self.n_layer, self.d_model, "none", 1, False),)
        return tuple(self._filled(stage) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from `to_dict`'s result.

        Raises:
            ValueError: a missing or unknown key, or a bad value.
        """
        where = cls.__name__
        check_keys(where, cls, values)
        required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
        if missing := sorted(required - set(values)):
            raise ValueError(f"{where}: {missing[0]} is missing")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error

    def _filled(self, stage: StageConfig) -> Stage:
        d_state = stage.d_state or self.d_state
        chosen = stage.layers
        if chosen is None:
            chosen = {"layer": self.layer, **self.layer_options}
        if isinstance(chosen, (str, Mapping)):
            chosen, count = (chosen,), stage.n_layer or self.n_layer
        else:
            count = stage.n_layer or len(chosen)
        each = [{"layer": c} if isinstance(c, str) else c for c in chosen]
        layers = tuple(_with_d_state(each[i % len(each)], d_state) for i in range(count))
        if stage.event and any(options["layer"] != "event_ssm" for options in layers):
            raise ValueError("StageConfig: event = True, expected every layer to be 'event_ssm'")
        d_model = stage.d_model or self.d_model
        return Stage(layers, d_model, stage.pooling, stage.stride, stage.event)


def check_size(where: str, name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} = {value!r}, expected an integer >= 1")


def check_flags(where: str, **flags: Any) -> None:
    """Raise a ValueError unless every value is True or False: a text such as 'false' is true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {name} = {value!r}, expected True or False")


def check_choice(where: str, name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{where}: {name} = {value!r}, expected one of {tuple(allowed)}")


def check_keys(where: str, config: type[Any], values: Mapping[str, Any]) -> None:
    """Raise a ValueError if ``values`` has a key that the config has no field for."""
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}, expected {sorted(known)}")


def _choice(where: str, chosen: Any) -> str | dict[str, Any]:
    """Return a layer's choice with the registry's name in it."""
    if isinstance(chosen, str):
        return mixer_name(chosen)
    if not isinstance(chosen, Mapping) or not isinstance(chosen.get("layer"), str):
        raise ValueError(
            f"{where}: a layer {chosen!r}, expected a name or a dict with 'layer' in it"
        )
    name = mixer_name(chosen["layer"])
    if name == ATTENTION and "d_state" in chosen:
        raise ValueError(f"{where}: d_state = {chosen['d_state']!r} of {name!r}, which has none")
    return {**chosen, "layer": name}


def _with_d_state(layer: Mapping[str, Any], d_state: int) -> dict[str, Any]:
    """Return the arguments of a layer with a state size; attention has none."""
    return dict(layer) if layer["layer"] == ATTENTION else {"d_state": d_state, **layer}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    unset = dataclasses.MISSING
    return field.default is unset and field.default_factory is unset


def _sizes(config: type[Any]) -> list[str]:
    """Return the names of the sizes that have no default."""
    return [field.name for field in dataclasses.fields(config) if _is_required(field)]
