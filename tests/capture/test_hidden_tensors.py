"""External data is found wherever a tensor can be, and nothing outside the model's folder is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_support import FLOAT, make_proto, refusal, value

from xform.capture.onnx_file import capture_onnx
from xform.capture.walk import tensors
from xform.errors import LimitError, ModelError

node = helper.make_node


def outside(location: str) -> TensorProto:
    tensor = TensorProto(name="t", data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.dims.append(8)
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_function(proto: onnx.ModelProto, tensor: TensorProto, *, default: bool) -> None:
    """A function whose Constant has the tensor, directly or as a default of the function's attribute."""
    constant = node("Constant", [], ["o"], **({} if default else {"value": tensor}))
    if default:
        constant.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    function = helper.make_function("local", "Make", [], ["o"], [constant], [helper.make_opsetid("", 17)])
    if default:
        function.attribute_proto.append(helper.make_attribute("value", tensor))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))


def in_sparse(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    sparse = proto.graph.sparse_initializer.add(dims=[8])
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(8)))
    sparse.values.CopyFrom(tensor)


def in_indices(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    sparse = proto.graph.sparse_initializer.add(dims=[8])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(8, np.float32), "v"))
    sparse.indices.CopyFrom(tensor)


def in_branch(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    graph = helper.make_graph([node("Constant", [], ["o"], value=tensor)], "inner", [], [value("o", [8])])
    proto.graph.input.append(value("c", [], TensorProto.BOOL))
    proto.graph.node.append(node("If", ["c"], ["unused"], then_branch=graph, else_branch=graph))


PLACES: dict[str, Callable[[onnx.ModelProto, TensorProto], object]] = {
    "initializer": lambda p, t: p.graph.initializer.append(t),
    "sparse values": in_sparse,
    "sparse indices": in_indices,
    "node attribute": lambda p, t: p.graph.node[0].attribute.append(helper.make_attribute("extra", t)),
    "tensors attribute": lambda p, t: p.graph.node[0].attribute.append(helper.make_attribute("extra", [t])),
    "branch": in_branch,
    "function body": lambda p, t: in_function(p, t, default=False),
    "function default": lambda p, t: in_function(p, t, default=True),
    "training": lambda p, t: p.training_info.add().algorithm.initializer.append(t),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_outside_is_found_everywhere(place: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"S" * 64)
    (models / "link.bin").symlink_to(secret)
    os.mkfifo(models / "pipe")
    for location in (str(secret), "../secret.bin", "link.bin", "pipe", "/dev/zero"):
        proto = make_proto()
        PLACES[place](proto, outside(location))
        assert any(tensor.data_location == TensorProto.EXTERNAL for tensor, _ in tensors(proto))
        path = models / "m.onnx"
        path.write_bytes(proto.SerializeToString())
        text = refusal(path)
        assert "external data" in text, (location, text)
        assert "external data" in refusal(proto) or "second file" in refusal(proto)
        assert "second file" in refusal(path.read_bytes())


def test_the_walk_follows_the_format_and_not_a_list() -> None:
    """Every message type through which a TensorProto can be reached is walked: found from the descriptors."""
    reached: set[str] = set()

    def visit(kind: type, seen: tuple[str, ...]) -> None:
        for field in kind.DESCRIPTOR.fields:  # type: ignore[attr-defined]
            inner = field.message_type
            if inner is None or inner.full_name in seen:
                continue
            if inner.name == "TensorProto":
                reached.add(f"{kind.DESCRIPTOR.name}.{field.name}")  # type: ignore[attr-defined]
            else:
                visit(inner._concrete_class, (*seen, inner.full_name))

    visit(onnx.ModelProto, ())
    assert {"GraphProto.initializer", "AttributeProto.t", "SparseTensorProto.indices"} <= reached
    proto = make_proto()
    before = len(list(tensors(proto)))
    proto.training_info.add().initialization.initializer.append(TensorProto(name="deep"))
    assert len(list(tensors(proto))) == before + 1


def test_a_model_read_by_onnx_ir_is_held_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"S" * 64)
    proto = make_proto()
    proto.graph.initializer.append(outside("../secret.bin"))
    path = tmp_path / "models" / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="leaves the model's folder"):
        capture_onnx(ir.load(path))


def test_a_model_path_that_never_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", Path("/dev/zero")):
        assert "pipe or a device" in refusal(path)


def test_sparse_tensors_are_counted_together_before_they_are_made() -> None:
    """Eight tensors of 1 GiB each in a few hundred bytes; each alone was below the limit of one."""
    proto = make_proto()
    for number in range(8):
        sparse = proto.graph.sparse_initializer.add(dims=[1 << 26])
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), f"s{number}"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64)))
    with pytest.raises(LimitError) as caught:
        capture_onnx(proto)
    assert caught.value.limit == "constants"
