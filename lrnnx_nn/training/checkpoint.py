# SPDX-License-Identifier: MIT
"""The state of an unfinished run on disk: written whole, read only if it is whole."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnnx_nn.files import write_atomically

_DIGEST, _CONTENT = "digest", "content"


def save_state(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and None, in dicts and lists, atomically.

    ``torch.load(path, weights_only=True)`` returns a dict of ``content`` and its ``digest``.
    """
    content = dict(content)
    buffer = io.BytesIO()
    torch.save({_CONTENT: content, _DIGEST: digest(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path | str) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Raises:
        ValueError: no such file, or a truncated or damaged one; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        values = torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location="cpu")
        content = values[_CONTENT]
        whole = values[_DIGEST] == digest(content)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"{path}: truncated or damaged ({reason[0]})") from e
    if not whole:
        raise ValueError(f"{path}: damaged, its content does not match its digest")
    return content


def digest(value: Any) -> str:
    """Return the SHA-256 of everything in a value: tensors with dtype and shape, and the rest."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous()
        found.update(f"tensor {x.dtype} {tuple(x.shape)} ".encode())
        if x.numel():
            found.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        found.update(f"dict {len(value)} ".encode())
        for key, inside in value.items():
            found.update(f"{key!r} ".encode())
            _feed(found, inside)
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)} ".encode())
        for inside in value:
            _feed(found, inside)
    else:
        found.update(f"{value!r} ".encode())
