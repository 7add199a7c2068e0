"""What a user may do to a function of this library, as plain tables: name -> transformation.

A transformation takes a function of real tensors that returns a tuple of real tensors, and a point;
its result is a pytree of tensors. Tests apply it to the function under test and to the plain
reference loop, and compare.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

Function = Callable[..., tuple[Tensor, ...]]
Point = tuple[Tensor, ...]
Transform = Callable[[Function, Point], Any]

SAMPLES = (1.0, 0.9, 1.1)


def weigh(outputs: Any) -> Tensor:
    """Return a scalar that depends on every element of every output, each in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for y in tree_leaves(outputs):
        weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device)
        total = total + (torch.sin(y) * weights.reshape(y.shape)).sum()
    return total


def scalar(f: Function) -> Callable[..., Tensor]:
    return lambda *x: weigh(f(*x))


def samples(x: Point) -> Point:
    """Return a batch of different points."""
    return tuple(torch.stack([s * v for s in SAMPLES]) for v in x)


def tangents(x: Point) -> Point:
    return tuple(torch.cos(3 * v) for v in x)


def every(x: Point) -> tuple[int, ...]:
    return tuple(range(len(x)))


def leaves(x: Point) -> Point:
    return tuple(v.detach().clone().requires_grad_() for v in x)


def backward(f: Function, x: Point) -> Any:
    x = leaves(x)
    y = f(*x)
    weigh(y).backward()
    return y, [v.grad for v in x]


def double_backward(f: Function, x: Point) -> Any:
    x = leaves(x)
    first = torch.autograd.grad(weigh(f(*x)), x, create_graph=True)
    return torch.autograd.grad(weigh(first), x)


def triple_backward(f: Function, x: Point) -> Any:
    x = leaves(x)
    first = torch.autograd.grad(weigh(f(*x)), x, create_graph=True)
    second = torch.autograd.grad(weigh(first), x, create_graph=True)
    return torch.autograd.grad(weigh(second), x)


def checkpointed(f: Function, x: Point, use_reentrant: bool = False) -> Any:
    return backward(lambda *v: checkpoint(f, *v, use_reentrant=use_reentrant), x)


def per_sample_gradients(f: Function, x: Point) -> Any:
    """Gradients of the first argument, shared by all samples of the others."""
    in_dims = (None,) + (0,) * (len(x) - 1)
    return vmap(grad(scalar(f)), in_dims)(x[0], *samples(x[1:]))


def grad_of_vmap(f: Function, x: Point) -> Any:
    batched = samples(x)
    return grad(lambda *v: weigh(vmap(f)(*v)), every(x))(*batched)


def grad_of_grad(f: Function, x: Point) -> Any:
    first = grad(scalar(f), every(x))
    return grad(lambda *v: weigh(first(*v)), every(x))(*x)


def pushed(f: Callable[..., Any], x: Point) -> Any:
    return jvp(f, x, tangents(x))


def linearized(f: Function, x: Point) -> Any:
    with warnings.catch_warnings():  # torch's own constant folding, for any function
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node", UserWarning)
        y, push = linearize(f, *x)
    return y, push(*tangents(x)), push(*x)


def pulled(f: Function, x: Point) -> Any:
    y, pull = vjp(f, *x)
    return y, pull(tangents(y))


def dual_around_jvp(f: Function, x: Point) -> Any:
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(v, t) for v, t in zip(x, tangents(x), strict=True))
        pairs = tree_map(forward_ad.unpack_dual, pushed(f, duals))
        is_pair = lambda v: isinstance(v, forward_ad.UnpackedDualTensor)  # noqa: E731
        return tuple(tree_map(lambda v, i=i: v[i], pairs, is_leaf=is_pair) for i in (0, 1))


def compiled_then_double_backward(f: Function, x: Point) -> Any:
    return double_backward(torch.compile(f, fullgraph=True, backend="aot_eager"), x)


def traced(f: Function, x: Point) -> Any:
    return make_fx(grad(scalar(f), every(x)))(*x)(*tangents(x))


DERIVATIVES: dict[str, Transform] = {
    "call": lambda f, x: f(*x),
    "backward": backward,
    "double backward": double_backward,
    "triple backward": triple_backward,
    "grad": lambda f, x: grad(scalar(f), every(x))(*x),
    "grad(grad)": grad_of_grad,
    "vjp": pulled,
    "jvp": pushed,
    "jvp(jvp)": lambda f, x: pushed(lambda *v: pushed(f, v), x),
    "jvp(grad)": lambda f, x: pushed(grad(scalar(f), every(x)), x),
    "grad(jvp)": lambda f, x: grad(lambda *v: weigh(pushed(f, v)), every(x))(*x),
    "linearize": linearized,
    "jacrev": lambda f, x: jacrev(f, every(x))(*x),
    "jacfwd": lambda f, x: jacfwd(f, every(x))(*x),
}
HIGHER_DERIVATIVES: dict[str, Transform] = {
    "hessian": lambda f, x: hessian(scalar(f), every(x))(*x),
    "jacrev(jacrev)": lambda f, x: jacrev(jacrev(scalar(f), every(x)), every(x))(*x),
    "jacrev(jacfwd)": lambda f, x: jacrev(jacfwd(scalar(f), every(x)), every(x))(*x),
    "jacfwd(jacfwd)": lambda f, x: jacfwd(jacfwd(scalar(f), every(x)), every(x))(*x),
    "jacfwd(jacfwd(jacfwd))": lambda f, x: jacfwd(jacfwd(jacfwd(scalar(f))))(*x),
    "jacfwd(hessian)": lambda f, x: jacfwd(hessian(scalar(f)))(*x),
    "jacrev(jacfwd(jacfwd))": lambda f, x: jacrev(jacfwd(jacfwd(scalar(f))))(*x),
}
BATCHES: dict[str, Transform] = {
    "vmap": lambda f, x: vmap(f)(*samples(x)),
    "vmap in chunks": lambda f, x: vmap(f, chunk_size=2)(*samples(x)),
    "vmap(vmap)": lambda f, x: vmap(vmap(f))(*samples(samples(x))),
    "vmap(grad)": lambda f, x: vmap(grad(scalar(f), every(x)))(*samples(x)),
    "per-sample gradients": per_sample_gradients,
    "grad(vmap)": grad_of_vmap,
    "vmap(jvp)": lambda f, x: vmap(lambda *v: pushed(f, v))(*samples(x)),
    "jvp(vmap)": lambda f, x: pushed(vmap(f), samples(x)),
    "vmap(jacrev)": lambda f, x: vmap(jacrev(f, every(x)))(*samples(x)),
    "vmap(hessian)": lambda f, x: vmap(hessian(scalar(f), every(x)))(*samples(x)),
    "vmap(jacfwd(jacfwd))": lambda f, x: vmap(jacfwd(jacfwd(scalar(f))))(*samples(x)),
}
REWRITES: dict[str, Transform] = {
    "checkpoint": checkpointed,
    "reentrant checkpoint": lambda f, x: checkpointed(f, x, use_reentrant=True),
    "make_fx(grad)": traced,
}
# PyTorch 2.13 raises (it has no rule for a custom Function here); never may these be wrong.
RIGHT_OR_RAISES: dict[str, Transform] = {
    "functionalize": lambda f, x: functionalize(f)(*x),
    "dual numbers around jvp": dual_around_jvp,
    "double backward of a compiled function": compiled_then_double_backward,
}
TRANSFORMS: dict[str, Transform] = DERIVATIVES | HIGHER_DERIVATIVES | BATCHES | REWRITES

# Inside torch.compile(fullgraph=True).
_COMPILED = ("call", "grad", "vmap", "vmap(grad)", "per-sample gradients", "jvp", "vmap(jvp)")
_COMPILED_JACOBIANS = ("jacrev", "jacfwd", "hessian", "jacrev(jacfwd)")
# PyTorch 2.11 cannot compile the basis that Jacobians are made with, whatever the function is.
COMPILES_JACOBIANS = torch.__version__ >= (2, 13)
COMPILED = _COMPILED + (_COMPILED_JACOBIANS if COMPILES_JACOBIANS else ())
# PyTorch cannot compile these everywhere; they raise, or they are right.
COMPILED_OR_RAISES = (
    "grad(grad)",
    "jacrev(jacrev)",
    "jacfwd(jacfwd)",
    "jacfwd(jacfwd(jacfwd))",
    "vmap(hessian)",
    "checkpoint",
    *(() if COMPILES_JACOBIANS else _COMPILED_JACOBIANS),
)

# The shorter form, for every variant of every model (second derivatives have a test of their own).
ESSENTIAL = ("backward", "grad", "vmap", "vmap(grad)", "jvp")


def compiled(transform: Transform, backend: str) -> Transform:
    """Return the transformation with the whole of it, transform included, in one compiled graph."""

    def run(f: Function, x: Point) -> Any:
        return torch.compile(lambda *v: transform(f, v), fullgraph=True, backend=backend)(*x)

    return run


def compiled_function(transform: Transform, backend: str) -> Transform:
    """Return the transformation of the function compiled by itself."""

    def run(f: Function, x: Point) -> Any:
        return transform(torch.compile(f, fullgraph=True, backend=backend), x)

    return run


def assert_equal(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compare two pytrees: same structure, same dtypes, same numbers."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
