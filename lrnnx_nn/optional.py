# SPDX-License-Identifier: MIT
"""Packages that only some functions need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any


class MissingDependencyError(ImportError):
    """An optional package is absent; the message names the pip line that brings it."""


def pip_line(extra: str) -> str:
    """Return the command that installs one of this package's extras."""
    return f'pip install "lrnnx-core[{extra}]"'


def require(module: str, extra: str = "demo") -> Any:
    """Import an optional module.

    Args:
        module: its dotted name.
        extra: the extra of this package that brings it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingDependencyError(f"{top} is not installed: {pip_line(extra)}") from error
