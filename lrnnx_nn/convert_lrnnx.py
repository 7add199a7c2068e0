# SPDX-License-Identifier: MIT
"""Load the weights of layers of the published lrnnx package (1.0) into ours.

Each function below writes one family's tensors in our names. What is a plain change of storage is
changed; what lrnnx computes otherwise than its formulas say is named, and refused or reproduced.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrnnx_core.models import s4
from lrnnx_core.models._transforms import raw_real_part, raw_step_size
from lrnnx_core.types import Params
from lrnnx_nn.layers import LRU, RGLRU, S4, S4D, S5, S7, STREAM, Centaurus, EventSSM, Layer, Mamba


def from_lrnnx(
    state_dict: Mapping[str, Tensor], layer: Layer, prefix: str = "", **options: Any
) -> dict[str, Tensor]:
    """Copy the weights of one layer of lrnnx into ours, in place; return the tensors left over.

    The layer then computes what lrnnx's computed, up to rounding. Make it with the options that a
    file does not tell; ``docs/coming-from.md`` has the table.

    Args:
        state_dict: of that layer, or of a model that holds it.
        layer: the one to write to.
        prefix: what precedes the layer's own names, such as ``"backbone.layers.0.mixer."``.
        **options: arguments that lrnnx's constructor had other than by default, where they change
            what the tensors mean. S4, S4D: ``real_transform``, ``imag_transform``,
            ``dt_transform``, ``dt_fast``. S5 of ``models.ltv``: ``step_rescale``. S5 of
            ``models.lti`` with ``discretization="bilinear"``: ``swapped_bilinear``. There lrnnx has
            the signs of the transform exchanged, so that A_bar grows where it should decay: True
            writes -Lambda, with which ours computes what lrnnx computed, unstable as it is; False
            writes Lambda, and so corrects the transform.

    Returns:
        What is not part of the layer: the output projections and gates around S4 and S4D, and
        Mamba's ``dtA_proj``, which lrnnx reads with ``integration_timesteps`` alone (`STREAM` takes
        its bias).

    Raises:
        ValueError: tensors of no known layer, another layer, an option it does not have, another
            shape, or weights that no choice of ours reproduces; nothing has been written then.
    """
    from lrnnx_nn.convert import load_mixer  # which exports this function

    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    family = _family(found, prefix)
    if not isinstance(layer, family.layers):
        expected = " or ".join(kind.__name__ for kind in family.layers)
        raise ValueError(
            f"from_lrnnx: these are weights of {family.title}, for a layer {expected}; got "
            f"{type(layer).__name__}"
        )
    known = inspect.signature(family.translate).parameters
    unknown = sorted(o for o in options if o not in known or o in ("found", "layer"))
    if unknown:
        choices = [p for p in known if p not in ("found", "layer")]
        raise ValueError(
            f"from_lrnnx: {family.title} has no option {unknown[0]!r}; expected one of {choices}"
        )
    wide = {k: v.detach().to(_wide(v)) for k, v in found.items()}
    params = family.translate(wide, layer, **options)
    load_mixer(layer, params)
    return {k: v for k, v in found.items() if k in wide}


class _Family(NamedTuple):
    """One of lrnnx's layers: the keys it is known by, and what becomes of it.

    ``translate`` takes what it uses out of the dict.
    """

    title: str
    keys: set[str]
    layers: tuple[type[Layer], ...]
    translate: Callable[..., Params]
    axes_of_B: int | None = None

    def fits(self, found: Params) -> bool:
        """Return whether these are tensors of this family."""
        named = self.keys <= set(found)
        return named and (self.axes_of_B is None or found["B"].ndim == self.axes_of_B)


def _family(found: Params, prefix: str) -> _Family:
    for family in _FAMILIES:
        if family.fits(found):
            return family
    titles = ", ".join(f.title for f in _FAMILIES)
    raise ValueError(
        f"from_lrnnx: under {prefix!r} are {sorted(found)[:12]}, the weights of none of {titles}"
    )


def _lru(found: Params, layer: Layer) -> Params:
    return {k: found.pop(k) for k in layer.params if k in found}


def _s5_lti(found: Params, layer: Layer, *, swapped_bilinear: bool | None = None) -> Params:
    """A (N, 2) holds the raw argument of a softplus and Im A; B is real, D a matrix, in by out."""
    if (layer._options.get("discretization") == "bilinear") != (swapped_bilinear is not None):
        raise ValueError(
            "from_lrnnx: lrnnx's models.lti.S5 exchanges the signs of the bilinear transform, so "
            "that abs(A_bar) > 1; with discretization='bilinear', and only there, say "
            "swapped_bilinear=True to compute the same, False for the transform itself"
        )
    _need(layer, conj_sym=False, dense_D=True)
    raw, im = found.pop("A").unbind(-1)
    sign = -1 if swapped_bilinear else 1
    B = found.pop("B")
    return {
        "Lambda_re": -sign * F.softplus(raw),
        "Lambda_im": sign * im,
        "log_dt": found.pop("log_dt"),
        "B_re": B,
        "B_im": torch.zeros_like(B),
        **_halves("C", found.pop("C")),
        "D": found.pop("D").mT,
    }


def _s5_ltv(found: Params, layer: Layer, *, step_rescale: float = 1.0) -> Params:
    """What is stored is what the equations have; step_rescale multiplies every step."""
    if not step_rescale > 0:
        raise ValueError(f"from_lrnnx: step_rescale = {step_rescale}, expected > 0")
    return {
        **_halves("Lambda", found.pop("A")),
        "log_dt": found.pop("log_dt") + math.log(step_rescale),
        **_halves("B", found.pop("B")),
        **_halves("C", found.pop("C")),
        "D": found.pop("D"),
    }


def _s4_family(
    found: Params,
    layer: Layer,
    *,
    real_transform: str = "exp",
    imag_transform: str = "none",
    dt_transform: str = "exp",
    dt_fast: bool = False,
) -> Params:
    """S4 and S4D: A = -f(A_real) - i g(A_imag); every tensor stands there twice, or nearly."""
    stored = int(found.pop("layer.kernel.l_kernel", torch.zeros(())))
    for key in ("A_real", "A_imag", "B", "C", "P", "inv_dt"):
        twin = found.pop(f"layer.kernel.{key}", None)
        if twin is not None and not torch.equal(twin, found[key]):
            raise ValueError(
                f"from_lrnnx: {key} and layer.kernel.{key} differ; they are one tensor"
            )
    is_real = "A_imag" not in found
    if is_real:
        _need(layer, is_real=True)
    raw_dt = found.pop("inv_dt")
    raw_dt = torch.sinh(raw_dt) if dt_fast else raw_dt
    ours = layer._options.get("dt_transform", "exp")
    if dt_transform != ours:
        raw_dt = raw_step_size(torch.log(_positive(raw_dt, dt_transform)), ours)
    params = {"log_dt": raw_dt.squeeze(-1) if raw_dt.shape[-1] == 1 else raw_dt}
    params["A_log"] = _decay(found.pop("A_real"), real_transform, layer)
    B, C, D = found.pop("B").squeeze(0), found.pop("C"), found.pop("D")
    if C.shape[0] == 1:
        C, D = C.squeeze(0), D.squeeze(0)
    params["D"] = D
    if is_real:  # there a real state counts twice too, as if it had a conjugate
        return {**params, "B_re": B, "C_re": 2 * C}
    params["A_im"] = -_positive(found.pop("A_imag"), imag_transform)
    params |= _halves("B", B) | _halves("C", C)
    if "P" not in found:
        return params
    params |= _halves("P", found.pop("P"))
    return _c_tilde(params, stored, layer)


def _c_tilde(params: Params, stored: int, layer: Layer) -> Params:
    """Bring C to what the layer stores; lrnnx's S4 stores C~ once it has run."""
    wanted = layer.l_kernel if isinstance(layer, S4) else None
    if wanted == (stored or None):
        return params
    given = {k: v for k, v in layer._options.items() if k in ("dt_transform", "A_transform")}
    if stored:
        params = s4.ctilde_to_c(params, stored, **given)
    return params if wanted is None else s4.c_to_ctilde(params, wanted, **given)


def _centaurus(found: Params, layer: Layer) -> Params:
    """A is complex and free there; gamma = dt whatever its discretization says."""
    if layer._options.get("discretization") not in (None, "mamba"):
        raise ValueError(
            "from_lrnnx: lrnnx's Centaurus computes gamma = dt whatever its discretization says; "
            "make the layer with discretization=None"
        )
    A, log_dt, E = found.pop("A"), found.pop("log_delta"), found.pop("E", None)
    B, C = found.pop("B"), found.pop("C")
    if not bool((A.real < 0).all()):
        worst = float(A.real.max())
        raise ValueError(
            f"from_lrnnx: Re A = {worst:.3g} in lrnnx's Centaurus, which leaves it free; ours is "
            "stable by construction and holds no Re A >= 0"
        )
    variant = layer._options.get("variant", "neck")
    width = layer.d_model
    # state channels of lrnnx, which has the same tensors for all of its modes
    shapes = {"neck": B.ndim == 2, "pointwise": E is None, "dws": B.shape == (width,),
              "full": B.shape == (width * width,)}  # fmt: skip
    if not shapes[variant] or (E is None and variant != "pointwise"):
        raise ValueError(
            f"from_lrnnx: A {tuple(A.shape)} and B {tuple(B.shape)} are not those of "
            f"mode={variant!r}; make the layer with the variant that lrnnx's mode was"
        )
    if (
        variant == "full" and E is not None
    ):  # one step for each pair there, for each output here: only dt A counts
        A, E, log_dt, C = (t.unflatten(0, (width, width)) for t in (A, E, log_dt, C))
        shared = log_dt.mean(-1)
        ratio = torch.exp(log_dt - shared.unsqueeze(-1)).unsqueeze(-1)
        gain = (B.unflatten(0, (width, width)) * C).unsqueeze(-1)
        A, E, log_dt = ratio * A, ratio * gain * E, shared
    params = {
        "A_raw": raw_real_part(-A.real, "softplus"), "A_im": A.imag, "log_dt": log_dt,
    }  # fmt: skip
    if E is not None:
        params["E"] = E
    if variant in ("neck", "pointwise"):
        params |= {"B": B, "C": C}
    elif variant == "dws":
        params["W"] = torch.diag(C * B)
    return params


def _mamba(found: Params, layer: Layer) -> Params:
    """Mamba's names are ours. dtA_proj has a weight that nothing reads, and STREAM's bias."""
    if isinstance(layer, STREAM):
        found["dtA_bias"] = found.pop("dtA_proj.bias")
    return {k: found.pop(k) for k in list(found) if not k.startswith("dtA_proj.")}


def _rglru(found: Params, layer: Layer) -> Params:
    """The decay is sigmoid(a_log)^(c r), and softplus(-a_log) = -log sigmoid(a_log)."""
    _need(layer, start_rule=False, gelu="erf")
    params = {"rg_lru.recurrent_param": -found.pop("a_log").squeeze(-1)}
    for theirs, ours in (("input_gate", "input_gate"), ("recurrent_gate", "recurrent_gate")):
        params[f"rg_lru.{ours}_weight"] = found.pop(f"{theirs}_proj.weight").mT.unsqueeze(0)
        params[f"rg_lru.{ours}_bias"] = found.pop(f"{theirs}_proj.bias").unsqueeze(0)
    names = {"in_proj": "linear_x", "gate_proj": "linear_y", "out_proj": "linear_out"}
    names["conv1d"] = "conv_1d"
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in found:
                params[f"{ours}.{part}"] = found.pop(f"{theirs}.{part}")
    return params


def _s7(found: Params, layer: Layer) -> Params:
    """The full variant, by other names. lrnnx adds the input to the output; here a block does."""
    _need(layer, variant="full")
    names = {"base_params": "base"}
    return {names.get(k, k): found.pop(k) for k in list(found)}


_FAMILIES = (
    _Family("LRU", {"nu_log", "gamma_log"}, (LRU,), _lru),
    _Family("RGLRU", {"a_log", "recurrent_gate_proj.weight"}, (RGLRU,), _rglru),
    _Family("S7", {"base_params", "gate_proj.weight"}, (S7,), _s7),
    _Family("Mamba", {"A_log", "dtA_proj.bias"}, (Mamba,), _mamba),
    _Family("Centaurus", {"A", "log_delta"}, (Centaurus,), _centaurus),
    _Family("S4", {"A_real", "inv_dt", "P"}, (S4,), _s4_family),
    _Family("S4D", {"A_real", "inv_dt"}, (S4D,), _s4_family),
    _Family("models.lti.S5", {"A", "log_dt", "B"}, (S5,), _s5_lti, axes_of_B=2),
    _Family("models.ltv.S5", {"A", "log_dt", "B"}, (S5, EventSSM), _s5_ltv, axes_of_B=3),
)


def _need(layer: Layer, **options: Any) -> None:
    """Raise unless the layer was made with these options."""
    for name, value in options.items():
        if layer._options.get(name) != value:
            raise ValueError(
                f"from_lrnnx: {type(layer).__name__} of lrnnx has {name} = {value!r} built in; "
                "make the layer with it"
            )


def _decay(raw: Tensor, transform: str, layer: Layer) -> Tensor:
    """Return what our A_transform stores for -Re A = f(raw)."""
    ours = layer._options.get("A_transform", "exp")
    if transform == ours and transform != "none":
        return raw
    decay = _positive(raw, transform)
    if ours != "none" and bool((decay < 1e-4).any()):
        raise ValueError(
            f"from_lrnnx: Re A = {-float(decay.min()):.3g} with real_transform={transform!r}, "
            f"which A_transform={ours!r} does not reach; make the layer with A_transform='none'"
        )
    return -decay if ours == "none" else raw_real_part(decay, ours)


def _positive(raw: Tensor, transform: str) -> Tensor:
    """Return f(raw) for a transform of lrnnx's S4."""
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "exp": torch.exp,
        "relu": lambda t: F.relu(t) + 1e-4,
        "sigmoid": torch.sigmoid,
        "softplus": F.softplus,
    }
    if transform not in maps:
        raise ValueError(f"from_lrnnx: transform {transform!r}, expected one of {tuple(maps)}")
    return maps[transform](raw)


def _halves(key: str, value: Tensor) -> Params:
    """Return X_re and X_im of X (..., 2)."""
    re, im = value.unbind(-1)
    return {key + "_re": re, key + "_im": im}


def _wide(value: Tensor) -> torch.dtype:
    """Return float64 or complex128, in which storage is changed; integers stay."""
    if value.is_floating_point():
        return torch.float64
    return torch.complex128 if value.is_complex() else value.dtype
