# SPDX-License-Identifier: MIT
# pyright: basic
"""A_bar and B_bar of a diagonal A on CUDA: launches of cuda/discretize.cu.

The contract is that of `discretization`. Where the results differ in shape, as under irregular time
that scales the decay alone, each is made by a launch of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_tiles, discretization, library
from lrnnx_core.backends.discretization import Arguments, Layout, Strides

THREADS = 128
EACH = 16  # elements of the outermost axis that a thread makes, if there are as many
KINDS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
LAYOUTS = {"forward": "P4q" * 5 + "2Pd5q", "backward": "P4q" * 7 + "5Pd8q"}
ENTRIES = {"forward": "discretize", "backward": "discretize_backward"}


@functools.cache
def kernel(step: str, kind: torch.dtype, scheme: str) -> cuda.Kernel:
    """Return the kernel of a step, "forward" or "backward", for a dtype of A_bar and a scheme."""
    definitions = {
        "DTYPE": cuda.NAMES[kind], "SCHEME": scheme.upper(), "EACH": EACH, "THREADS": THREADS,
        step.upper(): 1,
    }  # fmt: skip
    return cuda.Kernel("discretize.cu", ENTRIES[step], definitions, LAYOUTS[step])


def kernels(limits: cuda.Limits) -> list[cuda.Kernel]:
    """Return the kernels that the library's models launch at their defaults."""
    f32, c64, c128 = torch.float32, torch.complex64, torch.complex128
    choices = [(c64, "zoh"), (c64, "mamba"), (c64, "gbt"), (f32, "zoh"), (c128, "zoh")]
    return [kernel(step, *choice) for choice in choices for step in ENTRIES]


class Problem(NamedTuple):
    """What one launch computes: A_bar, B_bar or both, of one shape and one step.

    B is None where B_bar is not made.
    """

    shape: torch.Size
    A: Tensor
    A_im: Tensor | None
    dt: Tensor
    B: Tensor | None
    B_im: Tensor | None

    def compact(self) -> Problem:
        """Return copies that any layout fits."""
        tensors = (None if t is None else t.expand(self.shape).contiguous() for t in self[1:])
        return Problem(self.shape, *tensors)  # pyright: ignore[reportArgumentType]

    def laid(self, *grads: Tensor | None) -> tuple[Layout, list[int]] | None:
        """Return the layout, and the fields of A, dt, B and cotangents; None without copies."""
        rank = len(self.shape)
        found = [
            *_numbers(self.A, self.A_im, rank), *_numbers(self.B, self.B_im, rank),
            *(_numbers(t, None, rank)[0] for t in (self.dt, *grads)),
        ]  # fmt: skip
        loops = discretization.shared(self.A, self.A_im, self.B, self.B_im)
        p = discretization.layout(tuple(self.shape), loops, tuple(s for _, s in found))
        if p is None:
            return None
        fields = [(at, *s) for (at, _), s in zip(found, p.strides, strict=True)]
        re, im, B_re, B_im, dt, *rest = fields
        return p, [value for field in (re, im, dt, B_re, B_im, *rest) for value in field]


def _readable(
    x: Problem, *grads: Tensor | None
) -> tuple[Layout, list[int], Problem, list[Tensor | None]]:
    """Return `Problem.laid` and the tensors that it is of, which have to live until the launch."""
    found = x.laid(*grads)
    if found is not None:
        return *found, x, list(grads)
    x, copies = x.compact(), [None if g is None else g.contiguous() for g in grads]
    found = x.laid(*copies)
    if found is None:
        raise RuntimeError(f"discretize_diagonal: no layout for {tuple(x.shape)}")
    return *found, x, copies


def _grid(p: Layout) -> tuple[int, int, int]:
    """Return the parts of EACH that outer has, the threads of a row of states, and the blocks."""
    outer, n1, n2, states = p.sizes
    lanes = min(cuda.WARP, 1 << max(states - 1, 0).bit_length())
    chunks = -(-outer // EACH)
    return chunks, lanes, -(-chunks * n1 * n2 * lanes // THREADS)


def _numbers(x: Tensor | None, im: Tensor | None, rank: int) -> list[tuple[int, Strides]]:
    """Return where the parts of x, or of x + i im, lie and their strides in real numbers."""
    absent = 0, (0,) * rank
    if x is None:
        return [absent, absent]
    apart, at = discretization.strides(x), x.data_ptr()
    if x.is_complex():
        apart = tuple(2 * s for s in apart)
        return [(at, apart), (at + x.element_size() // 2, apart)]
    return [(at, apart), absent if im is None else (im.data_ptr(), discretization.strides(im))]


def _problems(p: Arguments) -> list[tuple[Problem, bool, bool]]:
    """Return the launches: what each computes, and whether A_bar and B_bar are of it."""
    A, A_im, dt, _, B, B_im, *_ = p
    decay, gain = discretization.together(A, dt), discretization.together(A, p.drive, B)
    if p.dt_input is None and gain == decay:
        return [(Problem(decay, A, A_im, dt, B, B_im), True, True)]
    return [
        (Problem(decay, A, A_im, dt, None, None), True, False),
        (Problem(gain, A, A_im, p.drive, B, B_im), False, True),
    ]


def discretize(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Leaf: (A_bar, B_bar), as `discretization.formula`."""
    if not cuda.ready():
        return discretization.formula(*arguments)
    p = Arguments(*map(_plain, arguments))
    kind, device = _check("discretize_diagonal", *p.tensors)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return discretize(*p)
    made: list[Tensor] = []
    for x, decays, gains in _problems(p):
        results = [
            torch.empty(x.shape, dtype=kind, device=p.A.device) for _ in range(decays + gains)
        ]
        made += results
        if not results[0].numel():
            continue
        merged, values, *keep = _readable(x)
        _, lanes, blocks = _grid(merged)
        at = [t.data_ptr() for t in results]
        kernel("forward", kind, p.scheme).launch(
            device, blocks, THREADS, 0,
            *values, at[0] if decays else 0, at[-1] if gains else 0, p.alpha, *merged.sizes, lanes,
        )  # fmt: skip
        del keep
    return made[0], made[1]


def discretize_backward(
    grad_A_bar: Tensor, grad_B_bar: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Leaf: the gradients of the tensors, as `discretization.gradients`."""
    if not cuda.ready():
        return discretization.gradients(grad_A_bar, grad_B_bar, *arguments)
    p, grads = Arguments(*map(_plain, arguments)), [_plain(g) for g in (grad_A_bar, grad_B_bar)]
    kind, device = _check("discretize_diagonal_backward", *p.tensors, *grads)
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return discretize_backward(*grads, *p)
    found: list[list[Tensor | None]] = []  # of every launch: dA, dA_im, step, dB, dB_im
    for x, decays, gains in _problems(p):
        found.append(
            _gradients(x, grads[0] if decays else None, grads[1] if gains else None, kind, p.scheme,
                       p.alpha, device)
        )  # fmt: skip
    first, last = found[0], found[-1]
    if len(found) == 1:
        dA, dA_im, d_decay, d_drive = *first[:3], None
    else:
        dA, dA_im, d_decay, d_drive = *map(_added, first[:2], last[:2]), first[2], last[2]
        if p.dt_input is None:
            d_decay, d_drive = _added(d_decay, d_drive), None
    results = (dA, dA_im, d_decay, d_drive, *last[3:])
    return tuple(p.dt.new_empty(0) if t is None else t for t in results)


def _gradients(
    x: Problem,
    grad_A_bar: Tensor | None,
    grad_B_bar: Tensor | None,
    kind: torch.dtype,
    scheme: str,
    alpha: float,
    device: int,
) -> list[Tensor | None]:
    """Return the gradients of A, A_im, dt, B and B_im by one launch."""
    inputs = (x.A, x.A_im, x.B, x.B_im)
    summed = x.dt.shape[-1] == 1
    if not x.shape.numel():
        zeros = [None if t is None else torch.zeros_like(t) for t in (*inputs, x.dt)]
        return [*zeros[:2], zeros[4], *zeros[2:4]]
    p, values, *keep = _readable(x, grad_A_bar, grad_B_bar)
    chunks, lanes, blocks = _grid(p)
    shape = (1,) * p.summed + x.shape[p.summed :]
    partial = [
        None if t is None else torch.empty((chunks, *shape), dtype=t.dtype, device=t.device)
        for t in inputs
    ]
    steps = x.shape[:-1] + (1,) if summed else x.shape
    step = torch.empty(steps, dtype=x.dt.dtype, device=x.dt.device)
    at: list[int] = []
    for re, im in (partial[:2], partial[2:]):
        if re is not None and re.is_complex():
            at += [re.data_ptr(), re.data_ptr() + re.element_size() // 2]
        else:
            at += [0 if t is None else t.data_ptr() for t in (re, im)]
    kernel("backward", kind, scheme).launch(
        device, blocks, THREADS, 0,
        *values, *at, step.data_ptr(), alpha, *p.sizes, lanes, 1 + x.A.is_complex(),
        1 + (x.B is not None and x.B.is_complex()), summed,
    )  # fmt: skip
    del keep
    dA, dA_im, dB, dB_im = (
        None if t is None or found is None else _total(found, device).sum_to_size(t.shape)
        for t, found in zip(inputs, partial, strict=True)
    )
    return [dA, dA_im, step.sum_to_size(x.dt.shape), dB, dB_im]


def _total(partial: Tensor, device: int) -> Tensor:
    """Sum (chunks, ...) in their order."""
    chunks = partial.shape[0]
    if chunks == 1:
        return partial.squeeze(0)
    out = torch.empty(partial.shape[1:], dtype=partial.dtype, device=partial.device)
    real = torch.view_as_real(out) if out.is_complex() else out
    cuda_tiles.add_up(
        device, torch.view_as_real(partial) if out.is_complex() else partial, real, chunks
    )
    return out


def _added(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if x is None or y is None else x + y


def _plain(t: Any) -> Any:
    """Return an argument without lazy bits."""
    if not isinstance(t, Tensor) or not (t.is_conj() or t.is_neg()):
        return t
    return t.resolve_conj().resolve_neg()


def _check(operator: str, *tensors: Tensor | None) -> tuple[torch.dtype, int]:
    """Return the dtype of A_bar and the device."""
    A, A_im = tensors[:2]
    if A is None or A.dtype not in KINDS:
        names = ", ".join(cuda.NAMES[t] for t in KINDS)
        raise ValueError(f"{operator}: A is not one of {names}")
    device, real = A.get_device(), A.dtype.to_real()
    kind = A.dtype if A_im is None else A.dtype.to_complex()
    for t in tensors:
        if t is None:
            continue
        if t.get_device() != device:
            raise ValueError(f"{operator}: a tensor is on {t.device}, A on {A.device}")
        if t.dtype.to_real() != real:
            raise ValueError(f"{operator}: a tensor is {t.dtype}, A is {A.dtype}")
    return kind, device


def implement() -> tuple[library.Implementation, ...]:
    """Register both operators for CUDA tensors; the handles keep them in force."""
    cuda.KERNELS["discretize_diagonal"] = kernels
    return (
        library.implement("discretize_diagonal", "cuda", discretize),
        library.implement("discretize_diagonal_backward", "cuda", discretize_backward),
    )
