"""The pass manager: what is wrong is undone and named, what is right stays, the captured model is untouched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xform.errors import UsageError, VerificationError
from xform.passes.integer import ApproximateGelu
from xform.pipeline.manager import run_pipeline
from xform.pipeline.oracle import run_model
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import Pass, PassContext, RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.remarks import Remark
from xform.rewrite.rule import Rule


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("verify", ["off", "final", "each"])
def test_good_passes_apply(planted, verify):
    model = planted.chain()
    before = ops(model)
    result = run_pipeline(model, [planted.AddToSum()], verify=verify)
    assert ops(result.model).count("Sum") == 6
    assert ops(model) == before
    assert result.passes[0].applied == 6
    assert result.passes[0].status == "changed"
    assert result.passes[0].after.nodes == len(before)
    assert result.statistics["add_to_sum", "add_to_sum"].hits == 6
    assert result.verification.state == ("off" if verify == "off" else "ok")
    if verify == "each":
        assert result.passes[0].max_rel_error is not None
        assert result.passes[0].max_rel_error < 1e-6


def test_meta_and_weights_are_kept(planted):
    model = planted.chain()
    result = run_pipeline(model, [planted.AddToSum()], verify="off")
    assert result.model.meta["xform.source_opset"] == 17
    assert result.model.graph.initializers["w0"].const_value is model.graph.initializers["w0"].const_value


@pytest.mark.parametrize("verify", ["final", "each"])
@pytest.mark.parametrize("culprit", ["Rule", "Plain"])
def test_wrong_numbers_are_rolled_back_and_named(planted, verify, culprit):
    model = planted.chain()
    bad = getattr(planted, culprit)()
    result = run_pipeline(model, [bad, planted.AddToSum()], verify=verify)
    assert [r.status for r in result.passes] == ["rolled_back", "changed"]
    assert "output 'y'" in result.passes[0].reason
    assert result.passes[0].max_rel_error > 1e-4
    remark = next(r for r in result.remarks if r.verdict == "rolled_back")
    assert remark.pass_name == bad.name
    assert result.remarks.count("applied") == 6  # of the good pass only
    assert ops(result.model).count("Sum") == 6 and "Mul" not in ops(result.model)
    assert result.verification.ok


def test_rolled_back_rule_pass_names_its_nodes(planted):
    result = run_pipeline(planted.chain(), [planted.Rule()], verify="each")
    remark = next(r for r in result.remarks if r.verdict == "rolled_back")
    assert "block3/add" in remark.nodes
    assert result.passes[0].rolled_back == 6
    assert result.passes[0].applied == 0


@pytest.mark.parametrize("verify", ["off", "final", "each"])
def test_raising_pass_is_rolled_back(planted, verify):
    result = run_pipeline(planted.chain(), [planted.AddToSum(), planted.Raising()], verify=verify)
    assert [r.status for r in result.passes] == ["changed", "rolled_back"]
    assert "RuntimeError: planted" in result.passes[1].reason
    assert "NoSuchOperator" not in ops(result.model)
    assert ops(result.model).count("Sum") == 6
    assert result.statistics["add_to_sum", "add_to_sum"].hits == 6


@pytest.mark.parametrize(("culprit", "text"), [("Unsorted", "not defined before it"), ("Renaming", "output")])
def test_broken_structure_is_rolled_back(planted, culprit, text):
    result = run_pipeline(planted.chain(), [getattr(planted, culprit)(), planted.AddToSum()], verify="off")
    assert [r.status for r in result.passes] == ["rolled_back", "changed"]
    assert text in result.passes[0].reason


@pytest.mark.parametrize("culprit", ["Rule", "Plain", "Raising", "Unsorted"])
def test_strict_raises_and_names_the_pass(planted, culprit):
    bad = getattr(planted, culprit)()
    with pytest.raises(VerificationError, match=bad.name):
        run_pipeline(planted.chain(), [bad, planted.AddToSum()], verify="final", strict=True)


def test_interrupt_passes_through(planted):
    @dataclass(frozen=True)
    class Interrupted(Pass):
        name: ClassVar[str] = "interrupted"

        def run(self, model: ir.Model, context: PassContext) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(planted.chain(), [Interrupted()])


def test_what_a_second_run_of_a_pass_matches_is_not_told_as_missed(planted):
    @dataclass(frozen=True)
    class Twice(Pass):
        """Nearly matches at first, and matches one of two places the second time."""

        name: ClassVar[str] = "twice"

        def run(self, model: ir.Model, context: PassContext) -> bool:
            first = not any(node.op_type == "Sum" for node in model.graph)
            for node in ("a", "b"):
                verdict = "missed" if first or node == "b" else "applied"
                context.remarks.add(Remark(self.name, "rule", verdict, (node,), "told"))
            return False

    found = run_pipeline(planted.chain(), [Twice(), planted.AddToSum(), Twice()], verify="off")
    told = [(r.verdict, r.nodes) for r in found.remarks if r.pass_name == "twice"]
    assert told == [("applied", ("a",)), ("missed", ("b",))]
    assert [r.missed for r in found.passes if r.name == "twice"] == [2, 1]


def test_error_within_the_users_tolerance_is_accepted(planted):
    result = run_pipeline(planted.chain(), [planted.Rule()], tolerance=5.0)
    assert result.passes[0].status == "changed"
    assert result.verification.ok
    assert 1e-4 < result.verification.max_rel_error < 5


def test_model_that_does_not_run_is_unverified_not_ok(planted):
    model = planted.chain()
    model.graph[0].op_type = "NoSuchOperator"
    result = run_pipeline(model, [planted.AddToSum()])
    assert result.verification.state == "unverified"
    assert "NoSuchOperator" in result.verification.reason
    assert result.passes[0].status == "changed"
    with pytest.raises(VerificationError, match="could not be compared"):
        run_pipeline(model, [planted.AddToSum()], strict=True)


def test_callable_oracle(planted):
    model = planted.chain()
    calls = []

    def oracle(inputs):
        calls.append(inputs["x"].shape)
        return run_model(model, [inputs])[0]

    assert run_pipeline(model, [planted.AddToSum()], oracle=oracle).verification.ok
    assert {shape[0] for shape in calls} >= {0, 1, 2, 3}  # sizes of the dynamic batch


def test_capture_error_is_not_blamed_on_a_pass(planted):
    model = planted.chain()
    result = run_pipeline(
        model, [planted.AddToSum(), planted.Plain()], oracle=lambda inputs: [np.zeros_like(inputs["x"])]
    )
    assert result.verification.state == "failed"
    assert "before any pass" in result.verification.reason
    assert [r.status for r in result.passes] == ["changed", "rolled_back"]


def test_pass_that_writes_into_shared_weights_is_an_error(planted):
    @dataclass(frozen=True)
    class Scribbler(Pass):
        name: ClassVar[str] = "scribbler"

        def run(self, model: ir.Model, context: PassContext) -> bool:
            model.graph.initializers["w0"].const_value.numpy()[:] *= 2
            return True

    with pytest.raises(Exception, match="wrote into a weight"):
        run_pipeline(planted.chain(), [Scribbler()])


@pytest.mark.parametrize("verify", ["final", "each"])
def test_pass_that_denies_its_changes_is_found_out(planted, verify):
    @dataclass(frozen=True)
    class Liar(planted.Plain):
        name: ClassVar[str] = "liar"

        def run(self, model: ir.Model, context: PassContext) -> bool:
            super().run(model, context)
            return False

    result = run_pipeline(planted.chain(), [planted.AddToSum(), Liar(), planted.AddToSum()], verify=verify)
    assert [r.status for r in result.passes] == ["changed", "rolled_back", "unchanged"]
    assert result.verification.ok


def test_pass_that_denies_breaking_the_structure_is_found_out(planted):
    @dataclass(frozen=True)
    class Liar(planted.Unsorted):
        name: ClassVar[str] = "liar"

        def run(self, model: ir.Model, context: PassContext) -> bool:
            super().run(model, context)
            return False

    for others in ([planted.AddToSum(), Liar()], [Liar(), planted.AddToSum()]):
        result = run_pipeline(planted.chain(), others, verify="off")
        assert {r.name: r.status for r in result.passes} == {"add_to_sum": "changed", "liar": "rolled_back"}


def test_unknown_mode(planted):
    with pytest.raises(UsageError, match="verify must be"):
        run_pipeline(planted.chain(), [], verify="sometimes")


def test_a_pass_that_raises_is_named_with_file_and_line(planted):
    result = run_pipeline(planted.chain(), [planted.Raising()])
    assert re.search(r"RuntimeError: planted \(conftest\.py:\d+\)", result.passes[0].reason)


def test_a_wrong_option_is_the_users_to_mend_and_no_fault_of_the_pass():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }'
    )
    with pytest.raises(UsageError, match="form must be"):
        run_pipeline(ir.from_proto(proto), [ApproximateGelu(form="nonsense")])


class _AsksForWhatWasNotBound(Rule):
    name = "asks"
    pattern = op("Add", var("x"), var("y"))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return match["nothing of this name"]


@dataclass(frozen=True)
class _Asks(RewritePass):
    """A rule whose mistake shows inside of the matcher."""

    name: ClassVar[str] = "asks"

    def rules(self):
        return (_AsksForWhatWasNotBound(),)


def test_a_mistake_of_a_rule_is_placed_in_the_rule_not_in_what_it_calls(planted):
    result = run_pipeline(planted.chain(), [_Asks()], verify="off")
    place = _AsksForWhatWasNotBound.rewrite.__code__.co_firstlineno + 1
    assert f"KeyError: 'nothing of this name' (test_manager.py:{place})" in result.passes[0].reason
