# SPDX-License-Identifier: MIT
# pyright: basic
"""Compiled CPU kernels register here (numba, extra ``cpu``); until then every op runs ``blocked``."""
