# SPDX-License-Identifier: MIT
"""Causal convolution along time by FFT, channels-last."""

from __future__ import annotations

import torch
from torch import Tensor

from lrnnx_core.ops._spectra import along


def causal_convolution(u: Tensor, K: Tensor, *, mimo: bool = False) -> Tensor:
    """Compute y_t = sum_{s <= t} K_s u_{t-s}.

    Args:
        u: (..., L, H), real or complex.
        K: (..., M, H), one kernel a channel; leading dimensions broadcast against those of u. With
            ``mimo`` (..., M, H_out, H). M may differ from L; what reaches beyond L is not used.
        mimo: whether K mixes channels.

    Returns:
        y (..., L, H) or (..., L, H_out), in the promoted dtype of u and K. The transform runs in at
        least float32, whatever the inputs are.

    Raises:
        ValueError: sizes that do not match, or an integer dtype.

    Source: Gu et al. 2022 (S4), arXiv:2111.00396, section 2.4.
    """
    _check(u, K, mimo)
    length, size = u.shape[-2], K.shape[-2 - mimo]
    result = torch.promote_types(u.dtype, K.dtype)
    dtype = torch.promote_types(result, torch.float32)
    u, K = u.to(dtype), K.to(dtype)
    if size > length:
        K, size = K.narrow(-2 - mimo, 0, length), length
    if length == 1 or not u.numel() or not K.numel():  # MKL refuses an empty batch
        now = K.sum(-2 - mimo, keepdim=True)  # K_0, or zeros where there is no tap or no sample
        return _apply(now, u, mimo).to(result)
    n = fast_length(length + size - 1)
    forward, inverse = torch.fft.rfft, torch.fft.irfft
    if dtype.is_complex:
        forward, inverse = torch.fft.fft, torch.fft.ifft
    spectrum = _apply(along(forward, K, n, -2 - mimo), along(forward, u, n, -2), mimo)
    return along(inverse, spectrum, n, -2)[..., :length, :].to(result)


def fast_length(n: int) -> int:
    """Return the smallest 2^a 3^b 5^c >= n, a length FFTs are fast at.

    While torch.compile or export traces it is n + 1, twice the length where kernel and signal are
    equally long: a search, and even rounding, would compile the length in.
    """
    if torch.compiler.is_compiling():
        return n + 1
    best = 1 << max(n - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            best = min(best, three << max(rest - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


def _apply(K: Tensor, u: Tensor, mimo: bool) -> Tensor:
    return torch.einsum("...lij,...lj->...li", K, u) if mimo else K * u


def _check(u: Tensor, K: Tensor, mimo: bool) -> None:
    shapes = f"u {tuple(u.shape)} and K {tuple(K.shape)}"
    if u.ndim < 2 or K.ndim < 2 + mimo:
        raise ValueError(f"causal_convolution: {shapes} need at least 2 and {2 + mimo} dimensions")
    if u.shape[-1] != K.shape[-1]:
        raise ValueError(f"causal_convolution: {shapes} do not match at axis -1 (channels)")
    if u.device != K.device:
        raise ValueError(f"causal_convolution: u is on {u.device} and K on {K.device}")
    for name, value in (("u", u), ("K", K)):
        if not (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"causal_convolution: {name} has dtype {value.dtype}, expected floating"
            )
    try:
        torch.broadcast_shapes(u.shape[:-2], K.shape[: -2 - mimo])
    except RuntimeError:
        raise ValueError(
            f"causal_convolution: {shapes} do not broadcast at the batch axes"
        ) from None
