# SPDX-License-Identifier: MIT
"""Repeating one step many times: a plain loop, and on a CUDA device a graph that is replayed.

A step is a pure function from a carry to a carry, both states as in `lrnnx_nn.generation.state`.
A CUDA graph is recorded once for a model, the options and the shapes, and kept. It reads memory at
fixed addresses, and Python does not run when it is replayed. So before a kept graph is used, one
step runs as usual, while the operators it calls and the memory they read are written down; unless
both are what they were at the capture (weights moved, a value that a layer keeps made anew, a
changed mode), a new graph is captured.

What was written down also tells which tensors of the carry a single operator reads, and nothing
later: those the captured step gives away (`lrnnx_core.backends.donation`), and a kernel that makes
the next state writes it there instead of having it copied.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrnnx_core.backends.donation import donating
from lrnnx_nn.generation.state import map_state, same_layout, tensors

Step = Callable[[Any], Any]
Observe = Callable[[Any], bool]
ENGINES = ("auto", "loop", "graph")
KEPT_GRAPHS = 4
"""Graphs that are kept for a model, the latest ones; each holds its own buffers."""
WORTHWHILE = 8
"""Steps from which on a graph is captured unasked; a capture takes as long as several of them."""


class NotCapturableError(ValueError):
    """A step cannot run as a CUDA graph; the message says why."""


class Trace(NamedTuple):
    """What a step did: operators with their plain arguments, and the memory it read."""

    calls: list[tuple[Any, ...]]
    read: list[Tensor]
    """What was there before, the carry aside; holding it keeps its memory from being used again."""
    spent: tuple[int, ...] = ()
    """Numbers of the carry's tensors that one operator reads, once, and nothing later: it may write
    where it has read."""

    def same(self, other: Trace) -> bool:
        """Return whether a graph of one of them does what the other did."""
        return (
            self.calls == other.calls
            and self.spent == other.spent
            and _places(self.read) == _places(other.read)
        )


def _places(read: list[Tensor]) -> list[int]:
    return [_place(t) for t in read]


def _place(t: Tensor) -> int:
    """Return where a tensor's memory is; wrappers around other tensors have none of their own."""
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (RuntimeError, NotImplementedError):
        return id(t)


class _Recorder(TorchDispatchMode):
    """Writes down what runs inside of it."""

    def __init__(self, carry: Any) -> None:
        super().__init__()
        # every tensor is held, so that no address is given to another one meanwhile
        self.held: list[Tensor] = list(tensors(carry))
        self.carry = [_place(t) for t in self.held]
        self.own = set(self.carry)
        self.uses = Counter(self.carry)  # 1 here, for the carry itself
        self.trace = Trace([], [])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = (list(args), kwargs or {})
        self.trace.calls.append((func, *_plain(arguments)))
        for t in tensors(arguments):
            place = _place(t)
            if place not in self.own:
                self.own.add(place)
                self.held.append(t)
                self.trace.read.append(t)
        out = func(*args, **(kwargs or {}))
        made = {_place(t) for t in tensors(out)}
        for t in tensors(out):
            self.held.append(t)
        self.own |= made
        # a view is no reader; what it is read for is counted where that happens
        self.uses.update(place for t in tensors(arguments) if (place := _place(t)) not in made)
        return out

    def finish(self, after: Any) -> Trace:
        """Return the trace of the step that led to this carry."""
        out = {_place(t) for t in tensors(after)}
        spent = (
            i for i, place in enumerate(self.carry) if self.uses[place] == 2 and place not in out
        )
        return self.trace._replace(spent=tuple(spent))


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
    places: set[int] = set()

    def apart(t: Tensor) -> Tensor:
        t = t.contiguous()
        t = t.clone() if _place(t) in places else t
        places.add(_place(t))
        return t

    carry = map_state(apart, carry)
    with _Recorder(carry) as recorder:
        after = step(carry)
    return after, recorder.finish(after)


class Graph:
    """A step captured in a CUDA graph, and its buffers.

    Args:
        step: the function.
        carry: one it can be applied to; the buffers get its shapes.
        trace: what the step did when it was recorded with such a carry.
        donate: let operators write new states where those old ones are that nothing else reads,
            which saves a copy of each.

    Raises:
        NotCapturableError: the device refuses to capture an operator.
    """

    def __init__(self, step: Step, carry: Any, trace: Trace, donate: bool = True) -> None:
        self.trace = trace
        self.lock = threading.Lock()
        self.device = next(tensors(carry)).device
        self.carry = map_state(lambda t: t.clone(memory_format=torch.contiguous_format), carry)
        buffers = list(tensors(self.carry))
        given = [buffers[i] for i in trace.spent] if donate else []
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up outside of the capture
                step(self.carry)
            torch.cuda.current_stream().wait_stream(side)
            stream = torch.cuda.current_stream()
            try:
                with (
                    torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
                    donating(given),
                ):
                    self._write(step(self.carry))
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own as the current
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise NotCapturableError(f"the capture failed: {said[0]}") from error

    def _write(self, carry: Any) -> None:
        """Copy a carry into the buffers; parts of it may be views of other buffers."""
        buffers = {_place(t) for t in tensors(self.carry)}

        def unchanged(buffer: Tensor, value: Tensor) -> bool:
            return (
                value.data_ptr() == buffer.data_ptr()
                and value.stride() == buffer.stride()
                and not (value.is_conj() or value.is_neg())
            )

        def apart(buffer: Tensor, value: Tensor) -> Tensor:
            away = _place(value) in buffers and not unchanged(buffer, value)
            return value.clone() if away else value

        def write(buffer: Tensor, value: Tensor) -> Tensor:
            return buffer if unchanged(buffer, value) else buffer.copy_(value)

        values = map_state(apart, self.carry, carry)
        map_state(write, self.carry, values)

    def load(self, carry: Any) -> None:
        """Copy a carry into the buffers."""
        self._write(carry)

    def replay(self) -> None:
        """Take one step from what the buffers hold; they hold the carry after it then."""
        with torch.cuda.device(self.device):
            self.graph.replay()

    def snapshot(self) -> Any:
        """Return the carry in the buffers, in memory of its own."""
        return map_state(torch.clone, self.carry)


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


_graphs: weakref.WeakKeyDictionary[Any, dict[Hashable, Graph]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()
_preparing = threading.Lock()


def release_graphs(model: Any) -> None:
    """Free the CUDA graphs that generation keeps for a model, and their buffers."""
    _graphs.pop(model, None)
    _refused.pop(model, None)


def prepared(model: Any, key: Hashable, step: Step, carry: Any, trace: Trace) -> Graph:
    """Return the graph for a step: the one kept, if it still does the same, or a new one.

    A new graph is compared with the step itself once.

    Args:
        model: what graphs are kept for; not kept alive.
        key: what the step depends on besides.
        step: the function.
        carry: the one to go on from.
        trace: of the step just taken.

    Raises:
        NotCapturableError: the state changes its shapes from step to step, the step looks at
            values, its capture fails, or the graph does not give what the step gives.
    """
    with _preparing:
        kept = _graphs.setdefault(model, {})
        graph = kept.get(key)
        if graph is None or not graph.trace.same(trace):
            graph = _captured(step, carry)
        kept.pop(key, None)
        kept[key] = graph  # the latest stands last
        for old in list(kept)[:-KEPT_GRAPHS]:
            del kept[old]
        return graph


def _captured(step: Step, carry: Any) -> Graph:
    """Return a new graph, compared with the step itself."""
    # recorded again: the step before this one may have made values that layers keep from now on
    wanted, trace = record(step, carry)
    check_static(carry, wanted)
    check_blind(trace)
    for donate in (True, False) if trace.spent else (False,):
        graph = Graph(step, carry, trace, donate)
        graph.load(carry)
        graph.replay()
        if _agree(graph.carry, wanted):
            return graph
    raise NotCapturableError("replayed, the graph does not give what the step gives")


def _agree(got: Any, wanted: Any) -> bool:
    def near(a: Tensor, b: Tensor) -> bool:
        if not (a.is_floating_point() or a.is_complex()):
            return bool(torch.equal(a, b))
        tolerance = 1e-2 if a.dtype.itemsize < 4 else 1e-3
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    return all(near(a, b) for a, b in zip(tensors(got), tensors(wanted), strict=True))


def repeat(
    step: Step,
    carry: Any,
    count: int,
    observe: Observe,
    *,
    engine: str = "auto",
    model: Any = None,
    key: Hashable = None,
) -> Any:
    """Take up to ``count`` steps; return the carry after the last.

    Args:
        step: a pure function from a carry to a carry; it never writes to its argument.
        carry: the first.
        count: the largest number of steps.
        observe: called with the carry after every step; true ends the loop. It must copy what it
            keeps.
        engine: ``loop``, ``graph`` (a CUDA graph), or ``auto``: a graph on a CUDA device where the
            step can be captured, else the loop; a warning says once for a model why not.
        model: what graphs are kept for.
        key: what the step depends on besides the model and the shapes and dtypes of the carry.

    Raises:
        NotCapturableError: ``engine="graph"`` for a step that cannot be captured.
    """
    device = next(tensors(carry)).device
    if engine == "graph" and not _on_cuda(device):
        raise NotCapturableError(f'engine = "graph" on {device}, expected a CUDA device')
    if engine == "loop" or not _on_cuda(device) or count < 2:
        return _loop(step, carry, count, observe)
    kinds = ((tuple(t.shape), t.dtype, t.device) for t in tensors(carry))
    # buffers made in inference mode cannot be written to outside of it
    key = (key, torch.is_inference_mode_enabled(), *kinds)
    if engine == "auto":
        short = count < WORTHWHILE and key not in _graphs.get(model, ())
        if short or key in _refused.get(model, ()):
            return _loop(step, carry, count, observe)
    carry, trace = record(step, carry)
    if observe(carry):
        return carry
    try:
        graph = prepared(model, key, step, carry, trace)
    except NotCapturableError as error:
        if engine == "graph":
            raise
        if model not in _refused:
            warnings.warn(f"generation runs without a CUDA graph: {error}", stacklevel=3)
        _refused.setdefault(model, set()).add(key)
        return _loop(step, carry, count - 1, observe)
    if not graph.lock.acquire(blocking=False):  # in use by another thread, or by an observer
        return _loop(step, carry, count - 1, observe)
    try:
        graph.load(carry)
        for _ in range(count - 1):
            graph.replay()
            if observe(graph.carry):
                break
        return graph.snapshot()
    finally:
        graph.lock.release()


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _loop(step: Step, carry: Any, count: int, observe: Observe) -> Any:
    for _ in range(count):
        carry = step(carry)
        if observe(carry):
            break
    return carry
