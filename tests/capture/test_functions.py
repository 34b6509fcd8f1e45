"""Functions of a model: what they expand to, and that every runtime agrees on what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_support import assert_same, refusal, run, value

from xform import limits
from xform.capture.onnx_file import capture_onnx
from xform.errors import LimitError
from xform.graph.write import to_bytes

node = helper.make_node
X = {"x": np.random.default_rng(5).standard_normal((2, 3, 4)).astype(np.float32)}


def called(domain: str, name: str, body: str, *, opset: int = 17, own: int = 17, **attributes: Any) -> onnx.ModelProto:
    """y = domain.name(x), whose body is one operator."""
    function = helper.make_function(
        domain, name, ["a"], ["o"], [node(body, ["a"], ["o"], **attributes)], [helper.make_opsetid("", own)]
    )
    call = node(name, ["x"], ["y"], "call", domain=domain)
    graph = helper.make_graph([call], "g", [value("x", [2, 3, 4])], [value("y", [2, 3, 4])])
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)


@pytest.mark.parametrize(("opset", "own"), [(17, 11), (11, 17)])
def test_an_opset_of_its_own_under_which_an_operator_differs_is_refused(opset: int, own: int) -> None:
    """Softmax-11 flattens, Softmax-13 does not: ONNX Runtime takes the model's version, others the function's."""
    text = refusal(called("local", "F", "Softmax", opset=opset, own=own, axis=1))
    assert "Softmax changed" in text


@pytest.mark.parametrize(("opset", "own"), [(17, 13), (13, 17), (17, 17)])
def test_an_opset_of_its_own_under_which_nothing_differs_is_computed(opset: int, own: int) -> None:
    proto = called("local", "F", "Softmax", opset=opset, own=own, axis=1)
    assert_same(capture_onnx(proto), proto, X)


def test_an_operator_that_the_models_opset_does_not_have() -> None:
    assert "Gelu changed" in refusal(called("local", "F", "Gelu", own=20))


@pytest.mark.parametrize(("domain", "name"), [("", "Relu"), ("ai.onnx", "Relu"), ("com.microsoft", "Gelu")])
def test_a_function_named_like_an_operator_is_refused(domain: str, name: str) -> None:
    """ONNX Runtime computes the operator, onnx's reference computes the function."""
    assert "is named like the operator" in refusal(called(domain, name, "Neg"))


def test_overloads_are_told_apart() -> None:
    proto = called("local", "F", "Neg")
    other = proto.functions.add()
    other.CopyFrom(proto.functions[0])
    other.overload = "abs"
    other.node[0].op_type = "Abs"
    proto.graph.node[0].overload = "abs"
    (got,) = run(to_bytes(capture_onnx(proto)), X)
    np.testing.assert_array_equal(got, np.abs(X["x"]))
    proto.graph.node[0].overload = "none"
    assert "F" in refusal(proto)


def test_two_functions_of_one_name() -> None:
    proto = called("local", "F", "Neg")
    proto.functions.append(proto.functions[0])
    assert "two functions" in refusal(proto)


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_calls_with_more_than_the_function_has(what: str) -> None:
    proto = called("local", "F", "Neg")
    (proto.graph.node[0].input if what == "inputs" else proto.graph.node[0].output).append(
        "x" if what == "inputs" else "z"
    )
    assert f"a node has 2 {what}" in refusal(proto)


def bomb(levels: int, width: int) -> onnx.ModelProto:
    """Functions that call the next one `width` times in a row."""
    proto = called("local", "F0", "Neg")
    del proto.functions[:]
    for level in range(levels):
        domain, name = ("", "Neg") if level == 0 else ("local", f"F{level - 1}")
        ends = ["a", *(f"t{i}" for i in range(width - 1)), "o"]
        body = [node(name, [ends[i]], [ends[i + 1]], domain=domain) for i in range(width)]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        proto.functions.append(helper.make_function("local", f"F{level}", ["a"], ["o"], body, imports))
    proto.graph.node[0].op_type = f"F{levels - 1}"
    return proto


def test_functions_that_multiply_are_counted_and_not_expanded() -> None:
    with pytest.raises(LimitError) as caught:
        capture_onnx(bomb(8, 10))
    assert caught.value.limit == "nodes" and "100,000,000" in str(caught.value)
    with limits.limited(limits.limits_of({"nodes": 10})), pytest.raises(LimitError):
        capture_onnx(bomb(3, 10))
    assert len(list(capture_onnx(bomb(3, 10)).graph)) == 1000


def test_functions_that_call_each_other_for_ever_or_too_deep() -> None:
    with pytest.raises(LimitError) as caught:
        capture_onnx(bomb(200, 1))
    assert caught.value.limit == "depth"
    proto = bomb(2, 1)
    proto.functions[0].node[0].op_type, proto.functions[0].node[0].domain = "F1", "local"
    assert "calls itself" in refusal(proto)


def test_an_attribute_from_a_caller_that_there_is_none_of() -> None:
    graph = helper.make_graph([node("Softmax", ["x"], ["y"])], "g", [value("x", [2, 3])], [value("y", [2, 3])])
    graph.node[0].attribute.add(name="axis", type=onnx.AttributeProto.INT, ref_attr_name="axis")
    text = refusal(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert "attribute from a caller" in text and TensorProto is not None
