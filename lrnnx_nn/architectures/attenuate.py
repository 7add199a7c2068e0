# SPDX-License-Identifier: MIT
"""Weights of the package ``attenuate`` (aTENNuate) in a `UNet`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lrnnx_nn.architectures.unet import UNet

_PARTS = {"down_ssms": "down", "up_ssms": "up"}
_BLOCKS = {"hid_ssms": "neck", "last_ssms": "output"}


def load_attenuate(model: UNet, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of an ``attenuate.Denoiser`` into a U-Net, in place.

    Args:
        model: of ``UNetConfig.named("attenuate")``, or with other channels, factors and numbers of
            states as the Denoiser has them. With ``causal=True`` each convolution meets its taps
            one sample later than it was trained for.
        state_dict: of the Denoiser, as its ``weights.pt`` holds it.

    Raises:
        ValueError: a name or a shape that does not fit; nothing has been written then.

    Source: attenuate 0.1.1 on PyPI (Pei et al. 2024, arXiv:2409.03377).
    """
    want = model.state_dict()
    have: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        have |= _translated(key, value)
    for key in sorted(want.keys() | have.keys()):
        new, own = have.get(key), want.get(key)
        flat = key.endswith(("A_raw", "A_im", "log_dt"))  # there, and (J, M) here
        if flat and new is not None and own is not None and new.numel() == own.numel():
            have[key] = new = new.reshape(own.shape)
        if new is None or own is None or new.shape != own.shape:
            raise ValueError(
                f"load_attenuate: {key} is {'absent' if new is None else tuple(new.shape)}, "
                f"expected {'absent' if own is None else tuple(own.shape)}"
            )
    with torch.no_grad():
        for key, own in want.items():
            own.copy_(have[key])


def _translated(key: str, value: Tensor) -> dict[str, Tensor]:
    """Return what one of their tensors is here."""
    part, _, rest = key.partition(".")
    index, _, leaf = rest.partition(".")
    if part in _BLOCKS:
        return _block(f"{_BLOCKS[part]}.{index}", leaf, value)
    if part not in _PARTS:
        raise ValueError(f"load_attenuate: {key!r} is no name of an attenuate.Denoiser")
    own = _PARTS[part]
    resampling, block = ("1", "0") if own == "down" else ("0", "1")
    if leaf == f"{resampling}.weight":  # (C, D, r): a group's samples are rows here
        c, d, r = value.shape
        weight = value.permute(1, 2, 0) if own == "down" else value.permute(2, 1, 0)
        weight = weight.reshape((d, r * c) if own == "down" else (r * d, c))
        return {f"{own}.{own}.{index}.projection.weight": weight}
    return _block(f"{own}.blocks.{index}.0", leaf.removeprefix(f"{block}."), value)


def _block(prefix: str, leaf: str, value: Tensor) -> dict[str, Tensor]:
    """Return what a tensor of one of their blocks is; their parts are numbered."""
    name = leaf.partition(".")[2]
    if name == "A":
        return {f"{prefix}.mixer.A_raw": value[:, 0], f"{prefix}.mixer.A_im": value[:, 1]}
    if name in ("B", "C", "log_dt"):
        return {f"{prefix}.mixer.{name}": value}
    if name.startswith("layer_norm."):
        return {f"{prefix}.norm.{name.removeprefix('layer_norm.')}": value}
    return {f"{prefix}.conv.{name}": value}
