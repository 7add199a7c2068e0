# SPDX-License-Identifier: MIT
"""Compiled single steps against their formulas, and every model's step against its scan."""

import importlib
import math
import pickle
from collections.abc import Iterator
from typing import Any

import backends_both
import pytest
import torch
from backends_both import COMPILED
from model_cases import (
    CAUSAL,
    Case,
    assert_agree,
    continuous,
    error,
    every_causal_case,
    first_case,
    gaps,
    loop,
    normal,
    remembered,
    widen,
    with_continuous,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrnnx_core.backends.cpu import pool
from lrnnx_core.ops import _step_formulas, steps
from lrnnx_nn.layers import LAYERS

both_backends = backends_both.both_backends
compiled = pytest.mark.skipif(not COMPILED, reason="numba is not installed")
SCHEMES = ("mamba", "dirac", "zoh", "bilinear")
KERNELS = {
    "diagonal_step": "step_diagonal", "flow_step": "step_diagonal", "siso_step": "step_siso",
    "mamba_step": "step_mamba", "griffin_step": "step_griffin", "ssd_step": "step_ssd",
    "s7_step": "step_s7", "rms_norm": "step_norm",
}  # fmt: skip


def kernel(name: str) -> Any:
    return getattr(importlib.import_module(f"lrnnx_core.backends.cpu.{KERNELS[name]}"), name)


def problems(rows: int, size: int = 1) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yield name, description and float64 arguments; ``size`` widens every axis."""
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def c(*shape: int) -> Tensor:
        return torch.complex(r(*shape), r(*shape))

    def rates(*shape: int) -> Tensor:
        return torch.complex(-r(*shape).abs(), 3 * r(*shape))

    B, P, H, O = rows, 7 * size, 6 * size, 5 * size
    yield "diagonal_step", "dense D", (
        r(B, H), c(B, P), c(P), None, c(P, H), r(O, P), r(O, P), r(O, H), 2.0
    )  # fmt: skip
    yield "diagonal_step", "varying", (
        r(B, H), c(B, P), c(B, P), c(B, P), c(P, H), r(H, P), r(H, P), r(H), 1.0
    )  # fmt: skip
    for scheme in SCHEMES:
        yield "flow_step", f"{scheme} timed", (
            r(B, H), c(B, P), rates(P), r(B, P).abs(), r(B).abs(), c(P, H), r(H, P), r(H, P), r(H),
            2.0, False, scheme,
        )  # fmt: skip
        yield "flow_step", f"{scheme} state only", (
            r(B, H), c(B, P), rates(P), r(P).abs(), r(B).abs(), c(P, H), r(H, P), r(H, P), r(H),
            2.0, True, scheme,
        )  # fmt: skip
    for M in (3, 16 * size, 37):
        yield "siso_step", f"low rank, {M} states", (
            r(B, H), c(B, H, M), c(H, M), c(B, H, M), c(2, H, M), c(2, H, M), r(3, H, M),
            r(3, H, M), r(3, H), 2.0,
        )  # fmt: skip
        yield "siso_step", f"varying, {M} states", (
            r(B, H), c(B, H, M), c(B, H, M), c(H, M), None, None, r(H, M), None, None, 1.0
        )  # fmt: skip
        yield "siso_step", f"real, {M} states", (
            r(B, H), r(B, H, M), r(H, M), r(H, M), None, None, r(2, H, M), None, r(2, H), 1.0
        )  # fmt: skip
    E, R, K = 12 * size, 2 * size, 4
    for N, other in ((5, True), (16 * size, False), (19, True)):
        for scheme in SCHEMES:
            yield "mamba_step", f"{scheme}, {N} states", (
                r(B, 2 * E), r(B, K - 1, E), r(B, E, N), r(E, 1, K), r(E) if other else None,
                r(R + 2 * N, E), r(E, R), r(E), -r(E, N).abs(), r(E),
                r(E).abs() if other else None, r(B).abs(), r(R), r(N), None, 0.7, other, other,
                scheme,
            )  # fmt: skip
    W, heads = 12 * size, 3
    for state_only, start_rule, tanh in ((True, True, False), (False, True, True)):
        w = W // heads
        yield "griffin_step", f"start rule, tanh {tanh}", (
            r(B, W), r(B, W), r(B, 3, W), r(B, W), torch.arange(B) % 2 == 0, r(W, 1, 4), r(W),
            r(heads, w, w), r(W), r(heads, w, w), r(W), r(W).abs(), r(B).abs(), state_only,
            start_rule, tanh,
        )  # fmt: skip
    for before, normed in ((True, True), (False, True), (False, False)):
        heads, p, N, G = 4, 3 * size, 17, 2
        E = heads * p
        mixed = E + 2 * G * N
        yield "ssd_step", f"norm {normed}, before the gate {before}", (
            r(B, E + mixed + heads), r(B, 3, mixed), r(B, heads, p, N), r(mixed, 1, 4), r(mixed),
            r(heads), -r(heads).abs(), r(heads), r(E) if normed else None, r(B).abs(), G, 0.1, 2.0,
            0.9, before, before,
        )  # fmt: skip
    yield "s7_step", "", (r(B, H), r(B, 5), r(2 * 5 + 11 * H, H), r(5))
    yield "rms_norm", "weighted", (r(B, H), r(H), 1e-6)
    yield "rms_norm", "", (r(B, 3, H), None, 1e-6)


PROBLEMS = list(problems(5))
every_problem = pytest.mark.parametrize(
    ("name", "arguments"), [pytest.param(n, a, id=f"{n}-{what}") for n, what, a in PROBLEMS]
)


def narrow(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    def to(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dtype == torch.bool:
            return t
        return t.to(torch.complex64 if t.is_complex() else torch.float32)

    return tuple(to(t) for t in arguments)


def parts(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


# ------------------------------------------------------------------------- kernels and formulas


@compiled
@every_problem
def test_a_kernel_computes_its_formulas(name: str, arguments: tuple[Any, ...]) -> None:
    want = parts(getattr(_step_formulas, name)(*arguments))
    for got, w in zip(parts(kernel(name)(*arguments)), want, strict=True):
        assert got.dtype == w.dtype
        assert error(got, w) < 1e-14
    single = narrow(arguments)
    wide = tuple(widen(t) if isinstance(t, Tensor) else t for t in single)
    exact = parts(getattr(_step_formulas, name)(*wide))
    plain = parts(getattr(_step_formulas, name)(*single))
    for got, p, w in zip(parts(kernel(name)(*single)), plain, exact, strict=True):
        assert got.dtype == p.dtype
        assert error(got, w) <= 2 * error(p, w) + 3e-7


@compiled
@pytest.mark.parametrize("rows", [0, 1, 64])
def test_a_kernel_takes_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "workers", lambda items, nanoseconds: max(1, min(3, items)))
    for name, what, arguments in problems(rows, 4):
        want = parts(getattr(_step_formulas, name)(*arguments))
        for got, w in zip(parts(kernel(name)(*arguments)), want, strict=True):
            assert error(got, w) < 1e-13, (name, what)


@compiled
@every_problem
def test_strides_and_lazy_bits_do_not_matter(name: str, arguments: tuple[Any, ...]) -> None:
    def other(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        spaced = torch.stack([t, t], dim=-1)[..., 0]
        return spaced.conj().resolve_conj().conj() if t.is_complex() else spaced

    got, want = kernel(name)(*map(other, arguments)), kernel(name)(*arguments)
    for g, w in zip(parts(got), parts(want), strict=True):
        assert torch.equal(g, w)


@compiled
@every_problem
def test_infinities_and_nan_show_up_alike(name: str, arguments: tuple[Any, ...]) -> None:
    single = narrow(arguments)
    u = single[0].clone()
    u[0, ..., 0], u[1, ..., 0] = float("nan"), float("inf")
    single = (u, *single[1:])
    got, want = kernel(name)(*single), getattr(_step_formulas, name)(*single)
    for g, w in zip(parts(got), parts(want), strict=True):
        assert torch.equal(g[2:].isfinite(), w[2:].isfinite())
        assert torch.equal(g[0].isfinite(), w[0].isfinite())


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@compiled
@every_problem
def test_who_looks_on_sees_one_operator(name: str, arguments: tuple[Any, ...]) -> None:
    operator = getattr(steps, name)
    with torch.no_grad():
        want = operator(*arguments)
        with Seen() as seen:
            got = operator(*arguments)
    assert seen.names == [f"lrnnx_core::{name}"]
    for g, w in zip(parts(got), parts(want), strict=True):
        assert torch.equal(g, w)


@every_problem
def test_the_fake_has_the_shapes_of_the_kernel(name: str, arguments: tuple[Any, ...]) -> None:
    leaf = getattr(torch.ops.lrnnx_core, name)
    want = parts(leaf(*arguments))
    meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    for g, w in zip(parts(leaf(*meta)), want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)


@every_problem
def test_a_step_that_is_differentiated_is_made_of_pieces(
    name: str, arguments: tuple[Any, ...]
) -> None:
    def real(t: Any) -> bool:
        return isinstance(t, Tensor) and t.is_floating_point()

    leaves = [t.clone().requires_grad_() for t in arguments if real(t)]
    given = iter(leaves)
    mixed = [next(given) if real(t) else t for t in arguments]
    results = parts(getattr(steps, name)(*mixed))
    total = sum(t.abs().square().sum() for t in results if t.dtype != torch.bool)
    got = torch.autograd.grad(total, leaves, allow_unused=True)
    assert got[0] is not None
    assert all(g is None or bool(g.isfinite().all()) for g in got)


@compiled
def test_bfloat16_activations_keep_a_float32_state() -> None:
    for name in ("siso_step", "mamba_step", "griffin_step", "ssd_step", "diagonal_step"):
        arguments = narrow(next(a for n, _, a in PROBLEMS if n == name))
        low = [t.bfloat16() if i == 0 else t for i, t in enumerate(arguments)]
        got, want = kernel(name)(*low), getattr(_step_formulas, name)(*low)
        assert parts(got)[0].dtype == torch.bfloat16
        for g, w in zip(parts(got), parts(want), strict=True):
            assert g.dtype == w.dtype
            assert error(g, w) < 0.01


@compiled
def test_warming_up_compiles_what_a_step_needs() -> None:
    for module in set(KERNELS.values()):
        importlib.import_module(f"lrnnx_core.backends.cpu.{module}").warm()


# ------------------------------------------------------------------------------------- models


@every_causal_case
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "three"])
def test_a_step_is_a_sample_of_a_scan(
    case: Case, batch: tuple[int, ...], both_backends: str
) -> None:
    for dtype, rtol in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        params = case.params(dtype=dtype)
        u, state = normal(*batch, 5, 3, dtype=dtype), case.state(params, batch)
        timesteps = gaps(*batch, 5, dtype=dtype) if case.timed else None
        for elapsed in {None, timesteps}:
            options = {} if elapsed is None else {"integration_timesteps": elapsed}
            with torch.no_grad():
                got = loop(case.model, params, u, state, elapsed)
                want = case.model.scan(params, u, state, mode="recurrent", **options)
            assert_agree(got, want, rtol, f"{both_backends} {dtype}")


@every_causal_case
def test_a_step_maps_and_differentiates_like_its_formulas(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = case.params()
    u, state = normal(3, 3), case.state(params, (3,))
    with torch.no_grad():
        want = case.model.step(params, u, state)
        mapped = torch.func.vmap(lambda u, s: case.model.step(params, u, s))(u, state)
    assert_agree(mapped, want, 1e-11)

    def total(u: Tensor, *parts: Tensor) -> Tensor:
        y, new = case.model.step(params, u, with_continuous(state, parts))
        return y.square().sum() + sum(t.abs().square().sum() for t in remembered(new))

    arguments = (u, *continuous(state))
    places = tuple(range(len(arguments)))
    got = torch.func.grad(total, places)(*arguments)
    leaves = [t.clone().requires_grad_() for t in arguments]
    again = torch.autograd.grad(total(*leaves), leaves)
    monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    plain = torch.func.grad(total, places)(*arguments)
    assert_agree(got, plain, 1e-11)
    assert_agree(tuple(again), plain, 1e-11)


@first_case
def test_states_and_times_of_fewer_axes_are_spread(case: Case, both_backends: str) -> None:
    if not case.timed:
        pytest.skip("takes no time steps")
    params = case.params()
    u, state = normal(2, 3, 3), case.state(params, (2, 3))
    with torch.no_grad():
        for shape in ((), (3,), (2, 1)):
            elapsed = (gaps(6, seed=5) + 0.5)[: math.prod(shape)].reshape(shape)
            got = case.model.step(params, u, state, integration_timestep=elapsed)
            spread = elapsed.expand(2, 3)
            want = case.model.step(params, u, state, integration_timestep=spread)
            assert_agree(got, want, 1e-12)


def layer_of(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    params = case.params(dtype=dtype)
    d_state = max(8, 2 * case.choices.get("blocks", 1))
    layer = LAYERS[case.entry.name](3, d_state, dtype=dtype, **case.choices)
    layer.load_state_dict(params)
    return layer.eval()


@every_causal_case
def test_a_layer_that_keeps_values_steps_like_the_model(case: Case) -> None:
    layer = layer_of(case, torch.float64)
    u, state = normal(2, 3), layer.init_state((2,))
    with torch.inference_mode():
        for _ in range(3):
            got = layer.step(u, state)
            want = case.model.step(layer.params, u, state)
            assert_agree(got, want, 1e-11)
            state = got[1]
    copy = pickle.loads(pickle.dumps(layer))
    with torch.no_grad():
        fresh = layer.init_state((2,))
        assert_agree(copy.step(u, fresh), layer.step(u, fresh), 0)


@first_case
def test_nothing_of_an_old_step_outlives_a_parameter(case: Case) -> None:
    layer = layer_of(case, torch.float64)
    u, state = normal(2, 3), layer.init_state((2,))
    times = [{}, {"integration_timestep": gaps(2) + 0.5}][: 1 + case.timed]
    with torch.no_grad():
        for seed in range(3):
            for key, value in layer.params.items():
                value.mul_(1.0 + 0.1 * (seed + len(key) % 3))
            for options in times:
                got = layer.step(u, state, **options)
                assert_agree(got, case.model.step(layer.params, u, state, **options), 1e-11)


def test_the_cases_are_all_models() -> None:
    assert {c.entry.name for c in CAUSAL} == set(LAYERS)
