"""Attention that takes its projections in int8 in: numbers as by the operators that it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from support import apply, declared, parse

from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.graph.values import display_name
from xform.passes.cleanup import EliminateCommonSubexpressions, InferShapes, RemoveDeadCode
from xform.passes.integer import QuantizeProducts
from xform.target import Target

CPU = Target("cpu")
RNG = np.random.default_rng(0)
B, S, C, H, D = 2, 5, 32, 2, 16
FORM = "attention: QAttention"
CONSTANTS = {
    **{f"w{n}": (RNG.standard_normal((C, H * D)) / 5).astype(np.float32) for n in "qkv"},
    **{f"b{n}": RNG.standard_normal(H * D).astype(np.float32) for n in "qk"},
    "w": (RNG.standard_normal((C, 3 * H * D)) / 5).astype(np.float32),
    "b": RNG.standard_normal(3 * H * D).astype(np.float32),
    "heads": np.array([0, 0, H, D]),
    "three": np.array([0, 0, 3, H, D]),
    "flat": np.array([-1, C]),
    "parts": np.array([B, S, 3, H, D]),
    "triangle": np.tri(S, dtype=bool).reshape(1, 1, S, S),
    "triangle_lowest": np.where(np.tri(S), 0, np.finfo(np.float32).min).astype(np.float32).reshape(1, 1, S, S),
    "triangle_infinite": np.where(np.tri(S), 0, -np.inf).astype(np.float32).reshape(1, 1, S, S),
    "flat_triangle": np.tri(S, dtype=bool),
    "batched_triangle": np.where(np.tri(S), 0, -np.inf).astype(np.float32).reshape(1, S, S),
    "triangle_by_head": np.tri(S, dtype=bool) * np.ones((1, H, 1, 1), bool),
    "triangle_three": np.where(np.tri(S), 0, -3).astype(np.float32).reshape(1, 1, S, S),
    "band": np.tri(S, k=1, dtype=bool).reshape(1, 1, S, S),
    "some": (np.arange(S) % 2 == 0).reshape(1, 1, 1, S),
    "several": -np.arange(S, dtype=np.float32).reshape(1, 1, 1, S),
    "merged": np.array([0, 0, H * D]),
    "nothing": np.array(0, np.float32),
    "minus_three": np.array(-3, np.float32),
    "lowest": np.array(np.finfo(np.float32).min),
    "minus_infinity": np.array(-np.inf, np.float32),
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array(2),
}
HEADS = "".join(f"{n}r = Reshape({n}, heads) {n}h = Transpose<perm=[0,2,1,3]>({n}r) " for n in "qkv")
THREE = f"q0 = MatMul(x, wq) q = Add(q0, bq) k0 = MatMul(x, wk) k = Add(bk, k0) v = MatMul(x, wv) {HEADS}"
FLAT = """f = Reshape(x, flat) p0 = MatMul(f, w) p = Add(p0, b) r = Reshape(p, parts) t = Transpose<perm=[2,0,3,1,4]>(r)
    qh = Gather<axis=0>(t, zero) kh = Gather<axis=0>(t, one) vh = Gather<axis=0>(t, two)"""
PACKED = """p0 = MatMul(x, w) p = Add(p0, b) r = Reshape(p, three) t = Transpose<perm=[2,0,3,1,4]>(r)
    qh = Gather<axis=0>(t, zero) kh = Gather<axis=0>(t, one) vh = Gather<axis=0>(t, two)"""


def quantized(
    body: str, mask: str = "", attributes: str = "", batch: object = B, reads: str = "", **options: Any
) -> ir.Model:
    """Attention over projections in int8; `mask` is the type of the input m, and `reads` what the attention reads."""
    given, reads = (f", {mask} m", reads or "m") if mask else ("", reads)
    text = f"""g (float[{batch},{S},{C}] x{given}) => (float[{batch},{S},{H * D}] y) {{
        {body} a = Attention<scale=0.6{attributes}>(qh, kh, vh{f", {reads}" if reads else ""})
        c = Transpose<perm=[0,2,1,3]>(a) y = Reshape(c, merged) }}"""
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    model = parse(declared(text, used), used)
    quantizer = QuantizeProducts(**{"smallest": 0, **options})
    apply(model, quantizer, EliminateCommonSubexpressions(), RemoveDeadCode(), InferShapes())
    return model


def compare(model: ir.Model, feeds: dict[str, Any]) -> dict[str, int]:
    """Numbers as by the graph before it was lowered; gives the forms that were chosen."""
    backend = get_backend(None, CPU)
    artifact = backend.lower(model, CPU, LowerOptions())
    (found,) = backend.load(artifact, LoadOptions(threads=1)).run(feeds)
    given = dict(feeds)
    if "m" in given:
        given["m"] = np.broadcast_to(given["m"], (*given["m"].shape[:-2], S, S))
    with np.errstate(all="ignore"):
        (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    forms: dict[str, int] = artifact.metadata["lowered"]
    return forms


def inputs(**more: Any) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((B, S, C)).astype(np.float32), **more}


@pytest.mark.parametrize("body", [THREE, PACKED, FLAT])
@pytest.mark.parametrize("causal", [0, 1])
def test_projections_in_int8_are_taken_in(body: str, causal: int) -> None:
    model = quantized(body, attributes=f", is_causal={causal}")
    assert compare(model, inputs())[FORM] == 1
    lowered = get_backend(None, CPU).lower(model, CPU, LowerOptions()).model  # type: ignore[attr-defined]
    assert {n.op_type for n in lowered.graph} == {"DynamicQuantizeLinear", "QAttention", "Reshape"}


@pytest.mark.parametrize("shape", [(B, 1, 1, S), (1, 1, 1, S), (1, 1, S, S), (B, 1, S, S)])
def test_boolean_masks_are_taken_in(shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(2).random(shape) < 0.5
    mask[..., 0] = True
    model = quantized(THREE, mask=f"bool[{','.join(map(str, shape))}]")
    assert compare(model, inputs(m=mask))[FORM] == 1


def test_a_sentence_of_pads_alone_gives_zeros() -> None:
    model = quantized(THREE, mask="bool[n,1,1,5]", batch="n")
    mask = np.array([[True, True, False, True, False], [False] * 5]).reshape(B, 1, 1, S)
    assert compare(model, inputs(m=mask))[FORM] == 1
    artifact = get_backend(None, CPU).lower(model, CPU, LowerOptions())
    (found,) = get_backend(None, CPU).load(artifact, LoadOptions(threads=1)).run(inputs(m=mask))
    assert (found[1] == 0).all() and (found[0] != 0).any()


@pytest.mark.parametrize("number", ["minus_three", "lowest", "minus_infinity"])
@pytest.mark.parametrize("inverted", [False, True])
def test_masks_that_add_one_number_are_taken_in(number: str, inverted: bool) -> None:
    where = f"n = Where(m, {number}, nothing)" if inverted else f"n = Where(m, nothing, {number})"
    model = quantized(f"{where} {THREE}", mask=f"bool[{B},1,1,{S}]", reads="n")
    allowed = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool).reshape(B, 1, 1, S)
    assert compare(model, inputs(m=~allowed if inverted else allowed))[FORM] == 1


@pytest.mark.parametrize(
    "mask",
    ["triangle", "triangle_lowest", "triangle_infinite", "flat_triangle", "batched_triangle", "triangle_by_head"],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_constant_masks_that_are_the_causal_rule_are_said_as_that(mask: str, size: int) -> None:
    model = quantized(FLAT, reads=mask)
    x = inputs()["x"] * size  # logits of up to 1e7, which no finite penalty may fall short of
    assert compare(model, {"x": x})[FORM] == 1
    lowered = get_backend(None, CPU).lower(model, CPU, LowerOptions()).model  # type: ignore[attr-defined]
    (node,) = (node for node in lowered.graph if node.op_type == "QAttention")
    assert node.attributes["unidirectional"].as_int() == 1 and node.inputs[5] is None


@pytest.mark.parametrize("mask", ["triangle_three", "band", "some"])
def test_other_constant_masks_of_two_values_are_taken_in(mask: str) -> None:
    assert compare(quantized(PACKED, reads=mask), inputs())[FORM] == 1


def test_a_constant_mask_of_several_values_is_lowered_otherwise() -> None:
    assert FORM not in compare(quantized(PACKED, reads="several"), inputs())


@pytest.mark.parametrize(
    ("mask", "attributes", "options"),
    [
        (f"float[{B},1,{S},{S}]", "", {}),  # added
        (f"bool[{B},{H},{S},{S}]", "", {}),  # by head
        (f"bool[{B},1,{S},{S}]", ", is_causal=1", {}),
        ("", ", softcap=5.0", {}),
        ("", "", {"per_row": True}),  # each row has a scale
    ],
)
def test_what_the_operator_cannot_say_is_lowered_otherwise(mask: str, attributes: str, options: Any) -> None:
    model = quantized(THREE, mask, attributes, **options)
    kind = mask.split("[")[0]
    shape = [int(n) for n in mask[len(kind) + 1 : -1].split(",")] if mask else []
    values = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    feeds = inputs(**({"m": values if kind == "float" else values > -0.5} if mask else {}))
    if kind == "bool":
        feeds["m"][..., 0] = True
    assert FORM not in compare(model, feeds)


def test_a_projection_in_float_keeps_the_others_out() -> None:
    (key,) = (n for n in quantized(THREE, smallest=1 << 20).graph if n.outputs[0].name == "k0")
    model = quantized(THREE, keep=(display_name(key),))
    assert sum(node.op_type == "MatMul" for node in model.graph) == 1
    assert FORM not in compare(model, inputs())
