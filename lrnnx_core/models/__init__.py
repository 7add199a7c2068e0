# SPDX-License-Identifier: MIT
"""One file a model: init, init_state, discretize, kernel, scan and step as pure functions."""
