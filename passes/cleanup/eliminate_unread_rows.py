"""Compute only the rows that somebody reads.

A classifier reads one token of the last block, a language model in its prefill the last one; what the block computes
for all the others is thrown away. Let S keep a few indices of one axis (Gather or Slice by constants). An operator f
that treats the indices of this axis alike and apart satisfies

    S(f(x, y, ..)) = f(S(x), S(y), ..)

so S is moved in front of f, again and again, until something needs the whole axis or has another reader. In the last
block of a vision transformer that leaves one token to the attention's queries, to its output projection and to the
feed-forward network: nine of twelve parts of the block, ten where queries have a product of their own.

Rules
1. `select_first`: f is an elementwise operator, Sum, Where or Clip (operands that are broadcast along the axis stay);
   LayerNormalization and RMSNormalization over axes behind it, Softmax over another one; MatMul, along rows and batch;
   Transpose; a view, where an axis that it merges or splits leaves one index, a block or a stride (of a batch's rows,
   say); Attention, along queries [B, H, S, D] and the same axis of its mask. Its causal rule lets the last query see
   every key, so there it vanishes; other queries keep it, and stop the rule with a remark. A Gather that drops the axis
   moves as one that keeps it, and a Squeeze takes its place.

Legal: every reader of f's result keeps the same indices, and it is no graph output.
Profitable: at most half of the indices are kept, of an axis of unknown size at most one; and a product, an attention, a
norm, a softmax or a Transpose comes to be computed on fewer rows, as elementwise operators and views alone cost less
where they are, fused with what is in front of them.

Exact: every number that is left is computed from the same numbers as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import ORIGIN, Dim, attribute, attributes_of, display_name, is_op, rank_of, same_dim, shape_of
from xform.passes.cleanup.local import axes_of, given, integers
from xform.passes.cleanup.row_selection import Selection, drops_axis, selection_of, through_view
from xform.passes.cleanup.simplify_layout import permutation
from xform.patterns.elementwise import BINARY, UNARY
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure, Rule

_PREDICATES = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor")
_ALONG_OTHER_AXES = ("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax")
_WORK = ("MatMul", "Attention", "Transpose", *_ALONG_OTHER_AXES)
_QUERIES = 2  # axis of Attention's queries, [B, H, S, D]


@dataclass(frozen=True)
class _Moved:
    """An operator on what is kept.

    Attributes:
        axes: The axis of each operand that is selected, by index of the operand.
        selection: What is kept of the operand, where a view has merged or split the axis.
        target: New target of a Reshape.
        causal: Whether the causal rule stays.
    """

    axes: dict[int, int]
    selection: Selection | None = None
    target: tuple[int, ...] | None = None
    causal: bool = True


class SelectFirst(Rule):
    """Rule 1."""

    name = "select_first"
    concept = "rows"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "Gather"), ("", "Slice")})

    def reach(self) -> int:
        return 2

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        selection = selection_of(node)
        x = node.inputs[0]
        maker = x.producer() if x is not None else None
        if selection is None or x is None or maker is None or maker.graph is not node.graph or x.is_graph_output():
            return
        if maker.outputs[0] is not x or any(v.uses() or v.is_graph_output() for v in maker.outputs[1:]):
            return
        readers = list(dict.fromkeys(reader for reader, _ in x.uses()))
        if any(reader.graph is not node.graph or selection_of(reader) != selection for reader in readers):
            return
        size = _size(x, selection)
        moved = _moved(maker, selection) if _is_few(selection, size) else None
        if isinstance(moved, Failure):
            yield moved
        elif moved is not None:
            yield Match(
                nodes={"maker": maker, **{f"reader {i}": reader for i, reader in enumerate(readers)}},
                roots=tuple(reader.outputs[0] for reader in readers),
                data={"selection": selection, "moved": moved, "readers": readers},
                note=f"{maker.op_type} {display_name(maker)} on {selection.most(size)} of {size} rows",
            )

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """What costs is computed on fewer rows, now or when the selection gets there.

        Of elementwise operators and views alone a runtime would lose the fusion with what is in front of them. That at
        most half of the axis is kept, of an axis of unknown size at most one index, was asked for before.
        """
        return None if _reaches_work(match.node("maker"), match.data["selection"]) else QUIET

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        maker, selection, moved = match.node("maker"), match.data["selection"], match.data["moved"]
        inputs: list[Any] = list(maker.inputs)
        for index, axis in moved.axes.items():
            inputs[index] = (moved.selection or selection).of(maker.inputs[index], axis, build)
        if moved.target is not None:
            inputs[1] = np.array(moved.target, np.int64)
        attributes = attributes_of(maker)
        if not moved.causal:
            attributes.pop("is_causal")
        selected = len(build.nodes)
        result = build.op(maker.op_type, *inputs, domain=maker.domain, **attributes)
        results = []
        for reader in match.data["readers"]:
            results.append(build.op("Squeeze", result, [selection.axis]) if drops_axis(reader) else result)
        for index, made in enumerate(build.nodes):  # so that a long way up does not collect the names along it
            made.metadata_props[ORIGIN] = display_name(maker if index == selected else match.data["readers"][0])
        return results


def _size(x: ir.Value, selection: Selection) -> Dim:
    shape = shape_of(x)
    return None if shape is None else shape[selection.axis]


def _is_few(selection: Selection, size: Dim) -> bool:
    """At most half of the axis, and something; of an axis of unknown size at most one index."""
    most = selection.most(size)
    return most is not None and (0 < 2 * most <= size if isinstance(size, int) else most == 1)


def _reaches_work(node: ir.Node, selection: Selection) -> bool:
    """Whether a selection of what `node` gives can move in front of work, by way of what can be moved."""
    waiting, seen = [(node, selection)], {node}
    while waiting:
        at, kept = waiting.pop()
        moved = _moved(at, kept)
        if moved is None or isinstance(moved, Failure):
            continue
        if is_op(at, *_WORK):
            return True
        for index, axis in moved.axes.items():
            operand = at.inputs[index]
            maker = operand.producer() if operand is not None else None
            if maker is not None and maker not in seen:
                seen.add(maker)
                waiting.append((maker, moved.selection or replace(kept, axis=axis)))
    return False


def _moved(node: ir.Node, selection: Selection) -> _Moved | Failure | None:
    """How `node` is computed from selected operands; None where it cannot be."""
    shape = shape_of(node.outputs[0])
    if shape is None:
        return None
    axis = selection.axis
    if is_op(node, *UNARY, "Clip"):
        return _Moved({0: axis}) if all(v is None or rank_of(v) == 0 for v in node.inputs[1:]) else None
    if is_op(node, *BINARY, *_PREDICATES, "Sum", "Where"):
        return _broadcast(node, range(len(node.inputs)), shape, axis)
    if is_op(node, *_ALONG_OTHER_AXES):
        over = attribute(node, "axis", -1) % len(shape)
        if is_op(node, "Softmax", "LogSoftmax"):
            return _Moved({0: axis}) if axis != over else None
        return _broadcast(node, range(len(node.inputs)), shape, axis) if axis < over else None
    if is_op(node, "MatMul"):
        return _product(node, shape, axis)
    if is_op(node, "Transpose"):
        perm = permutation(node)
        return None if perm is None else _Moved({0: perm[axis]})
    if is_op(node, "Reshape", "Squeeze", "Unsqueeze"):
        return _view(node, shape, selection)
    if is_op(node, "Attention"):
        return _attention(node, shape, selection)
    return None


def _broadcast(node: ir.Node, indices: Sequence[int], shape: tuple[Dim, ...], axis: int) -> _Moved | None:
    """Operands that have the axis are selected, those that are broadcast along it stay."""
    axes = {}
    for index in indices:
        operand = shape_of(node.inputs[index])
        if node.inputs[index] is None:
            continue
        if operand is None:
            return None
        at = axis - (len(shape) - len(operand))
        if at < 0 or operand[at] == 1:
            continue
        if not same_dim(operand[at], shape[axis]):
            return None
        axes[index] = at
    return _Moved(axes) if axes else None


def _product(node: ir.Node, shape: tuple[Dim, ...], axis: int) -> _Moved | None:
    """Rows of the left operand, or matrices of a batch."""
    left, right = rank_of(node.inputs[0]), rank_of(node.inputs[1])
    if left is None or right is None or left < 2 or right < 2 or axis == len(shape) - 1:
        return None
    if axis == len(shape) - 2:
        return _Moved({0: left - 2})
    return _broadcast(node, (0, 1), shape, axis)


def _view(node: ir.Node, shape: tuple[Dim, ...], selection: Selection) -> _Moved | None:
    """A view that keeps the axis, or merges or splits it so that what is kept is one index, a block or a stride."""
    before, axis = shape_of(node.inputs[0]), selection.axis
    if before is None:
        return None
    operand = through_view(before, shape, selection)
    if operand is None:
        return None
    at, kept = operand.axis, selection.count(shape[axis])
    if not is_op(node, "Reshape"):
        return _Moved({0: at}, operand) if axes_of(node, len(before)) is not None else None
    target = integers(node.inputs[1])
    if target is None or kept is None or len(target) != len(shape) or (0 in target and attribute(node, "allowzero", 0)):
        return None
    if at < len(target) and target[at] == 0 and at != axis:  # it copies the dim that changes
        return None
    return _Moved({0: at}, operand, target=(*target[:axis], kept, *target[axis + 1 :]))


def _attention(node: ir.Node, shape: tuple[Dim, ...], selection: Selection) -> _Moved | Failure | None:
    """Queries, and the rows of the mask that are theirs."""
    queries, keys = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if queries is None or keys is None or len(queries) != len(keys) or len(queries) != 4 or selection.axis != _QUERIES:
        return None
    if any(v is not None for v in node.inputs[4:]):  # a cache, or lengths of keys
        return None
    causal = bool(attribute(node, "is_causal", 0))
    if causal and not same_dim(queries[_QUERIES], keys[_QUERIES]):
        return None
    if causal and not selection.is_last(queries[_QUERIES]):
        return Failure("only the last query sees all keys under the causal rule, and it is not the one kept", (node,))
    axes = {0: _QUERIES}
    mask = given(node, 3)
    if mask is not None:
        rows = shape_of(mask)
        if rows is None or len(rows) < 2:
            return None
        if rows[-2] != 1:
            if not same_dim(rows[-2], queries[_QUERIES]):
                return None
            axes[3] = len(rows) - 2
    return _Moved(axes, causal=not causal)


@dataclass(frozen=True)
class EliminateUnreadRows(RewritePass):
    """Rows that nobody reads are not computed."""

    name: ClassVar[str] = "eliminate_unread_rows"

    def rules(self) -> Sequence[Rule]:
        return (SelectFirst(),)
