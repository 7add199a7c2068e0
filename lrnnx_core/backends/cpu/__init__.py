# SPDX-License-Identifier: MIT
# pyright: basic
"""Compiled CPU kernels (numba, extra ``cpu``); without one an operator runs plain PyTorch.

Nothing here imports numba: an operator's module of kernels is imported at its first call on CPU
tensors. ``compiling`` decorates kernels and keeps them on disk, ``pool`` runs them on threads,
``arrays`` shows them tensors, ``mathematics`` has exp and its like as code that vectorises.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable
from typing import Any

from lrnnx_core.backends import library

# Looked for once: torch.compile cannot trace the search (PyTorch 2.11), and models ask in a call.
_INSTALLED = importlib.util.find_spec("numba") is not None
_modules: dict[str, None] = {}  # of kernels, in the order of their registration


def installed() -> bool:
    """Return whether numba is there, without importing it."""
    return _INSTALLED


def in_force() -> bool:
    """Return whether operators run compiled now: numba is there, and nothing switches it off."""
    return installed() and not library.plain_on_cpu()


def implement(module: str, *names: str) -> tuple[library.Implementation, ...] | None:
    """Let leaf operators run compiled on CPU tensors, where numba is installed.

    Operator ``name`` runs the function ``name`` of ``lrnnx_core.backends.cpu.<module>``, which is
    imported at the first call. A module whose kernels `warm` shall compile ahead of time has a
    function ``warm()`` that calls them all on small tensors.

    Returns:
        Handles that keep the kernels in force, or None without numba.

    Raises:
        ValueError: no operator of that name.
    """
    if not installed():
        return None
    _modules[module] = None
    return tuple(library.implement(name, "cpu", deferred(module, name)) for name in names)


def modules() -> tuple[str, ...]:
    """Return the names of the registered modules of kernels."""
    return tuple(_modules)


def warm() -> int:
    """Compile every registered kernel, or load it from the cache on disk; return how many.

    Raises:
        ImportError: numba is missing or cannot be imported.
    """
    from lrnnx_core.backends.cpu import compiling

    for name in _modules:
        importlib.import_module(f"{__name__}.{name}").warm()
    return compiling.count()


def deferred(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports the kernel at its first call, and PyTorch's if it cannot."""
    found: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not found:
            found.append(_load(module, name))
        return found[0](*arguments)

    return call


_lock = threading.Lock()
_told: list[str] = []


def _load(module: str, name: str) -> Callable[..., Any]:
    try:
        importlib.import_module("numba")
    except ImportError as error:  # installed, but not for this Python or NumPy
        with _lock:
            if not _told:
                _told.append(str(error))
                warnings.warn(
                    f"lrnnx-core: numba cannot be imported ({error}); operators on CPU run plain "
                    "PyTorch",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return library.default(name)
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
