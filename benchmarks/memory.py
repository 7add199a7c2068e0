"""How much memory a process holds, and how much one call adds to its peak."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def resident(field: str) -> float:
    """Return a size of this process in MiB, VmRSS now or VmHWM at its peak.

    (ru_maxrss would start from the parent's peak.)
    """
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(module: str, name: str, shape: Sequence[int], train: bool) -> float:
    """Return what a benchmark says for ``--peak NAME --shape ... [--train]`` in a fresh process.

    It is MiB by which one call raises the peak resident size.
    """
    command = [sys.executable, "-m", module, "--peak", name, "--shape", *map(str, shape)]
    out = subprocess.run(
        [*command, *(["--train"] if train else [])], capture_output=True, text=True, check=True
    )
    return float(out.stdout)
