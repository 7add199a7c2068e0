"""What generic tests of models walk: every variant of every model in the registry.

A model or a variant that is added there is tested without an edit here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lrnnx_core import registry
from lrnnx_core.discretize import EXPONENTIAL
from lrnnx_core.registry import MODELS, Model, Variant

FUNCTIONS = registry.FUNCTIONS


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One variant of one model, with its choices bound in every function."""

    entry: Model
    variant: Variant

    def __str__(self) -> str:
        return f"{self.entry.name}-{self.variant.name}"

    @property
    def choices(self) -> dict[str, Any]:
        return {**self.variant.init, **self.variant.call}

    @property
    def model(self) -> Model:
        return registry.bind(self.entry.name, **self.choices)

    @property
    def bidirectional(self) -> bool:
        return bool(self.choices.get("bidirectional"))

    @property
    def scheme(self) -> str:
        """The discretization in force; the first one of a model's list is its default."""
        return self.choices.get("discretization") or self.entry.discretizations[0]

    @property
    def exponential(self) -> bool:
        """Whether the decay over a gap is exp(gap * rate)."""
        return self.scheme in EXPONENTIAL or self.entry.discretizations == ("none",)

    @property
    def gap_scales_gain(self) -> bool:
        """Whether a gap scales the input too, unless ``state_only`` is asked for."""
        return self.entry.timestep_modes[0] == "both" and self.scheme != "async"

    @property
    def drawn(self) -> bool:
        """Whether `init` draws anything: every parameter of Centaurus' ``full`` is on a grid."""
        return (self.entry.name, self.choices.get("variant")) != ("centaurus", "full")

    @property
    def invariant(self) -> bool:
        """Whether the recurrence is the same at every sample, so that it has a kernel."""
        return self.entry.kind == "lti"

    @property
    def timed(self) -> bool:
        """Whether the case takes integration_timesteps."""
        return self.takes("scan", "integration_timesteps")

    @property
    def timestep_modes(self) -> tuple[str, ...]:
        return self.entry.timestep_modes if self.timed else ()

    def takes(self, function: str, option: str) -> bool:
        """Whether a function has this option and the variant does not refuse it."""
        known = registry.options(self.entry, function)
        return option in known and option not in self.variant.without

    def rtol(self, dtype: torch.dtype) -> float:
        return self.variant.rtol[str(dtype).removeprefix("torch.")]

    def params(
        self,
        d_model: int = 3,
        d_state: int = 8,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        spread: float = 0.2,
    ) -> dict[str, Tensor]:
        """Draw parameters and move each a little, so that none is a constant such as B = 1 + 0i."""
        d_state = max(d_state, 2 * self.choices.get("blocks", 1))
        generator = torch.Generator().manual_seed(seed)
        params = self.model.init(d_model, d_state, generator=generator, dtype=torch.float64)
        return {
            k: (v + spread * torch.randn(v.shape, generator=generator, dtype=v.dtype)).to(dtype)
            for k, v in params.items()
        }

    def state(self, params: dict[str, Tensor], batch: tuple[int, ...] = (), seed: int = 1) -> Any:
        """Return a random state of this shape; None for a bidirectional model, which takes none.

        A flag is True, as it is once samples have been met.
        """
        if self.bidirectional:
            return None
        generator = torch.Generator().manual_seed(seed)

        def draw(zero: Tensor) -> Tensor:
            if not (zero.is_floating_point() or zero.is_complex()):
                return torch.ones_like(zero)
            return torch.randn(zero.shape, generator=generator, dtype=zero.dtype)

        return tree_map(draw, self.model.init_state(params, batch))

    def discretized(
        self, params: dict[str, Tensor], length: int = 6, d_model: int = 3
    ) -> tuple[Tensor, ...]:
        """Return what `discretize` takes: the parameters and, if time-varying, a random input."""
        if self.invariant:
            return (params,)
        _, name, *_ = inspect.signature(self.entry.discretize).parameters
        if name == "v":  # the input of the recurrence, which the convolution gives
            d_model = self.model.init_state(params).conv.shape[-1]
        elif name == "r":  # a number a head
            d_model = self.model.init_state(params).h.shape[-3]
        dtype = next(iter(params.values())).dtype
        return params, normal(length, d_model, seed=6, dtype=dtype)


CASES = [Case(m, v) for m in MODELS.values() for v in m.variants]
CAUSAL = [c for c in CASES if not c.bidirectional]
BIDIRECTIONAL = [c for c in CASES if c.bidirectional]
WITH_KERNEL = [c for c in CASES if c.entry.kernel is not None]
INVARIANT = [c for c in CASES if c.invariant]
TIMED = [c for c in CASES if c.timed]
SCALED = [c for c in CASES if c.takes("scan", "dt_scale")]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_causal_case = pytest.mark.parametrize("case", CAUSAL, ids=str)
every_bidirectional_case = pytest.mark.parametrize("case", BIDIRECTIONAL, ids=str)
every_case_with_kernel = pytest.mark.parametrize("case", WITH_KERNEL, ids=str)
every_invariant_case = pytest.mark.parametrize("case", INVARIANT, ids=str)
every_timed_case = pytest.mark.parametrize("case", TIMED, ids=str)
every_timed_causal_case = pytest.mark.parametrize(
    "case", [c for c in TIMED if not c.bidirectional], ids=str
)
every_scaled_case = pytest.mark.parametrize("case", SCALED, ids=str)
every_model = pytest.mark.parametrize("entry", MODELS.values(), ids=MODELS)
# One causal variant a model, where a test does not depend on the variant and is not cheap.
FIRST = [next(c for c in CAUSAL if c.entry is m) for m in MODELS.values()]
first_case = pytest.mark.parametrize("case", FIRST, ids=str)


KINDS = {(c.entry.kind, c.entry.connectivity): c for c in reversed(FIRST)}
ONE_A_KIND = list(KINDS.values())


def first_quick(cases: Sequence[Case], quick: Sequence[Case] = FIRST) -> list[Any]:
    """Return the cases as parameters, those that are not ``quick`` marked exhaustive."""
    return [
        pytest.param(c, id=str(c), marks=() if c in quick else pytest.mark.exhaustive)
        for c in cases
    ]


# For compilation, which takes seconds: the other variants run in CI.
every_case_first_quick = pytest.mark.parametrize("case", first_quick(CASES))
every_case_one_a_kind_quick = pytest.mark.parametrize("case", first_quick(CASES, ONE_A_KIND))
first_case_one_a_kind_quick = pytest.mark.parametrize("case", first_quick(FIRST, ONE_A_KIND))


def normal(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers that depend on the seed and nothing else, alike in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gaps(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return times elapsed before samples, of mean 1, a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    t = 2 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return torch.where(t < 0.2, torch.zeros_like(t), t).to(dtype)


def widen(x: Any) -> Any:
    """To float64 or complex128, every tensor of a pytree but flags; a state of None stays None."""

    def wide(t: Tensor | None) -> Tensor | None:
        kept = t is None or t.dtype == torch.bool
        return t if kept else t.to(torch.promote_types(t.dtype, torch.float64))

    return tree_map(wide, x)


def row(state: Any, i: Any) -> Any:
    """Return the state of one row of a batch."""
    return tree_map(lambda t: t[i], state)


def stacked(results: Sequence[Any]) -> Any:
    """Stack pytrees of one structure along a new first axis."""
    return tree_map(lambda *parts: torch.stack(parts), *results)


def real(x: Tensor) -> Tensor:
    """View a complex tensor as a real one."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def continuous(state: Any) -> list[Tensor]:
    """Return the tensors of a state that have derivatives: all but flags."""
    return [t for t in tree_leaves(state) if t.dtype != torch.bool]


def with_continuous(state: Any, values: Sequence[Tensor]) -> Any:
    """Return the state with `continuous` tensors replaced by these."""
    left = iter(values)
    return tree_map(lambda t: t if t.dtype == torch.bool else next(left), state)


def remembered(state: Any) -> list[Tensor]:
    """Return what is at least float32 in a state: all but flags and a convolution's last inputs."""
    parts = getattr(state, "_asdict", lambda: {"h": state})()
    return [t for k, t in parts.items() if k != "conv" and t.dtype != torch.bool]


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest deviation relative to the scale of ``want``."""
    assert got.shape == want.shape
    if want.dtype == torch.bool:
        return float(not torch.equal(got, want))
    if not want.numel():
        return 0.0
    got, want = widen(got.detach()), widen(want.detach())
    scale = want.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float(((got - want).abs().max() / scale).nan_to_num(nan=float("inf")))


def assert_agree(got: Any, want: Any, rtol: float, what: str = "") -> None:
    """Compare two tensors, or two (y, state), relative to the scale of what is wanted."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for k in want:
            assert_agree(got[k], want[k], rtol, f"{what} {k}")
        return
    if isinstance(want, tuple):
        names = getattr(want, "_fields", ("y", "state", *range(2, len(want))))
        for name, g, w in zip(names[: len(want)], got, want, strict=True):
            assert_agree(g, w, rtol, f"{what} {name}")
        return
    deviation = error(got, want)
    assert deviation <= rtol, f"{what}: relative error {deviation:.2e}, allowed {rtol:.0e}"


def loop(
    model: Model,
    params: dict[str, Tensor],
    u: Tensor,
    state: Any = None,
    timesteps: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Run a model over u by a loop of its `step`."""
    if state is None:
        state = model.init_state(params, u.shape[:-2])
    ys = []
    for t in range(u.shape[-2]):
        gap = {} if timesteps is None else {"integration_timestep": timesteps[..., t]}
        y, state = model.step(params, u[..., t, :], state, **gap, **options)
        ys.append(y)
    return torch.stack(ys, dim=-2), state
