"""Layers inside of what others build around them: LoRA adapters of peft, data parallelism."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrnnx_nn.layers import LAYERS, Layer

H, N, L = 4, 8, 7
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in LAYERS]
CASES.append(("s7", {"variant": "full"}))
# S7's delta variant has no projections of its own.
PROJECTED = [c for c in CASES if LAYERS[c[0]].projections and c != ("s7", {})]
projected = pytest.mark.parametrize("case", PROJECTED, ids=lambda c: c[0])


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(case: tuple[str, dict[str, Any]]) -> Layer:
    name, options = case
    return LAYERS[name](H, N, generator=torch.Generator().manual_seed(0), **options)


# ---------------------------------------------------------------------------------------- adapters


@projected
def test_lora_on_the_projections_learns_and_changes_the_output(case: Any) -> None:
    peft = pytest.importorskip("peft")
    projections = list(LAYERS[case[0]].projections)
    network, u = nn.ModuleDict({"mixer": make(case)}), normal(2, L, H)
    network.forward = lambda u: network["mixer"](u)  # peft asks for a network with a forward
    before = network["mixer"](u).detach()
    config = peft.LoraConfig(r=2, target_modules=projections, init_lora_weights=False)
    adapted = peft.get_peft_model(network, config)
    layer = adapted.base_model.model["mixer"]
    y = layer(u)
    assert not torch.allclose(y, before, atol=1e-3)
    y.square().mean().backward()
    trained = {k: p for k, p in layer.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(projections)  # A and B of each
    for key, p in trained.items():
        assert p.grad is not None, key
        assert p.grad.abs().max() > 0, key
    assert all(p.grad is None for p in layer.parameters() if not p.requires_grad)
    # streaming goes through the adapters as well
    with torch.no_grad():
        first, state = layer.prefill(u[:, :4])
        rest = [first]
        for t in range(4, L):
            y_t, state = layer.step(u[:, t], state)
            rest.append(y_t.unsqueeze(1))
    torch.testing.assert_close(torch.cat(rest, 1), y.detach(), rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(layer(u), before)


@projected
def test_merged_adapters_are_weights(case: Any) -> None:
    peft = pytest.importorskip("peft")
    network, u = nn.ModuleDict({"mixer": make(case)}), normal(2, L, H)
    network.forward = lambda u: network["mixer"](u)
    config = peft.LoraConfig(
        r=2, target_modules=list(LAYERS[case[0]].projections), init_lora_weights=False
    )
    adapted = peft.get_peft_model(network, config)
    want = adapted.base_model.model["mixer"](u).detach()
    merged = adapted.merge_and_unload()["mixer"]
    torch.testing.assert_close(merged(u), want, rtol=1e-4, atol=1e-5)
    assert merged.params.keys() == make(case).params.keys()
    plain = make(case)
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain(u), merged(u))


# ------------------------------------------------------------------------------- two processes

ROWS = 4


def target(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


def one_step(network: nn.Module, u: Tensor) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):  # the second forward raises if a parameter of the first was not used
        optimizer.zero_grad()
        target(network(u)).backward()
        optimizer.step()


def worker(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )  # fmt: skip
    try:
        part = normal(ROWS, L, H)[rank::2]
        found: dict[str, Any] = {}
        for case in CASES:
            network = DistributedDataParallel(make(case), find_unused_parameters=False)
            one_step(network, part)
            found[str(case)] = network.module.state_dict()
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_that_one_takes(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    u = normal(ROWS, L, H)
    for case in CASES:
        alone = make(case)
        one_step(alone, u)
        first, second = (found[str(case)] for found in both)
        for key, want in alone.state_dict().items():
            assert torch.equal(first[key], second[key]), (case, key)
            torch.testing.assert_close(
                first[key], want, rtol=1e-4, atol=1e-6, msg=lambda m, k=key, c=case: f"{c} {k} {m}"
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_has_a_gradient(case: Any) -> None:
    layer = make(case)
    target(layer(normal(ROWS, L, H))).backward()
    without = [k for k, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
