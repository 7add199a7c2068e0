# SPDX-License-Identifier: MIT
"""A network on disk: ``model.json`` (its config) and ``model.safetensors`` (its weights).

``model.json`` says under ``"architecture"`` what kind of network it is. The weights carry the
config they were saved with: config and weights of two different networks are refused, never mixed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrnnx_nn.files import read_json
from lrnnx_nn.optional import require

CONFIG, WEIGHTS = "model.json", "model.safetensors"
ARCHITECTURE = "architecture"
"""The key of ``model.json`` that names the kind of network."""
FIRST_ARCHITECTURE = "classifier"
"""What a ``model.json`` without that key holds: there was nothing else then."""

Network = TypeVar("Network", bound=nn.Module)


def save(
    folder: Path | str, architecture: str, config: Mapping[str, Any], model: nn.Module
) -> None:
    """Write config and weights; the folder is made if need be.

    Both files are complete beside the old ones before either takes its place, the config last: a
    reader finds the old network, the new one, or weights that say they are of another config.

    Args:
        folder: where to.
        architecture: what kind of network, such as ``classifier``.
        config: what JSON can hold; `load` gives it to its ``build``.
        model: its ``state_dict`` is saved.

    Raises:
        ValueError: a config that JSON cannot hold. Nothing is written.
        MissingDependencyError: safetensors is not installed. Nothing is written.
    """
    if ARCHITECTURE in config:
        raise ValueError(f"save: the config has a key {ARCHITECTURE!r} of its own")
    text = _as_json({ARCHITECTURE: architecture, **config})
    torch_format = require("safetensors.torch")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, described = _temporary(folder, WEIGHTS), _temporary(folder, CONFIG)
    try:
        torch_format.save_file(tensors, weights, metadata={"format": "pt", "config": text})
        described.write_text(text + "\n")
        for path in (weights, described):
            os.chmod(path, 0o644)
            _flush(path)
        os.replace(weights, folder / WEIGHTS)
        os.replace(described, folder / CONFIG)
    finally:
        for path in (weights, described):
            path.unlink(missing_ok=True)


def load(
    folder: Path | str,
    architecture: str,
    build: Callable[[dict[str, Any]], Network],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Network:
    """Read what `save` wrote; the network is in evaluation mode.

    Args:
        folder: where from.
        architecture: what kind of network is expected.
        build: makes the network from the config. One on the meta device takes the weights as they
            are in the file, with their dtypes; any other has them copied into its own.
        device: where the network shall be; the CPU if None.
        dtype: what it is cast to; state-space parameters stay at least float32.

    Raises:
        ValueError: not such a folder, another architecture, a bad config, a truncated or corrupt
            file, weights of another network; the message names the file.
        MissingDependencyError: safetensors is not installed.
    """
    values = load_config(folder, architecture)
    try:
        model = build(values)
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG}: {error}") from error
    load_weights(folder, model)
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    return model.eval()


def load_config(folder: Path | str, architecture: str | None = None) -> dict[str, Any]:
    """Read the config of a saved network, without its architecture.

    Raises:
        ValueError: not such a folder, an unreadable file, another architecture than the given one;
            the message names it.
    """
    path = Path(folder) / CONFIG
    values = _read(folder)
    found = values.pop(ARCHITECTURE, FIRST_ARCHITECTURE)
    if architecture is not None and found != architecture:
        raise ValueError(f"{path}: a network of kind {found!r}, expected {architecture!r}")
    return values


def load_architecture(folder: Path | str) -> str:
    """Return what kind of network a folder holds.

    Raises:
        ValueError: not such a folder, or an unreadable file; the message names it.
    """
    return _read(folder).get(ARCHITECTURE, FIRST_ARCHITECTURE)


def load_weights(folder: Path | str, model: nn.Module) -> None:
    """Read the weights of a saved network into ``model``, in place.

    A parameter on the meta device is replaced by what the file holds.

    Raises:
        ValueError: a truncated or corrupt file, one of another network, one that was saved with
            another config than ``model.json`` says; the message names it.
        MissingDependencyError: safetensors is not installed.
    """
    path = Path(folder) / WEIGHTS
    core = require("safetensors")
    tensors: dict[str, Tensor] = {}
    try:
        with core.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensors[key] = file.get_tensor(key).clone()  # not a view of the mapped file
    except (core.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: truncated or corrupt checkpoint ({error})") from error
    state = model.state_dict()
    have = {key: tuple(value.shape) for key, value in tensors.items()}
    want = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(have.keys() | want.keys()):
        if have.get(key) != want.get(key):
            raise ValueError(
                f"{path}: {key} is {have.get(key, 'absent')}, expected {want.get(key, 'absent')}"
            )
    _check_same_config(path, metadata.get("config"), _read(folder))
    model.load_state_dict(tensors, assign=any(value.is_meta for value in state.values()))


def _check_same_config(path: Path, saved: str | None, config: dict[str, Any]) -> None:
    """Refuse weights that were saved with another config (files of before say nothing)."""
    if saved is None:
        return
    ours = json.loads(saved)
    for key in sorted(ours.keys() | config.keys()):
        if ours.get(key) != config.get(key):
            raise ValueError(
                f"{path}: weights of another config, saved with {key} = {ours.get(key)!r}; "
                f"{CONFIG} says {config.get(key)!r}"
            )


def _read(folder: Path | str) -> dict[str, Any]:
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: not a saved network, it has no {name}")
    return read_json(folder / CONFIG)


def _as_json(values: Mapping[str, Any]) -> str:
    for key, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"save: {key} = {value!r} cannot be written as JSON ({error}); nothing was written"
            ) from error
    return json.dumps(dict(values), indent=2)


def _temporary(folder: Path, name: str) -> Path:
    handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    os.close(handle)
    return Path(path)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
