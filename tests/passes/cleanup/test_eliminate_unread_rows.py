"""Rows that nobody reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import applied, apply, declared, floats, missed, ops, parse, rewritten

import xform
from xform.graph.values import is_op, shape_of
from xform.passes.cleanup import EliminateUnreadRows
from xform.passes.cleanup.row_selection import Selection, through_view
from xform.rewrite.passes import PassContext

PASS = EliminateUnreadRows()
W = {"w": floats(8, 12), "b": floats(12), "g": floats(12), "h": floats(12)}
TOKENS = {"x": floats(2, 7, 8), "y": floats(2, 7, 12), "row": floats(1, 1, 12), "at": floats(1, 7, 12)}
CHAIN = """g (float[2,7,8] x, float[2,7,12] y) => (float[2,12] z) {
    m = MatMul(x, w) a = Add(m, b) l = LayerNormalization<axis=-1>(a, g, h) e = Gelu(l)
    s = Add(e, at) t = Mul(row, s) r = Sub(y, t) z = Gather<axis=1>(r, first) }"""


def test_a_selection_moves_in_front_of_what_is_computed_row_by_row() -> None:
    constants = {**W, "row": TOKENS["row"], "at": TOKENS["at"], "first": np.array(-5)}
    feeds = {"x": TOKENS["x"], "y": TOKENS["y"]}
    model, log = rewritten(declared(CHAIN, constants), constants, feeds, PASS)
    assert applied(log, "select_first") == 7  # the operators of the chain
    computed = ["Gather", "Gather", "MatMul", "Add", "LayerNormalization", "Gelu", "Add", "Mul", "Sub", "Squeeze"]
    assert sorted(ops(model)) == sorted(computed)
    assert all(shape_of(v)[1] == 1 for n in model.graph if n.op_type not in ("Squeeze",) for v in n.outputs)
    assert any("LayerNormalization" in r.reason and "1 of 7 rows" in r.reason for r in log)


@pytest.mark.parametrize(
    ("spelling", "result"),
    [
        ("z = Gather<axis=1>(m, i)", "2,2,12"),
        ("z = Slice(m, one, three, one)", "2,2,12"),
        ("z = Slice(m, end, far, one)", "2,1,12"),
        ("z = Slice(m, one, far, one, three)", "2,2,12"),
    ],
)
def test_every_spelling_of_a_few_indices(spelling: str, result: str) -> None:
    text = f"g (float[2,7,8] x) => (float[{result}] z) {{ m = MatMul(x, w) {spelling} }}"
    known = {"i": [6, 0], "one": [1], "three": [3], "end": [-1], "far": [np.iinfo(np.int64).max]}
    constants = {"w": W["w"]} | {name: np.array(value) for name, value in known.items() if name in spelling}
    model, log = rewritten(declared(text, constants), constants, {"x": TOKENS["x"]}, PASS)
    assert applied(log, "select_first") == 1 and ops(model)[-1] == "MatMul"


@pytest.mark.parametrize(
    ("body", "axis", "result"),
    [
        ("m = Transpose<perm=[1,0,2]>(p)", 0, "[2,8]"),
        ("m = Reshape(p, flat)", 1, "[2,2,4]"),  # [2, 7, 2, 4]
        ("r = Reshape(p, rows) m = Reshape(r, back)", 1, "[2,8]"),  # [14, 8]: a stride of its rows
        ("m = Unsqueeze(p, two)", 1, "[2,1,8]"),
        ("u = Unsqueeze(p, two) m = Squeeze(u, two)", 1, "[2,8]"),
        ("m = Softmax<axis=-1>(p)", 1, "[2,8]"),
        ("m = Softmax<axis=-1>(p)", 0, "[7,8]"),
        ("m = Clip(p, low)", 1, "[2,8]"),
        ("q = Sigmoid(p) m = Sum(q, p)", 1, "[2,8]"),
        ("q = Sigmoid(p) c = Greater(q, p) n = Neg(p) m = Where(c, n, one_row)", 1, "[2,8]"),
        ("m = LayerNormalization<axis=-1>(p, each, one_row)", 1, "[2,8]"),  # a scale for each row
        ("m = RMSNormalization<axis=-1>(p, each)", 1, "[2,8]"),
        ("t = Transpose<perm=[0,2,1]>(x) m = MatMul(p, t)", 0, "[7,7]"),
    ],
)
def test_operators_that_keep_the_axis_apart(body: str, axis: int, result: str) -> None:
    text = f"g (float[2,7,8] x) => (float{result} z) {{ p = MatMul(x, w) {body} z = Gather<axis={axis}>(m, first) }}"
    known = {
        "flat": np.array([0, 7, 2, -1]), "rows": np.array([-1, 8]), "back": np.array([2, 7, 8]), "two": np.array([2]),
        "low": np.float32(0.1), "one_row": floats(1, 1, 8), "each": floats(7, 8),
    }  # fmt: skip
    constants = {name: value for name, value in known.items() if name in body}
    constants |= {"first": np.array(3 if axis else 0), "w": floats(8, 8)}
    model, log = rewritten(declared(text, constants), constants, {"x": TOKENS["x"]}, PASS)
    assert applied(log, "select_first") >= 2
    selections = [node for node in model.graph if is_op(node, "Gather", "Slice")]
    assert selections and all(node.inputs[0] in model.graph.inputs for node in selections)


def test_elementwise_operators_alone_stay_with_what_is_in_front_of_them() -> None:
    text = """g (float[1,2,7,8] x) => (float[1,2,1,8] z) {
        c = Conv(x, w) r = Relu(c) s = Reshape(r, shape) z = Gather<axis=2>(s, first) }"""
    constants = {"w": floats(2, 2, 1, 1), "shape": np.array([1, 2, 7, 8]), "first": np.array([0])}
    model = parse(declared(text, constants), constants)
    assert len(apply(model, PASS)) == 0


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("m = Softmax<axis=1>(x)", 1),
        ("m = LayerNormalization<axis=1>(x, wide)", 1),
        ("m = Reshape(x, merged)", 0),  # [14, 8]
        ("m = MatMul(x, square)", 2),
        ("m = CumSum(x, one)", 1),
        ("p = MatMul(x, square) m = Transpose<perm=[1,0,2]>(p) other = Relu(m)", 0),  # somebody reads the other rows
    ],
)
def test_what_needs_the_whole_axis_stops_it(body: str, axis: int) -> None:
    outputs = "float[] z" + (", float[7,2,8] other" if "other" in body else "")
    text = f"g (float[2,7,8] x) => ({outputs}) {{ {body} z = Gather<axis={axis}>(m, first) }}"
    text = text.replace("float[] z", f"float{'[8]' if 'merged' in body else '[2,8]' if axis < 2 else '[2,7]'} z")
    known = {"wide": floats(7, 8), "merged": np.array([-1, 8]), "square": floats(8, 8), "one": np.array(1)}
    constants = {name: value for name, value in known.items() if name in body} | {"first": np.array(0)}
    model = parse(declared(text, constants), constants)
    before = ops(model)
    assert len(apply(model, PASS)) == 0 and ops(model) == before


def test_readers_of_other_rows_and_outputs_stop_it() -> None:
    text = """g (float[2,7,8] x) => (float[2,8] y, float[2,8] z) {
        m = MatMul(x, w) y = Gather<axis=1>(m, i) z = Gather<axis=1>(m, j) }"""
    for i, j, fires in ((0, 1, False), (3, 3, True), (-1, 6, True)):
        constants = {"w": floats(8, 8), "i": np.array(i), "j": np.array(j)}
        model, log = rewritten(declared(text, constants), constants, {"x": TOKENS["x"]}, PASS)
        assert applied(log, "select_first") == fires and ops(model).count("Gather") == (1 if fires else 2)
    constants = {"w": floats(8, 8), "i": np.array(0)}
    text = "g (float[2,7,8] x) => (float[2,7,8] m, float[2,8] z) { m = MatMul(x, w) z = Gather<axis=1>(m, i) }"
    model = parse(declared(text, constants), constants)
    assert len(apply(model, PASS)) == 0


@pytest.mark.parametrize("tail", ["z = Gather<axis=1>(m, j)", "t = Gather<axis=1>(m, j) z = Neg(t)"])
def test_readers_that_come_to_be_one_value_keep_the_names_of_outputs(tail: str) -> None:
    text = f"""g (float[2,7,8] x) => (float[2,1,8] y, float[2,1,8] z) {{
        m = MatMul(x, w) y = Gather<axis=1>(m, i) {tail} }}"""
    constants = {"w": floats(8, 8), "i": np.array([-1]), "j": np.array([6])}
    model, log = rewritten(declared(text, constants), constants, {"x": TOKENS["x"]}, PASS)
    assert applied(log, "select_first") == 1 and [v.name for v in model.graph.outputs] == ["y", "z"]


def test_a_slice_of_one_row_and_a_gather_of_it_are_one_selection() -> None:
    text = """g (float[2,7,8] x) => (float[2,1,8] z) { p = MatMul(x, w) r = Reshape(p, rows) h = MatMul(r, w)
        b = Reshape(h, back) s = Add(p, b) z = Slice(s, zero, one, one) }"""
    constants = {"w": floats(8, 8), "rows": np.array([-1, 8]), "back": np.array([2, 7, 8])}
    constants |= {"zero": np.array([0]), "one": np.array([1])}
    model, log = rewritten(declared(text, constants), constants, {"x": TOKENS["x"]}, PASS)
    assert applied(log, "select_first") == 5 and ops(model)[0] == "Gather" and ops(model).count("Gather") == 1


def test_indices_that_the_caller_can_give_are_no_constants() -> None:
    text = "g (float[2,7,8] x, int64 i, float[8,8] w) => (float[2,8] z) { m = MatMul(x, w) z = Gather<axis=1>(m, i) }"
    model = parse(text, {"w": floats(8, 8)})
    index = next(value for value in model.graph.inputs if value.name == "i")
    index.const_value = ir.tensor(np.array(0), name="i")
    model.graph.register_initializer(index)
    assert not PASS.run(model, PassContext())


def test_most_rows_are_not_moved_for() -> None:
    text = "g (float[2,7,8] x) => (float[2,{n},8] z) {{ m = MatMul(x, w) z = Slice(m, start, far, one) }}"
    for start, fires in ((3, False), (4, True)):
        constants = {"start": np.array([start]), "far": np.array([2**31 - 1]), "one": np.array([1]), "w": floats(8, 8)}
        model = parse(declared(text.format(n=7 - start), constants), constants)
        assert applied(apply(model, PASS), "select_first") == fires


def test_of_an_axis_of_unknown_size_one_row_is_moved_for() -> None:
    text = "g (float[b,s,8] x) => (float[b,t,8] z) { m = MatMul(x, w) z = Slice(m, start, end, one) }"
    for start, end, fires in ((0, 1, True), (-1, 2**63 - 1, True), (0, 2, False), (1, 2**63 - 1, False)):
        constants = {"w": floats(8, 8), "start": np.array([start]), "end": np.array([end]), "one": np.array([1])}
        _, log = rewritten(declared(text, constants), constants, {"x": TOKENS["x"]}, PASS)
        assert applied(log, "select_first") == fires


ATTENTION = """g (float[2,3,s,4] q, float[2,3,s,4] k, float[2,3,s,4] v{mask}) => (float[2,3,4] z) {{
    a = Attention{attributes}(q, k, v{given}) z = Gather<axis=2>(a, {which}) }}"""


def attention(which: int, mask: str = "", attributes: str = "", sizes: str = "6") -> tuple[str, dict[str, np.ndarray]]:
    declaration = f", float[{mask}] mask" if mask else ""
    text = ATTENTION.format(mask=declaration, attributes=attributes, given=", mask" if mask else "", which="i")
    constants = {"i": np.array(which)}
    return declared(text.replace("s,4", f"{sizes},4").replace("[s", f"[{sizes}"), constants), constants


@pytest.mark.parametrize("mask", ["", "6,6", "2,1,6,6", "2,3,6,6"])
@pytest.mark.parametrize("sizes", ["6", "s"])
def test_one_query_attends(mask: str, sizes: str) -> None:
    text, constants = attention(2, mask.replace("6", sizes), sizes=sizes)
    feeds = {name: floats(2, 3, 6, 4) for name in "qkv"}
    feeds |= {"mask": floats(*map(int, mask.split(",")))} if mask else {}
    model, log = rewritten(text, constants, feeds, PASS)
    assert applied(log, "select_first") == 1
    (node,) = (node for node in model.graph if is_op(node, "Attention"))
    assert shape_of(node.inputs[0])[2] == 1 and node.inputs[1] in model.graph.inputs


def test_the_last_query_needs_no_causal_rule_and_others_stop_it() -> None:
    feeds = {name: floats(2, 3, 6, 4) for name in "qkv"}
    for which, sizes, fires in ((5, "6", True), (-1, "s", True), (0, "6", False), (-2, "s", False)):
        text, constants = attention(which, attributes="<is_causal=1>", sizes=sizes)
        model, log = rewritten(text, constants, feeds, PASS)
        assert applied(log, "select_first") == fires
        assert any("only the last query" in reason for reason in missed(log)) != fires
        (node,) = (node for node in model.graph if is_op(node, "Attention"))
        assert ("is_causal" in node.attributes) != fires


def test_heads_and_batches_of_an_attention_are_left() -> None:
    text, constants = attention(0)
    model = parse(text.replace("axis=2", "axis=1").replace("float[2,3,4] z", "float[2,6,4] z"), constants)
    assert len(apply(model, PASS)) == 0


class Classifier(torch.nn.Module):
    """Two pre-norm blocks; the first token is classified."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(32, 5)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, 5] of tokens [B, S, 32] and their mask [B, S]."""
        result: torch.Tensor = self.head(self.layers(x, src_key_padding_mask=attention_mask == 0)[:, 0])
        return result


def test_the_last_block_of_a_classifier_runs_on_one_token() -> None:
    model = Classifier().eval()
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    x = torch.randn(3, 9, 32)
    fast = xform.optimize(model, inputs={"x": x, "attention_mask": mask})
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)
    assert "Attention" in fast.explain("rows") and fast.report.concepts["attention"] == 2
    rows = [math.prod(shape_of(node.outputs[0])[:-1]) for node in fast.graph.graph if is_op(node, "MatMul")]
    assert rows == [27] * 5 + [3] * 4  # then projection, feed-forward network and head


@pytest.mark.parametrize(
    ("before", "after", "selection", "found"),
    [
        ((27, 4), (9, 3, 4), (0, (2,), False), (0, (6, 9, 1), True)),  # a block
        ((27, 4), (9, 3, 4), (1, (2,), False), (0, (2, 27, 3), True)),  # a stride
        ((9, 3, 4), (27, 4), (0, (6, 9, 1), True), (0, (2,), False)),
        ((9, 3, 4), (27, 4), (0, (2, 27, 3), True), (1, (2,), False)),
        ((24, 4), (2, 3, 4, 4), (1, (2,), False), None),  # neither
        ((9, 3, 4), (27, 4), (0, (5, 8, 1), True), None),  # across blocks
        ((9, 3, 4), (27, 4), (0, (5, 6), False), None),
        ((1, 7, 8), (7, 8), (0, (3,), False), (1, (3,), False)),
        (("b", 7, 8), ("b", 7, 2, 4), (1, (3, 5), False), (1, (3, 5), False)),
        (("b", 7, 8), ("n", 8), (0, (3,), False), None),
    ],
)
def test_what_a_view_makes_of_a_selection(before: Any, after: Any, selection: Any, found: Any) -> None:
    moved = through_view(before, after, Selection(*selection))
    assert moved == (None if found is None else Selection(*found))
    if moved is not None and all(isinstance(dim, int) for dim in before):
        data = np.arange(math.prod(before)).reshape(before)
        kept = Selection(*selection).take(data.reshape(after), selection[0])
        assert moved.take(data, moved.axis).reshape(-1).tolist() == kept.reshape(-1).tolist()
