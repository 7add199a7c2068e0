"""Optimizer groups: every parameter once, state-space parameters slow and without decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lrnnx_core import registry
from lrnnx_nn import (
    LAYERS,
    LRU,
    S4D,
    S5,
    BatchNorm,
    Block,
    Classifier,
    ClassifierConfig,
    param_groups,
)

TABLE = {
    "s4d": {"log_dt", "A_log", "A_im", "B_re", "B_im"},
    "s5": {"Lambda_re", "Lambda_im", "log_dt", "B_re", "B_im"},
    "lru": {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"},
}


def names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    name = {id(parameter): key for key, parameter in model.named_parameters()}
    return {group["name"]: {name[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_parameter_is_in_one_group(layer: str) -> None:
    model = Classifier(ClassifierConfig(3, 2, layer, d_model=4, d_state=4, norm="batch"))
    groups = param_groups(model, 1e-2, 1e-4, 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_names_its_state_space_parameters(layer: str) -> None:
    variants = [
        v.init | {"bidirectional": both}
        for v in registry.MODELS[layer].variants
        for both in (False, True)
    ]
    keys = {key for init in variants for key in LAYERS[layer](4, 4, **init).params}
    hinted = LAYERS[layer].ssm_parameters  # type: ignore[attr-defined]
    assert hinted
    assert hinted <= keys
    assert hinted == TABLE.get(layer, hinted)


def test_rates_and_decay_of_the_table() -> None:
    model = Block(4, S5(4, 4), norm="layer", activation="half_glu1")
    groups = param_groups(model, 1e-2, 2e-4, 0.1)
    assert names(model, groups) == {
        "ssm": {f"mixer.{key}" for key in TABLE["s5"]},
        "no_decay": {"norm.weight", "norm.bias", "activation.gate.bias"},
        "normal": {"mixer.C_re", "mixer.C_im", "mixer.D", "activation.gate.weight"},
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"ssm": (2e-4, 0.0), "no_decay": (1e-2, 0.0), "normal": (1e-2, 0.1)}


@pytest.mark.parametrize("norm", [BatchNorm(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.BatchNorm1d(4)])
def test_norms_do_not_decay(norm: nn.Module) -> None:
    groups = param_groups(norm, 1e-2, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["no_decay"]


def test_unknown_modules_and_shared_parameters() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.log_dt = nn.Parameter(torch.ones(3))  # not a Layer: nothing special
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

    model = Strange()
    groups = param_groups(model, 1e-2, weight_decay=0.1)
    assert names(model, groups) == {
        "no_decay": {"first.bias", "second.bias"},
        "normal": {"scale", "log_dt", "first.weight"},
    }


def test_hints_reach_into_children() -> None:
    class Projected(nn.Module):
        ssm_parameters = frozenset({"dt_proj.bias"})

        def __init__(self) -> None:
            super().__init__()
            self.dt_proj = nn.Linear(2, 3)

    model = nn.Sequential(Projected())
    groups = names(model, param_groups(model, 1e-2))
    assert groups == {"ssm": {"0.dt_proj.bias"}, "normal": {"0.dt_proj.weight"}}


def test_defaults_and_an_optimizer_step() -> None:
    model = LRU(4, 4)
    assert {group["lr"] for group in param_groups(model, 1e-2)} == {1e-3, 1e-2}
    assert {group["lr"] for group in param_groups(model, 1e-4)} == {1e-4}
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, weight_decay=0.5))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert decayed == {"C_re", "C_im", "D"}


def test_real_s4d_lacks_some_hinted_keys() -> None:
    model = S4D(4, 4, is_real=True, A_init="real")
    groups = names(model, param_groups(model, 1e-2))
    assert groups["ssm"] == {"log_dt", "A_log", "B_re"}


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"ssm_lr": -1.0}, {"weight_decay": float("nan")}])
def test_negative_numbers_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*expected >= 0"):
        param_groups(nn.Linear(2, 2), **({"lr": 1.0} | bad))
