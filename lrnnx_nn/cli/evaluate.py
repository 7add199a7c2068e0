# SPDX-License-Identifier: MIT
"""``lrnnx eval``."""

from __future__ import annotations

import argparse
import importlib
import json

from lrnnx_nn.cli.arguments import table
from lrnnx_nn.cli.options import parse_device
from lrnnx_nn.training.folder import read_config

_HOMES = {"classify": "run"}  # of the others the module has the task's name


def run(arguments: argparse.Namespace) -> int:
    """Test the network of a run folder and print how it did."""
    device = parse_device(arguments.device)
    task = read_config(arguments.run)["task"]
    module = importlib.import_module(f"lrnnx_nn.training.{_HOMES.get(task, task)}")
    result = module.evaluate_run(arguments.run, source=arguments.source, device=device)
    print(json.dumps(result) if arguments.json else table(module.report(result)))
    return 0
