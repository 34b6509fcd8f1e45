"""Remove operators that give back their input.

Rules (x is kept exactly; shapes must be provably the same)
1. `cast`: Cast or CastLike to the type that x has; Cast(Cast(x, wider), T) becomes Cast(x, T) where the inner cast
   keeps every value of x.
2. `slice`: every axis from its start to its end in steps of one, by constant bounds.
3. `expand`: Expand or Tile by ones, or Expand to the shape that x has.
4. `single`: Concat, Sum, Max, Min, Mean of one operand; Split into one part; Clip without bounds.
5. `concat_empty`: operands of a Concat that have no elements are left out.
6. `pad`: Pad by zeros everywhere.
7. `neutral`: x + 0, x - 0, x * 1, x / 1, x ** 1, x and true, x or false, where the constant does not widen the shape.
   (x + 0 turns a negative zero into a positive one; the two are equal.)
8. `twice`: Neg(Neg(x)), Not(Not(x)); f(f(x)) = f(x) for Relu, Abs, Floor, Ceil, Round, Sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.values import attribute, constant, is_op, shape_of
from xform.passes.cleanup.local import NodeRule, bypass_allowed, given, integers, known_rank, normalized, same_shape
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule


class _Bypass(NodeRule):
    """A rule whose answer is one of the node's inputs, or nothing."""

    def source(self, node: ir.Node) -> ir.Value | None:
        """The input that the node's first output equals, or None."""
        raise NotImplementedError

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            return QUIET
        source = self.source(node)
        if source is None or not bypass_allowed(node, source):
            return QUIET
        match.data["source"] = source
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        source: ir.Value = match.data["source"]
        return source


class CastToSame(_Bypass):
    """Rule 1, a cast to the type that x has."""

    name = "cast"
    op_types = ("Cast", "CastLike")

    def source(self, node: ir.Node) -> ir.Value | None:
        x = node.inputs[0]
        to = cast_type(node)
        return x if x is not None and to is not None and x.dtype == to else None


class CastTwice(NodeRule):
    """Rule 1, two casts."""

    name = "cast_twice"
    op_types = ("Cast",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        outer = match.node("node")
        inner = outer.inputs[0].producer() if outer.inputs[0] is not None else None
        if inner is None or not is_op(inner, "Cast") or inner.inputs[0] is None:
            return QUIET
        if not keeps_values(inner.inputs[0].dtype, cast_type(inner)):
            return QUIET
        match.data["source"] = inner.inputs[0]
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        outer = match.node("node")
        source: ir.Value = match.data["source"]
        to = cast_type(outer)
        if source.dtype == to and bypass_allowed(outer, source):
            return source
        return build.op("Cast", source, to=to, saturate=attribute(outer, "saturate"))


_INTEGER_BITS = {ir.DataType.INT8: 7, ir.DataType.INT16: 15, ir.DataType.INT32: 31, ir.DataType.INT64: 63}
_UNSIGNED_BITS = {ir.DataType.UINT8: 8, ir.DataType.UINT16: 16, ir.DataType.UINT32: 32, ir.DataType.UINT64: 64}
_SIGNIFICAND = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8, ir.DataType.FLOAT: 24, ir.DataType.DOUBLE: 53}
_WIDER = {
    (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    (ir.DataType.FLOAT16, ir.DataType.DOUBLE),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
    (ir.DataType.BFLOAT16, ir.DataType.DOUBLE),
    (ir.DataType.FLOAT, ir.DataType.DOUBLE),
}


def cast_type(node: ir.Node) -> ir.DataType | None:
    """The type that a Cast or CastLike casts to."""
    if node.op_type == "Cast":
        to = attribute(node, "to")
        return None if to is None else ir.DataType(to)
    like = given(node, 1)
    return None if like is None else like.dtype


def keeps_values(source: ir.DataType | None, to: ir.DataType | None) -> bool:
    """Whether a cast from `source` to `to` keeps every value."""
    if source is None or to is None:
        return False
    if source == to or (source, to) in _WIDER:
        return True
    bits = 1 if source == ir.DataType.BOOL else _INTEGER_BITS.get(source, _UNSIGNED_BITS.get(source, 99))
    room = _INTEGER_BITS.get(to, _SIGNIFICAND.get(to, 0))
    if source not in _INTEGER_BITS:
        room = max(room, _UNSIGNED_BITS.get(to, 0))
    return bits <= room


class WholeSlice(_Bypass):
    """Rule 2."""

    name = "slice"
    op_types = ("Slice",)

    def source(self, node: ir.Node) -> ir.Value | None:
        x = node.inputs[0]
        starts, ends = integers(given(node, 1)), integers(given(node, 2))
        rank, shape = known_rank(x), shape_of(x)
        if starts is None or ends is None:
            return None
        axes = integers(given(node, 3)) if given(node, 3) is not None else list(range(len(starts)))
        steps = integers(given(node, 4)) if given(node, 4) is not None else [1] * len(starts)
        if axes is None or steps is None or any(step != 1 for step in steps):
            return None
        if rank < 0 and any(a < 0 for a in axes):
            rank = 0  # only the dims are looked up by axis, and they are unknown
        for start, end, axis in zip(starts, ends, normalized(axes, rank), strict=True):
            size = shape[axis] if shape is not None and axis < len(shape) else None
            from_start = start == 0 or (isinstance(size, int) and start <= -size)
            to_end = end >= 2**31 - 1 or (isinstance(size, int) and end >= size)
            if not (from_start and to_end):
                return None
        return x


class WholeExpand(_Bypass):
    """Rule 3."""

    name = "expand"
    op_types = ("Expand", "Tile")

    def source(self, node: ir.Node) -> ir.Value | None:
        x = node.inputs[0]
        target, shape = integers(given(node, 1)), shape_of(x)
        if x is None:
            return None
        if node.op_type == "Expand" and same_shape(x, node.outputs[0]):
            return x
        if target is None or shape is None or len(target) > len(shape):
            return None
        if node.op_type == "Tile":
            return x if all(t == 1 for t in target) else None
        tail = shape[len(shape) - len(target) :]
        return x if all(t in (1, d) for t, d in zip(target, tail, strict=True)) else None


class SingleOperand(_Bypass):
    """Rule 4."""

    name = "single"
    op_types = ("Concat", "Sum", "Max", "Min", "Mean", "Split", "Clip")

    def source(self, node: ir.Node) -> ir.Value | None:
        if node.op_type == "Split":
            return node.inputs[0] if len(node.outputs) == 1 else None
        return node.inputs[0] if sum(v is not None for v in node.inputs) == 1 else None


class ConcatEmpty(NodeRule):
    """Rule 5."""

    name = "concat_empty"
    op_types = ("Concat",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        axis = attribute(node, "axis", 0)
        kept = [v for v in node.inputs if v is not None and not _is_empty(v, axis)]
        if not kept or len(kept) == len(node.inputs):
            return QUIET
        match.data["kept"] = kept
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Concat", *match.data["kept"], axis=attribute(match.node("node"), "axis", 0))


def _is_empty(value: ir.Value, axis: int) -> bool:
    shape = shape_of(value)
    return shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 0


class PadNothing(_Bypass):
    """Rule 6."""

    name = "pad"
    op_types = ("Pad",)

    def source(self, node: ir.Node) -> ir.Value | None:
        pads = integers(given(node, 1))
        return node.inputs[0] if pads is not None and not any(pads) else None


class NeutralOperand(_Bypass):
    """Rule 7."""

    name = "neutral"
    op_types = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or")
    _NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1, "And": True, "Or": False}  # noqa: RUF012

    def source(self, node: ir.Node) -> ir.Value | None:
        neutral = self._NEUTRAL[node.op_type]
        pairs = [(0, 1)] if node.op_type in ("Sub", "Div", "Pow") else [(0, 1), (1, 0)]
        for kept, other in pairs:
            x, operand = node.inputs[kept], node.inputs[other]
            if x is None or operand is None or not _is_all(operand, neutral):
                continue
            if not _widens(operand, x, node.outputs[0]):
                return x
        return None


def _is_all(value: ir.Value, number: int | bool) -> bool:
    array = constant(value, max_elements=65536)
    return array is not None and array.size > 0 and array.dtype.kind not in "OSU" and bool(np.all(array == number))


def _widens(operand: ir.Value, x: ir.Value, output: ir.Value) -> bool:
    """Whether broadcasting with `operand` may change the shape of `x`."""
    shape, rank = shape_of(operand), known_rank(x)
    if shape is not None and len(shape) <= max(rank, 0) and all(d == 1 for d in shape):
        return False
    if shape is not None and len(shape) == 0:
        return False
    return not same_shape(x, output)


class Twice(NodeRule):
    """Rule 8."""

    name = "twice"
    op_types = ("Neg", "Not", "Relu", "Abs", "Floor", "Ceil", "Round", "Sign")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        outer = match.node("node")
        inner_value = outer.inputs[0]
        inner = inner_value.producer() if inner_value is not None else None
        if inner_value is None or inner is None or not is_op(inner, outer.op_type):
            return QUIET
        source = inner.inputs[0] if outer.op_type in ("Neg", "Not") else inner_value
        if source is None or not bypass_allowed(outer, source):
            return QUIET
        match.data["source"] = source
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        source: ir.Value = match.data["source"]
        return source


@dataclass(frozen=True)
class EliminateNoOps(RewritePass):
    """Removal of operators without effect."""

    name = "eliminate_no_ops"

    def rules(self) -> Sequence[Rule]:
        return (
            CastToSame(),
            CastTwice(),
            WholeSlice(),
            WholeExpand(),
            SingleOperand(),
            ConcatEmpty(),
            PadNothing(),
            NeutralOperand(),
            Twice(),
        )
