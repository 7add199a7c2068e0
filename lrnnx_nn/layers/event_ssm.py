# SPDX-License-Identifier: MIT
"""Event-SSM as a Module, and the layer that pools events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrnnx_core.models import event_ssm
from lrnnx_core.models._event_pooling import check
from lrnnx_core.models.event_ssm import Compat, Pooled, PooledState, Pooling
from lrnnx_core.types import Discretization
from lrnnx_nn.layers.base import Layer


class EventSSM(Layer):
    """Event-SSM (Schoene et al. 2024): S5 with the time between events in the decay.

    ``EventSSM(d_model, d_state, discretization=None, **options)``; d_state is the full state size
    P. Options are those of `lrnnx_core.event_ssm.init` and `lrnnx_core.event_ssm.scan`: ``d_out``,
    ``blocks``, ``conj_sym``, ``bidirectional``, ``C_init``, ``dt_min``, ``dt_max``, ``clip_eigs``,
    ``timestep_mode``, ``alpha``. The output has ``d_out`` channels.
    """

    name = "event_ssm"
    # log_dt trains with the rest, as in the authors' code
    ssm_parameters = frozenset({"Lambda_re", "Lambda_im", "B_re", "B_im"})


class EventPooling(Layer):
    """Event-SSM with one output for every ``stride`` events: `lrnnx_core.event_ssm.pooled_scan`.

    Args:
        d_model: channels H of the events.
        d_state: full state size P.
        discretization: ``async`` if None.
        stride: events a group.
        pooling: ``last``, ``mean`` or ``time_weighted``: what D reads of a group.
        compat: ``event_ssm`` for the released code's choice of event, the first of each group.
        use_fast_path: False runs the plain loop of the specification.
        generator: source of the random numbers; torch's own if None.
        device: where the parameters are made.
        dtype: their real dtype, at least float32.
        **options: those of `EventSSM`, but for ``bidirectional``.

    Results are `Pooled` sequences: y (..., M, d_out), integration_timesteps (..., M), lengths.

    Raises:
        ValueError: an option the model does not have, or a value it refuses.
    """

    name = "event_ssm"
    ssm_parameters = EventSSM.ssm_parameters

    def __init__(
        self,
        d_model: int,
        d_state: int,
        discretization: Discretization | None = None,
        *,
        stride: int,
        pooling: Pooling = "last",
        compat: Compat | None = None,
        use_fast_path: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check("EventPooling", stride, pooling, compat)
        for name in {"bidirectional", "mode"} & set(options):
            raise ValueError(f"EventPooling has no option {name!r}: it runs forwards, by a scan")
        super().__init__(
            d_model, d_state, discretization, use_fast_path=use_fast_path, generator=generator,
            device=device, dtype=dtype, **options,
        )  # fmt: skip
        self.stride = stride
        self.pooling: Pooling = pooling
        self.compat: Compat | None = compat

    def init_state(self, batch_shape: Sequence[int] = ()) -> PooledState:
        """Return the state before any event of sequences with these leading dimensions."""
        return event_ssm.init_pooled_state(self.params, batch_shape)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Pooled:
        """Pool whole sequences u (..., L, H) from the zero state; events past a group are dropped.

        The arguments after u are those of `lrnnx_core.event_ssm.pooled_scan`.
        """
        return self.prefill(
            u, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            dt_scale=dt_scale,
        )[0]  # fmt: skip

    def prefill(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        u: Tensor,
        state: PooledState | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Pooled, PooledState]:
        """Pool u (..., L, H), any part of a stream, from ``state``; return also the state after it.

        A part gives as many outputs as groups fill with it, none perhaps; the rest waits.
        """
        self._check_values(u, integration_timesteps, lengths)
        self._watch_stability(u)
        return event_ssm.pooled_scan(
            self.params, u, state, stride=self.stride, pooling=self.pooling, compat=self.compat,
            integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            dt_scale=dt_scale, mode="recurrent" if self.mode == "recurrent" else "auto",
            **{k: v for k, v in self._known("scan").items() if k != "mode"},
        )  # fmt: skip

    def step(self, u_t: Tensor, state: Any, **_: Any) -> tuple[Tensor, Any]:
        """Refuse: not every event has an output.

        Raises:
            ValueError: always; give `prefill` a sequence of one event.
        """
        raise ValueError(
            f"EventPooling.step: an output comes after every {self.stride} events; give prefill "
            "u (..., 1, H)"
        )

    def extra_repr(self) -> str:
        """Show sizes and options in ``print(layer)``."""
        pooled = f"stride={self.stride}, pooling={self.pooling!r}, compat={self.compat!r}"
        return f"{super().extra_repr()}, {pooled}"
