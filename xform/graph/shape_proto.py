"""The protos that ONNX's shape inference sees: the graph without the data of large initializers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
import onnx_ir as ir

from xform.graph.values import constant_tensor

# Constants with more elements than this cannot be a shape, axes, pads or repeats, so inference never needs their data.
DATA_LIMIT = 256
# Elements of shape data that inference may carry from node to node; a Concat of a value with itself doubles them.
PROPAGATED_LIMIT = 1 << 20


def skeleton(model: ir.Model, seeds: Iterable[ir.Value]) -> onnx.ModelProto:
    """The model without large data: initializers become inputs, small constant ones keep their data.

    Outputs are untyped, so that what the graph computes is inferred and not what the model declares.

    Args:
        seeds: Values that nothing can be derived about: they keep the types that the model writes down.
    """
    proto = onnx.ModelProto()
    proto.ir_version = max(model.ir_version, 10)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    graph = proto.graph
    graph.name = model.graph.name or "main"
    _add_inputs(graph, model.graph)
    underivable = {value.name: value for value in seeds if value.name and value.type is not None}
    for value in model.graph.outputs:
        known = value.name in underivable or value.producer() is None
        graph.output.append(_value_info(value) if known else onnx.ValueInfoProto(name=value.name or ""))
        underivable.pop(value.name or "", None)
    graph.value_info.extend(map(_value_info, underivable.values()))
    for node in model.graph:
        graph.node.append(_node(node))
    return proto


def propagated_elements(graph: onnx.GraphProto) -> dict[str, int]:
    """How many elements of shape data inference would carry from node to node, at most: by the value that they are."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    made: dict[str, int] = {}
    _propagate(graph, sizes, made)
    return made


def _propagate(graph: onnx.GraphProto, sizes: dict[str, int], made: dict[str, int]) -> None:
    for node in graph.node:
        given = [*(sizes.get(name, 0) for name in node.input), 0, 0]
        if node.op_type in ("Shape", "Size"):
            size = 8 if node.op_type == "Shape" else 1
        elif node.op_type == "Gather":
            size = given[1] if given[0] else 0
        elif node.op_type == "Concat":
            size = min(sum(given), 1 << 62)  # doubling makes numbers of any length
        elif node.op_type in _FOLLOWED:
            size = max(given, default=0)
        else:
            size = 0
        if size and node.output:
            sizes[node.output[0]] = made[node.output[0]] = size
        for attr in node.attribute:
            for inner in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                sizes.update((tensor.name, math.prod(tensor.dims)) for tensor in inner.initializer)
                _propagate(inner, sizes, made)


_FOLLOWED = frozenset({"Slice", "Squeeze", "Unsqueeze", "Cast", "Add", "Sub", "Mul", "Identity", "Reshape"})


def _add_inputs(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    for value in graph.inputs:
        proto.input.append(_value_info(value))
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.size <= DATA_LIMIT and tensor.dtype != ir.DataType.STRING:
            proto.initializer.append(_named_tensor(tensor, value.name or ""))
        else:
            proto.input.append(
                onnx.helper.make_tensor_value_info(value.name or "", tensor.dtype.value, list(tensor.shape.numpy()))
            )


def _named_tensor(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=tensor.dtype.value, raw_data=tensor.tobytes())
    proto.dims.extend(tensor.shape.numpy())
    return proto


def _node(node: ir.Node) -> onnx.NodeProto:
    """The node; value_info inside its subgraphs is dropped, because a wrong one there stops inference."""
    proto = ir.serde.serialize_node(node)
    del proto.metadata_props[:]
    stack = [proto]
    while stack:
        for attr in stack.pop().attribute:
            for graph in (*attr.graphs, *((attr.g,) if attr.HasField("g") else ())):
                del graph.value_info[:]
                stack.extend(graph.node)
    return proto


def _value_info(value: ir.Value) -> onnx.ValueInfoProto:
    proto = onnx.ValueInfoProto(name=value.name or "")
    if (kind := type_proto(value)) is not None:
        proto.type.CopyFrom(kind)
    return proto


def type_proto(value: ir.Value) -> onnx.TypeProto | None:
    if value.type is None:
        return None
    proto = onnx.TypeProto()
    ir.serde.serialize_type_into(proto, value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def node_proto(node: ir.Node) -> tuple[onnx.NodeProto, dict[str, onnx.TypeProto], dict[str, onnx.TensorProto]]:
    """The node with values renamed by position, what is known of its inputs, and the data of small constants."""
    proto = onnx.NodeProto(op_type=node.op_type)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for index, value in enumerate(node.inputs):
        name = f"i{index}" if value is not None else ""
        proto.input.append(name)
        if value is None:
            continue
        types[name] = type_proto(value) or onnx.TypeProto()
        tensor = constant_tensor(value)
        if tensor is not None and tensor.size <= DATA_LIMIT and tensor.dtype != ir.DataType.STRING:
            data[name] = _named_tensor(tensor, name)
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        proto.attribute.append(ir.serde.serialize_attribute(attr))
    return proto, types, data
