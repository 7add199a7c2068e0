# SPDX-License-Identifier: MIT
"""A step as a list of operator calls, which a CPU replays without the Python that led to them.

Most of what a small model's token costs on a CPU is Python: modules, checks, the choice of an
algorithm. A recorded step is a flat list of operators on numbered slots. Replayed are those alone
on which the carry after the step depends; a view of a weight is taken once, as it shows what the
weight holds later too, and so is what depends on nothing. All else is computed anew in every step,
in the order of the step, also where it depends on weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrnnx_core.backends import cpu, library
from lrnnx_core.backends.transforms import is_operator, written_arguments
from lrnnx_nn.generation._trace import (
    Call,
    NotCapturableError,
    Recording,
    Step,
    check_static,
    place_of,
    record_calls,
)
from lrnnx_nn.generation.state import same_layout, tensors

Observe = Callable[[Any], bool]
_ORDINARY = (Tensor, nn.Parameter)


class _Node(NamedTuple):
    """A call that fills slots from slots."""

    function: Callable[..., Any]
    inputs: list[int]
    outputs: slice | int
    func: Any = None
    """The operator, None for a call that builds a container."""
    written: tuple[int, ...] = ()
    """Slots among the inputs whose memory it writes to."""


class Plan:
    """The operators of a recorded step, to be called again.

    Args:
        recording: of the step.
        direct: call kernels and PyTorch's own functions, which take half a microsecond less than
            the operators' objects.

    Raises:
        NotCapturableError: the step looks at values, draws random numbers, writes to memory that
            was there before it, or does something that no operator shows.
    """

    def __init__(self, recording: Recording, direct: bool = True) -> None:
        self.trace = recording.trace
        writer = _Writer(recording, direct)
        for call in recording.calls:
            writer.write(call)
        root = writer.build(recording.after, recording.before)
        self.after = writer.after
        self._root, self._start = root, writer.start()
        self._calls = [
            (node.function, _getter(node.inputs), node.outputs) for node in _living(writer, root)
        ]

    def run(self, carry: Any, count: int, observe: Observe) -> Any:
        """Take up to ``count`` >= 1 steps, until ``observe`` is true; return the last carry."""
        slots, calls, root = self._start.copy(), self._calls, self._root
        carried, following = slice(0, len(self.after)), _getter(self.after)
        slots[carried] = [t.contiguous().resolve_conj().resolve_neg() for t in tensors(carry)]
        while True:
            for function, arguments, places in calls:
                slots[places] = function(*arguments(slots))
            count -= 1
            if observe(slots[root]) or not count:
                return slots[root]
            slots[carried] = following(slots)


def planned(step: Step, carry: Any) -> Plan:
    """Return a plan of a step that gives bit for bit what the step gives, twice in a row.

    Raises:
        NotCapturableError: see `Plan`; and the state changes its shapes, the step does not call
            the same operators every time, or the plan gives something else.
    """
    # the step before this one may have made values that layers keep from now on
    first = record_calls(step, carry)
    check_static(first.before, first.after)
    plan = Plan(first)
    second = record_calls(step, first.after)
    if not first.trace.same(second.trace):
        raise NotCapturableError("the step does not do the same every time")
    for direct in (True, False):
        plan = plan if direct else Plan(first, direct)
        got: list[Any] = []
        try:
            plan.run(carry, 2, lambda after, got=got: got.append(after))  # pyright: ignore[reportArgumentType]
        except (TypeError, RuntimeError):
            continue
        if _equal(got, [first.after, second.after]):
            return plan
    raise NotCapturableError("replayed, the step does not give what it gives")


def _equal(got: Any, wanted: Any) -> bool:
    def same(a: Tensor, b: Tensor) -> bool:
        if a.is_floating_point() or a.is_complex():
            return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        return torch.equal(a, b)

    return same_layout(got, wanted) and all(map(same, tensors(got), tensors(wanted)))


class _Writer:
    """Numbers the slots of a recording and writes down its calls."""

    def __init__(self, recording: Recording, direct: bool) -> None:
        self.direct = direct
        self.nodes: list[_Node] = []
        self.values: list[Any] = []  # of each slot, as recorded
        self.constant: list[bool] = []  # whether the slot holds that in every step
        self.free: list[bool] = []  # and whether it depends on nothing from before the step
        self.known: dict[int, int] = {}  # slots by the identity of tensors
        before = list(tensors(recording.before))
        self.before = {place_of(t) for t in before}
        self.made = set(self.before)  # memory that operators made, and the carry's
        self.outside: set[int] = set()  # and all other
        self.written = _written(recording.calls)
        for t in before:
            self._check(t)
            self.known[id(t)] = self._slot(t)
        self.after = range(0)

    def write(self, call: Call) -> None:
        """Add the calls that repeat this one, if its result can matter."""
        func, out = call.func, call.out
        given, results = list(tensors((call.args, call.kwargs))), list(tensors(out))
        _check_operator(func, given, results)
        for t in (*given, *results):
            self._check(t)
        positional = [self._operand(value) for value in call.args]
        keyword = {name: self._operand(value) for name, value in call.kwargs.items()}
        if not results:  # a question about dtypes, say; Python had the answer when it recorded
            return
        written = self._written_slots(call, positional, keyword)
        self.made.update({place_of(t) for t in results} - self.outside)
        function, inputs = _direct(func) if self.direct else func, positional
        if not all(self.free[slot] for slot in keyword.values()):
            inputs = [*positional, *keyword.values()]
            function = partial(_with_keywords, function, len(positional), tuple(keyword))
        elif keyword:
            function = partial(function, **call.kwargs)
        several = isinstance(out, tuple | list)
        outputs = self._outputs(out if several else [out])
        self._add(_Node(function, inputs, outputs if several else outputs.start, func, written))

    def build(self, after: Any, before: Any) -> int:
        """Return the slot of the carry after the step; ``after`` holds those of its tensors."""
        self.after = []
        return self._build(after, before)

    def start(self) -> list[Any]:
        """Return what the slots hold before the first step."""
        return [v if c else None for v, c in zip(self.values, self.constant, strict=True)]

    def _slot(self, value: Any, constant: bool = False, free: bool = False) -> int:
        self.values.append(value)
        self.constant.append(constant)
        self.free.append(free)
        return len(self.values) - 1

    def _operand(self, value: Any) -> int:
        """Return the slot of an argument."""
        if isinstance(value, Tensor):
            if id(value) not in self.known:
                if place_of(value) in self.made:
                    raise NotCapturableError("the step takes a view that no operator made")
                self.outside.add(place_of(value))
                self.known[id(value)] = self._slot(value, constant=True)
            return self.known[id(value)]
        if isinstance(value, list | tuple) and any(True for _ in tensors(value)):
            parts = [self._operand(part) for part in value]
            return self._container(_listed, parts, value)
        return self._slot(value, constant=True, free=True)

    def _container(self, kind: Callable[..., Any], parts: list[int], value: Any) -> int:
        slot = self._slot(value)
        self._add(_Node(kind, parts, slot))
        return slot

    def _outputs(self, results: Sequence[Any]) -> slice:
        """Return slots in a row for results; a tensor that was there before is there, too."""
        begin = len(self.values)
        for value in results:
            slot = self._slot(value)
            if isinstance(value, Tensor):
                self.known[id(value)] = slot
        return slice(begin, len(self.values))

    def _add(self, node: _Node) -> None:
        """Add a call, unless its result is the same in every step."""
        slots = _slots(node.outputs)
        free = all(self.free[slot] for slot in node.inputs)
        same = all(self.constant[slot] for slot in node.inputs)
        lasting = node.func is None or node.func.is_view or free
        touched = any(place_of(t) in self.written for i in slots for t in tensors(self.values[i]))
        if same and lasting and not node.written and not touched:
            for slot in slots:
                self.constant[slot], self.free[slot] = True, free
        else:
            self.nodes.append(node)

    def _written_slots(
        self, call: Call, positional: list[int], keyword: dict[str, int]
    ) -> tuple[int, ...]:
        slots = [
            positional[at] if at < len(positional) else keyword[name]
            for at, name in written_arguments(call.func)
            if at < len(positional) or name in keyword
        ]
        for slot in slots:
            for t in tensors(self.values[slot]):
                if place_of(t) in self.before or place_of(t) in self.outside:
                    raise NotCapturableError(
                        f"the step writes to what was there before it ({call.func.name()})"
                    )
        return tuple(slots)

    def _build(self, after: Any, before: Any) -> int:
        if isinstance(after, Tensor):
            self._check(after)
            slot = self._operand(after)
            if not after.is_contiguous() or self.free[slot]:  # a constant stays the plan's own
                copied = self._slot(after.clone(memory_format=torch.contiguous_format))
                self.nodes.append(_Node(_copied, [slot], copied))
                slot = copied
            self.after = [*self.after, slot]
            return slot
        if isinstance(after, dict):
            parts = [self._build(after[key], before[key]) for key in after]
            return self._container(partial(_mapped, tuple(after)), parts, after)
        if isinstance(after, tuple | list):
            parts = [self._build(a, b) for a, b in zip(after, before, strict=True)]
            kind = type(after)
            named = hasattr(after, "_fields")
            return self._container(kind if named else partial(_collected, kind), parts, after)
        if after is not before and after != before:
            raise NotCapturableError(f"the state changes from step to step, {before} to {after}")
        return self._slot(after, constant=True, free=True)

    def _check(self, t: Tensor) -> None:
        if type(t) not in _ORDINARY or t.device.type != "cpu" or t.layout != torch.strided:
            kind = f"{type(t).__name__} on {t.device}"
            raise NotCapturableError(f"the step works on a {kind}, expected tensors on the CPU")


def _check_operator(func: Any, given: list[Tensor], results: list[Tensor]) -> None:
    """Raise for an operator that is not repeated by calling it again."""
    if not is_operator(func):
        raise NotCapturableError(f"the step calls {func}, expected operators")
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise NotCapturableError(f"the step draws random numbers ({func.name()})")
    dynamic = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    if dynamic.intersection(func.tags) or (given and not results):
        raise NotCapturableError(f"the step looks at values ({func.name()})")


def _written(calls: list[Call]) -> set[int]:
    """Return where the memory is that operators write to."""
    found: set[int] = set()
    for func, args, kwargs, _ in calls:
        if is_operator(func):
            for at, name in written_arguments(func):
                value = args[at] if at < len(args) else kwargs.get(name)
                found.update(map(place_of, tensors(value)))
    return found


def _living(writer: _Writer, root: int) -> list[_Node]:
    """Return the calls on which the carry depends, in order."""
    wanted = {root, *writer.after}
    memory = {place_of(t) for i in wanted for t in tensors(writer.values[i])}  # that is read later
    kept: list[_Node] = []
    for node in reversed(writer.nodes):
        written = (place_of(t) for i in node.written for t in tensors(writer.values[i]))
        if wanted.isdisjoint(_slots(node.outputs)) and memory.isdisjoint(written):
            continue
        kept.append(node)
        wanted.update(node.inputs)
        memory.update(place_of(t) for i in node.inputs for t in tensors(writer.values[i]))
    return kept[::-1]


def _direct(func: Any) -> Callable[..., Any]:
    """Return what an operator comes down to on CPU tensors: its kernel, or PyTorch's function."""
    name = func.name().split("::")[1].split(".")[0]
    if func.namespace == library.NAMESPACE and cpu.in_force():
        return library.kernel(name, "cpu") or func
    if func.namespace == "aten":
        for holder, kind in ((torch, BuiltinFunctionType), (Tensor, MethodDescriptorType)):
            if isinstance(found := getattr(holder, name, None), kind):
                return found
    return func


def _slots(outputs: slice | int) -> range:
    if isinstance(outputs, int):
        return range(outputs, outputs + 1)
    return range(outputs.start, outputs.stop)


def _getter(slots: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return a function that takes these slots out of a list."""
    if len(slots) > 1:
        return itemgetter(*slots)
    begin = slots[0] if slots else 0
    return itemgetter(slice(begin, begin + len(slots)))


def _with_keywords(
    function: Callable[..., Any], positional: int, names: tuple[str, ...], *values: Any
) -> Any:
    return function(*values[:positional], **dict(zip(names, values[positional:], strict=True)))


def _copied(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _listed(*parts: Any) -> list[Any]:
    return list(parts)


def _collected(kind: Callable[..., Any], *parts: Any) -> Any:
    return kind(parts)


def _mapped(keys: tuple[Any, ...], *parts: Any) -> dict[Any, Any]:
    return dict(zip(keys, parts, strict=True))
