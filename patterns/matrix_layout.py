"""Matrices that could as well be stored by columns.

A region is a set of values [..., M, N] that are tied together by operators which work on either of the last two axes
alike: elementwise operators, Split, Slice, Concat and Pad. All of them can be stored transposed at once, and what was
told by an axis is told by the other one. Where a region ends, it matters who is on the other side:

- a Transpose of the last two axes vanishes when the region on one of its sides is stored transposed;
- a product of two computed matrices takes and gives either form, as (A B)^T = B^T A^T, and runtimes read an operand by
  columns at no cost;
- a constant is transposed offline;
- anything else (a Reshape, a convolution, a graph output) needs a Transpose there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from xform.graph.values import attribute, constant, is_constant, is_op, rank_of, shape_of
from xform.patterns.elementwise import BINARY, UNARY

_LARGEST = 64  # operators in a region
_UNKNOWN = 64  # what a symbolic or unknown dim counts
_SWAPPED_AXES = ("Split", "Slice", "Concat", "Pad")


@dataclass
class Region:
    """Values that are stored the same way.

    Attributes:
        values: All of them, of rank 2 or more.
        nodes: The operators that tie them, and the products that make some of them.
    """

    values: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    def moved(self, *, flipped: bool) -> int:
        """Elements that Transposes at its border move, as it is, or stored transposed; those into products are free."""
        total = 0
        for value in self.values:
            maker = value.producer()
            if maker is None or maker not in self.nodes:
                from_transpose = is_swap(maker)
                free = all(is_product(user) for user, _ in value.uses()) and not value.is_graph_output()
                total += size(value) * (flipped if not from_transpose else not flipped and not free)
            total += self._moved_by_readers(value, flipped)
        return total

    def _moved_by_readers(self, value: ir.Value, flipped: bool) -> int:
        outside = [user for user, _ in value.uses() if user not in self.nodes]
        swaps = [user for user in outside if is_swap(user)]
        rest = value.is_graph_output() or any(not is_swap(user) and not is_product(user) for user in outside)
        if flipped:
            return size(value) * rest
        costly = [swap for swap in swaps if not _feeds_products_only(swap.outputs[0])]
        return size(value) * len(costly)


def is_swap(node: ir.Node | None) -> bool:
    """Whether `node` is a Transpose of the last two axes."""
    perm = None if node is None or not is_op(node, "Transpose") else attribute(node, "perm")
    if perm is None:
        return False
    rank = len(perm)
    return rank >= 2 and list(perm) == [*range(rank - 2), rank - 1, rank - 2]


def is_product(node: ir.Node | None) -> bool:
    """Whether `node` is a product of two computed matrices of one rank."""
    if node is None or not is_op(node, "MatMul") or any(v is None or is_constant(v) for v in node.inputs):
        return False
    ranks = [rank_of(v) for v in node.inputs]
    return ranks[0] is not None and ranks[0] >= 2 and ranks[0] == ranks[1]


def size(value: ir.Value) -> int:
    """Elements of `value`; sizes that are not known count alike."""
    return prod(dim if isinstance(dim, int) else _UNKNOWN for dim in shape_of(value) or ())


def region_of(seed: ir.Value) -> Region | None:
    """The region that `seed` belongs to; None if something in it can be stored in one way only, or it is too large."""
    region = Region()
    pending, seen = [seed], set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        rank = rank_of(value)
        if rank is None or rank < 2 or len(region.nodes) > _LARGEST:
            return None
        region.values.append(value)
        maker = value.producer()
        if maker is not None and (_ties(maker) or is_product(maker)) and maker not in region.nodes:
            region.nodes.append(maker)
            pending.extend(maker.outputs)
            if _ties(maker):
                pending.extend(_tied_inputs(maker))
        for user, _ in value.uses():
            if user not in region.nodes and user.graph is seed.graph and _ties(user):
                region.nodes.append(user)
                pending.extend((*user.outputs, *_tied_inputs(user)))
    same_graph = all(node.graph is seed.graph for node in region.nodes)
    return region if region.nodes and same_graph else None


def _tied_inputs(node: ir.Node) -> list[ir.Value]:
    inputs = node.inputs if is_op(node, "Concat", *BINARY) else node.inputs[:1]
    return [v for v in inputs if v is not None and not is_constant(v) and not _is_number(v)]


def _is_number(value: ir.Value) -> bool:
    shape = shape_of(value)
    return shape is not None and all(dim == 1 for dim in shape)


def _ties(node: ir.Node) -> bool:
    """Whether `node` works on transposed matrices as well, with its axes renamed."""
    rank = rank_of(node.outputs[0]) if node.outputs else None
    if rank is None or rank < 2:
        return False
    if is_op(node, *UNARY):
        return len(node.inputs) == 1
    if is_op(node, *BINARY):
        ranks = [rank_of(v) for v in node.inputs]
        computed = [r for v, r in zip(node.inputs, ranks, strict=True) if v is not None and not is_constant(v)]
        return None not in ranks and len(ranks) == 2 and all(r is not None and (r >= 2 or r == 0) for r in computed)
    if not is_op(node, *_SWAPPED_AXES):
        return False
    if is_op(node, "Split", "Concat"):
        return len(node.inputs) == 1 or is_op(node, "Concat") or is_constant(node.inputs[1])
    if is_op(node, "Pad"):
        return constant(node.inputs[1]) is not None and len(node.inputs) < 4
    return len(node.inputs) > 3 and all(constant(v) is not None for v in node.inputs[1:])  # Slice with its axes


def _feeds_products_only(value: ir.Value) -> bool:
    return not value.is_graph_output() and all(is_product(user) for user, _ in value.uses())
