"""From the softmax back to the product of queries and keys: scales, soft caps, masks, views.

The chain between the product and the softmax is read as

    logits = steps(softcap * tanh(scale * q k^T / softcap))

with steps `+ mask`, `where(condition, ., fill)` and `* factor` in any order and number. `Logits.steps` lists them from
the product outwards; replayed on an empty bias they give the additive mask of an Attention operator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from xform.graph.values import Dim, attribute, display_name, is_op, rank_of, same_dim, scalar, shape_of
from xform.rewrite.rule import Failure

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
LONGEST_CHAIN = 64  # nodes looked at between a softmax and its product


@dataclass(frozen=True)
class AddMask:
    """`logits + mask`, or `logits - mask`, added while the logits had the shape `view` (None: their own)."""

    mask: ir.Value
    negative: bool = False
    view: tuple[Dim, ...] | None = None


@dataclass(frozen=True)
class Fill:
    """`Where(condition, logits, fill)`, or `Where(condition, fill, logits)` when `keeps` is False; `view` as above."""

    condition: ir.Value
    fill: float
    keeps: bool
    view: tuple[Dim, ...] | None = None


@dataclass(frozen=True)
class Multiply:
    """`logits * factor` after a mask was applied."""

    factor: float


Step = AddMask | Fill | Multiply


@dataclass(frozen=True)
class Logits:
    """What stands between a softmax and its product.

    Attributes:
        product: The MatMul or Einsum of queries and keys.
        swapped: Whether the product is keys times queries, transposed afterwards.
        scale: Factor on the product, before the soft cap.
        softcap: Bound of the soft cap; 0 for none.
        factors: Factors on the product that are tensors, the same for all keys: [.., S or 1, 1].
        steps: Masks and later factors, from the product outwards.
        view: Shape in which the softmax sees the logits where it is not the product's own.
        unviewed: Shape that the view was taken of.
        outside: How many of the steps were taken before the view.
        widened: dtype that the logits were cast to after all steps; None for no cast.
        nodes: Every node of the chain, the product included.
    """

    product: ir.Node
    nodes: tuple[ir.Node, ...]
    swapped: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    factors: tuple[ir.Value, ...] = ()
    steps: tuple[Step, ...] = ()
    view: tuple[Dim, ...] | None = None
    widened: ir.DataType | None = None
    unviewed: tuple[Dim, ...] | None = None
    outside: int = 0

    def through(self, node: ir.Node) -> Logits:
        return replace(self, nodes=(*self.nodes, node))

    def with_step(self, node: ir.Node, step: Step) -> Logits:
        return replace(self.through(node), steps=(*self.steps, step))

    def scaled(self, node: ir.Node, factor: float) -> Logits:
        """The same, times `factor`: the product, its cap, and the masks applied so far."""
        taken = self.with_step(node, Multiply(factor)) if self.steps else self.through(node)
        return replace(taken, scale=self.scale * factor, softcap=self.softcap * factor)


def walk_logits(value: ir.Value) -> Logits | Failure:
    """Read the chain that ends in `value`, or say at which node it is no attention."""
    return _Walk()(value)


class _Walk:
    """One reading. Both operands of an addition are tried, so the number of nodes looked at is bounded."""

    def __init__(self) -> None:
        self._left = LONGEST_CHAIN

    def __call__(self, value: ir.Value) -> Logits | Failure:
        node = value.producer()
        self._left -= 1
        if node is None or self._left < 0:
            return Failure("the softmax is not over a product of queries and keys")
        if is_op(node, "MatMul", "Einsum"):
            return Logits(node, (node,))
        reader = _READERS.get(node.op_type) if is_op(node, node.op_type) else None
        if reader is None:
            return Failure(f"{node.op_type} {display_name(node)} stands between the product and the softmax", (node,))
        return reader(node, self)


def _scale(node: ir.Node, walk: _Walk) -> Logits | Failure:
    """Mul or Div by a constant."""
    first, second = _pair(node)
    if (factor := scalar(second)) is not None:
        return _scaled(node, walk, first, 1.0 / factor if node.op_type == "Div" and factor else factor)
    if node.op_type == "Mul" and (factor := scalar(first)) is not None:
        return _scaled(node, walk, second, factor)
    return _tensor_factor(node, walk, first, second)


def _tensor_factor(node: ir.Node, walk: _Walk, first: ir.Value, second: ir.Value) -> Logits | Failure:
    """Mul by a tensor that is the same for all keys, such as a learned temperature per head."""
    failure = Failure(f"the factor of {display_name(node)} is not one constant number", (node,))
    for value, factor in ((first, second), (second, first)):
        shape = shape_of(factor)
        if node.op_type != "Mul" or not shape or shape[-1] != 1 or not _covers(value, factor):
            continue
        inner = walk(value)
        if isinstance(inner, Logits) and not (inner.steps or inner.softcap or inner.view or inner.swapped):
            if inner.widened is not None:
                return _late(node)
            return replace(inner.through(node), factors=(*inner.factors, factor))
    return failure


def _scaled(node: ir.Node, walk: _Walk, value: ir.Value, factor: float) -> Logits | Failure:
    inner = walk(value)
    if isinstance(inner, Failure):
        return inner
    if not (math.isfinite(factor) and factor > 0):
        return Failure(f"the logits are scaled by {factor} at {display_name(node)}, not by a positive number", (node,))
    return inner.scaled(node, factor) if inner.widened is None else _late(node)


def _tanh(node: ir.Node, walk: _Walk) -> Logits | Failure:
    inner = walk(_first(node))
    if isinstance(inner, Failure):
        return inner
    if inner.steps or inner.softcap or inner.view or inner.widened is not None:
        return Failure(f"the soft cap {display_name(node)} comes after a mask or another cap", (node,))
    return replace(inner.through(node), softcap=1.0)


def _add(node: ir.Node, walk: _Walk) -> Logits | Failure:
    """Add or Sub of a mask: the operand that leads to a product of the same shape carries the logits."""
    operands = _pair(node)
    failure: Failure | None = None
    for index, (value, mask) in enumerate((operands, operands[::-1])):
        if index == 1 and node.op_type == "Sub":
            break
        inner = walk(value)
        if isinstance(inner, Failure):
            failure = failure or inner
            continue
        if not _covers(value, mask):
            failure = failure or Failure(f"{display_name(node)} broadcasts the logits", (node,))
            continue
        if inner.widened is not None:
            return _late(node)
        return inner.with_step(node, AddMask(mask, node.op_type == "Sub", inner.view))
    return failure or Failure(f"neither operand of {display_name(node)} leads to a product", (node,))


def _where(node: ir.Node, walk: _Walk) -> Logits | Failure:
    condition, yes, no = (v for v in node.inputs if v is not None)
    keeps = scalar(no) is not None
    value, fill = (yes, scalar(no)) if keeps else (no, scalar(yes))
    if fill is None:
        return Failure(f"the fill of {display_name(node)} is not one constant number", (node,))
    inner = walk(value)
    if isinstance(inner, Failure):
        return inner
    if not _covers(value, condition):
        return Failure(f"{display_name(node)} broadcasts the logits", (node,))
    if inner.widened is not None:
        return _late(node)
    if not fill < 0:
        return Failure(f"{display_name(node)} fills with {fill:g}, which closes no keys", (node,))
    return inner.with_step(node, Fill(condition, fill, keeps, inner.view))


def _cast(node: ir.Node, walk: _Walk) -> Logits | Failure:
    inner = walk(_first(node))
    if isinstance(inner, Failure):
        return inner
    source, target = _first(node).dtype, node.outputs[0].dtype
    if source == target:
        return inner.through(node)
    if source not in FLOATS or target not in FLOATS or target is None or inner.widened is not None:
        return Failure(f"{display_name(node)} casts the logits to {target}", (node,))
    return replace(inner.through(node), widened=target)


def _reshape(node: ir.Node, walk: _Walk) -> Logits | Failure:
    """A view that splits leading dims, or the one that takes it back."""
    inner = walk(_first(node))
    if isinstance(inner, Failure):
        return inner
    before, after = shape_of(_first(node)), shape_of(node.outputs[0])
    if before is None or after is None or None in after[-2:] or before[-2:] != after[-2:]:
        return Failure(
            f"the view {display_name(node)} of the logits changes queries or keys, or its shape is unknown", (node,)
        )
    if _same_elements(before, after):
        return inner.through(node)
    if inner.view is None and len(after) == len(before) + 1:
        return replace(inner.through(node), view=after, unviewed=before, outside=len(inner.steps))
    if inner.view is not None and inner.unviewed is not None and _same_elements(inner.unviewed, after):
        if not all(isinstance(s, AddMask) for s in inner.steps[inner.outside :]):
            return Failure(f"more than additions happen inside the view that {display_name(node)} closes", (node,))
        return replace(inner.through(node), view=None, unviewed=None)
    return Failure(f"the view {display_name(node)} of the logits is not taken back before the softmax", (node,))


def _same_elements(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> bool:
    """Whether two shapes of as many elements are the same: all dims but the first are known to be."""
    return len(before) == len(after) and None not in after[1:] and before[1:] == after[1:]


def _transpose(node: ir.Node, walk: _Walk) -> Logits | Failure:
    inner = walk(_first(node))
    if isinstance(inner, Failure):
        return inner
    rank = rank_of(node.outputs[0]) or 0
    perm = list(attribute(node, "perm", range(rank)[::-1]))
    swap = [*range(rank - 2), rank - 1, rank - 2]
    if perm != swap or inner.steps or inner.view or inner.factors:
        return Failure(f"{display_name(node)} transposes the logits", (node,))
    return replace(inner.through(node), swapped=not inner.swapped)


def _pass_on(node: ir.Node, walk: _Walk) -> Logits | Failure:
    inner = walk(_first(node))
    return inner if isinstance(inner, Failure) else inner.through(node)


def _late(node: ir.Node) -> Failure:
    return Failure(f"{display_name(node)} works on logits that were cast to another precision before", (node,))


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _pair(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    first, second = node.inputs[:2]
    assert first is not None and second is not None
    return first, second


def _covers(value: ir.Value, *others: ir.Value) -> bool:
    """Whether broadcasting `value` against `others` provably leaves its shape as it is."""
    ours = shape_of(value)
    if ours is None:
        return False
    for other in others:
        theirs = shape_of(other)
        if theirs is None or len(theirs) > len(ours):
            return False
        for a, b in zip(ours[::-1], theirs[::-1], strict=False):
            settled = isinstance(a, int) and a != 1  # b is 1 or the same, or the model is invalid
            if not (b == 1 or settled or same_dim(a, b)):
                return False
    return True


_READERS = {
    "Mul": _scale,
    "Div": _scale,
    "Tanh": _tanh,
    "Add": _add,
    "Sub": _add,
    "Where": _where,
    "Cast": _cast,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Identity": _pass_on,
}
