"""The transform table on a GPU: the tests of test_transform_table.py with CUDA tensors."""

from __future__ import annotations

import pytest
from test_transform_table import *  # noqa: F403  # every test, collected again here

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]
