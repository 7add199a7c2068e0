"""Convolution of every time-invariant model: cut into chunks, chosen by `auto`, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import (
    INVARIANT,
    Case,
    assert_agree,
    every_invariant_case,
    gaps,
    normal,
    stacked,
)
from torch import Tensor
from torch.func import vmap

from lrnnx_core import registry
from lrnnx_core.models import _auto
from lrnnx_core.ops import contract

ROOT = Path(__file__).parent.parent
EXACT = 1e-11
L = 23

first_variants = pytest.mark.parametrize(
    "case",
    {c.entry.name: c for c in reversed(INVARIANT) if not c.bidirectional}.values(),
    ids=str,
)


def reach(case: Case, length: int) -> int:
    """Return the longest kernel the case has, at most ``length``."""
    return min(length, case.choices.get("l_kernel") or length)


@every_invariant_case
@pytest.mark.parametrize("size", [1, 3, 8, L - 1, L, 4 * L])
def test_a_convolution_in_chunks_is_the_recurrence(case: Case, size: int) -> None:
    params, u = case.params(), normal(2, L, 3)
    state = case.state(params, (2,))
    want = case.model.scan(params, u, state, mode="recurrent")
    if reach(case, min(size, L)) < min(size, L):
        pytest.skip("beyond l_kernel")
    got = case.model.scan(params, u, state, mode="conv", chunk_size=size)
    assert_agree(got, want, EXACT, "conv")
    assert_agree(case.model.scan(params, u, state, chunk_size=size), got, 0.0, "auto")
    K = case.model.kernel(params, min(size, L))
    got = case.model.scan(params, u, state, kernel=K, chunk_size=size)
    assert_agree(got, want, EXACT, "kernel")


@every_invariant_case
def test_chunks_respect_lengths(case: Case) -> None:
    params, u = case.params(), normal(4, L, 3)
    lengths = torch.tensor([0, 5, 16, L])
    state = case.state(params, (4,))
    want = case.model.scan(params, u, state, lengths=lengths, mode="recurrent")
    got = case.model.scan(params, u, state, lengths=lengths, mode="conv", chunk_size=5)
    assert_agree(got, want, EXACT)


@every_invariant_case
def test_gradients_through_chunks(case: Case) -> None:
    params = {k: v.requires_grad_() for k, v in case.params().items()}
    u, state = normal(2, L, 3).requires_grad_(), case.state(params, (2,))

    def gradients(**options: Any) -> tuple[Tensor, ...]:
        y, last = case.model.scan(params, u, state, **options)
        total = (y * torch.cos(torch.arange(y.numel()).reshape(y.shape))).sum()
        if not case.bidirectional:
            total = total + last.real.square().sum()
        return torch.autograd.grad(total, [u, *params.values()])

    for got, want in zip(
        gradients(mode="conv", chunk_size=6), gradients(mode="recurrent"), strict=True
    ):
        assert_agree(got, want, 1e-9)


@first_variants
def test_chunks_under_vmap(case: Case) -> None:
    params, u = case.params(), normal(3, L, 3)
    run = lambda x: case.model.scan(params, x, mode="conv", chunk_size=7)  # noqa: E731
    assert_agree(vmap(run)(u), stacked([run(x) for x in u]), EXACT)


@first_variants
def test_long_sequences_are_cut_without_being_asked(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, u = case.params(), normal(2, L, 3)
    want = case.model.scan(params, u, mode="conv", chunk_size=L)
    asked = case.model.scan(params, u, mode="conv", chunk_size=8)
    monkeypatch.setitem(_auto.CHUNK, "cpu", 8)
    got = case.model.scan(params, u, mode="conv")
    assert_agree(got, asked, 0.0)
    assert_agree(got, want, EXACT)
    short = u[:, :15]  # less than two chunks: whole
    whole = case.model.scan(params, short, mode="conv", chunk_size=15)
    assert_agree(case.model.scan(params, short, mode="conv"), whole, 0.0)


@first_variants
def test_what_chunks_refuse(case: Case) -> None:
    params, u, scan = case.params(), normal(2, L, 3), case.model.scan
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=rf"chunk_size = {bad!r}, expected an integer >= 1"):
            scan(params, u, chunk_size=bad)
    some = torch.zeros(2, L, dtype=torch.bool)
    for given in (
        {"mode": "scan"}, {"mode": "recurrent"}, {"mask": ~some}, {"reset": some},
        {"integration_timesteps": gaps(2, L)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="chunk_size = 5 is for a convolution, and this call"):
            scan(params, u, chunk_size=5, **given)
    K = case.model.kernel(params, 4)
    with pytest.raises(ValueError, match=r"kernel .* expected .*>= 5"):
        scan(params, u, kernel=K, chunk_size=5)


@pytest.mark.parametrize("name", ["s5", "lru", "event_ssm", "centaurus"])
def test_a_memory_cap_reaches_the_planner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = registry.get(name)
    params = model.init(3, 16, dtype=torch.float64)
    u = normal(4, L, 3)
    orders: list[str] = []
    plan = contract._plan

    def watched(*arguments: Any) -> contract.Plan:
        found = plan(*arguments)
        orders.append(found.order)
        smallest = min(found.candidates, key=lambda c: c.peak_bytes).order
        assert found.max_bytes != 1 or found.order == smallest
        return found

    monkeypatch.setattr(contract, "_plan", watched)
    want = model.scan(params, u, mode="conv")
    assert_agree(model.scan(params, u, mode="conv", max_bytes=1), want, EXACT)
    assert_agree(model.scan(params, u, max_bytes=1), want, EXACT)
    assert len(orders) == 3
    with pytest.raises(ValueError, match="max_bytes = 1 is for a convolution, and this call scans"):
        model.scan(params, u, mode="scan", max_bytes=1)
    with pytest.raises(ValueError, match="give kernel or max_bytes, not both"):
        model.scan(params, u, kernel=model.kernel(params, L), max_bytes=1)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match=rf"max_bytes = {bad!r}, expected an integer >= 1"):
            model.scan(params, u, mode="conv", max_bytes=bad)
    if name == "centaurus":
        full = model.init(3, 16, variant="full")
        with pytest.raises(ValueError, match="max_bytes is for neck and pointwise"):
            model.scan(full, u.float(), variant="full", max_bytes=1)


def test_the_rule_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(connectivity: str, length: int, states: int, device: str = "cpu") -> bool:
        u = torch.empty(8, length, 64, device=device)
        return _auto.prefers_convolution(connectivity, u, states)

    monkeypatch.setattr(_auto.cpu, "in_force", lambda: True)
    assert not chosen("siso", 2**14, 256)
    assert chosen("siso", 2**14, 257)
    assert not chosen("mimo", 4096, 32)
    monkeypatch.setattr(_auto.cpu, "in_force", lambda: False)
    assert not chosen("siso", 2**14, 1)
    assert not chosen("siso", 16, 64)
    assert not chosen("siso", 63, 8)
    assert chosen("siso", 64, 8)
    assert chosen("siso", 17, 32)
    assert chosen("siso", 256, 2)
    assert not chosen("siso", 255, 2)
    assert not chosen("mimo", 4096, 32)


def chosen_by(model: registry.Model, params: Any, u: Tensor) -> list[str]:
    """Return the modes whose numbers, to the bit, are those of `auto`."""
    y, _ = model.scan(params, u)
    return [m for m in ("conv", "scan") if torch.equal(model.scan(params, u, mode=m)[0], y)]


def test_auto_of_centaurus_counts_the_sub_states() -> None:
    for variant, states in (("neck", 8), ("dws", 8), ("full", 8), ("pointwise", 1)):
        model = registry.bind("centaurus", variant=variant)
        params = model.init(3, 8)
        for length, worth in ((127, False), (128, True)):  # 1024 / 8
            want = "conv" if worth and states > 1 else "scan"
            assert chosen_by(model, params, normal(2, length, 3).float()) == [want], variant


def test_auto_of_s4_convolves_where_a_truncated_readout_reaches() -> None:
    stored = registry.bind("s4", l_kernel=64)
    params = stored.init(3, 8)
    for length, want in ((16, "scan"), (17, "conv"), (64, "conv")):
        assert chosen_by(stored, params, normal(2, length, 3).float()) == [want]
    y, _ = stored.scan(params, normal(2, 65, 3).float())  # beyond it, and not refused
    assert bool(torch.isfinite(y).all())
    true = registry.get("s4")
    assert chosen_by(true, true.init(3, 8), normal(2, 100, 3).float()) == ["scan"]


def test_auto_on_a_gpu_goes_by_all_states(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.empty(8, 4096, 64, device="meta")
    assert not _auto.prefers_convolution("mimo", u, 2**20)

    class Cuda:  # what the rule looks at
        device, shape = torch.device("cuda"), u.shape

        @staticmethod
        def numel() -> int:
            return u.numel()

    monkeypatch.setattr(_auto, "CUDA_KERNELS", False)
    assert not _auto.prefers_convolution("siso", Cuda(), 64)
    assert _auto.prefers_convolution("siso", Cuda(), 65)
    monkeypatch.setattr(_auto, "CUDA_KERNELS", True)
    assert not _auto.prefers_convolution("siso", Cuda(), 256)
    assert _auto.prefers_convolution("siso", Cuda(), 257)


@first_variants
def test_auto_follows_the_rule(case: Case) -> None:
    params, u = case.params(), normal(2, 300, 3)
    y, _ = case.model.scan(params, u)
    same = [m for m in ("conv", "scan") if torch.equal(case.model.scan(params, u, mode=m)[0], y)]
    if case.entry.name == "s4d":
        states = case.model.init_state(params).shape[-1]
        rule = _auto.prefers_convolution("siso", u, states)
        assert same == ["conv" if rule else "scan"]
    assert len(same) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4", "s4d", "s5", "centaurus"])  # one a machinery
def test_a_million_samples_need_less_than_two_gigabytes(name: str) -> None:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no benchmarks beside the tests")
    found = []
    for length in (2**16 + 1, 2**20 + 1):
        command = [
            sys.executable, "-m", "benchmarks.cpu.long_convolution", "--one", name, str(length),
            "chunks", "--width", "16",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout)["MiB"])
    assert found[1] < 2048
    assert found[1] < 16 * max(found[0], 64)  # linear in L
