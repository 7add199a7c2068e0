"""What generic tests of models walk: every variant of every model in the registry.

A model or a variant that is added there is tested without an edit here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lrnnx_core import registry
from lrnnx_core.discretize import EXPONENTIAL
from lrnnx_core.registry import MODELS, Model, Variant

FUNCTIONS = ("init", "init_state", "discretize", "kernel", "scan", "step")


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
        return self.entry.timestep_modes[0] == "both"

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

    def state(
        self, params: dict[str, Tensor], batch: tuple[int, ...] = (), seed: int = 1
    ) -> Tensor | None:
        """Return a random state of this shape; None for a bidirectional model, which takes none."""
        if self.bidirectional:
            return None
        zero = self.model.init_state(params, batch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(zero.shape, generator=generator, dtype=zero.dtype)


CASES = [Case(m, v) for m in MODELS.values() for v in m.variants]
CAUSAL = [c for c in CASES if not c.bidirectional]
BIDIRECTIONAL = [c for c in CASES if c.bidirectional]
WITH_KERNEL = [c for c in CASES if c.entry.kernel is not None]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_causal_case = pytest.mark.parametrize("case", CAUSAL, ids=str)
every_bidirectional_case = pytest.mark.parametrize("case", BIDIRECTIONAL, ids=str)
every_case_with_kernel = pytest.mark.parametrize("case", WITH_KERNEL, ids=str)
every_model = pytest.mark.parametrize("entry", MODELS.values(), ids=MODELS)
# One causal variant a model, where a test does not depend on the variant and is not cheap.
FIRST = [next(c for c in CAUSAL if c.entry is m) for m in MODELS.values()]
first_case = pytest.mark.parametrize("case", FIRST, ids=str)
# For compilation, which takes seconds: the other variants run in CI.
every_case_first_quick = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=() if c in FIRST else pytest.mark.slow) for c in CASES],
)


def normal(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers that depend on the seed and nothing else, alike in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gaps(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return times elapsed before samples, of mean 1, a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    t = 2 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return torch.where(t < 0.2, torch.zeros_like(t), t).to(dtype)


def widen(x: Tensor) -> Tensor:
    """To float64 or complex128."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest deviation relative to the scale of ``want``."""
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    got, want = widen(got.detach()), widen(want.detach())
    scale = want.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float(((got - want).abs().max() / scale).nan_to_num(nan=float("inf")))


def assert_agree(got: Any, want: Any, rtol: float, what: str = "") -> None:
    """Compare two tensors, or two (y, state), relative to the scale of what is wanted."""
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
    state: Tensor | None = None,
    timesteps: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run a model over u by a loop of its `step`."""
    if state is None:
        state = model.init_state(params, u.shape[:-2])
    ys = []
    for t in range(u.shape[-2]):
        gap = {} if timesteps is None else {"integration_timestep": timesteps[..., t]}
        y, state = model.step(params, u[..., t, :], state, **gap, **options)
        ys.append(y)
    return torch.stack(ys, dim=-2), state
