"""Runs in verification end: in time and in memory, with the name of the limit."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import xform
from xform.errors import LimitError
from xform.pipeline.oracle import Session

F, I64, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
node, info = helper.make_node, helper.make_tensor_value_info


def model(nodes: list[Any], outputs: list[Any], weights: dict[str, Any]) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [info("x", F, ["n"])], outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def endless() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", ["c"], ["d"]), node("Add", ["v", "v"], ["w"])],
        "body",
        [info("i", I64, []), info("c", B, []), info("v", F, ["n"])],
        [info("d", B, []), info("w", F, ["n"])],
    )
    return model([node("Loop", ["", "go", "x"], ["y"], body=body)], [info("y", F, ["n"])], {"go": True})


def test_an_endless_loop_ends_with_the_limits_name() -> None:
    start = time.monotonic()
    with pytest.raises(LimitError) as caught:
        xform.optimize(endless(), limits={"seconds": 0.5})
    assert caught.value.limit == "seconds" and caught.value.exit_code == 3
    assert time.monotonic() - start < 30


def tail(big: str) -> list[Any]:
    return [node("ReduceSum", [big], ["s"], keepdims=0), node("Add", ["x", "s"], ["y"])]


def computed_size() -> onnx.ModelProto:
    """The size is the result of a power, which no shape inference follows."""
    nodes = [node("Pow", ["two", "e"], ["k"]), node("ConstantOfShape", ["k"], ["big"]), *tail("big")]
    return model(nodes, [info("y", F, ["n"])], {"two": np.array([2]), "e": np.array([38])})


def size_from_input() -> onnx.ModelProto:
    nodes = [node("Shape", ["x"], ["h"]), node("Mul", ["h", "m"], ["k"]), node("Expand", ["o", "k"], ["big"])]
    return model([*nodes, *tail("big")], [info("y", F, ["n"])], {"m": np.array([1 << 36]), "o": np.ones(1, "f")})


@pytest.mark.parametrize("make", [computed_size, size_from_input])
def test_memory_is_refused_before_it_is_taken(make: Any) -> None:
    with pytest.raises(LimitError) as caught:
        xform.optimize(make())
    assert caught.value.limit == "memory"


def test_a_raised_limit_lets_the_model_through() -> None:
    nodes = [node("Shape", ["x"], ["h"]), node("Mul", ["h", "m"], ["k"]), node("Expand", ["o", "k"], ["big"])]
    proto = model([*nodes, *tail("big")], [info("y", F, ["n"])], {"m": np.array([1 << 12]), "o": np.ones(1, "f")})
    with pytest.raises(LimitError):
        xform.optimize(proto, limits={"memory": 1 << 12})
    assert xform.optimize(proto, limits={"memory": 1 << 24}).report.verification.passed


def test_runs_of_several_threads_do_not_take_each_others_memory() -> None:
    """All share one arena; they take turns in it, so that one is not refused for what another one holds."""
    nodes = [node("Shape", ["x"], ["h"]), node("Mul", ["h", "m"], ["k"]), node("Expand", ["o", "k"], ["big"])]
    proto = model([*nodes, *tail("big")], [info("y", F, ["n"])], {"m": np.array([1 << 22]), "o": np.ones(1, "f")})
    errors: list[BaseException] = []

    def work() -> None:
        try:
            xform.optimize(proto)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def of_unknown_sizes(layers: int) -> onnx.ModelProto:
    """Sums of values whose sizes nobody writes down, each read once more a layer later."""
    nodes = []
    for layer in range(layers):
        nodes.append(node("Sigmoid", [f"v{layer}"], [f"s{layer}"]))
        nodes.append(node("Add", [f"s{layer}", "x"], [f"v{layer + 1}"]))
    nodes[0].input[0] = "x"
    inputs, outputs = [info("x", F, [None, None])], [info(f"v{layers}", F, [None, None])]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )


def seconds_to_load(layers: int) -> float:
    proto = of_unknown_sizes(layers)
    start = time.process_time()
    Session(proto).close()
    return time.process_time() - start


def test_a_large_graph_of_unknown_sizes_loads_at_once() -> None:
    assert seconds_to_load(4000) < 10  # 0.3 s; a minute where the runtime plans what memory to reuse
