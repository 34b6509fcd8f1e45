"""A hash of what a model computes, independent of value names, node names and the order of independent nodes.

Two models with one fingerprint have the same interface, operators, attributes, wiring and (unless excluded) weights.
Weights are hashed piece by piece and never held in memory together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.values import shape_of

_CHUNK = 1 << 24  # bytes hashed at a time


def fingerprint(model: ir.Model, weights: bool = True) -> str:
    """64 hexadecimal digits.

    Args:
        weights: Include the data of initializers and tensor attributes; without, only dtype and shape count.
    """
    hasher = _Hasher(weights, {})
    functions = sorted(_function(f, hasher) for f in model.functions.values())
    opsets = sorted((domain, str(version)) for domain, version in model.opset_imports.items())
    return _digest("model", opsets, functions, _graph(model.graph, {}, hasher))


class _Hasher:
    """Remembers the digest of each tensor, which several values may share."""

    def __init__(self, weights: bool, tensors: dict[int, str]) -> None:
        self.weights = weights
        self._tensors = tensors
        self._alive: list[ir.TensorProtocol] = []  # an id is unique only while its object lives

    def tensor(self, tensor: ir.TensorProtocol) -> str:
        known = self._tensors.get(id(tensor))
        if known is None:
            known = self._tensors[id(tensor)] = self._compute(tensor)
            self._alive.append(tensor)
        return known

    def _compute(self, tensor: ir.TensorProtocol) -> str:
        head = ("tensor", tensor.dtype.name, *(str(d) for d in tensor.shape))
        if not self.weights:
            return _digest(*head)
        data = hashlib.sha256()
        if isinstance(tensor, ir.StringTensor) or tensor.dtype == ir.DataType.STRING:
            for text in np.asarray(tensor.numpy()).reshape(-1).tolist():
                raw = text if isinstance(text, bytes) else str(text).encode()
                data.update(len(raw).to_bytes(8, "little") + raw)
            return _digest(*head, data.hexdigest())
        view = memoryview(_bytes(tensor))
        for start in range(0, len(view), _CHUNK):
            data.update(view[start : start + _CHUNK])
        return _digest(*head, data.hexdigest())


def _bytes(tensor: ir.TensorProtocol) -> Any:
    """The little-endian bytes; a view where the data lies in memory (or is mapped from disk) contiguously."""
    array = tensor.numpy()
    packed = tensor.dtype.bitwidth < 8
    if not packed and array.dtype.isnative and np.little_endian and array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8)
    return tensor.tobytes()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _graph(graph: ir.Graph, outer: dict[ir.Value, str], hasher: _Hasher) -> str:
    """Hash of a graph: what its outputs compute from its inputs, and nodes that nothing reads."""
    known = dict(outer)
    for index, value in enumerate(graph.inputs):
        default = hasher.tensor(value.const_value) if value.is_initializer() and value.const_value is not None else ""
        known[value] = _digest("input", index, value.name if not outer else "", _kind(value), default)
    for value in graph.initializers.values():
        if value not in known:
            known[value] = hasher.tensor(value.const_value) if value.const_value is not None else _digest("no data")
    loose: list[str] = []
    for node in graph:
        found = _node(node, known, hasher)
        for index, value in enumerate(node.outputs):
            known[value] = _digest("output", index, found)
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            loose.append(found)
    outputs = [(known.get(v, ""), v.name if not outer else "") for v in graph.outputs]
    return _digest("graph", [known[v] for v in graph.inputs], outputs, sorted(loose))


def _kind(value: ir.Value) -> tuple[str, str]:
    return (str(value.type), str(shape_of(value)))


def _node(node: ir.Node, known: dict[ir.Value, str], hasher: _Hasher) -> str:
    inputs = ["" if v is None else known.get(v, "unordered") for v in node.inputs]
    attributes = sorted((name, _attribute(attr, known, hasher)) for name, attr in node.attributes.items())
    return _digest(node.domain, node.op_type, node.overload, len(node.outputs), inputs, attributes)


def _attribute(attr: ir.Attr, known: dict[ir.Value, str], hasher: _Hasher) -> str:
    if attr.is_ref():
        return _digest("ref", attr.ref_attr_name)
    match attr.type:
        case ir.AttributeType.GRAPH:
            return _graph(attr.as_graph(), known, hasher)
        case ir.AttributeType.GRAPHS:
            return _digest([_graph(g, known, hasher) for g in attr.as_graphs()])
        case ir.AttributeType.TENSOR:
            return hasher.tensor(attr.as_tensor())
        case ir.AttributeType.TENSORS:
            return _digest([hasher.tensor(t) for t in attr.as_tensors()])
    value = attr.value
    return _digest(attr.type.name, list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _function(function: ir.Function, hasher: _Hasher) -> str:
    known = {value: _digest("input", index) for index, value in enumerate(function.inputs)}
    for node in function:
        found = _node(node, known, hasher)
        known.update((value, _digest("output", index, found)) for index, value in enumerate(node.outputs))
    outputs = [known.get(v, "") for v in function.outputs]
    return _digest("function", function.domain, function.name, function.overload, outputs)
