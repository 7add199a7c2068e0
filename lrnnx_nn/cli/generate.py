# SPDX-License-Identifier: MIT
"""``lrnnx generate``: continue a text with the language model of a run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lrnnx_nn.cli.arguments import integer, number

SUMMARY = "continue a text with a trained language model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(module="generate")
    add = parser.add_argument
    add("run", metavar="RUN", help="folder that `lrnnx train --task lm` wrote")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", metavar="TEXT", help="text to continue (default: --prompt-file)"
    )
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file with it, - for standard input (default: --prompt)",
    )
    add(
        "--tokens",
        type=integer,
        default=256,
        metavar="N",
        help="most tokens to add (default: %(default)s)",
    )
    add(
        "--echo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print the prompt too, in front (default: --no-echo)",
    )
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--temperature",
        type=number,
        default=1.0,
        metavar="X",
        help="what logits are divided by; 0: always the likeliest (default: %(default)s)",
    )
    add(
        "--top-k", type=integer, metavar="N", help="draw from the N likeliest tokens (default: all)"
    )
    add(
        "--top-p",
        type=number,
        metavar="X",
        help="draw from the likeliest tokens that sum to X (default: all)",
    )
    add(
        "--min-p",
        type=number,
        metavar="X",
        help="leave out tokens less than X times as likely as the best (default: none)",
    )
    add(
        "--repetition-penalty",
        type=number,
        default=1.0,
        metavar="X",
        help="above 1: make what occurred less likely (default: %(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end after this text of one token, may be repeated (default: at --tokens)",
    )
    add(
        "--seed",
        type=integer,
        metavar="N",
        help="of the random numbers (default: a new one, which is told)",
    )
    group = parser.add_argument_group("running")
    add = group.add_argument
    add(
        "--device",
        default="auto",
        help="auto (a CUDA device if there is one), cpu, cuda, cuda:1 ... (default: %(default)s)",
    )
    add(
        "--threads",
        type=integer,
        default=1,
        metavar="N",
        help="CPU threads; 0: torch's own choice, for larger networks (default: %(default)s)",
    )
    add(
        "--prefill-chunk",
        type=integer,
        default=4096,
        metavar="N",
        help="tokens of the prompt that are read at once (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check every argument, then write the continuation as it comes; return the exit code."""
    from lrnnx_nn.architectures import checkpoint
    from lrnnx_nn.architectures.language_model import ARCHITECTURE, LRNNLMHeadModel
    from lrnnx_nn.cli.arguments import cpu_threads
    from lrnnx_nn.cli.options import parse_device
    from lrnnx_nn.data.text import load_vocabulary

    device = parse_device(arguments.device)
    if (kind := checkpoint.load_architecture(arguments.run)) != ARCHITECTURE:
        raise ValueError(f"{arguments.run}: a network of kind {kind!r}, expected {ARCHITECTURE!r}")
    vocabulary = load_vocabulary(arguments.run)
    model = LRNNLMHeadModel.from_pretrained(
        arguments.run, device=device, vocab_size=vocabulary.size
    )
    text = _prompt(arguments)
    ids = vocabulary.encode(text)
    if not len(ids):
        raise ValueError("the prompt is empty, expected at least one character")
    stop = [_single(vocabulary, word) for word in arguments.stop]
    _note_windows(model, len(ids))
    with cpu_threads(arguments.threads):
        _write(model, vocabulary, text, ids, stop, arguments)
    return 0


def _write(
    model: Any, vocabulary: Any, text: str, ids: Any, stop: list[int], arguments: argparse.Namespace
) -> None:
    from lrnnx_nn.generation import TextStreamer, generate

    seed = arguments.seed
    if seed is None and arguments.temperature != 0:
        seed = _new_seed()
    out = _Output()
    if arguments.echo:
        out.hold(text)
    try:
        generate(
            model, ids, arguments.tokens,
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
            min_p=arguments.min_p, repetition_penalty=arguments.repetition_penalty,
            stop_tokens=stop, seed=seed, prefill_chunk=arguments.prefill_chunk,
            streamer=TextStreamer(vocabulary.decode, out.write),
        )  # fmt: skip
    finally:
        out.end()
    if arguments.seed is None and seed is not None:
        print(f"lrnnx: note: --seed {seed} gives this text again", file=sys.stderr)


class _Output:
    """Standard output, to which text goes at once."""

    def __init__(self) -> None:
        self.held, self.last = "", "\n"
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # what the terminal's encoding lacks becomes ?

    def hold(self, text: str) -> None:
        """Keep a text until the first that is written: nothing shows where arguments are wrong."""
        self.held = text

    def write(self, text: str) -> None:
        text, self.held = self.held + text, ""
        self.last = text
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the last line."""
        if not self.last.endswith("\n"):
            self.write("\n")


def _new_seed() -> int:
    import secrets

    return secrets.randbelow(1 << 32)


def _prompt(arguments: argparse.Namespace) -> str:
    """Return the text to continue, as it is.

    Raises:
        ValueError: a file that is missing or not UTF-8.
    """
    name = arguments.prompt_file
    if name is None:
        return arguments.prompt
    if name == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input")
    try:
        with open(name, "rb") as file:
            return _decoded(file.read(), name)
    except OSError as error:
        raise ValueError(f"{name}: not readable ({error.strerror})") from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8, byte 0x{data[error.start]:02X} at offset {error.start}"
        ) from error


def _single(vocabulary: Any, text: str) -> int:
    """Return the token of a text that is one.

    Raises:
        ValueError: it is several tokens, or none.
    """
    ids = vocabulary.encode(text).tolist()
    if len(ids) != 1:
        raise ValueError(f"--stop {text!r} is {len(ids)} tokens, expected a text of one token")
    return ids[0]


def _note_windows(model: Any, length: int) -> None:
    """Say so where attention will not see all of the prompt."""
    from lrnnx_nn.attention import Attention

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    windows = [layer.window for layer in layers if layer.window is not None]
    shortest = min(windows, default=length)
    if length > shortest:
        print(
            f"lrnnx: note: the prompt has {length} tokens, of which a layer of sliding-window "
            f"attention sees the last {shortest}",
            file=sys.stderr,
        )
