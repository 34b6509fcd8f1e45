"""Settle repeats the passes of the preset until nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from tests.support import declared, ops, parse, run
from xform import passes
from xform.passes.cleanup.settle import Settle
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import EXACT, resolve
from xform.rewrite.passes import Pass, PassContext


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def test_it_repeats_what_ran_before_and_stands() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { t = Transpose(x) v = Transpose(t) y = Relu(v) }"
    without = [one for one in EXACT if one not in ("simplify_layout", "eliminate_no_ops")]
    assert ops(run_pipeline(parse(text), resolve("exact"), verify="off").model) == ["Relu"]
    left = run_pipeline(parse(text), resolve(passes=without), verify="off").model
    assert ops(left) == ["Transpose", "Transpose", "Relu"], "a pass that was left out ran all the same"


def test_it_does_not_repeat_what_was_rolled_back() -> None:
    class Wrong(Append):
        name: ClassVar[str] = "wrong"

        def run(self, model: ir.Model, context: PassContext) -> bool:
            next(iter(model.graph)).op_type = "Neg"
            return True

    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    result = run_pipeline(model, [Wrong(), *resolve(passes=["remove_dead_code", "settle"])])
    assert [one.name for one in result.rolled_back] == ["wrong"] and ops(result.model) == ["Relu"]


LATE: dict[str, tuple[str, Mapping[str, np.ndarray], str]] = {
    "Transposes that cancel stood in a GELU": (
        """g (float[2,4] x) => (float[2,4] y) {
            t = Transpose(x)  v = Transpose(t)  a = Div(v, root)  b = Erf(a)  c = Add(b, one)  d = Mul(x, c)
            y = Mul(d, half) }""",
        {
            "root": np.float32(2**0.5),
            "one": np.float32(1),
            "half": np.float32(0.5),
        },
        "Gelu",
    ),
    "Transposes that cancel stood in a norm": (
        """g (float[2,4] x) => (float[2,4] y) {
            t = Transpose(x)  u = Transpose(t)  q = Mul(u, x)  v = ReduceMean(q, last)  e = Add(v, epsilon)
            r = Sqrt(e)  y = Div(x, r) }""",
        {"last": np.array([-1]), "epsilon": np.float32(1e-5)},
        "RMSNormalization",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_a_second_run_of_the_preset_changes_nothing(name: str) -> None:
    text, constants, left = LATE[name]
    model = parse(declared(text, constants), constants)
    shape = [d if isinstance(d, int) else 2 for d in model.graph.inputs[0].shape or ()]
    feeds = {"x": numbers(*shape, seed=9)}
    once = run_pipeline(model, resolve("exact"), verify="off")
    again = run_pipeline(once.model, resolve("exact"), verify="off")
    assert [remark for remark in again.remarks if remark.verdict == "applied"] == []
    assert ops(again.model) == ops(once.model) == [left]
    np.testing.assert_allclose(run(once.model, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Append(Pass):
    """Renames the first node, `times` times in all."""

    name: ClassVar[str] = "append"
    times: int = 3

    def run(self, model: ir.Model, context: PassContext) -> bool:
        node = next(iter(model.graph))
        node.name = f"{node.name}'"
        context.remark(self.name, "rename", "applied", [node.name])
        context.remark(self.name, "rename", "missed", [node.name], "again")
        return len(node.name) <= self.times


@dataclass(frozen=True)
class Never(Append):
    """Does not come to an end."""

    name: ClassVar[str] = "never"
    times: int = 10**9


def settled(monkeypatch: pytest.MonkeyPatch, kind: type[Pass]) -> tuple[bool, PassContext]:
    monkeypatch.setattr(passes, "PASSES", {kind.name: kind})
    context = PassContext()
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    next(iter(model.graph)).name = ""
    return Settle((kind.name,)).run(model, context), context


def test_it_ends_after_a_round_in_which_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, context = settled(monkeypatch, Append)
    assert changed and context.remarks.count("applied") == 4
    assert context.remarks.count("missed") == 1  # what the last round missed, once


def test_passes_without_end_are_named_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, context = settled(monkeypatch, Never)
    assert changed and context.remarks.count("applied") == Settle().rounds
    [remark] = [remark for remark in context.remarks if remark.pass_name == "settle"]
    assert remark.reason == "the graph still changed after 8 rounds"
