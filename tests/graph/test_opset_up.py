"""Newer opsets: ONNX Runtime (or NumPy, where it does not run the old form) computes the same before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from xform.errors import ModelError
from xform.graph.opset import IR_OPSET, opset_of, upgrade
from xform.graph.opset_schema import NEWEST_OPSET, operators, versions
from xform.graph.upgrade_steps import ADAPTERS, RELABEL

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(11)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto], opset: int, feeds: Arrays, outputs: list[str], constants: Arrays | None = None
) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [onnx.ValueInfoProto(name=o) for o in outputs],
        [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def upgraded(model: onnx.ModelProto, to: int = IR_OPSET) -> onnx.ModelProto:
    graph = ir.serde.deserialize_model(model)
    upgrade(graph, to)
    assert opset_of(graph) == to
    return ir.serde.serialize_model(graph)


def check(
    node: onnx.NodeProto,
    opset: int,
    feeds: Arrays,
    constants: Arrays | None = None,
    expected: list[np.ndarray] | None = None,
) -> onnx.ModelProto:
    """The upgraded model, after comparing it with the original in ONNX Runtime or with `expected`."""
    model = model_of([node], opset, feeds, [o for o in node.output if o], constants)
    before = run(model, feeds) if expected is None else expected
    after_model = upgraded(model)
    after = run(after_model, feeds)
    for a, b in zip(before, after, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return after_model


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_every_change_of_every_operator_is_classified() -> None:
    steps = {(op, version) for op in operators() for version in versions(op)[1:]}
    relabelled = {(op, version) for op, steps_of_op in RELABEL.items() for version in steps_of_op}
    assert len(steps) > 400
    assert steps - relabelled - set(ADAPTERS) == set()
    assert relabelled & set(ADAPTERS) == set()
    assert (relabelled | set(ADAPTERS)) - steps == set()


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1, -2])
def test_softmax_normalized_all_later_dims_together(op: str, axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    after = check(helper.make_node(op, ["x"], ["y"], **attributes), 11, {"x": floats(2, 3, 4, 5)})
    assert ops(after) == ([op] if axis in (3, -1) else ["Reshape", op, "Reshape"])


SCALES = {"up": [1, 1, 2, 3], "down": [1, 1, 0.5, 0.6], "both": [1, 1, 2, 0.6]}


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", list(SCALES))
@pytest.mark.parametrize("computed", [False, True])
def test_resize_was_asymmetric(mode: str, scales: str, computed: bool) -> None:
    values = {"s": np.asarray(SCALES[scales], np.float32)}
    feeds = {"x": floats(1, 2, 5, 7)}
    node = helper.make_node("Resize", ["x", "s"], ["y"], mode=mode)
    after = check(node, 10, feeds | values if computed else feeds, None if computed else values)
    split = mode == "nearest" and (computed or scales == "both")
    assert ops(after).count("Resize") == (2 if split else 1)


@pytest.mark.parametrize("opset", [7, 9])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample(opset: int, mode: str) -> None:
    feeds, scales = {"x": floats(1, 2, 3, 4)}, np.asarray([1, 1, 2, 1.5], np.float32)
    if opset == 7:
        after = check(helper.make_node("Upsample", ["x"], ["y"], mode=mode, scales=scales.tolist()), 7, feeds)
    else:
        after = check(helper.make_node("Upsample", ["x", "s"], ["y"], mode=mode), 9, feeds, {"s": scales})
    assert ops(after) == ["Resize"]


BECAME_INPUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("Clip", 10, {"min": -0.5, "max": 0.5}),
    ("Clip", 10, {"max": 0.5}),
    ("Clip", 10, {}),
    ("Pad", 10, {"pads": [0, 1, 0, 2, 0, 3], "value": 1.5}),
    ("Pad", 10, {"pads": [0, 1, 0, 2, 0, 3], "mode": "reflect"}),
    ("Slice", 9, {"starts": [1, -2], "ends": [1000, -1], "axes": [0, 2]}),
    ("Slice", 9, {"starts": [1], "ends": [2]}),
    ("Squeeze", 11, {"axes": [-1]}),
    ("Squeeze", 11, {}),
    ("Unsqueeze", 11, {"axes": [0, -1]}),
    ("ReduceSum", 11, {"axes": [-1], "keepdims": 0}),
    ("ReduceSum", 11, {}),
    ("ReduceMean", 13, {"axes": [0, 2]}),
    ("ReduceL2", 11, {"axes": [1]}),
    ("ReduceLogSumExp", 13, {}),
    ("ReduceMax", 12, {"axes": [0], "keepdims": 0}),
    ("Flatten", 9, {"axis": 2}),
    ("Gather", 9, {}),
]


@pytest.mark.parametrize(("op", "opset", "attributes"), BECAME_INPUTS)
def test_attributes_became_inputs(op: str, opset: int, attributes: dict[str, Any]) -> None:
    feeds = {"x": floats(3, 4, 1) if op == "Squeeze" else floats(3, 4, 5)}
    names = ["x", "i"] if op == "Gather" else ["x"]
    constants = {"i": np.asarray([0, 2])} if op == "Gather" else None
    check(helper.make_node(op, names, ["y"], **attributes), opset, feeds, constants)


@pytest.mark.parametrize(("opset", "attributes"), [(11, {}), (11, {"split": [1, 3], "axis": 1}), (13, {"axis": 1})])
def test_split(opset: int, attributes: dict[str, Any]) -> None:
    check(helper.make_node("Split", ["x"], ["a", "b"], **attributes), opset, {"x": floats(2, 4)})


def test_top_k() -> None:
    check(helper.make_node("TopK", ["x"], ["v", "i"], k=2, axis=1), 9, {"x": floats(3, 5)})


@pytest.mark.parametrize("opset", [7, 10])
def test_dropout_is_the_identity(opset: int) -> None:
    x = floats(3, 4)
    after = check(helper.make_node("Dropout", ["x"], ["y"], ratio=0.3), opset, {"x": x}, expected=[x])
    assert [i.name for i in after.graph.node[0].attribute] == []


def test_dropout_mask_had_the_type_of_the_data() -> None:
    graph = ir.serde.deserialize_model(
        model_of([helper.make_node("Dropout", ["x"], ["y", "m"])], 7, {"x": floats(2, 2)}, ["y", "m"])
    )
    upgrade(graph)
    assert [n.op_type for n in graph.graph] == ["Dropout", "Cast"]
    assert graph.graph.outputs[1].dtype == ir.DataType.FLOAT and graph.graph.outputs[1].name == "m"


def test_batch_normalization_with_statistics_per_activation() -> None:
    x, (scale, bias, mean) = floats(2, 3, 4), floats(3, 3, 4)
    variance = abs(floats(3, 4)) + 0.5
    expected = (x - mean) / np.sqrt(variance + 1e-3) * scale + bias
    constants = {"s": scale, "b": bias, "m": mean, "v": variance}
    node = helper.make_node("BatchNormalization", ["x", *constants], ["y"], spatial=0, epsilon=1e-3)
    check(node, 7, {"x": x}, constants, [expected])


@pytest.mark.parametrize("opset", [7, 9, 14])
def test_batch_normalization_per_channel(opset: int) -> None:
    constants = {"s": floats(3), "b": floats(3), "m": floats(3), "v": abs(floats(3)) + 0.5}
    attributes = {"spatial": 1} if opset == 7 else {}
    node = helper.make_node("BatchNormalization", ["x", *constants], ["y"], **attributes)
    assert ops(check(node, opset, {"x": floats(2, 3, 4)}, constants)) == ["BatchNormalization"]


def test_scatter() -> None:
    constants = {"i": np.asarray([[1, 0, 2]]), "u": floats(1, 3)}
    after = check(helper.make_node("Scatter", ["x", "i", "u"], ["y"], axis=0), 9, {"x": floats(3, 3)}, constants)
    assert ops(after) == ["ScatterElements"]


@pytest.mark.parametrize("directions", [None, [1]])
def test_scan_over_a_batch(directions: list[int] | None) -> None:
    """Running sums, and their doubles, of sequences in a batch."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("s", "x", "sum", "double")]
    nodes = [helper.make_node("Add", ["s", "x"], ["sum"]), helper.make_node("Add", ["sum", "sum"], ["double"])]
    body = helper.make_graph(nodes, "body", values[:2], values[2:])
    attributes = {} if directions is None else {"directions": directions}
    node = helper.make_node("Scan", ["", "start", "xs"], ["last", "all"], num_scan_inputs=1, body=body, **attributes)
    start, xs = floats(3, 2), floats(3, 4, 2)
    order = xs[:, ::-1] if directions else xs
    sums = start[:, None] + np.cumsum(order, axis=1)
    check(node, 8, {"start": start, "xs": xs}, expected=[sums[:, -1], 2 * sums])


@pytest.mark.parametrize("axis", [None, 1, 2])
def test_dft_axis(axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    x = floats(2, 4, 6, 1)
    spectrum = np.fft.fft(x[..., 0], axis=axis or 1)
    expected = np.stack([spectrum.real, spectrum.imag], -1).astype(np.float32)
    after = upgraded(model_of([helper.make_node("DFT", ["x"], ["y"], **attributes)], 17, {"x": x}, ["y"]))
    np.testing.assert_allclose(run(after, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_grid_sample_modes(mode: str) -> None:
    feeds = {"x": floats(1, 2, 5, 6), "grid": np.tanh(floats(1, 3, 4, 2))}
    check(helper.make_node("GridSample", ["x", "grid"], ["y"], mode=mode), 16, feeds)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("channels", [6, "c"])
def test_group_normalization_scale_was_per_group(constant: bool, channels: int | str) -> None:
    x, scale, bias = floats(2, 6, 4), floats(3), floats(3)
    rows = x.reshape(2, 3, -1).astype(np.float64)
    normal = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    expected = (normal * scale[:, None] + bias[:, None]).reshape(x.shape).astype(np.float32)
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=3)
    given = {"s": scale, "b": bias}
    feeds = {"x": x} if constant else {"x": x, **given}
    model = model_of([node], 18, feeds, ["y"], given if constant else None)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, channels, 4]))
    np.testing.assert_allclose(run(upgraded(model), feeds)[0], expected, rtol=1e-4, atol=1e-4)


def test_roi_align_without_half_pixels() -> None:
    constants = {"r": np.asarray([[0, 0, 3, 3], [1, 1, 4, 4]], np.float32), "b": np.asarray([0, 0])}
    node = helper.make_node("RoiAlign", ["x", "r", "b"], ["y"], output_height=2, output_width=2, sampling_ratio=2)
    feeds = {"x": floats(1, 2, 6, 6)}
    model = model_of([node], 10, feeds, ["y"], constants)
    after = upgraded(model, 16)  # ONNX Runtime has no newer kernel
    assert run(after, feeds)[0].tolist() == run(model, feeds)[0].tolist()


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(op: str) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    constants = {"w": floats(1, gates * 3, 2), "r": floats(1, gates * 3, 3), "b": floats(1, gates * 6)}
    check(helper.make_node(op, ["x", *constants], ["y"], hidden_size=3), 7, {"x": floats(4, 2, 2)}, constants)


@pytest.mark.parametrize(("op", "compute"), [("Add", np.add), ("Mul", np.multiply), ("Pow", np.power)])
def test_broadcasting_along_an_axis(op: str, compute: Any) -> None:
    x, other = abs(floats(2, 3, 4)) + 0.5, floats(3)
    node = helper.make_node(op, ["x", "o"], ["y"], broadcast=1, axis=1)
    check(node, 6, {"x": x}, {"o": other}, [compute(x, other[:, None])])


def test_prelu_slope_was_per_channel() -> None:
    x, slope = floats(2, 3, 4), floats(3)
    check(
        helper.make_node("PRelu", ["x", "s"], ["y"]),
        6,
        {"x": x},
        {"s": slope},
        [np.where(x < 0, x * slope[:, None], x)],
    )


def test_bodies_of_control_flow() -> None:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("t", "e")]
    then = helper.make_graph([helper.make_node("Unsqueeze", ["x"], ["t"], axes=[0])], "then", [], info[:1])
    otherwise = helper.make_graph([helper.make_node("Softmax", ["x"], ["e"])], "else", [], info[1:])
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=otherwise)
    feeds = {"c": np.asarray(True), "x": floats(2, 3, 4)}
    model = model_of([node], 11, feeds, ["y"])
    after = upgraded(model)
    for choice in (True, False):
        feeds["c"] = np.asarray(choice)
        np.testing.assert_allclose(run(after, feeds)[0], run(model, feeds)[0], rtol=1e-6)


def with_function(
    attributes: list[str], axes: onnx.AttributeProto, call: dict[str, Any], opset: int
) -> onnx.ModelProto:
    node = helper.make_node("ReduceMean", ["a"], ["b"], keepdims=0)
    node.attribute.append(axes)
    function = helper.make_function("own", "Mean", ["a"], ["b"], [node], [helper.make_opsetid("", opset)], attributes)
    call_node = helper.make_node("Mean", ["x"], ["y"], domain="own", **call)
    model = model_of([call_node], 13, {"x": floats(2, 3)}, ["y"])
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(function)
    return model


def test_model_local_functions() -> None:
    model = with_function([], helper.make_attribute("axes", [1]), {}, 13)
    x = floats(2, 3)
    after = upgraded(model)
    assert after.functions[0].opset_import[0].version == IR_OPSET
    np.testing.assert_allclose(run(after, {"x": x})[0], x.mean(1), rtol=1e-6)


def test_functions_whose_attributes_are_given_by_the_caller_are_inlined() -> None:
    axes = onnx.AttributeProto(name="axes", type=onnx.AttributeProto.INTS, ref_attr_name="axes")
    x = floats(2, 3)
    after = upgraded(with_function(["axes"], axes, {"axes": [1]}, 13))
    assert not after.functions
    np.testing.assert_allclose(run(after, {"x": x})[0], x.mean(1), rtol=1e-6)
    with pytest.raises(ModelError, match="Mean"):
        upgraded(with_function(["axes"], axes, {"axes": [1]}, 12))


def test_names_metadata_and_newer_models_are_kept() -> None:
    model = model_of([helper.make_node("Softmax", ["x"], ["y"], "soft", axis=1)], 11, {"x": floats(2, 3, 4)}, ["y"])
    model.graph.node[0].metadata_props.add(key="k", value="v")
    graph = ir.serde.deserialize_model(model)
    upgrade(graph)
    assert graph.graph.outputs[0].name == "y"
    assert all(n.metadata_props == {"k": "v", "xform.origin": "soft"} for n in graph.graph)
    newest = ir.serde.deserialize_model(
        model_of([helper.make_node("Swish", ["x"], ["y"])], 24, {"x": floats(2)}, ["y"])
    )
    upgrade(newest)
    assert opset_of(newest) == 24


@pytest.mark.parametrize("opset", [0, NEWEST_OPSET + 1])
def test_unknown_opsets_are_refused(opset: int) -> None:
    graph = ir.serde.deserialize_model(
        model_of([helper.make_node("Relu", ["x"], ["y"])], opset, {"x": floats(2)}, ["y"])
    )
    with pytest.raises(ModelError, match=f"opset {opset}"):
        upgrade(graph)


def test_what_cannot_be_expressed_names_its_node() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("s", "x", "sum", "out")]
    nodes = [helper.make_node("Add", ["s", "x"], ["sum"]), helper.make_node("Identity", ["sum"], ["out"])]
    body = helper.make_graph(nodes, "body", values[:2], values[2:])
    node = helper.make_node("Scan", ["n", "a", "b"], ["c", "d"], "the_scan", num_scan_inputs=1, body=body)
    feeds = {"n": np.asarray([1, 2]), "a": floats(2, 2), "b": floats(2, 3, 2)}
    with pytest.raises(ModelError, match="sequence lengths") as raised:
        upgraded(model_of([node], 8, feeds, ["c", "d"]))
    assert raised.value.where == ("the_scan",)
