"""Making the nodes that replace a node when it moves to another opset: unique names, constants, types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.shapes import infer_node
from xform.graph.values import ORIGIN, Array, display_name

GraphLike = ir.Graph | ir.Function


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of an If, Loop, Scan or SequenceMap node."""
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


class Names:
    """Names that no value of the model has, so that nothing in any scope is shadowed."""

    def __init__(self, graphs: Sequence[GraphLike]) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}
        self.without_initializers = {graph.graph for graph in graphs if isinstance(graph, ir.Function)}
        for graph in graphs:
            self._collect(graph)

    def _collect(self, graph: GraphLike) -> None:
        self._taken.update(v.name for v in graph.inputs if v.name)
        if isinstance(graph, ir.Graph):
            self._taken.update(graph.initializers)
        for node in graph:
            self._taken.update(v.name for v in node.outputs if v.name)
            for body in subgraphs(node):
                self._collect(body)

    def unique(self, wanted: str) -> str:
        """`wanted`, or `wanted` with a number behind it."""
        name, count = wanted, self._next.get(wanted, 0)
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._next[wanted] = count
        self._taken.add(name)
        return name


class Emitter:
    """Collects the nodes that are to stand in for `node`, which all are valid at `opset`.

    Args:
        node: The node that is being converted; new nodes carry its origin and metadata.
        opset: The opset that the new nodes are written at.
        names: Names taken in the model.
        expands: Whether an operator may be written out in more elementary ones.
    """

    def __init__(self, node: ir.Node, opset: int, names: Names, expands: bool = True) -> None:
        assert node.graph is not None
        self.node = node
        self.opset = opset
        self.expands = expands
        self.nodes: list[ir.Node] = []
        self._graph = node.graph
        self._names = names
        self._stem = node.name or next((o.name for o in node.outputs if o.name), None) or node.op_type

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """One node with one output."""
        return self.ops(op_type, inputs, 1, attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: dict[str, Any] | None = None,
    ) -> tuple[ir.Value, ...]:
        """One node with any number of outputs; attributes that are None are left out."""
        given = {k: v for k, v in (attributes or {}).items() if v is not None}
        kept = [v for v in given.values() if isinstance(v, ir.Attr)]
        made = ir.convenience.convert_attributes({k: v for k, v in given.items() if not isinstance(v, ir.Attr)})
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        name = self._names.unique(f"{self._stem}/{op_type}")
        values = [ir.Value(name=self._names.unique(f"{name}_output_{i}")) for i in range(outputs)]
        node = ir.Node("", op_type, trimmed, [*kept, *made], outputs=values, name=name)
        node.metadata_props.update(self.node.metadata_props)
        node.metadata_props[ORIGIN] = display_name(self.node)
        self.nodes.append(node)
        infer_node(node, self.opset)
        return tuple(values)

    def constant(self, array: Array, hint: str = "const") -> ir.Value:
        """A constant: an initializer of the node's graph, or a Constant node inside a function."""
        return self.tensor(ir.tensor(array), hint)

    def tensor(self, tensor: ir.TensorProtocol, hint: str = "const") -> ir.Value:
        """A constant that holds `tensor` as it is, without loading it."""
        if self._graph in self._names.without_initializers:
            value = self.op("Constant", value=ir.AttrTensor("value", tensor))
        else:
            value = ir.Value(name=self._names.unique(f"{self._stem}/{hint}"), const_value=tensor)
            self._graph.register_initializer(value)
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape.numpy())
        return value

    def ints(self, values: Sequence[int], hint: str = "const") -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant(np.asarray(values, dtype=np.int64).reshape(len(values)), hint)

    def like(self, number: float | int | bool, dtype: ir.DataType, hint: str = "const") -> ir.Value:
        """A scalar constant of `dtype`."""
        return self.constant(np.asarray(number).astype(dtype.numpy()), hint)


def replace(node: ir.Node, emitter: Emitter, outputs: Sequence[ir.Value]) -> None:
    """Puts the emitted nodes where `node` stood; `outputs` take over its outputs with names, types and readers."""
    graph = node.graph
    assert graph is not None
    assert len(outputs) == len(node.outputs)
    for old, new in zip(node.outputs, outputs, strict=True):
        assert new.producer() in emitter.nodes
        new.name = old.name or new.name
        new.type = old.type if old.type is not None else new.type
        new.shape = old.shape if old.shape is not None else new.shape
        new.metadata_props.update(old.metadata_props)
        new.meta.update(old.meta)
    graph.insert_before(node, emitter.nodes)
    ir.convenience.replace_all_uses_with(node.outputs, outputs, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for made in reversed(emitter.nodes):  # what only fed an output that nobody reads
        if not any(o.uses() or o.is_graph_output() for o in made.outputs):
            graph.remove(made, safe=True)
            emitter.nodes.remove(made)


def unread(graphs: Sequence[GraphLike]) -> set[ir.Value]:
    """Initializers, also of bodies, that no node reads."""
    found: set[ir.Value] = set()
    for graph in graphs:
        if isinstance(graph, ir.Graph):
            found.update(v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output())
        for node in graph:
            found |= unread(list(subgraphs(node)))
    return found


def drop_unread(graphs: Sequence[GraphLike], keep: set[ir.Value]) -> None:
    """Removes the initializers that nothing reads any more, but for those in `keep` and those that callers may set."""
    for value in unread(graphs) - keep:
        if value.graph is not None and value.name is not None and not value.is_graph_input():
            value.graph.initializers.pop(value.name)


def set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Sets input `index`, padding with omitted inputs where the node has fewer."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def get_input(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, or None if it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def set_attribute(node: ir.Node, name: str, value: Any) -> None:
    """Sets an attribute to a plain Python value."""
    node.attributes[name] = ir.convenience.convert_attribute(name, value)
