# SPDX-License-Identifier: MIT
"""Continue sequences with a model's own outputs as its next inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrnnx_core.backends.transforms import transform_active
from lrnnx_nn.generation import engine as engines

Feedback = Callable[[Tensor], Tensor]


def rollout(
    model: Any,
    prompt: Tensor,
    steps: int,
    state: Any = None,
    *,
    integration_timesteps: Tensor | None = None,
    feedback: Feedback | None = None,
    engine: str = "auto",
) -> tuple[Tensor, Any]:
    """Read a prompt, then feed each output back as the next input.

    The first output is the one after the last sample of the prompt. So with a model that predicts
    the next sample, output k is the forecast of sample L + k. To go on, pass the last output, fed
    back, as the next prompt:

        y, state = rollout(model, u, 10)
        more, state = rollout(model, y[..., -1:, :], 10, state)

    Gradients flow through it all, and it can be mapped by ``torch.func.vmap``; use
    ``torch.no_grad()`` and ``model.eval()`` where neither is wanted.

    Args:
        model: a `Mixer` (layer, `Block`, `Gated`, `Stack`, attention), or any object with their
            `prefill` and `step`.
        prompt: (..., L, H), L >= 1; or (..., L) integers for a model of tokens.
        steps: outputs to return, at least 0.
        state: go on from here; the model's own start if None.
        integration_timesteps: (..., L + steps - 1), the time elapsed before each sample that is
            read: those of the prompt, and the steps - 1 outputs that are fed back. (..., L) where
            steps is 0.
        feedback: maps an output y_t (..., H_out) to the next input (..., H), or (...) tokens; it
            may draw samples, or bring what is known of the future. By default the output itself.
        engine: ``auto`` captures the step in a CUDA graph on a CUDA device, and in a plan on a CPU,
            without gradients, in evaluation and without a ``feedback``, which may be any Python;
            else, where the state grows, and on a CPU with ``integration_timesteps``, whose values
            are looked at, it is a plain loop. ``loop`` insists on that, ``graph`` and ``replay`` on
            the others, which repeat what a ``feedback`` did the first time.

    Returns:
        The outputs (..., steps, H_out), before ``feedback``, and the state after the samples read:
        the prompt and every output but the last.

    Raises:
        ValueError: an empty prompt, shapes that do not fit, steps < 0, outputs of another width
            than inputs without a ``feedback``, ``graph`` or ``replay`` where there can be none.
    """
    tokens = not prompt.is_floating_point()
    axis = prompt.ndim - (1 if tokens else 2)
    _check(model, prompt, steps, axis, integration_timesteps, feedback, engine)
    chosen = _engine(engine, model, feedback)
    length = prompt.shape[axis]
    gaps: dict[str, Tensor] = {}
    if integration_timesteps is not None:
        gaps["integration_timesteps"] = integration_timesteps[..., :length]
    ys, state = model.prefill(prompt, state, **gaps)
    y = ys[..., -1, :]
    if feedback is None and y.shape[-1] != prompt.shape[-1]:
        raise ValueError(_width(y.shape[-1], prompt.shape[-1]))
    if not steps:
        return ys[..., :0, :], state
    future = None if integration_timesteps is None else integration_timesteps[..., length:]
    first = _Carry(y, state, future, torch.zeros((), dtype=torch.int64, device=prompt.device))

    def step(carry: _Carry) -> _Carry:
        u = carry.y if feedback is None else feedback(carry.y)
        _check_fed(u, carry.y, prompt, tokens)
        gap: dict[str, Tensor] = {}
        if carry.gaps is not None:
            at = carry.taken.unsqueeze(0)
            gap["integration_timestep"] = carry.gaps.index_select(-1, at).squeeze(-1)
        y, state = model.step(u, carry.state, **gap)
        return _Carry(y, state, carry.gaps, carry.taken + 1)

    found = [y]

    def observe(carry: _Carry) -> bool:
        found.append(carry.y if chosen == "loop" else carry.y.clone())
        return False

    last = engines.repeat(
        step, first, steps - 1, observe, engine=chosen, model=model, key=("rollout", feedback)
    )
    return torch.stack(found, dim=-2), last.state


class _Carry(NamedTuple):
    """What a step needs of the one before."""

    y: Tensor
    state: Any
    gaps: Tensor | None
    """(..., steps - 1), of the samples that are fed back."""
    taken: Tensor
    """() int64, how many have been."""


def _engine(engine: str, model: Any, feedback: Feedback | None) -> str:
    """Return how to repeat a step: ``auto`` only where nothing but tensors go from step to step."""
    if engine == "auto":
        recorded = torch.is_grad_enabled() or transform_active()
        return "loop" if recorded or feedback or getattr(model, "training", False) else "auto"
    if engine in ("graph", "replay") and (torch.is_grad_enabled() or transform_active()):
        raise ValueError(
            f'rollout: engine = "{engine}" with gradients or a transform, expected none'
        )
    return engine


def _check(
    model: Any,
    prompt: Tensor,
    steps: int,
    axis: int,
    gaps: Tensor | None,
    feedback: Feedback | None,
    engine: str,
) -> None:
    """Raise for what can be seen before any work."""
    if engine not in engines.ENGINES:
        raise ValueError(f"rollout: engine = {engine!r}, expected one of {engines.ENGINES}")
    for method in ("prefill", "step"):
        if not callable(getattr(model, method, None)):
            raise ValueError(f"rollout: {type(model).__name__} has no method {method}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"rollout: steps = {steps!r}, expected an integer >= 0")
    width = getattr(model, "d_model", None)
    floating = prompt.is_floating_point()
    if prompt.dtype == torch.bool or prompt.is_complex():
        raise ValueError(f"rollout: prompt has dtype {prompt.dtype}, expected floats or integers")
    if axis < 0 or (floating and isinstance(width, int) and prompt.shape[-1] != width):
        expected = "(..., L, H)" + (f" with H = {width}" if isinstance(width, int) else "")
        raise ValueError(f"rollout: prompt {tuple(prompt.shape)}, expected {expected}")
    length = prompt.shape[axis]
    if not length:
        raise ValueError(
            "rollout: an empty prompt, expected at least one sample; to go on from a state, pass "
            "the last output as the prompt"
        )
    if feedback is None:
        output = getattr(model, "d_output", None)
        if not floating:
            raise ValueError("rollout: tokens need a feedback that maps logits to tokens")
        if isinstance(output, int) and output != prompt.shape[-1]:
            raise ValueError(_width(output, prompt.shape[-1]))
    read = length + max(steps - 1, 0)
    if gaps is not None and (gaps.ndim < 1 or gaps.shape[-1] != read):
        raise ValueError(
            f"rollout: integration_timesteps {tuple(gaps.shape)}, expected (..., {read}): a gap "
            f"before each of {length} samples of the prompt and {read - length} that are fed back"
        )


def _width(output: int, width: int) -> str:
    return (
        f"rollout: outputs of {output} channels and inputs of {width}, expected a feedback that "
        "maps one to the other"
    )


def _check_fed(u: Any, y: Tensor, prompt: Tensor, tokens: bool) -> None:
    expected = y.shape[:-1] if tokens else (*y.shape[:-1], prompt.shape[-1])
    if not isinstance(u, Tensor) or u.shape != expected:
        got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"rollout: feedback returned {got}, expected {tuple(expected)}")
