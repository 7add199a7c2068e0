# SPDX-License-Identifier: MIT
"""Every model of the library, once. Tests, the command line and architectures walk this table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType, ModuleType
from typing import Any, Literal, NamedTuple

import torch

from lrnnx_core.models import (
    centaurus,
    event_ssm,
    lru,
    mamba,
    mamba2,
    rglru,
    s4,
    s4d,
    s5,
    s7,
    stream,
)
from lrnnx_core.models._common import LTI_MODES

FUNCTIONS = ("init", "init_state", "discretize", "kernel", "frequency_response", "scan", "step")
NO_CHOICES: Mapping[str, Any] = MappingProxyType({})


class Variant(NamedTuple):
    """One configuration of a model that all generic tests run.

    ``init`` and ``call`` are choices for `init` and for every other function that knows them;
    ``rtol`` the largest relative disagreement between modes, by dtype name. ``without`` are options
    that this configuration refuses.
    """

    name: str
    init: Mapping[str, Any] = NO_CHOICES
    call: Mapping[str, Any] = NO_CHOICES
    rtol: Mapping[str, float] = MappingProxyType({"float64": 1e-12, "float32": 1e-5})
    without: frozenset[str] = frozenset()


class Model(NamedTuple):
    """A model: pure functions on a flat dict of tensors, and what is known about them.

    The functions follow one protocol: ``init(d_model, d_state, ...) -> params``,
    ``init_state(params, batch_shape) -> state``, ``discretize(params, ...) -> (A_bar, B_bar)``,
    ``kernel(params, length, ...) -> K`` and ``frequency_response(params, omega, ...) -> H``
    (time-invariant models only, else None),
    ``scan(params, u, state, ...) -> (y, state)`` and ``step(params, u_t, state, ...) -> (y_t,
    state)``.
    """

    name: str
    title: str
    init: Callable[..., Any]
    init_state: Callable[..., Any]
    discretize: Callable[..., Any]
    kernel: Callable[..., Any] | None
    scan: Callable[..., Any]
    step: Callable[..., Any]
    kind: Literal["lti", "ltv"]
    connectivity: Literal["siso", "mimo"]
    discretizations: tuple[str, ...]
    modes: tuple[str, ...]
    timestep_modes: tuple[str, ...]
    stability: str
    """When |A_bar| < 1 holds whatever training does to the parameters."""
    citation: str
    variants: tuple[Variant, ...]
    aliases: tuple[str, ...] = ()
    frequency_response: Callable[..., Any] | None = None


def _model(module: ModuleType, **facts: Any) -> Model:
    name = module.__name__.rsplit(".", 1)[-1]
    return Model(name=name, **{f: getattr(module, f, None) for f in FUNCTIONS}, **facts)


_S7_FULL_ONLY = frozenset({"abar_min", "abar_max", "init_memory", "chunk_size"})
_S7_DELTA_ONLY = frozenset(
    {"integration_timesteps", "integration_timestep", "timestep_mode", "discretization", "alpha"}
    | {"dt_scale", "dt_min", "dt_max", "dt_init_scale", "conj_sym", "clip_eigs"}
    | {"blocks", "stable_reparam", "C_init"}
)

MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        _model(
            s4d,
            title="S4D",
            kind="lti",
            connectivity="siso",
            discretizations=s4d.DISCRETIZATIONS,
            modes=LTI_MODES,
            timestep_modes=("both", "state_only"),
            stability=(
                "always (but for A_transform='none'), under zoh, dirac, mamba, bilinear and gbt "
                "with alpha >= 1/2"
            ),
            citation="""@inproceedings{gu2022s4d,
  title     = {On the Parameterization and Initialization of Diagonal State Space Models},
  author    = {Gu, Albert and Gupta, Ankit and Goel, Karan and R{\\'e}, Christopher},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
  note      = {arXiv:2206.11893}
}""",
            variants=(
                Variant("lin"),
                Variant("legs_bilinear", {"A_init": "legs"}, {"discretization": "bilinear"}),
                Variant("inv_untied_dt", {"A_init": "inv", "tied_dt": False}),
                Variant(
                    "random_gbt", {"A_init": "random"}, {"discretization": "gbt", "alpha": 0.7}
                ),
                Variant("real", {"A_init": "real", "is_real": True}),
                Variant(
                    "real_bilinear",
                    {"A_init": "random", "is_real": True},
                    {"discretization": "bilinear"},
                ),
                Variant("one_ssm_two_channels", {"n_ssm": 1, "channels": 2}),
                Variant("dirac", {}, {"discretization": "dirac"}),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            s4,
            title="S4",
            kind="lti",
            connectivity="siso",
            discretizations=s4.DISCRETIZATIONS,
            modes=LTI_MODES,
            timestep_modes=("both", "state_only"),
            stability="always (but for A_transform='none')",
            citation="""@inproceedings{gu2022s4,
  title     = {Efficiently Modeling Long Sequences with Structured State Spaces},
  author    = {Gu, Albert and Goel, Karan and R{\\'e}, Christopher},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  note      = {arXiv:2111.00396}
}""",
            variants=(
                Variant("legs"),
                Variant("rank_two_truncated", {"rank": 2, "l_kernel": 4608}, {"l_kernel": 4608}),
                Variant(
                    "legt_one_ssm_untied_dt",
                    {"A_init": "legt", "n_ssm": 1, "channels": 2, "tied_dt": False},
                ),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            s5,
            title="S5",
            kind="lti",
            connectivity="mimo",
            discretizations=s5.DISCRETIZATIONS,
            modes=LTI_MODES,
            timestep_modes=("both", "state_only"),
            stability="with clip_eigs, under zoh, dirac, mamba, bilinear and gbt with alpha >= 1/2",
            citation="""@inproceedings{smith2023s5,
  title     = {Simplified State Space Layers for Sequence Modeling},
  author    = {Smith, Jimmy T.H. and Warrington, Andrew and Linderman, Scott W.},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  note      = {arXiv:2208.04933}
}""",
            variants=(
                Variant("default"),
                Variant("full_spectrum", {"conj_sym": False}, {"conj_sym": False}),
                Variant("blocks_clipped", {"blocks": 2}, {"clip_eigs": True}),
                Variant("bilinear", {"C_init": "lecun_normal"}, {"discretization": "bilinear"}),
                Variant("dirac", {"C_init": "complex_normal"}, {"discretization": "dirac"}),
                Variant("lin_mamba", {"Lambda_init": "lin"}, {"discretization": "mamba"}),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            lru,
            title="LRU",
            kind="lti",
            connectivity="mimo",
            discretizations=lru.DISCRETIZATIONS,
            modes=LTI_MODES,
            timestep_modes=("state_only",),
            stability="always",
            citation="""@inproceedings{orvieto2023lru,
  title     = {Resurrecting Recurrent Neural Networks for Long Sequences},
  author    = {Orvieto, Antonio and Smith, Samuel L. and Gu, Albert and Fernando, Anushan and
               Gulcehre, Caglar and Pascanu, Razvan and De, Soham},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  note      = {arXiv:2303.06349}
}""",
            variants=(
                Variant("default"),
                Variant("ring", {"r_min": 0.9, "r_max": 0.999, "max_phase": 0.314}),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            event_ssm,
            title="Event-SSM",
            kind="lti",
            connectivity="mimo",
            discretizations=event_ssm.DISCRETIZATIONS,
            modes=LTI_MODES,
            timestep_modes=("both", "state_only"),
            stability=(
                "with clip_eigs, under async, zoh, dirac, mamba, bilinear and gbt with alpha >= 1/2"
            ),
            citation="""@article{schoene2024eventssm,
  title   = {Scalable Event-by-event Processing of Neuromorphic Sensory Signals With Deep
             State-Space Models},
  author  = {Sch{\\"o}ne, Mark and Sushma, Neeraj Mohan and Zhuge, Jingyue and Mayr, Christian
             and Subramoney, Anand and Kappel, David},
  journal = {arXiv preprint arXiv:2404.18508},
  year    = {2024}
}""",
            variants=(
                Variant("default"),
                Variant(
                    "dirac_full_spectrum",
                    {"blocks": 2, "conj_sym": False},
                    {"discretization": "dirac", "conj_sym": False, "clip_eigs": True},
                ),
                Variant("zoh_d_out", {"d_out": 4}, {"discretization": "zoh"}),
            ),
        ),
        _model(
            centaurus,
            title="Centaurus",
            kind="lti",
            connectivity="mimo",
            discretizations=centaurus.DISCRETIZATIONS,
            modes=LTI_MODES,
            timestep_modes=("both", "state_only"),
            stability="always, under mamba and zoh",
            citation="""@inproceedings{pei2025centaurus,
  title     = {Let {SSMs} be {ConvNets}: State-space Modeling with Optimal Tensor Contractions},
  author    = {Pei, Yan Ru},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2501.13230}
}""",
            # In float32 a mode of dt = 1e-3 loses 2e-5 over 4097 samples, however it is run.
            variants=(
                Variant("neck", {"sub_state_dim": 2}),
                Variant(
                    "pointwise_zoh_d_out",
                    {"variant": "pointwise", "sub_state_dim": 2, "d_out": 4, "dt_min": 4e-3},
                    {"variant": "pointwise", "discretization": "zoh"},
                ),
                Variant(
                    "dws",
                    {"variant": "dws", "tied_dt": False, "dt_min": 4e-3},
                    {"variant": "dws"},
                ),
                Variant(
                    "full_d_out",
                    {"variant": "full", "d_out": 2, "dt_min": 4e-3},
                    {"variant": "full"},
                ),
                Variant(
                    "neck_bidirectional",
                    {"sub_state_dim": 2, "bidirectional": True},
                    {"bidirectional": True},
                ),
            ),
        ),
        _model(
            mamba,
            title="Mamba",
            aliases=("S6",),
            kind="ltv",
            connectivity="siso",
            discretizations=mamba.DISCRETIZATIONS,
            modes=mamba.MODES,
            timestep_modes=("both", "state_only"),
            stability="always, under zoh, dirac, mamba, bilinear and gbt with alpha >= 1/2",
            citation="""@inproceedings{gu2024mamba,
  title     = {Mamba: Linear-Time Sequence Modeling with Selective State Spaces},
  author    = {Gu, Albert and Dao, Tri},
  booktitle = {Conference on Language Modeling},
  year      = {2024},
  note      = {arXiv:2312.00752}
}""",
            variants=(
                Variant("default"),
                Variant("zoh_biased", {"bias": True, "d_conv": 2}, {"discretization": "zoh"}),
                Variant("bilinear", {"expand": 1, "dt_rank": 3}, {"discretization": "bilinear"}),
                Variant("dirac", {"conv_bias": False}, {"discretization": "dirac"}),
                Variant("gbt", {"dt_init": "constant"}, {"discretization": "gbt", "alpha": 0.7}),
                Variant("rms_norms", {"inner_norm": "rms"}, {"inner_norm": "rms"}),
                Variant("learned_norms", {"inner_norm": "learned"}, {"inner_norm": "learned"}),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            mamba2,
            title="Mamba-2",
            aliases=("SSD",),
            kind="ltv",
            connectivity="siso",
            discretizations=mamba2.DISCRETIZATIONS,
            modes=mamba2.MODES,
            timestep_modes=("both", "state_only"),
            stability="always",
            citation="""@inproceedings{dao2024mamba2,
  title     = {Transformers are {SSMs}: Generalized Models and Efficient Algorithms Through
               Structured State Space Duality},
  author    = {Dao, Tri and Gu, Albert},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  note      = {arXiv:2405.21060}
}""",
            variants=(
                Variant("default"),
                Variant("groups", {"head_dim": 1, "n_groups": 2}, {"n_groups": 2}),
                Variant(
                    "norm_before_gate",
                    {"bias": True, "d_conv": 2},
                    {"norm_before_gate": True, "chunk_size": 5},
                ),
                Variant(
                    "no_norm_limited",
                    {"gated_norm": False, "conv_bias": False},
                    {"dt_limit": (0.01, 0.05)},
                ),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            stream,
            title="STREAM",
            kind="ltv",
            connectivity="siso",
            discretizations=stream.DISCRETIZATIONS,
            modes=stream.MODES,
            timestep_modes=("state_only",),
            stability="always, under zoh, dirac, mamba, bilinear and gbt with alpha >= 1/2",
            citation="""@article{schoene2024stream,
  title   = {STREAM: A Universal State-Space Model for Sparse Geometric Data},
  author  = {Sch{\\"o}ne, Mark and Bhisikar, Yash and Bania, Karan and Nazeer, Khaleelulla Khan and
             Mayr, Christian and Subramoney, Anand and Kappel, David},
  journal = {arXiv preprint arXiv:2411.12603},
  year    = {2024}
}""",
            variants=(
                Variant("default"),
                Variant("zoh", {"d_conv": 3}, {"discretization": "zoh"}),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            rglru,
            title="RG-LRU",
            aliases=("Griffin", "Hawk"),
            kind="ltv",
            connectivity="siso",
            discretizations=rglru.DISCRETIZATIONS,
            modes=rglru.MODES,
            timestep_modes=rglru.TIMESTEP_MODES,
            stability="always",
            citation="""@article{de2024griffin,
  title   = {Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language
             Models},
  author  = {De, Soham and Smith, Samuel L. and Fernando, Anushan and others},
  journal = {arXiv preprint arXiv:2402.19427},
  year    = {2024}
}""",
            variants=(
                Variant("default"),
                Variant("two_heads", {"heads": 2}),
                Variant("paper_ring", {"init_power": 8.0, "heads": 1}, {"c": 6.0}),
                Variant(
                    "no_start_rule", {"bias": False, "conv_bias": False}, {"start_rule": False}
                ),
                Variant("bidirectional", {"bidirectional": True}, {"bidirectional": True}),
            ),
        ),
        _model(
            s7,
            title="S7",
            kind="ltv",
            connectivity="mimo",
            discretizations=s7.DISCRETIZATIONS,
            modes=s7.MODES,
            timestep_modes=("both", "state_only"),
            stability=(
                "delta: with stable_reparam or clip_eigs, under zoh, dirac, mamba, bilinear and "
                "gbt with alpha >= 1/2; full: always"
            ),
            citation="""@article{soydan2024s7,
  title   = {S7: Selective and Simplified State Space Layers for Sequence Modeling},
  author  = {Soydan, Taylan and Zubi{\\'c}, Nikola and Messikommer, Nico and Mishra, Siddhartha and
             Scaramuzza, Davide},
  journal = {arXiv preprint arXiv:2410.03464},
  year    = {2024}
}""",
            variants=(
                Variant("default", without=_S7_FULL_ONLY),
                Variant(
                    "plain_clipped",
                    {"stable_reparam": False, "C_init": "lecun_normal"},
                    {"clip_eigs": True},
                    without=_S7_FULL_ONLY,
                ),
                Variant(
                    "blocks_full_spectrum",
                    {"blocks": 2, "conj_sym": False},
                    {"conj_sym": False},
                    without=_S7_FULL_ONLY,
                ),
                Variant(
                    "bilinear",
                    {"C_init": "complex_normal"},
                    {"discretization": "bilinear"},
                    without=_S7_FULL_ONLY,
                ),
                Variant("dirac", {}, {"discretization": "dirac"}, without=_S7_FULL_ONLY),
                Variant(
                    "bidirectional",
                    {"bidirectional": True},
                    {"bidirectional": True},
                    without=_S7_FULL_ONLY,
                ),
                Variant("full", {"variant": "full"}, {"variant": "full"}, without=_S7_DELTA_ONLY),
                Variant(
                    "full_upstream",
                    {"variant": "full", "init_memory": "upstream"},
                    {"variant": "full"},
                    without=_S7_DELTA_ONLY | {"abar_min", "abar_max"},
                ),
            ),
        ),
    )
}


def get(name: str) -> Model:
    """Return the model of that name, without regard to case, ``-`` and ``_``; aliases count.

    Raises:
        ValueError: no such model; the message lists what there is.
    """
    if name in MODELS:
        return MODELS[name]
    wanted = _plain(name)
    for model in MODELS.values():
        if wanted in map(_plain, (model.name, *model.aliases)):
            return model
    raise ValueError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")


def bind(name: str, **choices: Any) -> Model:
    """Return the model with these choices fixed in every function that knows them.

    Raises:
        ValueError: an unknown model, or a choice that none of its functions has.
    """
    model = get(name)
    functions = {f: getattr(model, f) for f in FUNCTIONS if getattr(model, f) is not None}
    known = {f: _options(fn) for f, fn in functions.items()}
    for choice in choices:
        if not any(choice in options for options in known.values()):
            everything = sorted(set().union(*known.values()))
            raise ValueError(f"{model.name} has no option {choice!r}; expected one of {everything}")
    return model._replace(
        **{
            f: partial(fn, **{k: v for k, v in choices.items() if k in known[f]})
            for f, fn in functions.items()
        }
    )


def always_stable(model: Model, choices: Mapping[str, Any]) -> bool:
    """Return whether abs(A_bar) < 1 holds by construction, whatever training and steps do.

    Args:
        model: its ``stability`` says ``always`` and nothing more, or names one choice that breaks
            it: ``always (but for OPTION='VALUE')``.
        choices: the options in force.
    """
    claim = re.fullmatch(r"always(?: \(but for (\w+)='(\w+)'\))?", model.stability)
    return claim is not None and (claim[1] is None or choices.get(claim[1]) != claim[2])


def options(model: Model, function: str) -> frozenset[str]:
    """Return the names of the keyword options of one of the model's functions."""
    fn = getattr(model, function)
    if fn is None:
        return frozenset()
    # torch.compile traces through a cache, and warns that it does
    return _options(fn) if torch.compiler.is_compiling() else _known_options(fn)


def _options(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_known_options = lru_cache(maxsize=256)(_options)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
