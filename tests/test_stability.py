"""What the registry claims of stability, tested as it is written, and drift over long runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from model_cases import CASES, CAUSAL, Case, error, every_model, first_case, loop, normal, widen
from torch import Tensor

from lrnnx_core import registry
from lrnnx_core.registry import Model

STEPS, LONG = 200, 100_000


def claimed(entry: Model) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a claim: the choices it asks for, and the discretizations it names.

    "always", or "[always|with CHOICE], under NAME, ... and gbt with alpha >= 1/2".
    """
    text = entry.stability
    wanted = re.match(r"with (\w+)", text)
    choices = {wanted[1]: True} if wanted else {}
    assert wanted or text.startswith("always"), f"{entry.name}: unknown form of claim {text!r}"
    if "under" not in text:
        return choices, [{}]
    words = re.findall(r"\w+", text.split("under", 1)[1])
    named = [w for w in words if w in entry.discretizations]
    assert named, text
    schemes: list[dict[str, Any]] = []
    for name in named:
        if name == "gbt":
            assert "gbt with alpha >= 1/2" in text
            schemes += [{"discretization": "gbt", "alpha": a} for a in (0.5, 0.7, 1.0)]
        else:
            schemes.append({"discretization": name})
    return choices, schemes


CLAIMS = [
    pytest.param(entry, scheme, choices, id="-".join([entry.name, *map(str, scheme.values())]))
    for entry in registry.MODELS.values()
    if entry.kind == "lti"  # with inputs in A_bar, a claim is for the model's own test
    for choices, schemes in [claimed(entry)]
    for scheme in schemes
]


def known(entry: Model, function: str, options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k in registry.options(entry, function)}


def variants_of(entry: Model) -> list[dict[str, Any]]:
    """Return the choices of `init` that a model's causal variants make."""
    return [dict(c.variant.init) for c in CAUSAL if c.entry is entry]


def train_hard(
    entry: Model, params: dict[str, Tensor], options: dict[str, Any], seed: int
) -> dict[str, Tensor]:
    """Take random large gradient steps with an optimiser whose steps have the size of its lr."""
    generator = torch.Generator().manual_seed(seed)
    params = {k: v.clone().requires_grad_() for k, v in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    shape = entry.init_state(params, (4,))
    for _ in range(STEPS):
        u = torch.randn(4, 3, generator=generator)
        state = torch.randn(shape.shape, generator=generator, dtype=shape.dtype)
        y, last = entry.step(params, u, state, **known(entry, "step", options))
        # random weights, so that no parameter is pulled back to where it was
        loss = (y * 10 * torch.randn(y.shape, generator=generator)).sum()
        loss = loss + last.abs().square().sum() * torch.randn((), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        for p in params.values():
            assert p.grad is not None
            p.grad.nan_to_num_(0.0, 1e6, -1e6)
        optimizer.step()
    return {k: v.detach() for k, v in params.items()}


@pytest.mark.parametrize(("entry", "scheme", "choices"), CLAIMS)
def test_claimed_stability_survives_random_large_gradient_steps(
    entry: Model, scheme: dict[str, Any], choices: dict[str, Any]
) -> None:
    options = scheme | choices
    variants = variants_of(entry)
    for seed, init in enumerate(variants[:1] + [v for v in variants if v.get("is_real")][:1]):
        given = options | {k: v for k, v in init.items() if k in registry.options(entry, "scan")}
        start = entry.init(3, 8, generator=torch.Generator().manual_seed(seed), **init)
        params = train_hard(entry, start, given, seed)
        moved = [k for k in params if (params[k] - start[k]).abs().max() > 0.3]
        assert len(moved) >= len(params) - 1, "the steps were large"
        # the claim is about A_bar, so that rounding to exactly 1 in float32 is not its breach
        wide = {k: v.double() for k, v in params.items()}
        A_bar, _ = entry.discretize(wide, **known(entry, "discretize", given))
        assert torch.isfinite(A_bar).all(), scheme
        assert (A_bar.abs() < 1).all(), f"{scheme}: |A_bar| = {A_bar.abs().max():.6f}"
        A_bar, _ = entry.discretize(params, **known(entry, "discretize", given))
        assert (A_bar.abs() <= 1).all()
        u = normal(1, 2000, 3, dtype=torch.float32)
        y, _ = entry.scan(params, u, **known(entry, "scan", given))
        assert torch.isfinite(y).all()


@pytest.mark.parametrize(("entry", "scheme", "choices"), CLAIMS)
def test_claimed_stability_holds_for_any_parameters_and_any_step(
    entry: Model, scheme: dict[str, Any], choices: dict[str, Any]
) -> None:
    options = scheme | choices
    for scale in (0.1, 1.0, 3.0):
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            params = {
                k: v + scale * torch.randn(v.shape, generator=generator, dtype=v.dtype)
                for k, v in entry.init(4, 8, dtype=torch.float64, generator=generator).items()
            }
            for dt_scale in (0.1, 1.0, 10.0):
                A_bar, _ = entry.discretize(
                    params, dt_scale=dt_scale, **known(entry, "discretize", options)
                )
                assert (A_bar.abs() < 1).all(), f"{scheme} {scale} {seed} {dt_scale}"


@every_model
def test_the_claim_says_no_more_than_is_true(entry: Model) -> None:
    """Without the choice a claim asks for, a model can be unstable: so the choice matters."""
    choices, _ = claimed(entry)
    for choice in choices:
        params = entry.init(3, 8)
        params["Lambda_re"] = params["Lambda_re"] + 1.0
        assert (entry.discretize(params)[0].abs() > 1).any()
        assert (entry.discretize(params, **{choice: True})[0].abs() < 1).all()
    if "euler" in entry.discretizations:
        params = entry.init(3, 8)
        unstable, _ = entry.discretize(params, discretization="euler", dt_scale=1e3, **choices)
        assert (unstable.abs() > 1).any()
        assert "euler" not in entry.stability


@pytest.mark.parametrize("case", [c for c in CASES if not c.bidirectional], ids=str)
def test_every_variant_starts_stable(case: Case) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        A_bar, _ = case.model.discretize(case.model.init(4, 16, generator=generator))
        assert (A_bar.abs() < 1).all()


# ------------------------------------------------------------------------------------------ drift


def drift(narrow: Tensor, wide: Tensor) -> float:
    return error(widen(narrow), wide)


def reference_state(case: Case, u: Tensor) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Return parameters and the float64 states after a tenth, two tenths ... of a long run."""
    params = case.model.init(3, 8, generator=torch.Generator().manual_seed(0))
    wide = {k: v.double() for k, v in params.items()}
    state, states = None, []
    for part in u.double().split(len(u) // 10):
        _, state = case.model.scan(wide, part, state, mode="scan")
        states.append(state)
    return params, state, states


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_a_float32_state_does_not_drift_over_a_hundred_thousand_steps(case: Case) -> None:
    u = normal(LONG, 3, dtype=torch.float32)
    params, _, wanted = reference_state(case, u)
    for size in (LONG // 10, 1000):
        state, found = None, []
        for part in u.split(size):
            y, state = case.model.scan(params, part, state)
            assert torch.isfinite(y).all()
            found.append(state)
        found = found[len(found) // 10 - 1 :: len(found) // 10]
        errors = [drift(a, b) for a, b in zip(found, wanted, strict=True)]
        # rounding A_bar alone is an error of eps / (1 - |A_bar|): it saturates, it does not grow
        # (measured: at most 7e-5, s4d-real_bilinear)
        assert max(errors) < 2e-4, errors
        assert errors[-1] < 10 * max(errors[:3]) + 1e-6, errors


@first_case
def test_a_loop_of_float32_steps_stays_with_float64(case: Case) -> None:
    length = 3000
    u = normal(length, 3, dtype=torch.float32)
    params = case.model.init(3, 8, generator=torch.Generator().manual_seed(0))
    wide = {k: v.double() for k, v in params.items()}
    y64, want = case.model.scan(wide, u.double())
    y, got = loop(case.model, params, u, discrete=case.model.discretize(params))
    assert drift(got, want) < 1e-4
    assert drift(y, y64) < 1e-4


@pytest.mark.slow
@first_case
def test_a_loop_of_a_hundred_thousand_float32_steps_stays_with_float64(case: Case) -> None:
    u = normal(LONG, 3, dtype=torch.float32)
    params, want, _ = reference_state(case, u)
    state = case.model.init_state(params)
    discrete = case.model.discretize(params)
    with torch.no_grad():
        for u_t in u:
            y, state = case.model.step(params, u_t, state, discrete=discrete)
    assert torch.isfinite(y).all()
    assert drift(state, want) < 2e-4


@first_case
def test_bilinear_runs_stay_bounded(case: Case) -> None:
    if "bilinear" not in case.entry.discretizations:
        pytest.skip("no bilinear")
    params = case.model.init(3, 8, generator=torch.Generator().manual_seed(0))
    u = normal(LONG, 3, dtype=torch.float32)
    y, state = case.model.scan(params, u, discretization="bilinear")
    assert y.abs().max() < 1e3
    assert state.abs().max() < 1e3
