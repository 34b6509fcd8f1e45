"""A pass with a planted error, seen from the command line: undone and named, an error when strict, found by bisect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest
from cli_support import Run

from xform.passes import PASSES
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.rule import Rule

CLI = Callable[..., Run]


class Hard(Rule):
    """sigmoid(x) = hardsigmoid(x): nearly."""

    name = "hard"
    concept = "silu"
    pattern = op("Sigmoid", var("x"))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("HardSigmoid", match["x"])


@dataclass(frozen=True)
class Planted(RewritePass):
    """Wrong on purpose."""

    name: ClassVar[str] = "planted"

    def rules(self) -> Sequence[Rule]:
        return (Hard(),)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "planted", Planted)


PASS_LIST = ("--passes", "infer_shapes,planted,raise_linear")


@pytest.mark.parametrize("mode", ["final", "each"])
def test_it_is_undone_and_named_and_the_result_is_right(xform: CLI, mlp: Path, mode: str) -> None:
    run = xform("optimize", mlp, "-o", "out.onnx", *PASS_LIST, "--verify", mode, "--json")
    assert run.code == 0, run.err
    report = run.json["report"]
    assert [p["name"] for p in report["passes"] if p["status"] == "rolled_back"] == ["planted"]
    undone = [r for r in report["remarks"] if r["verdict"] == "rolled_back"]
    assert len(undone) == 1 and "/act/Sigmoid" in undone[0]["nodes"]
    assert "planted" in run.err and "rolled back" in run.err
    assert xform("verify", mlp, "out.onnx").code == 0


def test_strict_ends_with_5_and_writes_nothing(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    run = xform("optimize", mlp, "-o", "out.onnx", *PASS_LIST, "--strict")
    assert run.code == 5
    assert "planted" in run.err and "/act/Sigmoid" in run.err
    assert not (tmp_path / "out.onnx").exists()


def test_without_verification_it_stands_and_verify_tells(xform: CLI, mlp: Path) -> None:
    assert xform("optimize", mlp, "-o", "out.onnx", *PASS_LIST, "--verify", "off").code == 0
    assert xform("verify", mlp, "out.onnx").code == 5


def test_bisect_names_pass_rule_and_node(xform: CLI, mlp: Path) -> None:
    run = xform("bisect", mlp, *PASS_LIST, "--json")
    assert run.code == 5
    found = run.json
    assert (found["bad_pass"], found["index"], found["rule"], found["application"]) == ("planted", 1, "hard", 1)
    assert found["nodes"] == ["/act/Sigmoid"]
    assert "pass planted is wrong" in run.err
