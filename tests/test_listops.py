# SPDX-License-Identifier: MIT
"""The ListOps benchmark: its grammar against a reader of its own, its data, one small run."""

from __future__ import annotations

import copy
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.listops import page
from benchmarks.listops import step as stepping
from benchmarks.listops import train as training
from benchmarks.listops.data import Part, bounds, data, epoch, parts_of
from benchmarks.listops.grammar import (
    CLOSE,
    N_TOKENS,
    OPERATORS,
    Task,
    apply,
    evaluate,
    expression,
    sequences,
)
from benchmarks.listops.recipe import MODELS, Recipe, network
from benchmarks.listops.step import Schedule, Step
from benchmarks.listops.train import Batches, Clock, accuracy, train
from lrnnx_nn import param_groups
from lrnnx_nn.files import write_json

SMALL = Task(shortest=10, longest=60, depth=4, most_arguments=5)
NAMES = {name: token for token, name in OPERATORS.items()}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("[MIN", [4, 2, 9], 2),
        ("[MAX", [4, 2, 9], 9),
        ("[SM", [4, 2, 9], 5),
        ("[MED", [4, 2, 9], 4),
        ("[MED", [1, 2, 5, 9], 3),  # rounded down
    ],
)
def test_operators(name: str, values: list[int], expected: int) -> None:
    assert apply(NAMES[name], values) == expected


def test_a_nested_expression_is_read() -> None:
    # [MAX 2 9 [MIN 4 7 ] 0 ]
    tokens = [NAMES["[MAX"], 3, 10, NAMES["[MIN"], 5, 8, CLOSE, 1, CLOSE]
    assert evaluate(tokens) == 9
    assert evaluate([8]) == 7
    with pytest.raises(ValueError, match="without its end"):
        evaluate(tokens[:-1])


def test_expressions_keep_to_the_task_and_have_the_value_they_say() -> None:
    draw = random.Random(0)
    for _ in range(300):
        tokens, value = expression(draw, SMALL)
        assert SMALL.shortest <= len(tokens) <= SMALL.longest
        assert evaluate(tokens) == value
        assert min(tokens) > 0
        assert max(tokens) < N_TOKENS
        deep = np.cumsum([(t in OPERATORS) - (t == CLOSE) for t in tokens])
        assert deep.max() < SMALL.depth
        assert deep[-1] == 0


def test_data_do_not_depend_on_processes_and_parts_differ(tmp_path: Path) -> None:
    one, two = data("train", 600, SMALL, 1), data("train", 600, SMALL, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.tokens.shape == (600, 60)
    assert ((one.tokens != 0).sum(-1) == one.lengths).all()
    other = data("validation", 600, SMALL, 1)
    assert not torch.equal(one.tokens, other.tokens)
    values, counts = sequences(2000, 3, SMALL)[2], np.zeros(10)
    np.add.at(counts, values, 1)
    assert counts.min() > 50
    recipe = Recipe(sequences=20, held_out=10, batch_size=10)
    drawn = parts_of(recipe, SMALL, 1, tmp_path / "data.npz")
    read = parts_of(recipe, SMALL, 1, tmp_path / "data.npz")
    assert all(torch.equal(a, b) for p in drawn for a, b in zip(drawn[p], read[p], strict=True))
    with pytest.raises(ValueError, match="other sizes"):
        parts_of(Recipe(sequences=30, held_out=10, batch_size=10), SMALL, 1, tmp_path / "data.npz")


def test_an_epoch_holds_every_sequence_once_in_batches_of_like_lengths() -> None:
    lengths = torch.randint(10, 61, (640,), generator=torch.Generator().manual_seed(0))
    limits = bounds(lengths, 4)
    assert len(limits) == 4
    assert limits[-1] == lengths.max()
    share = torch.bincount(torch.searchsorted(limits, lengths)) / 640
    assert share.min() > 0.2
    draw = torch.Generator().manual_seed(1)
    first, second = (epoch(lengths, limits, 64, draw) for _ in range(2))
    for found in (first, second):
        assert found.rows.shape == (10, 64)
        assert torch.equal(found.rows.flatten().sort().values, torch.arange(640))
        assert (lengths[found.rows] <= limits[found.bucket].unsqueeze(-1)).all()
    assert not torch.equal(first.rows, second.rows)
    assert first.bucket != sorted(first.bucket)
    padded = limits[first.bucket].sum() * 64 / lengths.sum()
    assert padded < 1.25
    assert lengths.max() * 640 / lengths.sum() > 1.6
    with pytest.raises(ValueError, match="not batches of 60"):
        epoch(lengths, limits, 60, draw)
    with pytest.raises(ValueError, match="expected a multiple"):
        Recipe(sequences=100)
    for std in (0.0, -0.02, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"embedding_std .*, expected a finite number > 0"):
            Recipe(embedding_std=std)
    rows = [Batches(Part(lengths, lengths, lengths), limits, Recipe(), 1) for _ in range(2)]
    assert all(torch.equal(rows[0].next()[1], rows[1].next()[1]) for _ in range(15))


def test_the_rate_rises_and_falls_and_its_end_may_move() -> None:
    plain = Schedule(10, "cpu")
    assert plain.factors[[0, 9, 500]].tolist() == pytest.approx([0.1, 1, 1])
    plain.set_total(0, 110)
    want = [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert plain.factors[:10].tolist() == pytest.approx([i / 10 for i in range(1, 11)])
    assert plain.factors[10:110].tolist() == pytest.approx(want, abs=1e-6)
    late = Schedule(10, "cpu")
    late.set_total(4, 110)
    assert torch.equal(late.factors, plain.factors)
    for total in (90, 150):  # half the cosine is done at 60; the rest is faster, or slower
        late.set_total(60, total)
        assert late.factors[:60].tolist() == plain.factors[:60].tolist()
        assert late.factors[60] == pytest.approx(0.5)
        assert late.factors[(60 + total) // 2] == pytest.approx(want[75], abs=1e-6)
        assert (late.factors[60:total].diff() < 0).all()
        assert late.factors[total:].max() == 0
    short = Schedule(1000, "cpu")
    short.set_total(50, 400)
    assert short.warmup == 100
    with pytest.raises(ValueError, match="60 steps after 60"):
        late.set_total(60, 60)


def test_a_clock_fits_the_steps_to_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    schedule = Schedule(100, "cpu")
    clock, step, set_at = Clock(schedule, 0, 1.0), 0, None
    while schedule.total is None or step < schedule.total:
        step += 1
        now += 1.0 if step <= 10 else 0.01 if step <= 3000 else 0.02
        if clock.look(step, step > 10, lambda: None):
            set_at = step
        if step == 3500:
            clock.plan(step)
    assert set_at == 11 + training.PROBE
    assert step > 3500
    assert now == pytest.approx(60, rel=0.2)
    for steps in (7, 0):  # a fixed number; never ready
        schedule = Schedule(100, "cpu")
        clock, step = Clock(schedule, steps, 1.0), 0
        while schedule.total is None or step < schedule.total:
            step, now = step + 1, now + 5.0
            clock.look(step, False, lambda: None)
        assert step == 7 if steps else step in (11, 12)


@pytest.mark.parametrize("model", MODELS)
def test_a_fresh_layer_hears_what_is_far(model: str) -> None:
    torch.manual_seed(0)
    mixer: Any = network(model, Recipe(n_layer=1)).blocks[0].mixer
    u = torch.randn(2, 401, 128)
    other = u.index_copy(1, torch.tensor([200]), torch.randn(2, 1, 128))
    with torch.no_grad():
        change = (mixer(u) - mixer(other)).square().sum((0, 2)).sqrt()
    far = torch.cat([change[:101], change[300:]])
    assert far.norm() > 4e-3 * change.norm()  # Mamba with its own defaults: 3e-4


def test_the_fresh_embedding_is_small() -> None:
    for std in (0.02, 0.5):
        weight = network("s5", Recipe(n_layer=1, embedding_std=std)).encoder.weight
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)


def tiny(count: int = 640, held_out: int = 200, **recipe: object) -> tuple[Recipe, Task]:
    task = Task(shortest=4, longest=12, depth=2, most_arguments=4)
    values = {"batch_size": 64, "d_model": 32, "n_layer": 2, "evaluations": 2, "warmup": 15}
    return Recipe(sequences=count, held_out=held_out, **(values | recipe)), task  # type: ignore[arg-type]


def made(part: Part, recipe: Recipe, device: str = "cpu") -> Step:
    torch.manual_seed(0)
    schedule = Schedule(2, device)
    schedule.set_total(0, 50)
    limits = bounds(part.lengths, recipe.buckets)
    model = network("s5", recipe).to(device)
    return Step(model, part.to(device), limits, recipe, schedule)


def test_a_step_is_the_step_of_a_plain_loop() -> None:
    recipe, task = tiny(buckets=3, n_layer=1)
    part = data("train", 640, task, 1)
    run = made(part, recipe)
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.AdamW(param_groups(model, 3e-3, 1e-3, recipe.weight_decay))
    peaks, total = [g["lr"] for g in optimizer.param_groups], 0.0
    found = epoch(part.lengths, torch.tensor(run.limits), 64, torch.Generator().manual_seed(0))
    for i, (rows, bucket) in enumerate(zip(found.rows[:5], found.bucket, strict=False)):
        run(bucket, rows)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            after = 0.5 * (1 + math.cos(math.pi * max(i - 2, 0) / 48))
            group["lr"] = peak * (min((i + 1) / 2, 1) * after)
        tokens = part.tokens[rows].to(torch.int64)
        loss = F.cross_entropy(model(tokens, lengths=part.lengths[rows]), part.values[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        total += float(loss.detach())
    assert float(run.loss) == pytest.approx(total, rel=1e-4)
    assert run.ready
    for (name, got), want in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
def test_steps_in_graphs_are_eager_steps(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, task = tiny(buckets=3)
    part = data("train", 640, task, 1)
    runs: list[list[Tensor]] = []
    shares: list[float] = []
    for eager in (stepping.EAGER, 10**9):
        monkeypatch.setattr(stepping, "EAGER", eager)
        torch.manual_seed(0)
        schedule = Schedule(2, "cuda")
        schedule.set_total(0, 50)
        limits = bounds(part.lengths, recipe.buckets)
        net = network(model, recipe).cuda()
        start = torch.cat([p.detach().flatten() for p in net.parameters()])
        run = Step(net, part.to("cuda"), limits, recipe, schedule)
        draw = torch.Generator().manual_seed(0)
        torch.cuda.synchronize()
        with run.on_stream():
            for _ in range(2):
                found = epoch(part.lengths, limits, 64, draw)
                for rows, bucket in zip(found.rows, found.bucket, strict=True):
                    run(bucket, rows.cuda())
            share = accuracy(net, part.to("cuda"))
        torch.cuda.synchronize()
        assert run.ready == (eager < 10)
        assert int(run.count) == 20
        shares.append(share)
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])
        runs.append([run.loss / 20, flat, start])
    (loss, ends, start), (want_loss, want, _) = runs
    torch.testing.assert_close(loss, want_loss, rtol=1e-2, atol=0)
    # sums in another order, which AdamW makes more of where a gradient is next to nothing
    assert (ends - want).norm() < 0.1 * (want - start).norm()
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_a_small_network_learns_short_lists() -> None:
    recipe, task = tiny(2048, 500, steps=150, lr=5e-3)
    parts, saved = parts_of(recipe, task, 1, None), []
    result = train(
        "s5", 0, recipe, task, parts=parts, device="cpu", minutes=5,
        save=lambda so_far: saved.append(so_far["test"]),
    )  # fmt: skip
    most = float(np.bincount(parts["test"].values.numpy()).max() / 500)
    assert result["commonest"] == pytest.approx(most)
    assert result["test"] > most + 0.15
    assert [p["step"] for p in result["curve"]] == [75, 150]
    assert result["curve"][1]["loss"] < result["curve"][0]["loss"]
    assert saved == [None, None, result["test"]]


def test_the_page_holds_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe, task = tiny()
    (tmp_path / "benchmarks").mkdir()
    text = tmp_path / "listops.md"
    text.write_text(f"# ListOps\n\n{page.BEGIN}\n\n{page.END}\n\nRead by hand.\n")
    path = tmp_path / "benchmarks" / "listops.json"
    page.render(text, page.keep([], path), path.with_suffix(".png"))
    assert "Not measured yet." in text.read_text()
    curve = [
        {"step": s, "epoch": s / 10, "loss": 2.0, "validation": 0.3, "seconds": 2.0 * s}
        for s in (10, 20)
    ]
    numbers = itertools.count()
    for name, test in (("mamba", 0.25), ("s5", 0.5), ("s5", 0.515), ("lru", None)):
        run = {
            "model": name, "seed": 0, "test": test, "steps": 20, "seconds": 40.0, "curve": curve,
            "commonest": 0.17, "parameters": 1234, "lr": (recipe.lr, recipe.ssm_lr),
            "recipe": vars(recipe), "task": task._asdict(), "device": "cpu", "torch": "2",
        }  # fmt: skip
        write_json(tmp_path / f"{next(numbers)}.json", run)
    runs = page.keep([tmp_path / f"{i}.json" for i in range(4)], path)
    for _ in range(2):
        page.render(text, runs, path.with_suffix(".png"))
    written = text.read_text()
    assert written.endswith("Read by hand.\n")
    assert "| S5 | 1,234 | 20 | 2.0 | 40 | 30.0 | **51.5** | 62.15 |" in written
    assert written.count("| S5 |") == 1
    assert written.index("| S5 |") < written.index("| LRU |") < written.index("| Mamba |")
    assert "Mamba 0.003 and 0.001" in written
    assert "Cut off before the test part was read: LRU." in written
    assert path.with_suffix(".png").is_file()
    assert page.keep([], path) == runs
