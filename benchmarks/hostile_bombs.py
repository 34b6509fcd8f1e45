"""A kilobyte that asks for gigabytes or hours, and functions that mean two things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile_case import BOOL, FLOAT, INT64, REFUSED, Case, model, optimize, saved
from onnx import helper, numpy_helper

node = helper.make_node


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (functions, bombs):
        yield from group()


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
