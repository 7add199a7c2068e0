# SPDX-License-Identifier: MIT
"""Optimizer groups: state-space parameters learn slowly and never decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from lrnnx_nn.norms import BatchNorm

_NORMS: tuple[type[nn.Module], ...] = (
    BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def param_groups(
    model: nn.Module,
    lr: float,
    ssm_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the parameters of a model as groups for a ``torch.optim`` optimizer.

    * ``ssm``: what a layer class names in ``ssm_parameters`` (eigenvalues, step sizes, input
      matrices): ``ssm_lr``, no decay.
    * ``no_decay``: parameters of norms, and everything called ``bias``: ``lr``, no decay.
    * ``normal``: everything else, unknown modules included: ``lr`` and ``weight_decay``.

    Args:
        model: any Module; every parameter of it is in exactly one group, frozen ones included.
        lr: learning rate.
        ssm_lr: that of the state-space parameters; min(1e-3, lr) if None, as S4 and S4D have it.
        weight_decay: decay of the normal group.

    Returns:
        The groups that are not empty: dicts with ``name``, ``params``, ``lr``, ``weight_decay``.

    Raises:
        ValueError: a negative number.

    Source: the authors' code of S4/S4D, S5 ("standard") and LRU: there the dynamics train at a
    smaller rate and without decay, C and D with the rest.
    """
    ssm_lr = min(1e-3, lr) if ssm_lr is None else ssm_lr
    for name, value in (("lr", lr), ("ssm_lr", ssm_lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"param_groups: {name} = {value}, expected >= 0")
    groups: dict[str, dict[str, Any]] = {
        "ssm": {"params": [], "lr": ssm_lr, "weight_decay": 0.0},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "normal": {"params": [], "lr": lr, "weight_decay": weight_decay},
    }
    hinted = _hinted(model)
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                group = "ssm" if parameter in hinted else _group(module, key)
                groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _hinted(model: nn.Module) -> set[nn.Parameter]:
    """Return what modules name in ``ssm_parameters``, by keys that may reach into children."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        keys = getattr(module, "ssm_parameters", frozenset())
        if keys:
            found |= {p for key, p in module.named_parameters() if key in keys}
    return found


def _group(module: nn.Module, key: str) -> str:
    return "no_decay" if key == "bias" or isinstance(module, _NORMS) else "normal"
