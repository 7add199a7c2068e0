# SPDX-License-Identifier: MIT
"""``lrnnx models``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lrnnx_core import registry
from lrnnx_core.registry import Model
from lrnnx_nn.cli.options import layer_options

_KINDS = {"lti": "time-invariant", "ltv": "time-varying"}
_CONNECTIVITY = {"siso": "one state for each channel", "mimo": "one state for all channels"}


def run(arguments: argparse.Namespace) -> int:
    """Print every model of the registry, or one."""
    names = registry.MODELS if arguments.name is None else [registry.get(arguments.name).name]
    models = [registry.MODELS[name] for name in names]
    if arguments.json:
        print(json.dumps([describe(model) for model in models], indent=2))
    elif arguments.cite:
        print("\n\n".join(model.citation for model in models))
    else:
        print("\n\n".join(_text(model) for model in models))
    return 0


def describe(model: Model) -> dict[str, Any]:
    """Return what is known about a model, as JSON can hold it."""
    return {
        "name": model.name,
        "title": model.title,
        "aliases": list(model.aliases),
        "kind": model.kind,
        "connectivity": model.connectivity,
        "discretizations": list(model.discretizations),
        "modes": list(model.modes),
        "timestep_modes": list(model.timestep_modes),
        "stability": model.stability,
        "options": {
            key: value if isinstance(value, bool | int | float | str | None) else repr(value)
            for key, value in sorted(layer_options(model).items())
        },
        "citation": model.citation,
    }


def _text(model: Model) -> str:
    facts = describe(model)
    options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
    citation = "\n".join("    " + line for line in model.citation.splitlines())
    aliases = f" (also {', '.join(model.aliases)})" if model.aliases else ""
    return "\n".join(
        [
            f"{model.title}: --layer {model.name}{aliases}",
            f"  kind             {_KINDS[model.kind]}, {_CONNECTIVITY[model.connectivity]}",
            f"  discretizations  {', '.join(model.discretizations)}",
            f"  modes            {', '.join(model.modes)}",
            f"  stable           {model.stability}",
            f"  options          {options}",
            "  citation",
            citation,
        ]
    )
