"""Small models, and passes with planted errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from xform.rewrite.passes import Pass, PassContext, RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.rule import Rule


def build_chain(length: int = 6, width: int = 8, dims: tuple[object, ...] = ("batch", 8)) -> ir.Model:
    """x -> (MatMul, Add, Relu) * length -> y with random weights, nodes named block0/add and so on."""
    rng = np.random.default_rng(7)
    x = ir.Value(name="x", shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def weight(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array.astype(np.float32), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        initializers.append(value)
        return value

    def emit(op_type: str, name: str, *inputs: ir.Value) -> ir.Value:
        node = ir.Node("", op_type, inputs, name=name)
        node.outputs[0].name = name + "_out"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        return node.outputs[0]

    value = x
    for i in range(length):
        product = emit("MatMul", f"block{i}/matmul", value, weight(f"w{i}", rng.normal(size=(width, width)) / 2))
        total = emit("Add", f"block{i}/add", product, weight(f"b{i}", rng.normal(size=width)))
        value = emit("Tanh", f"block{i}/tanh", total)
    value.name = "y"
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="chain")
    model = ir.Model(graph, ir_version=10)
    model.meta["xform.source_opset"] = 17
    return model


class SwapAdd(Rule):
    """Add(a, b) -> Sum(a, b), right."""

    name = "add_to_sum"
    a, b = var("a"), var("b")
    pattern = op("Add", a, b)

    def rewrite(self, match, build):
        return build.op("Sum", match[self.a], match[self.b])


class WrongAdd(SwapAdd):
    """Like SwapAdd, and wrong at the node whose name ends in `bad`: its sum is half too large."""

    name = "wrong_add"

    def __init__(self, bad: str = "block3/add") -> None:
        self.bad = bad

    def rewrite(self, match, build):
        total = build.op("Sum", match[self.a], match[self.b])
        if match.roots[0].producer().name == self.bad:
            return build.op("Mul", total, 1.5)
        return total


@dataclass(frozen=True)
class AddToSum(RewritePass):
    name: ClassVar[str] = "add_to_sum"

    def rules(self) -> Sequence[Rule]:
        return [SwapAdd()]


@dataclass(frozen=True)
class PlantedRule(RewritePass):
    """A rewriting pass whose fourth application is wrong."""

    name: ClassVar[str] = "planted_rule"

    def rules(self) -> Sequence[Rule]:
        return [WrongAdd()]


@dataclass(frozen=True)
class PlantedPlain(Pass):
    """A pass without rules that turns one Tanh into a Sigmoid."""

    name: ClassVar[str] = "planted_plain"
    node: str = "block2/tanh"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        for node in model.graph:
            if node.name == self.node:
                node.op_type = "Sigmoid"
                return True
        return False


@dataclass(frozen=True)
class Raising(Pass):
    """A pass that damages the graph and then raises."""

    name: ClassVar[str] = "raising"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        model.graph[0].op_type = "NoSuchOperator"
        raise RuntimeError("planted")


@dataclass(frozen=True)
class Unsorted(Pass):
    """A pass that leaves the graph unsorted."""

    name: ClassVar[str] = "unsorted"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        first = model.graph[0]
        model.graph.remove(first)
        model.graph.append(first)
        return True


@dataclass(frozen=True)
class Renaming(Pass):
    """A pass that renames an output."""

    name: ClassVar[str] = "renaming"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        model.graph.outputs[0].name = "z"
        return True


class Planted:
    """The passes above, for tests."""

    chain = staticmethod(build_chain)
    AddToSum = AddToSum
    Rule = PlantedRule
    Plain = PlantedPlain
    Raising = Raising
    Unsorted = Unsorted
    Renaming = Renaming


@pytest.fixture
def planted() -> type[Planted]:
    return Planted
