"""The language model on a GPU: what it gives on the CPU, in every form."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from lrnnx_nn import LAYERS, LRNNLMHeadModel

pytestmark = pytest.mark.cuda
DEVICE, V, L = "cuda", 37, 40
CASES: dict[str, dict[str, Any]] = {name: {"mixer_types": [name]} for name in LAYERS}
CASES["mixture"] = {
    "mixer_types": ["s5", "attn", "mamba"],
    "mixer_kwargs": {"attn": {"n_heads": 4, "n_kv_heads": 2, "window": 8}},
}


@functools.cache
def model(case: str) -> LRNNLMHeadModel:
    torch.manual_seed(0)
    made = LRNNLMHeadModel(32, 16, 3, V, d_intermediate=48, max_positions=L, **CASES[case])
    torch.nn.init.normal_(made.embedding.weight)
    return made.eval()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.cpu() - want).abs().max() / want.abs().max())
    assert error < 1e-5, error


@pytest.fixture(autouse=True)
def full_float32() -> Any:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_gpu_gives_what_a_cpu_gives(case: str, tmp_path: Path) -> None:
    here = model(case)
    here.save_pretrained(tmp_path)
    there = LRNNLMHeadModel.from_pretrained(tmp_path, device=DEVICE)
    ids = torch.randint(V, (3, L), generator=torch.Generator().manual_seed(1))
    lengths, reset = torch.tensor([L, 9, 0]), torch.zeros(3, L, dtype=torch.bool)
    reset[0, 11] = True
    close(there(ids.to(DEVICE)), here(ids))
    options = {"lengths": lengths, "reset": reset}
    moved = {key: value.to(DEVICE) for key, value in options.items()}
    close(there(ids.to(DEVICE), **moved), here(ids, **options))
    first, state = there.prefill(ids[:, :17].to(DEVICE))
    steps = [first]
    for t in range(17, L):
        y, state = there.step(ids[:, t].to(DEVICE), state)
        steps.append(y.unsqueeze(1))
    close(torch.cat(steps, 1), here(ids))


@pytest.mark.parametrize("case", ["s5", "mixture"])
def test_training_on_a_gpu(case: str) -> None:
    here = model(case)
    there = LRNNLMHeadModel.from_config(here.config, device=DEVICE).eval()
    there.load_state_dict(here.state_dict())
    ids = torch.randint(V, (3, L), generator=torch.Generator().manual_seed(1))
    for one, tokens in ((here, ids), (there, ids.to(DEVICE))):
        one.zero_grad()
        torch.nn.functional.cross_entropy(one(tokens).flatten(0, 1), tokens.flatten()).backward()
    for (key, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert p.grad is not None, key
        assert q.grad is not None, key
        error = float((q.grad.cpu() - p.grad).norm() / p.grad.norm())
        assert error < 1e-4, (key, error)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        y, want = there(ids.to(DEVICE)).float().cpu(), here(ids)
    assert float((y - want).norm() / want.norm()) < 0.05


def test_too_many_positions_are_refused_by_their_shape() -> None:
    there = LRNNLMHeadModel(32, 16, 1, V, max_positions=5, device=DEVICE)
    with pytest.raises(ValueError, match="at most max_positions = 5 tokens a document"):
        there(torch.zeros(1, 6, dtype=torch.int64, device=DEVICE))
