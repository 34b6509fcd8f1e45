"""From an `ir.Model` to a `torch.fx.GraphModule`."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Graph, GraphModule, Node

from xform.backends.torch_triton.functions import numbers
from xform.backends.torch_triton.functions.control import given_or
from xform.backends.torch_triton.functions.sizes import ints_tensor
from xform.backends.torch_triton.lower import parameters
from xform.backends.torch_triton.lower.dtypes import Precision
from xform.backends.torch_triton.lower.prepare import prepare
from xform.backends.torch_triton.lower.refuse import named, opset_of, refuse_unknown
from xform.backends.torch_triton.lower.site import Ints, Item, Site, Unsupported
from xform.backends.torch_triton.lower.table import find
from xform.backends.torch_triton.lower.wide import wide_nodes
from xform.errors import TargetError
from xform.graph.values import Array, constant, constant_tensor, display_name, is_constant, rank_of, shape_of

_INT_KINDS = (ir.DataType.INT64, ir.DataType.INT32)
Held = Node | Ints


def to_torch(model: ir.Model, *, dtype: torch.dtype | None = None, cast_outputs: bool = False) -> GraphModule:
    """Write a graph in torch.

    Call the result with the graph's inputs in order (tensors; lists for sequences); it returns a tuple of the outputs.
    Parameters and buffers have their names in the graph and share its memory. They are frozen; `requires_grad_()` makes
    them trainable, and gradients flow to inputs in any case.

    Args:
        model: Opset 23 or newer. It is left as it is.
        dtype: Computes the model's floats in this dtype instead of their own (see `Precision`). Float inputs are
            cast to it at the start.
        cast_outputs: Cast outputs back to the dtypes that the model declares.

    Raises:
        TargetError: Nodes that cannot be written in torch, all of them by name.
    """
    copy = prepare(model)
    refuse_unknown(copy)
    precision = Precision(dtype)
    root = torch.nn.Module()
    emitter = GraphEmitter(copy, copy.graph, root, precision)
    outputs = emitter.emit()
    if cast_outputs:
        outputs = [emitter.cast_back(node, value) for node, value in zip(outputs, copy.graph.outputs, strict=True)]
    emitter.refuse_failures()
    return emitter.finish(outputs, copy.graph.name or "model")


class GraphEmitter:
    """Writes one graph, the main one or a body, as an fx graph.

    Args:
        model: The whole model.
        graph: The graph to write.
        root: Module that parameters, buffers and bodies are registered in.
        precision: Which dtypes to compute in.
        outer: The emitter of the graph around this one.
    """

    def __init__(
        self,
        model: ir.Model,
        graph: ir.Graph,
        root: torch.nn.Module,
        precision: Precision,
        outer: GraphEmitter | None = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.root = root
        self.precision = precision
        self.fx = Graph()
        self.failures: list[tuple[ir.Node, str]] = [] if outer is None else outer.failures
        self.reference: Node | None = None
        self._held: dict[ir.Value, Held] = {}
        self._tensors: dict[ir.Value, Node] = {}
        self._parameters: parameters.Registry = (
            parameters.Registry(root, precision) if outer is None else outer._parameters
        )
        self._outer = outer
        self.made_once: dict[tuple[Any, ...], Node] = {}
        self._bodies = 0
        half = precision.dtype is not None and precision.dtype is not torch.float64
        self.wide_nodes: set[ir.Node] = set()
        self.wide: set[ir.Value] = set()
        if half and outer is None:
            self.wide_nodes, self.wide = wide_nodes(graph)
        self._narrowed: dict[ir.Value, Node] = {}
        self.closure: list[Node] = []  # nodes of the outer graph that are passed to this one, in order

    # --- writing ------------------------------------------------------------------------------------------------

    def emit(self) -> list[Node]:
        """Write inputs and nodes; the outputs as nodes."""
        if self._outer is None:
            self._inputs()
        for node in self.graph:
            self._node(node)
        return [self.narrowed(value) for value in self.graph.outputs]

    def _inputs(self) -> None:
        optional = False  # Python wants a default for every argument behind one that has one
        for value in self.graph.inputs:
            optional = optional or value.const_value is not None
            default = {"default_value": None} if optional else {}
            node = self.fx.placeholder(self._legal(value.name), **default)
            node.meta |= {"onnx_name": value.name, "onnx_shape": shape_of(value)}
            self._held[value] = node
        self._settle_reference(self.graph.inputs)
        for value in self.graph.inputs:
            held = self._held[value]
            assert isinstance(held, Node)
            node = held
            if value.const_value is not None:
                node = self.call(given_or, node, self._parameter(value))
            wanted = self.precision.of(value.dtype) if self.precision.dtype and value.dtype is not None else None
            if wanted is not None and isinstance(value.type, ir.TensorType) and wanted.is_floating_point:
                node = self.call(torch.Tensor.to, node, wanted)
                node.meta["onnx_shape"] = shape_of(value)
            self._held[value] = node

    def _settle_reference(self, values: Sequence[ir.Value]) -> None:
        """The tensor that says where new tensors are made: the first input, else the first weight."""
        for value in values:
            node = self._held.get(value)
            if isinstance(node, Node) and isinstance(value.type, ir.TensorType):
                self.reference = node
                return
        first = next((v for v in self.graph.initializers.values() if v.dtype is not ir.DataType.STRING), None)
        if self.reference is None and first is not None and self._outer is None:
            self.reference = self._parameter(first)

    def _node(self, node: ir.Node) -> None:
        lowering = find(node, opset_of(node, self.model.opset_imports))
        assert lowering is not None
        try:
            result = lowering(Site(node, self))
        except Unsupported as reason:
            self.failures.append((node, str(reason)))
            result = tuple(self.fx.call_function(given_or, (None, None)) for _ in node.outputs)
        results = result if isinstance(result, tuple) else (result,)
        for value, held in zip(node.outputs, results, strict=False):
            if held is not None:
                self.hold(value, held)

    def hold(self, value: ir.Value, held: Held) -> None:
        """What stands for `value` from here on; a new fx node takes its name."""
        self._held[value] = held
        if isinstance(held, Node):
            if "onnx_name" not in held.meta and held.op == "call_function":
                held._rename(self._legal(value.name))
                held.meta["onnx_name"] = value.name
                producer = value.producer()
                held.meta["onnx_node"] = value.name if producer is None else display_name(producer)
            held.meta.setdefault("onnx_shape", shape_of(value))
            if isinstance(value.type, ir.TensorType) and self.reference is None:
                self.reference = held

    def cast_back(self, node: Node, value: ir.Value) -> Node:
        """An output in the dtype that the model declares."""
        if not isinstance(value.type, ir.TensorType) or value.dtype is None:
            return node
        declared, computed = Precision().of(value.dtype), self.precision.of(value.dtype)
        return node if declared is None or declared is computed else self.call(torch.Tensor.to, node, declared)

    def finish(self, outputs: Sequence[Node], name: str) -> GraphModule:
        """The module of what was written."""
        self.fx.output(tuple(outputs))
        self.fx.eliminate_dead_code()
        self.fx.lint()
        parameters.drop_unused(self.root, self.fx)
        return GraphModule(self.root, self.fx, class_name=self._legal(name).lstrip("_") or "model")

    def refuse_failures(self) -> None:
        """Raise one TargetError about every node that could not be written."""
        if not self.failures:
            return
        kinds = sorted({f"{node.op_type} ({reason})" for node, reason in self.failures})
        raise TargetError(
            f"the torch backend cannot run {len(self.failures)} node(s): {'; '.join(kinds)}",
            where=named([display_name(node) for node, _ in self.failures]),
            hint="change these nodes in the model, or choose another backend",
        )

    # --- bodies -------------------------------------------------------------------------------------------------

    def body(self, graph: ir.Graph, name: str, int_inputs: Sequence[int] = ()) -> tuple[Node, list[Node]]:
        """A body of control flow as a submodule.

        Args:
            graph: The body.
            name: Wanted name of the submodule.
            int_inputs: Inputs that are handed over as Python ints.

        Returns:
            The node that reads the submodule, and the values of this graph to be passed behind the body's own inputs.
        """
        root = torch.nn.Module()
        inner = GraphEmitter(self.model, graph, root, self.precision, self)
        for index, value in enumerate(graph.inputs):
            node = inner.fx.placeholder(inner._legal(value.name))
            node.meta["onnx_name"] = value.name
            inner._held[value] = Ints((node,), is_scalar=True) if index in int_inputs else node
        inner._close_over(_outer_values(graph))
        if inner.reference is None and self.reference is not None:
            inner.reference = inner._pass_in(self.reference, "device_of")
        outputs = inner.emit()
        module = inner.finish(outputs, name)
        self._bodies += 1
        target = f"{self._legal(name)}_{self._bodies}"
        while hasattr(self.root, target):
            target += "_"
        self.root.add_module(target, module)
        return self._get_attr(target), inner.closure

    def _close_over(self, values: Sequence[ir.Value]) -> None:
        """Make values of the graphs around this one available in it."""
        assert self._outer is not None
        for value in values:
            held = self._outer.narrowed(value) if value in self._outer.wide else self._outer.held(value)
            if isinstance(held, Ints):
                items = [i if isinstance(i, int) else self._pass_in(i, value.name or "size") for i in held.items]
                self._held[value] = Ints(tuple(items), held.is_scalar)
            else:
                self._held[value] = self._pass_in(held, value.name or "value")
                if isinstance(value.type, ir.TensorType) and self.reference is None:
                    self.reference = self._held[value]  # type: ignore[assignment]

    def _pass_in(self, node: Node, name: str) -> Node:
        self.closure.append(node)
        return self.fx.placeholder(self._legal(name))

    # --- values -------------------------------------------------------------------------------------------------

    def held(self, value: ir.Value) -> Held:
        """What stands for a value."""
        found = self._held.get(value)
        if found is not None:
            return found
        if value.const_value is not None and value.producer() is None:
            node = self._parameter(value)
            self._held[value] = node
            return node
        raise AssertionError(f"{value.name} is read before it is written")

    def tensor(self, value: ir.Value) -> Node:
        """A value as a tensor (or a list of tensors, for a sequence)."""
        held = self.held(value)
        if isinstance(held, Node):
            return held
        if value not in self._tensors:
            items: Any = held.items[0] if held.is_scalar else list(held.items)
            node = self.call(ints_tensor, items, self.reference)
            self._tensors[value] = node
        return self._tensors[value]

    def wide_tensor(self, value: ir.Value) -> Node:
        """As `tensor`, for a node that computes in the model's own dtype: constants are in theirs."""
        if value.producer() is not None or value.const_value is None or value.is_graph_input():
            return self.tensor(value)
        if value.dtype is None or not value.dtype.is_floating_point():
            return self.tensor(value)
        node = self._get_attr(self._parameters.of(value, self.root, as_is=True))
        node.meta["onnx_shape"] = shape_of(value)
        return node

    def narrowed(self, value: ir.Value) -> Node:
        """As `tensor`, rounded to the precision of the activations if it was computed in a wider one."""
        if value not in self.wide or value.dtype is not ir.DataType.FLOAT:
            return self.tensor(value)
        if value not in self._narrowed:
            dtype = self.precision.of(value.dtype or ir.DataType.FLOAT)
            node = self.call(numbers.narrowed, self.tensor(value), dtype)
            node.meta["onnx_shape"] = shape_of(value)
            self._narrowed[value] = node
        return self._narrowed[value]

    def holds_ints(self, value: ir.Value) -> bool:
        """Whether a value is held as Python ints, or is an int constant that can be."""
        if isinstance(self._held.get(value), Ints):
            return True
        tensor = constant_tensor(value)
        small = tensor is not None and len(tensor.shape) <= 1 and tensor.size <= 4096
        return small and value.dtype in _INT_KINDS

    def ints(self, value: ir.Value) -> Ints:
        """An int vector or scalar as Python ints. Raises Unsupported if its length is unknown."""
        held = self._held.get(value)
        if isinstance(held, Ints):
            return held
        if is_constant(value):
            array = constant(value)
            assert array is not None
            return Ints(tuple(int(item) for item in array.reshape(-1)), is_scalar=array.ndim == 0)
        shape, node = shape_of(value), self.tensor(value)
        if shape is not None and len(shape) == 0:
            return Ints((self.call(torch.Tensor.item, node),), is_scalar=True)
        if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
            raise Unsupported(f"the number of elements of {value.name} is unknown")
        listed = self.call(torch.Tensor.tolist, node)
        return Ints(tuple(self.call(operator.getitem, listed, i) for i in range(shape[0])))

    def is_parameter(self, value: ir.Value) -> bool:
        """Whether a constant is a parameter of the user's model rather than a number in its code."""
        raw = getattr(value.const_value, "raw", None)
        return isinstance(raw, torch.nn.Parameter)

    def representable(self, number: float, dtype: ir.DataType) -> float:
        """A number within the range of the dtype that stands for `dtype`; infinities stay."""
        wanted = self.precision.of(dtype)
        if self.precision.dtype is None or wanted is None or not wanted.is_floating_point or not np.isfinite(number):
            return number
        limits = torch.finfo(wanted)
        return min(max(number, limits.min), limits.max)

    def rank(self, value: ir.Value) -> int | None:
        """Rank of a value."""
        return rank_of(value)

    # --- emitting -----------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call; a method of Tensor is written as one."""
        if getattr(torch.Tensor, getattr(function, "__name__", ""), None) is function:
            return self.fx.call_method(function.__name__, args, kwargs)
        return self.fx.call_function(function, args, kwargs)

    def buffer(self, array: Array | torch.Tensor, name: str) -> Node:
        """A new buffer."""
        tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
        return self._get_attr(parameters.register(self.root, name, tensor, trainable=False))

    def _parameter(self, value: ir.Value) -> Node:
        if self._outer is not None and value.graph is not self.graph:
            raise AssertionError(f"{value.name} of an outer graph was not passed in")
        if value.dtype is None or self.precision.of(value.dtype) is None:
            raise Unsupported(f"{value.name}: torch has no {value.dtype.name.lower() if value.dtype else 'such type'}")
        node = self._get_attr(self._parameters.of(value, self.root))
        node.meta["onnx_shape"] = shape_of(value)
        return node

    def _get_attr(self, target: str) -> Node:
        return self.fx.get_attr(target)

    def _legal(self, name: str | None) -> str:
        """A Python identifier that looks like `name`."""
        text = re.sub(r"\W+", "_", name or "value").strip("_") or "value"
        if text[0].isdigit():
            text = f"_{text}"
        return f"{text}_" if keyword.iskeyword(text) or text == "self" else text


def _outer_values(graph: ir.Graph) -> list[ir.Value]:
    """Values that a body and the bodies in it read from the graphs around it, in the order of reading."""
    inside: set[ir.Value] = set()
    read: dict[ir.Value, None] = {}

    def visit(body: ir.Graph) -> None:
        inside.update(body.inputs)
        inside.update(body.initializers.values())
        for node in body:
            read.update(dict.fromkeys(value for value in node.inputs if value is not None))
            for attr in node.attributes.values():
                if attr.type is ir.AttributeType.GRAPH:
                    visit(attr.as_graph())
            inside.update(node.outputs)
        read.update(dict.fromkeys(body.outputs))

    visit(graph)
    return [value for value in read if value not in inside]


__all__ = ["GraphEmitter", "Item", "to_torch"]
