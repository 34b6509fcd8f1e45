"""Reading ONNX models: every kind of source, what is kept, what is refused and how it is said."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from xform.capture.onnx_file import capture_onnx, notes
from xform.errors import ModelError
from xform.graph.clone import source_opset
from xform.graph.write import save, to_bytes

RANDOM = np.random.default_rng(3)
FLOAT = TensorProto.FLOAT


def value(name: str, shape: list[int | str], kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def array(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(RANDOM.standard_normal(shape).astype(np.float32), name)


def make_proto(opset: int = 17, nodes: list[onnx.NodeProto] | None = None, **changes: Any) -> onnx.ModelProto:
    """y = relu(x @ w + b) with a dynamic batch; `nodes` replaces the nodes."""
    if nodes is None:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["xw"], name="product"),
            helper.make_node("Add", ["xw", "b"], ["s"], name="sum"),
            helper.make_node("Relu", ["s"], ["y"], name="activation"),
        ]
    graph = helper.make_graph(
        nodes, "g", [value("x", ["batch", 8])], [value("y", ["batch", 8])], [array("w", 8, 8), array("b", 8)]
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **changes)


def run(proto: bytes, inputs: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(proto, options).run(None, inputs)  # type: ignore[no-any-return]


def assert_same(model: ir.Model, proto: onnx.ModelProto, inputs: dict[str, Any]) -> None:
    for got, expected in zip(run(to_bytes(model), inputs), run(proto.SerializeToString(), inputs), strict=True):
        np.testing.assert_array_equal(got, expected)


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        capture_onnx(source, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


X = {"x": RANDOM.standard_normal((3, 8)).astype(np.float32)}


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


@pytest.mark.parametrize("opset", [17, 12])
def test_functions_are_inlined_also_of_another_opset(opset: int) -> None:
    proto = local_function(opset)
    model = capture_onnx(proto)
    assert not model.functions
    assert [n.op_type for n in model.graph].count("MatMul") == 2
    assert all(n.domain == "" for n in model.graph)
    assert len({n.name for n in model.graph}) == len(list(model.graph))
    (got,) = run(to_bytes(model), X)
    h = run(local_function(17).SerializeToString(), X)[0]  # rank 2: Softmax means the same at 12 and 17
    w = numpy_helper.to_array(proto.graph.initializer[0])
    for _ in range(2):
        h = np.exp(X["x"] @ w if _ == 0 else h @ w)
        h = h / h.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, h, rtol=1e-4)


def test_recursive_functions_are_refused() -> None:
    proto = local_function(17)
    proto.functions[0].node[1].op_type, proto.functions[0].node[1].domain = "Block", "mine"
    proto.functions[0].opset_import.append(helper.make_opsetid("mine", 1))
    assert "Cyclic" in refusal(proto)


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


# External data


def external(folder: Path) -> Path:
    path = folder / "m.onnx"
    proto = make_proto()
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_external_data_stays_on_disk(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = capture_onnx(path)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    save(model, tmp_path / "out.onnx")
    loaded = onnx.load(path)
    assert_same(capture_onnx(tmp_path / "out.onnx"), loaded, X)


def test_external_data_from_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    external(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = capture_onnx("m.onnx")
    assert model.graph.initializers["w"].const_value.numpy().shape == (8, 8)


def redirect(path: Path, location: str, **others: str) -> Path:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            if entry.key in others:
                entry.value = others[entry.key]
    path.write_bytes(proto.SerializeToString())
    return path


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:100])
    assert "too short: 100 bytes" in refusal(path)
    (tmp_path / "m.data").unlink()
    message = refusal(path)
    assert "m.data" in message
    assert "initializer 'w'" in message
    (tmp_path / "m.data").mkdir()
    assert "not a readable file" in refusal(path)


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "models"
    inside.mkdir()
    path = external(inside)
    outside = tmp_path / "secret.data"
    outside.write_bytes((inside / "m.data").read_bytes())
    for location in ("../secret.data", str(outside), "sub/../../secret.data", "..\\secret.data", "C:\\secret.data", ""):
        message = refusal(redirect(path, location))
        assert "external data path" in message, location
    (inside / "link.data").symlink_to(outside)
    assert "link that leaves" in refusal(redirect(path, "link.data"))
    (inside / "folder").symlink_to(tmp_path)
    assert "link that leaves" in refusal(redirect(path, "folder/secret.data"))
    os.link(outside, inside / "hard.data")
    assert "hard link" in refusal(redirect(path, "hard.data"))
    (inside / "fine.data").symlink_to("m.data")
    assert len(list(capture_onnx(redirect(path, "fine.data")).graph)) == 3


def test_nonsense_in_external_data_entries(tmp_path: Path) -> None:
    for others in ({"offset": "-8"}, {"offset": "x"}, {"length": "3"}, {"offset": str(10**15)}):
        message = refusal(redirect(external(tmp_path), "m.data", **others))
        assert "external data" in message, others


def test_external_data_needs_a_file(tmp_path: Path) -> None:
    path = external(tmp_path)
    assert "not given as a file" in refusal(path.read_bytes())
    assert "not given as a file" in refusal(onnx.load(path, load_external_data=False))


# What is no model


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
        (b"\xff" * 100, "no ONNX model"),
        (b"hello, this is text", "no ONNX model"),
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


def test_capture_is_deterministic() -> None:
    proto = local_function(17)
    digests = {hashlib.sha256(to_bytes(capture_onnx(proto))).hexdigest() for _ in range(3)}
    assert len(digests) == 1
