# SPDX-License-Identifier: MIT
"""What a network at several rates is configured by, and how its parts are made from that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from lrnnx_core.models._common import check_choice, check_sizes
from lrnnx_nn.architectures._rate_blocks import StageBlock, StageBlocks
from lrnnx_nn.architectures._ways import Contraction, Expansion
from lrnnx_nn.architectures.stages import check_flags
from lrnnx_nn.gated import ACTIVATIONS
from lrnnx_nn.mixers import make_mixer, mixer_name
from lrnnx_nn.norms import NORMS
from lrnnx_nn.pieces import check_layout
from lrnnx_nn.resample import Downsample, Upsample


@dataclasses.dataclass(frozen=True)
class MultirateConfig:
    """What networks with several rates have in common.

    A level is a rate: level 0 that of the input, level i the one below ``factors[i - 1]``, and the
    last level, ``len(factors)``, the neck. A block is a depthwise convolution, the layer, a norm
    and an activation.

    Attributes:
        d_input: channels of the sequences.
        channels: channels of levels 1, 2, ...
        factors: samples of a level for one of the next, as many as channels.
        layer: a model's name, looked up in the registry, or ``attn``.
        d_state: state size, with the meaning the model gives it; attention and RG-LRU do without.
        layer_options: further options of the layer, such as ``{"variant": "pointwise"}``.
        layers: None for that layer everywhere. Instead of it one for each level, the neck last,
            which is one more than channels: a name or a dict of its own arguments, as in ``["s5",
            {"layer": "mamba", "d_state": 8, "d_conv": 2}, "attn"]``.
        n_layer: blocks at each level on the way down, and as many on the way up.
        n_neck: blocks in the neck.
        n_output: blocks behind the way up, the last one without norm and activation.
        d_stem: channels of level 0, with a linear map from d_input there and one back at the end.
            None: d_input, without maps. Blocks with a single channel have no convolution and no
            norm.
        preconv: width of the depthwise convolution in front of each layer; 0 for none.
        norm: ``layer``, ``rms``, ``batch`` or ``none``, behind each layer.
        activation: ``silu``, ``gelu``, ``relu`` or ``none``.
        residual: add the input of each block to its output.
        causal: let the convolutions look at the past alone, and refuse bidirectional layers.

    Raises:
        ValueError: sizes < 1, numbers of channels and factors that differ, an unknown choice, an
            option the layer does not have, an even preconv that is not causal, a bidirectional
            layer in a causal network.
    """

    d_input: int = 1
    channels: Sequence[int] = (16, 32, 64, 96, 128, 256)
    factors: Sequence[int] = (4, 4, 2, 2, 2, 2)
    layer: str = "centaurus"
    d_state: int = 16
    layer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: Sequence[str | Mapping[str, Any]] | None = None
    n_layer: int = 1
    n_neck: int = 2
    n_output: int = 2
    d_stem: int | None = None
    preconv: int = 3
    norm: str = "layer"
    activation: str = "silu"
    residual: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        where = type(self).__name__
        for name in ("channels", "factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.channels) != len(self.factors) or not self.channels:
            raise ValueError(
                f"{where}: {len(self.channels)} channels and {len(self.factors)} factors, expected "
                "as many of both, at least one"
            )
        for name in ("channels", "factors"):
            for i, size in enumerate(getattr(self, name)):
                check_sizes(where, **{f"{name}[{i}]": size})
        check_sizes(where, d_input=self.d_input, d_state=self.d_state, n_layer=self.n_layer)
        check_sizes(where, n_neck=self.n_neck, n_output=self.n_output)
        if self.d_stem is not None:
            check_sizes(where, d_stem=self.d_stem)
        check_choice(where, "norm", self.norm, NORMS)
        check_choice(where, "activation", self.activation, ACTIVATIONS)
        check_flags(where, residual=self.residual, causal=self.causal)
        whole = isinstance(self.preconv, int) and not isinstance(self.preconv, bool)
        if not whole or self.preconv < 0:
            raise ValueError(f"{where}: preconv = {self.preconv!r}, expected an integer >= 0")
        if self.preconv and not self.causal and self.preconv % 2 == 0:
            raise ValueError(
                f"{where}: preconv = {self.preconv}, expected an odd width where causal = False"
            )
        self._set_layers(where)

    def _set_layers(self, where: str) -> None:
        """Put the registry's names into layer and layers."""
        object.__setattr__(self, "layer", mixer_name(self.layer))
        object.__setattr__(self, "layer_options", dict(self.layer_options))
        if self.layers is not None:
            default = {field.name: field.default for field in dataclasses.fields(self)}["layer"]
            if self.layer_options or self.layer != default:
                given = "layer_options" if self.layer_options else f"layer = {self.layer!r}"
                raise ValueError(f"{where}: {given} beside layers, expected one of both")
            if len(self.layers) != len(self.channels) + 1:
                raise ValueError(
                    f"{where}: {len(self.layers)} layers, expected {len(self.channels) + 1}: one "
                    "for each level and the neck"
                )
            object.__setattr__(self, "layers", tuple(_choice(where, c) for c in self.layers))
        if self.causal and self.bidirectional:
            raise ValueError(f"{where}: a bidirectional layer with causal = True")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, the input's and the neck's included."""
        return (self.d_stem or self.d_input, *self.channels)

    @property
    def total_factor(self) -> int:
        """Samples of the input for one sample of the neck: a frame."""
        return math.prod(self.factors)

    @property
    def bidirectional(self) -> bool:
        """Whether some layer runs both ways, so that the network cannot stream."""
        return any(self.layer_at(i)[1].get("bidirectional") for i in range(len(self.widths)))

    @property
    def lookahead(self) -> int | None:
        """The most samples after t that output t depends on, or None if all of them.

        A frame cannot be computed before it is complete, which is ``total_factor - 1`` samples
        after its first one. Convolutions that are not causal add theirs, at every level.
        """
        if self.bidirectional:
            return None
        return max(self.last_input(t) - t for t in range(self.total_factor))

    def last_input(self, t: int) -> int:
        """Return the index of the last input that output t depends on."""
        ahead = [self._taps(width) // 2 * (not self.causal) for width in self.widths]
        t += ahead[0] * self.n_output
        for own, factor in zip(ahead, self.factors, strict=False):
            t = (t + own * self.n_layer) // factor
        t += ahead[-1] * self._blocks_in_neck
        for own, factor in reversed(list(zip(ahead, self.factors, strict=False))):
            t = t * factor + factor - 1 + own * self.n_layer
        return t

    @property
    def _blocks_in_neck(self) -> int:
        return self.n_neck

    def layer_at(self, level: int) -> tuple[str, dict[str, Any]]:
        """Return the name of a level's layers and their options."""
        if self.layers is None:
            return self.layer, dict(self.layer_options)
        choice = self.layers[level]
        if isinstance(choice, str):
            return choice, {}
        return choice["layer"], {k: v for k, v in choice.items() if k != "layer"}

    def _taps(self, width: int) -> int:
        return self.preconv if width > 1 else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON can hold it."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from `to_dict`'s result.

        Raises:
            ValueError: an unknown key, or a bad value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"{cls.__name__}: unknown key {unknown[0]!r}, expected {sorted(known)}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error


def _choice(where: str, chosen: object) -> str | dict[str, Any]:
    """Return the layer of a level with the registry's name in it."""
    if isinstance(chosen, str):
        return mixer_name(chosen)
    if not isinstance(chosen, Mapping) or not isinstance(chosen.get("layer"), str):
        raise ValueError(
            f"{where}: a layer {chosen!r}, expected a name or a dict with 'layer' in it"
        )
    return {**chosen, "layer": mixer_name(chosen["layer"])}


def make_blocks(
    config: MultirateConfig, level: int, count: int, *, plain: bool = False
) -> StageBlocks:
    """Return ``count`` blocks of a level; with ``plain`` the last has no norm and no activation."""
    width = config.widths[level]
    name, options = config.layer_at(level)
    blocks: list[StageBlock] = []
    for i in range(count):
        bare = plain and i == count - 1
        blocks.append(
            StageBlock(
                width,
                make_mixer(name, width, config.d_state, options),
                taps=config.preconv if width > 1 else 0,
                causal=config.causal,
                norm="none" if bare or width == 1 else config.norm,
                activation="none" if bare else config.activation,
                residual=config.residual,
            )
        )
    return StageBlocks(blocks)


def make_contraction(config: MultirateConfig) -> Contraction:
    """Return the way down from level 0 to the neck."""
    sizes = list(zip(config.widths, config.channels, config.factors, strict=False))
    return Contraction(
        [make_blocks(config, i, config.n_layer) for i in range(len(sizes))],
        [Downsample(*size) for size in sizes],
    )


def make_expansion(config: MultirateConfig, *, additive: bool) -> Expansion:
    """Return the way up from the neck to level 0."""
    sizes = list(zip(config.channels, config.widths, config.factors, strict=False))
    return Expansion(
        [Upsample(*size) for size in sizes],
        [make_blocks(config, i, config.n_layer) for i in range(len(sizes))],
        additive=additive,
    )


def check_sequence(
    where: str,
    u: Tensor,
    width: int,
    lengths: Tensor | None = None,
    integration_timesteps: Tensor | None = None,
) -> None:
    """Raise unless u is real (..., L, width) and the rest fits it."""
    if u.ndim < 2 or u.shape[-1] != width or not u.is_floating_point():
        raise ValueError(f"{where}: u {tuple(u.shape)} {u.dtype}, expected real (..., L, {width})")
    check_layout(where, u, lengths, integration_timesteps)


def check_streaming(where: str, config: MultirateConfig) -> None:
    """Raise if the network cannot run over pieces of a stream."""
    if config.bidirectional:
        raise ValueError(f"{where}: a bidirectional layer cannot stream")
