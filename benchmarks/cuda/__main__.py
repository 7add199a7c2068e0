# SPDX-License-Identifier: MIT
"""Run the benchmarks of the CUDA kernels and write what they measure.

    python -m benchmarks.cuda [NAME ...] [--quick] [--folder docs/benchmarks]

One JSON file a benchmark, cuda_NAME.json; `scripts/benchmark_figures.py` draws them. With --quick,
where others' times would be lost, only a --folder that is named is written to.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from benchmarks.cuda import timing

NAMES = (
    "linear_scan", "selective_scan", "conv1d", "rg_lru", "s5", "s7", "s4d", "sums",
    "mamba_block", "decode",
)  # fmt: skip


def main() -> int:
    """Run them one after the other; a failing one does not keep the others from running."""
    options = timing.parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    options.add_argument("--folder", type=Path)
    arguments = options.parse_args()
    folder = arguments.folder
    if folder is None and not arguments.quick:
        folder = timing.ROOT / "docs" / "benchmarks"
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        options.error(f"no benchmark {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    failed: list[str] = []
    for name in arguments.names or NAMES:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        try:
            report = timing.run(
                importlib.import_module(f"benchmarks.cuda.{name}").measure, arguments
            )
        except Exception as error:  # noqa: BLE001  # said, counted, and the next one runs
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(f"{time.monotonic() - start:.0f} s")
        if folder is not None and not arguments.tiny:
            timing.write(report, folder / f"cuda_{name}.json")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
