# SPDX-License-Identifier: MIT
"""S5, LRU and Mamba in JAX, as their users write them: an associative scan, and a step in a loop.

A call waits for its result. Numbers are lrnnx-core's own parameters, so results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrnnx_core import lru, s5


def _diagonal(model: str, params: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return A_bar, B_bar, C with the factor of the readout, D."""
    A_bar, B_bar = (s5 if model == "S5" else lru).discretize(params)
    C = torch.complex(params["C_re"], params["C_im"])
    return A_bar, B_bar, 2 * C if model == "S5" else C, params["D"]


def _arrays(tensors: Any) -> Any:
    import jax

    return jax.tree.map(lambda t: jax.numpy.asarray(t.detach().cpu().numpy()), tensors)


def _combine(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[Any, Any]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def _diagonal_layer(weights: tuple[Any, ...], u: Any) -> Any:
    import jax

    A_bar, B_bar, C, D = weights

    def one(u: Any) -> Any:
        Bu = u.astype(B_bar.dtype) @ B_bar.T
        A = jax.numpy.broadcast_to(A_bar, Bu.shape)
        _, x = jax.lax.associative_scan(_combine, (A, Bu))
        return (x @ C.T).real + D * u

    return jax.vmap(one)(u)


def _diagonal_step(weights: tuple[Any, ...], x: Any, u: Any) -> tuple[Any, Any]:
    A_bar, B_bar, C, D = weights
    x = A_bar * x + u.astype(B_bar.dtype) @ B_bar.T
    return x, (x @ C.T).real + D * u


def _mamba_parts(w: dict[str, Any], x: Any) -> tuple[Any, Any, Any]:
    import jax

    states = w["A_log"].shape[1]
    rank = w["dt_proj.weight"].shape[1]
    parts = x @ w["x_proj.weight"].T
    delta = jax.nn.softplus(parts[..., :rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    return delta, parts[..., rank : rank + states], parts[..., rank + states :]


def _mamba_layer(w: dict[str, Any], u: Any) -> Any:
    import jax
    import jax.numpy as jnp

    x, z = jnp.split(u @ w["in_proj.weight"].T, 2, axis=-1)
    taps = w["conv1d.weight"].shape[-1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    length = x.shape[1]
    conv = sum(padded[:, k : k + length] * w["conv1d.weight"][:, 0, k] for k in range(taps))
    x = jax.nn.silu(conv + w["conv1d.bias"])
    delta, B, C = _mamba_parts(w, x)
    A = -jnp.exp(w["A_log"])
    a = jnp.exp(delta[..., None] * A)
    b = (delta * x)[..., None] * B[:, :, None]
    _, h = jax.lax.associative_scan(_combine, (a, b), axis=1)
    y = (h * C[:, :, None]).sum(-1) + w["D"] * x
    return (y * jax.nn.silu(z)) @ w["out_proj.weight"].T


def _mamba_step(w: dict[str, Any], state: tuple[Any, Any], u: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    tail, h = state
    x, z = jnp.split(u @ w["in_proj.weight"].T, 2, axis=-1)
    window = jnp.concatenate([tail, x[:, None]], axis=1)
    x = jax.nn.silu((window * w["conv1d.weight"][:, 0].T).sum(1) + w["conv1d.bias"])
    delta, B, C = _mamba_parts(w, x)
    A = -jnp.exp(w["A_log"])
    h = jnp.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
    y = (h * C[:, None]).sum(-1) + w["D"] * x
    return (window[:, 1:], h), (y * jax.nn.silu(z)) @ w["out_proj.weight"].T


def _weights(model: str, layer: Any) -> Any:
    params = {k: v.detach() for k, v in layer.state_dict().items()}
    return _arrays(params if model == "Mamba" else _diagonal(model, params))


def training(model: str, layer: Any, u: Tensor) -> Callable[[], Any]:
    """Return the gradient of the sum of the outputs by weights and input."""
    import jax

    function = _mamba_layer if model == "Mamba" else _diagonal_layer
    gradient = jax.jit(jax.grad(lambda w, u: function(w, u).sum(), argnums=(0, 1)))
    weights, u = _weights(model, layer), _arrays(u)
    return lambda: jax.block_until_ready(gradient(weights, u))


def inference(model: str, layer: Any, inputs: Tensor) -> Callable[[], Any]:
    """Return the outputs of one step after the other, (L, B, H)."""
    import jax
    import jax.numpy as jnp

    weights, u = _weights(model, layer), _arrays(inputs)
    batch = u.shape[1]
    if model == "Mamba":
        width, states = weights["A_log"].shape
        taps = weights["conv1d.weight"].shape[-1]
        start = (jnp.zeros((batch, taps - 1, width)), jnp.zeros((batch, width, states)))
        step: Any = _mamba_step
    else:
        start = jnp.zeros((batch, weights[0].shape[0]), weights[0].dtype)
        step = _diagonal_step
    loop = jax.jit(lambda w, s, u: jax.lax.scan(lambda s, x: step(w, s, x), s, u)[1])
    return lambda: jax.block_until_ready(loop(weights, start, u))
