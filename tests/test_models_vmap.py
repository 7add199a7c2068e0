"""Every number a model takes may be mapped over and differentiated: vmap equals a Python loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import (
    CASES,
    SCALED,
    Case,
    assert_agree,
    continuous,
    every_case,
    every_causal_case,
    every_timed_causal_case,
    first_case,
    gaps,
    normal,
    real,
    row,
    stacked,
)
from torch import Tensor
from torch.func import grad, jvp, vmap

from lrnnx_core.registry import MODELS

SAME = 1e-12
RUNNING = ("discretize", "kernel", "frequency_response", "scan", "step")


def numbers(function: Callable[..., Any] | None) -> list[str]:
    """Return the keyword options of a function that are numbers."""
    if function is None:
        return []
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and "Number" in str(p.annotation)
    ]


def test_every_model_has_numbers_to_map_over() -> None:
    for model in MODELS.values():
        assert numbers(model.init), model.name
        assert "dt_scale" in numbers(model.scan), model.name
        assert numbers(model.step) == numbers(model.scan) == numbers(model.discretize), model.name


# ------------------------------------------------------------------------------------------- init

INIT_NUMBERS = [
    pytest.param(case, option, id=f"{case}-{option}")
    for case in CASES
    for option in numbers(case.entry.init)
    if case.takes("init", option)
]


def values_of(case: Case, option: str) -> Tensor:
    """Return three values an option of `init` may take."""
    if option == "dt_floor":  # above the steps, of which the largest may be dt_max = 0.1
        return torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64)
    default = float(inspect.signature(case.model.init).parameters[option].default)
    factors = torch.tensor([0.95, 0.97, 0.99], dtype=torch.float64)
    return default * factors if default else factors / 4


@pytest.mark.parametrize("generated", [False, True], ids=["global_seed", "generator"])
@pytest.mark.parametrize(("case", "option"), INIT_NUMBERS)
def test_vmap_over_a_number_of_init_is_a_loop(case: Case, option: str, generated: bool) -> None:
    values = values_of(case, option)

    def make(value: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5) if generated else None
        return case.model.init(4, 8, dtype=torch.float64, generator=generator, **{option: value})

    torch.manual_seed(5)
    got = vmap(make, randomness="same")(values)
    loop = []
    for value in values:
        torch.manual_seed(5)
        loop.append(make(value))
    assert_agree(got, stacked(loop), SAME)
    torch.manual_seed(5)
    as_float = make(float(values[1]))
    assert_agree(as_float, loop[1], SAME)
    moved = [k for k in got if not torch.equal(got[k][0], got[k][1])]
    assert moved, f"{option} changes nothing"


@pytest.mark.parametrize(("case", "option"), INIT_NUMBERS)
def test_gradients_of_the_numbers_of_init_are_right_and_map(case: Case, option: str) -> None:
    values = values_of(case, option)

    def loss(value: Tensor) -> Tensor:
        torch.manual_seed(5)
        params = case.model.init(4, 8, dtype=torch.float64, **{option: value})
        return sum((v * torch.cos(v)).sum() for v in params.values())

    got = vmap(grad(loss), randomness="same")(values)
    assert_agree(got, torch.stack([grad(loss)(v) for v in values]), SAME)
    forward = [jvp(loss, (v,), (torch.ones_like(v),))[1] for v in values]
    assert_agree(got, torch.stack(forward), SAME)
    h = 1e-6 * values
    differences = torch.stack(
        [(loss(v + d) - loss(v - d)) / (2 * d) for v, d in zip(values, h, strict=True)]
    )
    assert_agree(got, differences, 1e-6)


def test_randomness_different_draws_every_member_anew() -> None:
    for model in MODELS.values():
        once, again = model.init(3, 4), model.init(3, 4)
        drawn = [k for k in once if not torch.equal(once[k], again[k])]
        assert drawn
        many = vmap(lambda _, m=model: m.init(3, 4), randomness="different")(torch.zeros(3))
        for key in drawn:
            assert not torch.equal(many[key][0], many[key][1]), f"{model.name}: {key}"


# ----------------------------------------------------------------- scan, step, kernel, discretize

CALL_NUMBERS = [
    pytest.param(case, function, option, id=f"{case}-{function}-{option}")
    for case in CASES
    for function in RUNNING
    for option in numbers(getattr(case.entry, function))
    if case.takes(function, option)
    if option != "alpha" or case.scheme == "gbt"
    if function != "step" or not case.bidirectional
]


def caller(case: Case, function: str, option: str) -> Callable[[Tensor], Any]:
    params, u = case.params(), normal(2, 6, 3)
    state = case.state(params, (2,))
    arguments: dict[str, tuple[Any, ...]] = {
        "discretize": case.discretized(params),
        "kernel": (params, 6),
        "frequency_response": (params, torch.tensor([0.5, 2.0], dtype=torch.float64)),
        "scan": (params, u, state),
        "step": (params, u[:, 0], state),
    }
    f = getattr(case.model, function)
    return lambda value: f(*arguments[function], **{option: value})


@pytest.mark.parametrize(("case", "function", "option"), CALL_NUMBERS)
def test_vmap_over_a_number_of_a_call_is_a_loop(case: Case, function: str, option: str) -> None:
    call = caller(case, function, option)
    values = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
    got = vmap(call)(values)
    assert_agree(got, stacked([call(v) for v in values]), SAME)
    assert_agree(got, stacked([call(float(v)) for v in values]), SAME)
    first = got[0] if isinstance(got, tuple) else got
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize(("case", "function", "option"), CALL_NUMBERS)
def test_gradients_of_the_numbers_of_a_call_are_right_and_map(
    case: Case, function: str, option: str
) -> None:
    call = caller(case, function, option)

    def loss(value: Tensor) -> Tensor:
        result = call(value)
        return sum((p * torch.cos(p)).sum() for p in map(real, continuous(result)))

    values = torch.tensor([0.5, 0.9, 1.3], dtype=torch.float64)
    if option == "alpha":
        values = values / 2
    got = vmap(grad(loss))(values)
    assert_agree(got, torch.stack([grad(loss)(v) for v in values]), 1e-11)
    h = 1e-6
    assert_agree(got, (vmap(loss)(values + h) - vmap(loss)(values - h)) / (2 * h), 1e-6)


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("mode", ["conv", "scan", "recurrent"])
def test_a_sweep_over_step_sizes_is_a_loop_in_every_mode(case: Case, mode: str) -> None:
    if mode not in case.model.modes:
        pytest.skip(f"no mode {mode}")
    params, u, m = case.params(), normal(2, 40, 3), case.model
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    got = vmap(lambda s: m.scan(params, u, dt_scale=s, mode=mode)[0])(scales)
    assert_agree(
        got, torch.stack([m.scan(params, u, dt_scale=s, mode=mode)[0] for s in scales]), SAME
    )


@every_timed_causal_case
def test_gradients_of_a_gap_in_a_step_map(case: Case) -> None:
    params, m = case.params(), case.model
    u, state, gap = normal(5, 3), case.state(params, (5,)), gaps(5) + 0.1

    def loss(u: Tensor, state: Any, gap: Tensor) -> Tensor:
        y, last = m.step(params, u, state, integration_timestep=gap)
        return y.square().sum() + sum(t.abs().square().sum() for t in continuous(last))

    got = vmap(grad(loss, 2))(u, state, gap)
    each = [grad(loss, 2)(u[i], row(state, i), gap[i]) for i in range(5)]
    assert_agree(got, torch.stack(each), SAME)


# -------------------------------------------------------------------------- ensembles and batches


def ensemble(case: Case, members: int = 3) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    each = [case.params(seed=s) for s in range(members)]
    return each, stacked(each)


@every_case
@pytest.mark.parametrize("mode", ["conv", "scan", "recurrent", "auto"])
def test_an_ensemble_of_stacked_parameters_is_a_loop(case: Case, mode: str) -> None:
    if mode not in case.model.modes:
        pytest.skip(f"no mode {mode}")
    each, together = ensemble(case)
    u, m = normal(2, 40, 3), case.model
    state = case.state(each[0], (2,))
    run = lambda p, s: m.scan(p, u, s, mode=mode)  # noqa: E731
    got = vmap(run, (0, None))(together, state)
    assert_agree(got, stacked([run(p, state) for p in each]), SAME)
    loss = lambda p: m.scan(p, u, mode=mode)[0].square().mean()  # noqa: E731
    assert_agree(vmap(grad(loss))(together), stacked([grad(loss)(p) for p in each]), 1e-11)


@every_causal_case
def test_an_ensemble_steps_and_makes_kernels_and_discretizations(case: Case) -> None:
    each, together = ensemble(case)
    m, u = case.model, normal(2, 3)
    states = stacked([case.state(p, (2,), seed=i) for i, p in enumerate(each)])
    got = vmap(lambda p, s: m.step(p, u, s))(together, states)
    assert_agree(got, stacked([m.step(p, u, row(states, i)) for i, p in enumerate(each)]), SAME)
    _, *v = case.discretized(each[0])
    got = vmap(lambda p: m.discretize(p, *v))(together)
    assert_agree(got, stacked([m.discretize(p, *v) for p in each]), SAME)
    if m.kernel is not None:
        kernel = m.kernel
        got = vmap(lambda p: kernel(p, 40))(together)
        assert_agree(got, torch.stack([kernel(p, 40) for p in each]), SAME)
        long = normal(2, 40, 3)
        got = vmap(lambda p: m.scan(p, long, kernel=kernel(p, 40)))(together)
        assert_agree(got, stacked([m.scan(p, long) for p in each]), SAME)


@every_case
@pytest.mark.parametrize("mode", ["conv", "scan"])
def test_per_sample_gradients_are_a_loop(case: Case, mode: str) -> None:
    if mode not in case.model.modes:
        pytest.skip(f"no mode {mode}")
    params, u, m = case.params(), normal(3, 9, 3), case.model
    loss = lambda p, x: m.scan(p, x, mode=mode)[0].square().sum()  # noqa: E731
    got = vmap(grad(loss), (None, 0))(params, u)
    assert_agree(got, stacked([grad(loss)(params, x) for x in u]), 1e-11)


@every_case
def test_mapping_over_the_batch_is_the_batch(case: Case) -> None:
    params, m = case.params(), case.model
    u, state = normal(3, 40, 3), case.state(params, (3,))
    for mode in m.modes:
        run = lambda x, s: m.scan(params, x, s, mode=mode)  # noqa: B023, E731
        got = vmap(run, (0, None if state is None else 0))(u, state)
        assert_agree(got, m.scan(params, u, state, mode=mode), SAME, mode)
        got = vmap(lambda x: m.scan(params, x, mode=mode)[0], in_dims=-1, out_dims=-1)(  # noqa: B023
            u.movedim(0, -1)
        )
        assert_agree(got.movedim(-1, 0), m.scan(params, u, mode=mode)[0], SAME, mode)


@every_case
def test_layout_arguments_map_with_their_rows(case: Case) -> None:
    params, m, u = case.params(), case.model, normal(3, 8, 3)
    given = {
        "lengths": torch.tensor([8, 3, 0]),
        "mask": normal(3, 8, seed=7) > -0.8,
        "reset": normal(3, 8, seed=8) > 0.8,
    }
    if case.timed:
        given["integration_timesteps"] = gaps(3, 8) + 0.1
    for names in [(n,) for n in given] + [tuple(given)]:
        chosen = [given[n] for n in names]
        run = lambda x, *rest: m.scan(params, x, **dict(zip(names, rest, strict=True)))  # noqa: B023, E731
        got = vmap(run)(u, *chosen)
        assert_agree(got, run(u, *chosen), SAME, str(names))
    long = normal(3, 40, 3)
    if "conv" in m.modes:
        run = lambda x, n: m.scan(params, x, lengths=n, mode="conv")  # noqa: E731
        lengths = torch.tensor([40, 13, 0])
        assert_agree(vmap(run)(long, lengths), run(long, lengths), SAME, "lengths, conv")


@first_case
def test_ensembles_over_seeds_and_step_sizes_at_once(case: Case) -> None:
    each, together = ensemble(case, 2)
    u, m = normal(2, 9, 3), case.model
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    run = lambda p, s: m.scan(p, u, dt_scale=s)[0]  # noqa: E731
    got = vmap(vmap(run, (None, 0)), (0, None))(together, scales)
    want = torch.stack([torch.stack([run(p, s) for s in scales]) for p in each])
    assert_agree(got, want, SAME)
