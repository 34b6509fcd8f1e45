"""Emitting operators in place of a semantic one.

Backends stand on the graph alone, so this is a small editor of its own: it inserts nodes before an anchor, names them
after the node they replace, and shares constants and helper values (a mask turned into a bias, say) among all nodes
of one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.values import ORIGIN, Array, display_name

MICROSOFT = "com.microsoft"


class Emitter:
    """Creates nodes, constants and shared values in one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._names = _all_names(model)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shared: dict[tuple[int, Hashable], Any] = {}
        self.lowered: dict[str, int] = {}

    def unique(self, hint: str) -> str:
        """A name that no node or value has, made from `hint`."""
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def constant(self, data: Any, dtype: ir.DataType, hint: str = "constant") -> ir.Value:
        """An initializer of the main graph, shared when the same data was asked for before."""
        array: Array = np.asarray(data).astype(dtype.numpy())
        key = (dtype.name, array.shape, array.tobytes())
        found = self._constants.get(key)
        if found is None or self.model.graph.initializers.get(found.name or "") is not found:  # cleaned up meanwhile
            name = self.unique(f"xform_{hint}")
            tensor = ir.Tensor(array, dtype=dtype, name=name)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
            self.model.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def weight(self, array: Array, hint: str) -> ir.Value:
        """An initializer of the main graph, not shared and not compared with others: for large arrays."""
        tensor = ir.tensor(np.ascontiguousarray(array), name=self.unique(hint))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.model.graph.register_initializer(value)
        return value

    def ints(self, *data: int) -> ir.Value:
        """A 1-D int64 constant, the way shapes and axes are given."""
        return self.constant(data, ir.DataType.INT64, "ints")

    def at(self, node: ir.Node) -> Site:
        """Where the replacement of `node` goes."""
        return Site(self, node)

    def count(self, form: str) -> None:
        """Note that one node was lowered to `form`."""
        self.lowered[form] = self.lowered.get(form, 0) + 1

    def shared(self, graph: ir.Graph, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time for this key in this graph."""
        full = (id(graph), key)
        if full not in self._shared:
            self._shared[full] = make()
        return self._shared[full]


class Site:
    """The place of one node that is being lowered."""

    def __init__(self, emitter: Emitter, node: ir.Node) -> None:
        if node.graph is None or isinstance(node.graph, ir.Function):
            raise ValueError(f"node {node.name} is in no graph")
        self.emitter = emitter
        self.node = node
        self.graph: ir.Graph = node.graph
        self._base = node.name or next((o.name for o in node.outputs if o.name), None) or node.op_type

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Insert a node before the anchor; gives its output, or the list of them when `outputs` > 1."""
        node = self.make(op_type, inputs, domain, outputs, attributes)
        self.graph.insert_before(self.node, node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def loop(self, times: ir.Value, start: ir.Value, step: Callable[[Body, ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """`state = start`, then `state = step(body, i, state)` for i = 0, 1, .. `times` - 1, as a Loop.

        Args:
            times: int64 scalar.
            start: Of the state, which keeps its type.
            step: Emits into the body, which may read what precedes the anchor; i is an int64 scalar.
        """
        name = self.emitter.unique(f"{self._base}/Loop_body")
        index, condition = (
            ir.Value(name=self.emitter.unique(f"{name}/{hint}"), type=ir.TensorType(dtype), shape=ir.Shape(()))
            for hint, dtype in (("i", ir.DataType.INT64), ("go_on", ir.DataType.BOOL))
        )
        state = ir.Value(name=self.emitter.unique(f"{name}/state"), type=start.type, shape=start.shape)
        body = Body(self)
        result = step(body, index, state)
        result.type = start.type
        outputs = [body.op("Identity", condition), result]
        outputs[0].type, outputs[0].shape = condition.type, condition.shape
        opsets = self.emitter.model.opset_imports
        graph = ir.Graph([index, condition, state], outputs, nodes=body.nodes, opset_imports=opsets, name=name)
        value: ir.Value = self.op("Loop", times, None, start, body=graph)
        value.type = start.type
        return value

    def branch(
        self, condition: ir.Value, then: Callable[[Body], ir.Value], otherwise: Callable[[Body], ir.Value]
    ) -> ir.Value:
        """`then` where the bool scalar `condition` is true, else `otherwise`, as an If: only one of them is run.

        Args:
            then, otherwise: Emit into a body, which may read what precedes the anchor; both give the same type.
        """
        opsets = self.emitter.model.opset_imports
        graphs = []
        for hint, emit in (("then", then), ("else", otherwise)):
            body = Body(self)
            result = emit(body)
            name = self.emitter.unique(f"{self._base}/If_{hint}")
            graphs.append(ir.Graph([], [result], nodes=body.nodes, opset_imports=opsets, name=name))
        value: ir.Value = self.op("If", condition, then_branch=graphs[0], else_branch=graphs[1])
        value.type, value.shape = graphs[0].outputs[0].type, graphs[0].outputs[0].shape
        return value

    def make(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str, outputs: int, attributes: Mapping[str, Any]
    ) -> ir.Node:
        """A node that is named after the anchor and comes from where it comes from, in no graph yet."""
        node = ir.node(
            op_type,
            list(inputs),
            {k: v for k, v in attributes.items() if v is not None},
            domain=domain,
            num_outputs=outputs,
            name=self.emitter.unique(f"{self._base}/{op_type}"),
            metadata_props={**self.node.metadata_props, ORIGIN: display_name(self.node)},
        )
        for value in node.outputs:
            value.name = self.emitter.unique(f"{self._base}/{op_type}_out")
        if domain and domain not in self.emitter.model.opset_imports:
            self.emitter.model.graph.opset_imports[domain] = 1
        return node

    def takes_in(self, nodes: Iterable[ir.Node]) -> bool:
        """Whether `nodes` are of this graph, and only they and the node here read what they give."""
        inside = {self.node, *nodes}
        if any(node.graph is not self.graph for node in inside):
            return False
        vanishing = [output for node in inside if node is not self.node for output in node.outputs]
        return not any(v.is_graph_output() or any(u.node not in inside for u in v.uses()) for v in vanishing)

    def typed(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Give an emitted value the dtype of `like`."""
        value.type = like.type
        return value

    def replace(self, replacements: Sequence[tuple[ir.Value, ir.Value]], form: str) -> None:
        """Let every reader of an old output read its replacement, and remove the node.

        The replacements keep the old names, types and shapes, so graph outputs stay what they were.
        """
        for old, new in replacements:
            self.take_over(old, new)
        self.graph.remove(self.node, safe=True)
        self.emitter.count(form)

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of `old` read `new`, which gets its name where nothing else has it, its type and shape."""
        if old.is_graph_output() and (new.producer() is None or new.is_graph_output()):
            new = self.op("Identity", new)
        if new.producer() is not None and not new.is_graph_output() and (old.is_graph_output() or not new.uses()):
            name, old.name = old.name, self.emitter.unique(f"{old.name}_before")  # its node may stay for others
            new.name = name
            new.type = old.type if old.type is not None else new.type
            new.shape = old.shape if old.shape is not None else new.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


class Body:
    """Nodes of a subgraph in the place of a site; what they are named after and constants are the site's."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        node = self.site.make(op_type, inputs, domain, 1, attributes)
        self.nodes.append(node)
        return node.outputs[0]


def _all_names(model: ir.Model) -> set[str]:
    names = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values()) if value.name}
    for node in model.graph.all_nodes():
        names.update(v.name for v in node.outputs if v.name)
        if node.name:
            names.add(node.name)
        for attribute in node.attributes.values():
            for graph in _subgraphs(attribute):
                names.update(v.name for v in (*graph.inputs, *graph.initializers.values()) if v.name)
    return names


def _subgraphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type is ir.AttributeType.GRAPHS else []
