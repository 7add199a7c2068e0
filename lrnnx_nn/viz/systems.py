# SPDX-License-Identifier: MIT
"""The numbers behind the pictures of linear systems, computed in float64 on the CPU.

Each function takes a network or a layer, and answers for every time-invariant layer by its module
name; or a parameter dict with the model's name and options, and answers under the model's title.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_core import frequency, registry
from lrnnx_core.registry import Model
from lrnnx_core.types import Params
from lrnnx_nn.layers.base import Layer


class System(NamedTuple):
    """A time-invariant model with its parameters and options."""

    model: Model
    params: Params
    options: dict[str, Any]

    def known(self, function: str) -> dict[str, Any]:
        """Return those options that a function of the model takes."""
        names = registry.options(self.model, function)
        return {k: v for k, v in self.options.items() if k in names}


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the time-invariant layers of a model by their module names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer) and module.model.kind == "lti"
    }


def systems_of(
    source: nn.Module | Params, model: Model | str | None = None, **options: Any
) -> dict[str, System]:
    """Return the linear systems of a network, a layer, or a parameter dict.

    Args:
        source: a module, or the parameters of a time-invariant model.
        model: what a parameter dict belongs to, or its name.
        **options: of the model's functions, for a parameter dict.

    Returns:
        Systems by module name, a layer alone under its class's name; or one by the model's title.
        Parameters are detached copies in float64 on the CPU.

    Raises:
        ValueError: a dict without a model, a module with one, an option the model does not have, a
            model that varies in time.
    """
    if isinstance(source, nn.Module):
        if model is not None or options:
            raise ValueError("a module knows its model and options; give them with parameters only")
        return {
            name or type(layer).__name__: System(layer.model, _wide(layer.params), layer._options)
            for name, layer in layers_of(source).items()
        }
    if model is None:
        raise ValueError("parameters alone do not tell their model; give model='s5' or the like")
    entry = registry.get(model) if isinstance(model, str) else model
    if entry.kind != "lti":
        raise ValueError(f"{entry.title} varies in time; expected a time-invariant model")
    registry.bind(entry.name, **options)  # refuses what the model does not have
    return {entry.title: System(entry, _wide(source), options)}


@torch.no_grad()
def eigenvalues(
    source: nn.Module | Params, model: Model | str | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the discrete eigenvalues A_bar (n,), complex, of each system; see `systems_of`."""
    return {
        name: frequency.eigenvalues(s.model, s.params, **s.known("discretize"))
        .flatten()
        .to(torch.complex128)
        for name, s in systems_of(source, model, **options).items()
    }


@torch.no_grad()
def kernels(
    source: nn.Module | Params, length: int, model: Model | str | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the causal convolution kernels of each system, time last; see `systems_of`.

    They are (channels, length) for a single-input model, (out, in, length) for a multi-input one,
    without D; of a bidirectional layer the forward half.
    """
    found: dict[str, Tensor] = {}
    for name, s in systems_of(source, model, **options).items():
        if s.model.kernel is not None:
            K = s.model.kernel(s.params, length, **s.known("kernel"))
            found[name] = _last(s, K[0] if s.options.get("bidirectional") else K)
    return found


@torch.no_grad()
def step_responses(
    source: nn.Module | Params, length: int, model: Model | str | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the responses to a unit step, D included; shapes and directions as of `kernels`."""
    found: dict[str, Tensor] = {}
    for name, s in systems_of(source, model, **options).items():
        forward = _one_way(s.known("kernel"))
        found[name] = _last(s, frequency.step_response(s.model, s.params, length, **forward))
    return found


@torch.no_grad()
def frequency_responses(
    source: nn.Module | Params, omega: Tensor, model: Model | str | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the frequency responses, complex, D and both directions included; see `systems_of`.

    Args:
        source: a module, or parameters.
        omega: (W,), radians a sample.
        model: see `systems_of`.
        **options: see `systems_of`.

    Returns:
        (channels, W) for a single-input model, (out, in, W) for a multi-input one.
    """
    omega = omega.detach().cpu().double()
    found: dict[str, Tensor] = {}
    for name, s in systems_of(source, model, **options).items():
        H = frequency.frequency_response(s.model, s.params, omega, **s.known("frequency_response"))
        found[name] = _last(s, H)
    return found


def _wide(params: Params) -> Params:
    return {k: v.detach().cpu().double() for k, v in params.items()}


def _one_way(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"bidirectional": False} if "bidirectional" in options else options


def _last(system: System, x: Tensor) -> Tensor:
    """Move time or frequency last: (L, H_out, H) -> (H_out, H, L), ([Ch,] L, H) -> (Ch H, L)."""
    if system.model.connectivity == "mimo":
        return x.movedim(-3, -1)
    return x.mT.reshape(-1, x.shape[-2])
