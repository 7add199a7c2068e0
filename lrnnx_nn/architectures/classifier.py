# SPDX-License-Identifier: MIT
"""A sequence classifier: encoder, residual blocks, pooling over time, decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrnnx_core import registry
from lrnnx_core.sequences import layout
from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.blocks import ACTIVATIONS, Block
from lrnnx_nn.layers import LAYERS
from lrnnx_nn.norms import NORMS, make_norm

POOLINGS = ("mean", "last", "max")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What a `Classifier` is built from.

    Attributes:
        d_input: channels of the sequences.
        n_classes: classes to tell apart.
        layer: a model's name, looked up in the registry.
        d_model: width H of the blocks.
        d_state: state size, with the meaning the model gives it.
        n_layer: number of blocks.
        layer_options: further options of the layer, such as ``{"bidirectional": True}``.
        norm: ``layer``, ``rms``, ``batch`` or ``none``.
        activation: see `lrnnx_nn.blocks.Activation`.
        dropout: probability of a zero in the blocks.
        tie_dropout: share the mask over time.
        prenorm: normalise before each mixer, else after each sum.
        pooling: ``mean``, ``last`` or ``max`` over the valid samples.
        final_norm: normalise once more before pooling.

    Raises:
        ValueError: a size < 1, an unknown choice, an option the layer does not have.
    """

    d_input: int
    n_classes: int
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
    pooling: str = "mean"
    final_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", registry.get(self.layer).name)
        object.__setattr__(self, "layer_options", dict(self.layer_options))
        for name in ("d_input", "n_classes", "d_model", "d_state", "n_layer"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ClassifierConfig: {name} = {value!r}, expected an integer >= 1")
        choices = {"norm": NORMS, "activation": ACTIVATIONS, "pooling": POOLINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"ClassifierConfig: {name} = {getattr(self, name)!r}, expected one of {allowed}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"ClassifierConfig: dropout = {self.dropout}, expected 0 <= dropout < 1"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassifierConfig:
        """Make a config from `to_dict`'s result.

        Raises:
            ValueError: a missing or unknown key, or a bad value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"ClassifierConfig: unknown key {unknown[0]!r}, expected {sorted(known)}"
            )
        if missing := sorted({"d_input", "n_classes"} - set(values)):
            raise ValueError(f"ClassifierConfig: {missing[0]} is missing")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"ClassifierConfig: {error}") from error


class Classifier(nn.Module):
    """Classify sequences (..., L, d_input), of their own lengths each, into n_classes.

    Inputs are standardised by two buffers first, ``input_mean`` and ``input_std``, zero and one
    until `set_statistics` says otherwise: a loaded network takes data as it was measured.

    Args:
        config: sizes and choices.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layer = LAYERS[config.layer]
        self.register_buffer("input_mean", torch.zeros(config.d_input))
        self.register_buffer("input_std", torch.ones(config.d_input))
        self.encoder = nn.Linear(config.d_input, config.d_model)
        self.blocks = nn.ModuleList(
            Block(
                config.d_model,
                layer(config.d_model, config.d_state, **config.layer_options),
                norm=config.norm,
                activation=config.activation,
                dropout=config.dropout,
                tie_dropout=config.tie_dropout,
                prenorm=config.prenorm,
            )
            for _ in range(config.n_layer)
        )
        # not a batch norm: what is pooled must not depend on the other sequences of the batch
        last = {"batch": "layer"}.get(config.norm, config.norm) if config.final_norm else "none"
        self.norm = make_norm(last, config.d_model)
        self.decoder = nn.Linear(config.d_model, config.n_classes)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and deviation (d_input,) by which inputs are standardised."""
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.input_mean.shape:
                raise ValueError(
                    f"Classifier: {name} {tuple(value.shape)}, expected ({self.config.d_input},)"
                )
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place; the input statistics stay."""
        for module in (self.encoder, *self.blocks, self.norm, self.decoder):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def forward(
        self,
        u: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        integration_timesteps: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Return the logits (..., n_classes).

        Args:
            u: (..., L, d_input), as measured.
            lengths: (...), samples per row of a right-padded batch.
            mask: (..., L) bool, False is padding.
            integration_timesteps: (..., L), time elapsed before each sample.
            dt_scale: multiplies the step of every layer.

        Raises:
            ValueError: shapes that do not fit.
        """
        if u.ndim < 2 or u.shape[-1] != self.config.d_input:
            raise ValueError(
                f"Classifier: u {tuple(u.shape)}, expected (..., L, {self.config.d_input})"
            )
        x = self.encoder((u - self.input_mean) / self.input_std)
        for block in self.blocks:
            x = block(
                x, lengths=lengths, mask=mask, integration_timesteps=integration_timesteps,
                dt_scale=dt_scale,
            )  # fmt: skip
        valid = layout("Classifier", u, lengths=lengths, mask=mask).valid(u.shape[-2])
        return self.decoder(pool(self.norm(x), valid, self.config.pooling))

    def save(self, folder: Path | str) -> None:
        """Write config and weights into a folder, each file atomically."""
        checkpoint.save(folder, self.config.to_dict(), self)

    @classmethod
    def load(cls, folder: Path | str) -> Classifier:
        """Read what `save` wrote; the network is in evaluation mode.

        Raises:
            ValueError: not such a folder, a truncated or corrupt file; the message names it.
        """
        values = checkpoint.load_config(folder)
        try:
            model = cls(ClassifierConfig.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{Path(folder) / checkpoint.CONFIG}: {error}") from error
        checkpoint.load_weights(folder, model)
        return model.eval()


def pool(x: Tensor, valid: Tensor | None, pooling: str) -> Tensor:
    """Reduce x (..., L, H) over its valid samples to (..., H); a row without any gives zeros.

    Args:
        x: sequences.
        valid: (..., L) bool, or None if all samples count.
        pooling: ``mean``, ``last`` or ``max``.
    """
    if valid is None:
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    valid = valid.expand(x.shape[:-1]).unsqueeze(-1)
    zero = torch.zeros_like(x)
    if pooling == "mean":
        return torch.where(valid, x, zero).sum(-2) / valid.sum(-2).clamp(min=1)
    if pooling == "last":
        follows = valid.flip(-2).cumsum(-2).flip(-2)  # valid samples from here on
        return torch.where(valid & (follows == 1), x, zero).sum(-2)
    if pooling == "max":
        low = torch.finfo(x.dtype).min
        if x.shape[-2] == 0:
            return x.sum(-2)
        best = torch.where(valid, x, torch.full_like(x, low)).amax(-2)
        return torch.where(valid.any(-2), best, torch.zeros_like(best))
    raise ValueError(f"pooling {pooling!r}, expected one of {POOLINGS}")
