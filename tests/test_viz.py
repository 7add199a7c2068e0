"""Pictures of linear systems: what they are drawn from, and what stands in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import INVARIANT, Case, assert_agree
from torch import nn

from lrnnx_core import frequency, registry
from lrnnx_nn import LRU, S4D, S5, Mamba, viz

pytest.importorskip("matplotlib")

OMEGA = torch.logspace(-2, math.log10(math.pi), 30, dtype=torch.float64)
FIRST = [next(c for c in INVARIANT if c.entry is m) for m in registry.MODELS.values()
         if m.kind == "lti"]  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        S4D(4, 8, channels=2), Mamba(4, 2), S5(4, 8), LRU(4, 6, bidirectional=True)
    )


def test_a_network_a_layer_and_a_dict_are_sources() -> None:
    net = network()
    assert list(viz.systems_of(net)) == ["0", "2", "3"]
    assert list(viz.systems_of(net[2])) == ["S5"]
    params = {k: v.detach() for k, v in net[2].params.items()}
    (system,) = viz.systems_of(params, "s5", clip_eigs=True).values()
    assert system.options == {"clip_eigs": True}
    assert all(v.dtype == torch.float64 and not v.requires_grad for v in system.params.values())
    own = viz.eigenvalues(net[2])["S5"]
    assert_agree(viz.eigenvalues(params, registry.get("s5"))["S5"], own, 0.0)
    slower = viz.eigenvalues(params, "s5", discretization="bilinear")["S5"]
    assert not torch.allclose(slower, own)


def test_bad_sources_are_refused() -> None:
    params = S5(2, 4).params
    with pytest.raises(ValueError, match="give model='s5'"):
        viz.eigenvalues(params)
    with pytest.raises(ValueError, match="a module knows its model"):
        viz.eigenvalues(S5(2, 4), "s5")
    with pytest.raises(ValueError, match="a module knows its model"):
        viz.eigenvalues(S5(2, 4), clip_eigs=True)
    with pytest.raises(ValueError, match="s5 has no option 'width'"):
        viz.eigenvalues(params, "s5", width=3)
    with pytest.raises(ValueError, match="Mamba varies in time"):
        viz.eigenvalues({}, "mamba")


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_numbers_are_those_of_the_core(case: Case) -> None:
    params = case.params(3, 8)
    options = case.choices
    last = -2 if case.entry.connectivity == "siso" else -3
    (H,) = viz.frequency_responses(params, OMEGA, case.entry, **options).values()
    want = frequency.frequency_response(case.model, params, OMEGA)
    assert_agree(H, want.movedim(last, -1), 1e-12)
    (s,) = viz.step_responses(params, 9, case.entry, **options).values()
    assert_agree(s, frequency.step_response(case.model, params, 9).movedim(last, -1), 1e-12)
    (K,) = viz.kernels(params, 9, case.entry, **options).values()
    assert_agree(K, case.model.kernel(params, 9).movedim(last, -1), 1e-12)


def test_of_two_channels_and_two_directions() -> None:
    net = network()
    assert viz.frequency_responses(net, OMEGA)["0"].shape == (8, 30)  # channels come first
    assert viz.step_responses(net, 5)["0"].shape == (8, 5)
    assert viz.step_responses(net, 5)["3"].shape == (4, 4, 5)  # the forward half
    params = {k: v.detach().double() for k, v in net[3].params.items()}
    want = frequency.step_response("lru", params, 5).movedim(-3, -1)
    assert_agree(viz.step_responses(net, 5)["3"], want, 1e-12)
    both = frequency.frequency_response("lru", params, OMEGA, bidirectional=True)
    assert_agree(viz.frequency_responses(net, OMEGA)["3"], both.movedim(-3, -1), 1e-12)


def lines(axes: Any) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) > 2]


def test_a_bode_plot_shows_decibels_and_degrees_over_hertz() -> None:
    H = viz.frequency_responses(network(), OMEGA)
    figure = viz.plot_bode(H, OMEGA, "title", shown=3, sampling_rate=16000.0)
    top, bottom = figure.axes[0], figure.axes[3]
    row = H["0"][H["0"].abs().amax(-1).argmax()].numpy()
    np.testing.assert_allclose(lines(top)[0], 20 * np.log10(np.abs(row)))
    np.testing.assert_allclose(np.cos(np.radians(lines(bottom)[0])), np.cos(np.angle(row)))
    assert (np.abs(np.diff(lines(bottom)[0])) < 180).all()
    assert np.isclose(top.get_lines()[0].get_xdata()[-1], 8000)
    assert bottom.get_xlabel() == "frequency (Hz)"
    assert top.get_title() == "0: the 3 largest of 8"
    assert bottom.get_xscale() == "log"
    assert viz.plot_bode(H, OMEGA).axes[-1].get_xlabel() == "frequency (rad/sample)"


@pytest.mark.parametrize("bad", [OMEGA - 1, OMEGA.flip(0), OMEGA[None], OMEGA[:0]])
def test_frequencies_that_a_logarithmic_axis_cannot_show_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"plot_bode: omega .*above 0 and rising"):
        viz.plot_bode({"x": torch.ones(1, 30) + 0j}, bad)


def test_a_negative_gain_begins_at_180_degrees_in_every_row() -> None:
    H = torch.stack([-torch.ones(30) + s * 1e-9j for s in (1, -1)])
    for row in lines(viz.plot_bode({"x": H}, OMEGA).axes[1]):
        np.testing.assert_allclose(row, 180, atol=1e-5)


def test_time_constants_count_every_mode_that_decays() -> None:
    values = {"x": torch.tensor([0.5, 0.9j, 1.0, 1.2, 0.0], dtype=torch.complex128)}
    axes = viz.plot_time_constants(values, dt=0.5, unit="ms").axes[0]
    assert sum(bar.get_xy()[:, 1].max() > 0 for bar in axes.patches) == 1  # one outline
    assert axes.get_title() == "x: 5 stored modes, 1 unstable"
    assert axes.get_xlabel() == "time constant (ms)"
    low, high = axes.get_xlim()
    assert low < -0.5 / math.log(0.5) < -0.5 / math.log(0.9) < high
    nothing = {"x": torch.tensor([1.0 + 0j], dtype=torch.complex128)}
    viz.plot_time_constants(nothing, nothing)


def test_every_picture_can_be_written(tmp_path: Path) -> None:
    net = network()[0]
    values = viz.eigenvalues(net)
    figures = {
        "one": viz.plot_eigenvalues(values),
        "two": viz.plot_eigenvalues(values, values),
        "times": viz.plot_time_constants(values, values),
        "kernels": viz.plot_kernels(viz.kernels(net, 7), shown=9),
        "steps": viz.plot_step_responses(viz.step_responses(net, 200), "t"),
        "bode": viz.plot_bode(viz.frequency_responses(net, OMEGA), OMEGA),
    }
    for name, figure in figures.items():
        viz.save_figure(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert len(lines(figures["kernels"].axes[0])) == 8
