"""Tensors that lie, or claim to lie, in other files: outside the folder, behind links, beyond the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from hostile_case import BOOL, FLOAT, INT64, REFUSED, Case, optimize, saved, simple
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
Put = Callable[[onnx.ModelProto, TensorProto], None]  # hides a tensor somewhere in a model


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (external_data, hidden_tensors):
        yield from group()


# Where a tensor can hide


def external(name: str, location: str, dims: list[int], **entries: str) -> TensorProto:
    """A tensor that says that it lies in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(dims)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def as_initializer(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    """Put it in the place of the bias of `simple`."""
    del proto.graph.initializer[1]
    tensor.name = "b"
    proto.graph.initializer.append(tensor)


def _as_constant(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    del proto.graph.initializer[1]
    proto.graph.node.insert(0, node("Constant", [], ["b"], value=tensor))


def _as_sparse(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    del proto.graph.initializer[1]
    sparse = proto.graph.sparse_initializer.add(dims=[8])
    sparse.values.CopyFrom(tensor)
    sparse.values.name = "b"
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(tensor.dims[0], dtype=np.int64)))


def _as_sparse_indices(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    del proto.graph.initializer[1]
    sparse = proto.graph.sparse_initializer.add(dims=[8])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(tensor.dims[0], "f"), "b"))
    tensor.data_type = INT64
    sparse.indices.CopyFrom(tensor)


def _branch(tensor: TensorProto, *, initializer: bool) -> onnx.GraphProto:
    tensor.name = "t"
    out = [helper.make_tensor_value_info("o", FLOAT, [8])]
    if initializer:
        return helper.make_graph([node("Identity", ["t"], ["o"])], "inner", [], out, [tensor])
    return helper.make_graph([node("Constant", [], ["o"], value=tensor)], "inner", [], out)


def _in_branch(initializer: bool) -> Put:
    def put(proto: onnx.ModelProto, tensor: TensorProto) -> None:
        del proto.graph.initializer[1]
        proto.graph.input.append(helper.make_tensor_value_info("c", BOOL, []))
        branch = _branch(tensor, initializer=initializer)
        proto.graph.node.insert(0, node("If", ["c"], ["b"], then_branch=branch, else_branch=branch))

    return put


def _function(proto: onnx.ModelProto, body: list[onnx.NodeProto], attributes: list[str]) -> onnx.FunctionProto:
    del proto.graph.initializer[1]
    function = helper.make_function("local", "Make", [], ["o"], body, [helper.make_opsetid("", 17)], attributes)
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.node.insert(0, node("Make", [], ["b"], domain="local"))
    return proto.functions[0]


def _in_function(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    _function(proto, [node("Constant", [], ["o"], value=tensor)], [])


def _in_function_default(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    constant = node("Constant", [], ["o"])
    constant.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    function = _function(proto, [constant], [])
    function.attribute_proto.append(helper.make_attribute("value", tensor))


def _in_call(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    constant = node("Constant", [], ["o"])
    constant.attribute.add(name="value", ref_attr_name="value", type=onnx.AttributeProto.TENSOR)
    _function(proto, [constant], ["value"])
    proto.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


def _in_tensors(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("extra", [tensor]))


def _in_training(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    proto.training_info.add().algorithm.initializer.append(tensor)


def _in_unused_function(proto: onnx.ModelProto, tensor: TensorProto) -> None:
    body = [node("Constant", [], ["o"], value=tensor)]
    proto.functions.append(helper.make_function("local", "Unused", [], ["o"], body, [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("local", 1))


PLACES: dict[str, Put] = {
    "initializer": as_initializer,
    "constant": _as_constant,
    "sparse": _as_sparse,
    "sparse-indices": _as_sparse_indices,
    "branch-initializer": _in_branch(True),
    "branch-constant": _in_branch(False),
    "function": _in_function,
    "function-default": _in_function_default,
    "function-call": _in_call,
    "tensors-attribute": _in_tensors,
    "training": _in_training,
    "unused-function": _in_unused_function,
}


def hidden_tensors() -> Iterator[Case]:
    """External data outside the folder, in every place where a tensor can be."""
    for place, put in PLACES.items():
        for kind in ("absolute", "parent", "link", "fifo"):

            def build(folder: Path, put: Put = put, kind: str = kind) -> list[str]:
                proto = simple()
                put(proto, external("t", _bad_location(folder, kind), [8]))
                return optimize(saved(folder, proto))

            yield Case(f"hidden/{place}-{kind}", build, REFUSED)


def _bad_location(folder: Path, kind: str) -> str:
    models = folder / "models"
    match kind:
        case "absolute":
            return str(folder / "outside" / "secret.bin")
        case "parent":
            return "../outside/secret.bin"
        case "link":
            (models / "link.bin").symlink_to(folder / "outside" / "secret.bin")
            return "link.bin"
        case "fifo":
            os.mkfifo(models / "pipe")
            return "pipe"
    raise ValueError(kind)


def external_data() -> Iterator[Case]:
    """Locations, offsets and lengths that no honest file has."""
    locations: dict[str, Callable[[Path], str]] = {
        "etc-passwd": lambda f: "/etc/passwd",
        "dev-zero": lambda f: "/dev/zero",
        "dev-stdin": lambda f: "/dev/stdin",
        "proc": lambda f: "/proc/self/environ",
        "dotdot-deep": lambda f: "a/b/../../../outside/secret.bin",
        "dotdot-windows": lambda f: "..\\outside\\secret.bin",
        "drive": lambda f: "C:\\secret.bin",
        "unc": lambda f: "\\\\host\\share\\secret.bin",
        "home": lambda f: "~/secret.bin",
        "folder": lambda f: ".",
        "empty": lambda f: "",
        "missing": lambda f: "missing.bin",
        "null": lambda f: "a\0b",
        "long": lambda f: "x" * 10_000,
        "url": lambda f: "file:" + "///etc/passwd",
        "newline": lambda f: "a\nb\x1b[31m",
        "link-to-link": _link_to_link,
        "linked-folder": _linked_folder,
        "dangling": _dangling,
        "hard-link": _hard_link,
        "socket": _socket,
    }
    for name, locate in locations.items():

        def build(folder: Path, locate: Callable[[Path], str] = locate) -> list[str]:
            proto = simple()
            as_initializer(proto, external("t", locate(folder), [8]))
            return optimize(saved(folder, proto))

        yield Case(f"external/{name}", build, REFUSED)
    entries: dict[str, dict[str, str]] = {
        "offset-beyond": {"offset": "1000000"},
        "offset-at-the-end": {"offset": "4"},
        "offset-negative": {"offset": "-4"},
        "offset-huge": {"offset": "9" * 400},
        "offset-text": {"offset": "four"},
        "offset-unicode": {"offset": "\u0664"},
        "length-short": {"length": "4"},
        "length-long": {"length": "1000000"},
        "length-negative": {"length": "-1"},
        "length-huge": {"length": "9" * 19},
        "length-text": {"length": "0x20"},
    }
    for name, entry in entries.items():

        def build_entry(folder: Path, entry: dict[str, str] = entry) -> list[str]:
            (folder / "models" / "data.bin").write_bytes(b"\0" * 32)
            proto = simple()
            as_initializer(proto, external("t", "data.bin", [8], **entry))
            return optimize(saved(folder, proto))

        yield Case(f"external/{name}", build_entry, REFUSED)

    def huge(folder: Path) -> list[str]:
        (folder / "models" / "data.bin").write_bytes(b"\0" * 32)
        proto = simple()
        as_initializer(proto, external("t", "data.bin", [2**40, 2**20]))
        return optimize(saved(folder, proto))

    yield Case("external/dims-huge", huge, REFUSED)


def _link_to_link(folder: Path) -> str:
    (folder / "models" / "one").symlink_to("two")
    (folder / "models" / "two").symlink_to("../outside/secret.bin")
    return "one"


def _linked_folder(folder: Path) -> str:
    (folder / "models" / "inner").symlink_to(folder / "outside")
    return "inner/secret.bin"


def _dangling(folder: Path) -> str:
    (folder / "models" / "gone").symlink_to("nowhere")
    return "gone"


def _hard_link(folder: Path) -> str:
    os.link(folder / "outside" / "secret.bin", folder / "models" / "hard.bin")
    return "hard.bin"


def _socket(folder: Path) -> str:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(folder / "models")  # names of sockets are short
        try:
            server.bind("socket")
        finally:
            os.chdir(before)
    return "socket"
