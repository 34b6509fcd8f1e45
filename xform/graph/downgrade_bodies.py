"""Our own bodies of activations, RotaryEmbedding, Trilu and CastLike; ONNX's bodies of all other operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir

from xform.graph.downgrade_steps import Unavailable, expand
from xform.graph.opset_emit import Emitter, get_input
from xform.graph.opset_schema import schema_at
from xform.graph.values import Array, attribute, rank_of, shape_of


def _typed(node: ir.Node, index: int = 0) -> tuple[ir.Value, ir.DataType]:
    value = get_input(node, index)
    if value is None or value.dtype is None:
        raise Unavailable(f"the type of input {index} is unknown")
    return value, value.dtype


@expand("Gelu")
def gelu(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """x/2 (1 + erf(x / sqrt 2)), or x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    x, dtype = _typed(node)
    if attribute(node, "approximate", "none") == "tanh":
        cubed = emit.op("Mul", emit.op("Mul", x, x), x)
        inner = emit.op("Add", x, emit.op("Mul", cubed, emit.like(0.044715, dtype, "c")))
        bent = emit.op("Tanh", emit.op("Mul", inner, emit.like(math.sqrt(2 / math.pi), dtype, "sqrt_2_over_pi")))
    else:
        bent = emit.op("Erf", emit.op("Div", x, emit.like(math.sqrt(2), dtype, "sqrt_2")))
    gate = emit.op("Add", bent, emit.like(1, dtype, "one"))
    return [emit.op("Mul", emit.op("Mul", x, gate), emit.like(0.5, dtype, "half"))]


@expand("Swish")
def swish(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """x sigmoid(alpha x)."""
    x, dtype = _typed(node)
    alpha = attribute(node, "alpha", 1.0)
    inner = x if alpha == 1 else emit.op("Mul", x, emit.like(alpha, dtype, "alpha"))
    return [emit.op("Mul", x, emit.op("Sigmoid", inner))]


@expand("HardSwish")
def hard_swish(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """x clip(x / 6 + 1/2, 0, 1)."""
    x, _ = _typed(node)
    return [emit.op("Mul", x, emit.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))]


@expand("Mish")
def mish(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """x tanh(softplus(x))."""
    x, _ = _typed(node)
    return [emit.op("Mul", x, emit.op("Tanh", emit.op("Softplus", x)))]


@expand("CastLike")
def cast_like(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """A Cast to the type of the second input, which has to be known."""
    _, dtype = _typed(node, 1)
    return [emit.op("Cast", node.inputs[0], to=int(dtype))]


@expand("Trilu")
def trilu(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Keeps element (i, j) of the last two dims where j - i >= k (upper) or <= k (lower)."""
    x, dtype = _typed(node)
    rank = rank_of(x)
    if rank is None:
        raise Unavailable("the rank of its input is unknown")
    shape = emit.op("Shape", x)
    counts = [emit.op("Gather", shape, _int(emit, rank - 2 + i), axis=0) for i in (0, 1)]
    rows, columns = (emit.op("Range", _int(emit, 0), count, _int(emit, 1)) for count in counts)
    distance = emit.op("Sub", columns, emit.op("Unsqueeze", rows, emit.ints([1], "axes")))
    k = get_input(node, 1)
    k = _int(emit, 0) if k is None else emit.op("Reshape", k, emit.ints([], "scalar"))
    dropped = emit.op("Less" if attribute(node, "upper", 1) else "Greater", distance, k)
    return [emit.op("Where", dropped, emit.like(0, dtype, "zero"), x)]


@expand("RotaryEmbedding")
def rotary_embedding(node: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Turns pairs of the first `rotary_embedding_dim` features by the angles of the caches.

    (a, b) becomes (a cos - b sin, a sin + b cos); a and b are halves of the features, or even and odd ones.
    No transposition is needed: the caches get a head dim where the input has it.
    """
    x, _ = _typed(node)
    rank, heads = rank_of(x), int(attribute(node, "num_heads", 0))
    if rank not in (3, 4) or (rank == 3 and not heads):
        raise Unavailable("the rank of its input, or the number of its heads, is unknown")
    split = x if rank == 4 else emit.op("Reshape", x, emit.ints([0, 0, heads, -1], "heads"))
    size = (shape_of(x) or ())[-1]
    head_size = size // heads if rank == 3 and isinstance(size, int) else size
    turned_size = int(attribute(node, "rotary_embedding_dim", 0)) or head_size
    if not isinstance(turned_size, int):
        raise Unavailable("the size of its heads is unknown")
    part = split if turned_size == head_size else _slice(emit, split, 0, turned_size)
    cos, sin = (_cache(node, emit, index, turned_size, 1 if rank == 4 else 2) for index in (1, 2))
    result = _turn(emit, part, cos, sin, turned_size, bool(attribute(node, "interleaved", 0)))
    if turned_size != head_size:
        result = emit.op("Concat", result, _slice(emit, split, turned_size, None), axis=3)
    return [result if rank == 4 else emit.op("Reshape", result, emit.ints([0, 0, -1], "merged"))]


def _cache(node: ir.Node, emit: Emitter, index: int, turned_size: int, head_axis: int) -> ir.Value:
    """Angles [batch, 1, sequence, half] or [batch, sequence, 1, half]."""
    cache, positions = node.inputs[index], get_input(node, 3)
    angles = cache if positions is None else emit.op("Gather", cache, positions, axis=0)
    known = shape_of(cache)
    if known is None or known[-1] != turned_size // 2:
        angles = emit.op("Slice", angles, emit.ints([0]), emit.ints([turned_size // 2]), emit.ints([2]))
    assert angles is not None
    return emit.op("Unsqueeze", angles, emit.ints([head_axis], "axes"))


def _turn(emit: Emitter, x: ir.Value, cos: ir.Value, sin: ir.Value, size: int, interleaved: bool) -> ir.Value:
    half = size // 2
    if interleaved:
        a, b = _slice(emit, x, 0, None, 2), _slice(emit, x, 1, None, 2)
    else:
        a, b = emit.ops("Split", [x, emit.ints([half, half], "split")], 2, {"axis": 3})
    real = emit.op("Sub", emit.op("Mul", a, cos), emit.op("Mul", b, sin))
    imaginary = emit.op("Add", emit.op("Mul", a, sin), emit.op("Mul", b, cos))
    if not interleaved:
        return emit.op("Concat", real, imaginary, axis=3)
    axes = emit.ints([4], "axes")
    pairs = emit.op("Concat", emit.op("Unsqueeze", real, axes), emit.op("Unsqueeze", imaginary, axes), axis=4)
    return emit.op("Reshape", pairs, emit.ints([0, 0, 0, size], "shape"))


def _slice(emit: Emitter, x: ir.Value, start: int, end: int | None, step: int = 1) -> ir.Value:
    """Part of the last of four dims."""
    stop = np.iinfo(np.int64).max if end is None else end
    return emit.op("Slice", x, emit.ints([start]), emit.ints([stop]), emit.ints([3]), emit.ints([step]))


def _int(emit: Emitter, number: int) -> ir.Value:
    return emit.like(number, ir.DataType.INT64)


def expand_by_schema(node: ir.Node, version: int, target: int, emit_at: Any) -> tuple[Emitter, Sequence[ir.Value]]:
    """Writes a node out by the body that ONNX defines for it.

    Args:
        emit_at: Makes an `Emitter` for `node` at an opset.

    Returns:
        The emitter with the new nodes, whose opset is that of the body, and the values for the outputs.

    Raises:
        Unavailable: ONNX defines no body, or needs types that are unknown.
    """
    function = _function(node, version, target)
    opset = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), version)
    emitter: Emitter = emit_at(opset)
    values: dict[str, ir.Value | None] = {"": None}
    for index, name in enumerate(function.input):
        values[name] = get_input(node, index)
    for inner in function.node:
        _instantiate(inner, node, version, values, emitter)
    outputs = []
    for index in range(len(node.outputs)):
        value = values.get(function.output[index]) if index < len(function.output) else None
        if value is None:
            raise Unavailable(f"ONNX's body of it has no output {index}")
        if value.producer() not in emitter.nodes:
            value = emitter.op("Identity", value)
        outputs.append(value)
    return emitter, outputs


def _function(node: ir.Node, version: int, target: int) -> onnx.FunctionProto:
    schema: Any = schema_at(node.op_type, version)  # onnx's stubs lack what is used here
    if schema is None:
        raise Unavailable("ONNX does not define it")
    fixed = list(schema.function_opset_versions)
    dependent = list(schema.context_dependent_function_opset_versions)
    offered = fixed or dependent
    if not offered:
        raise Unavailable("it cannot be written in older operators")
    fitting = [v for v in offered if v <= target]
    chosen = max(fitting) if fitting else min(offered)
    if fixed:
        return _parsed(schema.get_function_with_opset_version(chosen))
    types = []
    for value in node.inputs:
        proto = onnx.TypeProto()
        if value is not None:
            if value.type is None:
                raise Unavailable("the types of its inputs are unknown")
            ir.serde.serialize_type_into(proto, value.type)
            if value.shape is not None:
                ir.serde.serialize_shape_into(proto, value.shape)
        types.append(proto.SerializeToString())
    proto_node = ir.serde.serialize_node(node).SerializeToString()
    try:
        body = schema.get_context_dependent_function_with_opset_version(chosen, proto_node, types)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise Unavailable(f"ONNX gives no body for these inputs: {error}") from error
    if not body:
        raise Unavailable("ONNX gives no body for these inputs")
    return _parsed(body)


def _parsed(body: bytes) -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.ParseFromString(body)
    return function


def _instantiate(
    inner: onnx.NodeProto, node: ir.Node, version: int, values: dict[str, ir.Value | None], emitter: Emitter
) -> None:
    """One node of the body, with the values and attributes of the node that it is expanded for."""
    attributes: dict[str, Any] = {}
    schema = schema_at(node.op_type, version)
    for proto in inner.attribute:
        if proto.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise Unavailable("ONNX's body of it has control flow")
        if not proto.ref_attr_name:
            attributes[proto.name] = ir.serde.deserialize_attribute(proto)
            continue
        given = node.attributes.get(proto.ref_attr_name)
        default = schema.attributes[proto.ref_attr_name].default_value if schema is not None else None
        if given is not None:
            attributes[proto.name] = ir.Attr(proto.name, given.type, given.value)
        elif default is not None and default.type:
            attributes[proto.name] = onnx.helper.get_attribute_value(default)
    if inner.op_type == "Constant":
        values[inner.output[0]] = emitter.constant(_constant(attributes), "const")
        return
    inputs = [values.get(name) for name in inner.input]
    results = emitter.ops(inner.op_type, inputs, len(inner.output), attributes)
    values.update(zip(inner.output, results, strict=True))


def _constant(attributes: dict[str, Any]) -> Array:
    (name, held), *_ = attributes.items()
    value = held.value if isinstance(held, ir.Attr) else held
    if name == "value":
        return np.asarray(value.numpy())
    return np.asarray(value, dtype=np.float32 if "float" in name else np.int64)
