# SPDX-License-Identifier: MIT
"""What a step does, written down while it runs: the operators it calls and the memory it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrnnx_nn.generation.state import map_state, same_layout, tensors

Step = Callable[[Any], Any]


class NotCapturableError(ValueError):
    """A step cannot be replayed, from a CUDA graph or a plan; the message says why."""


class Trace(NamedTuple):
    """What a step did: operators with their plain arguments, and the memory it read."""

    calls: list[tuple[Any, ...]]
    read: list[Tensor]
    """What was there before, the carry aside; holding it keeps its memory from being used again."""
    spent: tuple[int, ...] = ()
    """Numbers of the carry's tensors that one operator reads, once, and nothing later: it may write
    where it has read."""
    settled: tuple[Tensor, ...] = ()
    """Those of `read` that no operator writes."""

    def same(self, other: Trace) -> bool:
        """Return whether a graph of one of them does what the other did."""
        return (
            self.calls == other.calls
            and self.spent == other.spent
            and _places(self.read) == _places(other.read)
        )


class Call(NamedTuple):
    """An operator that was called, with its arguments and its result themselves."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class Recording(NamedTuple):
    """A step that was written down."""

    before: Any
    """The carry that it read, contiguous."""
    after: Any
    trace: Trace
    calls: list[Call]


def _places(read: list[Tensor]) -> list[int]:
    return [place_of(t) for t in read]


def place_of(t: Tensor) -> int:
    """Return where a tensor's memory is; wrappers around other tensors have none of their own."""
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (RuntimeError, NotImplementedError):
        return id(t)


def _memory(t: Tensor) -> Tensor:
    """Return the tensor, or one that stays where it is when a parameter's memory is exchanged."""
    return t.detach() if type(t) in (Tensor, nn.Parameter) and t.numel() else t


class _Recorder(TorchDispatchMode):
    """Writes down what runs inside of it."""

    def __init__(self, carry: Any) -> None:
        super().__init__()
        # every tensor is held, so that no address is given to another one meanwhile
        self.held: list[Tensor] = list(tensors(carry))
        self.carry = [place_of(t) for t in self.held]
        self.own = set(self.carry)
        self.uses = Counter(self.carry)  # 1 here, for the carry itself
        self.written: set[int] = set()
        self.trace = Trace([], [])
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = (list(args), kwargs or {})
        self.trace.calls.append((func, *_plain(arguments)))
        places = []
        for t in tensors(arguments):
            place = place_of(t)
            places.append(place)
            if place not in self.own:
                self.own.add(place)
                self.held.append(t)
                self.trace.read.append(_memory(t))
        if func._schema.is_mutable:
            self.written.update(places)
        out = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, args, kwargs or {}, out))
        results = list(tensors(out))
        self.held += results
        made = {place_of(t) for t in results}
        self.own |= made
        # a view is no reader; what it is read for is counted where that happens
        self.uses.update(place for place in places if place not in made)
        return out

    def finish(self, after: Any) -> Trace:
        """Return the trace of the step that led to this carry."""
        out = {place_of(t) for t in tensors(after)}
        spent = (
            i for i, place in enumerate(self.carry) if self.uses[place] == 2 and place not in out
        )
        settled = (t for t in self.trace.read if place_of(t) not in self.written)
        return self.trace._replace(spent=tuple(spent), settled=tuple(settled))


def _plain(value: Any) -> list[Any]:
    """Return the arguments that are no tensors, and what kind those are that are."""
    if isinstance(value, Tensor):
        return [tuple(value.shape), value.dtype, value.device]
    if isinstance(value, dict):
        return [x for key, part in value.items() for x in (key, *_plain(part))]
    if isinstance(value, list | tuple):
        return [x for part in value for x in _plain(part)]
    return [value]


def record(step: Step, carry: Any) -> tuple[Any, Trace]:
    """Take a step; return the carry after it, and what it did with a contiguous carry.

    No two tensors of that carry share memory, as in a graph's buffers.
    """
    recording = record_calls(step, carry)
    return recording.after, recording.trace


def record_calls(step: Step, carry: Any) -> Recording:
    """Take a step as `record` does; return all that was written down, every tensor alive."""
    places: set[int] = set()

    def apart(t: Tensor) -> Tensor:
        t = t.contiguous()
        t = t.clone() if place_of(t) in places else t
        places.add(place_of(t))
        return t

    carry = map_state(apart, carry)
    with _Recorder(carry) as recorder:
        after = step(carry)
    return Recording(carry, after, recorder.finish(after), recorder.calls)


def check_blind(trace: Trace) -> None:
    """Raise if a step looks at values on the device: Python would decide at the capture alone.

    Raises:
        NotCapturableError: it does.
    """
    for func, *plain in trace.calls:
        if func.name() in _LOOKING and any(_is_cuda(value) for value in plain):
            raise NotCapturableError(f"the step looks at values ({func.name()})")


_LOOKING = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"})
"""What Python's ``float(t)``, ``bool(t)``, ``torch.equal`` and selection by a mask come down to."""


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def check_static(before: Any, after: Any) -> None:
    """Raise unless a step leaves the shapes of its carry as they are.

    Raises:
        NotCapturableError: it does not.
    """
    if same_layout(before, after):
        return
    pairs = zip(tensors(before), tensors(after), strict=False)
    changed = [(a, b) for a, b in pairs if (a.shape, a.dtype) != (b.shape, b.dtype)]
    said = "".join(
        f", a {a.dtype} of {tuple(a.shape)} becomes a {b.dtype} of {tuple(b.shape)}"
        for a, b in changed[:1]
    )
    raise NotCapturableError(f"the state changes from step to step{said}")
