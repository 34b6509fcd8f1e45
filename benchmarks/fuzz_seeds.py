"""Small valid ONNX models to mutate: some made here, some from ONNX's own backend suite."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def seeds(suite: int = 60) -> dict[str, bytes]:
    """Serialized models by name: those made here, and `suite` models spread over the backend suite."""
    made = {
        "mlp": _mlp(), "convolution": _convolution(), "attention": _attention(), "branches": _branches(),
        "loop": _loop(), "function": _function(), "quantized": _quantized(), "strings": _strings(),
        "sequence": _sequence(), "shapes": _shapes(),
    }  # fmt: skip
    models = {name: model.SerializeToString() for name, model in made.items()}
    if suite:
        from onnx.backend.test import loader

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the suite divides by zero on purpose
            cases = [case for case in loader.load_model_tests(kind="node") if case.model is not None]
        for case in cases[:: max(1, len(cases) // suite)][:suite]:
            models[case.name] = case.model.SerializeToString()
    return models


def _value(name: str, *shape: int | str, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _weight(name: str, *shape: int) -> TensorProto:
    random = np.random.default_rng(len(name) + sum(shape))
    return numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)


def _ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[TensorProto],
    opset: int = 17,
    **options: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "seed", inputs, outputs, weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, **options)


def _node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    names = outputs.split()
    return helper.make_node(op, inputs.split(), names, name=f"n_{names[0]}", **attributes)


def _mlp() -> onnx.ModelProto:
    nodes = [
        _node("Gemm", "x w0 b0", "h", transB=1, alpha=0.5),
        _node("Erf", "h", "e"),
        _node("Add", "e one", "g"),
        _node("Mul", "h g", "m"),
        _node("MatMul", "m w1", "p"),
        _node("Add", "p b1", "y"),
    ]
    weights = [_weight("w0", 6, 4), _weight("b0", 6), _weight("one", 1), _weight("w1", 6, 3), _weight("b1", 3)]
    return _model(nodes, [_value("x", "batch", 4)], [_value("y", "batch", 3)], weights)


def _convolution() -> onnx.ModelProto:
    nodes = [
        _node("Conv", "x w b", "c", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        _node("BatchNormalization", "c gamma beta mean variance", "n", epsilon=1e-4),
        _node("Relu", "n", "r"),
        _node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        _node("GlobalAveragePool", "p", "a"),
        _node("Flatten", "a", "y"),
    ]
    norm = [_weight(name, 4) for name in ("gamma", "beta", "mean")]
    norm.append(numpy_helper.from_array(np.array([1, 2, 0.5, 3], np.float32), "variance"))
    weights = [_weight("w", 4, 3, 3, 3), _weight("b", 4), *norm]
    return _model(nodes, [_value("x", 1, 3, 8, 8)], [_value("y", 1, 4)], weights, opset=13)


def _attention() -> onnx.ModelProto:
    nodes = []
    for part in "qkv":
        nodes += [
            _node("MatMul", f"x w{part}", f"{part}0"),
            _node("Reshape", f"{part}0 split", f"{part}1"),
            _node("Transpose", f"{part}1", f"{part}2", perm=[0, 2, 1, 3]),
        ]
    nodes += [
        _node("Transpose", "k2", "kt", perm=[0, 1, 3, 2]),
        _node("MatMul", "q2 kt", "qk"),
        _node("Mul", "qk scale", "scaled"),
        _node("Softmax", "scaled", "s", axis=-1),
        _node("MatMul", "s v2", "o"),
        _node("Transpose", "o", "o1", perm=[0, 2, 1, 3]),
        _node("Reshape", "o1 merge", "o2"),
        _node("Add", "o2 x", "r"),
        _node("LayerNormalization", "r gamma beta", "y", axis=-1),
    ]
    weights = [_weight(f"w{part}", 8, 8) for part in "qkv"]
    weights += [_weight("gamma", 8), _weight("beta", 8), _ints("split", 0, 0, 2, 4), _ints("merge", 0, 0, 8)]
    weights.append(numpy_helper.from_array(np.float32(0.5), "scale"))
    return _model(nodes, [_value("x", "batch", "tokens", 8)], [_value("y", "batch", "tokens", 8)], weights)


def _branches() -> onnx.ModelProto:
    then = helper.make_graph([_node("Mul", "x w", "t")], "then", [], [_value("t", 2, 3)])
    other = helper.make_graph(
        [_node("Constant", "", "k", value=_weight("k", 3)), _node("Add", "x k", "e")], "else", [], [_value("e", 2, 3)]
    )
    nodes = [
        _node("ReduceSum", "x", "sum", keepdims=0),
        _node("Greater", "sum zero", "c"),
        _node("If", "c", "y", then_branch=then, else_branch=other),
    ]
    weights = [_weight("w", 3), numpy_helper.from_array(np.float32(0), "zero")]
    return _model(nodes, [_value("x", 2, 3)], [_value("y", 2, 3)], weights)


def _loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [_node("Add", "carried w", "next"), _node("Identity", "go", "on"), _node("Mul", "next next", "scan")],
        "body",
        [_value("i", kind=TensorProto.INT64), _value("go", kind=TensorProto.BOOL), _value("carried", 3)],
        [_value("on", kind=TensorProto.BOOL), _value("next", 3), _value("scan", 3)],
    )
    nodes = [_node("Loop", "count yes x", "y scans", body=body)]
    weights = [
        _weight("w", 3),
        numpy_helper.from_array(np.int64(3), "count"),
        numpy_helper.from_array(np.array(True), "yes"),
    ]
    return _model(nodes, [_value("x", 3)], [_value("y", 3), _value("scans", "n", 3)], weights)


def _function() -> onnx.ModelProto:
    body = [_node("MatMul", "a b", "p"), _node("Relu", "p", "q")]
    inner = helper.make_function("local", "Inner", ["a", "b"], ["q"], body, [helper.make_opsetid("", 17)])
    calls = [
        helper.make_node("Inner", ["a", "b"], ["h"], domain="local"),
        helper.make_node("Softmax", ["h"], ["out"], name="soft"),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    outer = helper.make_function("local", "Outer", ["a", "b"], ["out"], calls, imports)
    nodes = [helper.make_node("Outer", ["x", "w"], ["y"], domain="local", name="call")]
    return _model(nodes, [_value("x", "n", 4)], [_value("y", "n", 4)], [_weight("w", 4, 4)], functions=[inner, outer])


def _quantized() -> onnx.ModelProto:
    nodes = [
        _node("QuantizeLinear", "x s z", "q"),
        _node("DequantizeLinear", "q s z", "d"),
        _node("DequantizeLinear", "wq s zw", "w"),
        _node("MatMul", "d w", "y"),
    ]
    weights = [
        numpy_helper.from_array(np.float32(0.05), "s"),
        numpy_helper.from_array(np.uint8(128), "z"),
        numpy_helper.from_array(np.int8(0), "zw"),
        numpy_helper.from_array(np.arange(-6, 6, dtype=np.int8).reshape(4, 3), "wq"),
    ]
    return _model(nodes, [_value("x", "n", 4)], [_value("y", "n", 3)], weights)


def _strings() -> onnx.ModelProto:
    nodes = [_node("Equal", "x names", "e"), _node("Cast", "e", "y", to=FLOAT)]
    names = helper.make_tensor("names", TensorProto.STRING, [2], [b"one", "zwölf".encode()])
    return _model(nodes, [_value("x", 2, kind=TensorProto.STRING)], [_value("y", 2)], [names], opset=19)


def _sequence() -> onnx.ModelProto:
    nodes = [
        _node("SplitToSequence", "x parts", "s", axis=1),
        _node("SequenceAt", "s index", "a"),
        _node("SequenceInsert", "s a", "t"),
        _node("ConcatFromSequence", "t", "y", axis=1),
    ]
    weights = [_ints("parts", 2, 2), numpy_helper.from_array(np.int64(1), "index")]
    return _model(nodes, [_value("x", 2, 4)], [_value("y", 2, "n")], weights)


def _shapes() -> onnx.ModelProto:
    nodes = [
        _node("Shape", "x", "shape"),
        _node("Gather", "shape index", "dim"),
        _node("Unsqueeze", "dim axis", "dim1"),
        _node("Concat", "dim1 rest", "target", axis=0),
        _node("Reshape", "x target", "r"),
        _node("Expand", "r size", "e"),
        _node("Slice", "e start end axes", "sl"),
        _node("Pad", "sl pads", "y"),
    ]
    weights = [
        numpy_helper.from_array(np.int64(0), "index"), _ints("axis", 0), _ints("rest", 2, -1), _ints("size", 1, 2, 6),
        _ints("start", 0), _ints("end", 4), _ints("axes", 2), _ints("pads", 0, 0, 1, 0, 0, 1),
    ]  # fmt: skip
    return _model(nodes, [_value("x", "n", 12)], [_value("y", "n", 2, "m")], weights)
