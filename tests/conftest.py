"""What every test shares: fixed seeds, one thread a process, and a skip where there is no GPU."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

SEED = 0

torch.set_num_threads(1)  # pytest-xdist's processes fill the cores

# A shell starts what runs in the background with Ctrl-C ignored, and children inherit that; tests
# of Ctrl-C, in this process and in those it starts, need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _TorchRandomness:
    """Lets hypothesis seed and restore torch's generator around each of its examples."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_torch_randomness = _TorchRandomness()  # hypothesis keeps a weak reference only
hypothesis.register_random(_torch_randomness)
# No deadline: a test's first example pays for compilation. Derandomized: a red run stays red.
hypothesis.settings.register_profile("lrnnx", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lrnnx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(no_device)


# A hook and no autouse fixture: hypothesis refuses function-scoped fixtures, and module-scoped
# fixtures are seeded too.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(SEED)
    if item.get_closest_marker("cuda") and torch.cuda.is_available():
        _wake_backward_thread()


@functools.cache
def _wake_backward_thread() -> None:
    """Run a kernel in autograd's thread: torch warns where cuBLAS is the first to run there."""
    torch.zeros((), device="cuda", requires_grad=True).exp().backward()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Forget what torch.compile cached, so that no test meets another one's recompile limit."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(scope="module")
def new_tensors_are_on_the_gpu() -> Iterator[None]:
    """For the tests of a whole file: where no device is named, it is the GPU."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture
def entries_launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the CUDA kernels launched from now on, by entry point."""
    from lrnnx_core.backends import cuda

    seen: list[str] = []
    launch = cuda.Kernel.launch

    def noting(self: cuda.Kernel, *values: Any) -> None:
        seen.append(self.entry)
        launch(self, *values)

    monkeypatch.setattr(cuda.Kernel, "launch", noting)
    return seen
