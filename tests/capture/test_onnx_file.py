"""Reading ONNX models: every kind of source, and what is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_support import X, assert_same, make_proto, refusal, run, value

from xform.capture.onnx_file import capture_onnx, notes
from xform.graph.clone import source_opset
from xform.graph.write import to_bytes


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "proto", "ir"])
def test_every_kind_of_source(tmp_path: Path, kind: str) -> None:
    proto = make_proto()
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    sources: dict[str, Callable[[], Any]] = {
        "path": lambda: path, "str": lambda: str(path), "bytes": proto.SerializeToString,
        "proto": lambda: proto, "ir": lambda: ir.from_proto(proto),
    }  # fmt: skip
    model = capture_onnx(sources[kind]())
    assert_same(model, proto, X)
    assert source_opset(model) == 17
    assert model.opset_imports[""] == 23
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "8"]
    assert set(model.graph.initializers) == {"w", "b"}
    assert [n.name for n in model.graph] == ["product", "sum", "activation"]


def test_source_is_left_as_it_is(tmp_path: Path) -> None:
    proto = make_proto()
    before = proto.SerializeToString(deterministic=True)
    model = capture_onnx(proto)
    model.graph.initializers["w"].name = "renamed"
    model.graph.inputs[0].name = "other"
    assert proto.SerializeToString(deterministic=True) == before
    source = ir.from_proto(proto)
    text = ir.to_proto(source).SerializeToString(deterministic=True)
    model = capture_onnx(source)
    model.graph.initializers["w"].name = "renamed"
    assert ir.to_proto(source).SerializeToString(deterministic=True) == text
    path = tmp_path / "m.onnx"
    path.write_bytes(before)
    capture_onnx(path)
    assert path.read_bytes() == before


def test_tensors_are_shared_not_copied() -> None:
    source = ir.from_proto(make_proto())
    data = np.zeros((8, 8), np.float32)
    source.graph.initializers["w"].const_value = ir.Tensor(data, name="w")
    model = capture_onnx(source)
    assert np.shares_memory(model.graph.initializers["w"].const_value.numpy(), data)


def test_constants_become_initializers() -> None:
    nodes = [
        helper.make_node("Constant", [], ["shape"], value_ints=[-1, 4]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Constant", [], ["unused"], value_strings=["é"]),
        helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape"),
        helper.make_node("Mul", ["r", "two"], ["y"], name="double"),
    ]
    proto = make_proto(nodes=nodes)
    proto.graph.output[0].CopyFrom(value("y", ["n", 4]))
    model = capture_onnx(proto)
    assert [n.op_type for n in model.graph] == ["Reshape", "Mul"]
    assert {"shape", "two"} <= set(model.graph.initializers)
    assert_same(model, proto, X)


def test_string_constants_keep_their_bytes() -> None:
    proto = make_proto(nodes=[helper.make_node("Constant", [], ["c"], value_strings=["é", "a\0"]),
                              helper.make_node("Identity", ["c"], ["y"])])  # fmt: skip
    proto.graph.output[0].CopyFrom(value("y", [2], TensorProto.STRING))
    model = capture_onnx(proto)
    assert run(to_bytes(model), X)[0].tolist() == ["é", "a\0"]


def test_sparse_initializer_and_constant() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "sp"),
        numpy_helper.from_array(np.array([1, 6], np.int64)), [8],
    )  # fmt: skip
    two = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5.0], np.float32)), numpy_helper.from_array(np.array([[7]], np.int64)), [8]
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], sparse_value=two),
        helper.make_node("Add", ["x", "sp"], ["s"]),
        helper.make_node("Add", ["s", "c"], ["y"]),
    ]
    proto = make_proto(nodes=nodes)
    proto.graph.sparse_initializer.append(sparse)
    before = proto.SerializeToString()
    model = capture_onnx(proto)
    assert proto.SerializeToString() == before
    np.testing.assert_array_equal(run(to_bytes(model), X)[0], X["x"] + np.array([0, 2, 0, 0, 0, 0, 3, 5], np.float32))
    sparse.indices.raw_data = np.array([1, 8], np.int64).tobytes()
    del proto.graph.sparse_initializer[:]
    proto.graph.sparse_initializer.append(sparse)
    assert "outside its shape" in refusal(proto)


def local_function(opset: int) -> onnx.ModelProto:
    body = [
        helper.make_node("MatMul", ["a", "m"], ["p"], name="inner_product"),
        helper.make_node("Softmax", ["p"], ["q"], name="inner_softmax"),
    ]
    function = helper.make_function("mine", "Block", ["a", "m"], ["q"], body, [helper.make_opsetid("", opset)])
    nodes = [
        helper.make_node("Block", ["x", "w"], ["h"], domain="mine", name="first"),
        helper.make_node("Block", ["h", "w"], ["y"], domain="mine", name="second"),
    ]
    proto = make_proto(nodes=nodes, functions=[function])
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    return proto


@pytest.mark.parametrize("opset", [17, 14])
def test_functions_are_inlined_also_of_another_opset(opset: int) -> None:
    """Between 14 and 17 the operators of this function did not change, so all runtimes agree."""
    proto = local_function(opset)
    model = capture_onnx(proto)
    assert not model.functions
    assert [n.op_type for n in model.graph].count("MatMul") == 2
    assert all(n.domain == "" for n in model.graph)
    assert len({n.name for n in model.graph}) == len(list(model.graph))
    assert_same(model, proto, X)


def test_functions_whose_opset_means_something_else_are_refused() -> None:
    """Softmax-11 and -13 differ: ONNX Runtime takes the model's, onnx's reference in part the function's."""
    text = refusal(local_function(12))
    assert "Softmax changed" in text and "opset 12" in text


def test_recursive_functions_are_refused() -> None:
    proto = local_function(17)
    proto.functions[0].node[1].op_type, proto.functions[0].node[1].domain = "Block", "mine"
    proto.functions[0].opset_import.append(helper.make_opsetid("mine", 1))
    assert "calls itself" in refusal(proto)


def test_inputs_that_the_old_format_forced_become_constants() -> None:
    proto = make_proto(opset=8)
    proto.ir_version = 3
    proto.graph.input.extend([value("w", [8, 8]), value("b", [8])])
    model = capture_onnx(proto)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert_same(model, proto, X)
    proto.ir_version = 8
    model = capture_onnx(proto)
    assert [v.name for v in model.graph.inputs] == ["x", "w", "b"]
    assert any("overrid" in note for note in notes(model))


def test_quantization_annotation_and_metadata_are_kept() -> None:
    proto = make_proto()
    helper.set_model_props(proto, {"author": "me"})
    annotation = proto.graph.quantization_annotation.add(tensor_name="xw")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    back = onnx.load_from_string(to_bytes(capture_onnx(proto)))
    assert [(p.key, p.value) for p in back.metadata_props] == [("author", "me")]
    assert [a.tensor_name for a in back.graph.quantization_annotation] == ["xw"]
    assert [(p.key, p.value) for p in back.graph.node[0].metadata_props] == [("k", "v")]


def test_shadowed_names_become_unique() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["s"]), helper.make_node("Abs", ["s"], ["out"])],
        "b",
        [],
        [value("out", ["batch", 8])],
    )
    cond = numpy_helper.from_array(np.array(True), "cond")
    nodes = [
        helper.make_node("Relu", ["x"], ["s"]),
        helper.make_node("If", ["cond"], ["i"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["s", "i"], ["y"]),
    ]
    proto = make_proto(nodes=nodes)
    proto.graph.initializer.append(cond)
    model = capture_onnx(proto)
    names = [
        o.name for n in ir.traversal.RecursiveGraphIterator(model.graph) for o in n.outputs if n.graph is model.graph
    ]
    inner = [o.name for g in model.graph.subgraphs() for n in g for o in n.outputs]
    assert not set(names) & set(inner)
    np.testing.assert_array_equal(run(to_bytes(model), X)[0], np.maximum(X["x"], 0) + np.abs(X["x"]))


def test_capture_is_deterministic() -> None:
    proto = local_function(17)
    digests = {hashlib.sha256(to_bytes(capture_onnx(proto))).hexdigest() for _ in range(3)}
    assert len(digests) == 1
