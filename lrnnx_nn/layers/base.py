# SPDX-License-Identifier: MIT
"""The thin shell every layer is: it owns the parameters and calls the core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from lrnnx_core import checks, frequency, registry
from lrnnx_core.backends.transforms import transform_active
from lrnnx_core.models._auto import chunk_length, prefers_convolution
from lrnnx_core.models._common import SteadyParams
from lrnnx_core.types import Discretization, Params

# What a call brings rather than the layer: never an option of the constructor.
_PER_CALL = frozenset(
    {"integration_timesteps", "lengths", "mask", "reset", "kernel", "discrete", "mode", "dt_scale"}
)
_PLACE = frozenset({"generator", "device", "dtype"})


class _Entry(NamedTuple):
    """Where a parameter stands, and what it was when it was read."""

    owner: Mapping[str, Tensor | None]
    leaf: str
    tensor: Tensor
    alias: Tensor  # keeps the memory: the address of what is gone is used again
    address: int
    version: int


class Held:
    """The parameters of a layer as evaluation last read them, and what was made of them.

    Args:
        layer: whose.
        keys: the names of its parameters.
    """

    def __init__(self, layer: nn.Module, keys: Iterable[str]) -> None:
        self.params: Params = SteadyParams()
        self.options: dict[str, dict[str, Any]] = {}
        self.made: dict[Any, Any] = {}
        """What does not depend on a call, by name; gone with the first change of a parameter."""
        self._groups: dict[int, tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        self._entries: list[_Entry] = []
        self.whole = True
        for key in keys:
            owner, (*path, leaf) = layer, key.split(".")
            for part in path:
                child = getattr(owner, part)
                self._groups[id(child)] = (owner._modules, part, child)
                owner = child
            value = getattr(owner, leaf)
            self.params[key] = value
            # computed anew at every look (parametrized), or without a count of its changes
            if owner._parameters.get(leaf) is not value or value.is_inference():
                self.whole = False
                return
            alias = value.detach()
            self._entries.append(
                _Entry(owner._parameters, leaf, value, alias, value.data_ptr(), value._version)
            )

    def current(self) -> bool:
        """Return whether no parameter was replaced, or written to in place."""
        for modules, name, module in self._groups.values():
            if modules.get(name) is not module:
                return False
        for owner, leaf, tensor, _, address, version in self._entries:
            if (
                owner.get(leaf) is not tensor
                or tensor._version != version
                or tensor.data_ptr() != address
            ):
                return False
        return True


class _Kept(NamedTuple):
    """A value that evaluation keeps, the call it was made for and the parameters it is made of."""

    key: tuple[Any, ...]
    held: Held
    value: Any


class Group(nn.Module):
    """Holds parameters whose names share a prefix; the layer reads them, nobody calls it."""


class Layer(nn.Module):
    """A recurrent layer (..., L, H) -> (..., L, H).

    Args:
        d_model: channels H.
        d_state: state size, with the meaning the model's `init` gives it.
        discretization: None for the model's own.
        mode: how sequences are run, see the model's `scan`.
        use_fast_path: False runs the plain loop of the specification everywhere.
        generator: source of the random numbers; torch's own if None.
        device: where the parameters are made.
        dtype: their real dtype, at least float32.
        **options: every option of the model's `init` and `scan` by its name there.

    The parameters are the tensors of the model's `init` under the same names. They stay at least
    float32 under ``.half()`` and ``.bfloat16()``, and so do states.

    Raises:
        ValueError: an option the model does not have, or a value its functions refuse.
    """

    name: ClassVar[str]
    projections: ClassVar[tuple[str, ...]] = ()
    """Names of the ``nn.Linear`` children, which are called as modules."""
    kept_wide: ClassVar[frozenset[str] | None] = None
    """Parameters that stay at least float32 when the layer is cast down; None for all."""

    def __init__(
        self,
        d_model: int,
        d_state: int,
        discretization: Discretization | None = None,
        *,
        mode: str = "auto",
        use_fast_path: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        model = registry.get(self.name)
        if discretization is not None:
            options["discretization"] = discretization
        initial = registry.options(model, "init") - _PLACE
        running = registry.options(model, "scan") - _PER_CALL
        unknown = sorted(set(options) - initial - running)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no option {unknown[0]!r}; "
                f"expected one of {', '.join(sorted(initial | running))}"
            )
        if mode not in model.modes:
            raise ValueError(f"{type(self).__name__}: mode {mode!r}, expected one of {model.modes}")
        self.d_model, self.d_state = d_model, d_state
        self.mode = mode if use_fast_path else "recurrent"
        self._init_options = {k: v for k, v in options.items() if k in initial}
        self._options = {k: v for k, v in options.items() if k in running or k in initial}
        self._cache: dict[str, _Kept] = {}
        self._held: Held | None = None
        self._watched = self._warned = False
        self._keys: tuple[str, ...] = ()
        self._register(self._draw(generator, device, dtype))
        self._try_options()

    def _register(self, fresh: Params) -> None:
        """Register the tensors of `init` under their names, ``child.weight`` in a child."""
        for key, value in fresh.items():
            owner: nn.Module = self
            *path, leaf = key.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(
                        part, Group() if part not in self.projections else _linear(fresh, part)
                    )
                owner = getattr(owner, part)
            if leaf not in owner._parameters or owner._parameters[leaf] is None:
                owner.register_parameter(leaf, nn.Parameter(value))
        self._keys = tuple(fresh)

    @property
    def model(self) -> registry.Model:
        """The registry's entry: the pure functions this layer calls."""
        return registry.get(self.name)

    @property
    def d_output(self) -> int:
        """Channels of the output."""
        width = self._init_options.get("d_out") or self.d_model
        return width * int(self._init_options.get("channels", 1))

    @property
    def params(self) -> Params:
        """The parameters as the dict the core functions take."""
        return self._collect(self._keys)

    def _collect(self, keys: Iterable[str]) -> Params:
        return {key: _reach(self, key) for key in keys}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the parameters again, in place. Safe on the meta device and after ``to_empty``."""
        first = _reach(self, self._keys[0])
        with torch.no_grad():
            for key, value in self._draw(generator, first.device, first.dtype).items():
                _reach(self, key).copy_(value)

    def init_state(self, batch_shape: Sequence[int] = ()) -> Any:
        """Return the zero state for sequences with these leading dimensions."""
        return self.model.init_state(self.params, batch_shape, **self._known("init_state"))

    def forward(
        self,
        u: Tensor,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """Run over whole sequences u (..., L, H) from the zero state; return y (..., L, H).

        The arguments after u are those of the model's `scan`.
        """
        y, _ = self._scan(
            u, None, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            reset=reset, dt_scale=dt_scale,
        )  # fmt: skip
        return y

    def prefill(
        self,
        u: Tensor,
        state: Any = None,
        *,
        integration_timesteps: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Run over u (..., L, H) from ``state``; return y and the state after it.

        Any split of a sequence into prefills and steps gives what one `forward` gives.

        Raises:
            ValueError: a bidirectional layer, which has no state to go on from.
        """
        self._check_causal("prefill")
        return self._scan(
            u, state, integration_timesteps=integration_timesteps, lengths=lengths, mask=mask,
            reset=reset, dt_scale=dt_scale,
        )  # fmt: skip

    def step(
        self,
        u_t: Tensor,
        state: Any,
        *,
        integration_timestep: Tensor | None = None,
        dt_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, Any]:
        """Take one step: u_t (..., H), state from `init_state`, `prefill` or `step`.

        Raises:
            ValueError: a bidirectional layer.
        """
        self._check_causal("step")
        self._check_scale(dt_scale)
        self._watch_stability(u_t)
        held = self._hold()
        params = self.params if held is None else held.params
        options = {**self._known("step", held), "dt_scale": dt_scale}
        if integration_timestep is not None:
            self._check_values(u_t, integration_timestep, None)
            options["integration_timestep"] = integration_timestep
        elif held is not None and (discrete := self._discrete(dt_scale, held)) is not None:
            options["discrete"] = discrete
        return self.model.step(params, u_t, state, **options)

    def check_stability(self) -> None:
        """Warn, once in this layer's life, if a time-invariant recurrence is unstable.

        Evaluation without gradients does it by itself on a CPU, before its first sequence or step;
        elsewhere call it after training. It looks at uniform time with ``dt_scale=1``.

        Warns:
            lrnnx_core.checks.StabilityWarning: an eigenvalue outside the unit circle, named.
        """
        if self._warned or self.model.kind != "lti":
            return
        if registry.always_stable(self.model, self._options):
            return
        with torch.no_grad():
            options = self._known("discretize")
            values = frequency.eigenvalues(self.model, self.params, **options)
        hint = f"{self.model.title} is stable {self.model.stability}"
        self._warned = not checks.stable(type(self).__name__, values, hint)

    def extra_repr(self) -> str:
        """Show sizes and options in ``print(layer)``."""
        shown = {"d_model": self.d_model, "d_state": self.d_state, **self._options}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())

    def _scan(self, u: Tensor, state: Any, **sequence: Any) -> tuple[Tensor, Any]:
        self._check_values(u, sequence["integration_timesteps"], sequence["lengths"])
        self._check_scale(sequence["dt_scale"])
        self._watch_stability(u)
        options = self._known("scan") | {"mode": self.mode} | sequence
        uniform = all(sequence[k] is None for k in ("integration_timesteps", "mask", "reset"))
        if (
            uniform
            and self._may_keep()
            and u.ndim >= 2
            and u.shape[-2] > 0
            and self._convolves(u)
            and (K := self._kernel(u, sequence["dt_scale"])) is not None
        ):
            options["kernel"] = K
        return self.model.scan(self.params, u, state, **options)

    def _convolves(self, u: Tensor) -> bool:
        """Return whether a sequence runs as a convolution with a kernel that is worth keeping."""
        if self.model.kernel is None or not self._keeps_kernel():
            return False
        if self.mode != "auto":
            return self.mode == "conv"
        if self._options.get("chunk_size") is not None:
            return True
        return prefers_convolution(self.model.connectivity, u, self.init_state().shape[-1])

    def _keeps_kernel(self) -> bool:
        """Return whether evaluation keeps the kernel.

        A kernel that mixes channels is (L, H_out, H): large, and mostly slower to convolve with
        than its factors, among which the planner of `lrnnx_core.ops.contract` chooses.
        """
        return self.model.connectivity == "siso"

    def _convolved_at_once(self, u: Tensor) -> int:
        """Return the length of kernel that a convolution of u takes."""
        return chunk_length(type(self).__name__, self._options.get("chunk_size"), u)

    def _known(self, function: str, held: Held | None = None) -> dict[str, Any]:
        """Return the options that a function of the model has; ``held`` remembers them."""
        if held is not None and function in held.options:
            return held.options[function]
        names = registry.options(self.model, function)
        known = {k: v for k, v in self._options.items() if k in names}
        if held is not None:
            held.options[function] = known
        return known

    def _draw(
        self,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Params:
        return self.model.init(
            self.d_model, self.d_state, generator=generator, device=device, dtype=dtype,
            **self._init_options,
        )  # fmt: skip

    def _try_options(self) -> None:
        """Let the model refuse bad options now rather than at the first batch."""
        meta = {k: v.detach().to("meta") for k, v in self.params.items()}
        u = torch.empty(1, 1, self.d_model, device="meta", dtype=torch.float32)
        sequences = {k: v for k, v in self._known("scan").items() if not isinstance(v, Tensor)}
        self.model.scan(meta, u, None, mode=self.mode, **sequences)

    def _check_causal(self, what: str) -> None:
        if self._options.get("bidirectional"):
            raise ValueError(f"{type(self).__name__}.{what}: a bidirectional layer cannot stream")

    def _check_values(self, u: Tensor, timesteps: Tensor | None, lengths: Tensor | None) -> None:
        if timesteps is None and lengths is None:
            return
        if u.device.type != "cpu" or transform_active():
            return
        if isinstance(timesteps, Tensor) and timesteps.device.type == "cpu":
            checks.integration_timesteps(timesteps)
        if isinstance(lengths, Tensor) and lengths.device.type == "cpu" and u.ndim >= 2:
            checks.lengths(lengths, u.shape[-2])

    def _check_scale(self, dt_scale: float | Tensor) -> None:
        """Raise unless this is one number: a tensor of more may fit some axis by chance."""
        if isinstance(dt_scale, Tensor):
            if not dt_scale.ndim:
                return
            said = f" {tuple(dt_scale.shape)}, expected a 0-d tensor"
        else:
            if 0 <= dt_scale < math.inf:
                return
            said = f" = {dt_scale}, expected a finite number >= 0"
        raise ValueError(f"{type(self).__name__}: dt_scale{said}")

    def _watch_stability(self, u: Tensor) -> None:
        """Look at the eigenvalues at the first use in evaluation, eager and without gradients."""
        if (
            not self._may_keep()
            or self._watched
            or type(u) is not Tensor  # a subclass may hold no values
            or u.device.type != "cpu"
        ):
            return
        self._watched = True
        self.check_stability()

    # --- what evaluation need not compute twice -------------------------------------------------

    def _discrete(self, dt_scale: float | Tensor, held: Held) -> Any:
        if "discrete" not in registry.options(self.model, "step"):
            return None
        return self._cached(
            "discrete",
            (dt_scale,),
            lambda: self.model.discretize(
                held.params, dt_scale=dt_scale, **self._known("discretize", held)
            ),
            held,
        )

    def _kernel(self, u: Tensor, dt_scale: float | Tensor) -> Tensor | None:
        kernel = self.model.kernel
        if kernel is None:
            return None
        length, options = self._convolved_at_once(u), self._known("kernel")
        return self._cached(
            "kernel",
            (length, dt_scale),
            lambda: kernel(self.params, length, dt_scale=dt_scale, **options),
        )

    def _may_keep(self) -> bool:
        """Return whether this is evaluation, without gradients and outside every transform."""
        return not (self.training or torch.is_grad_enabled() or transform_active())

    def _hold(self) -> Held | None:
        """Return the parameters in evaluation, read again where one has changed.

        None where nothing may be kept: in training, with gradients, in every transform, for
        parameters that do not count their changes. What is written through ``.data`` PyTorch does
        not count: call ``train()`` or ``eval()`` after that.
        """
        if not self._may_keep():
            return None
        held = self._held
        if held is None or not held.current():
            held = Held(self, self._held_keys())
            self._held = held if held.whole else None
        return self._held

    def _held_keys(self) -> Iterable[str]:
        """Return the names of the parameters that the layer reads itself."""
        return self._keys

    def _cached(
        self, what: str, key: tuple[Any, ...], make: Callable[[], Any], held: Held | None = None
    ) -> Any:
        """Return a value made once for these parameters, or None where it must not be kept.

        It is kept in evaluation without gradients, outside every transform, until a parameter is
        replaced or written to in place.
        """
        held = self._hold() if held is None else held
        if held is None or any(isinstance(k, Tensor) for k in key):
            return None
        kept = self._cache.get(what)
        if kept is None or kept.held is not held or kept.key != key:
            self._cache[what] = kept = _Kept(key, held, make())
        return kept.value

    def train(self, mode: bool = True) -> Layer:
        """Set the training mode; what evaluation kept is dropped."""
        self._forget()
        self._watched = False
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        # State-space parameters never go below float32: decays near one do not survive it.
        wide = {id(_reach(self, k)) for k in self._wide_keys()}

        def guarded(t: Tensor) -> Tensor:
            out = fn(t)
            narrowed = out.is_floating_point() and out.dtype.itemsize < 4
            return t.to(out.device) if narrowed and id(t) in wide else out

        self._forget()
        return super()._apply(guarded, recurse)

    def _forget(self) -> None:
        """Drop what evaluation keeps."""
        self._cache.clear()
        self._held = None

    def _wide_keys(self) -> tuple[str, ...]:
        kept = self.kept_wide
        return self._keys if kept is None else tuple(k for k in self._keys if k in kept)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_held": None}


def _reach(module: nn.Module, key: str) -> Tensor:
    for part in key.split("."):
        module = getattr(module, part)
    return cast(Tensor, module)


def _linear(params: Params, name: str) -> nn.Linear:
    """Return an ``nn.Linear`` that owns these tensors."""
    weight, bias = params[name + ".weight"], params.get(name + ".bias")
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
