# SPDX-License-Identifier: MIT
"""Single steps on CUDA against their formulas in float64.

Run with ``pytest -m cuda tests/test_cuda_steps.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_cases import error, widen
from torch import Tensor

from lrnnx_core.backends import donation, library
from lrnnx_core.ops import _step_formulas as formulas
from lrnnx_core.ops import steps

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]

NAMES = (
    "diagonal_step", "flow_step", "siso_step", "griffin_step", "ssd_step", "s7_step", "rms_norm",
)  # fmt: skip
SCHEMES = ("mamba", "dirac", "zoh", "bilinear")
BATCHES = [(), (1,), (5,), (64,), (3, 2), (300,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATES = {"griffin_step": (2, 3, 4), "ssd_step": (1, 2), "rms_norm": ()}
"""Where a step's arguments are its states, if not at 1."""
LOW = {
    "griffin_step": (0, 1, 2, 5, 6, 7, 8, 9, 10),
    "ssd_step": (0, 1, 3, 4, 8),
    "s7_step": (0, 2),
    "rms_norm": (0, 1),
}
"""Which arguments have the activations' dtype, if not the first alone."""
Problem = tuple[str, str, tuple[Any, ...]]


def problems(batch: tuple[int, ...], size: int = 1) -> Iterator[Problem]:
    """Yield name, description and float64 arguments; ``size`` widens every axis."""
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()

    def r(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return t.to(device)

    def c(*shape: int) -> Tensor:
        return torch.complex(r(*shape), r(*shape))

    def rates(*shape: int) -> Tensor:
        return torch.complex(-r(*shape).abs(), 3 * r(*shape))

    b, (P, H, O) = batch, (7 * size, 6 * size, 5 * size)
    yield "diagonal_step", "dense D", (
        r(*b, H), c(*b, P), c(P), None, c(P, H), r(O, P), r(O, P), r(O, H), 2.0
    )  # fmt: skip
    yield "diagonal_step", "even, gain", (
        r(*b, H + 1), c(*b, 8 * size), c(8 * size), c(8 * size), c(8 * size, H + 1),
        r(H + 1, 8 * size), r(H + 1, 8 * size), r(H + 1), 1.0,
    )  # fmt: skip
    if b:
        yield "diagonal_step", "varying", (
            r(*b, H), c(*b, P), c(*b, P), c(*b, P), c(P, H), r(H, P), r(H, P), r(H), 1.0
        )  # fmt: skip
    for scheme in SCHEMES:
        for what, dt, elapsed, state_only in (
            ("steady", r(P).abs(), None, False),
            ("timed", r(*b, P).abs(), r(*b).abs(), False),
            ("state only", r(P).abs(), r(*b).abs(), True),
        ):
            yield "flow_step", f"{scheme} {what}", (
                r(*b, H), c(*b, P), rates(P), dt, elapsed, c(P, H), r(H, P), r(H, P), r(H), 2.0,
                state_only, scheme,
            )  # fmt: skip
    for M in (1, 3, 16 * size, 37):
        for rank in (1, 3):
            yield "siso_step", f"rank {rank}, {M} states", (
                r(*b, H), c(*b, H, M), c(H, M), c(*b, H, M), c(rank, H, M), c(rank, H, M),
                r(3, H, M), r(3, H, M), r(3, H), 2.0,
            )  # fmt: skip
        yield "siso_step", f"low rank, shared, {M} states", (
            r(*b, H), c(*b, H, M), c(H, M), c(H, M), c(1, H, M), c(1, H, M), r(H, M), r(H, M), r(H),
            2.0,
        )  # fmt: skip
        yield "siso_step", f"varying, {M} states", (
            r(*b, H), c(*b, H, M), c(*b, H, M), c(H, M), c(*b, 2, H, M), c(*b, 2, H, M), r(H, M),
            None, None, 1.0,
        )  # fmt: skip
        yield "siso_step", f"real, {M} states", (
            r(*b, H), r(*b, H, M), r(H, M), r(H, M), None, None, r(2, H, M), None, r(2, H), 1.0
        )  # fmt: skip
    for heads, w, state_only, start_rule, tanh, taps, timed in (
        (3, 4 * size, True, True, False, 4, True), (1, 11 * size, False, True, True, 2, False),
        (2, 8 * size, False, False, True, 1, True),
    ):  # fmt: skip
        W = heads * w
        started = (torch.arange(math.prod(b)) % 2 == 0).reshape(b)
        yield "griffin_step", f"{heads} heads, {taps} taps, start rule {start_rule}", (
            r(*b, W), r(*b, W), r(*b, taps - 1, W), r(*b, W), started, r(W, 1, taps),
            r(W) if timed else None, r(heads, w, w), r(W), r(heads, w, w), r(W), r(W).abs(),
            r(*b).abs() if timed else None, state_only, start_rule, tanh,
        )  # fmt: skip
    for before, normed, taps, N, G in (
        (True, True, 4, 17, 2), (False, True, 2, 32 * size, 1), (False, False, 1, 6, 4),
        (False, True, 4, 128, 4),
    ):  # fmt: skip
        heads, p = 4, 3 * size if N % 2 else 16 * size
        E = heads * p
        mixed = E + 2 * G * N
        yield "ssd_step", f"norm {normed} before {before}, {taps} taps, {N} states", (
            r(*b, E + mixed + heads), r(*b, taps - 1, mixed), r(*b, heads, p, N), r(mixed, 1, taps),
            r(mixed) if before else None, r(heads), -r(heads).abs(), r(heads),
            r(E) if normed else None, r(*b).abs() if taps > 1 else None, G, 0.1, 2.0, 0.9, before,
            before,
        )  # fmt: skip
    for N in (5, 16):
        yield "s7_step", f"{N} states", (r(*b, H), r(*b, N), r(2 * N + (2 * N + 1) * H, H), r(N))
    yield "rms_norm", "weighted", (r(*b, H), r(H), 1e-6)
    yield "rms_norm", "", (r(*b, 3, H), None, 1e-6)
    yield "rms_norm", "wide", (r(*b, 2048 * size), r(2048 * size), 1e-5)


def at(batch: tuple[int, ...], size: int = 1) -> list[Problem]:
    return [(n, w, a) for n, w, a in problems(batch, size)]


def cast(name: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments with activations in ``dtype`` and the rest at least float32."""
    real = torch.promote_types(dtype, torch.float32)

    def to(i: int, t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dtype == torch.bool:
            return t
        if t.is_complex():
            return t.to(torch.complex64 if real is torch.float32 else torch.complex128)
        return t.to(dtype if i in LOW.get(name, (0,)) else real)

    return tuple(to(i, t) for i, t in enumerate(arguments))


def parts(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def run(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return parts(getattr(steps, name)(*arguments))


def plain(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return parts(getattr(formulas, name)(*arguments))


def hold(name: str, what: Any, got: Any, arguments: tuple[Any, ...], wide: Any = None) -> None:
    """Hold errors against float64 to twice those of the formulas in the same dtype."""
    if wide is None:
        wide = tuple(widen(t) if isinstance(t, Tensor) else t for t in arguments)
    for g, p, w in zip(got, plain(name, arguments), plain(name, wide), strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype), (name, what)
        slack = 2e-14 if p.dtype in (torch.float64, torch.complex128) else 3e-7
        if name == "s7_step" and arguments[2].dtype in (torch.bfloat16, torch.float16):
            slack = 3e-6  # sums of matrix units
        assert error(g, w) <= 2 * error(p, w) + slack, (name, what, error(g, w), error(p, w))


def launched(name: str, batch: tuple[int, ...], entries: list[str]) -> bool:
    """Return whether a kernel of the step was launched, or none is expected."""
    gemm = name in ("diagonal_step", "flow_step") and math.prod(batch) > 256
    stem = {"flow_step": "diagonal", "rms_norm": "rms_norm"}.get(name, name.split("_", 1)[0])
    return gemm or any(e.startswith(stem) for e in entries)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_batch = pytest.mark.parametrize("batch", BATCHES, ids=str)
every_name = pytest.mark.parametrize("name", NAMES)


# ------------------------------------------------------------------------- kernels and formulas


@every_batch
@every_dtype
@every_name
def test_a_kernel_computes_its_formulas(
    name: str, dtype: torch.dtype, batch: tuple[int, ...], entries_launched: list[str]
) -> None:
    for n, what, arguments in at(batch):
        if n == name:
            entries_launched.clear()
            mine = cast(name, arguments, dtype)
            hold(name, what, run(name, mine), mine)
            assert launched(name, batch, entries_launched), (name, what)


@every_name
def test_wide_layers(name: str, entries_launched: list[str]) -> None:
    for batch in ((3,), (40,)):
        for n, what, arguments in at(batch, 16):
            if n == name:
                mine = cast(name, arguments, torch.float32)
                hold(name, what, run(name, mine), mine)
                assert launched(name, batch, entries_launched)


@every_name
def test_parameters_of_any_real_dtype(name: str) -> None:
    """Float64 parameters beside a float32 rate, bfloat16 ones beside float32 activations."""
    for n, what, arguments in at((5,)):
        if n == name:
            low = cast(name, arguments, torch.bfloat16)
            mixed = tuple(
                t.float() if i in (0, *STATES.get(name, (1,))) and isinstance(t, Tensor)
                and t.dtype == torch.bfloat16 else t for i, t in enumerate(low)
            )  # fmt: skip
            if name == "griffin_step":
                mixed = (mixed[0], mixed[1].float(), *mixed[2:])
            hold(name, what, run(name, mixed), mixed)


@every_name
def test_no_rows(name: str) -> None:
    for n, what, arguments in at((0,)):
        if n == name:
            for g, w in zip(run(n, arguments), plain(n, arguments), strict=True):
                assert (g.shape, g.dtype) == (w.shape, w.dtype), what


@every_name
def test_a_row_does_not_depend_on_the_rows_around_it(name: str) -> None:
    if name == "s7_step":
        pytest.skip("its matrix product is cuBLAS's")
    for n, what, arguments in at((29,), 3):
        if n != name:
            continue
        mine = cast(name, arguments, torch.float32)
        whole = run(name, mine)

        def row(t: Any, i: int) -> Any:
            spread = isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == 29
            return t[i : i + 1].clone() if spread else t

        for i in (0, 7, 28):
            alone = run(name, tuple(row(t, i) for t in mine))
            for g, w in zip(alone, whole, strict=True):
                assert torch.equal(g[0], w[i]), (name, what)


@every_name
def test_strides_and_lazy_bits_do_not_matter(name: str) -> None:
    def spaced(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = torch.stack([t, t], dim=-1)[..., 0]
        return t.conj().resolve_conj().conj() if t.is_complex() else t

    def within(t: Any) -> Any:  # rows of a wider tensor, as slices of a projection are
        if not isinstance(t, Tensor) or t.ndim < 2:
            return t
        return torch.cat([t.flip(-1), t, t], dim=-1)[..., t.shape[-1] : 2 * t.shape[-1]]

    for batch in ((5,), (3, 2)):
        for n, what, arguments in at(batch):
            if n == name:
                mine = cast(name, arguments, torch.float32)
                want = run(name, mine)
                for other in (spaced, within):
                    for g, w in zip(run(name, tuple(map(other, mine))), want, strict=True):
                        close = name == "s7_step" and error(g, w) < 1e-6  # a product of cuBLAS's
                        assert close or torch.equal(g, w), (name, what, other.__name__)


@every_name
@pytest.mark.parametrize("batch", [(5,), (3, 2)], ids=str)
def test_rows_that_are_one_row(name: str, batch: tuple[int, ...]) -> None:
    def shared(t: Any) -> Any:
        spread = isinstance(t, Tensor) and t.shape[: len(batch)] == batch
        return t[(0,) * len(batch)].expand(t.shape) if spread else t

    for n, what, arguments in at(batch):
        if n == name:
            mine = tuple(map(shared, cast(name, arguments, torch.float32)))
            copied = tuple(t.contiguous() if isinstance(t, Tensor) else t for t in mine)
            for g, w in zip(run(name, mine), run(name, copied), strict=True):
                assert torch.equal(g, w), (name, what)


@every_name
def test_infinities_and_nan_show_up_alike(name: str) -> None:
    for n, what, arguments in at((4,)):
        if n != name:
            continue
        mine = cast(name, arguments, torch.float32)
        u = mine[0].clone()
        u[0, ..., 0], u[1, ..., 0] = float("nan"), float("inf")
        mine = (u, *mine[1:])
        for g, w in zip(run(name, mine), plain(name, mine), strict=True):
            assert torch.equal(g[2:].isfinite(), w[2:].isfinite()), (name, what)
            assert torch.equal(g[0].isfinite(), w[0].isfinite()), (name, what)


def turn(name: str, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return the arguments of the next step, with the states that this one gave."""
    places = STATES.get(name, (1,))
    after = list(arguments)
    for place, new in zip(places, results[1:], strict=True):
        after[place] = new
    after[0] = torch.roll(arguments[0], 1, -1)
    return tuple(after)


def stable(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shrink what multiplies the state, where nothing bounds it."""
    if name == "diagonal_step":
        return (*arguments[:2], arguments[2] * 0.3, *arguments[3:])
    if name == "siso_step":
        low = [None if t is None else 0.1 * t for t in arguments[4:6]]
        return (*arguments[:2], arguments[2] * 0.3, arguments[3], *low, *arguments[6:])
    return arguments


@every_name
def test_states_carried_over_twenty_steps(name: str) -> None:
    for n, what, arguments in at((5,)):
        if n != name or name == "rms_norm":
            continue
        mine = stable(name, cast(name, arguments, torch.float32))
        theirs, wide = mine, tuple(widen(t) if isinstance(t, Tensor) else t for t in mine)
        for _ in range(20):
            got, want, exact = run(name, mine), plain(name, theirs), plain(name, wide)
            mine, theirs, wide = (
                turn(name, a, r) for a, r in ((mine, got), (theirs, want), (wide, exact))
            )
        for g, p, w in zip(got, want, exact, strict=True):
            assert error(g, w) <= 2 * error(p, w) + 1e-6, (name, what, error(g, w), error(p, w))


@every_name
@pytest.mark.parametrize("rows", [1, 12])
def test_a_state_that_is_given_away_is_overwritten(name: str, rows: int) -> None:
    for n, what, arguments in at((rows,)):
        if n != name or name == "rms_norm":
            continue
        mine = cast(name, arguments, torch.float32)
        want = run(name, mine)
        places = STATES.get(name, (1,))
        given = tuple(t.clone() if i in places else t for i, t in enumerate(mine))
        with donation.donating([given[i] for i in places]):
            got = run(name, given)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), (name, what)
        for place, new in zip(places, got[1:], strict=True):
            if new.numel():
                assert new.data_ptr() == given[place].data_ptr(), (name, what)


@every_name
def test_a_graph_replays_a_step(name: str) -> None:
    for batch in ((1,), (12,)):
        for n, what, arguments in at(batch):
            if n != name:
                continue
            mine = cast(name, arguments, torch.float32)
            want = run(name, mine)
            u = mine[0].clone()
            mine = (u, *mine[1:])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = run(name, mine)
            u.zero_()
            graph.replay()
            u.copy_(arguments[0])
            graph.replay()
            torch.cuda.synchronize()
            for g, w in zip(got, want, strict=True):
                assert error(g, w) <= 1e-6, (name, what)


@every_name
def test_the_leaf_is_the_kernel(name: str) -> None:
    for n, what, arguments in at((3,)):
        if n == name:
            mine = cast(name, arguments, torch.float32)
            leaf = getattr(torch.ops.lrnnx_core, name)
            for g, w in zip(parts(leaf(*mine)), run(name, mine), strict=True):
                assert torch.equal(g, w), what
    assert library.default(name) is getattr(formulas, name)


@every_name
def test_another_device_is_named(name: str) -> None:
    _, _, arguments = next(p for p in at((3,)) if p[0] == name)
    place = 2 if name != "rms_norm" else 1
    moved = tuple(t.cpu() if i == place else t for i, t in enumerate(arguments))
    if name == "rms_norm":
        moved = (arguments[0], torch.ones(arguments[0].shape[-1], device="cpu"), 1e-6)
    with pytest.raises(ValueError, match=rf"{name}: a tensor is on cpu"):
        run(name, moved)
