"""Every form that Attention is lowered to computes what the standard's reference implementation computes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.target import Target

CPU = Target("cpu")
B, HQ, HKV, S, T, P, D, DV = 2, 4, 2, 3, 5, 2, 8, 6


def attention_model(
    *,
    mask: str | None = None,
    heads: tuple[int, int] = (HQ, HQ),
    past: bool = False,
    dynamic: bool = True,
    rank: int = 4,
    square: bool = False,
    extra: tuple[str, ...] = (),
    **attributes: Any,
) -> tuple[ir.Model, dict[str, Any]]:
    """A model of one Attention node, and inputs for it; `extra` names further outputs to expose."""
    rng = np.random.default_rng(0)
    hq, hkv = heads
    keys = S if square else T
    total = keys + (P if past else 0)

    def shape(symbolic: list[Any], sizes: list[int]) -> tuple[list[Any], list[int]]:
        return (symbolic if dynamic else list(sizes)), sizes

    if rank == 4:
        shapes = {
            "q": shape(["b", hq, "s", D], [B, hq, S, D]),
            "k": shape(["b", hkv, "t", D], [B, hkv, keys, D]),
            "v": shape(["b", hkv, "t", DV], [B, hkv, keys, DV]),
        }
    else:
        shapes = {
            "q": shape(["b", "s", hq * D], [B, S, hq * D]),
            "k": shape(["b", "t", hkv * D], [B, keys, hkv * D]),
            "v": shape(["b", "t", hkv * DV], [B, keys, hkv * DV]),
        }
        attributes |= {"q_num_heads": hq, "kv_num_heads": hkv}
    if past:
        shapes["pk"] = shape(["b", hkv, "p", D], [B, hkv, P, D])
        shapes["pv"] = shape(["b", hkv, "p", DV], [B, hkv, P, DV])
    feeds: dict[str, Any] = {n: rng.standard_normal(s).astype(np.float32) for n, (_, s) in shapes.items()}
    inputs = [onnx.helper.make_tensor_value_info(n, 1, s) for n, (s, _) in shapes.items()]
    if mask is not None:
        kind, mask_shape = mask.split(":")
        sizes = {"full": [B, 1, S, total], "pad": [B, 1, 1, total], "flat": [S, total], "heads": [B, hq, S, total]}
        feeds["m"] = make_mask(rng, kind, sizes[mask_shape])
        names = {B: "b", S: "s", total: "all"}
        declared = (
            [names.get(d, d) for d in sizes[mask_shape]] if dynamic and mask_shape != "heads" else sizes[mask_shape]
        )
        inputs.append(onnx.helper.make_tensor_value_info("m", 9 if kind == "bool" else 1, declared))
    names_in = ["q", "k", "v", "m" if mask else "", "pk" if past else "", "pv" if past else ""]
    names_out = ["y", *(n if n in extra else "" for n in ("present_k", "present_v", "qk"))]
    while not names_out[-1]:
        names_out.pop()
    while not names_in[-1]:
        names_in.pop()
    node = onnx.helper.make_node("Attention", names_in, names_out, name="attention", **attributes)
    outputs = [onnx.helper.make_tensor_value_info(n, 1, [None] * (rank if n == "y" else 4)) for n in names_out if n]
    graph = onnx.helper.make_graph([node], "g", inputs, outputs)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(proto)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)), feeds


def make_mask(rng: np.random.Generator, kind: str, shape: list[int]) -> Any:
    """A random mask with both empty and partly masked rows."""
    allowed = rng.random(shape) < 0.6
    allowed[0, ..., 0] = True
    if shape[-2] == 1:
        allowed[1] = False
    else:
        allowed[..., 1, :] = False
    if kind == "bool":
        return allowed
    bias = rng.standard_normal(shape).astype(np.float32)
    return np.where(allowed, bias, np.float32(-np.inf if kind == "inf" else -100.0)).astype(np.float32)


def reference(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    """The standard's own numbers; its code takes masks that broadcast over queries for masks of one query."""
    if "m" in feeds:
        length = feeds["q"].shape[-2] if feeds["q"].ndim == 4 else feeds["q"].shape[1]
        mask = feeds["m"]
        feeds = {**feeds, "m": np.broadcast_to(mask, (*mask.shape[:-2], length, mask.shape[-1]))}
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(ir.to_proto(model)).run(None, feeds))


def lowered(model: ir.Model, feeds: dict[str, Any], **options: Any) -> tuple[ir.Model, list[Any], dict[str, int]]:
    backend = get_backend(None, CPU)
    artifact = backend.lower(model, CPU, LowerOptions(**options))
    runner = backend.load(artifact, LoadOptions(threads=1))
    try:
        return artifact.model, runner.run(feeds), artifact.metadata["lowered"]  # type: ignore[attr-defined]
    finally:
        runner.close()


def compare(model: ir.Model, feeds: dict[str, Any], **options: Any) -> tuple[ir.Model, dict[str, int]]:
    """Lower, run, compare with the reference, and check that the result is a valid model without Attention."""
    expected = reference(model, feeds)
    result, actual, forms = lowered(model, feeds, **options)
    assert not any(node.op_type == "Attention" for node in result.graph)
    assert not any(np.isnan(e).any() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-6)
    assert [o.name for o in result.graph.outputs] == [o.name for o in model.graph.outputs]
    onnx.checker.check_model(ir.to_proto(result))
    return result, forms


MASKS = [None, "bool:full", "bool:pad", "bool:flat", "bool:heads", "inf:full", "inf:flat", "finite:pad", "finite:heads"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_masks_and_causality_agree_with_the_standard(mask: str | None, causal: int) -> None:
    for heads, past, dynamic in itertools.product([(HQ, HQ), (HQ, HKV), (HQ, 1)], [False, True], [False, True]):
        model, feeds = attention_model(mask=mask, heads=heads, past=past, dynamic=dynamic, is_causal=causal, scale=0.4)
        compare(model, feeds, portable=True)
        compare(model, feeds)
