"""Types and shapes of every value, from the graph itself.

`infer_shapes` trusts what inference derives from the inputs over what the model wrote down (`value_info`), because
exporters are known to write down wrong shapes; what is written counts only where nothing can be derived (operators that
ONNX has no schema for, shapes computed from data). The data of large initializers is never copied or loaded.

ONNX's own inference runs once over the whole graph. Then one sweep in graph order computes what that could not:
products and quotients of symbolic dims (`xform.graph.shape_data`), and everything downstream of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import onnx
import onnx_ir as ir

from xform.graph import dims
from xform.graph.dims import Expr
from xform.graph.shape_data import ShapeData
from xform.graph.shape_proto import PROPAGATED_LIMIT, node_proto, propagated_elements, skeleton
from xform.graph.values import ONNX_DOMAINS, attribute, shape_of

Dim = int | ir.SymbolicDim

GENERATED = "unk__"  # how ONNX's inference names a dim it cannot compute; each name is a fresh symbol
_REJECTED = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError, IndexError)


def infer_shapes(model: ir.Model) -> None:
    """Fill in type and shape of every value of `model`, in place.

    Written shapes that contradict the derived ones are dropped. Names of symbolic dims are kept. Graph inputs are taken
    as they are. Graph outputs keep their declared names of dims; an undeclared one takes a number or an input's name.
    """
    seeds = _forget_generated(model)
    inferred = _infer(skeleton(model, seeds))
    changed: set[ir.Value] = set()
    _merge_graph(model.graph, inferred.graph, changed)
    data = ShapeData()
    for value in model.graph.inputs:
        data.dims(value)  # so that the user's spelling of a dim comes first
    _sweep(model.graph, model.opset_imports.get("", 1), data, changed)


def infer_node(node: ir.Node, opset: int) -> None:
    """Fill in type and shape of the outputs of one node from its inputs.

    Args:
        opset: Version of the default domain. Nodes of other domains than ONNX's, nodes with subgraphs, and nodes whose
            inputs are not typed are left as they are.
    """
    if node.domain not in ONNX_DOMAINS or _quick(node):
        return
    schema = _schema(node.op_type, opset)
    if schema is None or any(True for _ in _subgraphs(node)):
        return
    proto, types, constants = node_proto(node)
    opsets = [onnx.helper.make_opsetid("", opset)]
    try:
        outputs = onnx.shape_inference.infer_node_outputs(schema, proto, types, constants, opset_imports=opsets)
    except _REJECTED:
        return  # not derivable from what is known, or an invalid node, which the checker reports
    for index, value in enumerate(node.outputs):
        if (found := outputs.get(f"o{index}")) is not None:
            _merge_value(value, found)
    data = ShapeData()
    if (found_dims := data.output_dims(node)) is not None:
        _improve(node.outputs[0], found_dims, data)
    if node.op_type == "Attention":
        _infer_cache(node, data)


def _infer_cache(node: ir.Node, data: ShapeData) -> None:
    """present_key and present_value [B, H, past + S, D] of an Attention, which ONNX's inference omits."""
    for new, past, value in zip(node.inputs[1:3], (*node.inputs, *[None] * 6)[4:6], node.outputs[1:3], strict=False):
        before, found = data.dims(past), data.dims(new)
        if (
            new is None
            or new.dtype is None
            or found is None
            or len(found) != 4
            or (past is not None and before is None)
        ):
            continue
        if before is not None:
            known = None not in (found[2], before[2])
            found[2] = dims.add(before[2] or 0, found[2] or 0) if known else None
        value.dtype = new.dtype
        _improve(value, found, data)


@lru_cache(maxsize=1024)
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


@lru_cache(maxsize=4096)
def _has_schema(op_type: str, domain: str) -> bool:
    return bool(onnx.defs.has(op_type, "" if domain in ONNX_DOMAINS else domain))


# The whole graph at once


def _forget_generated(model: ir.Model) -> list[ir.Value]:
    """Drop generated dim names of earlier inference (a new run reuses them); give what ONNX cannot derive."""
    seeds = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        underivable = not _has_schema(node.op_type, node.domain) and node.op_identifier() not in model.functions
        for value in node.outputs:
            shape = value.shape
            if shape is not None and any(_generated(d) for d in shape.dims):
                value.shape = ir.Shape([None if _generated(d) else d for d in shape.dims])
            if underivable and value.type is not None:
                seeds.append(value)
    return seeds


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run ONNX's inference; of a graph that it rejects, the model's own types remain."""
    try:
        return _infer_once(proto)
    except _REJECTED:
        # A written type that contradicts the graph stops inference; without it there is nothing to contradict.
        for output in proto.graph.output:
            output.ClearField("type")
        del proto.graph.value_info[:]
        try:
            return _infer_once(proto)
        except _REJECTED:
            return proto


def _infer_once(proto: onnx.ModelProto) -> onnx.ModelProto:
    follow = sum(propagated_elements(proto.graph).values()) <= PROPAGATED_LIMIT
    return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=follow)


def _merge_graph(graph: ir.Graph, proto: onnx.GraphProto, changed: set[ir.Value]) -> None:
    """Write what was inferred into `graph`; collect values that know more than was inferred."""
    found = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for value in graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():
            value.dtype = value.const_value.dtype
            if shape_of(value) != tuple(value.const_value.shape):
                value.shape = ir.Shape(value.const_value.shape.numpy())
    for node, inferred in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            kind = found.get(value.name or "")
            if kind is None:
                if value.shape is not None:
                    changed.add(value)
            elif _merge_value(value, kind):
                changed.add(value)
        for name, subgraphs in _subgraphs(node):
            attr = next(a for a in inferred.attribute if a.name == name)
            protos = (attr.g,) if attr.HasField("g") else tuple(attr.graphs)
            for subgraph, subproto in zip(subgraphs, protos, strict=True):
                _merge_graph(subgraph, subproto, changed)


def _subgraphs(node: ir.Node) -> Iterator[tuple[str, tuple[ir.Graph, ...]]]:
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.name, (attr.as_graph(),)
        elif attr.type == ir.AttributeType.GRAPHS:
            yield attr.name, tuple(attr.as_graphs())


# The sweep


def _sweep(graph: ir.Graph, opset: int, data: ShapeData, changed: set[ir.Value]) -> None:
    """Visit nodes in order: improve shapes that depend on shape arithmetic, then all that reads them."""
    for node in graph:
        if any(value in changed for value in node.inputs) or _needs_broadcast(node):
            before = [_signature(value) for value in node.outputs]
            infer_node(node, opset)
            changed.update(v for v, old in zip(node.outputs, before, strict=True) if _signature(v) != old)
        if (found := data.output_dims(node)) is not None and _improve(node.outputs[0], found, data):
            changed.add(node.outputs[0])
        data.visit(node)
        for _, subgraphs in _subgraphs(node):
            for subgraph in subgraphs:
                _sweep(subgraph, opset, data, changed)


def _needs_broadcast(node: ir.Node) -> bool:
    """ONNX gives up on broadcasting two symbols; some are bounded by each other."""
    if node.op_type not in _BROADCAST and node.op_type not in _COMPARE:
        return False
    shape = node.outputs[0].shape
    return shape is not None and any(_unnamed(d) for d in shape.dims)


def _signature(value: ir.Value) -> tuple[object, ...]:
    return value.dtype, shape_of(value)


def _improve(value: ir.Value, found: list[Expr | None], data: ShapeData) -> bool:
    """Replace unknown and generated dims of `value` by computed ones."""
    known = value.shape
    keep_names = value.is_graph_output()
    if value.type is None:
        return False  # a shape alone cannot be written down
    if known is None or len(known) != len(found):
        if known is not None and not keep_names and all(isinstance(d, int) for d in known.dims):
            return False  # what ONNX derived as static stands
        old: list[Dim] = [ir.SymbolicDim(None)] * len(found)
    else:
        old = list(known.dims)
    computed = [_as_dim(data.spell(d)) for d in found]
    merged = [
        o if isinstance(o, int) else _merge_dim(o, n, keep_names=keep_names) for o, n in zip(old, computed, strict=True)
    ]
    if known is not None and list(known.dims) == merged:
        return False
    value.shape = ir.Shape(merged)
    return True


def _as_dim(dim: int | str | None) -> Dim:
    return dim if isinstance(dim, int) else ir.SymbolicDim(dim)


# Merging


def _merge_value(value: ir.Value, found: onnx.TypeProto) -> bool:
    """Take what inference found, keep what was known where it found less; return whether more was known."""
    if not found.HasField("tensor_type"):
        kind = ir.serde.deserialize_type_proto_for_type(found)
        if kind is not None:
            value.type = kind
        return False
    tensor = found.tensor_type
    if tensor.elem_type and value.dtype != tensor.elem_type:
        value.dtype = ir.DataType(tensor.elem_type)
    if value.type is None:
        return False  # a shape alone cannot be written down
    if not tensor.HasField("shape"):
        return value.shape is not None
    return _merge_shape(value, [_dim(d) for d in tensor.shape.dim])


def _merge_shape(value: ir.Value, inferred: list[Dim]) -> bool:
    known = value.shape
    keep_names = value.is_graph_output()
    if known is None or _contradicts(known, inferred):
        value.shape = ir.Shape([None if keep_names and _generated(d) else d for d in inferred])
        return False
    merged = [_merge_dim(old, new, keep_names=keep_names) for old, new in zip(known.dims, inferred, strict=True)]
    if merged != list(known.dims):
        value.shape = ir.Shape(merged)
    return any(m != i and not (i is None or _generated(m)) for m, i in zip(merged, inferred, strict=True))


def _contradicts(written: ir.Shape, inferred: list[Dim]) -> bool:
    """Whether two shapes cannot both be true; then nothing of the written one is to be trusted."""
    if len(written) != len(inferred):
        return True
    pairs = zip(written.dims, inferred, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _dim(proto: onnx.TensorShapeProto.Dimension) -> Dim:
    if proto.HasField("dim_value"):
        return int(proto.dim_value)
    return ir.SymbolicDim(proto.dim_param or None)


def _generated(dim: Dim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.startswith(GENERATED)


def _unnamed(dim: Dim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and (dim.value is None or dim.value.startswith(GENERATED))


def _merge_dim(old: Dim, new: Dim, *, keep_names: bool) -> Dim:
    """One dim: the derived beats the written, any name beats a generated one, and that beats none."""
    if isinstance(new, int):
        return new if isinstance(old, int) or not keep_names or _unnamed(old) else old
    if keep_names:
        return old if not _unnamed(old) else ir.SymbolicDim(None) if _unnamed(new) else new
    if not _unnamed(new):
        return new
    return old if not _unnamed(old) or new.value is None else new


# Operators whose rule is one line, so that the proto round trip is spared

# fmt: off
_UNARY = frozenset((
    "Abs", "Acos", "Asin", "Atan", "Ceil", "Celu", "Clip", "Cos", "Elu",
    "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log",
    "LogSoftmax", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
    "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh",
    "ThresholdedRelu",
))
# fmt: on
_BROADCAST = frozenset(["Add", "Sub", "Mul", "Div", "Mod", "And", "Or", "Xor", "Where", "Max", "Min", "Sum", "Mean"])
_COMPARE = frozenset(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])


def _quick(node: ir.Node) -> bool:
    """Infer elementwise operators directly; return whether it was done."""
    if node.op_type in _UNARY:
        source = node.inputs[0]
        if source is None or not isinstance(source.type, ir.TensorType) or source.shape is None:
            return False
        node.outputs[0].dtype = source.type.dtype
        _merge_shape(node.outputs[0], list(source.shape.dims))
        return True
    if node.op_type in _BROADCAST or node.op_type in _COMPARE:
        return _quick_broadcast(node)
    return node.op_type in ("Transpose", "Reshape") and _quick_layout(node)


def _quick_layout(node: ir.Node) -> bool:
    """Transpose, and Reshape to dims that are all computed."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or not isinstance(source.type, ir.TensorType) or source.shape is None:
        return False
    if node.op_type == "Reshape":
        data = ShapeData()
        found = data.output_dims(node)
        if found is None or any(d is None for d in found):
            return False
        inferred = [_as_dim(data.spell(d)) for d in found]
    else:
        axes = attribute(node, "perm") or list(reversed(range(len(source.shape))))
        if sorted(axes) != list(range(len(source.shape))):
            return False  # invalid; left for the checker
        inferred = [source.shape[axis] for axis in axes]
    output.dtype = source.type.dtype
    _merge_shape(output, inferred)
    return True


def _quick_broadcast(node: ir.Node) -> bool:
    operands = [v for v in node.inputs if v is not None]
    if len(operands) != len(node.inputs) or any(v.shape is None for v in operands):
        return False
    kind = operands[-1].type
    if not isinstance(kind, ir.TensorType):
        return False
    merged: list[Dim] = []
    for value in operands:
        found = _broadcast_shapes(merged, list(value.shape.dims) if value.shape is not None else [])
        if found is None:
            return False  # invalid; left for the checker
        merged = found
    output = node.outputs[0]
    output.dtype = ir.DataType.BOOL if node.op_type in _COMPARE else kind.dtype
    _merge_shape(output, merged)
    return True


def _broadcast_shapes(a: list[Dim], b: list[Dim]) -> list[Dim] | None:
    rank = max(len(a), len(b))
    merged: list[Dim] = []
    for x, y in zip([1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b, strict=True):
        if isinstance(x, int) and isinstance(y, int) and x != y and 1 not in (x, y):
            return None
        merged.append(_broadcast(x, y))
    return merged


def _broadcast(x: Dim, y: Dim) -> Dim:
    if x == 1 or y == 1:
        return y if x == 1 else x
    if isinstance(x, int) or isinstance(y, int):
        return x if isinstance(x, int) else y
    if x.value is None or y.value is None:
        return ir.SymbolicDim(None)
    if x == y:
        return x
    found = dims.broadcast(dims.parse(x.value), dims.parse(y.value))
    return y if found == dims.parse(y.value) else x if found is not None else ir.SymbolicDim(None)
