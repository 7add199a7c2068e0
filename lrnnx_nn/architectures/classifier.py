# SPDX-License-Identifier: MIT
"""A sequence classifier: stages of residual blocks, pooling over time, decoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from lrnnx_nn.architectures import checkpoint
from lrnnx_nn.architectures.encoder import StagedNetwork
from lrnnx_nn.architectures.stages import EncoderOptions, check_choice
from lrnnx_nn.pooling import VALUE_POOLINGS, pool

ARCHITECTURE = "classifier"
POOLINGS = VALUE_POOLINGS


@dataclasses.dataclass(frozen=True)
class _ClassifierSizes:
    d_input: int
    n_classes: int


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(EncoderOptions, _ClassifierSizes):
    """What a `Classifier` is built from.

    Attributes:
        d_input: channels of the sequences; 1 with tokens.
        n_classes: classes to tell apart.
        layer: a model's name, looked up in the registry, or ``attn``. With stages this and the
            four after it hold for the stages that say nothing else.
        d_model: width H of the blocks.
        d_state: state size, with the meaning the model gives it. Attention has none.
        n_layer: number of blocks.
        layer_options: further options of the layer, such as ``{"bidirectional": True}``.
        norm: ``layer``, ``rms``, ``batch`` or ``none``.
        activation: see `lrnnx_nn.blocks.Activation`.
        dropout: probability of a zero in the blocks.
        tie_dropout: share the mask over time.
        prenorm: normalise before each mixer, else after each sum.
        final_norm: normalise once more before pooling.
        stages: see `StageConfig`; one stage without pooling if None.
        n_tokens: size of the vocabulary of token input; sequences of d_input channels if None.
        pooling: ``mean``, ``last``, ``max`` or ``time_weighted`` over the valid samples of the last
            stage: see `lrnnx_nn.pooling.pool`.

    Raises:
        ValueError: a size < 1, an unknown choice, no stage, an option the layer does not have.
    """

    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ClassifierConfig", "pooling", self.pooling, POOLINGS)


class Classifier(StagedNetwork):
    """Classify sequences (..., L, d_input), or tokens (..., L), of their own lengths each.

    Continuous input is standardised by two buffers first, ``input_mean`` and ``input_std``, zero
    and one until `set_statistics` says otherwise: a loaded network takes data as it was measured.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, config.d_input)
        self.config = config
        self.decoder = nn.Linear(self.d_encoded, config.n_classes)

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
            u: (..., L, d_input), as measured, or tokens (..., L). What stands at padding does not
                matter.
            lengths: (...), samples per row of a right-padded batch.
            mask: (..., L) bool, False is padding.
            integration_timesteps: (..., L), time elapsed before each sample.
            dt_scale: multiplies the step of every layer.

        Raises:
            ValueError: shapes that do not fit, tokens outside the vocabulary.
        """
        out = self.encode(
            u, lengths=lengths, mask=mask, integration_timesteps=integration_timesteps,
            dt_scale=dt_scale,
        )  # fmt: skip
        return self.decoder(
            pool(out.y, out.valid(), self.config.pooling, out.integration_timesteps)
        )

    def save(self, folder: Path | str) -> None:
        """Write config and weights into a folder; see `checkpoint.save`."""
        checkpoint.save(folder, ARCHITECTURE, self.config.to_dict(), self)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Classifier:
        """Read what `save` wrote; the network is in evaluation mode.

        Raises:
            ValueError: not such a folder, a truncated or corrupt file; the message names it.
        """
        return checkpoint.load(
            folder, ARCHITECTURE, lambda values: cls(ClassifierConfig.from_dict(values)),
            device=device, dtype=dtype,
        )  # fmt: skip
