"""The synthetic tasks ask what they claim to ask, and a network begins to learn them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks" / "synthetic").is_dir():
    pytest.skip("no benchmarks beside the tests", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks.synthetic import __main__ as command  # noqa: E402
from benchmarks.synthetic import tasks  # noqa: E402
from benchmarks.synthetic.train import (  # noqa: E402
    LEARNING_RATES,
    RECIPES,
    Network,
    recipe_for,
    train,
)
from lrnnx_nn import LAYERS  # noqa: E402


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_copying_asks_for_every_bit_of_the_patterns_in_order():
    batch = tasks.copying(200, generator(), length=6, wait=3)
    assert batch.tokens.shape == (200, 15)
    for row, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert row[6:] == [tasks.WAIT] * 3 + [tasks.RECALL] * 6
        written = [int(bit) for token in row[:6] for bit in reversed(f"{token:07b}")]
        assert labels == written
    assert batch.tokens[:, :6].unique().tolist() == list(range(2**tasks.PATTERN_BITS))


def test_a_network_reads_bits_and_answers_each():
    task = tasks.TASKS["copying"]
    network = Network(task, "lru", dataclasses.replace(RECIPES["copying"], d_model=8))
    batch = tasks.copying(3, generator(), length=4, wait=2)
    assert network(batch.tokens, batch.labels.shape[-1]).shape == (3, 28, 2)
    embedded = network.embedding(torch.tensor([0, 1, 3, tasks.WAIT, tasks.RECALL]))
    weight, bias = network.embedding.linear.weight, network.embedding.linear.bias
    torch.testing.assert_close(embedded[0], bias - weight.sum(1))
    torch.testing.assert_close(embedded[2] - embedded[1], 2 * weight[:, 1])
    torch.testing.assert_close(embedded[3:], network.embedding.signal.weight)


def test_selective_copying_asks_for_what_is_not_noise_in_order():
    batch = tasks.selective_copying(200, generator(), length=20, copied=3)
    assert batch.tokens.shape == (200, 23)
    gaps = set()
    for row, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        body, query = row[:20], row[20:]
        assert query == [tasks.MARKER] * 3
        assert labels == [token for token in body if token != tasks.NOISE]
        gaps.add(tuple(i for i, token in enumerate(body) if token != tasks.NOISE))
    assert set(batch.labels.unique().tolist()) == set(range(1, tasks.MARKER))
    assert len(gaps) > 150  # of 1140 places


def test_induction_heads_asks_for_what_followed_the_trigger():
    batch = tasks.induction_heads(500, generator(), length=12)
    places = set()
    for row, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert row.count(tasks.TRIGGER) == 2
        assert row[-1] == tasks.TRIGGER
        assert labels == [row[row.index(tasks.TRIGGER) + 1]]
        places.add(row.index(tasks.TRIGGER))
    assert places == set(range(10))


def test_event_timing_asks_for_the_time_since_the_mark():
    batch = tasks.event_timing(500, generator(), length=9)
    assert batch.gaps is not None
    assert batch.gaps.min() >= 0
    counts = [0] * tasks.RHYTHMS
    for row, gaps, labels in zip(
        batch.tokens.tolist(), batch.gaps.tolist(), batch.labels.tolist(), strict=True
    ):
        times = torch.tensor(gaps, dtype=torch.float64).cumsum(0)
        assert row.count(tasks.MARK) == 1
        elapsed = float(times[-1] - times[row.index(tasks.MARK)])
        (fits,) = [
            k
            for k in range(tasks.RHYTHMS)
            if 0.999 < elapsed / (tasks.SHORTEST * tasks.RATIO**k) < 2.001
        ]
        assert labels == [fits]
        counts[fits] += 1
    assert min(counts) > 80  # of 125


def test_tokens_of_event_timing_hold_nothing_about_the_answer():
    batch = tasks.event_timing(20_000, generator())
    answer, place = batch.labels[:, 0], (batch.tokens == tasks.MARK).int().argmax(-1)
    for k in range(tasks.RHYTHMS):
        assert abs(float(place[answer == k].double().mean()) - 15) < 0.5
        for token in range(tasks.MARK):
            share = (batch.tokens[answer == k] == token).double().mean()
            assert abs(float(share) - 31 / 32 / 3) < 0.005


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_generator_decides_everything(task: str):
    draw = tasks.TASKS[task].draw
    state = torch.get_rng_state()
    first, again, other = draw(8, generator(1)), draw(8, generator(1)), draw(8, generator(2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not torch.equal(first.tokens, other.tokens)
    assert int(first.tokens.max()) < tasks.TASKS[task].vocabulary
    assert int(first.labels.max()) < tasks.TASKS[task].n_classes


def test_every_task_has_a_recipe_and_rates_are_of_known_models():
    assert set(RECIPES) == set(tasks.TASKS)
    for (task, model), lr in LEARNING_RATES.items():
        assert task in tasks.TASKS
        assert model in LAYERS
        assert recipe_for(task, model).lr == lr


@pytest.mark.parametrize("model", LAYERS)
def test_every_model_answers(model: str):
    task = tasks.TASKS["event_timing"]
    network = Network(task, model, dataclasses.replace(RECIPES["event_timing"], d_model=8))
    batch = tasks.event_timing(2, generator(), length=5)
    assert network(batch.tokens, 1, batch.gaps).shape == (2, 1, task.n_classes)


def test_training_reduces_the_loss_and_repeats_itself():
    recipe = dataclasses.replace(RECIPES["event_timing"], steps=40, lr=1e-2, ssm_lr=1e-2)
    first = train("event_timing", "lru", 0, recipe)
    again = train("event_timing", "lru", 0, recipe)
    assert first["curve"][-1] < first["curve"][0] - 0.1
    assert first["accuracy"] > 0.4
    volatile = ("seconds",)
    assert {k: v for k, v in first.items() if k not in volatile} == {
        k: v for k, v in again.items() if k not in volatile
    }


def test_command_line_runs_resumes_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    which = ["--task", "induction_heads", "--model", "lru", "--steps", "2", "--seed", "0"]
    assert command.main([*which, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (tmp_path / "induction_heads-lru-0.json").write_text(json.dumps(result))
    (tmp_path / "induction_heads-lru-1.json").write_text(json.dumps(result | {"accuracy": 1.0}))
    assert command.main([*which, "--all", str(tmp_path)]) == 0  # nothing left to do
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert command.main(["table", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| model | induction heads |" in printed
    assert "–100.0), " in printed


def test_a_run_that_takes_too_long_is_reported_and_not_finished(tmp_path: Path):
    options = ["--task", "induction_heads", "--model", "lru", "--all", str(tmp_path)]
    assert command.main([*options, "--limit", "0.01", "--jobs", "1"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["induction_heads-lru-0.log"]
