# SPDX-License-Identifier: MIT
"""A discretization of a diagonal state matrix as one operator: A_bar and B_bar of A, B and a step.

`lrnnx_core.discretize` says what the schemes are: some seventy small operations, and with their
gradients two hundred, which on a GPU take longer than a short scan. Complex numbers may come as two
real tensors, as parameters are stored.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from lrnnx_core import discretize as schemes
from lrnnx_core.backends import cpu, cuda, cuda_discretize, library
from lrnnx_core.backends.discretization import Arguments, formula, gradients
from lrnnx_core.backends.transforms import allow_in_graph
from lrnnx_core.ops._fused import Signature, fused
from lrnnx_core.types import Discrete, Discretization, Number, TimestepMode

Parts: TypeAlias = Tensor | tuple[Tensor, Tensor | None]
"""A real or complex tensor, or its real part and its imaginary one, None for zero."""

_ALPHA = {"euler": 0.0, "bilinear": 0.5}
_NAMES = frozenset({"zoh", "dirac", "mamba", "gbt", *_ALPHA})
_WIDE = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})


def discretize_diagonal(
    A: Parts,
    dt: Tensor,
    B: Parts | None = None,
    *,
    discretization: Discretization,
    integration_timesteps: Tensor | None = None,
    timestep_mode: TimestepMode = "both",
    alpha: Number | None = None,
) -> Discrete:
    """Discretize a diagonal A as `lrnnx_core.discretize.discretize` does, in one operator.

    Args:
        A: the diagonal of the continuous state matrix, of any shape.
        dt: broadcastable against A, the step.
        B: broadcastable against both; 1 if None.
        discretization: a checked choice, see `lrnnx_core.discretize.discretize`.
        integration_timesteps: (..., L), time elapsed before each sample.
        timestep_mode: see there.
        alpha: the number of ``gbt``.

    Returns:
        A_bar and gamma B, complex where A is, of the shapes that are said there.

    Raises:
        ValueError: as said there.
    """
    scheme, mode = discretization, timestep_mode
    if scheme == "async":
        scheme, mode = "zoh", "state_only"
    if not isinstance(scheme, str) or not _fits(scheme, alpha, A, dt, B):
        A_bar, gamma = schemes.discretize(
            joined(A), dt, discretization=discretization, timestep_mode=timestep_mode, alpha=alpha,
            integration_timesteps=integration_timesteps,
        )  # fmt: skip
        return A_bar, gamma if B is None else gamma * joined(B)
    decay, drive = dt, None
    if integration_timesteps is not None:
        shape = torch.broadcast_shapes(_first(A).shape, dt.shape)
        lead = integration_timesteps.shape
        decay = integration_timesteps.reshape(lead + (1,) * len(shape)) * dt
        drive = dt if mode == "state_only" else None
    return apply_scheme(A, decay, drive, B, scheme=scheme, alpha=alpha)


def apply_scheme(
    A: Parts,
    dt: Tensor,
    dt_input: Tensor | None = None,
    B: Parts | None = None,
    *,
    scheme: str,
    alpha: Number | None = None,
) -> Discrete:
    """Compute A_bar = decay(dt A) and B_bar = gamma(dt_input, A) B element by element.

    Args:
        A: float32 or wider, real or complex.
        dt: real, the step of the decay.
        dt_input: real, the step of the input; that of the decay if None.
        B: 1 if None; of a kind with A.
        scheme: ``zoh``, ``bilinear``, ``gbt``, ``euler``, ``dirac`` or ``mamba``.
        alpha: the number of ``gbt``, a float.

    Returns:
        A_bar, of the shape that A and dt broadcast to, and B_bar, of that of A, dt_input and B.
    """
    number = _ALPHA.get(scheme, 0.0 if alpha is None else float(alpha))
    name = "gbt" if scheme in _ALPHA else scheme
    (re, im), (B_re, B_im) = _split(A), (None, None) if B is None else _split(B)
    tensors = (re, im, dt, dt_input, B_re, B_im)
    rank = max(t.ndim for t in tensors if t is not None)
    kind = torch.float32
    for t in tensors:
        if t is not None and t.dtype in (torch.float64, torch.complex128):
            kind = torch.float64
    A_bar, B_bar = _operator(*(_ready(t, rank, kind) for t in tensors), name, number)
    drive = dt if dt_input is None else dt_input
    decay = max(re.ndim, dt.ndim)
    gain = max(re.ndim, drive.ndim, 0 if B_re is None else B_re.ndim)
    return (
        A_bar if decay == rank else A_bar.reshape(A_bar.shape[rank - decay :]),
        B_bar if gain == rank else B_bar.reshape(B_bar.shape[rank - gain :]),
    )


def joined(x: Parts) -> Tensor:
    """Return one tensor, complex of two parts."""
    if isinstance(x, Tensor):
        return x
    return x[0] if x[1] is None else torch.complex(x[0], x[1])


def _first(x: Parts) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def _split(x: Parts) -> tuple[Tensor, Tensor | None]:
    return (x, None) if isinstance(x, Tensor) else x


def _is_complex(x: Parts) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else x[1] is not None


def _fits(name: str, alpha: Number | None, A: Parts, dt: Tensor, B: Parts | None) -> bool:
    """Return whether the operator takes these: else the formulas do, or say what is wrong."""
    if name not in _NAMES or isinstance(alpha, Tensor) or (alpha is None) == (name == "gbt"):
        return False
    if B is not None and _is_complex(B) != _is_complex(A):
        return False
    return dt.is_floating_point() and _first(A).dtype in _WIDE


def _ready(t: Tensor | None, rank: int, real: torch.dtype) -> Tensor | None:
    """Return t of this rank, in this precision: vmap maps over all tensors in front."""
    if t is None:
        return None
    kind = real if not t.is_complex() else torch.promote_types(real, torch.complex64)
    t = t if t.dtype == kind else t.to(kind)
    return t if t.ndim == rank else t.reshape((1,) * (rank - t.ndim) + t.shape)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    p = Arguments(*arguments)
    own = () if p.B is None else (p.B.shape,)
    kind = p.A.dtype if p.A_im is None else torch.promote_types(p.A.dtype, torch.complex64)
    return (
        p.A.new_empty(torch.broadcast_shapes(p.A.shape, p.dt.shape), dtype=kind),
        p.A.new_empty(torch.broadcast_shapes(p.A.shape, p.drive.shape, *own), dtype=kind),
    )


def _fake_backward(grad_A_bar: Tensor, grad_B_bar: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    absent = rest[2].new_empty(0)
    return tuple(absent.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest[:6])


_ARGUMENTS = library.parameters(Arguments)
_leaf = library.define(
    f"discretize_diagonal({_ARGUMENTS}) -> (Tensor, Tensor)", default=formula, fake=_fake
)
_leaf_backward = library.define(
    f"discretize_diagonal_backward(Tensor grad_A_bar, Tensor grad_B_bar, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=gradients,
    fake=_fake_backward,
)
_apply = fused(
    _leaf,
    _leaf_backward,
    formula,
    Signature(tensors=6, differentiable=6, choices=2, outputs=2, remembered=()),
)


def _operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    p = Arguments(*arguments)
    if not _compiled(p):
        return formula(*p)
    if p.scheme == "zoh" and p.dt_input is not None and p.A.is_cpu:  # its kernel has one step
        drive = p._replace(dt=p.dt_input, dt_input=None)
        return torch.exp(p.dt * joined((p.A, p.A_im))), _apply(*drive)[1]
    A_bar, B_bar = _apply(*p)
    return A_bar, B_bar


def _compiled(p: Arguments) -> bool:
    """Return whether there is a kernel: what PyTorch computes it can differentiate as well."""
    if p.A.is_cuda:
        return cuda.ready()
    complex_ = p.A_im is not None or p.A.is_complex()
    return p.A.is_cpu and p.scheme == "zoh" and complex_ and cpu.in_force()


allow_in_graph(_operator)
_CUDA = cuda_discretize.implement()
_CPU = cpu.implement("discretize", "discretize_diagonal", "discretize_diagonal_backward")
