# SPDX-License-Identifier: MIT
"""How many parameters a network has, and how many operations its sequences take.

Operations are those of the recurrent form, whatever algorithm runs: one multiplication and one
addition of real numbers are two. Counted are

* ``matrix``: every product of a matrix of parameters with a token's vector, the head included, at
  2 a real entry; in attention the scores and the weighted sum, at 4 times the width of all query
  heads for each pair of a query and a key that it may see; products with matrices that S7's full
  variant makes of each token.
* ``recurrence``: of each state number the products and sums of its update h <- a h + b u and of an
  elementwise readout, and the taps of short convolutions. A complex product and sum is 8.

Not counted: what turns parameters and inputs into a and b (discretization, gates), skips D u,
norms, activations, softmax, rotations, embeddings, biases. These grow with the width alone, or are
made once a sequence. A convolution by FFT, chunked matrix products (Mamba-2) and attention kernels
that compute masked pairs take more or fewer operations than this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from lrnnx_nn.attention import Attention
from lrnnx_nn.layers import Layer

# parameters with two or more axes that multiply elementwise
_ELEMENTWISE = frozenset({"A_log", "A_raw", "A_im", "E", "log_dt"})


class Flops(NamedTuple):
    """Operations of a forward pass; a backward pass takes about twice as many."""

    matrix: int
    """Products of matrices with vectors."""
    recurrence: int
    """Elementwise recurrences, and short convolutions."""

    @property
    def total(self) -> int:
        """Both."""
        return self.matrix + self.recurrence

    def times(self, n: int) -> Flops:
        """Return n times as many."""
        return Flops(n * self.matrix, n * self.recurrence)


def parameters(model: nn.Module, without: Iterable[nn.Module] = ()) -> int:
    """Return the number of parameters, each counted once, but for those of some modules."""
    left_out = {id(p) for module in without for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


def flops(module: nn.Module, length: int, context: int = 0) -> Flops:
    """Return the operations of one sequence through a module; see the page of this module.

    Args:
        module: layers, attention and ``nn.Linear``s, anywhere inside; the rest counts nothing.
        length: tokens, at least 0.
        context: tokens before these, which attention looks back on.

    Raises:
        ValueError: a negative number, or a bidirectional layer.
    """
    for name, value in (("length", length), ("context", context)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"flops: {name} = {value!r}, expected an integer >= 0")
    if isinstance(module, Layer):
        return _layer(module).times(length)
    if isinstance(module, nn.Linear):
        return Flops(2 * module.weight.numel() * length, 0)
    parts = [flops(child, length, context) for child in module.children()]
    if isinstance(module, Attention):
        wide = module.n_heads * module.head_dim
        parts.append(Flops(4 * wide * _pairs(length, context, module.window), 0))
    return Flops(sum(p.matrix for p in parts), sum(p.recurrence for p in parts))


def _pairs(length: int, context: int, window: int | None) -> int:
    """Return how many pairs of a query and a key it may see there are."""
    free = length if window is None else min(length, max(0, window - context))
    seen = free * context + free * (free + 1) // 2  # 1 + context, 2 + context, ...
    return seen + (length - free) * (window or 0)


def _layer(layer: Layer) -> Flops:
    """Return the operations of one token."""
    options = layer._options
    if options.get("bidirectional"):
        raise ValueError(f"flops: {type(layer).__name__} is bidirectional, which is not counted")
    state, params = layer.init_state(), layer.params
    h = getattr(state, "h", state)
    elementwise = layer.model.kind == "lti" and layer.model.connectivity == "siso"
    matrices = 0 if elementwise else sum(p.numel() for k, p in params.items() if _is_matrix(k, p))
    matrix = 2 * matrices
    if layer.name == "s7" and options.get("variant") == "full":
        matrix += 4 * h.numel() * layer.d_model  # B and C of each token
    conv = sum(2 * p.numel() for k, p in params.items() if _is_convolution(k, p))
    return Flops(matrix, conv + h.numel() * _per_state(layer, h.is_complex()))


def _is_matrix(key: str, value: Tensor) -> bool:
    elementwise = key in _ELEMENTWISE or key.endswith("bias") or _is_convolution(key, value)
    return value.ndim >= 2 and not elementwise


def _is_convolution(key: str, value: Tensor) -> bool:
    return key.startswith("conv") and value.ndim == 3


def _per_state(layer: Layer, is_complex: bool) -> int:
    """Return the operations of one state number: update, elementwise input, elementwise readout."""
    update, write, read = (8, 2, 4) if is_complex else (2, 1, 2)
    if layer.name == "centaurus":
        return update + write + 2  # y = sum of E Re h, with E real
    if layer.model.connectivity == "mimo":
        return update
    if layer.name == "rglru":
        return update + write
    if layer.name == "s4":  # diagonal plus low rank: u (v . h) for each rank
        update += 16 * layer.params["P_re"].shape[0]
    return update + write + read * int(layer._options.get("channels", 1))
