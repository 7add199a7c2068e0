"""The compile check of the CUDA kernels, as far as it goes without a compiler."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrnnx_core.backends import cuda


@pytest.fixture(scope="module")
def check() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
        yield importlib.import_module("check_cuda")


def test_labels_tell_all_kernels_of_an_architecture_apart(check: Any) -> None:
    for architecture, limits in check.ARCHITECTURES.items():
        listed = [k for kernels in cuda.KERNELS.values() for k in kernels(limits)]
        kernels = {(k.file, k.entry, k.options) for k in listed}
        found = check.collect([architecture], every=True)
        assert len({check.label(k) for k in listed}) == len(kernels) == len(found)
        assert set(found) == {(check.label(k), architecture) for k in listed}


def test_what_is_left_out_is_compiled_for_the_neighbours(check: Any) -> None:
    found, every = (set(check.collect(check.ARCHITECTURES, e)) for e in (False, True))
    assert found < every
    for name, architecture in every - found:
        if "float16" in name.split():
            assert architecture != check.FLOAT16_ON
        else:
            assert architecture in check.BETWEEN
            assert check.RARE & set(name.split())
    for architecture in set(check.ARCHITECTURES) - set(check.BETWEEN):
        left_out = {name for name, a in every - found if a == architecture}
        assert all("float16" in name.split() for name in left_out)
    assert not {name for name, a in every - found if a == check.FLOAT16_ON}


def test_a_label_is_short_and_the_same_on_every_architecture(check: Any) -> None:
    found = check.collect(check.ARCHITECTURES)
    names = {name for name, _ in found}
    assert max(map(len, names)) <= 80
    assert len(names) <= 1.5 * len(check.collect([90]))
    assert "linear_scan bfloat16 constant x2" in names
    assert ("sum_partials float32", 75) in found


def test_two_kernels_under_one_label_are_an_error(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twins(limits: cuda.Limits) -> list[cuda.Kernel]:
        return [cuda.Kernel("a.cu", "a", {"DTYPE": "float32", "UNKNOWN": n}, "P") for n in range(2)]

    monkeypatch.setattr(cuda, "KERNELS", {"a": twins})
    with pytest.raises(ValueError, match="one label for two kernels"):
        check.collect([90])


@pytest.fixture
def compiler(check: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the compiler: by what a kernel's label contains, else 40 registers."""
    answers: dict[str, Any] = {}

    def answer(nvrtc: None, kernel: cuda.Kernel, architecture: int) -> Any:
        found = [x for text, x in answers.items() if text in check.label(kernel)]
        return found[0] if found else check.Compiled(40, 0, 0)

    monkeypatch.setattr(check, "load_nvrtc", lambda: None)
    monkeypatch.setattr(check, "compile_kernel", answer)
    monkeypatch.setattr(check, "MAY_SPILL", {})
    return answers


ONLY = ["--only", "rg_lru", "--arch", "75", "90"]


def test_a_spill_fails_until_it_is_accepted(
    check: Any, compiler: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(ONLY) == 0
    compiler["rg_lru_backward float64"] = check.Compiled(128, 0, 24)
    assert check.main([*ONLY, "--accept"]) == 1
    text = capsys.readouterr()
    assert "rg_lru_backward float64 sm_90: spills 24 bytes, 0 are accepted" in text.err
    assert "128s" in text.out
    entries = text.out[text.out.index("MAY_SPILL") :].split("\n\n")[0]
    accepted = ast.literal_eval(entries.split(" = ", 1)[1])
    assert accepted == {("rg_lru_backward float64", a): 24 for a in (75, 90)}
    check.MAY_SPILL.update(accepted)
    assert check.main(ONLY) == 0
    compiler["rg_lru_backward float64"] = check.Compiled(128, 0, 28)
    assert check.main(ONLY) == 1


def test_an_error_and_shared_memory_that_does_not_fit_fail(
    check: Any, compiler: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    compiler["rg_lru bfloat16 x2"] = check.Compiled(0, 0, 0, "line 1: no")
    compiler["rg_lru float64"] = check.Compiled(40, 45 * 1024, 0)
    assert check.main(ONLY) == 1
    text = capsys.readouterr()
    assert "rg_lru bfloat16 x2 sm_90: line 1: no" in text.err
    assert "rg_lru float64 sm_75: " in text.err
    assert "rg_lru float64 sm_90: " not in text.err  # there is more of it
    assert "3 failures" in text.out


def test_no_such_kernel_is_an_error(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--only", "nothing of the kind"])
    assert "no kernel has 'nothing of the kind' in its name" in capsys.readouterr().err
