"""The CUDA kernels of the selective scan: the operator's whole test suite on a GPU, and more.

Run with ``pytest -m cuda tests/test_cuda_selective_scan.py`` on a machine that has a GPU and CuPy.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import test_selective_scan
import torch
from test_selective_scan import *  # noqa: F403  # every test of the operator, collected again here
from test_selective_scan import COMPLEX, OPTIONS, SCHEME, Named, deviation, problem, results
from torch import Tensor

from lrnnx_core.backends import blocked_selective, cuda, cuda_selective, cuda_selective_scan
from lrnnx_core.ops import selective_scan

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]

# These are about the CPU, or about no device.
for _name in (
    "test_autocast_changes_nothing",
    "test_bad_arguments_are_named",
    "test_leaves_agree_with_their_fake_versions",
    "test_the_chunk_is_no_part_of_the_result",
    "test_peak_memory_grows_by_a_fraction_of_all_states",
    "test_no_uninitialized_memory_reaches_a_result",
):
    if getattr(test_selective_scan, _name, None) is None:
        raise RuntimeError(f"{_name} is gone from test_selective_scan.py")
    globals().pop(_name, None)


MAMBA = ("D", "z", "dt_bias", "h0")
ACTIVATIONS = ("u", "dt", "B", "C", "z")


def sized(
    batch: int, length: int, width: int, states: int, *optional: str, complex_: bool = False,
    groups: int = 0, constant: str = "", seed: int = 0,
) -> Named:  # fmt: skip
    """Return a problem of any size, with stable poles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_selective_scan, "E", width)
        patch.setattr(test_selective_scan, "N", states)
        return problem(
            length, *optional, batch=(batch,), complex_=complex_, groups=groups,
            constant=constant, seed=seed,
        )  # fmt: skip


def narrow(named: Named, dtype: torch.dtype) -> Named:
    """Activations in ``dtype``, the rest at least in float32."""
    state = torch.promote_types(dtype, torch.float32)
    both = {True: state.to_complex(), False: state}
    return {
        k: v if v.dtype == torch.bool
        else v.to(dtype) if k in ACTIVATIONS and not v.is_complex()
        else v.to(both[v.is_complex()])
        for k, v in named.items()
    }  # fmt: skip


def exact(named: Named) -> Named:
    double = {True: torch.complex128, False: torch.float64}
    return {
        k: v if v.dtype == torch.bool else v.to(double[v.is_complex()]) for k, v in named.items()
    }


def plain(named: Named, **options: Any) -> Named:
    """The same by plain PyTorch on the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_selective_scan, "_fits", lambda *_: False)
        return results(named, **options)


def relative(got: Tensor, want: Tensor) -> float:
    want = want.to(torch.complex128 if want.is_complex() else torch.float64)
    return float((got.to(want.dtype) - want).norm() / want.norm().clamp(min=1e-30))


def no_worse_than_pytorch(named: Named, **options: Any) -> None:
    """Errors of whole arrays at most twice plain PyTorch's (gradients three times)."""
    want, theirs = plain(exact(named), **options), plain(named, **options)
    ours = results(named, **options)
    for k, w in want.items():
        assert (ours[k].dtype, ours[k].shape) == (theirs[k].dtype, theirs[k].shape), k
        # what an exact result may differ by; in float64 plain PyTorch is the reference itself
        floor = (1 if w.dtype != ours[k].dtype else 50) * torch.finfo(ours[k].dtype).eps
        allowed = (3 if k[0] == "d" else 2) * relative(theirs[k], w) + floor
        assert relative(ours[k], w) <= allowed, (k, relative(ours[k], w), relative(theirs[k], w))


def test_the_kernels_are_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.ready()
    launched = []
    launch = cuda.Kernel.launch

    def spy(self: cuda.Kernel, *arguments: Any) -> None:
        launched.append(self.entry)
        launch(self, *arguments)

    monkeypatch.setattr(cuda.Kernel, "launch", spy)
    results(problem(40, *MAMBA), softplus=True)
    assert launched == ["selective_scan", "selective_scan_backward"]


FORMS = {
    "mamba": (MAMBA, {}, {"softplus": True}),
    "zoh": ((*MAMBA, "reset"), {}, {"softplus": True, "discretization": "zoh"}),
    "bilinear": (MAMBA, {}, {"softplus": True, "discretization": "bilinear"}),
    "dirac": (("z",), {}, {"discretization": "dirac"}),
    "stream": OPTIONS["stream"],
    "timed": OPTIONS["timed"],
    "complex zoh": (("D", "h0"), {"complex_": True}, {"discretization": "zoh"}),
    "complex mamba": (("z", "h0"), {"complex_": True}, {}),
    "constant B and C": (("D",), {"constant": "BC"}, {}),
    "groups": (("D", "z"), {"groups": 4}, {}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_error_is_at_most_twice_that_of_pytorch(form: str, dtype: torch.dtype) -> None:
    optional, shape, options = FORMS[form]
    for length, width, states in ((1, 8, 16), (67, 72, 16), (1000, 40, 16), (130, 36, 5)):
        named = sized(2, length, width, states, *optional, **shape)
        no_worse_than_pytorch(narrow(named, dtype), **options)


def test_long_memory_in_float32() -> None:
    """Decays near one over many steps, where an error of the exponential adds up."""
    named = sized(1, 20_000, 16, 16, "D", "z")
    named["dt"] = 1e-3 + 0.005 * named["dt"].abs()
    no_worse_than_pytorch(narrow(named, torch.float32))


@pytest.mark.parametrize("states", [1, 2, 3, 4, 7, 16, 31, 64, 65, 128, 200, 256, 1024])
@COMPLEX
def test_any_number_of_states(states: int, complex_: bool) -> None:
    scheme = "zoh" if complex_ else "mamba"
    for width, length in ((5, 37), (64, 40)):
        named = sized(2, length, width, states, "D", "z", "h0", complex_=complex_)
        want = plain(named, discretization=scheme)
        got = results(named, discretization=scheme)
        errors = {k: deviation(got[k], want[k]) for k in want}
        assert all(e < 1e-12 for e in errors.values()), errors


@SCHEME
@COMPLEX
def test_lengths_around_tiles_and_chunks(scheme: str, complex_: bool) -> None:
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97):
        named = sized(1, length, 12, 4, "h0", "reset", "z", complex_=complex_)
        want, got = plain(named, discretization=scheme), results(named, discretization=scheme)
        errors = {k: deviation(got[k], want[k]) for k in want}
        assert all(e < 1e-11 for e in errors.values()), (length, errors)


@SCHEME
@COMPLEX
@pytest.mark.parametrize("option", ["everything", "mamba", "reset", "constant B and C", "stream"])
def test_segments_of_time(
    scheme: str, complex_: bool, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows are cut where they alone do not fill the chip; any cut gives the same numbers."""
    optional, shape, options = OPTIONS[option]
    monkeypatch.setattr(cuda_selective, "LONG", 64)
    for length, shortest in ((64, 32), (97, 32), (200, 64), (333, 32)):
        monkeypatch.setattr(cuda_selective, "SHORTEST", shortest)
        named = sized(2, length, 20, 6, *optional, complex_=complex_, **shape)
        want = plain(named, discretization=scheme, **options)
        got = results(named, discretization=scheme, **options)
        errors = {k: deviation(got[k], want[k]) for k in want}
        assert all(e < 1e-11 for e in errors.values()), (length, errors)


def test_segments_in_float32_are_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_selective, "LONG", 4096)
    monkeypatch.setattr(cuda_selective, "SHORTEST", 512)
    no_worse_than_pytorch(narrow(sized(1, 8192, 40, 16, *MAMBA), torch.float32), softplus=True)
    no_worse_than_pytorch(narrow(sized(1, 8192, 40, 16, *MAMBA), torch.bfloat16), softplus=True)


@pytest.mark.parametrize("rows", [1, 8, 64, 600])
def test_every_way_to_lay_states_on_lanes(rows: int) -> None:
    """The number of channels chooses it; the forward's bits do not depend on it."""
    named = narrow(sized(rows, 70, 96, 16, *MAMBA), torch.float32)
    got = results(named, softplus=True)
    want = plain(exact(named), softplus=True)
    for k in want:
        assert relative(got[k], want[k]) < 2e-6, k
    one = {k: v[-1:] if v.shape[0] == rows and v.ndim > 1 else v for k, v in named.items()}
    weights = torch.randn(rows, 70, 96), torch.randn(rows, 96, 16)
    together = leaves({k: v.detach() for k, v in named.items()}, *weights, softplus=True)
    alone = leaves(
        {k: v.detach() for k, v in one.items()}, *(w[-1:] for w in weights), softplus=True
    )
    for name, a, t in zip(("y", "last", *one), alone, together, strict=False):
        if name not in ("A", "D", "dt_bias"):
            assert torch.equal(a, t[-1:]), name


@pytest.mark.parametrize("groups", [(1, 6), (2, 3), (4, 6), (12, 1), (3, 3)], ids=str)
def test_different_groups_of_B_and_C(groups: tuple[int, int]) -> None:
    named = sized(2, 50, 12, 8, "D", "z")
    for name, g in zip("BC", groups, strict=True):
        named[name] = sized(2, 50, 12, 8, groups=g, seed=3)[name]
    want, got = plain(named), results(named)
    for k in want:
        assert deviation(got[k], want[k]) < 1e-12, k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_twenty_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    """With other work on the chip."""
    complex_ = dtype.is_complex
    optional, shape, options = OPTIONS["everything"]
    named = sized(3, 500, 128, 16, *optional, complex_=complex_, **shape)
    named = narrow(named, torch.float32 if complex_ else dtype)
    first, noise = results(named, **options), torch.randn(1024, 1024)
    side = torch.cuda.Stream()
    for i in range(20):
        with torch.cuda.stream(side):
            for _ in range(i):
                noise = torch.tanh(noise @ noise)
        again = results(named, **options)
        assert all(torch.equal(again[k], first[k]) for k in first)


def leaves(named: Named, gy: Tensor, glast: Tensor, **options: Any) -> list[Tensor]:
    x = {k: v.requires_grad_(v.dtype != torch.bool) for k, v in named.items()}
    y, last = selective_scan(**x, **options)
    wanted = [v for v in x.values() if v.requires_grad]
    return [y, last, *torch.autograd.grad((y, last), wanted, (gy, glast))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_zero_and_misaligned_storage(dtype: torch.dtype) -> None:
    named = narrow(sized(2, 45, 16, 16, *MAMBA), dtype)
    y, last = selective_scan(**named, softplus=True)
    gy, glast = torch.ones_like(y), torch.ones_like(last)
    want = leaves(named, gy, glast, softplus=True)
    got = leaves(
        named, gy[0, 0, 0].expand(y.shape), glast[0, 0, 0].expand(last.shape), softplus=True
    )
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for offset in (1, 3):
        moved = {
            k: torch.cat([v.new_zeros(offset), v.detach().flatten()])[offset:].view(v.shape)
            for k, v in named.items()
        }
        got = leaves(moved, gy, glast, softplus=True)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_slices_of_wide_projections_and_transposed_layouts() -> None:
    """What a Mamba block passes: halves of one projection, B and C behind dt's rank."""
    for dtype, pad in itertools.product((torch.float32, torch.bfloat16), (0, 3)):
        named = narrow(sized(3, 50, 32, 16, *MAMBA), dtype)
        want = leaves({k: v.clone() for k, v in named.items()}, *_ones(named), softplus=True)
        cut = dict(named)
        wide = torch.cat([named["u"], named["z"], named["u"][..., :pad]], -1)
        cut["u"], cut["z"] = wide[..., :32], wide[..., 32:64]
        low = torch.cat([named["u"][..., : 4 + pad], named["B"], named["C"]], -1)
        cut["B"], cut["C"] = low[..., 4 + pad : 20 + pad], low[..., 20 + pad :]
        cut["dt"] = named["dt"].transpose(1, 2).contiguous().transpose(1, 2)
        got = leaves({k: v.detach() for k, v in cut.items()}, *_ones(named), softplus=True)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def _ones(named: Named) -> tuple[Tensor, Tensor]:
    y, last = selective_scan(**named, softplus=True)
    return torch.ones_like(y), torch.ones_like(last)


def test_mixed_dtypes_are_computed_in_the_widest() -> None:
    named = narrow(sized(2, 40, 16, 16, *MAMBA), torch.bfloat16)
    named["dt"] = named["dt"].float()
    no_worse_than_pytorch(named, softplus=True)


def test_without_gradients_no_state_is_kept() -> None:
    named = narrow(sized(8, 4096, 256, 16, "z"), torch.float32)
    bare = dict(named)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        y, _ = selective_scan(**bare)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * y.nbytes


def test_side_streams() -> None:
    named = narrow(sized(4, 300, 64, 16, *MAMBA), torch.float32)
    want = results(named, softplus=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            got = results(named, softplus=True)
            stream.synchronize()
            assert all(torch.equal(got[k], want[k]) for k in want)


def test_capture_in_a_graph() -> None:
    """Forward and backward, a cold kernel included; replayed on other numbers."""
    named = narrow(sized(2, 100, 24, 16, *MAMBA), torch.float32)
    gy, glast = _ones(named)
    cuda_selective.kernel.cache_clear()
    x = {k: v.detach().requires_grad_() for k, v in named.items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, last = selective_scan(**x, softplus=True)
        grads = torch.autograd.grad((y, last), list(x.values()), (gy, glast))
    for seed in (11, 12):
        with torch.no_grad():
            x["u"].copy_(narrow(sized(2, 100, 24, 16, seed=seed), torch.float32)["u"])
        graph.replay()
        fresh = {k: v.detach().clone() for k, v in x.items()}
        want = leaves(fresh, gy, glast, softplus=True)
        assert all(torch.equal(g, w) for g, w in zip((y, last, *grads), want, strict=True))


def test_what_cannot_run_is_refused_before_a_launch() -> None:
    named = sized(2, 9, 4, 4)
    with pytest.raises(ValueError, match="A is on cpu and u on cuda"):
        selective_scan(**named | {"A": named["A"].cpu()})
    leaf = [*named.values(), *[None] * 7, False, False, "mamba", True]
    leaf[3], leaf[4] = leaf[3].unsqueeze(-2), leaf[4].unsqueeze(-2)
    leaf[1] = leaf[1].cpu()
    with pytest.raises(ValueError, match="tensors on cuda:0 and on cpu"):
        cuda_selective_scan.selective_scan(*leaf)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 32 bits; 18 GB in bfloat16."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    length, width = 2**20 + 1, 2304
    u = torch.ones((1, length, width), dtype=torch.bfloat16)
    dt = torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16).expand(u.shape)
    A = torch.full((width, 4), -1.0)
    B = C = torch.ones((1, length, 4), dtype=torch.bfloat16)
    with torch.no_grad():
        y, last = selective_scan(u, dt, A, B, C)
    fixed = 0.5 / (1 - torch.exp(torch.tensor(-0.5)))
    torch.testing.assert_close(last, fixed.expand(last.shape), rtol=1e-4, atol=0)
    assert bool((y[:, -1000:] == (4 * fixed).bfloat16()).all())
    named = {"u": u[:, :50], "dt": dt[:, :50], "A": A, "B": B[:, :50], "C": C[:, :50]}
    with torch.no_grad():
        first = blocked_selective.selective_scan(
            *(v.unsqueeze(-2) if k in "BC" else v for k, v in named.items()),
            *[None] * 7, False, False, "mamba", False,
        )[0]  # fmt: skip
    torch.testing.assert_close(y[:, :50], first, rtol=1e-2, atol=1e-2)
