"""Attention that takes its projections in: every way to split heads, with and without masks, and what is left alone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.target import Target

CPU = Target("cpu")
B, S, C, H, D = 2, 5, 12, 3, 4
HD = H * D
FORM = "attention: packed Attention"

HEADS = "_r = Reshape(_, heads) _h = Transpose <perm = [0, 2, 1, 3]> (_r)"
THREE = """
    q0 = MatMul(x, wq) q = Add(q0, bq)  k0 = MatMul(x, wk) k = Add(bk, k0)  v = MatMul(x, wv)
""" + "".join(HEADS.replace("_", name) for name in "qkv")
SPLIT = """
    p0 = MatMul(x, w) p = Add(p0, b)  q, k, v = Split <axis = 2, num_outputs = 3> (p)
""" + "".join(HEADS.replace("_", name) for name in "qkv")
UNBIND = """
    p0 = MatMul(x, w) p = Add(p0, b)  r = Reshape(p, three_heads)  t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    qh = Gather <axis = 0> (t, zero)  ks = Slice(t, one1, two1, zero1) kh = Squeeze(ks, zero1)
    vh = Gather <axis = 0> (t, two)
"""
HEADS_FIRST = """
    p0 = MatMul(x, w) p = Add(p0, b)  r = Reshape(p, heads_three)  t = Transpose <perm = [0, 2, 1, 3, 4]> (r)
    qs, ks, vs = Split <axis = 3, num_outputs = 3> (t)
    qh = Squeeze(qs, three1) kh = Squeeze(ks, three1) vh = Squeeze(vs, three1)
"""
FLAT = """
    x2 = Reshape(x, rows) p0 = MatMul(x2, w) p2 = Add(p0, b) p = Reshape(p2, packed)
    q, k, v = Split <axis = 2, num_outputs = 3> (p)
""" + "".join(HEADS.replace("_", name) for name in "qkv")
SPELLINGS = {"three": THREE, "split": SPLIT, "unbind": UNBIND, "heads first": HEADS_FIRST, "flat": FLAT}
MERGE = "yt = Transpose <perm = [0, 2, 1, 3]> (a) y = Reshape(yt, merged)"


def constants() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        **{f"w{n}": floats(C, HD) for n in "qkv"},
        **{f"b{n}": floats(HD) for n in "qk"},
        "w": floats(C, 3 * HD),
        "b": floats(3 * HD),
        "heads": np.array([0, 0, H, D]),
        "three_heads": np.array([0, 0, 3, H, D]),
        "heads_three": np.array([0, 0, H, 3, D]),
        "swapped": np.array([B, S, H, D]),
        "rows": np.array([-1, C]),
        "packed": np.array([B, -1, 3 * HD]),
        "merged": np.array([0, 0, HD]),
        **{f"{name}{suffix}": np.array([i] if suffix else i) for i, name in enumerate(("zero", "one", "two", "three"))
           for suffix in ("", "1")},
    }  # fmt: skip


def make(body: str, *, mask: str = "", attributes: str = "", batch: str | int = B, tokens: str | int | None = None,
         tail: str = MERGE) -> ir.Model:  # fmt: skip
    extra, tokens = f", {mask} m" if mask else "", tokens or (S if batch == B else "s")
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[{batch},{tokens},{C}] x{extra}) => (float[{batch},{tokens},{HD}] y) {{
            {body} a = Attention <scale = 0.6 {attributes}> (qh, kh, vh{", m" if mask else ""}) {tail}
        }}""")
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in constants().items() if name in body + tail
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def compare(model: ir.Model, feeds: dict[str, Any]) -> dict[str, int]:
    """Numbers as by the standard's reference; gives the forms that were chosen."""
    backend = get_backend(None, CPU)
    artifact = backend.lower(model, CPU, LowerOptions())
    runner = backend.load(artifact, LoadOptions(threads=1))
    given = dict(feeds)
    if "m" in given:
        given["m"] = np.broadcast_to(given["m"], (*given["m"].shape[:-2], S, S))
    with np.errstate(all="ignore"):
        expected = ReferenceEvaluator(ir.to_proto(model)).run(None, given)
    for actual, wanted in zip(runner.run(feeds), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=3e-6)
    forms: dict[str, int] = artifact.metadata["lowered"]
    return forms


def inputs(**more: Any) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((B, S, C)).astype(np.float32), **more}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("causal", [0, 1])
def test_every_way_to_split_heads_is_taken_in(spelling: str, causal: int) -> None:
    model = make(SPELLINGS[spelling], attributes=f", is_causal = {causal}")
    assert compare(model, inputs())[FORM] == 1
    model = get_backend(None, CPU).lower(model, CPU, LowerOptions()).model  # type: ignore[attr-defined]
    left = {node.op_type for node in model.graph}
    assert left <= {"Attention", "Reshape"} and sum(node.op_type == "Reshape" for node in model.graph) <= 2


@pytest.mark.parametrize("tokens", [S, "s"])
def test_one_sequence_with_tokens_in_front_is_taken_in(tokens: int | str) -> None:
    """torch.nn.MultiheadAttention has [S, B, C]; of one sequence the rows are in the same order, but not the axes."""
    heads = "".join(HEADS.replace("_", name) for name in "qkv").replace("[0, 2, 1, 3]", "[1, 2, 0, 3]")
    body = "f = Transpose <perm = [1, 0, 2]> (x) p0 = MatMul(f, w) p = Add(p0, b)"
    body += f" q, k, v = Split <axis = 2, num_outputs = 3> (p) {heads}"
    model = make(body, batch=1, tokens=tokens)
    assert compare(model, {"x": inputs()["x"][:1]})[FORM] == 1


@pytest.mark.parametrize("spelling", ["three", "split", "heads first"])
def test_dynamic_sizes_are_taken_in(spelling: str) -> None:
    model = make(SPELLINGS[spelling], batch="n", mask="bool[n,1,1,s]")
    mask = np.arange(S)[None] < np.array([[3], [S]])
    assert compare(model, inputs(m=mask[:, None, None]))[FORM] == 1


@pytest.mark.parametrize("shape", [(B, 1, 1, S), (1, 1, S, S), (B, H, S, S)])
@pytest.mark.parametrize("kind", ["bool", "finite"])
def test_masks_are_taken_in_also_where_rows_are_empty(kind: str, shape: tuple[int, ...]) -> None:
    allowed = np.random.default_rng(2).random(shape) < 0.6
    allowed[-1, :, 0] = False
    mask = allowed if kind == "bool" else np.where(allowed, 0.5, -30.0).astype(np.float32)
    declared = f"{'bool' if kind == 'bool' else 'float'}[{','.join(map(str, shape))}]"
    forms = compare(make(SPLIT, mask=declared), inputs(m=mask))
    # rows that are empty for some heads only cannot be zeroed after the heads are merged
    assert (FORM in forms) == (shape[1] == 1)


@pytest.mark.parametrize(
    ("lowest", "bias", "taken"),
    [(-100.0, 1.0, True), (np.finfo(np.float32).min, 1.0, True), (-np.inf, 1.0, False), (-2e38, -2e38, False)],
)
def test_shifted_windows_are_taken_in_where_no_sum_is_minus_infinity(lowest: float, bias: float, taken: bool) -> None:
    """Swin: a position bias per head and a mask per window, added by the graph, all constant."""
    rng = np.random.default_rng(3)
    constants_of_mask = {
        "position": (bias * rng.random((1, H, S, S))).astype(np.float32),
        "window": np.where(rng.random((1, B, 1, S, S)) < 0.6, 0, lowest).astype(np.float32),
        "four": np.array([B, 1, S, S]),
    }
    proto = ir.to_proto(make(SPLIT))
    next(node for node in proto.graph.node if node.op_type == "Attention").input.append("m")
    proto.graph.node.insert(0, onnx.helper.make_node("Add", ["position", "mw"], ["m"]))
    proto.graph.node.insert(0, onnx.helper.make_node("Reshape", ["window", "four"], ["mw"]))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants_of_mask.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    assert (FORM in compare(model, inputs())) == taken


def test_several_layers_share_one_expanded_mask() -> None:
    second = re.sub(r"\b(p0|p|[qkv][rh]?)\b", r"\1_2", SPLIT.replace("(x, w)", "(y1, w)"))
    tail = "at = Transpose <perm = [0, 2, 1, 3]> (a) y1 = Reshape(at, merged)" + second
    tail += " a2 = Attention <scale = 0.6> (qh_2, kh_2, vh_2, m) " + MERGE.replace("(a)", "(a2)")
    model = make(SPLIT, mask=f"bool[{B},1,1,{S}]", tail=tail)
    mask = np.ones((B, 1, 1, S), bool)
    mask[0, ..., 3:] = False
    assert compare(model, inputs(m=mask))[FORM] == 2
    result = get_backend(None, CPU).lower(model, CPU, LowerOptions()).model  # type: ignore[attr-defined]
    assert sum(node.op_type == "Expand" for node in result.graph) == 1


READ = "used = ReduceSum(p) " + MERGE.replace("y = Reshape(yt, merged)", "z = Reshape(yt, merged) y = Add(z, used)")
MIXED = SPLIT.replace("qr = Reshape(q, heads)", "qf = Transpose <perm = [1, 0, 2]> (q) qr = Reshape(qf, swapped)")
LEFT_ALONE = {
    "products that are read elsewhere": (SPLIT, READ, ""),
    "a soft cap": (SPLIT, MERGE, ", softcap = 2.0"),
    "rows that are mixed": (MIXED, MERGE, ""),
    "keys of another input": (THREE.replace("k0 = MatMul(x, wk)", "xk = Relu(x) k0 = MatMul(xk, wk)"), MERGE, ""),
    "an activation in between": (THREE.replace("qr = Reshape(q,", "qa = Relu(q) qr = Reshape(qa,"), MERGE, ""),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_the_operator_cannot_say_is_left_alone(reason: str) -> None:
    body, tail, attributes = LEFT_ALONE[reason]
    model = make(body, tail=tail, attributes=attributes)
    assert FORM not in compare(model, inputs())


def test_another_form_is_used_on_request_and_none_where_portable() -> None:
    model = make(SPLIT)
    backend = get_backend(None, CPU)
    for options, form in (
        (LowerOptions(attention="multi_head"), "attention: MultiHeadAttention"),
        (LowerOptions(attention="written"), "attention: MatMul, Softmax, MatMul"),
        (LowerOptions(portable=True), "attention: MatMul, Softmax, MatMul"),
    ):
        assert backend.lower(model, CPU, options).metadata["lowered"][form] == 1


def test_verbatim_lowering_changes_no_operator() -> None:
    model = make(SPLIT)
    artifact = get_backend(None, CPU).lower(model, CPU, LowerOptions(verbatim=True))
    assert [n.op_type for n in artifact.model.graph] == [n.op_type for n in model.graph]  # type: ignore[attr-defined]
