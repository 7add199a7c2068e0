"""One dict that every generic test of the operators walks: name of the operator -> its cases.

A new public operator adds its entry to CASES; nothing else has to be edited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrnnx_core import ops
from lrnnx_core.ops.trilinear import trilinear

L, S = 5, 2


@dataclass(frozen=True)
class Case:
    """One way of calling an operator.

    Attributes:
        name: what is special about the case.
        function: (*tensors, backend="auto") -> a tensor or a tuple of tensors.
        inputs: returns fresh float64, complex128 or bool tensors, the same at every call.
        primary: also runs where a test is expensive (compilation); the others do so if slow.
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    primary: bool = False

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the inputs that have a gradient."""
        return tuple(i for i, x in enumerate(self.inputs()) if x.dtype != torch.bool)

    def outputs(self, *tensors: Tensor, backend: str = "auto") -> tuple[Tensor, ...]:
        result = self.function(*tensors, backend=backend)
        return result if isinstance(result, tuple) else (result,)

    def real_inputs(self) -> tuple[Tensor, ...]:
        """Return the differentiable inputs, complex ones as (..., 2) real tensors."""
        tensors = self.inputs()
        return tuple(as_real(tensors[i]) for i in self.differentiable)

    def real_function(self, backend: str = "auto") -> Callable[..., tuple[Tensor, ...]]:
        """Return the case as a function of `real_inputs`, whose outputs are real as well."""
        tensors, differentiable = self.inputs(), self.differentiable

        def function(*reals: Tensor) -> tuple[Tensor, ...]:
            filled = list(tensors)
            for position, real in zip(differentiable, reals, strict=True):
                is_complex = tensors[position].is_complex()
                filled[position] = torch.complex(*real.unbind(-1)) if is_complex else real
            return tuple(as_real(y) for y in self.outputs(*filled, backend=backend))

        return function


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def draw(*shape: int, seed: int, complex_: bool = False, scale: float = 1.0) -> Tensor:
    """Return normal numbers that depend on ``seed`` and nothing else, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_ else torch.float64
    x = scale * torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")
    return x.to(torch.get_default_device())


def scan_case(
    name: str,
    a: tuple[int, ...] = (L, S),
    b: tuple[int, ...] = (L, S),
    h0: tuple[int, ...] | None = (S,),
    *,
    complex_: str = "",
    reset: bool = False,
    reverse: bool = False,
    primary: bool = False,
) -> Case:
    """Return a case of `linear_scan`; ``complex_`` holds the first letters of complex inputs."""

    def inputs() -> tuple[Tensor, ...]:
        tensors = [
            draw(*a, seed=1, complex_="a" in complex_, scale=0.8),
            draw(*b, seed=2, complex_="b" in complex_),
        ]
        if h0 is not None:
            tensors.append(draw(*h0, seed=3, complex_="h" in complex_))
        if reset:
            tensors.append(torch.tensor([False, False, True, False, True][:L]))
        return tuple(tensors)

    def function(*tensors: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        rest = list(tensors[2:])
        return ops.linear_scan(
            tensors[0],
            tensors[1],
            rest.pop(0) if h0 is not None else None,
            reset=rest.pop(0) if reset else None,
            reverse=reverse,
            backend=backend,
        )

    return Case(name, function, inputs, primary)


def dense_convolution(u: Tensor, K: Tensor, mimo: bool) -> Tensor:
    """Sum the definition y_t = sum_s K_s u_{t-s} term by term."""
    length, taps = u.shape[-2], K.shape[-2 - mimo]
    steps = []
    for t in range(length):
        terms = []
        for s in range(min(taps, t + 1)):
            K_s, u_s = K.select(-2 - mimo, s), u.select(-2, t - s)
            terms.append((K_s * u_s.unsqueeze(-2)).sum(-1) if mimo else K_s * u_s)
        steps.append(sum(terms))
    return torch.stack(steps, -2)


def convolution_case(
    name: str,
    u: tuple[int, ...] = (L, S),
    K: tuple[int, ...] = (L, S),
    *,
    complex_: str = "",
    mimo: bool = False,
    primary: bool = False,
) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return (
            draw(*u, seed=1, complex_="u" in complex_),
            draw(*K, seed=2, complex_="K" in complex_),
        )

    def function(u: Tensor, K: Tensor, *, backend: str = "auto") -> Tensor:
        if backend == "reference":
            return dense_convolution(u, K, mimo)
        return ops.causal_convolution(u, K, mimo=mimo)

    return Case(name, function, inputs, primary)


def selective_case(
    name: str,
    *optional: str,
    complex_: bool = False,
    groups: int | None = None,
    constant: str = "",
    primary: bool = False,
    **choices: Any,
) -> Case:
    """Return a case of `selective_scan`, E = 2 channels of 2 states; ``optional`` names tensors."""
    matrix = {"B": (L, S), "C": (L, S)} if groups is None else dict.fromkeys("BC", (L, groups, S))
    matrix |= dict.fromkeys(constant, (1, S, S))
    shapes = {"u": (L, S), "dt": (L, S), "A": (S, S), **matrix}
    extra = {
        "D": (S,), "z": (L, S), "dt_bias": (S,), "h0": (S, S), "decay_dt": (L, S),
        "integration_timesteps": (L,), "reset": (L,),
    }  # fmt: skip
    shapes |= {n: extra[n] for n in optional}
    positive = ("decay_dt", "integration_timesteps")

    def inputs() -> tuple[Tensor, ...]:
        tensors = []
        for seed, (n, shape) in enumerate(shapes.items()):
            x = draw(
                *shape, seed=seed, complex_=(complex_ and n in "ABC") or (complex_ and n == "h0")
            )
            if n == "A":
                x = torch.complex(-x.real.abs() - 0.3, x.imag) if complex_ else -x.abs() - 0.3
            elif n in positive:
                x = x.abs() + 0.1
            elif n == "reset":
                x = torch.tensor([False, False, True, False, True][:L])
            tensors.append(x)
        return tuple(tensors)

    def function(*tensors: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        named = dict(zip(shapes, tensors, strict=True))
        return ops.selective_scan(**named, **choices, backend=backend)

    return Case(name, function, inputs, primary)


def conv1d_case(name: str, *optional: str, taps: int = 3, activation: str = "silu") -> Case:
    shapes = {"x": (L, S), "weight": (S, 1, taps)}
    shapes |= {n: {"bias": (S,), "tail": (taps - 1, S), "reset": (L,)}[n] for n in optional}

    def inputs() -> tuple[Tensor, ...]:
        tensors = {n: draw(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
        if "reset" in tensors:
            tensors["reset"] = torch.tensor([False, False, True, False, True][:L])
        return tuple(tensors.values())

    def function(*tensors: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        named = dict(zip(shapes, tensors, strict=True))
        if backend == "reference":
            return loop_conv1d(**named, activation=activation)
        return ops.causal_conv1d(**named, activation=activation)

    return Case(name, function, inputs, primary=name == "plain")


def rg_lru_case(name: str, *optional: str, primary: bool = False, **choices: Any) -> Case:
    shapes = {"x": (L, S), "input_gate": (L, S), "recurrent_gate": (L, S), "rate": (S,)}
    extra = {
        "input_bias": (S,), "recurrent_bias": (S,), "h0": (S,), "integration_timesteps": (L,),
        "reset": (L,), "mask": (L,),
    }  # fmt: skip
    shapes |= {n: extra[n] for n in optional}

    def inputs() -> tuple[Tensor, ...]:
        tensors = {n: draw(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
        if "reset" in tensors:
            tensors["reset"] = torch.tensor([False, False, True, False, True][:L])
        if "mask" in tensors:
            tensors["mask"] = torch.tensor([True, False, True, True, False][:L])
        return tuple(tensors.values())

    def function(*tensors: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        named = dict(zip(shapes, tensors, strict=True))
        for n in named.keys() & {"rate", "integration_timesteps"}:  # positive, whatever comes in
            named[n] = torch.nn.functional.softplus(named[n])
        return ops.rg_lru_scan(**named, **choices, backend=backend)

    return Case(name, function, inputs, primary)


def diagonal_case(name: str, *optional: str, primary: bool = False, **choices: Any) -> Case:
    shapes = {"x": (L, 2 * S), "A": (S,)}
    extra = {
        "steps": (S,), "dt": (L, S), "h0": (S,), "integration_timesteps": (L,), "reset": (L,),
        "mask": (L,),
    }  # fmt: skip
    shapes |= {n: extra[n] for n in optional}

    def inputs() -> tuple[Tensor, ...]:
        tensors = {
            n: draw(*shape, seed=i, complex_=n in ("A", "h0"))
            for i, (n, shape) in enumerate(shapes.items())
        }
        a = tensors["A"]
        tensors["A"] = torch.complex(-0.3 - 0.3 * a.real.abs(), a.imag)
        if "reset" in tensors:
            tensors["reset"] = torch.tensor([False, False, True, False, True][:L])
        if "mask" in tensors:
            tensors["mask"] = torch.tensor([True, False, True, True, False][:L])
        return tuple(tensors.values())

    def function(*tensors: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        named = dict(zip(shapes, tensors, strict=True))
        # positive, whatever comes in
        for n in named.keys() & {"steps", "dt", "integration_timesteps"}:
            named[n] = torch.nn.functional.softplus(named[n])
        if "steps" in named:
            named["dt"] = named.pop("steps")
        return ops.diagonal_scan(**named, **choices, backend=backend)

    return Case(name, function, inputs, primary)


def s4d_case(
    name: str,
    batch: tuple[int, ...] = (),
    *,
    complex_: str = "av",
    lengths: tuple[int, ...] | None = None,
    reset: bool = False,
    direct: bool = False,
    primary: bool = False,
) -> Case:
    """Return a case of `s4d_scan`, 2 channels of 2 states; ``lengths`` are cut to L."""

    def inputs() -> tuple[Tensor, ...]:
        tensors = [
            draw(*batch, L, S, seed=1),
            draw(S, 2, seed=2, complex_="a" in complex_, scale=0.6),
            draw(S, 2, seed=3, complex_="v" in complex_),
        ]
        if direct:
            tensors.append(draw(S, seed=4))
        if reset:
            tensors.append(torch.tensor([False, False, True, False, True][:L]))
        return tuple(tensors)

    def function(
        u: Tensor, a: Tensor, v: Tensor, *rest: Tensor, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        given = None if lengths is None else torch.tensor(lengths, device=u.device)
        D, flags = rest[0] if direct else None, rest[-1] if reset else None
        return ops.s4d_scan(u, a, v, D, lengths=given, reset=flags, backend=backend)

    return Case(name, function, inputs, primary)


def loop_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    reset: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Slide a window of the last K inputs over the sequence, emptied at every reset."""
    taps = weight.shape[-1]
    window = list(
        (torch.zeros_like(x[:1]).expand(taps - 1, -1) if tail is None else tail).unbind(0)
    )
    outputs = []
    for t in range(x.shape[0]):
        if reset is not None:
            window = [torch.where(reset[t], torch.zeros_like(v), v) for v in window]
        window.append(x[t])
        y = sum(weight[:, 0, k] * v for k, v in enumerate(window))
        y = y if bias is None else y + bias
        outputs.append(y * torch.sigmoid(y) if activation == "silu" else y)
        window = window[1:]
    return torch.stack(outputs), torch.stack(window)


def nodes_case(
    op: str,
    name: str,
    v: tuple[int, ...],
    nodes: tuple[int, ...],
    a: tuple[int, ...] = (S,),
    *,
    complex_: str = "vz",
    primary: bool = False,
) -> Case:
    """Return a case of `vandermonde` or `cauchy`; a signal u (L, S) brings the length."""

    def inputs() -> tuple[Tensor, ...]:
        z = draw(*nodes, seed=2, complex_="z" in complex_)
        decay = -0.2 - 0.3 * z.real.abs()
        tensors = [
            draw(*v, seed=1, complex_="v" in complex_),
            torch.complex(decay, z.imag) if z.is_complex() else decay,
            draw(L, S, seed=3),
        ]
        return (*tensors, 0.5 + draw(*a, seed=4).abs()) if op == "cauchy" else tuple(tensors)

    def function(v: Tensor, z: Tensor, u: Tensor, *rest: Tensor, backend: str = "auto") -> Tensor:
        if op == "vandermonde":
            return ops.vandermonde(v, z, u.shape[-2], backend=backend) * u
        r = ops.cauchy(v, z, *rest, u.shape[-2], backend=backend)
        return r * u.sum(-2)

    return Case(name, function, inputs, primary)


def projected_case(name: str, order: Any, *, complex_: str = "", primary: bool = False) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        shapes = {"u": (2, L, S), "K": (L, 3), "B": (3, S), "C": (1, 3)}
        return tuple(
            draw(*shape, seed=i, complex_=n in complex_)
            for i, (n, shape) in enumerate(shapes.items())
        )

    def function(u: Tensor, K: Tensor, B: Tensor, C: Tensor, *, backend: str = "auto") -> Tensor:
        if backend == "reference":
            full = (C * K.unsqueeze(1)) @ B.to(torch.promote_types(K.dtype, B.dtype))
            return dense_convolution(u, full.real, True)
        return ops.projected_convolution(u, K, B, C, order=order)

    return Case(name, function, inputs, primary)


CASES: dict[str, list[Case]] = {
    "vandermonde": [
        nodes_case("vandermonde", "rows", (3, S, 2), (S, 2), primary=True),
        nodes_case("vandermonde", "rows and own z", (2, 1, S, 2), (3, S, 2)),
        nodes_case("vandermonde", "real z, complex v", (S, 2), (S, 2), complex_="v"),
    ],
    "cauchy": [
        nodes_case("cauchy", "rows", (3, S, 2), (S, 2), primary=True),
        nodes_case("cauchy", "rows and own nodes", (2, 1, S, 1), (S, 1), (3, S), complex_="z"),
    ],
    "causal_conv1d": [
        conv1d_case("plain", "bias", "tail"),
        conv1d_case("reset", "bias", "tail", "reset", taps=4),
        conv1d_case("bare", activation="none", taps=2),
    ],
    "selective_scan": [
        selective_case("mamba", "D", "z", "dt_bias", "h0", softplus=True, primary=True),
        selective_case("complex zoh", "h0", "reset", complex_=True, discretization="zoh"),
        selective_case(
            "bilinear groups irregular",
            "integration_timesteps",
            "D",
            groups=2,
            constant="C",
            discretization="bilinear",
            timestep_mode="state_only",
        ),
        selective_case("own decay", "decay_dt", "integration_timesteps", "z"),
        selective_case("dirac", "reset", "D", discretization="dirac", softplus=True),
        selective_case("composite gbt", "D", discretization="gbt", alpha=0.7, softplus=True),
    ],
    "rg_lru_scan": [
        rg_lru_case("plain", "input_bias", "recurrent_bias", "h0", primary=True),
        rg_lru_case("reset", "input_bias", "h0", "reset", "mask", start_rule=True),
        rg_lru_case("both timed", "recurrent_bias", "integration_timesteps", start_rule=True),
        rg_lru_case(
            "state only timed", "h0", "integration_timesteps", "mask", timestep_mode="state_only"
        ),
    ],
    "diagonal_scan": [
        diagonal_case("steady", "h0", primary=True),
        diagonal_case("steady reset", "h0", "reset", "mask"),
        diagonal_case("timed zoh", "steps", "integration_timesteps", discretization="zoh"),
        diagonal_case(
            "timed bilinear state only",
            "steps",
            "h0",
            "integration_timesteps",
            "mask",
            discretization="bilinear",
            timestep_mode="state_only",
        ),
        diagonal_case(
            "dirac without steps, reverse",
            "h0",
            "integration_timesteps",
            discretization="dirac",
            reverse=True,
        ),
        diagonal_case(
            "varying step", "dt", "integration_timesteps", "reset", discretization="mamba"
        ),
    ],
    "s4d_scan": [
        s4d_case("plain", primary=True),
        s4d_case("real reset, direct", complex_="", reset=True, direct=True),
        s4d_case("lengths", (2,), lengths=(3, 0)),
        s4d_case("reset, lengths, direct", (2,), lengths=(4, 2), reset=True, direct=True),
        s4d_case("complex a, real v", complex_="a"),
    ],
    "causal_convolution": [
        convolution_case("real", primary=True),
        convolution_case("complex", complex_="uK"),
        convolution_case("real u, complex K", complex_="K"),
        convolution_case("short kernel", K=(2, S)),
        convolution_case("long kernel", K=(L + 3, S)),
        convolution_case("mimo", K=(L, 3, S), mimo=True),
        convolution_case("mimo broadcast", u=(2, 1, L, S), K=(3, L, 2, S), mimo=True),
        convolution_case("one step", u=(1, S), K=(1, S)),
    ],
    "linear_scan": [
        scan_case("real", primary=True),
        scan_case("complex", complex_="abh", primary=True),
        scan_case("real constant reset", a=(1, S), reset=True),
        scan_case("real no h0", h0=None),
        scan_case("real reverse reset", reset=True, reverse=True),
        scan_case("complex constant reverse", a=(1, S), complex_="abh", reverse=True),
        scan_case("complex reset no h0", complex_="abh", h0=None, reset=True),
        scan_case("complex constant no h0", a=(1, S), complex_="a", h0=None),
        scan_case("real a, complex b", complex_="b"),
        scan_case("complex a, real b and h0", complex_="a"),
        scan_case("real a and b, complex h0", complex_="h", reverse=True),
        scan_case("broadcast", a=(2, 1, 1, S), b=(3, L, 1), h0=(2, 1, S)),
    ],
    "projected_convolution": [
        projected_case("real auto", "auto", primary=True),
        projected_case("complex kernel", "kernel", complex_="KBC"),
        projected_case("complex project", "project", complex_="KBC"),
        projected_case("complex frequency", "frequency", complex_="KBC"),
    ],
}


def trilinear_case(name: str, *, batch: tuple[int, ...] = (L,)) -> Case:
    """Return a case; one input twice has a rule of its own."""

    def inputs() -> tuple[Tensor, ...]:
        shapes = ((2, S, 3), (*batch, S), (*batch, 3))
        return tuple(draw(*shape, seed=i) for i, shape in enumerate(shapes))

    def function(w: Tensor, p: Tensor, q: Tensor, backend: str = "auto") -> Tensor:
        square = torch.cat((w, w[:, :1]), 1)
        return trilinear(w, p, q, chunk_size=2, backend=backend) + trilinear(
            square, q, q, chunk_size=2, backend=backend
        )

    return Case(name, function, inputs)


INTERNAL: dict[str, list[Case]] = {"trilinear": [trilinear_case("plain")]}
"""Operators that models use and `lrnnx_core.ops` does not export; they meet the same table."""

ALL = [
    (f"{op}-{case.name}".replace(" ", "_").replace(",", ""), case)
    for op, cases in (CASES | INTERNAL).items()
    for case in cases
]
