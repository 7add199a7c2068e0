# SPDX-License-Identifier: MIT
"""Causal attention as a mixer beside recurrent layers: its state is a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrnnx_core import checks
from lrnnx_core.backends.transforms import autocasting, transform_active
from lrnnx_core.models._projected import around_padding
from lrnnx_core.sequences import Layout, layout
from lrnnx_nn import kv_cache
from lrnnx_nn.causal_softmax import Softmax, angles, attend, attend_chunk, rotate
from lrnnx_nn.kv_cache import AttentionRing, AttentionState, Place
from lrnnx_nn.linears import apply_linear

__all__ = ["Attention", "AttentionRing", "AttentionState"]


class Attention(nn.Module):
    """Causal softmax attention (..., L, H) -> (..., L, H), with grouped queries and a window.

    A sample attends to those before it in its document and to itself. Positions, by which queries
    and keys are rotated, are counted in valid samples from the start of each document. Attention
    has no time of its own: ``integration_timesteps`` and ``dt_scale`` are taken, as from every
    mixer, and change nothing.

    Args:
        d_model: channels H.
        d_state: None; here for the constructor that all mixers share.
        n_heads: query heads; by default ``d_model / head_dim``.
        n_kv_heads: heads of keys and values, a divisor of n_heads and by default n_heads. Query
            head i reads from key head ``i // (n_heads / n_kv_heads)``.
        head_dim: channels of a head; by default ``d_model / n_heads``, and 64 or else d_model if
            that is not given either.
        rotary: fraction of each head that is rotated, its first channels; 0 for none. Channels i
            and i + r/2 of the r rotated ones turn together by ``position * rotary_base^(-2i/r)``.
        rotary_base: see ``rotary``.
        window: samples that a sample sees, itself included; None for all.
        bias: of the projections to queries, keys and values.
        out_bias: of the projection behind; by default as ``bias``.
        qk_norm: normalise each query and key by its root mean square before the rotation, with a
            learned scale.
        dropout: probability that a weight of the softmax is dropped in training.
        use_fast_path: False writes the softmax out instead of calling
            ``scaled_dot_product_attention``; torch.func transforms always do, since the fused
            kernels have no forward-mode and no second derivatives.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: sizes that do not divide, an odd number of rotated channels, a size < 1, a
            state size.

    The state is an `AttentionState` that grows with the samples seen; with a window, or from
    ``init_state(capacity=...)``, it is an `AttentionRing` of fixed size.

    Source: Vaswani et al. 2017, arXiv:1706.03762; rotation: Su et al. 2021, arXiv:2104.09864;
    grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """

    name: ClassVar[str] = "attn"

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: float = 1.0,
        rotary_base: float = 10000.0,
        window: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        use_fast_path: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_state is not None:
            raise ValueError(
                f"Attention: d_state = {d_state!r}, expected None: attention has no state size"
            )
        self.d_model, self.d_state = d_model, None
        self.n_heads, self.n_kv_heads, self.head_dim = _heads(
            d_model, n_heads, n_kv_heads, head_dim
        )
        self.rotated = _rotated(self.head_dim, rotary, rotary_base)
        if window is not None:
            _check_size("Attention", "window", window)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"Attention: dropout = {dropout}, expected 0 <= dropout < 1")
        self.rotary, self.rotary_base = rotary, rotary_base
        self.window, self.dropout, self.use_fast_path = window, dropout, use_fast_path
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, queries, bias, **place)
        self.k_proj = nn.Linear(d_model, keys, bias, **place)
        self.v_proj = nn.Linear(d_model, keys, bias, **place)
        self.o_proj = nn.Linear(queries, d_model, bias if out_bias is None else out_bias, **place)
        self.q_norm = _norm(self.head_dim, qk_norm, place)
        self.k_norm = _norm(self.head_dim, qk_norm, place)

    @property
    def d_output(self) -> int:
        """Channels of the output."""
        return self.d_model

    def reset_parameters(self) -> None:
        """Draw every parameter again, in place."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            module.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()

    def init_state(
        self, batch_shape: Sequence[int] = (), *, capacity: int | None = None
    ) -> AttentionState | AttentionRing:
        """Return the state before any sample.

        Args:
            batch_shape: leading dimensions of the sequences.
            capacity: samples of the longest document to come. The state is then a ring of that many
                slots, or of ``window`` if that is less, and every step has the same shapes. A
                longer document raises a ValueError on a CPU outside compiled code and transforms.
                Elsewhere values cannot be looked at: attention then sees the last ``capacity``
                samples, as under a window.

        Raises:
            ValueError: a capacity < 1.
        """
        if capacity is not None:
            _check_size("Attention.init_state", "capacity", capacity)
        sizes = [n for n in (self.window, capacity) if n is not None]
        like = self._like()
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return kv_cache.empty(
            tuple(batch_shape), min(sizes) if sizes else None, self.n_kv_heads, self.head_dim,
            like.device, dtype,
        )  # fmt: skip

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
        """Run over whole sequences u (..., L, H); return y (..., L, H).

        Args:
            u: (..., L, H).
            integration_timesteps: (..., L), checked and not used.
            lengths: (...), samples per row of a right-padded batch.
            mask: (..., L) bool, False is padding, anywhere.
            reset: (..., L) bool, a document starts at that sample and sees none before it.
            dt_scale: not used.

        Memory grows as L for plain and right-padded sequences, as L * window under a window
        shorter than half the sequence, and as L^2 (one byte a pair) for documents without a window.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        seq = self._sequence("forward", u, integration_timesteps, lengths, mask, reset)
        return around_padding(u, seq, lambda x, s: self._run("forward", x, None, s, False))[0]

    def prefill(
        self,
        u: Tensor,
        state: AttentionState | AttentionRing | None = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, AttentionState | AttentionRing]:
        """Run over u (..., L, H) from ``state``; return y and the state after it.

        Any split of a sequence into prefills and steps gives what one `forward` gives. Arguments
        as `forward`'s.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; a document longer than the
                state's capacity.
        """
        seq = self._sequence("prefill", u, integration_timesteps, lengths, mask, reset)
        return around_padding(u, seq, lambda x, s: self._run("prefill", x, state, s, True))

    def step(
        self,
        u_t: Tensor,
        state: AttentionState | AttentionRing,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, AttentionState | AttentionRing]:
        """Take one step: u_t (..., H); return y_t (..., H) and the new state.

        Raises:
            ValueError: as `prefill`.
        """
        gap = None if integration_timestep is None else integration_timestep.unsqueeze(-1)
        u = u_t.unsqueeze(-2)
        seq = self._sequence("step", u, gap, None, None, None)
        y, new = self._run("step", u, state, seq, True)
        return y.squeeze(-2), new

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return (
            f"d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, "
            f"head_dim={self.head_dim}, rotary={self.rotary}, window={self.window}"
        )

    # --- one chunk ------------------------------------------------------------------------------

    def _sequence(
        self,
        where: str,
        u: Tensor,
        timesteps: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        reset: Tensor | None,
    ) -> Layout:
        """Check what came with u."""
        where = f"Attention.{where}"
        if u.ndim < 2 or u.shape[-1] != self.d_model:
            raise ValueError(
                f"{where}: u {tuple(u.shape)}, expected (..., L, H) with H = {self.d_model}"
            )
        if not u.is_floating_point():
            raise ValueError(f"{where}: u has dtype {u.dtype}, expected a real floating one")
        if u.device != (device := self._like().device):
            raise ValueError(f"{where}: u is on {u.device} and the parameters on {device}")
        seq = layout(
            where, u, lengths=lengths, mask=mask, reset=reset, integration_timesteps=timesteps
        )
        if u.device.type == "cpu" and not transform_active():
            if lengths is not None:
                checks.lengths(lengths, u.shape[-2])
            if timesteps is not None:
                checks.integration_timesteps(timesteps)
        return seq

    def _run(
        self, where: str, u: Tensor, state: Any, seq: Layout, keep: bool
    ) -> tuple[Tensor, Any]:
        """Return y and, to ``keep``, the new state for u with padding on the right and zero."""
        batch, length = u.shape[:-2], u.shape[-2]
        rows, old, new = math.prod(batch), None, None
        if state is not None:
            heads = self.n_kv_heads, self.head_dim
            kv_cache.check(f"Attention.{where}", state, batch, *heads, self.window, u)
            old = kv_cache.flattened(state, rows)
        if where == "step" and old is not None:
            at = kv_cache.place_one(old.next)
        else:
            at = kv_cache.place(seq, None if old is None else old.next, batch, length, u)
        self._check_room(where, old, at, u)
        q, k, v = self._heads(u.reshape(rows, length, self.d_model), at.position)
        softmax = Softmax(self.dropout if self.training else 0.0, self.use_fast_path)
        if old is not None:  # a state keeps the wider dtype, so that steps do not change it
            dtype = torch.promote_types(old.k.dtype, k.dtype)
            old = old._replace(k=old.k.to(dtype), v=old.v.to(dtype))
        if where == "step" and isinstance(old, AttentionRing):
            new = kv_cache.put(old, k.to(old.k.dtype), v.to(old.v.dtype), at)
            y = attend(q, new.k, new.v, (new.position >= 0).unsqueeze(-2), softmax)
        else:
            y = attend_chunk(q, k, v, at, old, self.window, softmax)
            if keep:
                new = self._remember(old, k, v, at)
        y = y.reshape((*batch, length, self.n_heads * self.head_dim))
        y = self._project(self.o_proj, y).to(u.dtype)
        return y, None if new is None else kv_cache.shaped(new, batch)

    def _check_room(self, where: str, old: Any, at: Place, u: Tensor) -> None:
        """Raise if a ring without a full window would forget what a document still needs."""
        if not isinstance(old, AttentionRing) or old.k.shape[1] == self.window:
            return
        if u.device.type != "cpu" or transform_active() or not at.position.numel():
            return
        longest, slots = int(at.position.max()) + 1, old.k.shape[1]
        if longest > slots:
            raise ValueError(
                f"Attention.{where}: a document of {longest} samples, and the state has room for "
                f"{slots}; expected init_state(capacity=...) of the longest document"
            )

    def _remember(self, old: Any, k: Tensor, v: Tensor, at: Place) -> Any:
        if old is None and self.window is not None:
            heads = self.n_kv_heads, self.head_dim
            old = kv_cache.empty((len(k),), self.window, *heads, k.device, k.dtype)
        if isinstance(old, AttentionRing):
            return kv_cache.write(old, k.to(old.k.dtype), v.to(old.v.dtype), at)
        return kv_cache.append(old, k, v, at)

    def _heads(self, u: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, values (B, L, heads, head_dim); the first two rotated."""
        keys = (self.n_kv_heads, self.head_dim)
        q = self._project(self.q_proj, u).unflatten(-1, (self.n_heads, self.head_dim))
        k = self._project(self.k_proj, u).unflatten(-1, keys)
        v = self._project(self.v_proj, u).unflatten(-1, keys)
        q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        if not self.rotated:
            return q.to(v.dtype), k.to(v.dtype), v
        cos, sin = angles(position, self.rotated, self.rotary_base, v.dtype)
        both = rotate(torch.cat([q, k], 2), cos, sin).to(v.dtype)
        q, k = both.split([self.n_heads, self.n_kv_heads], 2)
        return q, k, v

    def _like(self) -> Tensor:
        """Return a tensor where the parameters are; what wraps a projection may hide its weight."""
        weight = getattr(self.k_proj, "weight", None)
        return weight if isinstance(weight, Tensor) else next(self.parameters())

    def _project(self, module: nn.Module, x: Tensor) -> Tensor:
        """Call a projection; outside autocast its input takes the dtype of its weight."""
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not autocasting(x.device):
            x = x.to(weight.dtype) if weight.is_floating_point() else x
        return apply_linear(module, x)


def _norm(head_dim: int, learned: bool, place: dict[str, Any]) -> nn.Module:
    return nn.RMSNorm(head_dim, eps=1e-6, **place) if learned else nn.Identity()


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype)) if isinstance(norm, nn.RMSNorm) else x


def _check_size(where: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} = {value!r}, expected an integer >= 1")


def _heads(
    d_model: int, n_heads: int | None, n_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """Return query heads, key heads and channels of a head."""
    given = {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    for name, value in given.items():
        if value is not None:
            _check_size("Attention", name, value)
    if n_heads is None:
        if head_dim is None:
            head_dim = 64 if d_model % 64 == 0 else d_model
        if d_model % head_dim:
            raise ValueError(
                f"Attention: head_dim = {head_dim} does not divide d_model = {d_model}; "
                "expected n_heads too then"
            )
        n_heads = d_model // head_dim
    if head_dim is None:
        if d_model % n_heads:
            raise ValueError(
                f"Attention: n_heads = {n_heads} does not divide d_model = {d_model}; "
                "expected head_dim too then"
            )
        head_dim = d_model // n_heads
    n_kv_heads = n_kv_heads or n_heads
    if n_heads % n_kv_heads:
        raise ValueError(
            f"Attention: n_kv_heads = {n_kv_heads} does not divide n_heads = {n_heads}"
        )
    return n_heads, n_kv_heads, head_dim


def _rotated(head_dim: int, rotary: float, base: float) -> int:
    """Return how many channels of a head are rotated."""
    if not 0.0 <= rotary <= 1.0:
        raise ValueError(f"Attention: rotary = {rotary}, expected 0 <= rotary <= 1")
    if not base > 0.0:
        raise ValueError(f"Attention: rotary_base = {base}, expected a number > 0")
    size = int(head_dim * rotary)
    if size % 2:
        raise ValueError(
            f"Attention: rotary = {rotary} of head_dim = {head_dim} turns {size} channels, "
            "expected an even number"
        )
    return size
