"""State size and time per token against the tokens read before: docs/generation.md.

    python -m benchmarks.decoding [--device cuda] [--models s5 mamba attn] [--contexts 100 1000]
    python -m benchmarks.decoding --draw

Language models of one width that differ in their mixer alone generate from a context. A recurrent
one has really read that many tokens. The caches of attention are filled with random keys and values
of that many positions: what is timed is the same, and reading would take a time that grows with
the square. A time is what one more token of `generate` costs: the difference between many tokens
and few, the best of the repeats of each. With one thread of a CPU it is the processor's time, so
that other programs matter little.

The figures of a device go into docs/benchmarks/decoding.json beside those of the other, and the
picture is drawn from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrnnx_nn import LRNNLMHeadModel, viz
from lrnnx_nn.files import read_json, write_json
from lrnnx_nn.generation import Context, generate, state_bytes
from lrnnx_nn.generation.state import map_state
from lrnnx_nn.kv_cache import AttentionRing
from lrnnx_nn.layers import LAYERS
from lrnnx_nn.viz._style import CYCLE, figure_of, finish

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
VOCABULARY, WINDOW, FEW, CHUNK = 256, 1024, 8, 2048
D_STATE = {"s4": 64, "s4d": 64, "s5": 256, "lru": 256, "event_ssm": 256, "centaurus": 64,
           "mamba": 16, "mamba2": 64, "stream": 16, "rglru": None, "s7": 256}  # fmt: skip
"""State sizes: of a channel for S4, S4D, Mamba and STREAM, of a head for Mamba-2, else of all."""
WINDOWED = f"attn, window {WINDOW}"
NAMES = (*LAYERS, WINDOWED, "attn")


def model_of(name: str, options: argparse.Namespace) -> LRNNLMHeadModel:
    """Return the language model of a mixer."""
    torch.manual_seed(0)
    mixer = name.partition(",")[0]
    kwargs: dict[str, dict[str, Any]] = {}
    if mixer == "attn":
        kwargs["attn"] = {"head_dim": min(64, options.d_model)}
        if name == WINDOWED:
            kwargs["attn"]["window"] = WINDOW
    if mixer == "centaurus":
        kwargs["centaurus"] = {"sub_state_dim": 8}
    return LRNNLMHeadModel(
        options.d_model, D_STATE.get(mixer), options.n_layer, VOCABULARY, [mixer], kwargs,
        2 * options.d_model, device=options.device, dtype=getattr(torch, options.dtype),
    ).eval()  # fmt: skip


def filled(state: Any, context: int) -> Any:
    """Return a state before any token with its attention caches as after ``context`` tokens."""
    if isinstance(state, AttentionRing):
        slots = state.k.shape[-3]
        latest = context - 1 - (context - 1 - torch.arange(slots, device=state.k.device)) % slots
        position = torch.where(latest < 0, -1, latest).expand(state.position.shape).contiguous()
        k, v = torch.randn_like(state.k), torch.randn_like(state.v)
        return AttentionRing(k, v, position, torch.full_like(state.next, context))
    if isinstance(state, tuple):
        parts = [filled(part, context) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def grown(model: LRNNLMHeadModel, before: Any, ids: Tensor) -> Any:
    """Return a recurrent model's state after further tokens."""
    for part in ids.split(CHUNK, dim=-1):
        _, before = model.prefill(part, before, last_only=True)
    return before


def context_of(model: LRNNLMHeadModel, state: Any, batch: int) -> Context:
    """Return a context with this state; which token is next is of no interest."""
    device = model.embedding.weight.device
    logits = torch.zeros(batch, VOCABULARY, device=device, dtype=model.embedding.weight.dtype)
    drawn = torch.zeros(batch, dtype=torch.int64, device=device)
    return Context(state, logits, torch.zeros_like(logits, dtype=torch.bool), drawn)


def seconds(model: LRNNLMHeadModel, context: Context, tokens: int, clock: Any) -> float:
    """Return the time of generating so many tokens."""
    device = context.logits.device
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    generate(model, None, tokens, state=context, seed=0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


@torch.no_grad()
def contexts(
    name: str, model: LRNNLMHeadModel, options: argparse.Namespace
) -> Iterator[tuple[int, Context]]:
    """Yield where the model stands after every number of tokens."""
    state: Any = model.init_state((options.batch,))
    generator, read = torch.Generator().manual_seed(1), 0
    for context in sorted(options.contexts):
        if name.startswith("attn"):
            room = context + FEW + options.tokens
            state = filled(model.init_state((options.batch,), capacity=room), context)
            state = state._replace(position=torch.full_like(state.position, context))
        else:
            shape = (options.batch, context - read)
            ids = torch.randint(0, VOCABULARY, shape, generator=generator).to(options.device)
            state, read = grown(model, state, ids), context
        yield context, context_of(model, state, options.batch)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return state bytes a row and milliseconds a token after every context."""
    model = model_of(name, options)
    alone = options.device == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter
    starts = dict(contexts(name, model, options))
    counts = (FEW, FEW + options.tokens)
    best = {(context, tokens): math.inf for context in starts for tokens in counts}

    def take(context: int) -> None:
        for tokens in counts:
            spent = seconds(model, starts[context], tokens, clock)
            best[context, tokens] = min(best[context, tokens], spent)

    if options.device == "cpu":
        for _ in range(options.repeats + 1):  # the first warms up
            for context in starts:
                take(context)
    else:  # the graphs of all contexts may be more than are kept
        for context in starts:
            for _ in range(options.repeats + 1):
                take(context)
    return [
        {
            "context": context,
            "bytes": state_bytes(cut(start.state, context)) / options.batch,
            "ms": 1e3 * (best[context, counts[1]] - best[context, FEW]) / options.tokens,
        }
        for context, start in starts.items()
    ]


def cut(state: Any, context: int) -> Any:
    """Return the state without the slots that attention keeps free for tokens to come."""
    if isinstance(state, AttentionRing):
        used = slice(0, min(context, state.k.shape[-3]))
        return AttentionRing(
            state.k[..., used, :, :], state.v[..., used, :, :], state.position[..., used],
            state.next,
        )  # fmt: skip
    if isinstance(state, tuple):
        parts = [cut(part, context) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return map_state(lambda t: t, state)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every model; print a line for each as it comes."""
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    found: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "dtype": options.dtype,
        "threads": options.threads, "d_model": options.d_model, "n_layer": options.n_layer,
        "batch": options.batch, "tokens": options.tokens, "models": {},
    }  # fmt: skip
    print(f"{device}, torch {torch.__version__}, d_model {options.d_model}, "
          f"{options.n_layer} layers, batch {options.batch}: KiB a row / ms a token")  # fmt: skip
    print(f"{'':20}" + "".join(f"{n:>22,}" for n in sorted(options.contexts)))
    for name in options.models:
        rows = measure(name, options)
        found["models"][name] = rows
        cells = (f"{row['bytes'] / 1024:,.0f} / {row['ms']:.3f}" for row in rows)
        print(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    return found


def draw(runs: dict[str, Any]) -> Any:
    """Return the figure of all devices: state bytes, and times per token, over the context."""
    figure = figure_of(10.0, 3.6 * len(runs) + 1.2, "Decoding after so many tokens")
    panels = figure.subplots(len(runs), 2, squeeze=False)
    names = dict.fromkeys(name for run in runs.values() for name in run["models"])
    recurrent = [name for name in names if not name.startswith("attn")]
    styles = {
        name: {"color": CYCLE[i % 5], "ls": ("-", "--", ":")[i // 5], "lw": 1.2}
        for i, name in enumerate(recurrent)
    }
    styles[WINDOWED] = {"color": "0.5", "ls": "--", "lw": 2.2}
    styles["attn"] = {"color": viz.BLACK, "ls": "-", "lw": 2.5}
    for axes_of, run in zip(panels, runs.values(), strict=True):
        for axes, key, label in zip(
            axes_of, ("bytes", "ms"), ("state, bytes a sequence", "ms a token"), strict=True
        ):
            for name, rows in run["models"].items():
                axes.loglog(
                    [row["context"] for row in rows], [row[key] for row in rows], marker="o",
                    ms=3, label=name, **styles[name],
                )  # fmt: skip
            axes.set(xlabel="tokens read before", ylabel=label)
            axes.set_title(
                f"{run['device']}, width {run['d_model']}, {run['n_layer']} layers, "
                f"batch {run['batch']}",
                fontsize=9,
            )
            finish(axes, legend=False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = made.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--models", nargs="+", default=list(NAMES), choices=NAMES, metavar="MODEL")
    add("--contexts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    add("--d-model", type=int, default=256)
    add("--n-layer", type=int, default=2)
    add("--batch", type=int, default=1)
    add("--tokens", type=int, default=32, help="tokens of which the time is measured")
    add("--repeats", type=int, default=5)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--threads", type=int, default=1)
    add("--folder", type=Path, default=FOLDER, help="where decoding.json and decoding.png go")
    add("--draw", action="store_true", help="only draw the picture again")
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    path = options.folder / "decoding.json"
    runs = read_json(path) if path.is_file() else {}
    if not options.draw:
        runs[options.device] = report(options)
        write_json(path, json.loads(json.dumps(dict(sorted(runs.items())))))
    viz.save_figure(draw(dict(sorted(runs.items()))), options.folder / "decoding.png")


if __name__ == "__main__":
    main()
