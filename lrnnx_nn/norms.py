# SPDX-License-Identifier: MIT
"""Normalisations of channels-last sequences (..., L, H)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrnnx_core.ops.steps import rms_norm

NORMS = ("layer", "rms", "batch", "none")


class BatchNorm(nn.Module):
    """Normalise each channel over all valid samples of a batch; channels-last.

    ``nn.BatchNorm1d`` wants channels in the middle and counts padding. This one takes (..., L, H)
    and a mask of the samples that count. Statistics are at least float32.

    Args:
        d_model: channels H.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics (S5's 0.95 in flax is 0.05 here).
        device: where to make the parameters.
        dtype: their type.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.eps, self.momentum = d_model, eps, momentum
        self.weight = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.empty(d_model, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.empty(d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set scale one, shift zero, and forget the running statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return x (..., L, H) normalised.

        Args:
            x: (..., L, H).
            valid: (..., L) bool, the samples that count; all if None. In training mode a batch
                without any leaves the running statistics alone.
        """
        if x.shape[-1] != self.d_model:
            raise ValueError(f"BatchNorm: x {tuple(x.shape)}, expected (..., L, {self.d_model})")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self._observe(wide, valid)
        else:
            mean, var = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        y = (wide - mean) * torch.rsqrt(var + self.eps)
        return (y * self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).to(x.dtype)

    def _observe(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and (biased) variance (H,) of the batch, and keep them in mind."""
        weights = x.new_ones(x.shape[:-1]) if valid is None else valid.expand(x.shape[:-1]).to(x)
        total = weights.sum()
        count = total.clamp(min=1.0)
        rows, w = x.reshape(-1, self.d_model), weights.reshape(-1, 1)
        mean = (w * rows).sum(0) / count
        var = (w * (rows - mean).square()).sum(0) / count
        with torch.no_grad():
            momentum = self.momentum * (total > 0)
            unbiased = var * count / (count - 1).clamp(min=1.0)
            self.running_mean.add_(momentum * (mean.to(self.running_mean) - self.running_mean))
            self.running_var.add_(momentum * (unbiased.to(self.running_var) - self.running_var))
        return mean, var

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{self.d_model}, eps={self.eps}, momentum={self.momentum}"


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed in at least float32, whatever the dtypes of input and parameters.

    The result has the input's dtype: a float32 stream may pass a norm that was cast to bfloat16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input (..., H) normalised."""
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` computed in at least float32, as `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., H) normalised."""
        if len(self.normalized_shape) == 1 and self.normalized_shape[0] == x.shape[-1]:
            eps = self.eps
            if eps is None:
                eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
            return rms_norm(x, self.weight, eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)


def normalize(norm: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """Apply a norm to x (..., L, H); the statistics of a batch are those of valid samples."""
    return norm(x, valid) if isinstance(norm, BatchNorm) else norm(x)


def make_norm(
    norm: str | Callable[[int], nn.Module],
    d_model: int,
    eps: float | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return the normalisation of that name for d_model channels, or what the callable makes.

    Args:
        norm: ``layer``, ``rms``, ``batch`` (`BatchNorm`), ``none``, or ``d_model -> Module``.
        d_model: channels H.
        eps: added to the variance; if None 1e-5, and 1e-6 for ``rms``.
        device: where the parameters are made; a callable decides by itself.
        dtype: their dtype.

    Raises:
        ValueError: an unknown name, or an eps for a norm that has none or is a callable.
    """
    if eps is not None and (callable(norm) or norm == "none"):
        raise ValueError(f"norm_eps = {eps}, and norm {norm!r} takes none")
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    if callable(norm):
        return norm(d_model)
    if norm == "layer":
        return LayerNorm(d_model, eps=1e-5 if eps is None else eps, **place)
    if norm == "rms":
        return RMSNorm(d_model, eps=1e-6 if eps is None else eps, **place)
    if norm == "batch":
        return BatchNorm(d_model, eps=1e-5 if eps is None else eps, **place)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm {norm!r}, expected one of {NORMS} or a callable")
