"""Protobufs that say a thing twice, or in a place that nobody looks at: fields, types, shapes, functions, texts."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile_case import BOOL, FLOAT, INT64, REFUSED, Case, model, optimize, saved, simple
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
DONE = frozenset({0})
EITHER = frozenset({0, 3})  # read or refused; what counts is time, memory and what is shown
UNSUPPORTED = frozenset({0, 3, 5, 7})  # or there is no kernel for it
Command = Callable[[Path], list[str]]
COMMANDS: dict[str, Command] = {
    "optimize": optimize,
    "int8": lambda path: [*optimize(path), "--preset", "int8"],
    "inspect": lambda path: ["inspect", str(path)],
    "streams": lambda path: ["inspect", str(path), "--streams"],
    "counts": lambda path: ["inspect", str(path), "--counts", "--nodes"],
    "explain": lambda path: ["explain", str(path)],
    "verify": lambda path: ["verify", str(path), str(path)],
    "diff": lambda path: ["diff", str(path), str(path)],
    "bisect": lambda path: ["bisect", str(path)],
    "bench": lambda path: ["bench", str(path), "--rounds", "1", "--seconds", "0.01"],
    "json": lambda path: [*optimize(path), "--json"],
    "report": lambda path: [*optimize(path), "--report", "report.html"],
}


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (fields, types, shapes, nested, texts):
        yield from group()


def _bytes_case(name: str, data: bytes, expect: frozenset[int], command: str = "optimize") -> Case:
    def build(folder: Path) -> list[str]:
        path = folder / "models" / "m.onnx"
        path.write_bytes(data)
        return COMMANDS[command](path)

    return Case(name, build, expect)


def _case(name: str, proto: onnx.ModelProto, expect: frozenset[int], command: str = "optimize") -> Case:
    return Case(name, lambda folder: COMMANDS[command](saved(folder, proto)), expect)


# The wire format


def fields() -> Iterator[Case]:
    """Messages that are merged, overwritten or unknown: a reader may take the first, the last, or both."""
    good, other = simple(), model([node("Neg", ["x"], ["y"])], {"x": ["n", 8]}, {"y": ["n", 8]})
    data = good.SerializeToString()
    yield _bytes_case("field/two-graphs", data + other.SerializeToString(), REFUSED)
    yield _bytes_case("field/graph-twice", data + data, REFUSED)
    yield _bytes_case("field/unknown", data + _field(1000, b"x" * 1000), DONE)
    yield _bytes_case("field/unknown-large", data + _field(1000, b"x" * 50_000_000), EITHER)
    yield _bytes_case("field/unknown-group", data + bytes([0xF3, 0x01]) * 100_000, REFUSED)
    yield _bytes_case("field/nested-unknown", data + _deep(5000), EITHER)
    yield _bytes_case("field/trailing-zeros", data + b"\0" * 64, REFUSED)
    yield _bytes_case("field/varint-too-long", b"\x08" + b"\xff" * 20, REFUSED)
    yield _bytes_case("field/length-beyond", b"\x3a\xff\xff\xff\xff\x07", REFUSED)
    yield _bytes_case("field/ir-version-twice", data + b"\x08\x01" + b"\x08\x09", DONE)
    raw = simple()
    raw.graph.initializer[0].float_data.extend([1.0] * 64)
    yield _case("field/raw-and-typed-data", raw, EITHER)
    wrong = simple()
    wrong.graph.initializer[0].ClearField("raw_data")
    wrong.graph.initializer[0].int32_data.extend([1] * 64)
    yield _case("field/typed-data-of-another-type", wrong, REFUSED)
    location = simple()
    location.graph.initializer[0].data_location = TensorProto.EXTERNAL
    yield _case("field/external-without-entries", location, REFUSED)
    named = simple()
    named.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    yield _case("field/entries-without-external", named, EITHER)
    repeated = simple()
    for _ in range(50_000):
        repeated.graph.value_info.add().CopyFrom(repeated.graph.input[0])
    yield _case("field/value-info-50000", repeated, EITHER)
    conflicting = simple()
    for dtype, dims in ((INT64, [3]), (BOOL, []), (FLOAT, [2**40, 2**40])):
        conflicting.graph.value_info.append(helper.make_tensor_value_info("xw", dtype, dims))
    yield _case("field/value-info-contradicts", conflicting, EITHER)
    for place, where in {"model": simple(), "node": simple()}.items():
        target: Any = where if place == "model" else where.graph.node[0]
        for number in range(100_000 if place == "model" else 1000):
            target.metadata_props.add(key=f"k{number % 7}", value="v" * 100)
        yield _case(f"field/metadata-of-{place}", where, EITHER)
    annotated = simple()
    annotated.graph.quantization_annotation.add(tensor_name="ghost").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="nothing"
    )
    yield _case("field/quantization-of-nothing", annotated, EITHER)
    many = simple()
    many.graph.node[2].input[0] = ""
    many.graph.node[2].input.extend([""] * 100_000)
    yield _case("field/inputs-left-out-100000", many, REFUSED)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _deep(levels: int) -> bytes:
    inner = b""
    for _ in range(levels):
        inner = _field(1000, inner)
    return inner


# Types and shapes

NARROW = {
    "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8e5m2fnuz": TensorProto.FLOAT8E5M2FNUZ,
    "float8e8m0": TensorProto.FLOAT8E8M0,
    "float4e2m1": TensorProto.FLOAT4E2M1,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int2": TensorProto.INT2,
    "bfloat16": TensorProto.BFLOAT16,
    "complex64": TensorProto.COMPLEX64,
    "string": TensorProto.STRING,
}


def types() -> Iterator[Case]:
    """Dtypes that few have heard of, as inputs, weights and results of Cast; sequences, optionals and sparse types."""
    for number, (name, dtype) in enumerate(NARROW.items()):
        kinds = {"x": dtype, "y": dtype}
        through = model([node("Identity", ["x"], ["y"])], {"x": [3, 5]}, {"y": [3, 5]}, kinds=kinds, opset=25)
        through.ir_version = 13
        command = list(COMMANDS)[number % len(COMMANDS)]
        yield _case(f"dtype/input-{name}-{command}", through, UNSUPPORTED | {2, 6}, command)
        cast = model([node("Cast", ["x"], ["y"], to=dtype)], {"x": [3, 5]}, {"y": [3, 5]}, kinds={"y": dtype}, opset=25)
        cast.ir_version = 13
        yield _case(f"dtype/cast-{name}", cast, UNSUPPORTED)
        weight = model([node("Cast", ["w"], ["c"], to=FLOAT), node("Add", ["x", "c"], ["y"])],
                       {"x": [5]}, {"y": [3, 5]}, opset=25)  # fmt: skip
        weight.ir_version = 13
        tensor = weight.graph.initializer.add(name="w", data_type=dtype, dims=[3, 5])
        if dtype == TensorProto.STRING:
            tensor.string_data.extend([b"1"] * 7 + [b"\xff\xfe", b"nan"] + [b"1e999"] * 6)
        else:
            bits = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "bfloat16": 16, "complex64": 64}.get(name, 8)
            tensor.raw_data = b"\x7f" * -(-15 * bits // 8)
        yield _case(f"dtype/weight-{name}", weight, UNSUPPORTED)
    sequence = onnx.TypeProto()
    inner = sequence
    for _ in range(40):
        inner = inner.sequence_type.elem_type
    inner.tensor_type.elem_type = FLOAT
    deep = model([node("Identity", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    deep.graph.input[0].type.CopyFrom(sequence)
    deep.graph.output[0].type.CopyFrom(sequence)
    yield _case("dtype/sequence-of-40", deep, UNSUPPORTED)
    optional = model([node("Identity", ["x"], ["y"])], {"x": [2]}, {"y": [2]}, opset=18)
    for value in (optional.graph.input[0], optional.graph.output[0]):
        value.type.optional_type.elem_type.sequence_type.elem_type.tensor_type.elem_type = FLOAT
    yield _case("dtype/optional-of-sequence", optional, UNSUPPORTED)
    sparse = model([node("Identity", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    sparse.graph.input[0].type.sparse_tensor_type.elem_type = FLOAT
    yield _case("dtype/sparse-input", sparse, REFUSED)
    opaque = model([node("Identity", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    opaque.graph.input[0].type.map_type.key_type = INT64
    yield _case("dtype/map-input", opaque, REFUSED)


def shapes() -> Iterator[Case]:
    """Sizes and names of dims that a reader may compute with."""
    for name, dims in {
        "2^62": [2**62, 2**62],
        "negative": [-(2**62), 8],
        "zero-times-huge": [0, 2**62, 2**62],
        "power": ["9**9**9**9", 8],
        "code": ["__import__('os').system('touch owned')", 8],
        "division": ["n // 0", 8],
        "parentheses": ["(" * 10_000 + "n" + ")" * 10_000, 8],
        "sum": [" + ".join(["n"] * 10_000), 8],
        "product": ["*".join(["99999999999"] * 200), 8],
        "digits": ["9" * 5000, 8],
        "escape": ["\x1b[31m\u202e", 8],
        "markup": ["[red]<script>alert(1)</script>", 8],
        "empty-with-space": [" ", 8],
    }.items():
        declared = simple()
        declared.graph.value_info.append(helper.make_tensor_value_info("xw", FLOAT, dims))
        yield _case(f"dim/value-info-{name}", declared, EITHER)
        result = simple()
        result.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, dims))
        yield _case(f"dim/output-{name}", result, EITHER)
        given = simple()
        given.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, dims))
        for command in ("optimize", "inspect", "bench"):
            yield _case(f"dim/input-{name}-{command}", given, frozenset({0, 2, 3}), command)


# Nested graphs and functions


def nested() -> Iterator[Case]:
    """Sparse tensors, shadows and recursion in bodies."""
    for where in ("branch", "function", "branch-of-function"):
        for what in ("indices-outside", "huge", "values-twice"):
            yield _case(f"nested/sparse-{what}-in-{where}", _sparse(where, what), EITHER)
    for size in (2, 40):
        names = [f"F{i}" for i in range(size)]
        made = [
            helper.make_function("local", name, ["a"], ["o"], [node(following, ["a"], ["o"], domain="local")],
                                 [helper.make_opsetid("local", 1)])
            for name, following in zip(names, [*names[1:], names[0]], strict=True)
        ]  # fmt: skip
        call = node("F0", ["x"], ["y"], domain="local")
        circle = model([call], {"x": [2]}, {"y": [2]}, functions=made, domains=("local",))
        for command in ("optimize", "inspect", "diff"):
            yield _case(f"nested/circle-of-{size}-{command}", circle, REFUSED, command)
    branch = helper.make_graph([node("F", ["x"], ["o"], domain="local")], "b", [], [_float("o", [2])])
    recursive = helper.make_function(
        "local", "F", ["x"], ["o"], [node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)],
        [helper.make_opsetid("local", 1), helper.make_opsetid("", 17)],
    )  # fmt: skip
    recursive.node.insert(0, node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))))
    call = node("F", ["x"], ["y"], domain="local")
    yield _case("nested/recursion-in-a-branch",
                model([call], {"x": [2]}, {"y": [2]}, functions=[recursive], domains=("local",)), REFUSED)  # fmt: skip
    body = helper.make_graph([node("Scan", ["x"], ["o"], num_scan_inputs=0, body=helper.make_graph([], "e", [], []))],
                             "b", [], [_float("o", [2])])  # fmt: skip
    empty = model([node("If", ["c"], ["y"], then_branch=body, else_branch=body)], {"x": [2], "c": []}, {"y": [2]},
                  kinds={"c": BOOL})  # fmt: skip
    yield _case("nested/scan-of-nothing", empty, REFUSED)
    for attribute in ("graphs", "tensors", "type_protos", "sparse_tensors", "strings"):
        odd = simple()
        added = odd.graph.node[2].attribute.add(name="odd", type=getattr(onnx.AttributeProto, attribute.upper()))
        for _ in range(1000):
            getattr(added, attribute).append(b"x" * 1000) if attribute == "strings" else getattr(added, attribute).add()
        yield _case(f"nested/attribute-of-{attribute}", odd, REFUSED)
    steps = [node("Constant", [], [f"k{i}"], value_string=b"\x1b" * 100_000) for i in range(50)]
    texts_of = model([*steps, node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    yield _case("nested/constants-of-text", texts_of, EITHER)


def _float(name: str, dims: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, dims)


def _sparse(where: str, what: str) -> onnx.ModelProto:
    dims = [1 << 34] if what == "huge" else [8]
    indices = {"indices-outside": [99], "huge": [3], "values-twice": [3]}[what]
    values = numpy_helper.from_array(np.ones(1 + (what == "values-twice"), "f"), "s")
    sparse = helper.make_sparse_tensor(
        values, numpy_helper.from_array(np.array(indices * len(np.atleast_1d(values.dims[0])))), dims
    )
    constant = node("Constant", [], ["big"], sparse_value=sparse)
    total = node("ReduceSum", ["big"], ["o"], keepdims=1)
    imports = [helper.make_opsetid("", 17)]
    if where == "function":
        function = helper.make_function("local", "F", [], ["o"], [constant, total], imports)
        nodes = [node("F", [], ["o"], domain="local")]
    else:
        branch = helper.make_graph([constant, total], "b", [], [_float("o", [1])])
        choice = node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)
        nodes = [choice]
        if where == "branch-of-function":
            function = helper.make_function("local", "F", ["c"], ["o"], [choice], imports)
            nodes = [node("F", ["c"], ["o"], domain="local")]
    functions = [function] if "function" in where else []
    nodes.append(node("Add", ["x", "o"], ["y"]))
    return model(nodes, {"x": [2], "c": []}, {"y": [2]}, kinds={"c": BOOL}, functions=functions,
                 domains=("local",) if functions else ())  # fmt: skip


# Texts in every place that is shown

EVIL = "\x1b[2J\u202eevil\u2066\x9b31m\x07\r\n[red]</td><script>alert(1)</script>"


def texts() -> Iterator[Case]:
    """One text with everything that terminals and browsers obey, in every field that holds text."""
    commands = list(COMMANDS)
    for number, (place, put) in enumerate(PLACES.items()):
        for step in range(3):
            command = commands[(number * 5 + step * 4) % len(commands)]
            proto = simple()
            put(proto)
            yield _case(f"text/{place}-{command}", proto, frozenset({0, 2, 3, 4, 5, 7}), command)
    huge = simple()
    huge.doc_string = huge.producer_name = huge.domain = huge.graph.doc_string = "\x1b[31m" * 2_000_000
    for command in ("optimize", "inspect", "report", "json"):
        yield _case(f"text/megabytes-{command}", huge, EITHER, command)


def _everywhere(proto: onnx.ModelProto) -> None:
    proto.producer_name = proto.producer_version = proto.domain = proto.doc_string = EVIL
    proto.graph.name = proto.graph.doc_string = EVIL
    proto.metadata_props.add(key=EVIL, value=EVIL)
    for one in proto.graph.node:
        one.name, one.doc_string = EVIL + one.name, EVIL
        one.metadata_props.add(key=EVIL, value=EVIL)
    for dim in proto.graph.input[0].type.tensor_type.shape.dim:
        dim.denotation = EVIL
    proto.graph.input[0].type.denotation = EVIL
    proto.graph.input[0].doc_string = EVIL


def _op_type(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].op_type = EVIL


def _domain(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].domain = EVIL
    proto.opset_import.add(domain=EVIL, version=1)


def _opset(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain=EVIL, version=-(2**62))


def _attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute(EVIL, EVIL))


def _attribute_value(proto: onnx.ModelProto) -> None:
    proto.graph.node[2].op_type = "Gelu"
    proto.opset_import[0].version = 20
    proto.graph.node[2].attribute.append(helper.make_attribute("approximate", EVIL))


def _weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = EVIL
    proto.graph.initializer[0].raw_data = struct.pack("f", float("nan")) * 64


def _location(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].external_data.add(key="location", value=EVIL)


def _external_key(proto: onnx.ModelProto) -> None:
    _location(proto)
    proto.graph.initializer[0].external_data[0].value = "w.bin"
    proto.graph.initializer[0].external_data.add(key=EVIL, value=EVIL)
    proto.graph.initializer[0].external_data.add(key="checksum", value=EVIL)


def _function(proto: onnx.ModelProto) -> None:
    body = [node("Relu", ["a"], ["o"], EVIL)]
    function = helper.make_function(EVIL, EVIL, ["a"], ["o"], body, [helper.make_opsetid("", 17)])
    function.doc_string = EVIL
    proto.functions.append(function)
    proto.graph.node[2].op_type = proto.graph.node[2].domain = EVIL
    proto.opset_import.add(domain=EVIL, version=1)


def _overload(proto: onnx.ModelProto) -> None:
    _function(proto)
    proto.functions[0].overload = proto.graph.node[2].overload = EVIL
    proto.functions[0].opset_import[0].version = 11


def _dim(proto: onnx.ModelProto) -> None:
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = EVIL


def _names(proto: onnx.ModelProto) -> None:
    for one in proto.graph.node:
        one.input[:] = [EVIL + name for name in one.input]
        one.output[:] = [EVIL + name for name in one.output]
        one.name = EVIL + one.name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.name = EVIL + value.name


PLACES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "everywhere": _everywhere,
    "op-type": _op_type,
    "domain": _domain,
    "opset": _opset,
    "attribute": _attribute,
    "attribute-value": _attribute_value,
    "weight": _weight,
    "location": _location,
    "external-key": _external_key,
    "function": _function,
    "overload": _overload,
    "dim": _dim,
    "names": _names,
}
