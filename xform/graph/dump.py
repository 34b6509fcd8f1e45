"""A readable text form of a graph, one line a node, stable enough to diff.

    graph main(%ids: i64[batch,seq]) -> (%logits: f32[batch,seq,100])
      opset 23, 3 nodes, 1 initializers (0.1 MB)

      %emb: f32[batch,seq,64] = Gather(%table, %ids; axis=0)
      %logits: f32[batch,seq,100] = MatMul(%emb, %head)  # lm_head

Small constants are written in place, larger ones are listed at the end with shape and size; their data is never loaded.
Names are made safe for a terminal, and very long ones are shortened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from xform.graph.values import ORIGIN, attribute, constant, constant_tensor, shape_of
from xform.text import shown

INLINE_ELEMENTS = 8  # constants up to this size are written where they are used
_INDENT = "  "
_SHORT = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.DOUBLE: "f64",
    ir.DataType.FLOAT16: "f16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.STRING: "str",
}


def dump(model: ir.Model, *, weights: bool = True) -> str:
    """The text of `model`.

    Args:
        weights: List the initializers after the nodes.
    """
    return "\n".join([*_graph_lines(model.graph, "", model.opset_imports, weights), *_function_lines(model)]) + "\n"


def short_type(value: ir.Value) -> str:
    """Type and shape of a value, such as `f32[batch,12,64]`; `?` where unknown."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return repr(value.type)
    dtype = "?" if value.dtype is None else _SHORT.get(value.dtype, _dtype_name(value.dtype))
    shape = shape_of(value)
    return dtype + ("[*]" if shape is None else "[" + ",".join("?" if d is None else shown(d) for d in shape) + "]")


def _dtype_name(dtype: ir.DataType) -> str:
    name = dtype.name.lower()
    for prefix, short in (("uint", "u"), ("int", "i"), ("float", "f")):
        if name.startswith(prefix) and name[len(prefix) :]:
            return short + name[len(prefix) :]
    return name


def _name(value: ir.Value | None) -> str:
    return "_" if value is None else f"%{shown(value.name)}"


def _typed(value: ir.Value) -> str:
    return f"{_name(value)}: {short_type(value)}"


def _graph_lines(graph: ir.Graph, indent: str, opsets: Mapping[str, int], weights: bool) -> Iterator[str]:
    inputs = ", ".join(_typed(v) for v in graph.inputs)
    outputs = ", ".join(_typed(v) for v in graph.outputs)
    yield f"{indent}graph {shown(graph.name or 'main')}({inputs}) -> ({outputs})"
    inner = indent + _INDENT
    if opsets:
        size = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
        imports = ", ".join(f"{shown(domain or 'opset')} {version}" for domain, version in sorted(opsets.items()))
        yield f"{inner}{imports}, {len(graph)} nodes, {len(graph.initializers)} initializers ({size / 1e6:.1f} MB)"
        yield ""
    for node in graph:
        yield from _node_lines(node, inner)
    listed = [v for v in graph.initializers.values() if not _inlined(v)]
    if weights and listed:
        yield ""
        for value in listed:
            yield f"{inner}{_typed(value)} = {_weight(value)}"


def _node_lines(node: ir.Node, indent: str) -> Iterator[str]:
    outputs = ", ".join(_typed(v) if v.name else "_" for v in node.outputs)
    inputs = ", ".join(_operand(v) for v in node.inputs)
    plain: list[str] = []
    subgraphs: list[tuple[str, ir.Graph]] = []
    for name, attr in sorted(node.attributes.items()):
        if attr.is_ref():
            plain.append(f"{shown(name)}=@{shown(attr.ref_attr_name)}")
        elif attr.type == ir.AttributeType.GRAPH:
            subgraphs.append((name, attr.as_graph()))
        elif attr.type == ir.AttributeType.GRAPHS:
            subgraphs.extend((f"{name}[{i}]", g) for i, g in enumerate(attr.as_graphs()))
        else:
            plain.append(f"{shown(name)}={_plain(attribute(node, name))}")
    operator = shown(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
    arguments = inputs + (("; " if inputs else "") + ", ".join(plain) if plain else "")
    origin = node.metadata_props.get(ORIGIN) or node.name
    yield f"{indent}{outputs} = {operator}({arguments})" + (f"  # {shown(origin)}" if origin else "")
    for name, graph in subgraphs:
        yield f"{indent}{_INDENT}{shown(name)}:"
        yield from _graph_lines(graph, indent + 2 * _INDENT, {}, weights=True)


def _function_lines(model: ir.Model) -> Iterator[str]:
    for function in model.functions.values():
        inputs, outputs = (", ".join(_name(v) for v in vs) for vs in (function.inputs, function.outputs))
        yield ""
        yield f"function {shown(function.domain)}.{shown(function.name)}({inputs}) -> ({outputs})"
        for node in function:
            yield from _node_lines(node, _INDENT)


def _inlined(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.size <= INLINE_ELEMENTS


def _operand(value: ir.Value | None) -> str:
    if value is not None and value.is_initializer() and _inlined(value):
        array = constant(value)
        return _name(value) if array is None else _plain(array.tolist())
    return _name(value)


def _weight(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None:
        return "no data"
    where = " external" if isinstance(tensor, ir.ExternalTensor) else ""
    return f"weight ({tensor.size} elements, {tensor.nbytes} bytes{where})"


def _plain(value: Any) -> str:
    """A Python value on one line."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str | bytes):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        return repr(text if len(text) <= 60 else text[:57] + "...")
    if isinstance(value, Sequence):
        shown = [_plain(v) for v in value[:16]]
        return "[" + ",".join([*shown, "..."] if len(value) > 16 else shown) + "]"
    if isinstance(value, ir.TensorProtocol):
        if value.size <= INLINE_ELEMENTS:
            return _plain(value.numpy().tolist())
        return f"tensor {_dtype_name(value.dtype)}{list(value.shape.numpy())}"
    return str(value)
