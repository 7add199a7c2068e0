"""Layers that have become unstable say so: once, in evaluation, and never where it would cost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_cases import INVARIANT, Case, normal
from torch import Tensor
from torch.func import vmap

from lrnnx_core import frequency
from lrnnx_core.checks import StabilityWarning
from lrnnx_nn import LRU, S4, S4D, S5, Layer
from lrnnx_nn.layers import LAYERS

U = normal(2, 6, 3, dtype=torch.float32)


def unstable() -> S5:
    layer = S5(3, 4).eval()
    with torch.no_grad():
        layer.Lambda_re[1] = 0.5
    return layer


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if w.category is StabilityWarning]


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.mark.parametrize("use", ["forward", "prefill", "step"])
def test_the_first_use_in_evaluation_warns_once_and_names_the_eigenvalue(
    use: str, heard: list[warnings.WarningMessage]
) -> None:
    layer = unstable()
    state = layer.init_state((2,))
    for _ in range(3):
        with torch.no_grad():
            if use == "step":
                layer.step(U[:, 0], state)
            else:
                getattr(layer, use)(U)
    value = frequency.eigenvalues("s5", layer.params)[1].item()
    (text,) = said(heard)
    assert text.startswith(f"S5: eigenvalue {value:.6g} of A_bar at (1,) has modulus 1.0")
    assert text.endswith(". S5 is stable " + layer.model.stability)
    layer.train()
    layer.eval()
    with torch.no_grad():
        layer(U)
        copy.deepcopy(layer)(U)
    assert len(said(heard)) == 1, "once in a layer's life"
    with torch.no_grad():
        unstable()(U)
    assert len(said(heard)) == 2, "another layer has its own"


def test_training_gradients_transforms_and_compilation_never_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("looked at eigenvalues")

    monkeypatch.setattr(frequency, "eigenvalues", fail)
    layer = unstable()
    layer(U)  # with gradients
    with torch.no_grad():
        vmap(layer)(U)
        torch.compile(layer, backend="eager")(U)
        layer.train()
        layer(U)
        layer.eval()
        with pytest.raises(AssertionError, match="looked"):
            layer(U)
        LRU(3, 4).eval()(U)  # stable whatever happens: no look either
        S4(3, 4).eval()(U)
        with pytest.raises(AssertionError, match="looked"):
            S4(3, 4, A_transform="none").eval()(U)


def test_evaluation_looks_once_between_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(frequency, "eigenvalues", lambda *a, **k: looks.append(1) or torch.zeros(1))
    layer = S5(3, 4).eval()
    with torch.no_grad():
        for _ in range(3):
            layer(U)
            layer.step(U[:, 0], layer.init_state((2,)))
        assert len(looks) == 1
        layer.train()
        layer.eval()
        layer(U)
    assert len(looks) == 2


def test_options_of_the_layer_count(heard: list[warnings.WarningMessage]) -> None:
    clipped = S5(3, 4, clip_eigs=True).eval()
    wild = S4D(3, 8, discretization="euler", dt_min=1.0, dt_max=2.0).eval()
    with torch.no_grad():
        clipped.Lambda_re[1] = 0.5
        clipped(U)
        assert not said(heard)
        wild(U)
    assert said(heard)[0].startswith("S4D: eigenvalue ")


def test_it_may_be_asked_for_anywhere(heard: list[warnings.WarningMessage]) -> None:
    layer = unstable().train()
    layer.check_stability()
    layer.check_stability()
    assert len(said(heard)) == 1


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_fresh_layers_are_silent(case: Case, heard: list[warnings.WarningMessage]) -> None:
    layer = LAYERS[case.entry.name](3, 8, **case.choices)
    assert isinstance(layer, Layer)
    layer.check_stability()
    assert not said(heard)


def test_time_varying_layers_have_nothing_to_say(heard: list[warnings.WarningMessage]) -> None:
    LAYERS["mamba"](3, 4).check_stability()
    assert not said(heard)
