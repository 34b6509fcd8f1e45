"""Sparse constants made dense: the IR has no sparse tensors, and no runtime computes with them any faster."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from xform import limits
from xform.capture.check_nodes import MAX_RANK
from xform.errors import ModelError

Body = onnx.GraphProto | onnx.FunctionProto


def densify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with dense constants instead of sparse ones: `proto` itself if it has none, else a copy.

    Raises:
        ModelError: Indices outside the shape, or values and indices that do not fit each other.
        LimitError: `constants`: all of them together would be too large.
    """
    bodies: list[Body] = [proto.graph, *proto.functions]
    found = [sparse for body in bodies for sparse in _sparse(body)]
    if not found:
        return proto
    dense = sum(_dense_bytes(sparse) for sparse in found)
    limits.check("constants", dense, "making the sparse tensors dense", brought=sum(s.ByteSize() for s in found))
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for body in (copy.graph, *copy.functions):
        _densify(body)
    return copy


def _sparse(body: Body) -> Iterator[onnx.SparseTensorProto]:
    """The sparse tensors of a graph or function, those of nested graphs included."""
    if isinstance(body, onnx.GraphProto):
        yield from body.sparse_initializer
    for node in body.node:
        for attr in node.attribute:
            if attr.HasField("sparse_tensor"):
                yield attr.sparse_tensor
            for inner in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                yield from _sparse(inner)


def _dense_bytes(sparse: onnx.SparseTensorProto) -> int:
    name = sparse.values.name
    if any(dim < 0 for dim in sparse.dims) or len(sparse.dims) > MAX_RANK:
        raise ModelError("a sparse tensor has a shape that is none", where=name)
    if sparse.values.data_type == onnx.TensorProto.STRING:
        raise ModelError("a sparse tensor of strings has no zeros", where=name)
    if sparse.indices.data_type != onnx.TensorProto.INT64:
        raise ModelError("a sparse tensor has indices that are not int64", where=name)
    return int(math.prod(sparse.dims) * max(ir.DataType(sparse.values.data_type).bitwidth, 8) // 8)


def _densify(body: Body) -> None:
    if isinstance(body, onnx.GraphProto):
        for sparse in body.sparse_initializer:
            body.initializer.append(to_dense(sparse))
        body.ClearField("sparse_initializer")
    for node in body.node:
        for attr in node.attribute:
            if attr.HasField("sparse_tensor") and node.op_type == "Constant":
                dense = to_dense(attr.sparse_tensor)
                attr.Clear()
                attr.name, attr.type = "value", onnx.AttributeProto.TENSOR
                attr.t.CopyFrom(dense)
            for inner in (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs):
                _densify(inner)


def to_dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """The dense tensor of a sparse one; indices are linear (rank 1) or one row per value (rank 2)."""
    name, dims = sparse.values.name, tuple(sparse.dims)
    size = math.prod(dims)
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    if indices.ndim == 2:
        if indices.shape[1] != len(dims) or bool((indices < 0).any()) or bool((indices >= np.array(dims)).any()):
            raise ModelError("a sparse tensor has indices outside its shape", where=name)
        indices = np.ravel_multi_index(tuple(indices.T), dims)
    if indices.shape != values.shape or bool((indices < 0).any()) or bool((indices >= size).any()):
        raise ModelError("a sparse tensor has indices outside its shape", where=name)
    dense = np.zeros(size, dtype=values.dtype)
    dense[indices] = values
    return numpy_helper.from_array(dense.reshape(dims), name)
