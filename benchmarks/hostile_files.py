"""Files that mean harm: what they read, how much they ask for, and what they are named."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile_case import REFUSED, Case, optimize, saved
from hostile_invalid import BOOL, FLOAT, INT64, invalid, model
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
Put = Callable[[onnx.ModelProto, TensorProto], None]  # hides a tensor somewhere in a model


def simple() -> onnx.ModelProto:
    """y = relu(x @ w + b); x has a dynamic batch."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((8, 8)).astype("f"), "b": rng.standard_normal(8).astype("f")}
    nodes = [
        node("MatMul", ["x", "w"], ["xw"], "product"),
        node("Add", ["xw", "b"], ["s"], "sum"),
        node("Relu", ["s"], ["y"], "act"),
    ]
    return model(nodes, {"x": ["batch", 8]}, {"y": ["batch", 8]}, weights)


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (
        external_data, hidden_tensors, wrong_kinds, damaged, invalid_models, functions, bombs, names,
    ):  # fmt: skip
        yield from group()


# Where a tensor can hide


def _external(name: str, location: str, dims: list[int], **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(dims)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _as_initializer(proto: onnx.ModelProto, tensor: TensorProto) -> None:
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
    "initializer": _as_initializer,
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
                put(proto, _external("t", _bad_location(folder, kind), [8]))
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
            _as_initializer(proto, _external("t", locate(folder), [8]))
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
            _as_initializer(proto, _external("t", "data.bin", [8], **entry))
            return optimize(saved(folder, proto))

        yield Case(f"external/{name}", build_entry, REFUSED)

    def huge(folder: Path) -> list[str]:
        (folder / "models" / "data.bin").write_bytes(b"\0" * 32)
        proto = simple()
        _as_initializer(proto, _external("t", "data.bin", [2**40, 2**20]))
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


# Files of other kinds, and damaged ones


def wrong_kinds() -> Iterator[Case]:
    """What is not an ONNX model."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(1))
    contents: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello",
        "html": b"<html></html>",
        "json": b'{"a": 1}',
        "zeros": b"\0" * 1000,
        "ones": b"\xff" * 1000,
        "gzip": gzip.compress(simple().SerializeToString()),
        "pickle": pickle.dumps(_Evil()),
        "zip": archive.getvalue(),
        "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "graph-only": simple().graph.SerializeToString(),
        "tensor-only": simple().graph.initializer[0].SerializeToString(),
        "safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "ort": b"\0\0\0\0ORTM" + b"\0" * 64,
        "escape": b"\x1b[2J\x1b]0;owned\x07",
    }
    for name, data in contents.items():

        def build(folder: Path, data: bytes = data) -> list[str]:
            path = folder / "models" / "m.onnx"
            path.write_bytes(data)
            return optimize(path)

        yield Case(f"kind/{name}", build, REFUSED)
    for name, make in {"folder": os.mkdir, "fifo": os.mkfifo}.items():

        def build_node(folder: Path, make: Callable[[Path], None] = make) -> list[str]:  # type: ignore[assignment]
            make(folder / "models" / "m.onnx")
            return optimize(folder / "models" / "m.onnx")

        yield Case(f"kind/{name}", build_node, frozenset({2, 3}))
    for name, path in {"dev-null": "/dev/null", "dev-zero": "/dev/zero", "missing": "missing.onnx"}.items():
        yield Case(f"kind/{name}", lambda folder, path=path: optimize(Path(path)), frozenset({2, 3}))


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def damaged() -> Iterator[Case]:
    """Truncated and bit-flipped models: refused, or (where the flip changes a weight) done."""
    data = simple().SerializeToString()
    for number, length in enumerate(np.linspace(1, len(data) - 1, 24).astype(int)):

        def build(folder: Path, length: int = int(length)) -> list[str]:
            path = folder / "models" / "m.onnx"
            path.write_bytes(data[:length])
            return optimize(path)

        yield Case(f"truncated/{number}", build, REFUSED)
    rng = np.random.default_rng(7)
    for number in range(48):
        flips = rng.integers(0, len(data) * 8, size=1 + number % 4)

        def build_flips(folder: Path, flips: Any = flips) -> list[str]:
            changed = bytearray(data)
            for bit in flips:
                changed[bit // 8] ^= 1 << int(bit % 8)
            path = folder / "models" / "m.onnx"
            path.write_bytes(changed)
            return optimize(path)

        # a flipped bit may leave a model that is fine, that computes infinities, or that is none
        yield Case(f"flipped/{number}", build_flips, frozenset({0, 3, 5, 7}))


def invalid_models() -> Iterator[Case]:
    """Every model of `hostile_invalid`, verified or not."""
    for number, (name, proto) in enumerate(invalid()):
        verify = "off" if number % 3 else "final"
        expect = frozenset({0, 3}) if name == "graphs/output-listed-twice" else REFUSED
        data = proto.SerializeToString()

        def build(folder: Path, data: bytes = data, verify: str = verify) -> list[str]:
            path = folder / "models" / "m.onnx"
            path.write_bytes(data)
            return [*optimize(path), "--verify", verify]

        yield Case(f"invalid/{name}", build, expect)


def functions() -> Iterator[Case]:
    """Functions that mean two things, or nothing."""

    def called(domain: str, name: str, body: str, opset: int = 17, own: int = 17, **attributes: Any) -> Any:
        function = helper.make_function(
            domain, name, ["a"], ["o"], [node(body, ["a"], ["o"], **attributes)], [helper.make_opsetid("", own)]
        )
        domains = (domain,) if domain else ()
        call = [node(name, ["x"], ["y"], "call", domain=domain)]
        shape: dict[str, Any] = {"opset": opset, "functions": [function], "domains": domains}
        return model(call, {"x": [2, 3, 4]}, {"y": [2, 3, 4]}, **shape)

    protos = {
        "named-relu": called("", "Relu", "Neg"),
        "named-relu-ai.onnx": called("ai.onnx", "Relu", "Neg"),
        "named-like-the-runtime's": called("com.microsoft", "Gelu", "Neg"),
        "older-softmax": called("local", "F", "Softmax", own=11, axis=1),
        "newer-softmax": called("local", "F", "Softmax", opset=11, own=17, axis=1),
        "newer-operator": called("local", "F", "Gelu", own=20),
        "calls-itself": called("local", "F", "Neg"),
        "twice": called("local", "F", "Neg"),
        "overload": called("local", "F", "Neg"),
        "more-inputs": called("local", "F", "Neg"),
        "more-outputs": called("local", "F", "Neg"),
        "not-imported": called("local", "F", "Neg"),
    }
    protos["calls-itself"].functions[0].node[0].op_type = "F"
    protos["calls-itself"].functions[0].node[0].domain = "local"
    protos["twice"].functions.append(protos["twice"].functions[0])
    protos["overload"].functions[0].overload = "other"
    protos["more-inputs"].graph.node[0].input.append("x")
    protos["more-outputs"].graph.node[0].output.append("z")
    del protos["not-imported"].opset_import[1]
    for name, proto in protos.items():
        yield Case(f"function/{name}", lambda folder, proto=proto: optimize(saved(folder, proto)), REFUSED)


# Bombs


def bombs() -> Iterator[Case]:
    """A kilobyte that asks for gigabytes or hours. Without verification, what is not computed may pass."""
    for name, proto, expect in _bombs():
        for verify in ("off", "final"):

            def build(folder: Path, proto: onnx.ModelProto = proto, verify: str = verify) -> list[str]:
                return [*optimize(saved(folder, proto)), "--verify", verify]

            allowed = expect if verify == "final" else expect | {0}
            yield Case(f"bomb/{name}-{verify}", build, allowed)


def _bombs() -> Iterator[tuple[str, onnx.ModelProto, frozenset[int]]]:
    x = {"x": ["n"]}
    tail = [node("ReduceSum", ["big"], ["s"], keepdims=0), node("Add", ["x", "s"], ["y"])]
    cast = [node("Cast", ["huge"], ["big"], to=FLOAT), *tail]
    one_float, vector = np.ones(1, "f"), np.arange(64, dtype=np.int64)
    doubles = [node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(40)]
    last = [node("Identity", ["c40"], ["huge"]), *cast]
    yield "concat-constant", model([*doubles, *last], x, {"y": ["n"]}, {"c0": vector}), REFUSED
    yield "concat-float", model([*doubles, *last], x, {"y": ["n"]}, {"c0": one_float}), REFUSED
    yield "concat-shape", model([node("Shape", ["x"], ["c0"]), *doubles, *last], x, {"y": ["n"]}), REFUSED
    tiled = [node("Tile", [f"c{i}", "r"], [f"c{i + 1}"]) for i in range(12)]
    final = [node("Identity", ["c12"], ["big"]), *tail]
    yield "tile", model([*tiled, *final], x, {"y": ["n"]}, {"c0": one_float, "r": np.array([10])}), REFUSED
    for size in (1 << 30, 1 << 36, 1 << 62):
        filled = [node("ConstantOfShape", ["k"], ["big"]), *tail]
        expanded = [node("Expand", ["o", "k"], ["big"]), *tail]
        sizes = {"k": np.array([size])}
        yield f"constantofshape-{size}", model(filled, x, {"y": ["n"]}, sizes), REFUSED
        yield f"expand-{size}", model(expanded, x, {"y": ["n"]}, {**sizes, "o": one_float}), REFUSED
    limits = {"a": np.int64(0), "b": np.int64(1 << 40), "d": np.int64(1)}
    yield "range", model([node("Range", ["a", "b", "d"], ["huge"]), *cast], x, {"y": ["n"]}, limits), REFUSED
    pads = {"p": np.array([0, 1 << 40]), "o": one_float}
    yield "pad", model([node("Pad", ["o", "p"], ["big"]), *tail], x, {"y": ["n"]}, pads), REFUSED
    yield "resize", model(
        [node("Resize", ["o", "", "k"], ["big"]), *tail], x, {"y": ["n"]}, {"o": one_float, "k": np.float32([1e10])}
    ), frozenset({3, 5})  # fmt: skip
    hot = {"i": np.zeros(1, np.int64), "k": np.array([1 << 40]), "v": np.float32([0, 1])}
    yield "onehot", model([node("OneHot", ["i", "k", "v"], ["big"]), *tail], x, {"y": ["n"]}, hot), REFUSED
    yield "eyelike", model(
        [node("ConstantOfShape", ["k"], ["e"]), node("EyeLike", ["e"], ["big"]), *tail], x, {"y": ["n"]},
        {"k": np.array([1 << 20, 1 << 20])}), REFUSED  # fmt: skip
    power = {"b": np.array([2]), "e": np.array([38])}
    yield "computed-size", model(
        [node("Pow", ["b", "e"], ["k"]), node("ConstantOfShape", ["k"], ["big"]), *tail], x, {"y": ["n"]}, power
    ), REFUSED  # fmt: skip
    yield "computed-from-input", model(
        [node("Shape", ["x"], ["h"]), node("Mul", ["h", "m"], ["k"]), node("Expand", ["o", "k"], ["big"]), *tail],
        x, {"y": ["n"]}, {"m": np.array([1 << 36]), "o": one_float}), REFUSED  # fmt: skip
    yield "outer-product", model(
        [node("MatMul", ["c", "r"], ["big"]), *tail], {**x, "c": [10**6, 1], "r": [1, 10**6]}, {"y": ["n"]}
    ), REFUSED  # fmt: skip
    for count in (1, 8, 64):
        proto = model([node("Gather", ["w0", "x"], ["y"])], {"x": [2]}, {"y": [2]}, kinds={"x": INT64})
        for i in range(count):
            sparse = proto.graph.sparse_initializer.add(dims=[1 << 28])
            sparse.values.CopyFrom(numpy_helper.from_array(one_float, f"w{i}"))
            sparse.indices.CopyFrom(numpy_helper.from_array(np.array([3]), f"i{i}"))
        yield f"sparse-{count}", proto, REFUSED
    for levels, width in ((8, 10), (30, 2), (5, 20)):
        yield f"functions-{levels}-{width}", _function_bomb(levels, width), REFUSED
    yield "functions-deep", _function_bomb(2000, 1), REFUSED
    yield "nested-30", _nested(30), frozenset({0, 3})
    yield "loop-endless", _loop(condition=True), REFUSED
    yield "loop-2^60", _loop(condition=False), REFUSED
    yield "loop-growing", _loop(condition=True, grow=True), REFUSED
    outputs = {f"c{i}": [1 << 25] for i in range(40)}
    expands = [node("Expand", ["o", "k"], [name]) for name in outputs]
    yield "many-outputs", model(expands, {"x": [2]}, outputs, {"k": np.array([1 << 25]), "o": one_float}), REFUSED
    yield "input-2^28", model([node("Relu", ["x"], ["y"])], {"x": [1 << 28]}, {"y": [1 << 28]}), frozenset({0, 3})
    yield "input-2^60", model([node("Relu", ["x"], ["y"])], {"x": [1 << 60]}, {"y": [1 << 60]}), frozenset({0, 3})
    yield "rank-1000", model([node("Relu", ["x"], ["y"])], {"x": [1] * 1000}, {"y": [1] * 1000}), frozenset({0, 3, 5})
    broad = model([node("Add", ["x", "w"], ["y"])], {"x": [1]}, {"y": None}, {"w": one_float})
    broad.graph.initializer[0].dims[:] = [1] * 100_000
    yield "weight-of-100000-axes", broad, REFUSED


def _function_bomb(levels: int, width: int) -> onnx.ModelProto:
    made = []
    for level in range(levels):
        domain, name = ("", "Neg") if level == 0 else ("local", f"F{level - 1}")
        ends = ["a", *(f"t{i}" for i in range(width - 1)), "o"]
        body = [node(name, [ends[i]], [ends[i + 1]], domain=domain) for i in range(width)]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        made.append(helper.make_function("local", f"F{level}", ["a"], ["o"], body, imports))
    call = node(f"F{levels - 1}", ["x"], ["y"], domain="local")
    return model([call], {"x": [2]}, {"y": [2]}, functions=made, domains=("local",))


def _nested(depth: int) -> onnx.ModelProto:
    out = [helper.make_tensor_value_info("o", FLOAT, [2])]
    graph = helper.make_graph([node("Identity", ["x"], ["o"])], "g0", [], out)
    for level in range(depth):
        one = node("If", ["c"], ["o"], then_branch=graph, else_branch=helper.make_graph(
            [node("Neg", ["x"], ["o"])], f"e{level}", [], out))  # fmt: skip
        graph = helper.make_graph([one], f"g{level + 1}", [], out)
    top = graph.node[0]
    top.output[0] = "y"
    return model([top], {"x": [2], "c": []}, {"y": [2]}, kinds={"c": BOOL})


def _loop(*, condition: bool, grow: bool = False) -> onnx.ModelProto:
    step = node("Concat", ["v", "v"], ["w"], axis=0) if grow else node("Add", ["v", "v"], ["w"])
    shape: list[Any] = [None] if grow else [2]
    body = helper.make_graph(
        [node("Identity", ["c"], ["d"]), step],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("c", BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, shape),
        ],
        [helper.make_tensor_value_info("d", BOOL, []), helper.make_tensor_value_info("w", FLOAT, shape)],
    )
    trips = "" if condition else "trips"
    weights = {"start": np.array(True), "trips": np.int64(1 << 60)}
    return model([node("Loop", [trips, "start", "x"], ["y"], body=body)], {"x": [2]}, {"y": shape}, weights)


# Names

NAMES: dict[str, str] = {
    "escape": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "newline": "a\nerror: all is well",
    "return": "a\rb",
    "bell": "\x07",
    "c1": "\x9b31m",
    "backspace": "abc\b\b\bxyz",
    "null": "a\0b",
    "bidi": "\u202eabc",
    "zero-width": "a\u200bb",
    "separator": "a\u2028b",
    "delete": "a\x7fb",
    "markup": "[red]x[/red]",
    "path": "../../outside/owned",
    "percent": "%s%n{0}",
    "emoji": "\U0001f600",
    "space": " ",
    "megabytes": "n" * 10_000_000,
}


def names() -> Iterator[Case]:
    """Names that a terminal or a file system would obey."""
    commands = (["optimize"], ["inspect"], ["explain"], ["verify"], ["diff"], ["bench"], ["bisect"])
    for number, (name, text) in enumerate(NAMES.items()):
        for where in ("node", "value"):
            command = commands[(number + (where == "value") * 3) % len(commands)]

            def build(folder: Path, where: str = where, text: str = text, command: list[str] = command) -> list[str]:
                path = saved(folder, _named(where, text))
                if command == ["optimize"]:
                    return optimize(path)
                if command in (["verify"], ["diff"]):
                    return [*command, str(path), str(path)]
                return [*command, str(path), *(["--rounds", "1"] if command == ["bench"] else [])]

            yield Case(f"name/{where}-{name}", build, frozenset({0, 2, 3, 5}))

        def build_error(folder: Path, text: str = text) -> list[str]:
            proto = _named("node", text)
            proto.graph.node[0].attribute.append(helper.make_attribute("frobnicate", text))
            return optimize(saved(folder, proto))

        yield Case(f"name/error-{name}", build_error, REFUSED)


def _named(where: str, text: str) -> onnx.ModelProto:
    proto = simple()
    if where == "node":
        for number, one in enumerate(proto.graph.node):
            one.name = f"{text}{number}"
        proto.graph.name = text
        return proto
    for one in proto.graph.node:
        one.input[:] = [text if name == "x" else text + name for name in one.input]
        one.output[:] = [text + name for name in one.output]
    for tensor in proto.graph.initializer:
        tensor.name = text + tensor.name
    proto.graph.input[0].name = text
    proto.graph.output[0].name = text + "y"
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = text
    return proto
