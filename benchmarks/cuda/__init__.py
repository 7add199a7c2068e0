# SPDX-License-Identifier: MIT
"""Benchmarks of the CUDA kernels: `python -m benchmarks.cuda`, or one of its modules."""
