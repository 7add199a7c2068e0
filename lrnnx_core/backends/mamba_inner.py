# SPDX-License-Identifier: MIT
"""The backward leaf of `lrnnx_core.ops.mamba_inner`, composed of those of its parts.

Every tensor has leading batch axes. Those of the weights are a leading part of those of the
sequences (what a vmap over parameters adds); their gradients are summed over the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_conv1d, cuda_selective_scan, library
from lrnnx_core.backends.transforms import full_precision

Leaf = Callable[..., tuple[Any, ...]]
Product = tuple[Tensor, Tensor]


class Arguments(NamedTuple):
    """The arguments of `lrnnx_core.ops.mamba_inner.mamba_inner`, in its order."""

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    tail: Tensor | None
    h0: Tensor | None
    decay_dt: Tensor | None
    timesteps: Tensor | None
    reset: Tensor | None
    state_only: bool
    scheme: str

    @property
    def seen(self) -> Tensor | None:
        """What of the resets the convolution sees: nothing, if it has one tap."""
        return None if self.conv_weight.shape[-1] == 1 else self.reset


def gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Leaf: the gradients of xz and of the arguments after it, up to timesteps.

    A tensor of shape (0,) stands for the gradient of what is None.
    """
    operators, of_z = torch.ops.lrnnx_core, list[Tensor]()

    def scan(*inputs: Any) -> tuple[Tensor, ...]:
        found = operators.selective_scan_backward.default(*inputs)
        of_z.append(found[6])
        return found

    def convolution(g: Tensor, product: Product, *inputs: Any) -> tuple[Tensor, ...]:
        g = g.add_(cuda_conv1d.multiply(*product))
        dx, *rest = operators.causal_conv1d_backward.default(g, *inputs)
        return torch.cat([dx, of_z.pop()], -1), *rest

    return _compose(scan, convolution, *arguments)


def gradients_on_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    """Leaf, on a GPU: the kernels write the gradients of x and z where they belong."""
    if not cuda.ready():
        return gradients(*arguments)
    xz = arguments[7]
    dxz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    of_x, of_z = dxz.chunk(2, -1)

    def scan(*inputs: Any) -> tuple[Tensor | None, ...]:
        # the gradient of dt is no longer needed when that of x takes its place
        return cuda_selective_scan.selective_scan_backward(*inputs, into=(of_x, of_z))

    def convolution(g: Tensor, product: Product, *inputs: Any) -> tuple[Tensor, ...]:
        _, *rest = cuda_conv1d.causal_conv1d_backward(g, *inputs, product=product, dx=of_x)
        return dxz, *rest

    return _compose(scan, convolution, *arguments)


def _compose(
    scan: Leaf,
    convolution: Leaf,
    v: Tensor,
    mixed: Tensor,
    dt: Tensor,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_tail: Tensor,
    grad_last: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Compose the gradients of what the backward leaves of the scan and the convolution return.

    That of the convolution takes two gradients of its output, which are to be added, before its
    other arguments, the second as the factors of a product, and returns the gradient of xz in the
    place of that of x.
    """
    p = Arguments(*arguments)
    shared, rank, states = p.x_proj.ndim - 2, p.dt_proj.shape[-1], p.A.shape[-1]

    def rows(t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:shared], -1, t.shape[-1])

    x, z = p.xz.chunk(2, -1)
    r, B, C = mixed.split([rank, states, states], -1)
    with full_precision(p.xz.device):  # a backward pass may be run inside of an autocast region
        dv, ddt, dA, dB, dC, dD, _, dbias, dh0, ddecay, dtau = scan(
            checkpoints, grad_y, grad_last, v, dt, p.A, B.unsqueeze(-2), C.unsqueeze(-2), p.D, z,
            p.dt_bias, p.h0, p.decay_dt, p.timesteps, p.reset, True, p.state_only, p.scheme,
        )  # fmt: skip
        dr = (rows(ddt) @ p.dt_proj).reshape(r.shape)
        ddt_proj = rows(ddt).mT @ rows(r)
        del ddt
        dmixed = torch.cat([dr, dB.squeeze(-2), dC.squeeze(-2)], -1)
        del dr, dB, dC
        dx_proj = rows(dmixed).mT @ rows(v)
        dxz, dweight, dconv_bias, dtail = convolution(
            dv, (dmixed, p.x_proj), grad_tail, x, p.conv_weight, p.conv_bias, p.tail, p.seen, True,
        )  # fmt: skip
    ddecay, dtau = (dxz.new_empty(0) if g is None else g for g in (ddecay, dtau))
    dh0 = dxz.new_empty(0) if p.h0 is None else dh0.to(p.h0.dtype)
    return (
        dxz, dweight, dconv_bias, dx_proj, ddt_proj, dA, dD, dbias, dtail, dh0, ddecay, dtau,
    )  # fmt: skip


def implement() -> tuple[library.Implementation, ...]:
    """Register the operator for CUDA tensors; the handles keep it in force."""
    return (library.implement("mamba_inner_backward", "cuda", gradients_on_cuda),)
