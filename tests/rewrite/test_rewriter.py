"""The rewriter: firing, provenance, names, order, subgraphs, undo, limits, remarks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from xform.errors import XformError
from xform.graph.check import Interface, check
from xform.graph.values import ORIGIN
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext
from xform.rewrite.pattern import Outputs, const, op, var
from xform.rewrite.rewriter import Rewriter
from xform.rewrite.rule import Failure, Rule


def parse(text: str) -> ir.Model:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    return ir.from_proto(model)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


class DoubleNeg(Rule):
    name = "double_neg"
    concept = "neg"
    pattern = op("Neg", op("Neg", var("x")))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return match["x"]


class AddToSub(Rule):
    name = "add_to_sub"
    pattern = op("Add", var("x"), op("Neg", var("y")))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Sub", match["x"], match["y"])


def apply(model: ir.Model, *rules: Rule, limit: int | None = None) -> tuple[PassContext, Rewriter, bool]:
    context = PassContext(limit=limit)
    rewriter = Rewriter(model, "a_pass", context)
    changed = rewriter.apply(rules)
    assert check(model) == []
    return context, rewriter, changed


CHAIN = "g (float[3] x, float[3] y) => (float[3] out) { a = Neg(x)  b = Neg(a)  c = Neg(y)  out = Add(c, b) }"


def test_rules_fire_to_a_fixpoint_with_remarks_and_statistics() -> None:
    model = parse(CHAIN)
    before = Interface.of(model)
    context, _, changed = apply(model, DoubleNeg(), AddToSub())
    assert changed and [n.op_type for n in model.graph] == ["Sub"]
    assert before.difference(Interface.of(model)) is None
    assert context.remarks.count("applied") == 2 and context.remarks.count("applied", "neg") == 1
    assert {k[1]: s.hits for k, s in context.statistics.items()} == {"double_neg": 1, "add_to_sub": 1}
    x, y = np.array([1, 2, 3], np.float32), np.array([5, 7, 9], np.float32)
    np.testing.assert_array_equal(run(model, x=x, y=y)[0], x - y)
    assert apply(model, DoubleNeg(), AddToSub())[2] is False


def test_new_nodes_know_where_they_come_from() -> None:
    model = parse(CHAIN)
    for node, name in zip(model.graph, ["n1", "n2", "n3", "n4"], strict=True):
        node.name = name
    apply(model, AddToSub())
    sub = next(n for n in model.graph if n.op_type == "Sub")
    assert sub.metadata_props[ORIGIN] == "n4, n2"
    assert sub.metadata_props["xform.pass"] == "a_pass" and sub.metadata_props["xform.rule"] == "add_to_sub"


def test_a_value_that_is_read_outside_the_match_stays() -> None:
    model = parse("g (float[3] x) => (float[3] out, float[3] also) { also = Neg(x)  b = Neg(also)  out = Relu(b) }")
    apply(model, DoubleNeg())
    assert [n.op_type for n in model.graph] == ["Neg", "Relu"]
    x = np.array([1, -2, 3], np.float32)
    out, also = run(model, x=x)
    np.testing.assert_array_equal(also, -x)
    np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_an_output_that_becomes_an_input_keeps_its_name() -> None:
    model = parse("g (float[3] x) => (float[3] out) { a = Neg(x)  out = Neg(a) }")
    apply(model, DoubleNeg())
    assert [n.op_type for n in model.graph] == ["Identity"] and model.graph.outputs[0].name == "out"
    np.testing.assert_array_equal(run(model, x=np.ones(3, np.float32))[0], np.ones(3))


def test_subgraphs_are_searched() -> None:
    model = parse(
        """g (float[3] x, bool c) => (float[3] out) {
             out = If(c) <then_branch = t () => (float[3] p) { a = Neg(x)  b = Neg(a)  p = Relu(b) },
                          else_branch = e () => (float[3] q) { d = Neg(x)  q = Neg(d) }>
           }"""
    )
    context, _, _ = apply(model, DoubleNeg())
    assert context.remarks.count("applied") == 2
    x = np.array([1, -2, 3], np.float32)
    np.testing.assert_array_equal(run(model, x=x, c=np.array(True))[0], np.maximum(x, 0))
    np.testing.assert_array_equal(run(model, x=x, c=np.array(False))[0], x)


class ScaleBoth(Rule):
    """Two products of one value become one product and a Split."""

    name = "pack"
    x = var("x")
    first, second = op("MatMul", x, const(name="w1")), op("MatMul", x, const(name="w2"))
    pattern = Outputs(first, second)

    def rewrite(self, match: Match, build: Builder) -> list[ir.Value]:
        w1, w2 = match["w1"].const_value, match["w2"].const_value
        assert w1 is not None and w2 is not None
        w = build.constant(np.concatenate([w1.numpy(), w2.numpy()], axis=1), "w")
        packed = build.op("MatMul", match["x"], w)
        return list(build.ops("Split", [packed], 2, axis=-1, num_outputs=2))


def test_several_outputs_names_and_order() -> None:
    rng = np.random.default_rng(0)
    model = parse(
        """g (float[2,3] x, float[3,4] w, float[3,4] v) => (float[2,4] first, float[2,4] out)
           { a = MatMul(x, w)  first = Relu(a)  out = MatMul(x, v) }"""
    )
    for name in ("v", "w"):
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(rng.standard_normal((3, 4)).astype(np.float32), name=name)
        model.graph.register_initializer(value)
    x = rng.standard_normal((2, 3)).astype(np.float32)
    expected = run(model, x=x)
    apply(model, ScaleBoth())
    assert sorted(n.op_type for n in model.graph) == ["MatMul", "Relu", "Split"]
    assert len(set(model.graph.initializers)) == len(model.graph.initializers) and "w_1" in model.graph.initializers
    for a, b in zip(run(model, x=x), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_undo_restores_the_graph() -> None:
    model = parse(CHAIN)
    text = [(n.op_type, [v.name for v in n.inputs if v]) for n in model.graph]
    _, rewriter, _ = apply(model, DoubleNeg(), AddToSub())
    rewriter.undo()
    assert check(model) == []
    assert sorted(map(str, ((n.op_type, [v.name for v in n.inputs if v]) for n in model.graph))) == sorted(
        map(str, text)
    )
    assert model.graph.outputs[0].name == "out" and not model.graph.initializers
    x, y = np.ones(3, np.float32), np.full(3, 4, np.float32)
    np.testing.assert_array_equal(run(model, x=x, y=y)[0], x - y)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_limit_bounds_the_applications(limit: int) -> None:
    context, _, _ = apply(parse(CHAIN), DoubleNeg(), AddToSub(), limit=limit)
    assert context.remarks.count("applied") == limit


class Refused(DoubleNeg):
    name = "refused"

    def check(self, match: Match, context: PassContext) -> Failure:
        return Failure("not on a Monday", (match.roots[0].producer(),))  # type: ignore[arg-type]


def test_a_failed_check_is_told_once_with_its_reason() -> None:
    model = parse(CHAIN)
    context, _, changed = apply(model, Refused())
    assert not changed
    assert [(r.verdict, r.reason, r.concept) for r in context.remarks] == [("missed", "not on a Monday", "neg")]


class NearMiss(Rule):
    name = "near"
    near_miss = 2
    pattern = op("Relu", op("Neg", op("Neg", op("Abs", var("x")))))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return match["x"]


def test_most_of_a_pattern_is_a_missed_remark_that_names_what_was_wanted() -> None:
    model = parse("g (float[3] x) => (float[3] out) { s = Sqrt(x)  a = Neg(s)  b = Neg(a)  out = Relu(b) }")
    context, _, _ = apply(model, NearMiss())
    (remark,) = context.remarks
    assert remark.verdict == "missed" and "wanted Abs, found Sqrt" in remark.reason


class Restless(Rule):
    name = "restless"
    pattern = op("Neg", var("x"))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Neg", match["x"])


def test_rules_without_an_end_are_an_error() -> None:
    with pytest.raises(XformError, match="restless"):
        apply(parse(CHAIN), Restless())


class AbsReadThroughFloor(Rule):
    """Removes an Abs whose result goes through one Floor into one Relu: it looks at readers of readers."""

    name = "abs_read_through_floor"
    pattern = op("Abs", var("x"))

    def ahead(self) -> int:
        return 3

    def check(self, match: Match, context: PassContext) -> Failure | None:
        value = match.nodes[self.pattern].outputs[0]
        for wanted in ("Floor", "Relu"):
            readers = [use.node for use in value.uses()]
            if [reader.op_type for reader in readers] != [wanted]:
                return Failure(f"not read by one {wanted}", tuple(readers))
            value = readers[0].outputs[0]
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return match["x"]


class MergeRelus(Rule):
    """relu(v) + relu(v) as relu(v) alone: wrong numbers, but two readers become one."""

    name = "merge_relus"
    pattern = op("Add", op("Relu", var("v")), op("Relu", var("v")))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Relu", match["v"])


def test_rules_that_look_ahead_are_tried_again_after_a_change_among_their_readers() -> None:
    text = "g (float[3] x) => (float[3] y) { a = Abs(x) f = Floor(a) r = Relu(f) s = Relu(f) y = Add(r, s) }"
    model = parse(text)
    apply(model, AbsReadThroughFloor(), MergeRelus())
    assert [node.op_type for node in model.graph] == ["Floor", "Relu"]
