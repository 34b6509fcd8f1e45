"""Types and shapes of every value, from the graph itself.

`infer_shapes` trusts what inference derives from the inputs over what the model wrote down (`value_info`), because
exporters are known to write down wrong shapes; what is written counts only where nothing can be derived (operators that
ONNX has no schema for, shapes computed from data). The data of large initializers is never copied or loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from xform.graph.values import ONNX_DOMAINS, is_constant

# Constants with more elements than this cannot be a shape, axes, pads or repeats, so inference never needs their data.
DATA_LIMIT = 256
GENERATED = "unk__"  # how ONNX's inference names a dim it cannot compute; each name is a fresh symbol


def infer_shapes(model: ir.Model) -> None:
    """Fill in type and shape of every value of `model`, in place.

    Written shapes that contradict the derived ones are dropped. Names of symbolic dims are kept. Graph inputs are taken
    as they are; graph outputs keep their declared dims, and unnamed dims of theirs become static where they are.
    """
    written = _written(model)
    seeds = [v for v in written if _underivable(v)]
    proto = _skeleton(model, seeds)
    inferred = _infer(proto)
    _merge_model(model, inferred)


def infer_node(node: ir.Node, opset: int) -> None:
    """Fill in type and shape of the outputs of one node from its inputs.

    Args:
        opset: Version of the default domain. Nodes of other domains than ONNX's are left as they are.
    """
    if node.domain not in ONNX_DOMAINS or any(_is_graph(a) for a in node.attributes.values()):
        return
    if not onnx.defs.has(node.op_type, max_inclusive_version=opset):
        return
    schema = onnx.defs.get_schema(node.op_type, opset)
    proto, types, data = _node_proto(node)
    try:
        outputs = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return  # not derivable from what is known (or an invalid node, which the checker reports)
    for index, value in enumerate(node.outputs):
        if (found := outputs.get(f"o{index}")) is not None:
            _merge_value(value, found)


def _is_graph(attr: ir.Attr) -> bool:
    return attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


# Building the proto that ONNX's inference sees


def _written(model: ir.Model) -> list[ir.Value]:
    """Values made by nodes that carry a type or shape."""
    return [
        value
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        for value in node.outputs
        if value.type is not None or value.shape is not None
    ]


def _underivable(value: ir.Value) -> bool:
    """Whether ONNX has no schema for the operator that makes `value`."""
    node = value.producer()
    return node is not None and not onnx.defs.has(node.op_type, node.domain if node.domain not in ONNX_DOMAINS else "")


def _skeleton(model: ir.Model, seeds: Iterable[ir.Value]) -> onnx.ModelProto:
    """The model without large data: initializers become inputs, small constant ones keep their data."""
    proto = onnx.ModelProto()
    proto.ir_version = max(model.ir_version, 10)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    graph = proto.graph
    graph.name = model.graph.name or "main"
    _add_inputs(graph, model.graph)
    for value in model.graph.outputs:
        graph.output.append(_value_info(value))
    listed = {value.name for value in model.graph.outputs}
    for value in seeds:
        if value.name and value.name not in listed and value.type is not None:
            graph.value_info.append(_value_info(value))
    for node in model.graph:
        graph.node.append(_node(node))
    return proto


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
    if (kind := _type_proto(value)) is not None:
        proto.type.CopyFrom(kind)
    return proto


def _type_proto(value: ir.Value) -> onnx.TypeProto | None:
    if value.type is None:
        return None
    proto = onnx.TypeProto()
    ir.serde.serialize_type_into(proto, value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _node_proto(node: ir.Node) -> tuple[onnx.NodeProto, dict[str, onnx.TypeProto], dict[str, onnx.TensorProto]]:
    """The node with values renamed by position, what is known of its inputs, and the data of small constants."""
    proto = onnx.NodeProto(op_type=node.op_type)
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for index, value in enumerate(node.inputs):
        name = f"i{index}" if value is not None else ""
        proto.input.append(name)
        if value is None:
            continue
        types[name] = _type_proto(value) or onnx.TypeProto()
        tensor = value.const_value if is_constant(value) else None
        if tensor is not None and tensor.size <= DATA_LIMIT and tensor.dtype != ir.DataType.STRING:
            data[name] = _named_tensor(tensor, name)
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        proto.attribute.append(ir.serde.serialize_attribute(attr))
    return proto, types, data


# Inference and merging


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run ONNX's inference; a graph that it rejects as a whole comes back as far as it was understood."""
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        # A declared output that contradicts the graph stops inference; undeclared outputs cannot contradict anything.
        for output in proto.graph.output:
            output.ClearField("type")
        del proto.graph.value_info[:]
        try:
            return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return proto


def _merge_model(model: ir.Model, proto: onnx.ModelProto) -> None:
    _merge_graph(model.graph, proto.graph)


def _merge_graph(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    found = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for value in graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            value.dtype = value.const_value.dtype
            value.shape = ir.Shape(value.const_value.shape.numpy())
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            if value.name and value.name in found:
                _merge_value(value, found[value.name])
        for name, subgraphs in _subgraphs(node):
            attr = next(a for a in node_proto.attribute if a.name == name)
            protos = (attr.g,) if attr.HasField("g") else tuple(attr.graphs)
            for subgraph, subproto in zip(subgraphs, protos, strict=True):
                _merge_graph(subgraph, subproto)


def _subgraphs(node: ir.Node) -> Iterator[tuple[str, tuple[ir.Graph, ...]]]:
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.name, (attr.as_graph(),)
        elif attr.type == ir.AttributeType.GRAPHS:
            yield attr.name, tuple(attr.as_graphs())


def _merge_value(value: ir.Value, found: onnx.TypeProto) -> None:
    """Take what inference found; keep what was known where it found less."""
    kind = ir.serde.deserialize_type_proto_for_type(found)
    if kind is not None and not (isinstance(kind, ir.TensorType) and kind.dtype == ir.DataType.UNDEFINED):
        value.type = kind
    shape = ir.serde.deserialize_type_proto_for_shape(found)
    if shape is None:
        return
    known = value.shape
    keep_names = value.is_graph_output()
    if known is None or len(known) != len(shape):
        value.shape = ir.Shape([None if keep_names and _generated(d) else d for d in shape.dims])
        return
    value.shape = ir.Shape(
        [_merge_dim(old, new, keep_names=keep_names) for old, new in zip(known.dims, shape.dims, strict=True)]
    )


def _generated(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.startswith(GENERATED)


def _merge_dim(old: int | ir.SymbolicDim, new: int | ir.SymbolicDim, *, keep_names: bool) -> int | ir.SymbolicDim:
    """One dim: a number beats a name, the derived beats the written, a real name beats a generated one."""
    if keep_names and isinstance(old, ir.SymbolicDim) and old.value is not None:
        return old
    if isinstance(new, int):
        return new
    if isinstance(old, int):
        return old
    if new.value is None or _generated(new):
        unnamed = old.value is None or _generated(old)
        if unnamed:
            return ir.SymbolicDim(None) if keep_names else new
        return old
    return new
