# SPDX-License-Identifier: MIT
"""Arguments of the sums over nodes: which batch axes are rows that share their nodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Rows:
    """Splits batch axes into ``own`` ones, with nodes of their own, and ``rows`` that share them.

    The operators take coefficients (*own, R, H, N) and nodes (*own, H, N), R = all rows.
    """

    def __init__(self, batch: torch.Size, *nodes: torch.Size) -> None:
        padded = [(1,) * (len(batch) - len(n)) + tuple(n) for n in nodes]
        axes = range(len(batch))
        own = [d for d in axes if any(n[d] != 1 for n in padded)]
        rows = [d for d in axes if d not in own]
        self.batch, self.order = batch, own + rows
        self.own = tuple(batch[d] for d in own)
        self.rows = tuple(batch[d] for d in rows)
        self.squeezed = rows

    def coefficients(self, v: Tensor) -> Tensor:
        """(..., H, N) -> (*own, R, H, N)."""
        rank, (H, N) = len(self.batch), v.shape[-2:]
        v = v.expand(*self.batch, H, N).permute(*self.order, rank, rank + 1)
        return v.reshape(*self.own, math.prod(self.rows), H, N)

    def nodes(self, z: Tensor, tail: int = 2) -> Tensor:
        """(..., H, N) -> (*own, H, N), or with ``tail`` 1 (..., H) -> (*own, H)."""
        lead, rest = z.shape[: z.ndim - tail], z.shape[z.ndim - tail :]
        sizes = [1 if d in self.squeezed else n for d, n in enumerate(self.batch)]
        z = z.reshape((1,) * (len(sizes) - len(lead)) + z.shape).expand(*sizes, *rest)
        return z.squeeze(tuple(self.squeezed)) if self.squeezed else z

    def result(self, y: Tensor) -> Tensor:
        """(*own, R, H, K) -> (*batch, H, K)."""
        y = y.reshape(*self.own, *self.rows, *y.shape[-2:])
        rank = len(self.batch)
        back = [self.order.index(d) for d in range(rank)]
        return y.permute(*back, rank, rank + 1)


def check_nodes(where: str, named: dict[str, Tensor], *, wide: int = 2) -> torch.Size:
    """Raise unless the tensors fit together; return the batch they broadcast to.

    The first ``wide`` of them are (..., H, N), the others (..., H), all of floating or complex
    dtypes and on one device.
    """
    (first_name, first), *_ = named.items()
    got = " and ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    batches: list[torch.Size] = []
    for i, (name, x) in enumerate(named.items()):
        tail = first.shape[-2:] if i < wide else first.shape[-2:-1]
        expected = "(..., H, N)" if i < wide else "(..., H)"
        if first.ndim < 2 or x.ndim < len(tail) or x.shape[x.ndim - len(tail) :] != tail:
            raise ValueError(f"{where}: {got}, expected {name} {expected} with equal H and N")
        if x.device != first.device:
            raise ValueError(f"{where}: {name} is on {x.device} and {first_name} on {first.device}")
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{where}: {name} has dtype {x.dtype}, expected floating or complex")
        batches.append(x.shape[: x.ndim - len(tail)])
    try:
        return torch.broadcast_shapes(*batches)
    except RuntimeError:
        raise ValueError(f"{where}: {got} do not broadcast at the batch axes") from None


def real_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of real parts to compute in: the widest, and at least float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.real.dtype)
    return dtype
