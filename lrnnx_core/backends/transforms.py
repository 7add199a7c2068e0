# SPDX-License-Identifier: MIT
"""What we need to know of torch.func and torch.compile, and PyTorch does not say publicly.

Everything private to PyTorch that this library relies on stands in this file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

_innermost = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
"""Return the innermost active transform of torch.func, or None."""


def forward_mode_depth() -> int:
    """Return how many forward-mode levels (`jvp`, `jacfwd`) of torch.func are active.

    A custom ``autograd.Function`` under two of them returns wrong numbers in silence (PyTorch 2.13:
    the second derivative of x**3 is 0); with two or more the caller must run plain PyTorch.
    """
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    levels = retrieve_all_functorch_interpreters()
    return sum(level.key().name == "Jvp" for level in levels)


def differentiation_depth() -> int:
    """Return how many differentiating levels (grad, vjp, jvp) of torch.func are active."""
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    names = (level.key().name for level in retrieve_all_functorch_interpreters())
    return sum(name in ("Grad", "Jvp") for name in names)


def dual_level_active() -> bool:
    """Return whether a `torch.autograd.forward_ad.dual_level` is open."""
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def transform_active() -> bool:
    """Return whether any torch.func transform is active, or torch.compile or export is tracing."""
    return torch.compiler.is_compiling() or _innermost() is not None


def dispatch_observed() -> bool:
    """Return whether a mode or a profiler looks at the operators that are called."""
    return _modes() > 0 or _profiling()


_modes = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
_profiling = torch._C._autograd._profiler_enabled  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]


def is_operator(func: Any) -> bool:
    """Return whether what a dispatch mode sees is an operator, and none of a higher order."""
    return isinstance(func, torch._ops.OpOverload)  # pyright: ignore[reportPrivateUsage]


def written_arguments(operator: Any) -> list[tuple[int, str]]:
    """Return the places and names of the arguments that an operator writes to."""
    arguments = operator._schema.arguments
    return [
        (place, argument.name)
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def hooked(module: Any) -> bool:
    """Return whether a call of this nn.Module does more than to run its class's ``forward``."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl") is not None
        or "forward" in own
        or _any_module_hooked()
    )


def _any_module_hooked() -> bool:
    """Return whether there is a hook for all modules, such as those of FlopCounterMode."""
    module = torch.nn.modules.module  # noqa: TID251  (what PyTorch keeps of Modules, and no Module)
    return bool(module._has_any_global_hook())  # pyright: ignore[reportPrivateUsage]


def autocasting(device: torch.device) -> bool:
    """Return whether autocast is on for this kind of device."""
    # meta has no autocast; torch.amp.is_autocast_available would say so, but 2.11 cannot trace it
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: state-space arithmetic stays at least float32."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()


def current_stream_handle(device: int) -> int:
    """Return the raw handle of the stream that torch launches on, for CUDA device ``device``.

    The public `torch.cuda.current_stream` builds a Stream object, which takes microseconds.
    """
    return torch._C._cuda_getCurrentRawStream(device)  # pyright: ignore[reportPrivateUsage]


def tf32_allowed() -> bool:
    """Return whether torch multiplies float32 matrices on CUDA in TF32.

    The public `torch.backends.cuda.matmul.fp32_precision` takes seven times as long.
    """
    precision = torch._C._get_fp32_precision_getter  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    return precision("cuda", "matmul") == "tf32"


class _Positional(inspect.Signature):
    """The signature of a function that is always called with every argument, in order."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return super().bind(*args, **kwargs) if kwargs else _Bound(args)


class _Bound:
    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.kwargs: dict[str, Any] = {}

    def apply_defaults(self) -> None:
        pass


def positional_only(forward: Callable[..., Any]) -> None:
    """Spare an ``autograd.Function`` whose forward gets all its arguments in order their binding.

    ``Function.apply`` asks for the signature of forward and binds the arguments at every call; that
    takes as long as several launches of a kernel.
    """
    parameters = inspect.signature(forward).parameters.values()
    setattr(forward, "__signature__", _Positional(list(parameters)))  # noqa: B010


def allow_in_graph(function: F) -> F:
    """Mark ``function`` as one node for torch.compile, without importing its compiler now.

    ``torch.compiler.allow_in_graph`` imports ``torch._dynamo``, which takes as long as importing
    torch itself; a post-import hook does it when somebody compiles.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.allow_in_graph(function)
    else:
        _pending.append(function)
        if _hook not in sys.meta_path:
            sys.meta_path.insert(0, _hook)
    return function


_pending: list[Callable[..., Any]] = []


class _AfterDynamo(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find ``torch._dynamo`` with the ordinary finders, run it, then register what waits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # who asks for the spec need not import the module
        if spec is None or spec.loader is None:
            return None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        for function in _pending:
            torch.compiler.allow_in_graph(function)


_hook = _AfterDynamo()
