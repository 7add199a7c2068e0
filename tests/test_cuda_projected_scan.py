"""`projected_scan` on a GPU: its gradient kernel, and the operator's tests.

Run with ``pytest -m cuda tests/test_cuda_projected_scan.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import pytest
import torch
from test_projected_scan import *  # noqa: F403  # every test of the operator, collected again here
from test_projected_scan import BOTH, arguments, run
from torch import Tensor

from lrnnx_core.backends import cuda, cuda_feedthrough

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]


def test_the_kernels_are_in_force() -> None:
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "launch", lambda self, *rest: launched.append(self.entry))
        named = arguments("none", 2, dtype=torch.float32)
        named["u"].requires_grad_()
        run(**named)[0].sum().backward()
        found = launched.copy()
        launched.clear()
        run(**{n: t for n, t in named.items() if n not in BOTH})[0].sum().backward()
    forward, *back = ["diagonal_scan", "diagonal_scan_backward", "diagonal_sums"]
    direct = ["feedthrough_backward", "sum_partials"]
    assert launched == [forward, *back, *direct]
    assert found == [forward, forward, *back, *back, *direct]


@pytest.mark.parametrize("dtype", cuda_feedthrough.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 6, 128, 1028, 1030, 2500])
def test_gradients_of_the_direct_path(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    eps, wide = (torch.finfo(t).eps for t in (dtype, torch.promote_types(dtype, torch.float32)))
    for shared, rows in (((), 1), ((), 513), ((), 3000), ((3,), 700)):
        x, g, dx = (draw(*shared, rows, width) for _ in range(3))
        D = draw(*shared, width)
        ours = dx.clone()
        dD = cuda_feedthrough.add_gradients(ours, g, x, D)
        beside = D.double().unsqueeze(-2)
        want = dx.double() + beside * g.double()
        assert (ours.double() - want).abs().max() <= 4 * eps * want.abs().max()
        terms = g.double() * x.double()
        want = terms.sum(-2)
        allowed = 2 * eps * want.abs() + 4 * wide * terms.abs().sum(-2)
        assert ((dD.double() - want).abs() <= allowed).all()
        again = cuda_feedthrough.add_gradients(dx.clone(), g, x, D)
        assert torch.equal(dD, again)
        # what is not aligned is loaded one number at a time
        moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        dD = cuda_feedthrough.add_gradients(dx.clone(), g, moved, D)
        assert ((dD.double() - want).abs() <= allowed).all()
