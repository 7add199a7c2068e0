# SPDX-License-Identifier: MIT
"""Options as text become values of the right type."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Sequence
from typing import Any

import torch

from lrnnx_core import registry
from lrnnx_core.registry import Model

# Given by other arguments, or by each call, and so no option of a layer's constructor.
_ELSEWHERE = frozenset(
    {
        "generator", "device", "dtype", "integration_timesteps", "lengths", "mask", "reset",
        "kernel", "discrete", "dt_scale",
    }
)  # fmt: skip


def layer_options(model: Model) -> dict[str, Any]:
    """Return the options of a model's layer with their defaults."""
    found: dict[str, Any] = {}
    for function in (model.init, model.scan):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _ELSEWHERE:
                found.setdefault(parameter.name, parameter.default)
    return found


def parse_layer_options(layer: str, texts: Sequence[str]) -> dict[str, Any]:
    """Turn ``KEY=VALUE`` texts into options of a layer.

    A value is read as JSON, else as a Python literal, else as a string.

    Raises:
        ValueError: no ``=``, a key the layer does not have or that comes twice, a value of another
            type than the default's.
    """
    model = registry.get(layer)
    return _parse(model.name, layer_options(model), texts, "--layer-option")


def _parse(owner: str, known: dict[str, Any], texts: Sequence[str], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"{where} {text!r}, expected KEY=VALUE")
        if key not in known:
            raise ValueError(
                f"{where}: {owner} has no option {key!r}; expected one of "
                f"{', '.join(sorted(known))}"
            )
        if key in found:
            raise ValueError(f"{where}: {key} is given twice")
        found[key] = _typed(where, key, _literal(value.strip()), known[key])
    return found


def parse_mixer_options(types: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Turn ``TYPE.KEY=VALUE`` texts into options of the mixers of a language model.

    Raises:
        ValueError: a type that is not among ``types``; see `parse_layer_options` for the rest.
    """
    from lrnnx_nn.mixers import ATTENTION, mixer_name

    known = [mixer_name(name) for name in types]
    grouped: dict[str, list[str]] = {}
    for text in texts:
        name, dot, option = text.partition(".")
        if not dot or "=" in name:
            raise ValueError(f"--mixer-option {text!r}, expected TYPE.KEY=VALUE")
        if mixer_name(name) not in known:
            raise ValueError(f"--mixer-option {text!r}: the mixers are {', '.join(known)}")
        grouped.setdefault(mixer_name(name), []).append(option)
    return {
        name: _parse("Attention", _attention_options(), options, "--mixer-option")
        if name == ATTENTION
        else _parse(name, layer_options(registry.get(name)), options, "--mixer-option")
        for name, options in grouped.items()
    }


def _attention_options() -> dict[str, Any]:
    from lrnnx_nn.attention import Attention

    parameters = inspect.signature(Attention).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in _ELSEWHERE
    }


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _typed(where: str, key: str, value: Any, default: Any) -> Any:
    """Return the value if it has the default's type; a default of None tells nothing."""
    if default is None or default is inspect.Parameter.empty:
        if isinstance(value, int | float | str) or value is None:
            return value
        expected = "a number or a word"
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        expected = "an integer"
    elif isinstance(default, float):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        expected = "a number"
    else:
        if isinstance(value, str):
            return value
        expected = "a word"
    raise ValueError(f"{where}: {key} = {value!r}, expected {expected}")


def parse_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason})") from error
    if device.type == "meta":
        raise ValueError("--device meta: holds no values, expected auto, cpu or cuda")
    return device
