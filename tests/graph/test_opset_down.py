"""Older opsets: ONNX Runtime computes the same before and after, for the operators that networks are made of."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from xform.errors import ModelError
from xform.graph.downgrade import downgrade, lowest_opset
from xform.graph.opset import opset_of, upgrade
from xform.graph.shapes import infer_shapes

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(7)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def one_node(op: str, opset: int, feeds: Arrays, outputs: int = 1, constants: Arrays | None = None, **attributes: Any):
    """A model of one node; inputs are those of `feeds` and `constants` in order, "" for an omitted one."""
    constants = constants or {}
    names = [n if not n.startswith("_") else "" for n in (*feeds, *constants)]
    out = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, out, name="the_node", **attributes)
    given = {n: a for n, a in feeds.items() if not n.startswith("_")}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()],
        [onnx.ValueInfoProto(name=o) for o in out],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {n: a for n, a in feeds.items() if not n.startswith("_")})


def written_at(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    graph = ir.serde.deserialize_model(model)
    infer_shapes(graph)
    downgrade(graph, opset)
    result = ir.serde.serialize_model(graph)
    onnx.checker.check_model(result)
    assert {o.domain: o.version for o in result.opset_import} == {"": opset}
    return result


def check(model: onnx.ModelProto, feeds: Arrays, opset: int, tolerance: float = 2e-5) -> onnx.ModelProto:
    before, lowered = run(model, feeds), written_at(model, opset)
    after = run(lowered, feeds)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
    return lowered


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


OPSETS = pytest.mark.parametrize("opset", [22, 17, 13, 11])


def heads(batch: int, count: int, length: int, size: int) -> np.ndarray:
    return floats(batch, count, length, size)


@OPSETS
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [None, "float", "bool", "row", "empty_row"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(opset: int, causal: int, mask: str | None, kv_heads: int) -> None:
    batch, length, keys = 2, 5, 7 if not causal else 5
    feeds = {
        "q": heads(batch, 4, length, 8),
        "k": heads(batch, kv_heads, keys, 8),
        "v": heads(batch, kv_heads, keys, 6),
    }
    if mask == "float":
        feeds["m"] = floats(batch, 1, length, keys)
    elif mask is not None:
        feeds["m"] = RNG.random((length, keys) if mask == "row" else (batch, 1, length, keys)) > 0.4
        feeds["m"][..., 0] = True
        if mask == "empty_row":
            feeds["m"][0, 0, 2] = False
    model = one_node("Attention", 23, feeds, is_causal=causal)
    assert "Attention" not in ops(check(model, feeds, opset))


@OPSETS
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [False, True])
def test_attention_with_past_and_present(opset: int, causal: int, mask: bool) -> None:
    feeds = {"q": heads(2, 4, 3, 8), "k": heads(2, 2, 3, 8), "v": heads(2, 2, 3, 8)}
    feeds |= {"m" if mask else "_m": floats(3, 8), "pk": heads(2, 2, 5, 8), "pv": heads(2, 2, 5, 8)}
    model = one_node("Attention", 23, feeds, outputs=3, is_causal=causal, scale=0.3)
    check(model, feeds, opset)


@OPSETS
@pytest.mark.parametrize(
    "attributes", [{"softcap": 2.0}, {"scale": 0.5}, {"softmax_precision": 11}, {"is_causal": 1, "softcap": 1.5}]
)
def test_attention_on_three_dims(opset: int, attributes: dict[str, Any]) -> None:
    feeds = {"q": floats(2, 5, 32), "k": floats(2, 5, 16), "v": floats(2, 5, 16)}
    model = one_node("Attention", 23, feeds, q_num_heads=4, kv_num_heads=2, **attributes)
    check(model, feeds, opset)


@pytest.mark.parametrize("mode", [0, 3])
def test_attention_shows_its_logits(mode: int) -> None:
    feeds = {"q": heads(1, 2, 3, 4), "k": heads(1, 2, 3, 4), "v": heads(1, 2, 3, 4)}
    model = one_node("Attention", 23, feeds, outputs=4, qk_matmul_output_mode=mode)
    check(model, feeds, 17)


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_with_cache_lengths_goes_below_24(causal: int) -> None:
    feeds = {"q": heads(2, 4, 3, 8), "k": heads(2, 4, 6, 8), "v": heads(2, 4, 6, 8)}
    feeds |= {"_m": floats(1), "_pk": floats(1), "_pv": floats(1), "n": np.asarray([4, 6], np.int64)}
    model = one_node("Attention", 24, feeds, is_causal=causal)
    assert lowest_opset(ir.serde.deserialize_model(model), 17) == 24
    check(model, feeds, 17)


def test_attention_stays_at_23_where_nothing_changed() -> None:
    feeds = {"q": heads(1, 2, 3, 4), "k": heads(1, 2, 3, 4), "v": heads(1, 2, 3, 4)}
    model = one_node("Attention", 25, feeds, is_causal=1)
    assert ops(written_at(model, 23)) == ["Attention"]
    assert lowest_opset(ir.serde.deserialize_model(model), 17) == 23
    assert lowest_opset(ir.serde.deserialize_model(model), 17, expand=True) == 17


@OPSETS
@pytest.mark.parametrize(
    ("rank", "interleaved", "positions", "turned"), list(itertools.product([3, 4], [0, 1], [False, True], [0, 4]))
)
def test_rotary_embedding(opset: int, rank: int, interleaved: int, positions: bool, turned: int) -> None:
    half = (turned or 8) // 2
    feeds = {"x": heads(2, 3, 5, 8) if rank == 4 else floats(2, 5, 24)}
    if positions:
        feeds |= {"c": floats(20, half), "s": floats(20, half), "p": RNG.integers(0, 20, (2, 5))}
    else:
        feeds |= {"c": floats(2, 5, half), "s": floats(2, 5, half)}
    model = one_node("RotaryEmbedding", 23, feeds, interleaved=interleaved, rotary_embedding_dim=turned, num_heads=3)
    assert "RotaryEmbedding" not in ops(check(model, feeds, opset))


@OPSETS
@pytest.mark.parametrize("axis", [-1, 1, -2])
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_rms_normalization(opset: int, axis: int, epsilon: float) -> None:
    feeds = {"x": floats(3, 4, 5), "s": floats(*(3, 4, 5)[axis:])}
    check(one_node("RMSNormalization", 23, feeds, axis=axis, epsilon=epsilon), feeds, opset)


@pytest.mark.parametrize("opset", [16, 13, 11])
@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_normalization(opset: int, axis: int, outputs: int, bias: bool) -> None:
    feeds = {"x": floats(3, 4, 5) * 3 + 100, "s": floats(*(3, 4, 5)[axis:])}  # a large mean shows cancellation
    if bias:
        feeds["b"] = floats(*(3, 4, 5)[axis:])
    check(one_node("LayerNormalization", 17, feeds, outputs=outputs, axis=axis), feeds, opset, tolerance=2e-3)


@pytest.mark.parametrize("opset", [20, 17, 13, 11])
def test_group_normalization(opset: int) -> None:
    feeds = {"x": floats(2, 6, 4, 5) * 2 + 10, "s": floats(6), "b": floats(6)}
    check(one_node("GroupNormalization", 21, feeds, num_groups=3), feeds, opset, tolerance=1e-3)


@pytest.mark.parametrize("opset", [19, 13, 11])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(opset: int, approximate: str) -> None:
    feeds = {"x": floats(4, 9) * 3}
    check(one_node("Gelu", 20, feeds, approximate=approximate), feeds, opset)


@pytest.mark.parametrize(
    ("op", "since", "attributes"),
    [
        ("Swish", 24, {}), ("Swish", 24, {"alpha": 1.7}), ("Mish", 18, {}), ("HardSwish", 14, {}),
        ("Celu", 12, {"alpha": 2.0}),
        ("GreaterOrEqual", 12, {}), ("LessOrEqual", 12, {}), ("Trilu", 14, {}), ("Trilu", 14, {"upper": 0}),
    ],
)  # fmt: skip
def test_operators_that_did_not_exist(op: str, since: int, attributes: dict[str, Any]) -> None:
    feeds = {"x": floats(3, 4, 5) * 2}
    if op.endswith("Equal"):
        feeds["z"] = np.where(RNG.random((3, 4, 5)) > 0.5, feeds["x"], floats(3, 4, 5))
        feeds["x"][0, 0, 0] = np.nan
    if op == "Trilu":
        feeds["k"] = np.asarray(1, np.int64)
    model = one_node(op, since, feeds, **attributes)
    for opset in (22, 17, 13, 11):
        if opset < since:
            assert op not in ops(check(model, feeds, opset))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("opset", [12, 8])
def test_softmax_of_one_dim(op: str, axis: int, opset: int) -> None:
    feeds = {"x": floats(3, 4, 5)}
    check(one_node(op, 13, feeds, axis=axis), feeds, opset)


def i64(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


CONSTANT_INPUTS: list[tuple[str, int, Arrays, dict[str, Any], int]] = [
    ("ReduceMean", 18, {"axes": i64(-1)}, {"keepdims": 0}, 10),
    ("ReduceSum", 13, {"axes": i64(0, 2)}, {}, 10),
    ("ReduceMax", 20, {}, {}, 10),
    ("ReduceSumSquare", 18, {}, {"noop_with_empty_axes": 1}, 13),
    ("Unsqueeze", 13, {"axes": i64(-1, 0)}, {}, 10),
    ("Split", 18, {}, {"num_outputs": 3, "axis": 2}, 10),
    ("Slice", 13, {"st": i64(1), "en": i64(9), "ax": i64(-1)}, {}, 9),
    ("Pad", 18, {"p": i64(1, 2), "v": np.float32(3.0).reshape(()), "ax": i64(-2)}, {}, 9),
    ("Clip", 13, {"lo": np.float32(-0.5).reshape(()), "hi": np.float32(0.25).reshape(())}, {}, 8),
    ("TopK", 11, {"k": i64(2)}, {}, 8),
    ("Shape", 15, {}, {"start": 1, "end": 3}, 13),
    ("Reshape", 14, {"s": i64(5, -1)}, {}, 8),
    (
        "Resize",
        18,
        {"_roi": floats(1), "sc": np.asarray([2.0], np.float32)},
        {"axes": [2], "nearest_mode": "floor"},
        13,
    ),
    ("BatchNormalization", 15, {"s": floats(4), "b": floats(4), "m": floats(4), "va": abs(floats(4))}, {}, 8),
]


@pytest.mark.parametrize(("op", "since", "constants", "attributes", "opset"), CONSTANT_INPUTS)
def test_inputs_become_attributes(
    op: str, since: int, constants: Arrays, attributes: dict[str, Any], opset: int
) -> None:
    feeds = {"x": floats(3, 4, 5)}
    kept = {n: a for n, a in constants.items() if not n.startswith("_")}
    outputs = 3 if op == "Split" else 2 if op == "TopK" else 1
    model = one_node(op, since, feeds, outputs, kept, **attributes)
    if len(kept) != len(constants):
        model.graph.node[0].input[:] = ["x", "", "sc"]
    lowered = check(model, feeds, opset)
    assert all(init.name in {i for n in lowered.graph.node for i in n.input} for init in lowered.graph.initializer)


@pytest.mark.parametrize(("op", "inputs"), [("Max", 3), ("Min", 2), ("Clip", 3), ("Clip", 2), ("Max", 1)])
def test_extremes_of_integers(op: str, inputs: int) -> None:
    feeds = {n: RNG.integers(-9, 9, (3, 4)) for n in ("a", "b", "c")[:inputs]}
    if op == "Clip":
        feeds = {"a": feeds["a"], "b": np.asarray(-2), "c": np.asarray(3)}
        feeds = dict(list(feeds.items())[:inputs])
    assert op not in ops(check(one_node(op, 13, feeds), feeds, 11))


def test_resize_returns_to_the_asymmetric_version() -> None:
    feeds = {"x": floats(1, 2, 3, 4)}
    constants = {"roi": np.zeros(0, np.float32), "sc": np.asarray([1, 1, 2, 3], np.float32)}
    model = one_node(
        "Resize", 13, feeds, 1, constants, coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    assert ops(check(model, feeds, 10)) == ["Resize"]
    assert ops(written_at(model, 10)) == ["Resize"]


@pytest.mark.parametrize(("axis", "shape"), [(0, (12, 5)), (-1, (5, 12)), (1, (2, 12, 3))])
@pytest.mark.parametrize("zeros", [True, False])
def test_scales_by_blocks_are_written_out(axis: int, shape: tuple[int, ...], zeros: bool) -> None:
    feeds = {"q": RNG.integers(0, 255, shape).astype(np.uint8)}
    blocks = tuple(size // 4 if size == 12 else size for size in shape)
    constants = {"s": RNG.uniform(0.1, 3, blocks).astype(np.float32)}
    if zeros:
        constants["z"] = RNG.integers(0, 255, blocks).astype(np.uint8)
    model = one_node("DequantizeLinear", 21, feeds, 1, constants, axis=axis, block_size=4)
    for opset in (20, 12):
        assert "DequantizeLinear" not in ops(check(model, feeds, opset, tolerance=0.0))


def test_a_smaller_last_block_has_no_older_form() -> None:
    feeds = {"q": RNG.integers(0, 255, (10, 5)).astype(np.uint8)}
    model = one_node("DequantizeLinear", 21, feeds, 1, {"s": np.ones((3, 5), np.float32)}, axis=0, block_size=4)
    with pytest.raises(ModelError, match="the last block is smaller"):
        written_at(model, 20)


def test_bodies_of_control_flow_are_written_too() -> None:
    feeds = {"c": np.asarray(True), "x": floats(3, 4)}
    value = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("e", TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("Gelu", ["x"], ["t"])], "then", [], [value])
    otherwise = helper.make_graph([helper.make_node("Mish", ["x"], ["e"])], "else", [], [other])
    model = one_node("If", 21, {"c": feeds["c"]}, then_branch=then, else_branch=otherwise)
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, (3, 4)))
    check(model, feeds, 13)
    check(model, feeds | {"c": np.asarray(False)}, 13)


def test_names_and_origin_are_kept() -> None:
    feeds = {"x": floats(2, 3)}
    graph = ir.serde.deserialize_model(one_node("Gelu", 20, feeds))
    downgrade(graph, 17)
    assert [v.name for v in graph.graph.outputs] == ["y0"]
    assert {n.metadata_props["xform.origin"] for n in graph.graph} == {"the_node"}


def test_refusal_names_node_reason_and_lowest_opset_and_changes_nothing() -> None:
    feeds = {"x": floats(3, 4)}
    model = one_node("BitwiseAnd", 18, {"x": np.ones(3, np.int32), "z": np.ones(3, np.int32)})
    model.graph.node.append(helper.make_node("Gelu", ["g"], ["h"]))
    model.graph.input.append(helper.make_tensor_value_info("g", TensorProto.FLOAT, (3, 4)))
    model.graph.output.append(onnx.ValueInfoProto(name="h"))
    model.opset_import[0].version = 21
    graph = ir.serde.deserialize_model(model)
    with pytest.raises(ModelError, match="lowest opset that works is 18") as raised:
        downgrade(graph, 13)
    assert any("the_node" in where and "BitwiseAnd" in where for where in raised.value.where)
    assert [n.op_type for n in graph.graph] == ["BitwiseAnd", "Gelu"] and opset_of(graph) == 21
    assert run(
        written_at(model, 18), {"x": feeds["x"].astype(np.int32)[:, 0], "z": np.ones(3, np.int32), "g": feeds["x"]}
    )


def test_a_type_that_did_not_exist_is_refused() -> None:
    info = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, (2, 3))
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], "r")], "g", [info], [onnx.ValueInfoProto(name="y")]
    )
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    assert lowest_opset(model, 11) == 13
    with pytest.raises(ModelError, match="bfloat16") as raised:
        downgrade(model, 12)
    assert "lowest opset that works is 13" in str(raised.value)


def test_lowest_opset_keeps_operators_as_they_are() -> None:
    feeds = {"x": floats(3, 4), "s": floats(4)}
    model = ir.serde.deserialize_model(one_node("LayerNormalization", 17, feeds))
    upgrade(model)
    assert lowest_opset(model, 11) == 17
    assert lowest_opset(model, 20) == 20
    assert lowest_opset(model, 11, expand=True) == 11
    assert lowest_opset(model, 23) == 23


def test_up_and_down_again_gives_the_same_nodes() -> None:
    x = floats(2, 6, 4, 4)
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], axis=1),
        helper.make_node("ReduceMean", ["a"], ["r"], axes=[2, 3]),
        helper.make_node("Squeeze", ["r"], ["q"], axes=[2, 3]),
        helper.make_node("Clip", ["b"], ["c"], min=-0.5),
        helper.make_node("Softmax", ["q"], ["s"], axis=1),
    ]
    outputs = [onnx.ValueInfoProto(name=n) for n in ("c", "s")]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "c", 4, 4])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [info], outputs), opset_imports=[helper.make_opsetid("", 10)], ir_version=10
    )
    graph = ir.serde.deserialize_model(model)
    upgrade(graph)
    assert {i.name for i in graph.graph.initializers.values()}
    downgrade(graph, lowest_opset(graph, 10))
    again = ir.serde.serialize_model(graph)
    assert opset_of(graph) == 10 and not again.graph.initializer
    assert ops(again) == [n.op_type for n in nodes]
    for before, after in zip(run(model, {"x": x}), run(again, {"x": x}), strict=True):
        np.testing.assert_array_equal(before, after)
