# SPDX-License-Identifier: MIT
"""The decode step of the selective scan on CUDA, against the leaf operator in float64.

Run with ``pytest -m cuda tests/test_cuda_selective_step.py`` on a machine with a GPU and CuPy.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import draw
from torch import Tensor

from lrnnx_core.backends import blocked_selective, cuda_selective_step
from lrnnx_core.backends.cuda_selective_step import selective_step
from lrnnx_core.discretize import FUSED

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("new_tensors_are_on_the_gpu")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPLEX = pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
OPTIONAL = ("D", "z", "dt_bias", "h0", "decay_dt", "timesteps", "reset")
Named = dict[str, Tensor | None]


def problem(
    *optional: str,
    batch: tuple[int, ...] = (3,),
    width: int = 12,
    states: int = 16,
    groups: tuple[int, int] = (1, 1),
    complex_: bool = False,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
    real_matrices: bool = False,
) -> Named:
    """Return the leaf's tensors; activations in ``dtype``, A and h0 in the dtype of the state."""
    own, wide = batch[:shared], torch.promote_types(dtype, torch.float32)
    shapes = {
        "u": (*batch, 1, width), "dt": (*batch, 1, width), "A": (*own, width, states),
        "B": (*batch, 1, groups[0], states), "C": (*batch, 1, groups[1], states),
        "D": (*own, width), "z": (*batch, 1, width), "dt_bias": (*own, width),
        "h0": (*batch, width, states), "decay_dt": (*batch, 1, width),
        "timesteps": (*batch, 1), "reset": (*batch, 1),
    }  # fmt: skip
    tensors: Named = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name in OPTIONAL and name not in optional:
            tensors[name] = None
            continue
        kinds = ("A", "h0") if real_matrices else ("A", "B", "C", "h0")
        x = draw(*shape, seed=i, complex_=complex_ and name in kinds)
        if name == "A":
            decay = -x.real.abs() - 0.1 if complex_ else -x.abs() - 0.1
            x = torch.complex(decay, 3 * x.imag) if complex_ else decay
            x[..., :1] = 0  # a state that does not decay: (e^x - 1)/x at 0
        elif name == "dt":
            x = 0.3 * x
        elif name in ("decay_dt", "timesteps"):
            x = x.abs()
        if name == "reset":
            x = x > 0
        elif x.is_complex():
            x = x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        else:
            x = x.to(wide if name in ("A", "D", "dt_bias", "h0") else dtype)
        tensors[name] = x
    return tensors


def exact(x: Tensor | None) -> Tensor | None:
    if x is None or x.dtype == torch.bool:
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def leaf(named: Named, *choices: Any) -> tuple[Tensor, Tensor]:
    return blocked_selective.selective_scan(*named.values(), *choices, False)[:2]  # pyright: ignore[reportArgumentType]


def step(named: Named, *choices: Any) -> tuple[Tensor, Tensor]:
    return selective_step(*named.values(), *choices)  # pyright: ignore[reportArgumentType]


def error(got: Tensor, expected: Tensor) -> float:
    got = got.to(expected.dtype)
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def against_float64(named: Named, *choices: Any, slack: float = 1.0) -> None:
    want = leaf({k: exact(v) for k, v in named.items()}, *choices)
    plain, ours = leaf(named, *choices), step(named, *choices)
    for x, p, w in zip(ours, plain, want, strict=True):
        assert (x.dtype, x.shape) == (p.dtype, p.shape)
        # two roundings of the dtype: what an exact result may differ by; float64 is the yardstick
        floor = slack * torch.finfo(x.dtype).eps * (4 if p.dtype == w.dtype else 1)
        assert error(x, w) <= 2 * error(p, w) + floor, (x.dtype, choices)


CHOICES = list(itertools.product((False, True), (False, True), FUSED))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@COMPLEX
def test_error_is_at_most_twice_that_of_pytorch(complex_: bool, dtype: torch.dtype) -> None:
    for choices in CHOICES:
        for optional in ((), ("h0", "D", "z", "dt_bias"), OPTIONAL):
            named = problem(*optional, complex_=complex_, dtype=dtype, batch=(5,), width=20)
            if not choices[0]:  # a step below zero may meet a pole of the bilinear rule
                named |= {k: v.abs() for k in ("dt", "dt_bias") if (v := named[k]) is not None}
            against_float64(named, *choices)


@pytest.mark.parametrize("states", [1, 2, 3, 6, 16, 20, 64, 200, 256, 1024])
@COMPLEX
def test_any_number_of_states(states: int, complex_: bool) -> None:
    for dtype, scheme in ((torch.float32, "mamba"), (torch.bfloat16, "zoh")):
        for batch in ((1,), (2,), (6,)):
            named = problem(
                "h0", "D", "z", states=states, width=5, batch=batch, complex_=complex_, dtype=dtype
            )
            against_float64(named, True, False, scheme)


def test_every_optional_argument_alone_and_left_out() -> None:
    sets = [(name,) for name in OPTIONAL]
    sets += [tuple(o for o in OPTIONAL if o != name) for name in OPTIONAL]
    for optional, state_only in itertools.product(sets, (False, True)):
        against_float64(problem(*optional), True, state_only, "zoh")


@pytest.mark.parametrize("groups", [(1, 1), (2, 3), (12, 1), (1, 12), (12, 12)], ids=str)
def test_groups_and_matrices_constant_in_the_batch(groups: tuple[int, int]) -> None:
    for complex_ in (False, True):
        named = problem("h0", groups=groups, complex_=complex_)
        against_float64(named, True, False, "mamba")
        for name in ("B", "C"):
            value = named[name]
            assert value is not None
            named[name] = value[:1].expand(value.shape)
        against_float64(named, True, False, "mamba")


def test_real_matrices_with_complex_states() -> None:
    for dtype in DTYPES:
        named = problem("h0", "D", complex_=True, real_matrices=True, dtype=dtype)
        against_float64(named, True, False, "zoh")


def test_dtypes_that_differ() -> None:
    """bfloat16 activations with a float64 A; parameters and steps in either width."""
    base = problem(*OPTIONAL, dtype=torch.bfloat16)
    for names in (("A",), ("D", "dt_bias"), ("dt", "z", "timesteps"), ("B",), ("C", "decay_dt")):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            named = {k: v.to(dtype) if k in names and v is not None else v for k, v in base.items()}
            against_float64(named, True, False, "zoh", slack=2.0)


def test_slices_strides_and_misaligned_storage() -> None:
    """u, z, dt, B and C as slices of wider projections, as Mamba makes them; the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        named = problem(*OPTIONAL, batch=(5,), dtype=dtype)
        want = step(named, True, False, "mamba")
        for offset in (0, 1, 2, 8):
            moved: Named = {}
            for name, x in named.items():
                if x is None or x.ndim == 1:
                    moved[name] = x
                    continue
                wider = x.new_zeros(*x.shape[:-1], x.shape[-1] + offset + 3)
                moved[name] = wider[..., offset : offset + x.shape[-1]].copy_(x)
            for x, w in zip(step(moved, True, False, "mamba"), want, strict=True):
                assert torch.equal(x, w), (dtype, offset)
        turned = {
            k: x if x is None or x.ndim < 2 else x.transpose(0, -1).contiguous().transpose(0, -1)
            for k, x in named.items()
        }
        for x, w in zip(step(turned, True, False, "mamba"), want, strict=True):
            assert torch.equal(x, w)


def test_batch_dimensions_none_several_and_some_that_do_not_merge() -> None:
    for batch in ((), (2, 3), (2, 1, 4)):
        against_float64(problem(*OPTIONAL, batch=batch), True, False, "zoh")
    named = problem(*OPTIONAL, batch=(2, 3, 2))
    for name in ("u", "h0", "reset"):
        value = named[name]
        assert value is not None
        named[name] = value[:, :1].expand(value.shape)
    value = named["z"]
    assert value is not None
    named["z"] = value[:1, :, :1].expand(value.shape)
    against_float64(named, True, False, "mamba")


def test_parameters_that_have_batch_axes() -> None:
    """What a vmap over parameters makes: A, D and dt_bias with leading axes."""
    for batch, shared in (((3, 4), 1), ((2, 3), 2), ((2, 3, 4), 2)):
        for complex_ in (False, True):
            named = problem(*OPTIONAL, batch=batch, shared=shared, complex_=complex_)
            against_float64(named, True, False, "zoh")


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_a_rows_result_does_not_depend_on_the_batch(batch: int) -> None:
    for dtype, states in itertools.product((torch.float32, torch.bfloat16), (3, 16, 256)):
        named = problem(*OPTIONAL, batch=(batch,), states=states, dtype=dtype)
        together = step(named, True, False, "mamba")
        rest = ("A", "D", "dt_bias")
        for row in {0, batch // 2, batch - 1}:
            one = {k: v if v is None or k in rest else v[row : row + 1] for k, v in named.items()}
            for x, w in zip(step(one, True, False, "mamba"), together, strict=True):
                assert torch.equal(x[0], w[row])


def test_a_cleared_state_is_forgotten_even_where_it_is_not_a_number() -> None:
    named = problem("h0", "reset", batch=(6,))
    reset, h0 = named["reset"], named["h0"]
    assert reset is not None
    assert h0 is not None
    reset.copy_(torch.tensor([True, False] * 3).unsqueeze(-1))
    named["h0"] = h0.masked_fill(reset.unsqueeze(-1), float("nan"))
    y, last = step(named, True, False, "mamba")
    fresh, begun = step({**named, "h0": None}, True, False, "mamba")
    assert torch.equal(y[::2], fresh[::2])
    assert torch.equal(last[::2], begun[::2])
    assert not torch.equal(last[1::2], begun[1::2])
    assert bool(last.isfinite().all())


def test_inputs_stay_and_outputs_are_fresh() -> None:
    named = problem(*OPTIONAL)
    before = {k: None if v is None else v.clone() for k, v in named.items()}
    outputs = step(named, True, False, "zoh")
    starts = {v.data_ptr() for v in named.values() if v is not None}
    assert not starts & {x.data_ptr() for x in outputs}
    assert all(v is None or torch.equal(v, before[k]) for k, v in named.items())


def test_nothing_in_nothing_out() -> None:
    for batch, width, states in (((0,), 4, 16), ((2,), 0, 16), ((2,), 4, 0)):
        named = problem("h0", "D", batch=batch, width=width, states=states)
        y, last = step(named, False, False, "mamba")
        assert y.shape == (*batch, 1, width)
        assert last.shape == (*batch, width, states)
        if states == 0 and named["D"] is not None and named["u"] is not None:
            torch.testing.assert_close(y, named["D"] * named["u"])


def test_tensors_on_two_devices_and_other_dtypes_are_refused() -> None:
    named = problem("h0", "D")
    assert named["D"] is not None
    with pytest.raises(ValueError, match="D is on cpu, the other tensors on cuda"):
        step({**named, "D": named["D"].cpu()}, True, False, "mamba")
    assert named["u"] is not None
    with pytest.raises(ValueError, match=r"float8_e5m2 on CUDA, expected one of float32"):
        step({**named, "u": named["u"].to(torch.float8_e5m2)}, True, False, "mamba")


def test_twenty_runs_give_the_same_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        named = problem(*OPTIONAL, batch=(64,), width=1000, dtype=dtype)
        first = step(named, True, False, "mamba")
        for _ in range(20):
            again = step(named, True, False, "mamba")
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_capture_in_a_graph_a_cold_kernel_included() -> None:
    """The state goes round: replay k is step k of the sequence."""
    named = problem("h0", "D", "z", "dt_bias", batch=(4,), width=33, states=24)
    cuda_selective_step._shape.cache_clear()
    cuda_selective_step.kernel.cache_clear()
    cuda_selective_step._kernel.cache_clear()
    u, h0 = named["u"], named["h0"]
    assert u is not None
    assert h0 is not None
    start = h0.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, last = step(named, True, False, "mamba")
        h0.copy_(last)
    h0.copy_(start)
    h = start
    for seed in range(3):
        u.copy_(draw(*u.shape, seed=50 + seed))
        graph.replay()
        expected, h = step({**named, "h0": h}, True, False, "mamba")
        assert torch.equal(y, expected)
        assert torch.equal(h0, h)


def test_a_side_stream_and_a_second_device() -> None:
    named = problem(*OPTIONAL, width=300)
    want = step(named, True, False, "mamba")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(named, True, False, "mamba")
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    if torch.cuda.device_count() > 1:
        moved = {k: None if v is None else v.to("cuda:1") for k, v in named.items()}
        got = step(moved, True, False, "mamba")
        assert all(torch.equal(x.to("cuda:0"), y) for x, y in zip(got, want, strict=True))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets beyond 32 bits: a state of 8.7 GB."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    batch, width, states = 2**15 + 5, 4096, 16
    one = torch.ones((), dtype=torch.bfloat16)
    h0 = torch.zeros(batch, width, states)
    h0[-1] = 1
    u = one.expand(batch, 1, width)
    matrix = one.expand(batch, 1, 1, states)
    A = torch.zeros(width, states)
    zeros = (None,) * 3
    y, last = selective_step(u, u, A, matrix, matrix, *zeros, h0, *zeros, False, False, "mamba")
    assert bool((last[-1] == 2).all())
    assert bool((last[-2] == 1).all())
    assert bool((y[-1] == 32).all())
