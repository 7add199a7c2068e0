# SPDX-License-Identifier: MIT
# pyright: basic
"""Decorators for kernels: how they are compiled, and where machine code is kept between processes.

numba looks at a function's own file to tell whether its code on disk is current, and so misses a
change in another file that the function calls. Here the folder's name holds a hash of the file and
of all files of this package which it imports, directly or not. Where no folder can be written,
kernels are compiled in every process; nobody is told, since results are the same.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import caching
from numba.misc.appdirs import AppDirs

FASTMATH = {"reassoc", "contract"}  # infinities and NaN stay what they are
_PACKAGE = __name__.split(".", maxsplit=1)[0]
_kernels: list[Any] = []


def jit(function: Callable[..., Any]) -> Any:
    """Compile a kernel: without the GIL, with vectorised divisions and sums, kept on disk."""
    kernel: Any = numba.njit(nogil=True, error_model="numpy", fastmath=FASTMATH)(function)
    # Without a folder, or with another numba inside: compiled in each process.
    with contextlib.suppress(AttributeError, OSError, RuntimeError, TypeError):
        kernel._cache = _Cache(function)
    _kernels.append(kernel)
    return kernel


# A function that only compiled ones call does without the code by which Python and C call it: that
# takes as long to compile as a short function itself.
_INSIDE: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


def inline(function: Callable[..., Any]) -> Any:
    """Compile arithmetic that only kernels call, pasted into each; sums keep their order."""
    return numba.njit(fastmath={"contract"}, forceinline=True, **_INSIDE)(function)


def routine(function: Callable[..., Any]) -> Any:
    """Compile a loop that kernels call, once for all its callers."""
    return numba.njit(fastmath=FASTMATH, **_INSIDE)(function)


def paste(function: Callable[..., Any]) -> Any:
    """Paste a loop into the kernel's own code before types are known: one piece to optimise."""
    return numba.njit(fastmath=FASTMATH, inline="always", **_INSIDE)(function)


def count() -> int:
    """Return how many variants of kernels this process has ready."""
    return sum(len(kernel.signatures) for kernel in _kernels)


def compiled() -> int:
    """Return how many of them it compiled, and did not find on disk."""
    return sum(sum(kernel.stats.cache_misses.values()) for kernel in _kernels)


def cache_folder() -> Path | None:
    """Return the folder in which compiled kernels are kept, None where none can be written."""
    return next((folder for folder in _bases() if _writable(folder)), None)


def _bases() -> list[Path]:
    """Return where a folder may stand: where numba is told to, beside the code, the user's own."""
    here = Path(__file__).resolve().parent
    # The folder's path tells installations apart, which may differ in their dependencies.
    name = f"{_PACKAGE}-{hashlib.sha256(str(here).encode()).hexdigest()[:12]}"
    user = AppDirs(appname="numba", appauthor=False).user_cache_dir
    told = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    bases = [here / "__pycache__" / "numba", Path(user) / name]
    return [Path(told) / name, *bases] if told else bases


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def _sources(name: str) -> frozenset[Path]:
    """Return the files of a module of this package and of what it imports from the package."""
    found: dict[str, Path] = {}
    wanted = [name]
    while wanted:
        module = wanted.pop()
        if module in found:
            continue
        path = _file(module)
        if path is None:
            continue
        found[module] = path
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                wanted += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(found.values())


@functools.cache
def _file(module: str) -> Path | None:
    """Return the source of a module of this package, None for another name."""
    if module.split(".", maxsplit=1)[0] != _PACKAGE:
        return None
    loaded = sys.modules.get(module)
    if loaded is not None:
        origin = getattr(loaded, "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # module.alias, where the alias is a function
            return None
        origin = None if spec is None else spec.origin
    return None if origin is None else Path(origin)


@functools.cache
def fingerprint(name: str) -> str:
    """Return a hash of everything of this package that a kernel of module ``name`` can depend on.

    Raises:
        OSError: a source cannot be read.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(_sources(name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _drop_old(folder: Path) -> None:
    """Delete what other versions of the module left more than a day ago."""
    module = folder.name.rsplit("-", maxsplit=1)[0]
    for other in folder.parent.glob(f"{module}-*"):
        with contextlib.suppress(OSError):
            if other.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(other, ignore_errors=True)


class _Locator(caching._CacheLocator):
    """Tells numba where one function's code is kept."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._line = function.__code__.co_firstlineno
        self._py_file = function.__code__.co_filename
        self._stamp = fingerprint(function.__module__)
        module = function.__module__.rsplit(".", maxsplit=1)[-1]
        folders = [base / f"{module}-{self._stamp}" for base in _bases()]
        # A folder that cannot be written serves too, if somebody else filled it.
        usable = (f for f in folders if f.is_dir() or _writable(f.parent))
        folder = next(usable, None)
        if folder is None:
            raise OSError("no folder for compiled kernels")
        self._folder = folder

    def ensure_cache_path(self) -> None:
        if not self._folder.is_dir():
            _drop_old(self._folder)
        super().ensure_cache_path()

    def get_cache_path(self) -> str:
        return os.fspath(self._folder)

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(caching.CompileResultCacheImpl):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(function)
        self._filename_base = self.get_filename_base(function.__qualname__, "")


_UNREADABLE = (OSError, EOFError, ValueError, AttributeError, ImportError, pickle.PickleError)


class _Cache(caching.FunctionCache):
    """numba's own, but no trouble with the disk reaches the caller."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except _UNREADABLE:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            try:
                super().save_overload(sig, data)
            except _UNREADABLE:  # a damaged index: written anew
                self.flush()
                super().save_overload(sig, data)
