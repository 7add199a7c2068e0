# SPDX-License-Identifier: MIT
"""Arguments and errors of ``lrnnx``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lrnnx_nn.cli import generate
from lrnnx_nn.cli.arguments import integer
from lrnnx_nn.optional import MissingDependencyError

USER_ERROR, INTERRUPTED = 2, 130


TASKS = {
    "classify": "a class for each sequence",
    "lm": "a language model of text files",
    "forecast": "the continuation of a series",
    "denoise": "clean speech from noisy speech",
}
"""Of `lrnnx train`; the options of each stand in lrnnx_nn.cli.train_TASK."""

_WITH_RESUME = frozenset({"task", "resume", "device", "threads"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    A user's error is one line on stderr and code 2; Ctrl-C is code 130.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    traceback = "--traceback" in words
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # what the terminal's encoding lacks becomes ?
    try:
        try:
            arguments = _parse(words)
            return importlib.import_module(f"lrnnx_nn.cli.{arguments.module}").run(arguments)
        finally:
            flush = getattr(sys.stdout, "flush", None)  # there is none where it is closed
            if flush is not None:
                flush()  # a reader that has gone is noticed here, not at exit
    except BrokenPipeError:
        # The reader has gone (`lrnnx models | head`): no error of ours, and nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"lrnnx: interrupted {interrupt}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MissingDependencyError) as error:
        if traceback:
            raise
        print(f"lrnnx: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parse(words: list[str]) -> argparse.Namespace:
    task, resumes = _task_of(words)
    parser = build_parser(task, resumes=resumes)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        message = f"unrecognized arguments: {' '.join(unknown)}"
        if arguments.module.startswith("train_"):
            message = _stray(unknown, task) or message
        parser.error(message)
    if resumes and "given" in arguments:
        again = sorted(arguments.given - _WITH_RESUME)
        if again:
            parser.error(
                f"--{again[0].replace('_', '-')} with --resume: a run goes on as it began, and "
                "takes every option but --device and --threads from its config.json"
            )
    return arguments


def _task_of(words: list[str]) -> tuple[str, bool]:
    """Return the task of `lrnnx train`, by --task or the folder of --resume, and if that is there.

    What is wrong with either is said later, by the parser or by whoever reads the folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--resume")
    try:
        early, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:
        return "classify", False
    if early.resume is None or early.task is not None:
        return early.task or "classify", early.resume is not None
    try:
        task = json.loads((Path(early.resume) / "config.json").read_text()).get("task")
    except (OSError, ValueError, AttributeError):
        task = None
    return (task if task in TASKS else "classify"), True


def _stray(unknown: list[str], task: str) -> str | None:
    """Return what to say of an option that belongs to another task."""
    name = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
    owners = [other for other in TASKS if other != task and name in _options(other)]
    if not owners:
        return None
    return f"{name} is an option of --task {', '.join(owners)}, not of --task {task}"


def _options(task: str) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"lrnnx_nn.cli.train_{task}").add_arguments(parser)
    return set(parser._option_string_actions)


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other user error: one line, code 2."""

    notes_given = False
    """Whether to leave in ``given`` which options were named, whatever their values."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"lrnnx: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        result, rest = super().parse_known_args(args, namespace)
        if self.notes_given:
            # argparse sets a default only where there is no value yet, not even None
            options = [action.dest for action in self._actions]
            blank = argparse.Namespace(**dict.fromkeys(options))
            super().parse_known_args(args, blank)
            result.given = frozenset(k for k in options if getattr(blank, k) is not None)
        return result, rest


def build_parser(task: str = "classify", *, resumes: bool = False) -> argparse.ArgumentParser:
    """Return the parser of every command.

    Args:
        task: whose options ``train`` has.
        resumes: no option is required, all of them stand in the folder of the run.
    """
    parser = _Parser(prog="lrnnx", description="Linear recurrent networks on sequences.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from (default: one line)",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands, task, resumes)
    _add_eval(commands)
    generate.add_arguments(
        commands.add_parser("generate", help=generate.SUMMARY, allow_abbrev=False)
    )
    _add_models(commands)
    doctor = commands.add_parser("doctor", help="what is installed, and what is missing")
    doctor.set_defaults(module="doctor")
    warmup = commands.add_parser("warmup", help="compile the kernels ahead of their first use")
    warmup.set_defaults(module="warmup")
    warmup.add_argument(
        "--device", default="cuda", help="cuda, cuda:1 ..., or cpu (default: %(default)s)"
    )
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **options: Any) -> None:
        from importlib.metadata import version

        print(f"lrnnx-core {version('lrnnx-core')}")
        parser.exit()


def _add_train(commands: Any, task: str, resumes: bool) -> None:
    module = importlib.import_module(f"lrnnx_nn.cli.train_{task}")
    tasks = "\n".join(f"  {name:<10}{text}" for name, text in TASKS.items())
    parser = commands.add_parser(
        "train",
        help="train a classifier, language model, forecaster or denoiser",
        usage="lrnnx train [--task TASK] [OPTION ...]",
        description="Train a network, test it once, and leave a run folder with config, weights, "
        "metrics and\nresult. Ctrl-C ends training and keeps the best network; --resume goes on "
        f"from there.\n\ntasks, with options each (lrnnx train --task TASK --help):\n{tasks}\n\n"
        f"The options below are those of --task {task}: {module.SUMMARY}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.notes_given = True
    parser.set_defaults(module=f"train_{task}")
    add = parser.add_argument
    add("--task", choices=TASKS, default="classify", help="what to learn (default: %(default)s)")
    add(
        "--out",
        metavar="FOLDER",
        help="new or empty run folder (default: runs/NAME-...-TIME)",
    )
    add(
        "--resume",
        metavar="FOLDER",
        help="go on with an unfinished run, with its own options (default: start a new one)",
    )
    add(
        "--device",
        default="auto",
        help="auto (a CUDA device if there is one), cpu, cuda, cuda:1 ... (default: %(default)s)",
    )
    # A network this small gains nothing from a second thread, and on a busy machine loses much:
    # threads that wait for each other at every operation made the demo ten times slower.
    add(
        "--threads",
        type=integer,
        default=1,
        metavar="N",
        help="CPU threads; 0: torch's own choice, for larger networks (default: %(default)s)",
    )
    module.add_arguments(parser)
    if resumes:
        for action in parser._actions:
            action.required = False


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser("eval", help="test the network of a run folder again")
    parser.set_defaults(module="evaluate")
    parser.add_argument("run", metavar="RUN", help="folder that `lrnnx train` wrote")
    parser.add_argument(
        "--data", "--dataset", dest="source", metavar="NAME|FILE",
        help="test on this set, text, series or folder of sounds (default: the run's)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda ... (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")


def _add_models(commands: Any) -> None:
    parser = commands.add_parser("models", help="every model with its options and citation")
    parser.set_defaults(module="models")
    parser.add_argument("name", nargs="?", metavar="MODEL", help="only this one (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (default: text)")
    form.add_argument("--cite", action="store_true", help="print BibTeX alone (default: text)")


if __name__ == "__main__":
    sys.exit(main())
