# SPDX-License-Identifier: MIT
# pyright: basic
"""Compiled CPU kernels (numba, extra ``cpu``) register here; without one an op runs ``blocked``."""
