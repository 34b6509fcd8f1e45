"""Models that no runtime can compute, one fault each: what capture has to refuse, with exit code 3, verified or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from hostile_case import BOOL, FLOAT, INT64, Dims, model
from onnx import TensorProto, helper, numpy_helper


def one(
    op: str, inputs: dict[str, Dims], weights: dict[str, Any] | None = None, *, out: int = 1, domain: str = "",
    kinds: dict[str, int] | None = None, opset: int = 17, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """One node that reads all inputs and weights, in order, between an Identity and a Relu that are fine."""
    names = [*inputs, *(weights or {})]
    node = helper.make_node(op, names, [f"o{i}" for i in range(out)], "culprit", domain=domain, **attributes)
    kind = {f"o{i}": (kinds or {}).get("o", FLOAT) for i in range(out)}
    return model(
        [node], inputs, {f"o{i}": None for i in range(out)}, weights, kinds={**kind, **(kinds or {})}, opset=opset,
        domains=(domain,) if domain else (),
    )  # fmt: skip


def _f(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _i(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def attributes() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Attribute values that no operator has a meaning for."""
    x, image, w = {"x": [2, 3, 4]}, {"x": [1, 4, 8, 8]}, {"w": _f(4, 4, 3, 3)}
    yield "transpose-perm-repeated", one("Transpose", {"x": [2, 3]}, perm=[0, 0])
    yield "transpose-perm-short", one("Transpose", x, perm=[1, 0])
    yield "transpose-perm-outside", one("Transpose", x, perm=[0, 1, 7])
    yield "transpose-perm-negative", one("Transpose", x, perm=[-1, 0, 1])
    yield "transpose-perm-unknown-rank", one("Transpose", {"x": None}, perm=[0, 0])  # type: ignore[dict-item]
    for op in ("Softmax", "LogSoftmax", "Hardmax", "Flatten", "ArgMax", "CumSum", "Concat", "Gather", "Split"):
        weights = {"CumSum": {"i": _i(10**9)}, "Gather": {"i": _i(0)}}.get(op)
        given = {} if op == "CumSum" else {"axis": 10**9}
        kinds = {"o": INT64} if op == "ArgMax" else None
        yield f"axis-{op.lower()}", one(op, x, weights, out=2 if op == "Split" else 1, kinds=kinds, **given)
    yield "axis-softmax-4", one("Softmax", x, axis=3)
    yield "axis-softmax-unknown-rank", one("Softmax", {"x": None}, axis=10**9)  # type: ignore[dict-item]
    yield "axis-layer-norm", one("LayerNormalization", x, {"s": _f(4)}, axis=5)
    yield "axes-reduce", one("ReduceMean", x, axes=[9])
    yield "axes-squeeze", one("Squeeze", x, {"a": _i(10**9)})
    yield "axes-unsqueeze-twice", one("Unsqueeze", x, {"a": _i(0, 0)})
    for name, value in (("strides", [0, 1]), ("strides", [-1, 1]), ("dilations", [0, 1]), ("group", 0), ("group", -2),
                        ("group", 3), ("kernel_shape", [2, 2]), ("kernel_shape", [0, 3]), ("pads", [1, 1]),
                        ("strides", [1]), ("dilations", [1, 1, 1]), ("auto_pad", "NONSENSE")):  # fmt: skip
        text = "x".join(map(str, value)) if isinstance(value, list) else value
        yield f"conv-{name}-{text}", one("Conv", image, w, **{name: value})
    for op in ("MaxPool", "AveragePool"):
        yield f"{op.lower()}-stride-0", one(op, image, kernel_shape=[2, 2], strides=[0, 0])
        yield f"{op.lower()}-kernel-0", one(op, image, kernel_shape=[0, 2])
        yield f"{op.lower()}-kernel-negative", one(op, image, kernel_shape=[-2, 2])
        yield f"{op.lower()}-pads-short", one(op, image, kernel_shape=[2, 2], pads=[0, 0])
        yield f"{op.lower()}-no-kernel", one(op, image)
        yield f"{op.lower()}-pads-wider-than-kernel", one(op, image, kernel_shape=[2, 2], pads=[5, 5, 5, 5])
    yield "convtranspose-stride-0", one("ConvTranspose", image, w, strides=[0, 0])
    yield "convtranspose-group-0", one("ConvTranspose", image, w, group=0)
    yield "conv-channels", one("Conv", {"x": [1, 5, 8, 8]}, w)
    yield "conv-rank", one("Conv", {"x": [4, 8]}, w)
    yield "depthtospace-0", one("DepthToSpace", image, blocksize=0)
    yield "depthtospace-not-dividing", one("DepthToSpace", image, blocksize=3)
    yield "spacetodepth-0", one("SpaceToDepth", image, blocksize=0)
    yield "lrn-size-0", one("LRN", image, size=0)
    yield "cast-to-999", one("Cast", x, to=999)
    yield "cast-to-0", one("Cast", x, to=0)
    yield "leakyrelu-nan", one("LeakyRelu", x, alpha=float("nan"))
    yield "layer-norm-epsilon-nan", one("LayerNormalization", x, {"s": _f(4)}, epsilon=float("nan"))
    yield "gemm-alpha-nan", one("Gemm", {"x": [2, 3]}, {"w": _f(3, 4)}, alpha=float("nan"))
    yield "instancenorm-epsilon-nan", one("InstanceNormalization", image, {"s": _f(4), "b": _f(4)}, epsilon=np.nan)
    yield "split-num-outputs-0", one("Split", x, out=2, opset=18, num_outputs=0)
    yield "einsum-nonsense", one("Einsum", x, equation="this is not an equation")
    yield "einsum-rank", one("Einsum", x, equation="ij->ji")
    yield "bitshift-direction", one("BitShift", {"a": [2], "b": [2]}, kinds={"a": 12, "b": 12, "o": 12}, direction="UP")
    yield "gelu-approximate", one("Gelu", x, opset=20, approximate="wrong")
    yield "resize-mode", one("Resize", image, {"r": _f(0), "s": np.ones(4, np.float32)}, mode="wrong")
    yield "pad-mode", one("Pad", x, {"p": _i(0, 0, 0, 0, 0, 0)}, mode="wrong")
    yield "groupnorm-0", one("GroupNormalization", image, {"s": _f(4), "b": _f(4)}, opset=21, num_groups=0)
    yield "groupnorm-3", one("GroupNormalization", image, {"s": _f(4), "b": _f(4)}, opset=21, num_groups=3)
    lstm = {"w": _f(1, 32, 4), "r": _f(1, 32, 8)}
    yield "lstm-hidden-0", one("LSTM", {"x": [5, 2, 4]}, lstm, hidden_size=0)
    yield "lstm-hidden-other", one("LSTM", {"x": [5, 2, 4]}, lstm, hidden_size=7)
    yield "lstm-direction", one("LSTM", {"x": [5, 2, 4]}, lstm, hidden_size=8, direction="sideways")


def nodes() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Nodes that do not fit their operator: arity, attributes, dtypes, names."""
    x = {"x": [2, 3, 4]}
    yield "unknown-standard-operator", one("Frobnicate", x)
    yield "unknown-operator-of-xform", one("Frobnicate", x, domain="xform")
    yield "unknown-operator-of-torch", one("aten.from_file.default", x, domain="torch")
    yield "unknown-domain", one("Frobnicate", x, domain="com.example")
    yield "unknown-operator-of-the-runtime", one("Frobnicate", x, domain="com.microsoft")
    yield "operator-newer-than-the-opset", one("Gelu", x, opset=17)
    yield "operator-removed", one("Upsample", {"x": [1, 4, 8, 8]}, {"s": np.ones(4, np.float32)}, opset=17)
    yield "too-few-inputs", one("Add", x)
    yield "too-many-inputs", one("Relu", {"x": [2], "z": [2]})
    yield "too-many-outputs", one("Relu", x, out=2)
    yield "no-outputs", model([helper.make_node("Relu", ["x"], [], "culprit")], x, {"x": [2, 3, 4]})
    yield "missing-attribute", one("Cast", x)
    yield "missing-perm-type", one("Concat", x)
    yield "unknown-attribute", one("Relu", x, frobnicate=1)
    yield "attribute-of-another-type", one("Transpose", x, perm="hello")
    yield "attribute-float-for-int", one("Softmax", x, axis=1.5)
    twice = one("Softmax", x, axis=1)
    twice.graph.node[0].attribute.append(helper.make_attribute("axis", 2))
    yield "attribute-twice", twice
    untyped = one("Softmax", x, axis=1)
    untyped.graph.node[0].attribute[0].type = 0
    untyped.graph.node[0].attribute[0].ClearField("i")
    yield "attribute-without-value", untyped
    reference = one("Softmax", x)
    reference.graph.node[0].attribute.add(name="axis", type=onnx.AttributeProto.INT, ref_attr_name="axis")
    yield "attribute-reference-outside-a-function", reference
    yield "dtype-string-to-relu", one("Relu", {"x": [2]}, kinds={"x": TensorProto.STRING, "o": TensorProto.STRING})
    yield "dtype-int-to-exp", one("Exp", {"x": [2]}, kinds={"x": INT64, "o": INT64})
    yield "dtype-bool-to-add", one("Add", {"a": [2], "b": [2]}, kinds={"a": BOOL, "b": BOOL, "o": BOOL})
    yield "dtypes-mixed", one("Add", {"a": [2], "b": [2]}, kinds={"b": INT64})
    yield "dtype-float-index", one("Gather", x, {"i": np.zeros(2, np.float32)})
    yield "dtype-float-shape", one("Reshape", x, {"s": np.array([6.0, 4.0], np.float32)})
    yield "dtype-if-condition", one("If", x, then_branch=_branch(), else_branch=_branch())
    yield "empty-op-type", one("", x)
    missing = one("Relu", x)
    missing.graph.node[0].input[0] = ""
    yield "required-input-left-out", missing


def shapes() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Shapes that do not fit each other, all of them written down in the file."""
    x = {"x": [2, 3, 4]}
    yield "reshape-impossible", one("Reshape", x, {"s": _i(5, 5)})
    yield "reshape-two-minus-one", one("Reshape", x, {"s": _i(-1, -1)})
    yield "reshape-minus-two", one("Reshape", x, {"s": _i(-2, 12)})
    yield "reshape-not-dividing", one("Reshape", x, {"s": _i(-1, 5)})
    yield "reshape-zero-outside", one("Reshape", x, {"s": _i(2, 3, 4, 0)})
    yield "matmul", one("MatMul", {"a": [2, 3], "b": [4, 5]})
    yield "gemm", one("Gemm", {"a": [2, 3]}, {"b": _f(4, 5)})
    yield "gemm-rank", one("Gemm", x, {"b": _f(4, 5)})
    yield "add-broadcast", one("Add", {"a": [2, 3], "b": [2, 4]})
    yield "where-broadcast", one("Where", {"c": [5], "a": [2], "b": [2]}, kinds={"c": BOOL})
    yield "concat", one("Concat", {"a": [2, 3], "b": [3, 4]}, axis=0)
    yield "concat-rank", one("Concat", {"a": [2, 3], "b": [3]}, axis=0)
    yield "expand", one("Expand", x, {"s": _i(5, 3, 4)})
    yield "split-sum", one("Split", x, {"s": _i(1, 1)}, out=2, axis=2)
    yield "split-count", one("Split", x, {"s": _i(2, 2)}, out=3, axis=2)
    yield "split-uneven", one("Split", {"x": [3, 2]}, out=2, axis=0)
    yield "slice-step-0", one("Slice", x, {"s": _i(0), "e": _i(2), "a": _i(1), "t": _i(0)})
    yield "slice-axis", one("Slice", x, {"s": _i(0), "e": _i(2), "a": _i(8)})
    yield "slice-lengths", one("Slice", x, {"s": _i(0, 0), "e": _i(2), "a": _i(1)})
    yield "pad-length", one("Pad", x, {"p": _i(1, 1)})
    yield "tile-length", one("Tile", x, {"r": _i(1, 2)})
    yield "squeeze-not-one", one("Squeeze", x, {"a": _i(1)})
    yield "batchnorm-channels", one("BatchNormalization", {"x": [1, 4, 8, 8]}, {n: _f(3) for n in "sbmv"})
    yield "layernorm-scale", one("LayerNormalization", x, {"s": _f(5)})
    yield "gather-outside", one("Gather", x, {"i": _i(99)})
    yield "topk-too-many", one("TopK", x, {"k": _i(99)}, out=2, kinds={"o1": INT64})
    yield "gathernd-rank", one("GatherND", x, {"i": np.zeros((1, 9), np.int64)})
    yield "constantofshape-negative", model(
        [helper.make_node("ConstantOfShape", ["s"], ["c"], "culprit"), helper.make_node("Add", ["x", "c"], ["y"])],
        x, {"y": None}, {"s": _i(-5)})  # fmt: skip
    yield "onehot-depth", one("OneHot", {"x": [2]}, {"d": _i(-3), "v": np.float32([0, 1])}, kinds={"x": INT64})


def graphs() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Graphs that are no graphs: cycles, names defined twice or never, types that are missing."""
    node = helper.make_node
    x: dict[str, Dims] = {"x": [2]}
    yield "cycle-of-one", model([node("Add", ["x", "y"], ["y"], "culprit")], x, {"y": [2]})
    yield "cycle-of-two", model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])], x, {"a": [2]})
    yield "output-twice", model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], x, {"y": [2]})
    yield "output-twice-in-one-node", model([node("Split", ["x"], ["y", "y"], axis=0)], x, {"y": [1]})
    yield "output-named-like-the-input", model([node("Relu", ["x"], ["x"])], x, {"x": [2]})
    yield "output-named-like-a-weight", model([node("Relu", ["x"], ["w"])], x, {"w": [2]}, {"w": _f(2)})
    yield "reads-nothing-known", model([node("Relu", ["ghost"], ["y"])], x, {"y": [2]})
    yield "output-of-nobody", model([node("Relu", ["x"], ["y"])], x, {"ghost": [2]})
    twice = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    twice.graph.output.append(twice.graph.output[0])
    yield "output-listed-twice", twice
    inputs = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    inputs.graph.input.append(inputs.graph.input[0])
    yield "input-listed-twice", inputs
    weights = model([node("Add", ["x", "w"], ["y"])], x, {"y": [2]}, {"w": _f(2)})
    weights.graph.initializer.append(weights.graph.initializer[0])
    yield "weight-listed-twice", weights
    unnamed = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    unnamed.graph.input[0].name = ""
    yield "input-without-name", unnamed
    nameless = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    nameless.graph.output[0].name = ""
    yield "output-without-name", nameless
    untyped = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    untyped.graph.input[0].ClearField("type")
    yield "input-without-type", untyped
    strange = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    strange.graph.input[0].type.tensor_type.elem_type = 77
    yield "input-of-unknown-dtype", strange
    wrong = model([node("Relu", ["x"], ["y"])], x, {"y": [2]}, kinds={"y": INT64})
    yield "declared-output-dtype", wrong
    yield "no-nodes-no-outputs", model([], x, {})
    versions = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    versions.opset_import.append(helper.make_opsetid("", 11))
    yield "two-opsets", versions
    for opset in (0, -3, 999, 2**40):
        other = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
        other.opset_import[0].version = opset
        yield f"opset-{opset}", other
    newer = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    newer.ir_version = 10**6
    yield "ir-version", newer
    none = model([node("Relu", ["x"], ["y"])], x, {"y": [2]})
    del none.opset_import[:]
    none.opset_import.append(helper.make_opsetid("com.example", 1))
    yield "no-opset", none
    for field, dims in (("short", [3]), ("negative", [-2]), ("huge", [2**40, 2**20])):
        short = model([node("Add", ["x", "w"], ["y"])], x, {"y": [2]}, {"w": _f(2)})
        short.graph.initializer[0].dims[:] = dims
        yield f"weight-{field}", short
    typed = model([node("Add", ["x", "w"], ["y"])], x, {"y": [2]}, {"w": _f(2)})
    typed.graph.initializer[0].data_type = 99
    yield "weight-of-unknown-dtype", typed
    inner = model([node("If", ["c"], ["y"], "culprit", then_branch=_branch("ghost"), else_branch=_branch())], {"c": []},
                  {"y": [2]}, kinds={"c": BOOL})  # fmt: skip
    yield "branch-reads-nothing-known", inner
    counts = model([node("If", ["c"], ["y", "z"], "culprit", then_branch=_branch(), else_branch=_branch())], {"c": []},
                   {"y": [2], "z": [2]}, kinds={"c": BOOL})  # fmt: skip
    yield "branch-with-too-few-outputs", counts


def _branch(read: str = "") -> onnx.GraphProto:
    made = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(_f(2)))
    nodes = [made, helper.make_node("Relu", [read or "k"], ["b"])]
    return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("b", FLOAT, [2])])


def invalid() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every invalid model of this file, by name."""
    for group in (attributes, nodes, shapes, graphs):
        for name, proto in group():
            yield f"{group.__name__}/{name}", proto
