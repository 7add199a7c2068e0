"""The transform table on a GPU: the tests of test_transform_table.py with CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_transform_table import *  # noqa: F403  # every test, collected again here

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True, scope="module")
def new_tensors_are_on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
