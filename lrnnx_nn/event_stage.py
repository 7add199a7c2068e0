# SPDX-License-Identifier: MIT
"""Stages of an Event-SSM network: a block that pools events, then blocks at the coarser time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_core.models import event_ssm
from lrnnx_core.models._common import check_sizes
from lrnnx_core.models.event_ssm import Compat, Pending, Pooled, PooledState, Pooling
from lrnnx_core.sequences import layout
from lrnnx_nn.blocks import Activation, Block, reset_parts
from lrnnx_nn.layers.event_ssm import EventPooling, EventSSM
from lrnnx_nn.norms import make_norm, normalize


class PoolingBlockState(NamedTuple):
    """The state of an `EventPoolingBlock`: the mixer's, and what waits on the skip."""

    mixer: PooledState
    skip: Pending


class EventPoolingBlock(nn.Module):
    """A residual block with one output for every ``stride`` events.

    pool(u) + activation(mixer(norm(u))); the skip is projected where d_out is another width.

    Args:
        d_model: channels of the events.
        mixer: an `EventPooling` of that d_model; its stride, pooling and width are the block's.
        norm: ``layer``, ``rms``, ``batch``, ``none``, or a callable ``width -> Module``.
        activation: see `lrnnx_nn.blocks.Activation`; the published one is ``half_glu2``.
        dropout: probability of a zero.
        tie_dropout: share the dropout mask over time.
        prenorm: normalise before the mixer, else after the sum.

    Raises:
        ValueError: a mixer of another width, an unknown choice.

    Source: Schoene et al. 2024, arXiv:2404.18508, section 3, and the authors' code.
    """

    def __init__(
        self,
        d_model: int,
        mixer: EventPooling,
        *,
        norm: str | Callable[[int], nn.Module] = "layer",
        activation: str = "half_glu2",
        dropout: float = 0.0,
        tie_dropout: bool = True,
        prenorm: bool = True,
    ) -> None:
        super().__init__()
        if mixer.d_model != d_model:
            raise ValueError(
                f"EventPoolingBlock: d_model = {d_model}, and the mixer's is {mixer.d_model}"
            )
        self.d_model, self.d_out, self.prenorm = d_model, mixer.d_output, prenorm
        self.norm = make_norm(norm, d_model if prenorm else self.d_out)
        self.mixer = mixer
        self.activation = Activation(
            activation, self.d_out, self.d_out, dropout=dropout, tie_dropout=tie_dropout
        )
        self.skip = nn.Linear(d_model, self.d_out) if self.d_out != d_model else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        reset_parts(*self.children())

    def init_state(self, batch_shape: Sequence[int] = ()) -> PoolingBlockState:
        """Return the state before any event."""
        state = self.mixer.init_state(batch_shape)
        return PoolingBlockState(state, state.pending)

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Pooled:
        """Pool whole sequences u (..., L, H); arguments as an `EventPooling`'s."""
        return self.prefill(
            u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            dt_scale=dt_scale,
        )[0]  # fmt: skip

    def prefill(
        self,
        u: Tensor,
        state: PoolingBlockState | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Pooled, PoolingBlockState]:
        """Pool u (..., L, H), any part of a stream, from ``state``; return also the state after it.

        Raises:
            ValueError: shapes that do not fit.
        """
        if u.ndim < 2:
            raise ValueError(f"EventPoolingBlock: u {tuple(u.shape)}, expected (..., L, H)")
        sequence: dict[str, Any] = {
            "integration_timesteps": integration_timesteps, "lengths": lengths, "mask": mask,
        }  # fmt: skip
        before = u
        if self.prenorm:
            valid = layout("EventPoolingBlock", u, lengths=lengths, mask=mask).valid(u.shape[-2])
            before = normalize(self.norm, u, valid)
        (y, time, rows), mixer = self.mixer.prefill(
            before, None if state is None else state.mixer, dt_scale=dt_scale, **sequence
        )
        skip, waiting = event_ssm.pool(
            u, None if state is None else state.skip, stride=self.mixer.stride,
            pooling=self.mixer.pooling, compat=self.mixer.compat, **sequence,
        )  # fmt: skip
        valid = layout("EventPoolingBlock", y, lengths=rows).valid(y.shape[-2])
        out = self.skip(skip.y) + self.activation(y)
        if not self.prenorm:
            out = normalize(self.norm, out, valid)
        if valid is not None:
            out = torch.where(valid.unsqueeze(-1), out, torch.zeros_like(out))
        return Pooled(out, time, rows), PoolingBlockState(mixer, waiting)


class EventStage(nn.Module):
    """One pooling block and ``n_layer - 1`` blocks behind it, at the coarser time.

    A network is a sequence of stages: each takes the events, gaps and lengths that the one before
    returned.

    Args:
        d_model: channels of the events.
        d_state: full state size P of every layer.
        n_layer: number of blocks, at least 1.
        stride: events a group of the first block; 1 pools nothing.
        d_out: channels of the result; d_model if None.
        pooling: see `EventPooling`.
        compat: see `EventPooling`.
        norm: see `lrnnx_nn.blocks.Block`, and the four after it.
        activation: of every block.
        dropout: of every block.
        tie_dropout: of every block.
        prenorm: of every block.
        **options: options of the layers, such as ``discretization``, ``blocks`` and ``conj_sym``.

    Raises:
        ValueError: a size < 1, an unknown choice or option.

    Source: Schoene et al. 2024, arXiv:2404.18508, section 3, and the authors' code.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        n_layer: int,
        stride: int,
        d_out: int | None = None,
        pooling: Pooling = "last",
        compat: Compat | None = None,
        norm: str | Callable[[int], nn.Module] = "layer",
        activation: str = "half_glu2",
        dropout: float = 0.0,
        tie_dropout: bool = True,
        prenorm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        check_sizes("EventStage", n_layer=n_layer)
        if "generator" in options:
            raise ValueError(
                "EventStage: its gates draw from torch's own generator; use torch.manual_seed"
            )
        around: dict[str, Any] = {
            "norm": norm, "activation": activation, "dropout": dropout,
            "tie_dropout": tie_dropout, "prenorm": prenorm,
        }  # fmt: skip
        first = EventPooling(
            d_model, d_state, stride=stride, pooling=pooling, compat=compat, d_out=d_out, **options
        )
        self.d_model, self.d_out = d_model, first.d_output
        self.pooling = EventPoolingBlock(d_model, first, **around)
        self.blocks = nn.ModuleList(
            Block(self.d_out, EventSSM(self.d_out, d_state, **options), **around)
            for _ in range(n_layer - 1)
        )

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        for block in (self.pooling, *self._blocks()):
            block.reset_parameters()

    def init_state(self, batch_shape: Sequence[int] = ()) -> tuple[Any, ...]:
        """Return the state before any event: one a block."""
        return tuple(b.init_state(batch_shape) for b in (self.pooling, *self._blocks()))

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Pooled:
        """Run over whole sequences u (..., L, H); arguments as an `EventPooling`'s."""
        out = self.pooling(
            u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            dt_scale=dt_scale,
        )  # fmt: skip
        y = out.y
        for block in self.blocks:
            y = block(
                y, integration_timesteps=out.integration_timesteps, lengths=out.lengths,
                dt_scale=dt_scale,
            )  # fmt: skip
        return out._replace(y=y)

    def prefill(
        self,
        u: Tensor,
        state: tuple[Any, ...] | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Pooled, tuple[Any, ...]]:
        """Run over u (..., L, H), any part of a stream, from ``state``; return the state after it.

        Raises:
            ValueError: shapes that do not fit.
        """
        states = (None,) * (1 + len(self.blocks)) if state is None else state
        out, first = self.pooling.prefill(
            u, states[0], integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            dt_scale=dt_scale,
        )  # fmt: skip
        y, after = out.y, [first]
        for block, own in zip(self._blocks(), states[1:], strict=True):
            y, new = block.prefill(
                y, own, integration_timesteps=out.integration_timesteps, lengths=out.lengths,
                dt_scale=dt_scale,
            )  # fmt: skip
            after.append(new)
        return out._replace(y=y), tuple(after)

    def _blocks(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]
