# SPDX-License-Identifier: MIT
"""Run a small suite of the CUDA kernels under compute-sanitizer: memcheck and racecheck.

    python benchmarks/cuda/sanitize.py

Each tool must report nothing on the kernels as they are, and something on a planted fault: a store
past the end of an output, and a missing barrier. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys

# tool -> (text of linear_scan.cu, what the planted fault makes of it)
FAULTS = {
    "memcheck": ("if (live) y.store(h);", "if (live) y.store(h + (1LL << 36));"),
    "racecheck": ("        wait();\n        __syncthreads();", "        wait();"),
}


def suite(fault: str | None) -> None:
    """Launch every code path on shapes with odd tails, a few tiles long."""
    import torch

    from lrnnx_core.backends import cuda, cuda_linear_scan

    if fault is not None:
        text, planted = FAULTS[fault]
        original = cuda.source

        def broken(name: str) -> str:
            if name != "linear_scan.cu":
                return original(name)
            assert original(name).count(text) == 1
            return original(name).replace(text, planted)

        cuda.source = broken
    dtypes = [torch.float32] if fault else list(cuda_linear_scan.PLANS)
    for dtype, constant, rich in itertools.product(dtypes, (False, True), (False, True)):
        length, channels = 301, 66
        state = torch.promote_types(dtype, torch.float32)
        a = torch.rand(2, 1 if constant else length, channels, device="cuda").to(dtype)
        b = torch.rand(2, length, channels, device="cuda").to(dtype)
        h0 = torch.rand(2, channels, device="cuda").to(state) if rich else None
        reset = torch.rand(2, length, device="cuda") > 0.9 if rich else None
        h, last = cuda_linear_scan.linear_scan(a, b, h0, reset, rich)
        cuda_linear_scan.linear_scan_backward(a, h, h0, reset, b, last, rich)
    torch.cuda.synchronize()


def main() -> int:
    """Run both tools with and without their fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", action="store_true", help="only launch, no sanitizer")
    parser.add_argument("--fault", choices=FAULTS)
    arguments = parser.parse_args()
    if arguments.suite:
        suite(arguments.fault)
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        sys.exit("sanitize: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    wrong = 0
    for tool, fault in itertools.product(FAULTS, (None, "planted")):
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=7", sys.executable, __file__]
        command += ["--suite"] + (["--fault", tool] if fault else [])
        result = subprocess.run(command, capture_output=True, text=True)
        summary = [x for x in result.stdout.splitlines() if "SUMMARY" in x] or ["no summary"]
        found = result.returncode != 0
        expected = fault is not None
        wrong += found != expected
        verdict = "as expected" if found == expected else "WRONG"
        print(f"{tool:<10} {fault or 'as they are':<12} {summary[-1].strip('= ')}  {verdict}")
        if found != expected:
            print(result.stdout[-2000:], result.stderr[-2000:])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
