"""Every Python block of the README and of docs/ runs; the blocks of one page share their names.

A block that holds `# >` lines must print exactly what they say.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

ROOT = Path(__file__).parent.parent


def pages() -> dict[str, list[CodeExample]]:
    """Return {path below the root: its blocks in order}, for every page that has any."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = {
        file.relative_to(ROOT).as_posix(): list(find_examples(file))
        for file in files
        if file.is_file()
    }
    return {page: examples for page, examples in blocks.items() if examples}


PAGES = pages()


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(
    page: str, eval_example: EvalExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    # Its prettier traceback reads a field that Python 3.11 code objects fill differently, and ends
    # the session; pytest's own traceback names page and line too.
    monkeypatch.setattr("pytest_examples.run_code.create_example_traceback", lambda *_: None)
    # pytest-examples runs a block as __main__; put the real one back afterwards.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    names: dict[str, object] = {}
    for example in PAGES[page]:
        # `# >` is what ruff leaves alone, `#>` what pytest-examples reads
        printed = dataclasses.replace(example, source=example.source.replace("# > ", "#> "))
        run = eval_example.run_print_check if "#>" in printed.source else eval_example.run
        names |= run(printed, module_globals=names)
