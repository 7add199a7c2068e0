# SPDX-License-Identifier: MIT
"""A network on disk: ``model.json`` (its config) and ``model.safetensors`` (its weights)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrnnx_nn.files import read_json, write_atomically, write_json
from lrnnx_nn.optional import require

CONFIG, WEIGHTS = "model.json", "model.safetensors"


def save(folder: Path | str, config: Mapping[str, Any], model: nn.Module) -> None:
    """Write config and weights, each atomically; the folder is made if need be.

    Raises:
        MissingDependencyError: safetensors is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, dict(config))
    save_weights(folder, model.state_dict())


def save_weights(folder: Path | str, state: Mapping[str, Tensor]) -> None:
    """Replace the weights in a folder, atomically."""
    torch_format = require("safetensors.torch")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_atomically(Path(folder) / WEIGHTS, torch_format.save(tensors))


def load_config(folder: Path | str) -> dict[str, Any]:
    """Read the config of a saved network.

    Raises:
        ValueError: not such a folder, or an unreadable file; the message names it.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not a saved network, it has no {name}")
    return read_json(folder / CONFIG)


def load_weights(folder: Path | str, model: nn.Module) -> None:
    """Read the weights of a saved network into ``model``, in place.

    Raises:
        ValueError: a truncated or corrupt file, or one of another network; the message names it.
        MissingDependencyError: safetensors is not installed.
    """
    path = Path(folder) / WEIGHTS
    torch_format, core = require("safetensors.torch"), require("safetensors")
    try:
        tensors = torch_format.load(path.read_bytes())
    except (core.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: truncated or corrupt checkpoint ({error})") from error
    have = {key: tuple(value.shape) for key, value in tensors.items()}
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in sorted(have.keys() | want.keys()):
        if have.get(key) != want.get(key):
            raise ValueError(
                f"{path}: {key} is {have.get(key, 'absent')}, expected {want.get(key, 'absent')}"
            )
    model.load_state_dict(tensors)
