"""A few cases of every class of benchmarks/hostile.py, and that the benchmark sees what it looks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import hostile
from hostile_case import Case, optimize, saved, simple

ALL = {case.name: case for case in hostile.cases()}
# cases that take long by nature (they wait for a limit of time), and those that tune twice
SLOW = (
    "bomb/loop", "bomb/input", "bomb/many", "cache/", "inputs/zip-bomb", "name/", "invalid/", "nested/", "text/",
    "unpacked/", "dtype/",
)  # fmt: skip
ALWAYS = (
    "name/node-escape", "name/error-megabytes", "invalid/graphs/cycle-of-two", "dim/input-power-optimize",
    "text/names-optimize", "pass-option/pipe",
)  # fmt: skip


def chosen() -> list[Case]:
    """One of each class, and what was found last."""
    by_class: dict[str, list[Case]] = {}
    for name, case in ALL.items():
        if not name.startswith(SLOW):
            by_class.setdefault(name.split("/")[0], []).append(case)
    some = [cases[len(cases) // 2] for cases in by_class.values()]
    return list({case.name: case for case in (*some, *(ALL[name] for name in ALWAYS))}.values())


def test_there_are_at_least_1000_cases_of_all_classes() -> None:
    assert len(ALL) >= 1000
    classes = {name.split("/")[0] for name in ALL}
    assert {"external", "hidden", "bomb", "invalid", "name", "overwrite", "option", "inputs", "cache"} <= classes
    assert {"command", "dim", "entry", "field", "nested", "pass-option", "text", "unpacked", "value"} <= classes


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_one_of_every_class(case: Case, tmp_path: Path) -> None:
    hostile.prepare()
    result = hostile.run_case(case, tmp_path)
    assert not result.faults, result


def test_what_the_benchmark_looks_for_is_seen(tmp_path: Path) -> None:
    """A command that does harm has every fault that it deserves."""

    def harmful(folder: Path) -> list[str]:
        path = saved(folder, simple())
        (folder / "outside" / "m.onnx").write_bytes(path.read_bytes())
        return optimize(folder / "outside" / "m.onnx")

    hostile.prepare()
    result = hostile.run_case(Case("harmful", harmful, frozenset({3})), tmp_path)
    assert {"read_outside", "wrong_exit"} <= result.faults.keys()
    assert hostile.obeyed("\x1b") and hostile.obeyed("\u202e") and not hostile.obeyed("a")


@pytest.mark.parametrize("name", ["hidden/function-default-absolute", "hidden/function-default-fifo"])
def test_a_default_attribute_of_a_function(name: str, tmp_path: Path) -> None:
    hostile.prepare()
    result = hostile.run_case(ALL[name], tmp_path)
    assert not result.faults, result
