"""The text dump: one line a node, stable, no large data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support import floats, parse

from xform.graph.dump import dump, short_type
from xform.graph.values import ORIGIN

TEXT = """g (float[batch,4] x, float[4,64] w, float[1] s) => (float[batch,64] y)
    { h = MatMul(x, w) y = LeakyRelu<alpha=0.125>(h) z = Mul(y, s) }"""


def example() -> ir.Model:
    model = parse(TEXT, {"w": floats(4, 64), "s": np.array([0.5], np.float32)})
    model.graph[0].metadata_props[ORIGIN] = "encoder/dense"
    return model


def test_one_line_a_node() -> None:
    lines = dump(example()).splitlines()
    assert lines[0] == "graph g(%x: f32[batch,4]) -> (%y: f32[batch,64])"
    assert lines[1] == "  opset 23, com.microsoft 1, 3 nodes, 2 initializers (0.0 MB)"
    assert "  %h: f32[batch,64] = MatMul(%x, %w)  # encoder/dense" in lines
    assert "  %y: f32[batch,64] = LeakyRelu(%h; alpha=0.125)" in lines
    assert "  %z: f32[batch,64] = Mul(%y, [0.5])" in lines
    assert "  %w: f32[4,64] = weight (256 elements, 1024 bytes)" in lines
    assert "weight" not in dump(example(), weights=False)


def test_the_same_graph_gives_the_same_text() -> None:
    assert dump(ir.from_proto(ir.to_proto(example()))).splitlines()[2:] == dump(example()).splitlines()[2:]


def test_subgraphs_are_indented() -> None:
    model = parse("""g (float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Neg(x) }, else_branch = e () => (float[2] b)
            { b = Exp(x) }> }""")
    lines = dump(model).splitlines()
    assert "  %y: f32[2] = If(%c)" in lines
    assert "    then_branch:" in lines
    assert "      graph t() -> (%a: f32[2])" in lines
    assert "        %a: f32[2] = Neg(%x)" in lines


def test_omitted_inputs_and_unknown_types() -> None:
    model = parse("g (float[2] x, float m) => (y) { y = Clip(x, , m) z = com.microsoft.Mystery(x) }")
    text = dump(model)
    assert "= Clip(%x, _, %m)" in text
    assert "%z: ?[*] = com.microsoft.Mystery(%x)" in text


def test_short_types() -> None:
    kinds = {
        "FLOAT16": "f16",
        "BFLOAT16": "bf16",
        "INT8": "i8",
        "UINT16": "u16",
        "BOOL": "bool",
        "FLOAT8E4M3FN": "f8e4m3fn",
    }
    for name, short in kinds.items():
        assert short_type(ir.val("x", ir.DataType[name], [1, None])) == f"{short}[1,?]"


def test_long_attributes_are_cut() -> None:
    model = parse("g (float[2] x) => (y) { c = Constant<value_ints=[" + ",".join(["7"] * 40) + "]>() y = Relu(x) }")
    assert max(len(line) for line in dump(model).splitlines()) < 120
