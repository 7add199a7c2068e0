# SPDX-License-Identifier: MIT
"""Run a test file's operators on the CPU both ways: compiled kernels and plain PyTorch.

Import the fixture and a module's tests run twice: ``from backends_both import both_backends``,
``pytestmark = pytest.mark.usefixtures("both_backends")``.
"""

import importlib.util

import pytest

COMPILED = importlib.util.find_spec("numba") is not None


@pytest.fixture(params=["compiled", "torch"])
def both_backends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv("LRNNX_CPU_BACKEND", "torch")
    elif not COMPILED:
        pytest.skip("numba is not installed")
    else:
        monkeypatch.delenv("LRNNX_CPU_BACKEND", raising=False)
    return request.param
