"""Moves as Gathers on ONNX Runtime: what becomes one, what passes row-wise operators, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import declared, floats, parse, run

from xform.backends.base import LowerOptions
from xform.backends.onnxruntime.index_map import chain, index_map, is_move, rows_of
from xform.backends.onnxruntime.lower import lower
from xform.graph.shapes import infer_shapes

MOVES = ("Reshape", "Transpose", "Slice", "Split", "Concat", "Squeeze")


def lowered(text: str, used: dict[str, Any], atol: float = 0.0, **options: Any) -> tuple[list[str], dict[str, int]]:
    """Operators after lowering, and the counts; outputs are compared with those of the graph as it is."""
    used = {name: np.asarray(array) for name, array in used.items()}
    model = parse(declared(text, used), used)
    feeds = {v.name: floats(*v.shape.numpy()) for v in model.graph.inputs}
    result, forms = lower(model, LowerOptions(**options))
    for before, after in zip(run(model, feeds), run(result, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=atol)
    check_shapes(result)
    return [node.op_type for node in result.graph], forms


def check_shapes(model: ir.Model) -> None:
    """What is declared is what the operators give."""
    declared_shapes = {v.name: v.shape.numpy() for node in model.graph for v in node.outputs if v.shape is not None}
    again = ir.from_proto(ir.to_proto(model))
    for node in again.graph:
        for value in node.outputs:
            value.shape = None
    infer_shapes(again)
    for node in again.graph:
        for value in node.outputs:
            if value.shape is not None and value.name in declared_shapes and value.shape.is_static():
                assert value.shape.numpy() == declared_shapes[value.name], value.name


ROLL = """
    a = Slice(x, c3, c8, c1) b = Slice(x, c0, c3, c1) r1 = Concat<axis=1>(a, b)
    c = Slice(r1, c3, c8, c2) d = Slice(r1, c0, c3, c2) r = Concat<axis=2>(c, d)"""
CUT = "v = Reshape({}, cut) t = Transpose<perm=[0,1,3,2,4,5]>(v) w = Reshape(t, windows)"
BACK = "bv = Reshape({}, back) bt = Transpose<perm=[0,1,3,2,4,5]>(bv) {} = Reshape(bt, image)"
UNROLL = """
    e = Slice(u, c5, c8, c1) f = Slice(u, c0, c5, c1) u1 = Concat<axis=1>(e, f)
    g = Slice(u1, c5, c8, c2) h = Slice(u1, c0, c5, c2) y = Concat<axis=2>(g, h)"""


def sizes(batch: int = 2, width: int = 64, heads: int = 2) -> dict[str, Any]:
    """Constants of windows of 4 x 4 in images of 8 x 8."""
    numbers = {f"c{n}": [n] for n in (0, 1, 2, 3, 5, 8)}
    head = width // heads
    return numbers | {
        "cut": [batch, 2, 4, 2, 4, width], "windows": [4 * batch, 16, width], "back": [batch, 2, 2, 4, 4, width],
        "image": [batch, 8, 8, width], "qkv": [4 * batch, 16, 3, heads, head], "s0": [0],
    }  # fmt: skip


def used_in(text: str, constants: dict[str, Any]) -> dict[str, Any]:
    words = set(text.replace(",", " ").replace("(", " ").replace(")", " ").split())
    return {name: array for name, array in constants.items() if name in words}


def image(body: str, more: dict[str, Any] | None = None, batch: int = 2, out: str = "2,8,8,64", **options: Any):
    text = f"g (float[{batch},8,8,64] x) => (float[{out}] y) {{ {body} }}"
    return lowered(text, used_in(body, sizes(batch) | (more or {})), **options)


def test_rolling_and_cutting_is_one_gather() -> None:
    ops, forms = image(f"{ROLL} {CUT.format('r')} y = Relu(w)", out="8,16,64")
    # the move passes the activation, as it does all row-wise operators, but nothing is gained by that here
    assert sorted(ops) == ["Gather", "Relu", "Reshape", "Reshape"]
    assert forms == {"moves: Gather": 1}


def test_there_and_back_is_nothing() -> None:
    ops, forms = image(f"{ROLL} {CUT.format('r')} m = Gelu(w) {BACK.format('m', 'u')} {UNROLL}")
    assert "Gather" not in ops and "Concat" not in ops and not forms
    assert ops.count("Gelu") == 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("integer", [True, False])
def test_attention_in_windows_moves_only_heads(batch: int, shifted: bool, integer: bool) -> None:
    """Swin's block: four Gathers, of queries, keys, values and the result, around two products."""
    body = ROLL if shifted else ""
    body += CUT.format("r" if shifted else "x") + product("w", "p", "wp", "bp", integer)
    body += """
        h5 = Reshape(p, qkv) ht = Transpose<perm=[2,0,3,1,4]>(h5)
        q1, k1, v1 = Split<axis=0, num_outputs=3>(ht)
        q = Squeeze(q1, s0) k = Squeeze(k1, s0) vv = Squeeze(v1, s0)
        kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) sm = Softmax(s) o = MatMul(sm, vv)
        ot = Transpose<perm=[0,2,1,3]>(o) om = Reshape(ot, windows)"""
    body += product("om", "n", "wn", "bn", integer) + BACK.format("n", "u" if shifted else "y")
    body += UNROLL if shifted else ""
    weights = {name: (floats(64, size) / 8) for name, size in (("wp", 192), ("wn", 64))}
    if integer:
        weights = {name: np.rint(array * 60).astype(np.int8) for name, array in weights.items()}
    weights |= {"bp": floats(192), "bn": floats(64), "scale_wp": floats(192), "scale_wn": floats(64)}
    ops, forms = image(body, weights, batch, f"{batch},8,8,64", atol=1e-4)
    assert forms["moves: Gather"] == ops.count("Gather") == 4
    assert ops.count("Transpose") == 1 and not {"Split", "Slice", "Concat", "Squeeze"} & set(ops)


def product(x: str, y: str, weight: str, bias: str, integer: bool) -> str:
    if not integer:
        return f" {y}m = MatMul({x}, {weight}) {y} = Add({y}m, {bias})"
    return f"""
        {y}q, {y}s, {y}z = DynamicQuantizeLinear({x}) {y}i = MatMulInteger({y}q, {weight}, {y}z)
        {y}f = Mul({y}s, scale_{weight}) {y}c = Cast<to=1>({y}i) {y}m = Mul({y}c, {y}f) {y} = Add({y}m, {bias})"""


def test_separate_projections_share_what_they_read() -> None:
    """As transformers' Swin has them."""
    body = ROLL + CUT.format("r")
    for name in "qkv":
        body += product("w", f"p{name}", f"w{name}", f"b{name}", False)
        body += f" r{name} = Reshape(p{name}, heads) h{name} = Transpose<perm=[0,2,1,3]>(r{name})"
    body += " kt = Transpose<perm=[0,1,3,2]>(hk) s = MatMul(hq, kt) y = MatMul(s, hv)"
    weights = {f"w{n}": floats(64, 64) / 8 for n in "qkv"} | {f"b{n}": floats(64) for n in "qkv"}
    ops, _ = image(body, weights | {"heads": [8, 16, 2, 32]}, out="8,2,16,32", atol=1e-3)
    assert ops.count("Gather") == 3 and ops.count("Transpose") == 1 and "Concat" not in ops


def test_norms_and_gates_are_passed() -> None:
    body = f"""{ROLL} {CUT.format("r")} n = LayerNormalization<axis=-1>(w, gain, shift)
        s = Sigmoid(n) m = Mul(n, s) k = Mul(m, gain) {BACK.format("k", "u")} {UNROLL}"""
    ops, _ = image(body, {"gain": floats(64), "shift": floats(64)}, atol=1e-6)
    assert not {"Gather", "Concat", "Transpose"} & set(ops)


@pytest.mark.parametrize(
    "between",
    [
        "m = Softmax<axis=1>(w)",  # over the rows
        "m = Add(w, rows)",  # a number for each row
        "m = LayerNormalization<axis=1>(w, g2)",
        "m1 = MatMul(w, stack) m = Relu(m1)",  # a product for each window
        "a1, a2, a3 = DynamicQuantizeLinear(w) a4 = DequantizeLinear(a1, a2, a3) m = Relu(a4)",
    ],
)
def test_what_is_not_row_wise_is_not_passed(between: str) -> None:
    more = {"rows": floats(16, 64), "g2": floats(16, 64), "stack": floats(8, 64, 64)}
    body = f"{ROLL} {CUT.format('r')} {between} {BACK.format('m', 'u')} {UNROLL}"
    ops, forms = image(body, more, atol=1e-4)
    assert forms["moves: Gather"] == ops.count("Gather") == 2


@pytest.mark.parametrize("reader", ["w", "m", "z"])
def test_what_others_read_is_not_passed(reader: str) -> None:
    """The windows themselves, what is computed of them in the middle, and a scale of dynamic quantization."""
    body = f"""{ROLL} {CUT.format("r")} m = Gelu(w) q, z, zp = DynamicQuantizeLinear(m) fl = Cast<to=1>(q)
        {BACK.format("fl", "u")} {UNROLL} other = ReduceSum<keepdims=0>({reader})"""
    text = f"g (float[2,8,8,64] x) => (float[2,8,8,64] y, float other) {{ {body} }}"
    ops, forms = lowered(text, used_in(body, sizes()), atol=1e-2)
    assert forms["moves: Gather"] == 2 and "Concat" not in ops


def test_results_of_the_graph_keep_their_names() -> None:
    body = f"{ROLL} {CUT.format('r')}"
    text = f"g (float[2,8,8,64] x) => (float[2,8,8,64] r, float[8,16,64] w) {{ {body} }}"
    ops, forms = lowered(text, used_in(body, sizes()))
    assert forms == {"moves: Gather": 2} and "Concat" not in ops


@pytest.mark.parametrize(
    "text",
    [
        # one copy for one copy
        """g (float[2,3,4,64] x) => (float[2,4,3,64] y) { t = Transpose<perm=[0,2,1,3]>(x) y = Relu(t) }""",
        # rows of 16 bytes
        """g (float[2,3,4,4] x) => (float[1,4,3,4] y) {
            t = Transpose<perm=[0,2,1,3]>(x) s = Slice(t, c0, c1, c0) y = Relu(s) }""",
        # columns
        """g (float[2,64,64] x) => (float[1,64,64] y) {
            t = Transpose<perm=[0,2,1]>(x) s = Slice(t, c0, c1, c0) y = Relu(s) }""",
        # two sources
        """g (float[2,8,64] x, float[2,8,64] z) => (float[16,2,64] y) {
            c = Concat<axis=1>(x, z) t = Transpose<perm=[1,0,2]>(c) y = Relu(t) }""",
        # every second element
        """g (float[2,8,64] x) => (float[8,2,32] y) {
            s = Slice(x, c0, c8x, c2, c2) t = Transpose<perm=[1,0,2]>(s) y = Relu(t) }""",
    ],
)  # fmt: skip
def test_left_alone(text: str) -> None:
    used = used_in(text, {"c0": [0], "c1": [1], "c2": [2], "c8x": [64]})
    ops, forms = lowered(text, used)
    assert "Gather" not in ops and not forms


def test_unknown_sizes_are_left_alone() -> None:
    text = f"g (float[N,8,8,64] x) => (float[N,8,8,64] r) {{ {ROLL} }}"
    model = parse(declared(text, used_in(ROLL, sizes())), {k: np.asarray(v) for k, v in used_in(ROLL, sizes()).items()})
    result, forms = lower(model, LowerOptions())
    assert "Gather" not in [node.op_type for node in result.graph] and not forms


def test_portable_models_keep_their_moves() -> None:
    ops, forms = image(f"{ROLL} {CUT.format('r')} y = Relu(w)", out="8,16,64", portable=True)
    assert "Concat" in ops and "Gather" not in ops and not forms


def test_a_result_in_narrow_rows_keeps_its_moves() -> None:
    """Two results of a Split in rows of 384 elements become Gathers; the third one, in rows of one, needs it."""
    text = """g (float[3,6,4,16] x) => (float[1,6,4,16] a, float[4,6,1,16,1] b, float[1,6,4,16] c) {
        a1, b1, c1 = Split<axis=0, num_outputs=3>(x) a = Relu(a1)
        b2 = Transpose<perm=[2,1,0,3]>(b1) b3 = Unsqueeze(b2, m1) b = Relu(b3)
        c2 = Transpose<perm=[0,2,1,3]>(c1) c3 = Transpose<perm=[0,2,1,3]>(c2)
        c4 = Transpose<perm=[0,2,1,3]>(c3) c5 = Transpose<perm=[0,2,1,3]>(c4) c = Relu(c5) }"""
    ops, _ = lowered(text, {"m1": [-1]})
    assert ops.count("Gather") == 2 and ops.count("Split") == ops.count("Transpose") == 1


def test_what_joins_two_values_is_a_source() -> None:
    text = """g (float[2,8,64] x, float[2,8,64] z) => (float[8,2,64] y) {
        c = Concat<axis=1>(x, z) t = Transpose<perm=[1,0,2]>(c) s = Slice(t, c0, c8, c0) y = Relu(s) }"""
    ops, _ = lowered(text, {"c0": [0], "c8": [8]})
    assert ops.count("Gather") == ops.count("Concat") == 1 and not {"Slice", "Transpose"} & set(ops)


@pytest.mark.parametrize("shape", [(8, 1, 64), (16, 64)])
def test_norms_with_numbers_for_each_position_are_not_passed(shape: tuple[int, ...]) -> None:
    body = f"{ROLL} {CUT.format('r')} m = LayerNormalization<axis=-1>(w, gain) {BACK.format('m', 'u')} {UNROLL}"
    ops, _ = image(body, {"gain": floats(*shape)}, atol=1e-5)
    assert ops.count("Gather") == 2


@pytest.mark.parametrize("after", [True, False])
def test_norms_over_an_axis_from_the_front_are_not_passed(after: bool) -> None:
    """It would be another axis in rows of another rank."""
    body = f"{ROLL} {CUT.format('r')} m = LayerNormalization<axis=2>(w, gain) {BACK.format('m', 'u')} {UNROLL}"
    if after:  # the rank changes behind the norm
        body = "v = Reshape(x, windows) t = Transpose<perm=[1,0,2]>(v) m = LayerNormalization<axis=2>(t, gain) "
        body += "tt = Transpose<perm=[1,0,2]>(m) y = Reshape(tt, image)"
    lowered_ops, _ = image(body, {"gain": floats(64)}, atol=1e-5)
    assert "LayerNormalization" in lowered_ops


def test_a_wrongly_declared_shape_is_left_alone() -> None:
    text = "g (float[4,8,64] x) => (float[8,4,64] y) { s = Slice(x, c0, c3, c0) y = Transpose<perm=[1,0,2]>(s) }"
    used = {"c0": np.array([0]), "c3": np.array([3])}
    model = parse(declared(text, used), used)
    model.graph.outputs[0].shape = ir.Shape((8, 4, 64))
    result, forms = lower(model, LowerOptions())
    assert not forms and [node.op_type for node in result.graph] == ["Slice", "Transpose"]


def test_constants_that_were_cleaned_up_come_back() -> None:
    """The shape of an attention that nothing reads, and the rows of a Gather, are the same number."""
    text = """g (float[2,8,4,64] x, float[2,8,128] q) => (float[2,8,2,64] y) {
        z = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1, softcap=5.0>(q, q, q)
        t = Transpose<perm=[0,2,1,3]>(x) t2 = Transpose<perm=[0,2,1,3]>(t)
        a, b = Split<axis=2>(t2, halves) y = Relu(a) }"""
    assert "Gather" in lowered(text, {"halves": [2, 2]})[0]


def test_long_chains_are_left_alone() -> None:
    swaps = " ".join(f"v{n + 1} = Transpose<perm=[1,0,2]>(v{n})" for n in range(1500))
    text = f"g (float[4,8,64] v0) => (float[4,8,64] y) {{ {swaps} y = Relu(v1500) }}"
    ops, forms = lowered(text, {})
    assert ops.count("Transpose") == 1500 and not forms


def test_slices_by_attributes_are_left_alone() -> None:
    model = parse("g (float[4,8,64] x) => (float[8,2,64] y) { t = Transpose<perm=[1,0,2]>(x) y = Identity(t) }")
    (node, _) = model.graph
    sliced = ir.node("Slice", [node.outputs[0]], {"starts": [0], "ends": [2], "axes": [1]})
    sliced.outputs[0].shape = ir.Shape((8, 2, 64))
    assert not is_move(sliced)


AXES = st.integers(0, 3)


@st.composite
def chains(draw: Any) -> tuple[str, dict[str, Any]]:
    """A graph of random moves of x, and its constants."""
    shape = (*draw(st.lists(st.integers(1, 4), min_size=3, max_size=3)), 64)
    head = f"g (float[{','.join(map(str, shape))}] x)"
    lines, used, value = [], {}, "x"
    for number in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["transpose", "slice", "roll", "flatten", "split"]))
        new, axis = f"v{number}", draw(AXES) % len(shape)
        if kind == "transpose":
            order = draw(st.permutations(range(len(shape))))
            lines.append(f"{new} = Transpose<perm=[{','.join(map(str, order))}]>({value})")
            shape = tuple(shape[a] for a in order)
        elif kind in ("slice", "roll"):
            start = draw(st.integers(0, shape[axis] - 1))
            step = draw(st.sampled_from([1, 1, 2, -1])) if kind == "slice" else 1
            end = -(2**40) if step < 0 else 2**40
            used |= {f"s{new}": [start], f"e{new}": [end], f"a{new}": [axis], f"t{new}": [step], f"z{new}": [0]}
            lines.append(f"{new} = Slice({value}, s{new}, e{new}, a{new}, t{new})")
            if kind == "roll":
                lines[-1] = lines[-1].replace(f"{new} =", f"f{new} =")
                lines.append(f"h{new} = Slice({value}, z{new}, s{new}, a{new})" if start else "")
                lines.append(f"{new} = Concat<axis={axis}>(f{new}{f', h{new}' if start else ''})")
            else:
                size = len(range(*slice(start, end, step).indices(shape[axis])))
                shape = (*shape[:axis], size, *shape[axis + 1 :])
        elif kind == "flatten":
            used[f"r{new}"] = [shape[0] * shape[1], 1, *shape[2:]]
            lines.append(f"{new} = Reshape({value}, r{new})")
            shape = tuple(used[f"r{new}"])
        elif shape[axis] % 2 == 0:
            lines.append(f"{new}, d{new} = Split<axis={axis}, num_outputs=2>({value})")
            shape = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
        else:
            continue
        value = new
    lines.append(f"y = Relu({value})")
    return f"{head} => (float[{','.join(map(str, shape))}] y) {{ {' '.join(lines)} }}", used


@settings(max_examples=150, deadline=None)
@given(chains())
def test_random_chains_keep_their_numbers(found: tuple[str, dict[str, Any]]) -> None:
    lowered(*found)


def test_rows_are_as_wide_as_what_moves_together() -> None:
    """Four images of 2 x 6 positions with 8 channels, of which the halves of every line change places."""
    text = """g (float[4,2,6,8] x) => (float[4,2,6,8] y) {
        a = Slice(x, c3, c6, c2) b = Slice(x, c0, c3, c2) y = Concat<axis=2>(a, b) }"""
    used = {f"c{n}": np.array([n]) for n in (0, 2, 3, 6)}
    value = parse(declared(text, used), used).graph.outputs[0]
    found = chain(value)
    assert found is not None and found.unit == 8
    index = index_map(value, found)
    assert index is not None
    rows = rows_of(index, 48, 8)
    assert (rows.batch, rows.indices.tolist(), rows.width, rows.identity) == (8, [1, 0], 24, False)
