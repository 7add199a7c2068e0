"""Every variant of every model: all ways of running it agree, with each other and with the paper.

The two oracles: `dense_models`, the papers' equations as full float64 matrices, and `documents`, a
loop over the documents of every row, each run alone and without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import dense_models
import pytest
import torch
from model_cases import (
    CASES,
    CAUSAL,
    FIRST,
    SCALED,
    TIMED,
    Case,
    assert_agree,
    continuous,
    error,
    every_bidirectional_case,
    every_case,
    every_case_with_kernel,
    every_causal_case,
    every_invariant_case,
    every_model,
    every_timed_case,
    every_timed_causal_case,
    first_case,
    gaps,
    loop,
    normal,
    real,
    remembered,
    row,
    stacked,
    widen,
    with_continuous,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lrnnx_core import registry
from lrnnx_core.registry import Model
from lrnnx_core.sequences import gather_final_states, reset_from_cu_seqlens

F32, F64 = torch.float32, torch.float64
EXACT = 1e-12
LONG = 4097

in_each_dtype = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
with_equations = pytest.mark.parametrize(
    "case", [c for c in CASES if c.entry.name in dense_models.DENSE], ids=str
)


def dense(case: Case, params: Any, u: Tensor, state: Any = None, **options: Any) -> Any:
    options.setdefault("scheme", case.scheme)
    return dense_models.run(case.entry.name, params, u, state, choices=case.choices, **options)


def ways(case: Case, length: int, loops: bool = True) -> dict[str, Callable[..., Any]]:
    """Return every way of running a case: name -> function (params, u, state) -> (y, state)."""
    m = case.model
    found: dict[str, Callable[..., Any]] = {}

    def run_mode(mode: str) -> Callable[..., Any]:
        return lambda p, u, s: m.scan(p, u, s, mode=mode)

    for mode in m.modes:
        if loops or mode != "recurrent":
            found[mode] = run_mode(mode)
    if m.kernel is not None and length:
        kernel = m.kernel
        found["kernel="] = lambda p, u, s: m.scan(p, u, s, kernel=kernel(p, length))
        found["longer kernel="] = lambda p, u, s: m.scan(
            p, u, s, mode="conv", kernel=kernel(p, length + 3)
        )
    lti = case.entry.kind == "lti"
    if lti:
        found["discrete="] = lambda p, u, s: m.scan(p, u, s, discrete=m.discretize(p))
    if not case.bidirectional and length and loops:
        found["step"] = lambda p, u, s: loop(m, p, u, s)
    if not case.bidirectional and length and loops and lti:
        found["step discrete="] = lambda p, u, s: loop(m, p, u, s, discrete=m.discretize(p))
    return found


# ------------------------------------------------------------------ modes, sizes, lengths, splits


@with_equations
@pytest.mark.parametrize(
    ("batch", "d_model", "d_state", "length"),
    [
        ((), 1, 2, 37),
        ((1,), 1, 8, 5),
        ((3,), 5, 8, 40),
        # Im A reaches 1e3 here: rounding dt A costs 3e-14 a step, whoever computes
        ((3,), 5, 64, 9),
        ((2, 3), 3, 2, 33),
    ],
    ids=str,
)
def test_every_way_of_running_is_the_papers_recurrence_in_float64(
    case: Case, batch: tuple[int, ...], d_model: int, d_state: int, length: int
) -> None:
    params = case.params(d_model, d_state)
    u, state = normal(*batch, length, d_model), case.state(params, batch)
    want = dense(case, params, u, state)
    for name, way in ways(case, length).items():
        assert_agree(way(params, u, state), want, EXACT, name)


@cache
def at_length(case: Case, length: int) -> tuple[Any, Any, Any, Any]:
    """Return float32 parameters, input and state, and the float64 result for just these.

    That is the dense one, or where the tests of a model alone have its equations, the plain loop's.
    """
    params, u = case.params(2, 4, dtype=F32), normal(2, length, 2, dtype=F32)
    state = case.state(params, (2,))
    if case.entry.name in dense_models.DENSE:
        return params, u, state, dense(case, params, u, state)
    wide = {k: v.double() for k, v in params.items()}
    return params, u, state, case.model.scan(wide, u.double(), widen(state), mode="recurrent")


def rounding(case: Case, params: Any) -> float:
    """Return how far rounding A_bar to float32 moves the state of the slowest mode."""
    A_bar = case.model.discretize(params)[0].to(torch.complex128)
    return torch.finfo(F32).eps / (1 - float(A_bar.abs().max()))


@in_each_dtype
@pytest.mark.parametrize(
    ("case", "length"),
    [
        pytest.param(
            case, length, id=f"{case}-{length}",
            # where the oracle is a loop of many operations a step
            marks=pytest.mark.slow if length > 257 and not case.invariant else (),
        )
        for case in CASES
        for length in (1, 2, 7, 33, 257, LONG)
    ],
)  # fmt: skip
def test_every_way_of_running_agrees_at_every_length(
    case: Case, length: int, dtype: torch.dtype
) -> None:
    params, u, state, want = at_length(case, length)
    allowed = [case.rtol(dtype)] * 2
    if dtype == F64:
        params, u = {k: v.double() for k, v in params.items()}, u.double()
        state = None if state is None else widen(state)
    else:
        # Rounding A_bar alone moves the state of a slow mode by more than 1e-5 (measured: 1.2e-5 at
        # L = 257). A fast way may then be twice as far off as the plain loop in float32 is.
        plain = case.model.scan(params, u, state, mode="recurrent")
        off = map(error, remembered(plain[1]), remembered(want[1]))
        allowed[1] = max(allowed[1], *(2 * e for e in off))
        assert allowed[1] < (max(5e-5, rounding(case, params)) if case.invariant else 5e-5)
    for name, way in ways(case, length, loops=length <= 257).items():
        got = way(params, u, state)
        for part, a, b, rtol in zip(("y", "state"), got, want, allowed, strict=True):
            assert_agree(a, b, rtol, f"{name} {part}")


@every_case
@pytest.mark.parametrize("batch", [(), (0,), (3,)], ids=str)
def test_no_samples_give_an_empty_output_and_the_state_back(
    case: Case, batch: tuple[int, ...]
) -> None:
    params = case.params()
    state = case.state(params, batch)
    width = case.model.scan(params, normal(1, 3))[0].shape[-1]
    for name, way in ways(case, 0).items():
        y, last = way(params, normal(*batch, 0, 3), state)
        assert y.shape == (*batch, 0, width), name
        expected = case.model.init_state(params, batch) if state is None else state
        torch.testing.assert_close(last, expected, rtol=0, atol=0, msg=name)


@every_case
def test_an_empty_batch_is_a_batch(case: Case) -> None:
    params = case.params()
    full, last = case.model.scan(params, normal(1, 40, 3))
    for name, way in ways(case, 40).items():
        y, state = way(params, normal(0, 40, 3), case.state(params, (0,)))
        assert y.shape == (0, *full.shape[1:]), name
        for got, want in zip(tree_leaves(state), tree_leaves(last), strict=True):
            assert got.shape == (0, *want.shape[1:]), name


@every_causal_case
@in_each_dtype
@pytest.mark.parametrize("mode", ["conv", "scan", "recurrent", "auto", "step"])
def test_every_split_of_a_sequence_gives_what_the_whole_gives(
    case: Case, mode: str, dtype: torch.dtype
) -> None:
    if mode != "step" and mode not in case.model.modes:
        pytest.skip(f"no mode {mode}")
    params, length = case.params(dtype=dtype), 7
    u, start = normal(2, length, 3, dtype=dtype), case.state(params, (2,))
    want = case.model.scan(params, u, start, mode="recurrent")
    rtol = case.rtol(dtype)

    def run(part: Tensor, state: Any) -> Any:
        if mode == "step" and part.shape[-2]:
            return loop(case.model, params, part, state)
        return case.model.scan(params, part, state, mode="auto" if mode == "step" else mode)

    for k in range(length + 1):
        y1, state = run(u[:, :k], start)
        y2, state = run(u[:, k:], state)
        assert_agree((torch.cat([y1, y2], dim=1), state), want, rtol, f"k = {k}")
    state, ys = start, []
    for t in range(length):
        y, state = run(u[:, t : t + 1], state)
        ys.append(y)
    assert_agree((torch.cat(ys, dim=1), state), want, rtol, "one sample at a time")


@every_causal_case
def test_chunks_of_odd_sizes_carry_the_state_across(case: Case) -> None:
    params, u = case.params(), normal(2, 170, 3)
    start = case.state(params, (2,))
    want = case.model.scan(params, u, start, mode="recurrent")
    for mode in set(case.model.modes) - {"recurrent"}:
        state, ys = start, []
        for part in u.split([1, 40, 3, 65, 0, 61], dim=1):
            y, state = case.model.scan(params, part, state, mode=mode)
            ys.append(y)
        assert_agree((torch.cat(ys, dim=1), state), want, EXACT, mode)


@every_case_with_kernel
def test_the_kernel_is_the_response_to_an_impulse(case: Case) -> None:
    params, m, length = case.params(), case.model, 6
    K = m.kernel(params, length)
    params = {k: torch.zeros_like(v) if k == "D" else v for k, v in params.items()}
    u = torch.zeros(3, 2 * length - 1, 3, dtype=F64)
    for h in range(3):
        u[h, length - 1, h] = 1  # one impulse a channel, in the middle
    y, _ = m.scan(params, u, mode="recurrent")
    if case.entry.connectivity == "siso":
        y = y.unflatten(-1, (-1, 3))  # (input, t, channels, output)
        response = torch.stack([y[h, :, :, h] for h in range(3)], dim=-1)  # (t, Ch, H)
        response = response.movedim(1, 0)
        response = response if params["D"].ndim == 2 else response[0]
        past, future = response[..., length - 1 :, :], response[..., : length - 1, :]
        forward = K[0] if case.bidirectional else K
        assert_agree(past, forward, EXACT, "causal half")
        if case.bidirectional:  # the second kernel starts at the next sample
            assert_agree(future.flip(-2), K[1][..., :-1, :], EXACT, "anticausal half")
    else:
        response = y.movedim(0, -1)  # (t, out, in)
        past, future = response[length - 1 :], response[:length].flip(0)
        if case.bidirectional:  # both directions count the current sample
            past = torch.cat([past[:1] - K[1][:1], past[1:]])
            future = torch.cat([future[:1] - K[0][:1], future[1:]])
            assert_agree(future, K[1], EXACT, "anticausal half")
        assert_agree(past, K[0] if case.bidirectional else K, EXACT, "causal half")


@every_model
@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
@pytest.mark.parametrize("timed", [False, True], ids=["uniform", "irregular"])
def test_every_discretization_is_the_papers_recurrence(
    entry: Model, timestep_mode: str, timed: bool
) -> None:
    if timestep_mode not in entry.timestep_modes or entry.name not in dense_models.DENSE:
        pytest.skip("not for this model")
    case = next(c for c in CASES if c.entry is entry)
    params, u = case.params(), normal(2, 9, 3)
    state, elapsed = case.state(params, (2,)), gaps(2, 9) if timed else None
    for scheme in entry.discretizations:
        alphas = (0.0, 0.3, 1.0) if scheme == "gbt" else (None,)
        for alpha in alphas:
            given = {} if alpha is None else {"alpha": alpha}
            want = dense_models.run(
                entry.name, params, u, state, choices=given, scheme=scheme, timesteps=elapsed,
                state_only=timestep_mode == "state_only",
            )  # fmt: skip
            got = entry.scan(
                params, u, state, discretization=scheme, integration_timesteps=elapsed,
                timestep_mode=timestep_mode, **given,
            )  # fmt: skip
            assert_agree(got, want, EXACT, f"{scheme} {alpha}")


@first_case
def test_a_scheme_of_ones_own_runs_in_every_function(case: Case) -> None:
    m, params, u = case.model, case.params(), normal(2, 40, 3)
    if "gbt" not in case.entry.discretizations:
        pytest.skip("takes no callable")

    def backward_euler(A: Tensor, dt_decay: Tensor, dt_input: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 - dt_decay * A), dt_input / (1 - dt_input * A)

    name = {"discretization": "gbt", "alpha": 1.0}
    for mode in m.modes:
        want = m.scan(params, u, mode=mode, **name)
        assert_agree(m.scan(params, u, mode=mode, discretization=backward_euler), want, EXACT, mode)
    elapsed = gaps(2, 40)
    got = m.scan(params, u, discretization=backward_euler, integration_timesteps=elapsed)
    assert_agree(got, m.scan(params, u, integration_timesteps=elapsed, **name), EXACT)
    if m.kernel is not None:
        kernel = m.kernel(params, 9, discretization=backward_euler)
        assert_agree(kernel, m.kernel(params, 9, **name), EXACT)
    given = case.discretized(params)
    got = m.discretize(*given, discretization=backward_euler)
    assert_agree(got, m.discretize(*given, **name), EXACT)
    assert_agree(
        loop(m, params, u, discretization=backward_euler), m.scan(params, u, **name), EXACT
    )


# -------------------------------------------------------------------------------------- gradients


@every_case
@pytest.mark.parametrize("mode", ["conv", "scan"])
def test_gradients_of_parameters_input_and_both_states_are_right(case: Case, mode: str) -> None:
    if mode not in case.model.modes:
        pytest.skip(f"no mode {mode}")
    params = case.params(2, 2, spread=0.3)
    keys, state = list(params), case.state(params)

    starts = [] if state is None else continuous(state)

    def run(u: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        start = None if state is None else with_continuous(state, rest[: len(starts)])
        p = dict(zip(keys, rest[len(starts) :], strict=True))
        y, last = case.model.scan(p, u, start, mode=mode)
        return y, *map(real, continuous(last))

    inputs = tuple(x.detach().requires_grad_() for x in (normal(4, 2), *starts, *params.values()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_causal_case
def test_gradients_of_a_step_are_right(case: Case) -> None:
    params = case.params(2, 2, spread=0.3)
    keys, state = list(params), case.state(params)
    starts = continuous(state)

    def run(u: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        p = dict(zip(keys, rest[len(starts) :], strict=True))
        y, last = case.model.step(p, u, with_continuous(state, rest[: len(starts)]))
        return y, *map(real, continuous(last))

    inputs = (normal(2), *starts, *params.values())
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


@every_causal_case
def test_gradients_reach_the_first_chunk_through_the_state(case: Case) -> None:
    params, u = case.params(), normal(2, 50, 3).requires_grad_()
    weights = normal(2, 50, case.model.scan(params, u)[0].shape[-1])

    def gradient(cuts: list[int], mode: str) -> Tensor:
        state, ys = None, []
        for part in u.split(cuts, dim=1):
            y, state = case.model.scan(params, part, state, mode=mode)
            ys.append(y)
        return torch.autograd.grad((torch.cat(ys, dim=1) * weights).sum(), u)[0]

    whole = gradient([50], "recurrent")
    for mode in set(case.model.modes) - {"recurrent"}:
        assert_agree(gradient([20, 1, 29], mode), whole, 1e-11, mode)


# ----------------------------------------------------- padding, packing, irregular time: one oracle


def documents(
    case: Case,
    params: dict[str, Tensor],
    u: Tensor,
    state: Any,
    valid: Tensor,
    reset: Tensor | None,
    elapsed: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Run each document of each row alone, without padding: what layout arguments promise.

    A padded sample does not exist: it has no output, no effect, and starts no document.
    """
    scan = case.model.scan
    width = scan(params, u[:, :1])[0].shape[-1]
    y = torch.zeros(*u.shape[:-1], width, dtype=u.dtype)
    finals = []
    for i in range(len(u)):
        row_state = None if state is None else row(state, i)
        zero = case.model.init_state(params)
        last = zero if row_state is None else row_state
        index = valid[i].nonzero()[:, 0].tolist()
        starts = [p for p, t in enumerate(index) if reset is not None and bool(reset[i, t])]
        bounds = sorted({0, *starts, len(index)})
        for first, after in pairwise(bounds):
            own = index[first:after]
            if first in starts:
                row_state = None if state is None else zero
            time = {} if elapsed is None else {"integration_timesteps": elapsed[i, own]}
            y[i, own], last = scan(
                params, u[i, own], row_state, mode="recurrent", **time, **options
            )
            row_state = None if case.bidirectional else last
        finals.append(last)
    return y, stacked(finals)


def holes(batch: int, length: int) -> Tensor:
    """Return masks: padding left, on both sides, with holes, nothing valid, all valid."""
    t = torch.arange(length)
    rows = [
        t >= 3,
        (t >= 2) & (t < length - 4),
        (t % 3 != 1) & (t > 0),
        torch.zeros(length, dtype=torch.bool),
        torch.ones(length, dtype=torch.bool),
    ]
    return torch.stack(rows)[:batch]


LENGTH, BATCH = 12, 5
LENGTHS = torch.tensor([12, 7, 0, 1, 11])
RESET = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
for _row, _starts in enumerate([(0, 5), (3, 4, 8), (2, 5), (1,), (6, 11)]):
    RESET[_row, list(_starts)] = True
LAYOUTS: dict[str, tuple[str, ...]] = {
    "lengths": ("lengths",),
    "mask": ("mask",),
    "reset": ("reset",),
    "timesteps": ("timesteps",),
    "lengths_mask": ("lengths", "mask"),
    "lengths_reset": ("lengths", "reset"),
    "mask_reset": ("mask", "reset"),
    "lengths_timesteps": ("lengths", "timesteps"),
    "mask_timesteps": ("mask", "timesteps"),
    "reset_timesteps": ("reset", "timesteps"),
    "everything": ("lengths", "mask", "reset", "timesteps"),
}


@pytest.mark.parametrize(
    ("case", "names"),
    [
        pytest.param(case, names, id=f"{case}-{key}")
        for case in CASES
        for key, names in LAYOUTS.items()
        if case.timed or "timesteps" not in names
    ],
)
def test_padding_packing_and_gaps_equal_a_loop_over_bare_documents(
    case: Case, names: tuple[str, ...]
) -> None:
    params, u = case.params(), normal(BATCH, LENGTH, 3)
    state = case.state(params, (BATCH,))
    given: dict[str, Any] = {
        "lengths": LENGTHS,
        "mask": holes(BATCH, LENGTH),
        "reset": RESET,
        "timesteps": gaps(BATCH, LENGTH) + 0.1,
    }
    chosen = {n: given[n] for n in names}
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if "lengths" in chosen:
        valid &= torch.arange(LENGTH) < LENGTHS[:, None]
    if "mask" in chosen:
        valid &= chosen["mask"]
    want = documents(case, params, u, state, valid, chosen.get("reset"), chosen.get("timesteps"))
    if "timesteps" in chosen:
        chosen["integration_timesteps"] = chosen.pop("timesteps")
    modes = [m for m in case.model.modes if m != "conv" or names == ("lengths",)]
    for mode in modes:
        got = case.model.scan(params, u, state, mode=mode, **chosen)
        assert_agree(got, want, EXACT, mode)
        assert not got[0][~valid].any(), f"{mode}: the output at padding is zero"
    if names == ("lengths",) and case.model.kernel is not None:
        kernel = case.model.kernel(params, LENGTH)
        got = case.model.scan(params, u, state, kernel=kernel, lengths=LENGTHS)
        assert_agree(got, want, EXACT, "kernel=")


@every_case
@pytest.mark.parametrize("mode", ["conv", "scan", "auto"])
def test_long_padded_rows_equal_the_rows_alone(case: Case, mode: str) -> None:
    if mode not in case.model.modes:
        pytest.skip(f"no mode {mode}")
    params, lengths = case.params(), [0, 1, 33, 64, 99]
    u, state = normal(5, 99, 3), case.state(params, (5,))
    y, last = case.model.scan(params, u, state, lengths=torch.tensor(lengths), mode=mode)
    for i, n in enumerate(lengths):
        own = None if state is None else row(state, i)
        want = case.model.scan(params, u[i, :n], own, mode="recurrent")
        assert_agree((y[i, :n], row(last, i)), want, EXACT, f"row {i}")
        assert not y[i, n:].any()


@every_case
@pytest.mark.parametrize("layout", ["lengths", "mask", "both"])
def test_what_stands_in_padding_reaches_nothing(case: Case, layout: str) -> None:
    params, clean = case.params(), normal(BATCH, LENGTH, 3)
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    given: dict[str, Tensor] = {}
    if layout != "mask":
        given["lengths"] = LENGTHS
        valid &= torch.arange(LENGTH) < LENGTHS[:, None]
    if layout != "lengths":
        given["mask"] = holes(BATCH, LENGTH)
        valid &= given["mask"]
    # NaN, then infinity: neither a product with zero nor a sum may carry them on
    for poison in (float("nan"), float("inf")):
        dirty = torch.where(valid[..., None], clean, torch.full_like(clean, poison))
        for mode in case.model.modes:
            if mode == "conv" and layout != "lengths":
                continue
            outputs = []
            for u in (clean, dirty):
                u = u.detach().requires_grad_()
                p = {k: v.detach().requires_grad_() for k, v in params.items()}
                y, last = case.model.scan(p, u, mode=mode, **given)
                loss = y.square().sum() + sum(t.abs().square().sum() for t in continuous(last))
                grads = torch.autograd.grad(loss, [u, *p.values()])
                outputs.append((*grads, y, *tree_leaves(last)))
            for a, b in zip(*outputs, strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=0, msg=f"{mode} {poison}")
            assert not outputs[1][0][~valid].any()


@every_timed_case
@pytest.mark.parametrize("layout", ["lengths", "mask"])
def test_what_gaps_stand_in_padding_reaches_nothing(case: Case, layout: str) -> None:
    params, u, clean = case.params(), normal(BATCH, LENGTH, 3), gaps(BATCH, LENGTH)
    mask = torch.arange(LENGTH) < LENGTHS[:, None] if layout == "lengths" else holes(BATCH, LENGTH)
    given = {"lengths": LENGTHS} if layout == "lengths" else {"mask": mask}
    outputs = []
    for time in (clean, torch.where(mask, clean, torch.full_like(clean, float("nan")))):
        p = {k: v.detach().requires_grad_() for k, v in params.items()}
        y, last = case.model.scan(p, u, integration_timesteps=time, **given)
        loss = y.square().sum() + sum(t.abs().square().sum() for t in continuous(last))
        outputs.append((*torch.autograd.grad(loss, list(p.values())), y, *tree_leaves(last)))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@every_causal_case
def test_packed_documents_equal_the_documents_alone(case: Case) -> None:
    params, m = case.params(), case.model
    cu = torch.tensor([0, 4, 4, 5, 12, 12])
    u = normal(12, 3)
    reset = reset_from_cu_seqlens(cu, 12)
    y, last = m.scan(params, u, reset=reset)
    # every prefix's final state: the states after each sample
    states = stacked([m.scan(params, u[: t + 1], reset=reset[: t + 1])[1] for t in range(12)])
    finals = tree_map(lambda s: gather_final_states(s, cu), states)
    for i, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        want = m.scan(params, u[a:b], mode="recurrent")
        assert_agree((y[a:b], row(finals, i)), want, EXACT, f"document {i}")
    assert_agree(last, row(states, -1), EXACT)


@every_case
def test_layout_arguments_of_fewer_batch_axes_apply_to_every_row(case: Case) -> None:
    params, u = case.params(), normal(2, 3, 8, 3)
    given = {"mask": torch.arange(8) > 1, "reset": torch.arange(8) == 4}
    if case.timed:
        given["integration_timesteps"] = gaps(3, 8)
    expanded = {k: v.expand(2, 3, 8) for k, v in given.items()}
    got = case.model.scan(params, u, lengths=torch.tensor(7), **given)
    want = case.model.scan(params, u, lengths=torch.full((2, 3), 7), **expanded)
    assert_agree(got, want, EXACT)


@first_case
def test_lengths_of_every_integer_dtype_are_the_same(case: Case) -> None:
    """A uint8 indexes as a mask, an int32 of a single sequence has no gradient of its index."""
    params, u = case.params(), normal(2, 8, 3)

    def run(mode: str, lengths: Tensor) -> tuple[Tensor, ...]:
        x = (u if lengths.ndim else u[0]).clone().requires_grad_()
        y, last = case.model.scan(params, x, lengths=lengths, mode=mode)
        found = (y, *(t for t in tree_leaves(last) if t.dtype != torch.bool))
        total = torch.stack([real(t).square().sum() for t in found]).sum()
        return (*found, *torch.autograd.grad(total, x))

    for mode in case.model.modes:
        for lengths in (torch.tensor([8, 0]), torch.tensor(5)):
            want = run(mode, lengths)
            for dtype in (torch.uint8, torch.int8, torch.int32):
                assert_agree(run(mode, lengths.to(dtype)), want, 0.0, mode)


# ---------------------------------------------------------------------------------- irregular time


def loop_discrete(
    case: Case, params: Any, u: Tensor, state: Any, elapsed: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Any]:
    ys = []
    for t in range(u.shape[-2]):
        at = case.model.discretize(params, integration_timesteps=elapsed[..., t], **options)
        y, state = case.model.step(params, u[..., t, :], state, discrete=at)
        ys.append(y)
    return torch.stack(ys, dim=-2), state


@every_invariant_case
def test_a_precomputed_discretization_of_irregular_time_runs_forwards_only(case: Case) -> None:
    params, u, elapsed = case.params(), normal(2, 40, 3), gaps(2, 40)
    discrete = case.model.discretize(params, integration_timesteps=elapsed)
    if case.bidirectional:
        refuses(
            "varies in time; it can run neither backwards",
            case.model.scan,
            params,
            u,
            discrete=discrete,
        )
        return
    want = case.model.scan(params, u, integration_timesteps=elapsed)
    for mode in ("auto", "scan", "recurrent"):
        assert_agree(case.model.scan(params, u, discrete=discrete, mode=mode), want, EXACT, mode)
    refuses("varies in time", case.model.scan, params, u, discrete=discrete, mode="conv")


@with_equations
@pytest.mark.parametrize("timestep_mode", ["both", "state_only"])
def test_irregular_gaps_are_the_papers_recurrence(case: Case, timestep_mode: str) -> None:
    if timestep_mode not in case.entry.timestep_modes:
        pytest.skip(f"no timestep_mode {timestep_mode}")
    params, u, elapsed = case.params(), normal(2, 14, 3), gaps(2, 14)
    state = case.state(params, (2,))
    want = dense(
        case, params, u, state, timesteps=elapsed, state_only=timestep_mode == "state_only"
    )
    options = {"timestep_mode": timestep_mode}
    for mode in ("auto", "scan", "recurrent"):
        got = case.model.scan(params, u, state, integration_timesteps=elapsed, mode=mode, **options)
        assert_agree(got, want, EXACT, mode)
    if not case.bidirectional:
        got = loop(case.model, params, u, state, timesteps=elapsed, **options)
        assert_agree(got, want, EXACT, "step")
        discrete = case.model.discretize(params, integration_timesteps=elapsed, **options)
        assert_agree(case.model.scan(params, u, state, discrete=discrete), want, EXACT, "discrete=")
        got = loop_discrete(case, params, u, state, elapsed, options)
        assert_agree(got, want, EXACT, "step discrete=")


@every_timed_case
def test_gaps_of_one_are_uniform_time(case: Case) -> None:
    params, u = case.params(), normal(2, 40, 3)
    state = case.state(params, (2,))
    want = case.model.scan(params, u, state)
    for mode in case.timestep_modes:
        got = case.model.scan(
            params, u, state, integration_timesteps=torch.ones(40, dtype=F64), timestep_mode=mode
        )
        assert_agree(got, want, EXACT, mode)


@pytest.mark.parametrize("case", [c for c in TIMED if c in SCALED], ids=str)
def test_a_constant_gap_is_dt_scale(case: Case) -> None:
    params, u = case.params(), normal(2, 40, 3)
    state, constant = case.state(params, (2,)), torch.full((40,), 1.7, dtype=F64)
    # the first timestep mode is the model's own: "both" wherever the gain holds a step
    got = case.model.scan(params, u, state, integration_timesteps=constant)
    alike = case.gap_scales_gain or case.entry.discretizations == ("none",)
    for mode in case.model.modes:
        want = case.model.scan(params, u, state, dt_scale=1.7, mode=mode)
        if alike:
            assert_agree(got, want, EXACT, mode)
        else:  # a gap scales the decay alone, dt_scale the gain as well
            assert error(got[0], want[0]) > 1e-6, mode


@every_timed_causal_case
def test_state_only_gaps_leave_the_gain_alone(case: Case) -> None:
    if "state_only" not in case.entry.timestep_modes:
        pytest.skip("no state_only")
    params = case.params()
    u = normal(1, 3)
    elapsed = torch.tensor([2.5], dtype=F64)
    options: dict[str, Any] = {"timestep_mode": "state_only", "integration_timesteps": elapsed}
    # from a zero state the gap before the first sample has nothing to decay
    assert_agree(case.model.scan(params, u, **options), case.model.scan(params, u), EXACT)


@every_timed_case
def test_decays_over_two_gaps_multiply_if_the_decay_is_exponential(case: Case) -> None:
    given = case.discretized(case.params())
    for mode in case.timestep_modes:

        def decay(gap: float, mode: str = mode) -> Tensor:
            # as many gaps as samples: an input-dependent step stays that of its sample
            elapsed = torch.full((6,), gap, dtype=F64)
            options = {"integration_timesteps": elapsed, "timestep_mode": mode}
            return case.model.discretize(*given, **options)[0]

        deviation = error(decay(0.7) * decay(1.6), decay(2.3))
        assert deviation <= EXACT if case.exponential else deviation > 1e-6, mode


@pytest.mark.parametrize("case", [c for c in CAUSAL if c.invariant], ids=str)
def test_merging_two_gaps_with_nothing_between_is_exact_for_exponential_decay(case: Case) -> None:
    params, state = case.params(), case.state(case.params())
    u = normal(3, 3)
    apart = torch.stack([u[0], torch.zeros(3, dtype=F64), u[1], u[2]])
    for mode in case.timestep_modes:
        two = case.model.scan(
            params, apart, state, timestep_mode=mode,
            integration_timesteps=torch.tensor([1.0, 0.7, 1.6, 0.4], dtype=F64),
        )  # fmt: skip
        one = case.model.scan(
            params, apart[[0, 2, 3]], state, timestep_mode=mode,
            integration_timesteps=torch.tensor([1.0, 2.3, 0.4], dtype=F64),
        )  # fmt: skip
        if mode == "both" and case.scheme not in ("dirac",):
            # the gain of sample 2 acts over its own gap: compare what the state before it became
            one = case.model.scan(
                params, torch.stack([u[0], torch.zeros(3, dtype=F64), u[2]]), state,
                timestep_mode=mode,
                integration_timesteps=torch.tensor([1.0, 2.3, 0.4], dtype=F64),
            )  # fmt: skip
            two = case.model.scan(
                params, torch.stack([u[0], 0 * u[0], 0 * u[0], u[2]]), state, timestep_mode=mode,
                integration_timesteps=torch.tensor([1.0, 0.7, 1.6, 0.4], dtype=F64),
            )  # fmt: skip
        deviation = error(two[1], one[1])
        if case.exponential:
            assert deviation <= EXACT, mode
            assert_agree(two[0][-1], one[0][-1], EXACT, mode)
        else:
            assert deviation > 1e-6, f"{mode}: {case.scheme} is not exact there"


@every_timed_causal_case
def test_gradients_of_the_gaps_are_right(case: Case) -> None:
    params, u = case.params(2, 2), normal(4, 2)
    elapsed = (gaps(4) + 0.1).requires_grad_()
    zero = torch.zeros(4, dtype=F64).requires_grad_()

    def run(gap: Tensor, **options: Any) -> Tensor:
        return case.model.scan(params, u, integration_timesteps=gap, **options)[0]

    assert torch.autograd.gradcheck(run, (elapsed,))
    if case.gap_scales_gain and case.entry.discretizations == ("none",):
        # a gain sqrt(1 - a^2) ends at a gap of zero: finite there, right where it has no gap
        assert torch.autograd.grad(run(zero).sum(), zero)[0].isfinite().all()
        run = partial(run, timestep_mode="state_only")
    assert torch.autograd.gradcheck(run, (zero,))  # samples at the same time


@pytest.mark.parametrize("rate", [2, 3])
@pytest.mark.parametrize("case", [c for c in CAUSAL if c.invariant], ids=str)
def test_zoh_at_rate_r_is_zoh_on_the_signal_with_every_sample_repeated(
    case: Case, rate: int
) -> None:
    if case.scheme != "zoh":
        pytest.skip("an identity of the zero-order hold")
    params, u = case.params(), normal(2, 40, 3)
    state = case.state(params, (2,))
    for mode in case.model.modes:
        fast, end = case.model.scan(params, u.repeat_interleave(rate, dim=1), state, mode=mode)
        slow = case.model.scan(params, u, state, dt_scale=float(rate), mode=mode)
        assert_agree((fast[:, rate - 1 :: rate], end), slow, EXACT, mode)


# ---------------------------------------------------------------------------------- bidirectional


def directions(params: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of a model of each direction by itself.

    The reverse one has its own readout C2, and counts D once with the forward one, or it has all
    but the projections to itself.
    """
    forward = {k: v for k, v in params.items() if not k.startswith(("C2", "reverse."))}
    if any(k.startswith("C2") for k in params):
        backward = {k.replace("C2", "C"): v for k, v in params.items() if k.startswith("C2")}
        backward |= {k: torch.zeros_like(v) for k, v in params.items() if k == "D"}
    else:
        backward = {k[8:]: v for k, v in params.items() if k.startswith("reverse.")}
        backward |= {k: torch.zeros_like(v) for k, v in params.items() if k == "linear_out.bias"}
    return forward, forward | backward


@every_bidirectional_case
def test_bidirectional_is_the_sum_of_both_directions(case: Case) -> None:
    params, u, m = case.params(), normal(2, 40, 3), case.entry
    plain = {k: v for k, v in case.choices.items() if k != "bidirectional"}
    options = {k: v for k, v in plain.items() if k in registry.options(m, "scan")}
    one_way, other = directions(params)
    forward, last = m.scan(one_way, u, **options)
    backward = m.scan(other, u.flip(1), **options)[0].flip(1)
    if case.invariant and m.connectivity == "siso":  # the reverse half starts at the next sample
        backward = torch.cat([backward[:, 1:], torch.zeros_like(backward[:, :1])], dim=1)
    for mode in case.model.modes:
        assert_agree(case.model.scan(params, u, mode=mode), (forward + backward, last), EXACT, mode)


# --------------------------------------------------------------------- dtypes, devices, memory


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, F32, F64], ids=["bf16", "fp16", "fp32", "fp64"]
)
def test_the_output_has_the_inputs_dtype_and_the_state_at_least_float32(
    case: Case, dtype: torch.dtype
) -> None:
    params = case.params(dtype=F32)
    u = normal(2, 40, 3).to(dtype)
    rtol = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, case.rtol(F32))
    want = case.model.scan(params, u.double(), mode="recurrent")
    for name, way in ways(case, 40).items():
        y, last = way(params, u, None)
        assert y.dtype == dtype, name
        assert_agree(y, want[0], rtol, name)
        # the state is not rounded to the activations' dtype
        kept = zip(remembered(last), remembered(want[1]), strict=True)
        for part, (got, exact) in enumerate(kept):
            assert got.real.dtype == (F64 if dtype == F64 else F32), name
            assert_agree(got, exact, case.rtol(F32), f"{name} {part}")


@every_case
def test_float64_parameters_make_float64_of_everything(case: Case) -> None:
    params = case.params(dtype=F64)
    y, last = case.model.scan(params, normal(40, 3, dtype=F32))
    assert y.dtype == F32
    for state in (last, case.model.init_state(params)):
        assert all(t.real.dtype == F64 for t in continuous(state))
    if case.model.kernel is not None:
        assert case.model.kernel(params, 4).dtype == F64


@every_case
def test_autocast_leaves_parameters_and_states_alone_and_the_result_near(case: Case) -> None:
    params, u = case.params(dtype=F32), normal(2, 40, 3, dtype=F32)
    before = {k: v.clone() for k, v in params.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, way in ways(case, 40).items():
            y, last = way(params, u, None)
            assert all(t.real.dtype == F32 for t in remembered(last)), name
            assert_agree(y, case.model.scan(params, u)[0], 2e-2, name)
        low = torch.nn.functional.linear(u, torch.eye(3))
        assert low.dtype == torch.bfloat16
        y, last = case.model.scan(params, low)
    assert y.dtype == torch.bfloat16
    assert all(t.real.dtype == F32 for t in remembered(last))
    assert_agree(y, case.model.scan(params, u)[0], 2e-2)
    for k, v in params.items():
        assert v.dtype == F32
        assert torch.equal(v, before[k])


@every_case
def test_everything_runs_on_the_meta_device(case: Case) -> None:
    m = case.model
    params = m.init(3, 8, device="meta")
    real = m.init(3, 8)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in real.items()}
    assert all(v.device.type == "meta" for v in params.values())
    assert [v.dtype for v in params.values()] == [v.dtype for v in real.values()]
    want, want_state = m.scan(real, torch.randn(2, 40, 3))
    u = torch.empty(2, 40, 3, device="meta")
    state = None if case.bidirectional else m.init_state(params, (2,))
    lengths = torch.full((2,), 4, device="meta")
    for mode in m.modes:
        for kwargs in ({}, {"lengths": lengths}):
            y, last = m.scan(params, u, state, mode=mode, **kwargs)
            assert (y.shape, y.dtype, y.device.type) == (want.shape, want.dtype, "meta")
            for got, wanted in zip(tree_leaves(last), tree_leaves(want_state), strict=True):
                assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
                assert got.device.type == "meta"
    if not case.bidirectional:
        y, _ = m.step(params, u[:, 0], state)
        assert y.shape == want[:, 0].shape
    if m.kernel is not None:
        assert m.kernel(params, 5).shape == m.kernel(real, 5).shape


@every_case
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "offset"])
def test_strides_do_not_matter(case: Case, kind: str) -> None:
    params = case.params()
    base = normal(3, 40, 3)
    state = case.state(params, (3,))
    if kind == "transposed":
        u = base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif kind == "sliced":
        u = torch.zeros(3, 80, 7, dtype=F64)[:, ::2, 1:4].copy_(base)
    elif kind == "expanded":
        base = base[:1].expand(3, 40, 3)
        u = base
    else:
        u = torch.cat([torch.zeros(1, dtype=F64), base.flatten()])[1:].view(base.shape)
    rows = {k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in params.items()}
    want = case.model.scan(params, base.contiguous(), state)
    for mode in case.model.modes:
        assert_agree(case.model.scan(rows, u, state, mode=mode), want, EXACT, mode)
        x = u.detach().requires_grad_()
        y, _ = case.model.scan(rows, x, state, mode=mode)
        (got,) = torch.autograd.grad(y.sum(), x)  # a gradient of stride 0 comes back
        (plain,) = torch.autograd.grad(
            (y := case.model.scan(params, x, state)[0]), x, torch.ones_like(y)
        )
        assert_agree(got, plain, EXACT, mode)


@every_case
def test_nothing_given_is_written_to(case: Case) -> None:
    params, u, state = case.params(), normal(BATCH, LENGTH, 3), case.state(case.params(), (BATCH,))
    given = {"lengths": LENGTHS.clone(), "mask": holes(BATCH, LENGTH), "reset": RESET.clone()}
    if case.timed:
        given["integration_timesteps"] = gaps(BATCH, LENGTH)
    everything = [*params.values(), u, *given.values()]
    everything += [] if state is None else tree_leaves(state)
    before = [x.clone() for x in everything]
    keys = list(params)
    for way in ways(case, LENGTH).values():
        way(params, u, state)
    case.model.scan(params, u, state, **given)
    assert list(params) == keys
    for x, old in zip(everything, before, strict=True):
        assert torch.equal(x, old)


@every_case
def test_running_twice_gives_the_same_bits(case: Case) -> None:
    params, u = case.params(dtype=F32), normal(2, 40, 3, dtype=F32)
    for name, way in ways(case, 40).items():
        first, second = (tree_leaves(way(params, u, None)) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), name


@every_causal_case
def test_a_state_is_as_large_after_a_long_sequence_as_before_it(case: Case) -> None:
    params = case.params(dtype=F32)
    sizes = [t.nbytes for t in tree_leaves(case.model.init_state(params, (2,)))]
    for length in (0, 1, 300):
        _, last = case.model.scan(params, normal(2, length, 3, dtype=F32))
        assert [t.nbytes for t in tree_leaves(last)] == sizes
        # nor does it keep a view of something that grows with the length
        held = [t.untyped_storage().nbytes() for t in tree_leaves(last)]
        assert all(h <= 4 * n + 64 for h, n in zip(held, sizes, strict=True)), length


# -------------------------------------------------------------------------------------- bad input


def refuses(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message):
        function(*args, **kwargs)


@first_case
def test_scan_says_what_came_and_what_was_expected(case: Case) -> None:
    m, params = case.model, case.params(dtype=F32)
    name, u = case.entry.name, torch.randn(2, 6, 3)
    state = m.init_state(params, (2,))
    scan = m.scan
    refuses(rf"{name}.scan: u \(3,\), expected \(..., L, H\) with H = 3", scan, params, u[0, 0])
    refuses(rf"{name}.scan: u \(2, 6, 2\), expected .* H = 3", scan, params, u[..., :2])
    refuses(rf"{name}.scan: u has dtype torch.complex64, expected a real", scan, params, u + 0j)
    refuses(rf"{name}.scan: u has dtype torch.int64", scan, params, u.long())
    refuses(rf"{name}.scan: u is a ndarray, expected a Tensor", scan, params, u.numpy())
    refuses(rf"{name}.scan: u is on meta and the parameters on cpu", scan, params, u.to("meta"))
    bad = m.init_state(params, (3,))
    # a state is a tensor, or its parts are named: state.h
    refuses(
        rf"{name}.scan: state(\.\w+)? \(3, .*\), expected \(2, .*\) for this input",
        scan, params, u, bad,
    )  # fmt: skip
    for i, part in enumerate(continuous(state)):
        parts = continuous(state)
        parts[i] = part[..., :-1]
        refuses(rf"{name}.scan: state", scan, params, u, with_continuous(state, parts))
    if isinstance(state, tuple):
        refuses(rf"{name}.scan: state is a Tensor", scan, params, u, state[0])
    if not any(t.is_complex() for t in continuous(state)):
        parts = [t + 0j for t in continuous(state)]
        refuses(
            rf"{name}.scan: state(\.\w+)? has dtype torch.complex64, expected a real one",
            scan, params, u, with_continuous(state, parts),
        )  # fmt: skip
    refuses(rf"{name}.scan: mode = 'fast', expected one of", scan, params, u, mode="fast")
    meta = tree_map(lambda t: t.to("meta"), state)
    refuses(rf"{name}.scan: state(\.\w+)? is on meta and", scan, params, u, meta)
    for key, value, said in (
        ("lengths", torch.ones(3, dtype=torch.long), r"lengths \(3,\) does not fit u \(2, 6, 3\)"),
        ("lengths", torch.ones(2), "lengths has dtype torch.float32, expected an integer"),
        ("lengths", torch.ones(2, dtype=torch.long, device="meta"), "lengths is on meta and u on"),
        ("lengths", [6, 4], "lengths is a list, expected a Tensor"),
        ("mask", torch.ones(2, 5, dtype=torch.bool), r"mask \(2, 5\) does not fit u .*\(2, 6\)"),
        ("mask", torch.ones(2, 6), "mask has dtype torch.float32, expected bool"),
        ("reset", torch.ones(3, 6, dtype=torch.bool), r"reset \(3, 6\) does not fit u"),
        ("reset", torch.ones(2, 6, dtype=torch.long), "reset has dtype torch.int64, expected bool"),
        ("integration_timesteps", torch.ones(2, 7), r"integration_timesteps \(2, 7\) does not fit"),
        ("integration_timesteps", torch.ones(6).long(), "has dtype torch.int64, expected a float"),
        ("integration_timesteps", torch.ones(6, device="meta"), "is on meta and u on cpu"),
        ("timestep_mode", "neither", "timestep_mode.*'neither'"),
        ("discretization", "zog", "discretization (= )?'zog'[;,] expected one of"),
    ):  # fmt: skip
        refuses(said, scan, params, u, **{key: value})
    if "conv" in m.modes:
        for extra in (
            {"mask": torch.ones(2, 6, dtype=torch.bool)},
            {"reset": torch.ones(6, dtype=torch.bool)},
            {"integration_timesteps": torch.ones(6)},
        ):
            refuses("convolution cannot run with", scan, params, u, mode="conv", **extra)
    if "discrete" not in registry.options(m, "scan"):
        return
    discrete = m.discretize(params)
    wrong = (discrete[0][..., :-1], discrete[1])
    refuses(
        f"{name}.scan: discrete has shapes .* expected them to end in",
        scan,
        params,
        u,
        discrete=wrong,
    )
    wrong = (discrete[0], discrete[1][:-1])
    refuses(f"{name}.scan: discrete has shapes", scan, params, u, discrete=wrong)
    refuses(
        f"{name}.scan: give discrete or integration_timesteps, not both",
        scan, params, u, discrete=discrete, integration_timesteps=torch.ones(6),
    )  # fmt: skip


@first_case
def test_kernels_are_checked(case: Case) -> None:
    m, params, name = case.model, case.params(dtype=F32), case.entry.name
    if m.kernel is None:
        pytest.skip("no kernel")
    u = torch.randn(2, 6, 3)
    refuses(f"{name}.kernel: length = 0, expected >= 1", m.kernel, params, 0)
    short = m.kernel(params, 5)
    refuses(rf"{name}.scan: kernel \(5, .*expected .*>= 6", m.scan, params, u, kernel=short)
    full = m.kernel(params, 6)
    refuses("kernel .*expected", m.scan, params, u, kernel=full[..., :2])
    refuses("kernel .*expected", m.scan, params, u, kernel=full[None])
    refuses(
        "kernel is for mode 'conv' or 'auto', got 'scan'",
        m.scan,
        params,
        u,
        kernel=full,
        mode="scan",
    )
    refuses("kernel is on meta", m.scan, params, u, kernel=full.to("meta"))
    mask = torch.ones(2, 6, dtype=torch.bool)
    refuses("convolution cannot run with", m.scan, params, u, kernel=full, mask=mask)


@first_case
def test_step_says_what_came_and_what_was_expected(case: Case) -> None:
    m, params, name = case.model, case.params(dtype=F32), case.entry.name
    u, state = torch.randn(2, 3), m.init_state(params, (2,))
    refuses(
        rf"{name}.step: u \(2, 4\), expected .* H = 3", m.step, params, torch.randn(2, 4), state
    )
    refuses(rf"{name}.step: u \(\), expected", m.step, params, torch.tensor(1.0), state)
    refuses(rf"{name}.step: u has dtype torch.complex64", m.step, params, u + 0j, state)
    if case.timed:
        refuses(
            rf"{name}.step: integration_timestep is a float, expected a Tensor",
            m.step, params, u, state, integration_timestep=0.5,
        )  # fmt: skip
    bad = row(state, 0)
    refuses(rf"{name}.step: state(\.\w+)? .*expected \(2, ", m.step, params, u, bad)
    refuses(rf"{name}.step: u is on meta", m.step, params, u.to("meta"), state)
    bad = tree_map(lambda t: t.to("meta"), state)
    refuses(rf"{name}.step: state(\.\w+)? is on meta", m.step, params, u, bad)
    if "discrete" in registry.options(m, "step"):
        refuses(
            f"{name}.step: give discrete or integration_timestep",
            m.step, params, u, state,
            discrete=m.discretize(params), integration_timestep=torch.ones(2),
        )  # fmt: skip
    refuses(
        "integration_timestep",
        m.step, params, u, state, integration_timestep=torch.ones(2, device="meta"),
    )  # fmt: skip
    refuses(
        r"integration_timestep.*\(3,\)",
        m.step, params, u, state, integration_timestep=torch.ones(3),
    )  # fmt: skip


@every_model
def test_init_refuses_sizes_and_choices_that_do_not_exist(entry: Model) -> None:
    name, init = entry.name, entry.init
    for bad in (0, -1, 2.0, True):
        refuses(rf"{name}.init: d_model = {bad}, expected an integer >= 1", init, bad, 8)
        refuses(rf"{name}.init: d_state = {bad}, expected an integer >= 1", init, 3, bad)
    refuses(
        f"{name}.init|init: dtype torch.int64, expected a real floating",
        init,
        3,
        8,
        dtype=torch.int64,
    )
    refuses("dtype torch.complex64", init, 3, 8, dtype=torch.complex64)
    known = registry.options(entry, "init")
    for choice in ("A_init", "C_init", "Lambda_init"):
        if choice in known:
            refuses(
                rf"{name}.init: {choice} = 'nothing', expected one of \('",
                init,
                3,
                8,
                **{choice: "nothing"},
            )
    if known & {"conj_sym", "is_real"}:  # half of each conjugate pair is stored
        refuses(rf"{name}.init: d_state = 7", init, 3, 7)  # odd, with conjugate pairs
    for dtype in (torch.bfloat16, torch.float16):
        assert all(v.dtype == F32 for v in init(3, 8, dtype=dtype).values())


@every_bidirectional_case
def test_bidirectional_models_take_no_state_and_need_their_parameters(case: Case) -> None:
    m, params, u = case.model, case.params(dtype=F32), torch.randn(2, 6, 3)
    state = m.init_state(params, (2,))
    refuses(
        "bidirectional model reads whole sequences; state must be None", m.scan, params, u, state
    )
    one_way, _ = directions(params)
    said = r"params have no (C2|reverse\.).*; make them with init\(bidirectional=True\)"
    refuses(said, m.scan, one_way, u)
    if m.kernel is not None:
        refuses(said, m.kernel, one_way, 5)


@every_model
def test_unsupported_discretizations_and_alpha_are_refused_by_every_function(entry: Model) -> None:
    params = entry.init(3, 8)
    u, state = torch.randn(6, 3), entry.init_state(params)
    case = next(c for c in FIRST if c.entry is entry)
    calls: dict[str, tuple[Any, ...]] = {
        "discretize": case.discretized(params),
        "kernel": (params, 4),
        "scan": (params, u),
        "step": (params, u[0], state),
    }
    for function, arguments in calls.items():
        f = getattr(entry, function)
        if f is None:
            continue
        where = f"{entry.name}.{function}"
        for bad in {"none", "zoh", "tustin"} - set(entry.discretizations):
            with pytest.raises(ValueError, match=rf"{where}.*{bad}.*expected one of") as caught:
                f(*arguments, discretization=bad)
            assert all(choice in str(caught.value) for choice in entry.discretizations)
        if "alpha" in registry.options(entry, function):
            refuses(
                f"{where}: discretization='gbt' needs alpha", f, *arguments, discretization="gbt"
            )
            refuses(f"{where}: alpha belongs to discretization='gbt'", f, *arguments, alpha=0.5)


def another(parameter: inspect.Parameter) -> Any:
    """Return a value of an option that is not its default."""
    name, default = parameter.name, parameter.default
    if name.startswith("integration_timestep"):
        return torch.ones(6 if name.endswith("s") else ())
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    choices = {"timestep_mode": "state_only", "discretization": "zoh"}
    choices |= {"init_memory": "upstream", "C_init": "lecun_normal"}
    return choices.get(name, 0.95)


@pytest.mark.parametrize("case", [c for c in CASES if c.variant.without], ids=str)
def test_options_that_a_configuration_refuses_raise_and_are_not_ignored(case: Case) -> None:
    m, params = case.model, case.params(dtype=F32)
    u = torch.randn(6, 3)
    arguments: dict[str, tuple[Any, ...]] = {
        "init": (3, 8),
        "init_state": (params,),
        "discretize": case.discretized(params),
        "kernel": (params, 6),
        "scan": (params, u),
        "step": (params, u[0], m.init_state(params)),
    }
    refused = set()
    for function, given in arguments.items():
        for option in registry.options(case.entry, function) & case.variant.without:
            parameter = inspect.signature(getattr(case.entry, function)).parameters[option]
            message = rf"{case.entry.name}\.{function}: .*{option.removeprefix('integration_')}"
            refuses(message, getattr(m, function), *given, **{option: another(parameter)})
            refused.add(option)
    assert refused == set(case.variant.without)
