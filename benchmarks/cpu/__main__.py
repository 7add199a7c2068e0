# SPDX-License-Identifier: MIT
"""Time the compiled CPU kernels beside other libraries and write what was measured.

    python -m benchmarks.cpu [NAME ...] [--threads 1 2] [--quick] [--folder docs/benchmarks]

Each benchmark runs in a process of its own for each number of threads. One JSON file a benchmark,
cpu_NAME.json; at the end they become FOLDER/cpu.md and its figures (`--render` does that alone).
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cpu import page, timing

NAMES = ("linear_scan", "selective_scan", "s5", "s4d", "gated", "decode")


def one(name: str, threads: int, arguments: Any) -> None:
    """Measure one benchmark in this process and print its report as the last line."""
    timing.bind(threads)
    session = timing.Session(
        threads, arguments.rounds, tiny=arguments.tiny, peers=not arguments.quick
    )
    importlib.import_module(f"benchmarks.cpu.{name}").measure(session)
    print(json.dumps(session.report()))


def main() -> int:
    """Run them one after the other; a failing one does not keep the others from running."""
    options = timing.parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    options.add_argument("--folder", type=Path)
    options.add_argument("--render", action="store_true", help="write the page and figures alone")
    options.add_argument("--here", action="store_true", help="in this process; prints JSON")
    arguments = options.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        options.error(f"no benchmark {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    for option, least in (("threads", min(arguments.threads)), ("rounds", arguments.rounds)):
        if least < 1:
            options.error(f"--{option} {least}, expected >= 1")
    folder = arguments.folder
    if folder is None and not arguments.quick:  # others' times would be lost
        folder = timing.ROOT / "docs" / "benchmarks"
    if arguments.here:
        one(arguments.names[0], arguments.threads[0], arguments)
        return 0
    failed: list[str] = []
    for name in () if arguments.render else arguments.names or NAMES:
        runs = []
        for threads in arguments.threads:
            print(f"\n== {name}, {threads} thread{'s' * (threads > 1)}", flush=True)
            start = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.cpu", name, "--here"]
            command += ["--threads", str(threads), "--rounds", str(arguments.rounds)]
            command += ["--quick"] * arguments.quick + ["--tiny"] * arguments.tiny
            lines: list[str] = []
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    lines.append(line)
                    if not line.startswith("{"):
                        print(line, end="", flush=True)
            if process.returncode:
                failed.append(name)
                print(f"{name} failed with {threads} threads", file=sys.stderr)
                break
            runs.append(json.loads(lines[-1]))
            print(f"{time.monotonic() - start:.0f} s")
        else:
            report = {"machine": timing.machine(), "runs": runs}
            if folder is not None and not arguments.tiny:
                timing.write(report, folder / f"cpu_{name}.json")
    if folder is not None and not arguments.tiny:
        page.write(folder, NAMES)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
