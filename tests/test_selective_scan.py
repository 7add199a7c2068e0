"""selective_scan: its hand-written gradient against the loop, a dense operator, and the edges.

Derivatives of higher order and every transform are the business of the transform table.
"""

from __future__ import annotations

import gc
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends_both import both_backends  # noqa: F401
from op_cases import draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrnnx_core.backends import blocked_selective
from lrnnx_core.backends.blocked_selective import CHUNK
from lrnnx_core.discretize import FUSED, SCHEMES
from lrnnx_core.ops import selective_scan

# The function hides the module of its name in the package.
module = importlib.import_module("lrnnx_core.ops.selective_scan")

pytestmark = pytest.mark.usefixtures("both_backends")

E, N = 4, 3
LENGTHS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7)
COMPLEX = pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
SCHEME = pytest.mark.parametrize("scheme", FUSED)

Named = dict[str, Tensor]


def problem(
    length: int,
    *optional: str,
    batch: tuple[int, ...] = (2,),
    complex_: bool = False,
    groups: int = 0,
    constant: str = "",
    seed: int = 0,
) -> Named:
    """Return tensors by the names of the arguments; ``optional`` ones only where named."""
    matrix = (*batch, length, groups, N) if groups else (*batch, length, N)
    shapes: dict[str, tuple[int, ...]] = {
        "u": (*batch, length, E), "dt": (*batch, length, E), "A": (E, N), "B": matrix, "C": matrix,
        "D": (E,), "z": (*batch, length, E), "dt_bias": (E,), "h0": (*batch, E, N),
        "decay_dt": (*batch, length, E), "integration_timesteps": (*batch, length),
        "reset": (*batch, length),
    }  # fmt: skip
    shapes |= dict.fromkeys(constant, (E, N))
    tensors: Named = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if i >= 5 and name not in optional:
            continue
        x = draw(*shape, seed=20 * seed + i, complex_=complex_ and name in ("A", "B", "C", "h0"))
        if name == "A":
            decay = -x.real.abs() - 0.3
            x = torch.complex(decay, x.imag) if complex_ else decay
        elif name == "dt":
            x = 0.4 * x - 1.0  # of either sign without softplus: the formulas know no sign
        elif name in ("decay_dt", "integration_timesteps"):
            x = x.abs()
        elif name == "reset":
            x = x > 0.8
        tensors[name] = x
    if "dt_bias" not in optional:
        tensors["dt"] = tensors["dt"].abs()
    return tensors


def results(named: Named, weights: str = "both", **options: Any) -> Named:
    """Return the outputs, and the gradients of a random weighting of them."""
    x = {k: v if v.dtype == torch.bool else v.detach().requires_grad_() for k, v in named.items()}
    outputs = dict(zip(("y", "last"), selective_scan(**x, **options), strict=True))
    used = [o for k, o in outputs.items() if weights in ("both", k)]
    upstream = [draw(*o.shape, seed=90 + i, complex_=o.is_complex()) for i, o in enumerate(used)]
    leaves = {k: v for k, v in x.items() if v.requires_grad}
    grads = torch.autograd.grad(
        used, list(leaves.values()), [g.to(o.dtype) for g, o in zip(upstream, used, strict=True)],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    found = {k: v.detach() for k, v in outputs.items()}
    return found | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def deviation(got: Tensor, want: Tensor) -> float:
    """Return the largest deviation relative to the scale of ``want``."""
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    scale = wide(want).abs().max().clamp(min=1e-30)
    return float(((wide(got) - wide(want)).abs().max() / scale).nan_to_num(nan=float("inf")))


def agree(got: Named, want: Named, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    errors = {k: deviation(got[k], want[k]) for k in want}
    assert all(e <= tolerance for e in errors.values()), errors


def against_the_loop(named: Named, tolerance: float = 1e-12, **options: Any) -> None:
    agree(results(named, **options), results(named, **options, backend="reference"), tolerance)


# ---------------------------------------------------------------- the gradient by hand

# Name -> (optional tensors, shape of the problem, options of the call).
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "bare": ((), {}, {}),
    "mamba": (("D", "z", "dt_bias", "h0"), {}, {"softplus": True}),
    "bias without softplus": (("dt_bias",), {}, {}),
    "timed": (("integration_timesteps", "h0", "D"), {}, {}),
    "timed state_only": (
        ("integration_timesteps", "dt_bias"), {}, {"timestep_mode": "state_only", "softplus": True},
    ),
    "stream": (
        ("decay_dt", "integration_timesteps", "z", "dt_bias", "h0"),
        {},
        {"timestep_mode": "state_only", "softplus": True},
    ),
    "own decay timed both": (("decay_dt", "integration_timesteps"), {}, {}),
    "reset": (("reset", "h0", "integration_timesteps"), {}, {}),
    "groups": (("z", "D"), {"groups": 2}, {}),
    "a group a channel": ((), {"groups": E}, {}),
    "constant B": (("h0",), {"constant": "B"}, {}),
    "constant B and C": (("D",), {"constant": "BC"}, {}),
    "everything": (
        ("D", "z", "dt_bias", "h0", "decay_dt", "integration_timesteps", "reset"),
        {"groups": 2, "constant": "C"},
        {"softplus": True},
    ),
}  # fmt: skip
option = pytest.mark.parametrize("option", OPTIONS)
# With B and C of few channels each the scheme runs in other compiled kernels, which take seconds to
# compile: two choices of scheme and numbers run them in CI.
GROUPED = ("groups", "a group a channel", "constant B", "constant B and C", "everything")
BOTH = (("mamba", False), ("zoh", True))


def cases(*schemes: str) -> pytest.MarkDecorator:
    """Parametrize over schemes, real and complex numbers, and options."""
    return pytest.mark.parametrize(
        ("scheme", "complex_", "option"),
        [
            pytest.param(
                *(scheme, complex_, name),
                id=f"{name}-{'complex' if complex_ else 'real'}-{scheme}",
                marks=pytest.mark.exhaustive
                if name in GROUPED and (scheme, complex_) not in BOTH
                else (),
            )
            for scheme, complex_, name in itertools.product(schemes, (False, True), OPTIONS)
        ],
    )


@cases(*FUSED)
def test_values_and_gradients_equal_autograd_of_the_loop(
    scheme: str, complex_: bool, option: str
) -> None:
    optional, shape, options = OPTIONS[option]
    # Every length where the call is the common one, one inside the second chunk elsewhere.
    for length in LENGTHS if option in ("mamba", "everything") else (CHUNK + 5,):
        named = problem(length, *optional, complex_=complex_, **shape)
        against_the_loop(named, discretization=scheme, **options)


@pytest.mark.parametrize("weights", ["y", "last"])
@COMPLEX
def test_either_output_alone_has_gradients(complex_: bool, weights: str) -> None:
    optional, shape, options = OPTIONS["everything"]
    for scheme, length in itertools.product(FUSED, (1, CHUNK + 1)):
        named = problem(length, *optional, complex_=complex_, **shape)
        against_the_loop(named, **options, discretization=scheme, weights=weights)


@pytest.mark.parametrize("scheme", [*FUSED, "gbt"])
@COMPLEX
def test_length_zero_gives_the_state_back_and_its_gradient(complex_: bool, scheme: str) -> None:
    options = {"discretization": scheme, **({"alpha": 0.3} if scheme == "gbt" else {})}
    for optional in ((), ("h0",), ("h0", "z", "D", "dt_bias", "integration_timesteps", "reset")):
        named = problem(0, *optional, complex_=complex_)
        found = results(named, **options)
        assert found["y"].shape == (2, 0, E)
        assert torch.equal(found["last"], named.get("h0", torch.zeros_like(found["last"])))
        if "h0" in named:
            weight = draw(2, E, N, seed=91, complex_=complex_)
            assert torch.equal(found["dh0"], weight)
        rest = {k: v for k, v in found.items() if k[0] == "d" and k != "dh0"}
        assert not any(v.any() for v in rest.values())


def test_only_the_wanted_gradients_are_returned() -> None:
    named = problem(5, "D", "z", "h0")
    for wanted in named:
        x = {k: v.detach().requires_grad_(k == wanted) for k, v in named.items()}
        y, last = selective_scan(**x)
        (y.sum() + last.sum()).backward()
        assert [k for k, v in x.items() if v.grad is not None] == [wanted]
        want = results(named)  # other weights: only the shape is compared
        assert x[wanted].grad.shape == want["d" + wanted].shape
    with torch.no_grad():
        assert not selective_scan(**x)[0].requires_grad


def test_extreme_steps_have_finite_gradients() -> None:
    for step in (0.0, 1e-12, 30.0, 1e4):
        for scheme in FUSED:
            named = problem(CHUNK + 3, "D", "z", "h0")
            named["dt"] = torch.full_like(named["dt"], step)
            found = results(named, discretization=scheme)
            assert all(v.isfinite().all() for v in found.values()), (step, scheme)
            # absolute: autograd takes tiny derivatives as differences of large terms, we do not
            want = results(named, discretization=scheme, backend="reference")
            for key, w in want.items():
                assert (found[key] - w).abs().max() <= 1e-12 * w.abs().max().clamp(min=1), key


# ---------------------------------------------------------------- a third oracle


def dense(named: Named, scheme: str, softplus: bool = False, state_only: bool = False) -> tuple:
    """Apply y = M u as an L x L operator; shares no line with the library (exponential decays).

    M_ij = sum_n C_i exp(A (S_i - S_j)) gamma_j B_j, where S sums the steps of the decay.
    """
    u, dt, A = named["u"], named["dt"], named["A"]
    length = u.shape[-2]
    delta = dt + named.get("dt_bias", torch.zeros(E))
    delta = torch.log1p(torch.exp(delta)) if softplus else delta
    decay = named.get("decay_dt", delta)
    if (tau := named.get("integration_timesteps")) is not None:
        decay = decay * tau[..., None]
        delta = delta if state_only else delta * tau[..., None]
    full = {}
    for key in "BC":
        m = named[key]
        if m.ndim == 2:
            m = m.expand(*u.shape[:-1], E, N)
        else:
            m = m.unsqueeze(-2) if m.ndim == u.ndim else m
            m = torch.stack([m[..., d // (E // m.shape[-2]), :] for d in range(E)], dim=-2)
        full[key] = m
    S = decay.cumsum(-2)
    gamma = {
        "mamba": delta[..., None].expand(*delta.shape, N),
        "zoh": (torch.exp(delta[..., None] * A) - 1) / A,
        "dirac": torch.ones(*delta.shape, N),
    }[scheme]
    documents = named.get("reset", torch.zeros(u.shape[:-1], dtype=torch.bool)).long().cumsum(-1)
    k = torch.arange(length)
    seen = (documents[..., :, None] == documents[..., None, :]) & (k <= k[:, None])
    propagator = torch.exp((S[..., :, None, :, None] - S[..., None, :, :, None]) * A)
    propagator = torch.where(seen[..., None, None], propagator, torch.zeros_like(propagator))
    M = torch.einsum("...ien,...ijen,...jen->...ije", full["C"], propagator, gamma * full["B"])
    y = torch.einsum("...ije,...je->...ie", M, u.to(M.dtype))
    last = torch.einsum("...jen,...je->...en", propagator[..., -1, :, :, :] * gamma * full["B"],
                        u.to(M.dtype))  # fmt: skip
    if "h0" in named:
        carried = torch.exp(S[..., None] * A) * named["h0"][..., None, :, :]
        carried = torch.where((documents == 0)[..., None, None], carried, 0 * carried)
        y = y + (full["C"] * carried).sum(-1)
        last = last + carried[..., -1, :, :]
    y = 2 * y.real if y.is_complex() else y
    y = y + named.get("D", torch.zeros(E)) * u
    if "z" in named:
        y = y * named["z"] / (1 + torch.exp(-named["z"]))
    return y, last


@cases("mamba", "zoh", "dirac")
def test_equals_the_dense_operator(scheme: str, complex_: bool, option: str) -> None:
    optional, shape, options = OPTIONS[option]
    state_only = options.get("timestep_mode") == "state_only"
    for length in (1, 9):
        named = problem(length, *optional, complex_=complex_, **shape)
        want = dense(named, scheme, options.get("softplus", False), state_only)
        for backend in ("auto", "reference"):
            got = selective_scan(**named, discretization=scheme, **options, backend=backend)
            agree(dict(zip("yh", got, strict=True)), dict(zip("yh", want, strict=True)))


def test_a_constant_system_is_a_linear_recurrence() -> None:
    """y is the impulse response's convolution where nothing depends on time."""
    length = CHUNK + 9
    named = problem(length, batch=(), constant="BC")
    named["dt"] = torch.full((length, E), 0.3, dtype=torch.float64)
    named |= {k: named[k].unsqueeze(0) for k in "BC"}
    y, _ = selective_scan(**named)
    power = torch.exp(0.3 * named["A"] * torch.arange(length)[:, None, None])
    kernel = (named["C"] * power * 0.3 * named["B"]).sum(-1)
    want = torch.stack([
        sum(kernel[s] * named["u"][t - s] for s in range(t + 1)) for t in range(length)
    ])  # fmt: skip
    assert deviation(y, want) < 1e-12


# ---------------------------------------------------------------- schemes


@pytest.mark.parametrize("name", ["gbt", "euler", "async"])
@COMPLEX
@option
def test_schemes_that_are_composed(name: str, complex_: bool, option: str) -> None:
    optional, shape, options = OPTIONS[option]
    options = options | {"discretization": name} | ({"alpha": 0.7} if name == "gbt" else {})
    named = problem(CHUNK + 2, *optional, complex_=complex_, **shape)
    against_the_loop(named, **options, tolerance=3e-12)


@SCHEME
@COMPLEX
def test_a_callable_is_composed_and_agrees_with_the_fused_scheme(
    scheme: str, complex_: bool
) -> None:
    optional, shape, options = OPTIONS["everything"]
    named = problem(CHUNK + 2, *optional, complex_=complex_, **shape)
    got = results(named, discretization=lambda *x: SCHEMES[scheme](*x), **options)
    agree(got, results(named, discretization=scheme, **options), 3e-12)


def test_gbt_of_one_half_is_bilinear_and_async_is_zoh_state_only() -> None:
    named = problem(CHUNK + 2, "integration_timesteps", "h0")
    agree(
        results(named, discretization="gbt", alpha=0.5), results(named, discretization="bilinear")
    )
    agree(
        results(named, discretization="async"),
        results(named, discretization="zoh", timestep_mode="state_only"),
    )


def test_alpha_is_a_number_with_a_gradient() -> None:
    named = problem(7)
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a: selective_scan(**named, discretization="gbt", alpha=a), (alpha,)
    )


def grid(complex_: bool) -> tuple[Tensor, Tensor]:
    """Return A and steps, zeros of both and values around the radius of the series among them."""
    rates = torch.tensor([0.0, 1e-9, 1e-3, 0.299, 0.301, 1.0, 30.0], dtype=torch.float64)
    A = torch.complex(-rates, 2 * rates.flip(0)) if complex_ else -rates
    A = torch.cat([A, torch.zeros(1, dtype=A.dtype)])
    return A, torch.tensor([[0.0], [1e-8], [0.5], [1.0], [7.0]], dtype=torch.float64)


@SCHEME
@COMPLEX
def test_the_fused_form_of_a_scheme_is_the_scheme(scheme: str, complex_: bool) -> None:
    fused = FUSED[scheme]
    A, steps = grid(complex_)
    decay, drive = steps, steps.flip(0)
    A_bar, gamma = SCHEMES[scheme](A, decay, drive)
    torch.testing.assert_close(fused.decay(decay * A).expand_as(A_bar), A_bar, rtol=1e-14, atol=0)
    if fused.gain is not None:
        mine = drive * fused.gain(drive * A)
    else:
        mine = drive.expand_as(A_bar) if fused.scaled else torch.ones_like(A_bar)
    torch.testing.assert_close(mine, gamma.expand_as(mine), rtol=1e-14, atol=0, check_dtype=False)


def derivative(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return f'(x) of a holomorphic or real function by autograd."""
    x = x.detach().requires_grad_()
    y = f(x)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return g.conj()


@SCHEME
@COMPLEX
def test_the_derivatives_of_a_fused_scheme_are_autograds(scheme: str, complex_: bool) -> None:
    fused = FUSED[scheme]
    A, steps = grid(complex_)
    x = (steps * A).reshape(-1)
    slope = fused.decay_slope(x, fused.decay(x))
    torch.testing.assert_close(slope, derivative(fused.decay, x), rtol=1e-12, atol=0)
    if fused.gain is None:
        assert fused.gain_dt is None
        assert fused.gain_slope is None
        return
    assert fused.gain_dt is not None
    assert fused.gain_slope is not None
    torch.testing.assert_close(
        fused.gain_slope(x), derivative(fused.gain, x), rtol=1e-11, atol=1e-14
    )
    # with dt as a complex number the derivative of dt gain(dt A) is holomorphic as well
    dt = steps.to(A.dtype).expand(len(steps), len(A))
    at_dt = derivative(lambda d: SCHEMES[scheme](A, d, d)[1], dt)
    torch.testing.assert_close(fused.gain_dt(steps * A), at_dt, rtol=1e-11, atol=1e-14)


@SCHEME
def test_gradients_at_a_rate_and_a_step_of_zero(scheme: str) -> None:
    named = problem(CHUNK + 3, "h0")
    named["A"][:, 0] = 0.0
    named["dt"][:, ::3] = 0.0
    against_the_loop(named, discretization=scheme)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
@COMPLEX
def test_batch_axes_are_free(batch: tuple[int, ...], complex_: bool) -> None:
    optional, shape, options = OPTIONS["everything"]
    shape = {"groups": 2}
    named = problem(CHUNK + 1, *optional, batch=batch, complex_=complex_, **shape)
    found = results(named, **options)
    assert found["y"].shape == (*batch, CHUNK + 1, E)
    assert found["last"].shape == (*batch, E, N)
    if 0 not in batch:
        agree(found, results(named, **options, backend="reference"))


OWN_AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "u": lambda x: x[:, :1], "dt": lambda x: x[:1], "B": lambda x: x[:1], "z": lambda x: x[0, 0],
    "h0": lambda x: x[0], "decay_dt": lambda x: x[:, :1], "reset": lambda x: x[0],
    "integration_timesteps": lambda x: x[0, 0],
}  # fmt: skip
"""What makes tensors of batch axes (3, 2) such that only together they have them."""


@pytest.mark.parametrize(
    "optional", [(), ("z", "h0", "decay_dt", "integration_timesteps", "reset")]
)
def test_every_tensor_broadcasts_over_batch_axes(optional: tuple[str, ...]) -> None:
    full = problem(CHUNK + 1, *optional, batch=(3, 2), groups=2)
    named = {k: OWN_AXES.get(k, lambda x: x)(v) for k, v in full.items()}
    spread = {
        k: named[k].expand_as(v) if named[k].ndim == v.ndim or k in OWN_AXES else v
        for k, v in full.items()
    }
    got, want = results(named), results(spread, backend="reference")
    assert got["y"].shape == (3, 2, CHUNK + 1, E)
    agree(got, {k: w.sum_to_size(got[k].shape) for k, w in want.items()})


def test_a_decay_of_each_channel_is_constant_in_time() -> None:
    named = problem(CHUNK + 3, "decay_dt", "integration_timesteps", batch=(2,))
    one = named["decay_dt"][0, 0]
    short = results(named | {"decay_dt": one})
    long = results(named | {"decay_dt": one.expand(2, CHUNK + 3, E).clone()})
    long["ddecay_dt"] = long["ddecay_dt"].sum((0, 1))
    agree(short, long)


def test_groups_repeat_their_matrices() -> None:
    named = problem(CHUNK + 3, groups=2)
    many = named | {k: named[k].repeat_interleave(2, -2) for k in "BC"}
    got, want = results(named), results(many)
    for k in ("dB", "dC"):
        want[k] = want[k].unflatten(-2, (2, 2)).sum(-2)
    agree(got, want)
    one = problem(CHUNK + 3)
    agree(
        {k: v for k, v in results(one).items() if k not in ("dB", "dC")},
        {
            k: v
            for k, v in results(one | {k: one[k].unsqueeze(-2) for k in "BC"}).items()
            if k not in ("dB", "dC")
        },
    )


def test_a_state_carries_a_split_sequence() -> None:
    named = problem(2 * CHUNK + 3, "z", "D", "h0", "reset", "integration_timesteps")
    y, last = selective_scan(**named)
    timed = ("u", "dt", "B", "C", "z", "reset", "integration_timesteps")
    for cut in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3):
        first = {k: v[:, :cut] if k in timed else v for k, v in named.items()}
        rest = {k: v[:, cut:] if k in timed else v for k, v in named.items()}
        y1, h = selective_scan(**first)
        y2, h = selective_scan(**rest | {"h0": h})
        agree({"y": torch.cat([y1, y2], 1), "h": h}, {"y": y, "h": last})


def test_a_reset_keeps_even_infinite_states_out() -> None:
    for length in (3, CHUNK + 3):
        named = problem(length, "reset", "h0")
        named["reset"] = torch.arange(length) == length - 2
        named["h0"] = torch.full_like(named["h0"], float("inf"))
        _, last = selective_scan(**named)
        assert last.isfinite().all()


# ---------------------------------------------------------------- precision

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ACTIVATIONS = ("u", "dt", "B", "C", "z")


@pytest.mark.parametrize(
    "scheme",
    [  # a scheme's own arithmetic is tested in float64
        pytest.param(s, marks=() if s in ("mamba", "zoh") else pytest.mark.exhaustive)
        for s in FUSED
    ],
)
@HALF
def test_half_precision_activations_are_computed_in_float32(
    dtype: torch.dtype, scheme: str
) -> None:
    exact = problem(3 * CHUNK, "D", "z", "dt_bias", "h0")
    mixed = {k: v.to(dtype if k in ACTIVATIONS else torch.float32) for k, v in exact.items()}
    same = {k: v.to(torch.float64) for k, v in mixed.items()}  # the same numbers
    options = {"softplus": True, "discretization": scheme}
    want = results(same, **options, backend="reference")
    got, plain = results(mixed, **options), results(mixed, **options, backend="reference")
    assert got["y"].dtype == dtype
    assert got["last"].dtype == torch.float32
    for key, w in want.items():
        assert got[key].dtype == plain[key].dtype
        floor = torch.finfo(got[key].dtype).eps
        allowed = (3 if key[0] == "d" else 2) * deviation(plain[key], w)
        assert deviation(got[key], w) <= max(allowed, floor), key
    assert deviation(got["last"], want["last"]) < 1e-5


def test_float32_is_as_exact_as_the_float32_loop() -> None:
    exact = problem(8 * CHUNK, "D", "z", "dt_bias", "h0")
    single = {k: v.float() for k, v in exact.items()}
    same = {k: v.double() for k, v in single.items()}
    want = results(same, softplus=True, backend="reference")
    got = results(single, softplus=True)
    plain = results(single, softplus=True, backend="reference")
    for key, w in want.items():
        assert deviation(got[key], w) <= max(2 * deviation(plain[key], w), 1e-6), key


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_the_state_is_at_least_float32_and_the_widest_of_all(given: torch.dtype) -> None:
    named = {k: v.bfloat16() for k, v in problem(5, "h0").items()}
    assert selective_scan(**named)[1].dtype == torch.float32
    named["A"] = named["A"].to(given)
    y, last = selective_scan(**named)
    assert (y.dtype, last.dtype) == (torch.bfloat16, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    optional, shape, options = OPTIONS["everything"]
    named = problem(CHUNK + 1, *optional, **shape)
    named = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in named.items()}
    for scheme in ("mamba", "euler"):
        plain = results(named, discretization=scheme, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = results(named, discretization=scheme, **options)
        assert all(torch.equal(plain[k], cast[k]) for k in plain)
        assert all(plain[k].dtype == cast[k].dtype for k in plain)


@pytest.mark.slow
def test_a_hundred_thousand_steps() -> None:
    length = 100_000
    exact = problem(length, "D", "z", batch=())
    exact["dt"] = 1e-3 + 0.02 * exact["dt"]  # memory of thousands of steps
    single = {k: v.float() for k, v in exact.items()}
    want = selective_scan(**{k: v.double() for k, v in single.items()})
    got = selective_scan(**single)
    for g, w in zip(got, want, strict=True):
        assert deviation(g, w) < 1e-5
    for piece in (1000, 33_333):
        h, parts = None, []
        for start in range(0, length, piece):
            part = {k: v[start : start + piece] if len(v) == length else v
                    for k, v in single.items()}  # fmt: skip
            y, h = selective_scan(**part, h0=h)
            parts.append(y)
        assert deviation(torch.cat(parts), want[0]) < 1e-5


# ---------------------------------------------------------------- memory layouts

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "sliced": lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([x.flip(0), x])[len(x) :],
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded channels": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@COMPLEX
def test_any_memory_layout(layout: str, complex_: bool) -> None:
    optional, shape, options = OPTIONS["everything"]
    named = problem(CHUNK + 1, *optional, complex_=complex_, **shape)
    strided = {k: LAYOUTS[layout](v) for k, v in named.items()}
    if complex_:
        strided["C"] = strided["C"].conj()
    compact = {k: v.resolve_conj().contiguous().clone() for k, v in strided.items()}
    for scheme in ("mamba", "bilinear"):
        agree(
            results(strided, discretization=scheme, **options),
            results(compact, discretization=scheme, **options),
            1e-13,
        )


def test_stride_zero_and_strided_upstream_gradients() -> None:
    named = problem(CHUNK + 1, "h0", "z")
    x = [v.requires_grad_() for v in named.values()]
    y, last = selective_scan(**named)
    pairs = [(torch.ones(()).double().expand(o.shape), torch.ones_like(o)) for o in (y, last)]
    strided = torch.autograd.grad((y, last), x, [p[0] for p in pairs], retain_graph=True)
    dense_ = torch.autograd.grad((y, last), x, [p[1] for p in pairs], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense_, strict=True))
    summed = torch.autograd.grad(y.sum() + last.sum(), x, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(summed, dense_, strict=True))
    g = draw(2, E, CHUNK + 1, seed=3).mT
    a = torch.autograd.grad(y, x, g, retain_graph=True, allow_unused=True)
    b = torch.autograd.grad(y, x, g.contiguous(), allow_unused=True)
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@COMPLEX
@pytest.mark.parametrize("option", ["bare", "everything"])
def test_no_uninitialized_memory_reaches_a_result(complex_: bool, option: str) -> None:
    assert torch.empty(3).isnan().all()
    optional, shape, options = OPTIONS[option]
    for scheme, length in itertools.product((*FUSED, "euler"), (0, 1, CHUNK, CHUNK + 1)):
        named = problem(length, *optional, complex_=complex_, **shape)
        found = results(named, discretization=scheme, **options)
        assert not any(v.isnan().any() for v in found.values()), (scheme, length)


def test_inputs_are_never_mutated_nor_returned() -> None:
    optional, shape, options = OPTIONS["everything"]
    for length in (0, 1, CHUNK + 1):
        named = problem(length, *optional, **shape)
        before = {k: (v._version, v.clone()) for k, v in named.items()}
        found = results(named, **options)
        for k, (version, copy) in before.items():
            assert named[k]._version == version
            assert torch.equal(named[k], copy)
        found["last"].add_(1)  # a state one may update in place
        assert torch.equal(named["h0"], before["h0"][1])


# ---------------------------------------------------------------- reproducibility


@COMPLEX
def test_bitwise_reproducible(complex_: bool) -> None:
    optional, shape, options = OPTIONS["everything"]
    named = problem(3 * CHUNK + 5, *optional, complex_=complex_, **shape)
    named = {
        k: v
        if v.dtype == torch.bool
        else v.to(torch.complex64 if v.is_complex() else torch.float32)
        for k, v in named.items()
    }
    first = results(named, **options)
    for _ in range(3):
        again = results(named, **options)
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["mamba", "zoh"])
def test_a_row_is_independent_of_the_batch_around_it(dtype: torch.dtype, scheme: str) -> None:
    """Bitwise, in value and in the gradients of what belongs to the row."""
    timed = ("u", "dt", "B", "C", "z", "h0", "reset", "integration_timesteps")
    named = problem(CHUNK + 5, *timed, "D", batch=(4,))
    named = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in named.items()}

    def run(x: Named) -> Named:
        x = {k: v.detach().requires_grad_(k in timed and k != "reset") for k, v in x.items()}
        y, last = selective_scan(**x, discretization=scheme)
        wanted = {k: v for k, v in x.items() if v.requires_grad}
        weights = (torch.cos(y.detach()), torch.cos(last.detach()))
        grads = torch.autograd.grad((y, last), list(wanted.values()), weights)
        return {"y": y, "last": last} | dict(zip(wanted, grads, strict=True))

    together = run(named)
    for row in range(4):
        alone = run({k: v[row] if k in timed else v for k, v in named.items()})
        for k, v in alone.items():
            assert torch.equal(v, together[k][row]), k
    # nor on what stands in the other rows
    poisoned = {k: v.clone() for k, v in named.items()}
    for k in ("u", "z", "h0"):
        poisoned[k][1:] = float("nan")
    assert torch.equal(run(poisoned)["y"][0], together["y"][0])


# ---------------------------------------------------------------- cost of what is off


class Leaves(TorchDispatchMode):
    """Keep the name, the arguments and the results of every leaf operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        if op.namespace == "lrnnx_core":
            self.calls.append((op.name().split("::")[1], args, found))
        return found


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_off_adds_no_tensor(option: str) -> None:
    optional, shape, options = OPTIONS[option]
    named = problem(CHUNK + 1, *optional, **shape)
    with Leaves() as leaves:
        results(named, **options)
    (_, forward, _), (_, backward, _) = leaves.calls
    assert [name for name, *_ in leaves.calls] == ["selective_scan", "selective_scan_backward"]
    fields = module.Arguments._fields[:12]
    fields = [f if f != "timesteps" else "integration_timesteps" for f in fields]
    for arguments in (forward[:12], backward[3:15]):
        given = {f for f, t in zip(fields, arguments, strict=True) if t is not None}
        assert given == named.keys()
    # and what is on arrives as it is, not as a copy
    for name, tensor in zip(fields, forward, strict=False):
        if name in named:
            assert tensor.untyped_storage().data_ptr() == named[name].untyped_storage().data_ptr()


def saved_storages(f: Callable[[], Any]) -> dict[int, int]:
    """Return the bytes of each storage that autograd keeps for the backward pass."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = f()
    assert result is not None
    return storages


@pytest.mark.parametrize("option", ["bare", "mamba", "stream"])
def test_autograd_keeps_the_inputs_and_one_state_a_chunk(option: str) -> None:
    optional, shape, options = OPTIONS[option]
    length = 40 * CHUNK
    named = {k: v.requires_grad_() for k, v in problem(length, *optional, **shape).items()}
    kept = saved_storages(lambda: selective_scan(**named, **options))
    own = {v.untyped_storage().data_ptr() for v in named.values()}
    extra = sum(size for at, size in kept.items() if at not in own)
    states = 2 * E * N * 8  # of a batch of two
    assert extra <= 40 * states
    assert max(kept.values()) < length * states


def test_without_a_backward_to_come_no_state_is_kept() -> None:
    named = problem(3 * CHUNK)
    with Leaves() as leaves:
        want = selective_scan(**named)
        with torch.no_grad():
            got = selective_scan(**named)
            slope = torch.func.grad(lambda u: selective_scan(**named | {"u": u})[0].sum())
            gradient = slope(named["u"])
    kept = [found[2].numel() for name, _, found in leaves.calls if name == "selective_scan"]
    assert kept == [2 * 3 * E * N, 0, 2 * 3 * E * N]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert bool(gradient.isfinite().all())


@pytest.mark.slow
def test_peak_memory_grows_by_a_fraction_of_all_states() -> None:
    """The peak of a training step holds L E numbers a tensor, never L E N."""
    width, states = 16, 64

    def peak(length: int) -> int:
        x = {
            "u": draw(length, width, seed=1), "dt": draw(length, width, seed=2).abs(),
            "A": -draw(width, states, seed=3).abs(), "B": draw(length, states, seed=4),
            "C": draw(length, states, seed=5),
        }  # fmt: skip
        x = {k: v.float().requires_grad_() for k, v in x.items()}
        gc.collect()
        live = top = 0
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            y, last = selective_scan(**x)
            torch.autograd.grad(y.sum() + last.sum(), list(x.values()))
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                top = max(top, live)
        return top

    lengths = (32 * CHUNK, 128 * CHUNK)
    small, large = (peak(n) for n in lengths)
    growth = (large - small) / (lengths[1] - lengths[0])
    assert growth < 4 * width * states / 2, f"{growth} bytes a step"


# ---------------------------------------------------------------- errors

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "u without time": ({"u": torch.zeros(E)}, r"u \(4,\) and A \(4, 3\), expected \(\.\.\., L"),
    "A of a rank": ({"A": torch.zeros(N)}, r"A \(3,\), expected \(\.\.\., L, E\) and \(E, N\)"),
    "A of another width": ({"A": torch.zeros(5, N)}, r"A \(5, 3\), expected \(4, 3\)"),
    "D": ({"D": torch.zeros(5)}, r"D \(5,\), expected \(4,\)"),
    "dt_bias": ({"dt_bias": torch.zeros(1)}, r"dt_bias \(1,\), expected \(4,\)"),
    "dt": ({"dt": torch.zeros(6, 5)}, r"dt \(6, 5\) does not fit u \(2, 6, 4\)"),
    "dt of another length": ({"dt": torch.zeros(1, E)}, r"dt \(1, 4\) does not fit"),
    "z": ({"z": torch.zeros(2, 5, E)}, r"z \(2, 5, 4\) does not fit"),
    "h0": ({"h0": torch.zeros(N, E)}, r"h0 \(3, 4\) does not fit u \(2, 6, 4\) and A \(4, 3\)"),
    "h0 of a rank": ({"h0": torch.zeros(E)}, r"h0 \(4,\) does not fit"),
    "decay_dt": ({"decay_dt": torch.zeros(3, E)}, r"decay_dt \(3, 4\) does not fit"),
    "timesteps": ({"integration_timesteps": torch.zeros(5)}, r"timesteps \(5,\) does not fit"),
    "reset": ({"reset": torch.zeros(2, 5).bool()}, r"reset \(2, 5\) does not fit"),
    "B of other states": ({"B": torch.zeros(2, 6, 4)}, r"B \(2, 6, 4\), expected N = 3 at axis -1"),
    "C of a rank": ({"C": torch.zeros(N)}, r"C \(3,\), expected N = 3"),
    "B of another length": (
        {"B": torch.zeros(2, 5, N)},
        r"B \(2, 5, 3\) with u \(2, 6, 4\), expected \(\.\.\., L, N\), \(\.\.\., L, G, N\) or",
    ),
    "C of another width": ({"C": torch.zeros(5, N)}, r"C \(5, 3\) with u"),
    "groups": ({"B": torch.zeros(2, 6, 3, N)}, r"3 groups in B do not divide E = 4"),
    "no groups": ({"C": torch.zeros(2, 6, 0, N)}, r"0 groups in C do not divide"),
    "batches": ({"dt": torch.zeros(3, 6, E)}, r"batch axes do not broadcast: u \(2,\), dt \(3,\)"),
    "integers": ({"u": torch.zeros(2, 6, E).long()}, r"u has dtype torch.int64"),
    "complex u": ({"u": torch.zeros(2, 6, E).cfloat()}, r"u has dtype torch.complex64"),
    "complex B": (
        {"B": torch.zeros(2, 6, N).cfloat()}, r"B has dtype torch.complex64, with A torch.float32",
    ),
    "complex D": ({"D": torch.zeros(E).cfloat()}, r"D has dtype torch.complex64"),
    "reset of numbers": ({"reset": torch.zeros(6)}, r"reset has dtype torch.float32"),
    "device": ({"B": torch.zeros(2, 6, N, device="meta")}, r"B is on meta and u on cpu"),
    "backend": ({"backend": "cuda"}, r"backend 'cuda', expected 'auto' or 'reference'"),
    "none": ({"discretization": "none"}, r"'none' has no use for dt"),
    "scheme": ({"discretization": "tustin"}, r"unknown discretization 'tustin'; expected one of"),
    "alpha": ({"alpha": 0.5}, r"alpha belongs to discretization='gbt'"),
    "gbt": ({"discretization": "gbt"}, r"needs alpha"),
    "mode": ({"timestep_mode": "decay"}, r"timestep_mode 'decay', expected 'both' or"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad: str) -> None:
    named = {
        "u": torch.zeros(2, 6, E), "dt": torch.zeros(2, 6, E), "A": torch.zeros(E, N),
        "B": torch.zeros(2, 6, N), "C": torch.zeros(2, 6, N),
    }  # fmt: skip
    selective_scan(**named)
    change, message = BAD[bad]
    with pytest.raises(ValueError, match="^selective_scan: .*" + message):
        selective_scan(**named | change)


def test_d_state_zero_is_an_empty_sum() -> None:
    named = {
        "u": torch.ones(2, 6, E), "dt": torch.ones(2, 6, E), "A": torch.zeros(E, 0),
        "B": torch.zeros(2, 6, 0), "C": torch.zeros(2, 6, 0), "D": torch.ones(E),
    }  # fmt: skip
    y, last = selective_scan(**named)
    assert torch.equal(y, named["u"])
    assert last.shape == (2, E, 0)


def test_leaves_agree_with_their_fake_versions() -> None:
    optional, shape, options = OPTIONS["everything"]
    for length, complex_ in itertools.product((0, 1, CHUNK + 1), (False, True)):
        named = problem(length, *optional, complex_=complex_, **shape)
        found = results(named, **options)
        meta = {k: v.to("meta") for k, v in named.items()}
        x = {k: v if v.dtype == torch.bool else v.requires_grad_() for k, v in meta.items()}
        y, last = selective_scan(**x, **options)
        wanted = {k: v for k, v in x.items() if v.requires_grad}
        grads = torch.autograd.grad(
            (y, last), list(wanted.values()), (torch.empty_like(y), torch.empty_like(last))
        )
        faked = {"y": y, "last": last} | {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}
        for k, v in found.items():
            assert (faked[k].shape, faked[k].dtype) == (v.shape, v.dtype), k


def test_the_chunk_is_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    optional, shape, options = OPTIONS["everything"]
    named = problem(40, *optional, **shape)
    want = results(named, **options)
    for chunk in (1, 7, 64):
        monkeypatch.setattr(blocked_selective, "CHUNK", chunk)
        agree(results(named, **options), want)
