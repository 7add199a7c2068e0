# SPDX-License-Identifier: MIT
"""``lrnnx eval``."""

from __future__ import annotations

import argparse
import json

from lrnnx_nn.cli.options import parse_device
from lrnnx_nn.training import evaluate_run


def run(arguments: argparse.Namespace) -> int:
    """Test the network of a run folder and print how it did."""
    device = parse_device(arguments.device)
    result = evaluate_run(arguments.run, source=arguments.dataset, device=device)
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"data set       {result['dataset']}")
    print(f"test accuracy  {100 * result['test_accuracy']:.2f} %")
    print(f"test loss      {result['test_loss']:.4f} nats")
    for name, row in zip(result["classes"], result["confusion_matrix"], strict=True):
        print(f"class {name}: {row[result['classes'].index(name)]} of {sum(row)} right")
    return 0
