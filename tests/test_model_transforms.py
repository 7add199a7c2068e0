"""The table of transformations in its shorter form, over every variant of every model, every mode.

The function under test is `scan` with its parameters, input and initial state as variables; the
expected numbers are those of the same transformation of ``mode="recurrent"``, the plain loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transform_table as table
from model_cases import (
    CASES,
    FIRST,
    ONE_A_KIND,
    Case,
    continuous,
    every_case,
    every_timed_case,
    gaps,
    normal,
    row,
    with_continuous,
)
from op_cases import as_real
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from lrnnx_core import registry
from lrnnx_core.types import Number

L, H, N = 5, 2, 4
TOLERANCE = 1e-9
LOOP = "recurrent"


def modes(case: Case) -> list[str]:
    return [mode for mode in case.entry.modes if mode not in (LOOP, "auto")]


every_mode = pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(c, m, id=f"{c}-{m}") for c in CASES for m in modes(c)],
)
# What is dear runs for one causal variant of each model, and for the others if slow.
every_mode_if_cheap = pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(
            c, m, id=f"{c}-{m}", marks=() if c.invariant or c in FIRST else pytest.mark.slow
        )
        for c in CASES
        for m in modes(c)
    ],
)
one_a_kind = pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(c, m, id=f"{c}-{m}", marks=() if c in ONE_A_KIND else pytest.mark.exhaustive)
        for c in CASES
        for m in modes(c)
    ],
)
first_variants = pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(c, m, id=f"{c}-{m}", marks=() if c in FIRST else pytest.mark.exhaustive)
        for c in CASES
        for m in modes(c)
    ],
)


def numeric_options(case: Case, function: str) -> list[str]:
    """Return the options annotated as `Number`: differentiable, and vmap may run over them."""
    signature = inspect.signature(getattr(case.entry, function), eval_str=True)
    bound = set(case.choices) | {"alpha"}
    options = [
        p.name
        for p in signature.parameters.values()
        if p.annotation in (Number, Number | None) and p.name not in bound
        if case.takes(function, p.name)
    ]
    if case.scheme == "gbt" and "alpha" in signature.parameters:
        options.append("alpha")
    return options


def problem(case: Case, mode: str, timed: bool = False) -> tuple[table.Function, table.Point]:
    """Return scan as a function of (input, state, [gaps,] parameters ...) and a point."""
    params = case.params(H, N)
    keys = list(params)
    state = case.state(params)
    starts = [] if state is None else continuous(state)
    given = [normal(L, H), *map(as_real, starts)]
    if timed:
        given.append(gaps(L) + 0.1)

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        rest = list(x[1 : len(given)])
        parts = [rest.pop(0) for _ in starts]
        parts = [
            torch.complex(*x.unbind(-1)) if part.is_complex() else x
            for x, part in zip(parts, starts, strict=True)
        ]
        first = None if state is None else with_continuous(state, parts)
        options = {"integration_timesteps": rest.pop(0)} if timed else {}
        p = dict(zip(keys, x[len(given) :], strict=True))
        y, last = case.model.scan(p, x[0], first, mode=mode, **options)
        return y, *map(as_real, continuous(last))

    return function, (*given, *params.values())


def expect_same(case: Case, mode: str, name: str, wrap: Any = None, timed: bool = False) -> None:
    transform = table.TRANSFORMS[name]
    f, x = problem(case, mode, timed)
    loop, _ = problem(case, LOOP, timed)
    got = (transform if wrap is None else wrap(transform, "aot_eager"))(f, x)
    table.assert_equal(got, transform(loop, x), TOLERANCE)


@pytest.mark.parametrize("name", table.ESSENTIAL)
@every_mode
def test_transform(case: Case, mode: str, name: str) -> None:
    expect_same(case, mode, name)


@every_mode_if_cheap
def test_second_derivatives_in_every_nesting(case: Case, mode: str) -> None:
    """Along one random direction of all variables at once, which keeps them cheap."""

    def along(mode: str) -> Callable[[Tensor], Tensor]:
        f, x = problem(case, mode)
        direction = table.tangents(x)
        return lambda s: table.weigh(f(*(v + s * d for v, d in zip(x, direction, strict=True))))

    zero = torch.zeros((), dtype=torch.float64)
    expected = grad(grad(along(LOOP)))(zero)
    for nesting in (
        lambda f: grad(grad(f)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
    ):
        table.assert_equal(nesting(along(mode))(zero), expected, TOLERANCE)
    third = jacfwd(jacfwd(jacfwd(along(mode))))(zero)
    table.assert_equal(third, grad(grad(grad(along(LOOP))))(zero), TOLERANCE)


@pytest.mark.parametrize("name", ["hessian", "jacfwd(jacfwd)", "vmap(jvp)", "double backward"])
@first_variants
def test_transform_over_every_variable(case: Case, mode: str, name: str) -> None:
    expect_same(case, mode, name)


@every_timed_case
def test_gradients_with_irregular_time_steps(case: Case) -> None:
    for name in ("backward", "vmap(grad)", "jvp"):
        expect_same(case, "scan", name, timed=True)


# ---------------------------------------------------------------- numeric options

VALUES = {"alpha": (0.5, 0.7, 1.0)}
ANY = (0.5, 1.0, 1.7)


@every_mode
def test_vmap_grad_and_jvp_over_every_numeric_option_of_scan(case: Case, mode: str) -> None:
    params, u = case.params(H, N), normal(L, H)
    options = numeric_options(case, "scan")
    assert case.takes("scan", "dt_scale") == ("dt_scale" in options)
    for option in options:
        floats = VALUES.get(option, ANY)
        values = torch.tensor(floats, dtype=torch.float64)
        # alpha of a gbt variant is bound already; the entry itself takes it as an argument
        bound = {k: v for k, v in case.choices.items() if k != option}
        model = registry.bind(case.entry.name, **bound)

        def run(value: Number, mode: str = mode, option: str = option, model: Any = model) -> Any:
            y, state = model.scan(params, u, mode=mode, **{option: value})
            return y, *map(as_real, continuous(state))

        def loop(value: Number, run: Any = run) -> Any:
            return run(value, LOOP)

        swept = vmap(run)(values)
        each = [loop(v) for v in floats]
        expected = tuple(torch.stack(column) for column in zip(*each, strict=True))
        table.assert_equal(swept, expected, TOLERANCE)
        slope = jacfwd(lambda v, loop=loop: table.weigh(loop(v)))
        expected = torch.stack([slope(v) for v in values])
        got = vmap(grad(lambda v, run=run: table.weigh(run(v))))(values)
        table.assert_equal(got, expected, TOLERANCE)
        pushed = [jvp(f, (values[0],), (torch.ones_like(values[0]),)) for f in (run, loop)]
        table.assert_equal(*pushed, TOLERANCE)


@every_case
def test_vmap_and_derivative_over_every_numeric_option_of_init(case: Case) -> None:
    for option in numeric_options(case, "init"):
        default = inspect.signature(case.entry.init).parameters[option].default
        default = default if default else 0.3  # r_min = 0
        # one of a pair of bounds stays on its side of the other
        factors = (0.95, 0.97, 0.99) if 0.5 < default < 1 else (0.5, 0.8, 0.95)
        values = torch.tensor(factors, dtype=torch.float64) * default
        bound = registry.bind(
            case.entry.name, **{k: v for k, v in case.variant.init.items() if k != option}
        )

        def make(value: Number, option: str = option, bound: Any = bound) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(0)
            return bound.init(H, N, generator=generator, dtype=torch.float64, **{option: value})

        swept = vmap(make, randomness="same")(values)
        for i, value in enumerate(values.tolist()):
            table.assert_equal({k: v[i] for k, v in swept.items()}, make(value))
        derivative = jacfwd(make, randomness="same")(values[1])
        step = 1e-6 if default > 0.01 else 1e-4 * default
        above, below = make(values[1].item() + step), make(values[1].item() - step)
        for key, slope in derivative.items():
            table.assert_equal(slope, (above[key] - below[key]) / (2 * step), 1e-5)


@every_case
def test_per_sample_gradients(case: Case) -> None:
    params, batch = case.params(H, N), normal(3, L, H)

    def loss(p: dict[str, Tensor], u: Tensor, mode: str) -> Tensor:
        return table.weigh(case.model.scan(p, u, mode=mode)[0])

    expected = [grad(loss)(params, u, LOOP) for u in batch]
    for mode in modes(case):
        got = vmap(grad(loss), (None, 0, None))(params, batch, mode)
        for key in params:
            table.assert_equal(got[key], torch.stack([g[key] for g in expected]), TOLERANCE)


@every_case
def test_an_ensemble_is_a_stacked_dict_of_parameters(case: Case) -> None:
    members = [case.params(H, N, seed=s) for s in range(3)]
    stacked = {k: torch.stack([m[k] for m in members]) for k in members[0]}
    u = normal(L, H)
    for mode in modes(case):
        y, state = vmap(lambda p, mode=mode: case.model.scan(p, u, mode=mode))(stacked)
        for i, member in enumerate(members):
            want = case.model.scan(member, u, mode=LOOP)
            table.assert_equal((y[i], row(state, i)), want, TOLERANCE)


# ---------------------------------------------------------------- the other functions, compiling


@every_case
def test_the_other_functions_under_grad_vmap_and_two_forward_levels(case: Case) -> None:
    params = case.params(H, N)
    keys = list(params)
    _, *v = case.discretized(params, d_model=H)
    functions: list[Callable[..., Any]] = [lambda p: case.model.discretize(p, *v)]
    if case.entry.kernel is not None:
        functions.append(lambda p: case.model.kernel(p, L))
    if case.entry.frequency_response is not None:
        omega = torch.linspace(-1, 3, 4, dtype=torch.float64)
        functions.append(lambda p: case.model.frequency_response(p, omega))
    for function in functions:

        def f(*x: Tensor, function: Any = function) -> tuple[Tensor, ...]:
            out = function(dict(zip(keys, x, strict=True)))
            return tuple(as_real(y) for y in tree_leaves(out))

        x = tuple(params.values())
        batched = table.TRANSFORMS["vmap(grad)"](f, x)
        for i, s in enumerate(table.SAMPLES):
            alone = table.TRANSFORMS["backward"](f, tuple(s * v for v in x))[1]
            alone = [torch.zeros_like(v) if g is None else g for g, v in zip(alone, x, strict=True)]
            table.assert_equal([g[i] for g in batched], alone, TOLERANCE)
        direction = table.tangents(x)

        def along(s: Tensor, f: Any = f, x: Any = x, direction: Any = direction) -> Tensor:
            return table.weigh(f(*(v + s * d for v, d in zip(x, direction, strict=True))))

        zero = torch.zeros((), dtype=torch.float64)
        table.assert_equal(jacfwd(jacfwd(along))(zero), grad(grad(along))(zero), TOLERANCE)


@pytest.mark.parametrize("name", ["backward", "call"])
@one_a_kind
def test_compiled_function(case: Case, mode: str, name: str) -> None:
    expect_same(case, mode, name, table.compiled_function)


@pytest.mark.parametrize(
    "name", sorted({"grad", "vmap(grad)", "jvp", "jacrev", "jacfwd"} & {*table.COMPILED})
)
@first_variants
@pytest.mark.slow
def test_compiled_transform(case: Case, mode: str, name: str) -> None:
    expect_same(case, mode, name, table.compiled)


@pytest.mark.compile
@first_variants
def test_inductor(case: Case, mode: str) -> None:
    transform = table.TRANSFORMS["backward"]
    f, x = problem(case, mode)
    got = table.compiled_function(transform, "inductor")(f, x)
    table.assert_equal(got, transform(problem(case, LOOP)[0], x), TOLERANCE)


@pytest.mark.parametrize("name", ["s5", "lru", "event_ssm", "s7"])
def test_a_compiled_scan_forms_its_matrices_in_real_numbers(name: str) -> None:
    """Complex operations are run one by one, of real ones inductor makes one kernel."""
    from torch._dynamo.backends.common import aot_autograd

    model = registry.get(name)
    width = 7
    params = model.init(width, N)
    complex_matrices: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        values = ((node, node.meta.get("val")) for node in module.graph.nodes)
        complex_matrices.extend(
            node.name
            for node, value in values
            if isinstance(value, Tensor) and value.is_complex() and value.shape[-1:] == (width,)
        )
        return module.forward

    def run(u: Tensor) -> Tensor:
        return model.scan(params, u, mode="scan")[0]

    u = torch.randn(L, width)
    got = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=look))(u)
    table.assert_equal(got, run(u), 1e-6)
    assert not complex_matrices
