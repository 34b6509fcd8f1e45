"""Sparse constants made dense: the IR has no sparse tensors, and no runtime computes with them any faster."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from xform.errors import ModelError

Body = onnx.GraphProto | onnx.FunctionProto
MAX_ELEMENTS = 1 << 28  # of one tensor once dense; beyond that, a sparse tensor is refused


def densify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with dense constants instead of sparse ones: `proto` itself if it has none, else a copy.

    Raises:
        ModelError: Indices outside the shape, or a dense tensor of more than `MAX_ELEMENTS`.
    """
    bodies: list[Body] = [proto.graph, *proto.functions]
    if not any(_has_sparse(body) for body in bodies):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for body in (copy.graph, *copy.functions):
        _densify(body)
    return copy


def _has_sparse(body: Body) -> bool:
    if isinstance(body, onnx.GraphProto) and body.sparse_initializer:
        return True
    for node in body.node:
        for attr in node.attribute:
            inner = (*((attr.g,) if attr.HasField("g") else ()), *attr.graphs)
            if attr.HasField("sparse_tensor") or any(_has_sparse(g) for g in inner):
                return True
    return False


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
    if any(dim < 0 for dim in dims) or size > MAX_ELEMENTS:
        raise ModelError(f"a sparse tensor of shape {list(dims)} is too large to be made dense", where=name)
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
