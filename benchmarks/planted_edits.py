"""How the wrong rewrites of `planted.py` are made: edits of a graph, each with one mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from xform.rewrite.passes import Pass, PassContext

Edit = Callable[[ir.Model], bool]  # makes the mistake; whether it had the occasion to
HEAD = '<ir_version: 10, opset_import: ["" : 20]>'


@dataclass(frozen=True)
class Plant:
    """One mistake.

    Attributes:
        name: What is wrong.
        kind: The class of mistakes that it stands for.
        text: The graph in ONNX's text form, without its head.
        edit: The mistake.
        weights: Initializers by name; a float array of random numbers for a shape.
    """

    name: str
    kind: str
    text: str
    edit: Edit
    weights: tuple[tuple[str, Any], ...] = ()

    def graph(self, seed: int = 0) -> onnx.ModelProto:
        """The graph, with weights from a generator of its own."""
        rng = np.random.default_rng([seed, len(self.name)])
        proto = onnx.parser.parse_model(f"{HEAD} {self.text}")
        for name, given in self.weights:
            array = rng.normal(size=given).astype(np.float32) if isinstance(given, tuple) else np.asarray(given)
            if array.dtype == np.float64:
                array = array.astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return proto


@dataclass(frozen=True)
class Mistake(Pass):
    """The pass of a plant."""

    name: ClassVar[str] = "planted"
    plant: Plant
    happened: list[bool] = field(default_factory=list)

    def run(self, model: ir.Model, context: PassContext) -> bool:
        """Make the mistake once."""
        done = self.plant.edit(model)
        self.happened.append(done)
        return done


def nodes(model: ir.Model, op: str) -> Iterator[ir.Node]:
    """Nodes of an operator, subgraphs included."""
    return iter([node for node in model.graph.all_nodes() if node.op_type == op])


def attribute(op: str, **changed: Any) -> Edit:
    """Other attributes for every node of an operator."""

    def edit(model: ir.Model) -> bool:
        found = list(nodes(model, op))
        for node in found:
            for name, value in changed.items():
                node.attributes[name] = ir.convenience.convert_attribute(name, value)
        return bool(found)

    return edit


def operator(op: str, other: str, **attributes: Any) -> Edit:
    """Another operator in place of one."""

    def edit(model: ir.Model) -> bool:
        found = list(nodes(model, op))
        for node in found:
            node.op_type = other
            for name, value in attributes.items():
                node.attributes[name] = ir.convenience.convert_attribute(name, value)
        return bool(found)

    return edit


def number(name: str, change: Callable[[np.ndarray], Any]) -> Edit:
    """Another initializer in place of the one called so."""

    def edit(model: ir.Model) -> bool:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        old = value.const_value.numpy()
        new = np.asarray(change(old)).astype(old.dtype)
        value.const_value = ir.tensor(new, name=name)
        value.shape = ir.Shape(new.shape)
        return True

    return edit


def inputs(op: str, *order: int) -> Edit:
    """The inputs of every node of an operator in another order, repeated or left out."""

    def edit(model: ir.Model) -> bool:
        found = list(nodes(model, op))
        for node in found:
            old = list(node.inputs)
            node.resize_inputs(len(order))
            for place, source in enumerate(order):
                node.replace_input_with(place, old[source])
        return bool(found)

    return edit


def bypass(op: str, position: int = 0) -> Edit:
    """What reads a node of an operator reads one of its inputs instead."""

    def edit(model: ir.Model) -> bool:
        found = list(nodes(model, op))
        for node in found:
            source = node.inputs[position]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
        return bool(found)

    return edit


def after(name: str, text: str, **weights: Any) -> Edit:
    """What reads a value reads something computed from it instead.

    Args:
        name: The value.
        text: Assignments "a = Op<..>(x, b)" in ONNX's text form; x is the value, y what replaces it. Other values of
            the graph and `weights` are known by name.
    """

    def edit(model: ir.Model) -> bool:
        values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
        value = next(value for value in values if value.name == name)
        _replace(model, value, {"x": value}, text, weights)
        return True

    return edit


def instead(op: str, text: str, **weights: Any) -> Edit:
    """Something else in place of every node of an operator; x0, x1, ... are its inputs, y what replaces its output."""

    def edit(model: ir.Model) -> bool:
        found = [node for node in model.graph if node.op_type == op]
        for node in found:
            known = {f"x{place}": value for place, value in enumerate(node.inputs) if value is not None}
            _replace(model, node.outputs[0], known, text, weights)
        return bool(found)

    return edit


def reread(op: str, position: int, name: str) -> Edit:
    """Every node of an operator reads another value."""

    def edit(model: ir.Model) -> bool:
        values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
        value = next(value for value in values if value.name == name)
        found = list(nodes(model, op))
        for node in found:
            node.replace_input_with(position, value)
        return bool(found)

    return edit


def exchanged(model: ir.Model) -> bool:
    """The branches of every If exchanged."""
    found = list(nodes(model, "If"))
    for node in found:
        first, second = (node.attributes.pop(key).as_graph() for key in ("then_branch", "else_branch"))
        node.attributes["then_branch"] = ir.AttrGraph("then_branch", second)
        node.attributes["else_branch"] = ir.AttrGraph("else_branch", first)
    return bool(found)


def _replace(model: ir.Model, value: ir.Value, known: dict[str, ir.Value], text: str, weights: dict[str, Any]) -> None:
    """What reads `value`, the graph's outputs included, reads "y" of `text` instead."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    known = {**{v.name or "": v for v in values}, **known}
    for name, given in weights.items():
        tensor = ir.tensor(np.asarray(given), name=f"planted_{name}")
        weight = ir.Value(
            name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
        )
        graph.initializers[f"planted_{name}"] = known[name] = weight
    readers = list(value.uses())
    made = []
    for proto in onnx.parser.parse_graph(f"g (float[N] x) => (float[N] y) {{ {text} }}").node:
        attributes = [ir.from_proto(one) for one in proto.attribute]
        node = ir.Node("", proto.op_type, [known[one] for one in proto.input], attributes, name=f"planted_{len(made)}")
        node.outputs[0].name = f"planted_{proto.output[0]}"
        known[proto.output[0]] = node.outputs[0]
        made.append(node)
    new, producer = known["y"], value.producer()
    new.type, new.shape = value.type, value.shape
    if producer is None:
        graph.insert_before(graph[0], made)
    else:
        graph.insert_after(producer, made)
    for reader, place in readers:
        reader.replace_input_with(place, new)
    for place, output in enumerate(graph.outputs):
        if output is value:
            value.name, new.name = f"planted_old_{value.name}", value.name
            graph.outputs[place] = new
