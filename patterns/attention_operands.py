"""Operands of an attention: contractions as transposed operands, and what can be peeled off them.

An `Operand` stands for `scale * Transpose(value, perm)`. Peeling moves constant factors and transposes out of the graph
and into that description, so that keys come out as [.., keys, head size] however the graph had spelled their transpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from xform.graph.values import attribute, is_op, rank_of, scalar, shape_of
from xform.rewrite.builder import Builder
from xform.rewrite.rule import Failure


@dataclass(frozen=True)
class Operand:
    """`scale * Transpose(value, perm)`."""

    value: ir.Value
    perm: tuple[int, ...]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.perm)

    def swapped(self) -> Operand:
        """The same with its last two axes exchanged."""
        return replace(self, perm=(*self.perm[:-2], self.perm[-1], self.perm[-2]))

    def shape(self) -> tuple[int | str | None, ...]:
        """Dims of the operand; None where unknown."""
        dims = shape_of(self.value) or (None,) * self.rank
        return tuple(dims[i] for i in self.perm)

    def build(self, build: Builder) -> ir.Value:
        """The operand without its scale as a value."""
        if self.perm == tuple(range(self.rank)):
            return self.value
        return build.op("Transpose", self.value, perm=list(self.perm))


def operand(value: ir.Value) -> Operand | None:
    """`value` as it stands; None if its rank is unknown."""
    rank = rank_of(value)
    return None if rank is None else Operand(value, tuple(range(rank)))


def peel(given: Operand, *, transposes: bool = True) -> Operand:
    """Take constant positive factors and (if asked) transposes off an operand, as far as they go."""
    while True:
        node = given.value.producer()
        if node is None:
            return given
        found = _factor(given, node) or (_transposed(given, node) if transposes else None)
        if found is None:
            return given
        given = found


def _factor(given: Operand, node: ir.Node) -> Operand | None:
    if is_op(node, "Identity") and node.inputs[0] is not None:
        return replace(given, value=node.inputs[0])
    if not is_op(node, "Mul", "Div"):
        return None
    for index in (1, 0):
        value, factor = node.inputs[1 - index], scalar(node.inputs[index])
        if value is None or factor is None or (node.op_type == "Div" and index == 0):
            continue
        if rank_of(value) == given.rank and math.isfinite(factor) and factor > 0:
            by = 1.0 / factor if node.op_type == "Div" else factor
            return replace(given, value=value, scale=given.scale * by)
    return None


def _transposed(given: Operand, node: ir.Node) -> Operand | None:
    source = node.inputs[0] if node.inputs else None
    if is_op(node, "Transpose") and source is not None and rank_of(source) == given.rank:
        inner = attribute(node, "perm", list(range(given.rank))[::-1])
        return replace(given, value=source, perm=tuple(inner[i] for i in given.perm))
    if is_op(node, "Reshape") and (below := _swap_by_reshape(node)) is not None:
        swap = Operand(below, tuple(range(given.rank))).swapped().perm
        return replace(given, value=below, perm=tuple(swap[i] for i in given.perm))
    return None


def _swap_by_reshape(node: ir.Node) -> ir.Value | None:
    """x of `Reshape(Transpose(Reshape(x, [-1, T, D]), [0, 2, 1]), [.., D, T])`: its last two axes exchanged."""
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not is_op(inner, "Transpose") or list(attribute(inner, "perm", ())) != [0, 2, 1]:
        return None
    flat = inner.inputs[0].producer() if inner.inputs[0] is not None else None
    if flat is None or not is_op(flat, "Reshape"):
        return None
    source = flat.inputs[0]
    before, merged, after = shape_of(source), shape_of(flat.outputs[0]), shape_of(node.outputs[0])
    if before is None or merged is None or after is None or len(before) != len(after):
        return None
    known = None not in before and None not in merged[1:]
    swap = (*before[:-2], before[-1], before[-2])
    return source if known and merged[1:] == before[-2:] and after == swap else None


def product_operands(node: ir.Node, swapped: bool = False) -> tuple[Operand, Operand] | Failure:
    """Queries [.., S, D] and keys [.., T, D] of the product node that makes logits [.., S, T].

    Args:
        swapped: The logits are the transpose of the product.
    """
    pair = _contraction(node)
    if isinstance(pair, Failure):
        return pair
    left, right, out = pair
    if out != tuple(range(left.rank)):
        return Failure("the Einsum of queries and keys gives an order of axes other than heads, queries, keys", (node,))
    queries, keys = left, right.swapped()
    return (keys, queries) if swapped else (queries, keys)


def weighted_sums(node: ir.Node) -> list[tuple[Operand, Operand, tuple[int, ...]]]:
    """The ways to read a product as weights [.., S, T] times values [.., T, Dv].

    Returns:
        Weights, values, and the perm from [.., S, Dv] to the node's output. `A @ B` is read as it stands and as
        `(B^T @ A^T)^T`.
    """
    pair = _contraction(node)
    if isinstance(pair, Failure):
        return []
    left, right, out = pair
    swap = Operand(right.value, tuple(range(left.rank))).swapped().perm
    return [(left, right, out), (right.swapped(), left.swapped(), tuple(swap[i] for i in out))]


def _contraction(node: ir.Node) -> tuple[Operand, Operand, tuple[int, ...]] | Failure:
    """A [.., I, C] and B [.., C, J], and the perm from [.., I, J] to the output."""
    if len(node.inputs) != 2:
        return Failure(f"the product has {len(node.inputs)} operands", (node,))
    first, second = (operand(v) if v is not None else None for v in node.inputs)
    if first is None or second is None:
        return Failure("the rank of an operand of the product is unknown", (node,))
    if is_op(node, "Einsum"):
        return _einsum(node, first, second)
    if first.rank != second.rank or first.rank < 2:
        return Failure(f"operands of ranks {first.rank} and {second.rank} are multiplied", (node,))
    return first, second, tuple(range(first.rank))


def _einsum(node: ir.Node, first: Operand, second: Operand) -> tuple[Operand, Operand, tuple[int, ...]] | Failure:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    unsupported = Failure(f"Einsum {equation} is no batched product of two matrices", (node,))
    if len(node.inputs) != 2 or "->" not in equation or "." in equation:
        return unsupported
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    if any(len(set(t)) != len(t) for t in (left, right, result)):
        return unsupported
    batch = [c for c in result if c in left and c in right]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    inner = [c for c in left if c in right and c not in result]
    if [len(rows), len(columns), len(inner)] != [1, 1, 1] or {*batch, *rows, *columns} != set(result):
        return unsupported
    a = Operand(first.value, tuple(left.index(c) for c in [*batch, *rows, *inner]))
    b = Operand(second.value, tuple(right.index(c) for c in [*batch, *inner, *columns]))
    order = [*batch, *rows, *columns]
    return a, b, tuple(order.index(c) for c in result)
