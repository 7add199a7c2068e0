"""The projected convolution: three orders, one result; and the planner that chooses among them."""

from __future__ import annotations

import itertools
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from model_cases import CASES, Case, assert_agree, error, normal, row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrnnx_core.models import _mimo, _substates
from lrnnx_core.ops import contract, projected_convolution
from lrnnx_core.ops.contract import ORDERS, plan, traced_order

EXACT = 1e-12
every_order = pytest.mark.parametrize("order", [*ORDERS, "auto"])
COMPLEX = ["", "K", "BC", "KB", "KC", "KBC"]


def draw(*shape: int, seed: int, complex_: bool = False) -> Tensor:
    return (
        torch.view_as_complex(normal(*shape, 2, seed=seed))
        if complex_
        else normal(*shape, seed=seed)
    )


def tensors(
    length: int = 9, taps: int | None = None, batch: tuple[int, ...] = (2, 3), complex_: str = "KBC"
) -> tuple[Tensor, ...]:
    """Return u, K, B, C of 4 inputs, 5 channels, 6 outputs; ``complex_`` names the complex ones."""
    K = draw(length if taps is None else taps, 5, seed=1, complex_="K" in complex_)
    B = draw(5, 4, seed=2, complex_="B" in complex_)
    C = draw(6, 5, seed=3, complex_="C" in complex_)
    return draw(*batch, length, 4, seed=4), K, B, C


def definition(u: Tensor, K: Tensor, B: Tensor, C: Tensor) -> Tensor:
    full = torch.einsum("dj,sj,jc->sdc", C + 0j, K + 0j, B + 0j).real
    y = []
    for t in range(u.shape[-2]):
        past = u[..., : t + 1, :].flip(-2)[..., : len(K), :]
        y.append(torch.einsum("sdc,...sc->...d", full[: t + 1], past))
    return torch.stack(y, dim=-2)


# ------------------------------------------------------------------------------------ the operator


@every_order
@pytest.mark.parametrize("complex_", COMPLEX)
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 2), (9, 9), (9, 3), (9, 14), (9, 1)])
def test_every_order_is_the_definition(order: Any, complex_: str, length: int, taps: int) -> None:
    x = tensors(length, taps, complex_=complex_)
    y = projected_convolution(*x, order=order)
    assert y.dtype == torch.float64
    assert_agree(y, definition(*x), EXACT)


@every_order
@pytest.mark.parametrize("complex_", ["", "KBC"])
@pytest.mark.parametrize("batch", [(), (0,), (1, 2)], ids=str)
def test_batches_and_empty_sequences(order: Any, complex_: str, batch: tuple[int, ...]) -> None:
    x = tensors(batch=batch, complex_=complex_)
    assert_agree(projected_convolution(*x, order=order), definition(*x), EXACT)
    assert projected_convolution(x[0][..., :0, :], *x[1:], order=order).shape == (*batch, 0, 6)
    nothing = projected_convolution(x[0], x[1][:0], *x[2:], order=order)
    assert torch.equal(nothing, torch.zeros(*batch, 9, 6, dtype=torch.float64))


@every_order
def test_dtypes(order: Any) -> None:
    for complex_ in ("", "KBC"):
        x = tensors(64, complex_=complex_)
        want = definition(*x)
        low = [t.to(torch.complex64 if t.is_complex() else torch.float32) for t in x]
        y = projected_convolution(*low, order=order)
        assert y.dtype == torch.float32
        assert error(y, want) < 2e-6
        y = projected_convolution(x[0].float(), *x[1:], order=order)
        assert y.dtype == torch.float64
    half = [t.to(torch.bfloat16) for t in tensors(64, complex_="")]
    y = projected_convolution(*half, order=order)
    assert y.dtype == torch.bfloat16
    assert error(y.double(), definition(*(t.double() for t in half))) < 4e-3


@every_order
@pytest.mark.parametrize("complex_", ["", "KBC"])
def test_gradients(order: Any, complex_: str) -> None:
    x = [t.requires_grad_() for t in tensors(4, batch=(2,), complex_=complex_)]
    function = partial(projected_convolution, order=order)
    assert torch.autograd.gradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize(("order", "complex_"), [("kernel", ""), ("frequency", "KBC")])
def test_compiled_in_other_orders(order: Any, complex_: str) -> None:
    function = partial(projected_convolution, order=order)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = tensors(complex_=complex_)
    assert_agree(compiled(*x), function(*x), EXACT)


def test_exports_with_a_dynamic_batch_and_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return projected_convolution(*x)

    dim = torch.export.Dim
    u, K, B, C = tensors(batch=(2,))
    dims = (
        ({0: dim("batch", min=2), 1: dim("length", min=2)}, {0: dim("taps", min=2)}, None, None),
    )
    program = torch.export.export(Model(), (u, K, B, C), dynamic_shapes=dims, strict=False)
    x = tensors(20, batch=(5,))
    assert_agree(program.module()(*x), definition(*x), EXACT)


def test_what_does_not_fit_is_refused() -> None:
    u, K, B, C = tensors()

    def refuses(message: str, *x: Tensor, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            projected_convolution(*x, **options)

    shapes = (
        r"projected_convolution: u \(.*\), K \(.*\), B \(.*\), C \(.*\); expected \(..., L, H\)"
    )
    refuses(shapes, u[..., :3], K, B, C)
    refuses(shapes, u, K[:, :4], B, C)
    refuses(shapes, u, K, B[:4], C)
    refuses(shapes, u, K, B, C[:, :4])
    refuses(shapes, u, K[None], B, C)
    refuses(shapes, u[0, 0, 0], K, B, C)
    refuses("u has dtype torch.complex128, expected a real floating", u + 0j, K, B, C)
    refuses("u has dtype torch.int64", u.long(), K, B, C)
    refuses("B has dtype torch.int64, expected floating", u, K, B.real.long(), C)
    refuses("C is on meta and u on cpu", u, K, B, C.to("meta"))
    refuses(r"order = 'fast', expected one of \('auto', 'kernel'", u, K, B, C, order="fast")


# ------------------------------------------------------------------------------------- the planner

WIDE = (8, 1024, 64, 64, 64)  # batch, length, inputs, channels, outputs
DEEP = (64, 1024, 4, 256, 4)
SHALLOW = (32, 2048, 64, 4, 64)
BETWEEN = (4, 8192, 32, 128, 32)
SHAPES = [WIDE, DEEP, SHALLOW, BETWEEN, (1, 64, 1, 1, 1), (3, 100, 7, 5, 2), (1, 1, 2, 3, 4)]


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("is_complex", [False, True])
def test_the_cheapest_order_is_chosen_under_every_cap(sizes: Any, is_complex: bool) -> None:
    free = plan(*sizes, is_complex=is_complex)
    costs = {c.order: c.cost for c in free.candidates}
    peaks = {c.order: c.peak_bytes for c in free.candidates}
    assert set(costs) == set(ORDERS)
    assert free.order == min(costs, key=costs.__getitem__)
    assert free.reason == "cheapest"
    for cap in [*peaks.values(), *(p - 1 for p in peaks.values()), 0]:
        p = plan(*sizes, is_complex=is_complex, max_bytes=cap)
        fitting = [o for o in ORDERS if peaks[o] <= cap]
        if fitting:
            assert p.order == min(fitting, key=costs.__getitem__)
            assert p.chosen.peak_bytes <= cap
        else:
            assert p.order == min(ORDERS, key=peaks.__getitem__)
            assert "none fits" in p.reason
        named = plan(*sizes, is_complex=is_complex, max_bytes=cap, order="frequency")
        assert (named.order, named.reason) == ("frequency", "asked for")


def test_each_order_is_best_somewhere_and_transforms_count() -> None:
    assert plan(*WIDE).order == plan(*SHALLOW).order == "project"
    assert plan(*DEEP).order == "kernel"
    assert plan(*BETWEEN).order == "frequency"
    # by multiplications alone the full kernel loses here; its transforms are 32 times fewer
    batch, _, width, channels, out = sizes = (1, 4096, 8, 512, 8)
    assert width * out * (channels + batch) > batch * channels * (width + out)
    assert plan(*sizes).order == "kernel"


def test_costs_grow_with_every_size() -> None:
    for axis, is_complex in itertools.product(range(5), (False, True)):
        larger = list(WIDE)
        larger[axis] *= 2
        before = plan(*WIDE, is_complex=is_complex).candidates
        after = plan(*larger, is_complex=is_complex).candidates
        for a, b in zip(before, after, strict=True):
            assert b.cost > a.cost
            assert b.peak_bytes >= a.peak_bytes


def test_a_plan_is_made_once_from_integers() -> None:
    contract._plan.cache_clear()
    first = plan(*WIDE)
    x = [torch.empty(*WIDE[:3], device="meta"), torch.empty(1024, 64, device="meta")]
    x += [torch.empty(64, 64, device="meta")] * 2
    assert projected_convolution(*x, explain=True) is first
    assert contract._plan.cache_info().misses == 1
    assert not [v for v in tree_leaves(first) if isinstance(v, Tensor)]
    assert plan(*WIDE, itemsize=8) is not first


def test_a_plan_explains_itself() -> None:
    u, K, B, C = tensors(64)
    explained = projected_convolution(u, K, B, C, explain=True, max_bytes=10**9)
    assert explained.sizes == (6, 64, 4, 5, 6, 64, True, 8)
    text = str(explained)
    assert "batch 6, length 64, 4 -> 5 -> 6 channels, complex" in text
    assert "* cheapest under the cap, cap 953.7 MiB" in text
    lines = text.splitlines()
    assert len(lines) == 6
    for order, line in zip(ORDERS, lines[2:5], strict=True):
        assert line.startswith(order + (" *" if order == explained.order else "  "))
    assert "->" in lines[2]  # the path of the contraction


def test_bad_sizes_and_orders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"plan: .*batch=-1.*expected no negative size"):
        plan(-1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="plan: order = 'best', expected one of"):
        plan(1, 2, 3, 4, 5, order="best")


@pytest.mark.parametrize("is_complex", [False, True])
def test_the_choice_made_while_tracing_is_that_of_the_plan_where_it_matters(
    is_complex: bool,
) -> None:
    for batch, width, channels, out in itertools.product(
        (1, 8, 64), (1, 16, 128), (4, 512), (4, 64)
    ):
        p = plan(batch, contract.TRACED_LENGTH, width, channels, out, is_complex=is_complex)
        costs = {c.order: c.cost for c in p.candidates}
        chosen = traced_order(batch, width, channels, out, is_complex)
        assert costs[chosen] < 1.6 * costs[p.order]


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(
    "sizes", [(4, 256, 16, 32, 16), (1, 256, 16, 128, 16), (16, 512, 4, 64, 2)], ids=str
)
def test_the_peak_is_what_the_operators_allocate(order: Any, is_complex: bool, sizes: Any) -> None:
    batch, length, width, channels, out = sizes
    x = (
        draw(batch, length, width, seed=1),
        draw(length, channels, seed=2, complex_=is_complex),
        draw(channels, width, seed=3, complex_=is_complex),
        draw(out, channels, seed=4, complex_=is_complex),
    )
    p = plan(*sizes, is_complex=is_complex, itemsize=8, order=order)
    projected_convolution(*x, order=order)
    given = [t.untyped_storage()._cdata for t in x]
    with torch.no_grad(), Live() as live:
        live.known.update(given)
        projected_convolution(*x, order=order)
    assert 0.5 < p.chosen.peak_bytes / live.peak < 1.6, (p.chosen.peak_bytes, live.peak)


# ---------------------------------------------------------------------------------------- in models

MIMO = [
    c
    for c in CASES
    if str(c)
    in ("s5-default", "s5-bidirectional", "lru-default", "centaurus-neck", "event_ssm-default")
    or str(c) in ("centaurus-pointwise_zoh_d_out", "centaurus-neck_bidirectional")
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", MIMO, ids=str)
def test_models_convolve_in_every_order(
    case: Case, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def forced(*x: Tensor, max_bytes: int | None) -> Tensor:
        assert max_bytes is None
        taken.append(order)
        return projected_convolution(*x, order=order)

    for module in (_mimo, _substates):
        monkeypatch.setattr(module, "projected_convolution", forced)
    params, lengths = case.params(), torch.tensor([40, 17, 0])
    u, state = normal(3, 40, 3), case.state(params, (3,))
    want = case.model.scan(params, u, state, mode="recurrent")
    assert_agree(case.model.scan(params, u, state, mode="conv"), want, EXACT, "whole")
    assert len(taken) == 1 + case.bidirectional
    y, last = case.model.scan(params, u, state, mode="conv", lengths=lengths)
    for i, n in enumerate(lengths.tolist()):
        own = None if state is None else row(state, i)
        want = case.model.scan(params, u[i, :n], own, mode="recurrent")
        assert_agree((y[i, :n], row(last, i)), want, EXACT, f"row {i}")


def test_every_kind_of_model_is_among_them() -> None:
    assert len(MIMO) == 7
