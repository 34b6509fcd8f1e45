"""What is not an ONNX model, or a broken or unusual one: refused by name, or repaired and said."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_support import FLOAT, RANDOM, X, assert_same, make_proto, refusal, value

from xform.capture.onnx_file import capture_onnx, notes


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\xff" * 100, "not an ONNX model"),
        (b"hello, this is text", "not an ONNX model"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (zipped("archive/data.pkl", "archive/version"), "PyTorch checkpoint"),
        (zipped("archive/data.pkl", "archive/constants.pkl"), "TorchScript"),
        (zipped("model/archive_format"), "torch.export.load"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"w": [0, 1]}   ', "safetensors"),
        (b"\x20\x00\x00\x00TFL3", "TensorFlow Lite"),
        (b"\x89HDF\r\n", "Keras"),
        (b"GGUF\x03", "GGUF"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "without a graph"),
    ],
)
def test_files_of_another_kind_are_named(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "no such model file" in refusal(tmp_path / "none.onnx")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"")
    assert "m.onnx" in refusal(tmp_path).split("what to do")[1]
    assert "cannot read" in refusal(tmp_path / "m.onnx" / "x.onnx")
    assert "int" in refusal(3)


def test_truncated_at_every_length() -> None:
    data = make_proto().SerializeToString()
    words = []
    for length in range(1, len(data), 7):
        try:
            words.append(refusal(data[:length]))
        except pytest.fail.Exception:
            assert len(data) - length < 40, f"{length} of {len(data)} bytes were accepted"  # opset imports come last
    assert sum("truncated" in text for text in words) > len(words) / 2


def test_opset_and_ir_version() -> None:
    for change, words in [(99, "opset 99"), (0, "opset 0"), (-3, "opset -3")]:
        proto = make_proto()
        proto.opset_import[0].version = change
        assert words in refusal(proto)
    proto = make_proto()
    proto.ir_version = 99
    assert "IR version 99" in refusal(proto)
    proto = make_proto()
    del proto.opset_import[0]
    assert "imports no opset" in refusal(proto)
    proto.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx", 18)])
    assert "two versions" in refusal(proto)


def test_unknown_operators_and_domains() -> None:
    def with_node(op: str, domain: str, **attributes: Any) -> onnx.ModelProto:
        return make_proto(nodes=[helper.make_node(op, ["x"], ["y"], name="odd", domain=domain, **attributes)])

    message = refusal(with_node("Foo", "com.example"))
    assert "com.example" in message
    assert "odd (Foo)" in message
    assert "function body" in message
    assert "no runtime has the operator 'Foo'" in refusal(with_node("Foo", "com.microsoft"))
    assert "odd (Foo)" in refusal(with_node("Foo", ""))
    assert "odd (Relu)" in refusal(with_node("Relu", "", wrong=1))
    assert "odd (Conv)" in refusal(with_node("Conv", ""))
    kept = capture_onnx(with_node("QuickGelu", "com.microsoft"))
    assert [n.domain for n in kept.graph] == ["com.microsoft"]


def test_names() -> None:
    proto = make_proto()
    proto.graph.node[1].output[0] = "xw"
    assert "defined twice" in refusal(proto)
    proto = make_proto()
    proto.graph.node[1].input[1] = "nowhere"
    message = refusal(proto)
    assert "nowhere" in message
    assert "sum (Add)" in message
    proto = make_proto()
    proto.graph.output[0].name = "nothing"
    assert "computed by no node" in refusal(proto)
    proto = make_proto()
    proto.graph.initializer.append(proto.graph.initializer[0])
    assert "2 initializers" in refusal(proto)
    proto = make_proto()
    proto.graph.input[0].name = ""
    assert "no name" in refusal(proto)
    proto = make_proto()
    proto.graph.input[0].ClearField("type")
    assert "no type" in refusal(proto)


def test_unsorted_is_sorted_and_said() -> None:
    proto = make_proto()
    expected = make_proto()
    expected.graph.CopyFrom(proto.graph)
    proto.graph.node.insert(0, proto.graph.node.pop())
    model = capture_onnx(proto)
    assert [n.name for n in model.graph] == ["product", "sum", "activation"]
    assert any("not sorted" in note for note in notes(model))
    assert_same(model, expected, X)
    assert "activation" in refusal(proto, strict=True)


def test_cycle_names_its_nodes() -> None:
    proto = make_proto()
    proto.graph.node[0].input[0] = "s"
    message = refusal(proto)
    assert "cycle" in message
    assert "product (MatMul), sum (Add)" in message or "sum (Add), product (MatMul)" in message
    assert "activation" not in message
    proto = make_proto()
    proto.graph.node[0].input[0] = "xw"
    assert "product (MatMul)" in refusal(proto)


def test_cycle_through_a_subgraph() -> None:
    branch = helper.make_graph([helper.make_node("Neg", ["y"], ["out"])], "b", [], [value("out", ["batch", 8])])
    cond = numpy_helper.from_array(np.array(True), "cond")
    looped = helper.make_node("If", ["cond"], ["i"], then_branch=branch, else_branch=branch, name="if")
    proto = make_proto(nodes=[looped, helper.make_node("Relu", ["i"], ["y"], name="r")])
    proto.graph.initializer.append(cond)
    assert "cycle" in refusal(proto)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_weights_are_noted(dtype: type) -> None:
    proto = make_proto()
    weights = RANDOM.standard_normal((8, 8)).astype(dtype)
    weights[3, 3] = np.nan
    proto.graph.initializer.append(numpy_helper.from_array(weights, "broken"))
    model = capture_onnx(proto)
    assert any("broken (NaN)" in note for note in notes(model))
    assert "broken (NaN)" in refusal(proto, strict=True)
    weights[3, 3] = -np.inf
    proto.graph.initializer[-1].CopyFrom(numpy_helper.from_array(weights, "broken"))
    assert not notes(capture_onnx(proto)), "minus infinity is what masks are made of"


def test_stored_data_that_does_not_fit_the_shape() -> None:
    proto = make_proto()
    proto.graph.initializer[0].dims[0] = 9
    assert "needs 288 bytes, 256 are stored" in refusal(proto)
    proto = make_proto()
    proto.graph.initializer[0].data_type = 99
    assert "data type 99" in refusal(proto)
    proto = make_proto()
    proto.graph.initializer[0].dims[0] = -8
    assert "no valid type and shape" in refusal(proto)
    proto = make_proto(
        nodes=[helper.make_node("ConstantOfShape", ["s"], ["y"], value=helper.make_tensor("v", FLOAT, [1], [1.0]))]
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2]), "s"))
    proto.graph.node[0].attribute[0].t.dims[0] = 5
    assert "y (ConstantOfShape)" in refusal(proto)


def test_map_types_are_refused_by_name() -> None:
    proto = make_proto()
    proto.graph.output[0].type.Clear()
    proto.graph.output[0].type.map_type.key_type = TensorProto.INT64
    assert "zipmap" in refusal(proto)


def test_negative_dims_are_any_size() -> None:
    proto = make_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    model = capture_onnx(proto)
    assert isinstance(model.graph.inputs[0].shape[0], ir.SymbolicDim)
    assert_same(model, proto, X)


def test_output_of_a_branch_must_be_its_own() -> None:
    empty = helper.make_graph([], "b", [], [value("x", ["batch", 8])])
    cond = numpy_helper.from_array(np.array(True), "cond")
    proto = make_proto(nodes=[helper.make_node("If", ["cond"], ["y"], then_branch=empty, else_branch=empty)])
    proto.graph.initializer.append(cond)
    assert "Identity" in refusal(proto)


def test_sequences_and_optionals_survive() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["seq"]),
        helper.make_node("Optional", ["seq"], ["opt"]),
        helper.make_node("OptionalGetElement", ["opt"], ["back"]),
        helper.make_node("ConcatFromSequence", ["back"], ["y"], axis=0),
    ]
    proto = make_proto(nodes=nodes)
    proto.graph.output[0].CopyFrom(value("y", ["n", 8]))
    assert_same(capture_onnx(proto), proto, X)
