# SPDX-License-Identifier: MIT
"""Options of a network of residual blocks around one layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lrnnx_nn.cli.arguments import KINDS, flag

_TEXTS = {
    "layer": "recurrent layer, see `lrnnx models`",
    "d_model": "channels of the blocks",
    "d_state": "state size of the layer",
    "n_layer": "number of blocks",
    "norm": "layer, rms, batch or none",
    "activation": "none, gelu, half_glu1, half_glu2, full_glu or glu",
    "dropout": "probability of a zero",
}


Options = Mapping[str, Mapping[str, Any]]
"""Of layers by name, that differ from their own defaults."""


def add_network_options(parser: Any, defaults: Mapping[str, Any], layers: Options) -> None:
    """Add a group with an option for each of ``defaults``, and --layer-option."""
    group = parser.add_argument_group("the network")
    for name, default in defaults.items():
        kind, metavar = KINDS[type(default)]
        group.add_argument(
            flag(name), type=kind, default=default, metavar=metavar,
            help=f"{_TEXTS[name]} (default: %(default)s)",
        )  # fmt: skip
    group.add_argument(
        "--layer-option", action="append", default=[], metavar="KEY=VALUE",
        help="a further option of the layer, may be repeated, as in dt_max=1.0 (default: "
        + "; ".join(f"{k}={v} for {name}" for name, o in layers.items() for k, v in o.items())
        + ")",
    )  # fmt: skip


def network_options(
    arguments: argparse.Namespace, defaults: Mapping[str, Any], layers: Options
) -> dict[str, Any]:
    """Return what was asked, with ``layer_options``.

    Raises:
        ValueError: an unknown layer, an option that it does not have.
    """
    from lrnnx_nn.cli.options import parse_layer_options
    from lrnnx_nn.mixers import mixer_name

    values = {name: getattr(arguments, name) for name in defaults}
    layer = mixer_name(values["layer"])
    given = parse_layer_options(layer, arguments.layer_option) if arguments.layer_option else {}
    values["layer_options"] = {**layers.get(layer, {}), **given}
    return values
