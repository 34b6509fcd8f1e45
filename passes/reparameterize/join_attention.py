"""Parallel attention branches over the same values as one attention with the heads of both.

    Attend(x Q1, x K1, x V1) O1 + Attend(x Q2, x K2, x V2) O2
        = Attend(x [Q1 Q2], x [K1 K2], x [V1 V2]) [O1; O2]

since heads attend alone, and a product with the joined heads is the sum of the products. Exact where both branches
have heads of one size, one scale and mask, and as many query heads for each key head. Four projections and one
attention go away; the arithmetic is the same. Branches whose projections are summed before the softmax need no joining:
those sums are linear, and `merge_affine_maps` merges them. Source: "Rethinking Vision Transformer Depth via Structural
Reparameterization", arXiv 2511.19718.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.values import Array, attribute, attributes_of, is_op, shape_of, used_once
from xform.passes.reparameterize.join_branches import JoinBranches, joined_linear, linear_behind, stacked_linear
from xform.passes.reparameterize.linear_map import LinearMap
from xform.rewrite.builder import Builder

_HEADS_OUT = [0, 2, 1, 3]  # [B, S, H, D] to [B, H, S, D], and back


@dataclass(frozen=True)
class _Projection:
    """Heads of x W + b: [B, H, S, D]."""

    x: ir.Value
    linear: LinearMap
    bias: Array | None
    heads: int
    size: int
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class _Attention:
    """One branch, with its query, key and value projections; every value in it is read once."""

    node: ir.Node
    projections: tuple[_Projection, _Projection, _Projection]
    out: LinearMap
    bias_out: Array | None
    nodes: tuple[ir.Node, ...]

    @property
    def groups(self) -> int:
        """Query heads for each key head."""
        return self.projections[0].heads // self.projections[1].heads


class JoinAttention(JoinBranches):
    """Two parallel attention branches over the same values."""

    name = "join_attention"

    def read(self, value: ir.Value) -> _Attention | None:
        return _attention(value)

    def difference(self, first: _Attention, second: _Attention) -> str | None:
        pairs = list(zip(first.projections, second.projections, strict=True))
        if first.node is second.node or any(a.x is not b.x for a, b in pairs):
            return ""
        if any(a.size != b.size for a, b in pairs):
            return "parallel attention branches have heads of different sizes"
        if first.groups != second.groups:
            return "parallel attention branches share key heads among different numbers of query heads"
        if list(first.node.inputs[3:]) != list(second.node.inputs[3:]):
            return "parallel attention branches have different masks"
        if attributes_of(first.node) != attributes_of(second.node):
            return "parallel attention branches have different scales or settings"
        if any(a.linear.dtype != b.linear.dtype for a, b in pairs) or first.out.dtype != second.out.dtype:
            return "parallel attention branches have weights of different types"
        return None

    def join(self, first: _Attention, second: _Attention, build: Builder) -> ir.Value:
        heads: list[ir.Value] = []
        for a, b in zip(first.projections, second.projections, strict=True):
            flat = joined_linear(a.linear, b.linear, a.bias, b.bias, a.x, build)
            split = build.op("Reshape", flat, [0, 0, a.heads + b.heads, a.size])
            heads.append(build.op("Transpose", split, perm=_HEADS_OUT))
        attributes = attributes_of(first.node)
        attended = build.op("Attention", *heads, *first.node.inputs[3:], **attributes)
        width = first.out.input_channels() + second.out.input_channels()
        merged = build.op("Reshape", build.op("Transpose", attended, perm=_HEADS_OUT), [0, 0, width])
        return stacked_linear(first.out, second.out, first.bias_out, second.bias_out, merged, build)


def _attention(value: ir.Value) -> _Attention | None:
    out = linear_behind(value)
    if out is None:
        return None
    merged, linear, bias, out_nodes = out
    found = _through(merged, "Reshape", "Transpose", "Attention")
    if found is None:
        return None
    reshape, transpose, node = found
    shape = shape_of(node.outputs[0])
    if len(node.outputs) != 1 or list(attribute(transpose, "perm") or ()) != _HEADS_OUT or not shape or len(shape) != 4:
        return None
    mask = shape_of(node.inputs[3]) if len(node.inputs) > 3 else ()
    if mask is None or (len(mask) == 4 and mask[1] != 1):  # a mask per head would have to be joined as well
        return None
    projections = [_projection(v) for v in node.inputs[:3]]
    query, key, content = projections
    if query is None or key is None or content is None or len(node.inputs) > 4 or query.heads % key.heads:
        return None
    inner = [n for p in (query, key, content) for n in p.nodes]
    nodes = (*out_nodes, reshape, transpose, node, *inner)
    return _Attention(node, (query, key, content), linear, bias, nodes)


def _projection(value: ir.Value | None) -> _Projection | None:
    found = _through(value, "Transpose", "Reshape")
    if found is None:
        return None
    transpose, reshape = found
    shape = shape_of(reshape.outputs[0])
    linear = linear_behind(reshape.inputs[0])
    if linear is None or shape is None or len(shape) != 4 or list(attribute(transpose, "perm") or ()) != _HEADS_OUT:
        return None
    x, mapped, bias, nodes = linear
    heads, size, before = shape[2], shape[3], shape_of(reshape.inputs[0])
    if not isinstance(heads, int) or not isinstance(size, int) or before is None or before[:2] != shape[:2]:
        return None
    return _Projection(x, mapped, bias, heads, size, (transpose, reshape, *nodes))


def _through(value: ir.Value | None, *op_types: str) -> list[ir.Node] | None:
    """The chain of these operators that ends in `value`, each result read once; None if it is another."""
    nodes: list[ir.Node] = []
    for op_type in op_types:
        node = value.producer() if value is not None else None
        if node is None or value is None or not is_op(node, op_type) or not used_once(value):
            return None
        nodes.append(node)
        value = node.inputs[0]
    return nodes
