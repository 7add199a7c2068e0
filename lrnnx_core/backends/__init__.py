# SPDX-License-Identifier: MIT
"""Implementations of the operators, by device.

The rules every backend obeys:

* ``reference`` is the specification: a plain loop over time, differentiable by PyTorch itself to
  any order. Every other backend is tested against it.
* A leaf operator takes and returns plain tensors, is never differentiated, mutates nothing and
  returns fresh tensors. ``blocked`` (pure PyTorch, any device) is the default; a compiled backend
  overrides it for its device and PyTorch's dispatcher chooses.
* Accumulation is at least float32. The same input gives bitwise the same output.
* Nothing optional (numba, CuPy) is imported before a tensor needs it.
"""
