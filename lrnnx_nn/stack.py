# SPDX-License-Identifier: MIT
"""What every recurrent part of a network promises, and several of them one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from lrnnx_nn.residual_stream import Method, Stream, run_on_stream


@runtime_checkable
class Mixer(Protocol):
    """A part (..., L, H) -> (..., L, H) with a state: layers, blocks, attention, stacks.

    States are values: pytrees of tensors that nobody writes to. Any split of a sequence into
    `prefill` and `step` gives what one `forward` gives; padding comes out as zero and leaves the
    state alone.
    """

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Run over whole sequences from the zero state."""
        ...

    def prefill(
        self,
        u: Tensor,
        state: Any = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Run over a part of sequences from ``state``; return also the state after it."""
        ...

    def step(
        self,
        u_t: Tensor,
        state: Any,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Take one step."""
        ...

    def init_state(self, batch_shape: Sequence[int] = ()) -> Any:
        """Return the state before any sample."""
        ...


class Stack(nn.Module):
    """Mixers one after another; the state is the tuple of theirs.

    Args:
        blocks: layers, blocks or other `Mixer`s, at least one.
        checkpoint: keep only the input of each block for the backward pass of `forward` in
            training, and compute the rest again.

    Raises:
        ValueError: no block.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpoint = checkpoint
        if not len(self.blocks):
            raise ValueError("Stack: no blocks, expected at least one")

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        for block in self.blocks:
            block.reset_parameters()  # pyright: ignore[reportCallIssue]

    def init_state(self, batch_shape: Sequence[int] = (), **options: Any) -> tuple[Any, ...]:
        """Return the state before any sample; options go to every block's `init_state`."""
        return tuple(b.init_state(batch_shape, **options) for b in self._mixers())

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Run over whole sequences u (..., L, H); return (..., L, H)."""
        stream, _ = self._on_stream(
            "forward", Stream(u), integration_timesteps=integration_timesteps, lengths=lengths,
            mask=mask, reset=reset, dt_scale=dt_scale,
        )  # fmt: skip
        return stream.total()

    def prefill(
        self,
        u: Tensor,
        state: Sequence[Any] | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Run over u (..., L, H) from ``state``; return the output and the state after it.

        Raises:
            ValueError: a state of another number of blocks, or a bidirectional block.
        """
        stream, after = self._on_stream(
            "prefill", Stream(u), state, integration_timesteps=integration_timesteps,
            lengths=lengths, mask=mask, reset=reset, dt_scale=dt_scale,
        )  # fmt: skip
        return stream.total(), after

    def step(
        self,
        u_t: Tensor,
        state: Sequence[Any],
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Take one step: u_t (..., H); return the output (..., H) and the new state.

        Raises:
            ValueError: a state of another number of blocks, or a bidirectional block.
        """
        stream, after = self._on_stream(
            "step", Stream(u_t), state, integration_timestep=integration_timestep,
            dt_scale=dt_scale,
        )  # fmt: skip
        return stream.total(), after

    def _on_stream(
        self, method: Method, stream: Stream, state: Sequence[Any] | None = None, **sequence: Any
    ) -> tuple[Stream, tuple[Any, ...]]:
        """Run every block; the last one's branch is left to whoever reads the stream next."""
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(
                f"Stack.{method}: a state of {len(state)} blocks, expected {len(self.blocks)}"
            )
        states = (None,) * len(self.blocks) if state is None else state
        keeps_little = method == "forward" and self.checkpoint and self.training
        after: list[Any] = []
        for block, before in zip(self.blocks, states, strict=True):
            if keeps_little and torch.is_grad_enabled():
                u = recomputed(block, stream.total(), use_reentrant=False, **sequence)
                stream = Stream(u)
                continue
            given = () if method == "forward" else (before,)
            stream, new = run_on_stream(block, method, stream, *given, **sequence)
            after.append(new)
        return stream, tuple(after)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"checkpoint={self.checkpoint}"

    def _mixers(self) -> list[Any]:
        return list(self.blocks)
