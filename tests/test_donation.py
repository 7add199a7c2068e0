"""States that a captured step may overwrite: who may, who must not, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from eager_graph import pretend
from torch import Tensor

from lrnnx_core.backends.donation import donating, new_state, settled, settling
from lrnnx_nn.generation import engine

LIB = torch.library.Library("lrnnx_donation_test", "DEF")
LIB.define("fade(Tensor h, Tensor u) -> Tensor")


def fade(h: Tensor, u: Tensor) -> Tensor:
    """Compute h/2 + u as a kernel does: where h is, if that was given away."""
    return torch.add(u, h, alpha=0.5, out=new_state(h, h.shape, h.dtype))


LIB.impl("fade", fade, "CPU")
leaf = torch.ops.lrnnx_donation_test.fade.default


class Carry(NamedTuple):
    u: Tensor
    h: Tensor
    other: Tensor


def carry_of() -> Carry:
    generator = torch.Generator().manual_seed(0)
    return Carry(*(torch.randn(2, 3, generator=generator) for _ in range(3)))


def once(c: Carry) -> Carry:
    return Carry(c.u.cos(), leaf(c.h, c.u), c.other)


def through_a_view(c: Carry) -> Carry:
    return Carry(c.u.cos(), leaf(c.h.view(6).view(2, 3), c.u), c.other)


def twice(c: Carry) -> Carry:
    return Carry(c.u.cos(), leaf(c.h, c.u), leaf(c.h, c.other))


def read_afterwards(c: Carry) -> Carry:
    new = leaf(c.h, c.u)
    return Carry(c.u.cos(), torch.where(c.u > 5, c.h, new), c.other)


def read_through_a_view(c: Carry) -> Carry:
    first = c.h[0]
    new = leaf(c.h, c.u)
    return Carry(first + c.u, new, c.other)


def kept(c: Carry) -> Carry:
    return Carry(c.u.cos(), leaf(c.h, c.u), c.h)


def with_itself(c: Carry) -> Carry:
    return Carry(c.u.cos(), leaf(c.h, c.h), c.other)


@pytest.mark.parametrize(
    ("step", "given"),
    [
        (once, True), (through_a_view, True), (twice, False), (read_afterwards, False),
        (read_through_a_view, False), (kept, False), (with_itself, False),
    ],
)  # fmt: skip
def test_the_last_and_only_reader_overwrites(
    step: Callable[[Carry], Carry], given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    start, want = carry_of(), carry_of()
    _, trace = engine.record(step, start)
    assert (1 in trace.spent) == given
    for _ in range(9):
        want = step(want)
    model = torch.nn.Identity()
    got = engine.repeat(step, start, 9, lambda c: False, engine="graph", model=model)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(start, carry_of(), strict=True):
        assert torch.equal(a, b)
    (graph,) = engine._graphs[model].values()
    place = graph.carry.h.data_ptr()
    with donating(graph.given):  # pyright: ignore[reportAttributeAccessIssue]
        assert (step(graph.carry).h.data_ptr() == place) == given


def test_a_graph_that_goes_wrong_is_captured_again_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = pretend(monkeypatch)

    def hidden(c: Carry) -> Carry:  # a reader of which no trace is left
        new = leaf(c.h, c.u)
        unseen = torch.from_numpy(c.h.numpy().copy())
        return Carry(c.u.cos() + unseen, new, c.other)

    def recorded(step: Any, carry: Any) -> Any:
        after, trace = record(step, carry)
        return after, trace._replace(spent=(1,))

    record = engine.record
    monkeypatch.setattr(engine, "record", recorded)
    want = carry_of()
    for _ in range(5):
        want = hidden(want)
    model = torch.nn.Identity()
    got = engine.repeat(hidden, carry_of(), 5, lambda c: False, engine="graph", model=model)
    assert kind.made == 2
    assert all(map(torch.equal, got, want))


def test_tensors_that_share_memory_are_told_apart() -> None:
    both = torch.ones(2, 2, 3)
    _, trace = engine.record(once, Carry(both[0], both[1], torch.ones(2, 3)))
    _, apart = engine.record(once, carry_of())
    assert trace.spent == apart.spent
    assert trace.same(apart)
    assert not trace.same(apart._replace(spent=()))


def test_what_a_step_reads_and_no_operator_writes_is_settled() -> None:
    weight, count = torch.randn(3, 3), torch.zeros(2, 3)

    def step(c: Carry) -> Carry:
        made = weight * 2
        return Carry(c.u @ weight.mT + made[0] + count.add_(1), c.h, c.other)

    _, trace = engine.record(step, carry_of())
    assert [t.data_ptr() for t in trace.settled] == [weight.data_ptr()]
    assert not settled(weight)
    with settling(trace.settled):
        assert settled(weight)
        assert settled(weight[1:].mT)
        assert not settled(count)
        with settling([]):
            assert not settled(weight)
    assert not settled(weight)


def test_a_value_that_only_looks_unchanged_is_written() -> None:
    graph = object.__new__(engine.Graph)
    graph.carry = torch.tensor([1 + 2j, 3 - 4j])
    graph._write(graph.carry.conj())
    assert graph.carry.tolist() == [1 - 2j, 3 + 4j]
    assert not graph.carry.is_conj()


def test_only_what_was_given_is_overwritten() -> None:
    old, other = torch.zeros(2, 4), torch.zeros(2, 4)
    assert new_state(old, old.shape, old.dtype) is not old
    with donating([old]):
        assert new_state(old, (2, 4), torch.float32) is old
        assert new_state(other, (2, 4), torch.float32) is not other
        assert new_state(old, (4, 2), torch.float32).shape == (4, 2)
        assert new_state(old, (2, 4), torch.float64).dtype == torch.float64
        turned = old.mT
        assert new_state(turned, (4, 2), torch.float32) is not turned
        with donating([]):
            assert new_state(old, (2, 4), torch.float32) is not old
        assert new_state(old, (2, 4), torch.float32) is old
    assert new_state(old, (2, 4), torch.float32) is not old
