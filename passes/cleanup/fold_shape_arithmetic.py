"""Fold what is computed from shapes where symbolic reasoning decides it.

The values of shape arithmetic are followed as polynomials over dim names (`xform.graph.shape_data`).

Rules
1. `known`: an integer value of rank 0 or 1 whose elements are all numbers becomes a constant: the static part of
   Shape -> Gather -> Mul -> Concat chains, in graphs whose other dims stay dynamic.
2. `same_value`: an operator whose elements are those of one of its operands is replaced by that operand
   (Where(target == -1, 1, target) around an Expand).
3. `reshape_target`: a computed Reshape target that can be written with numbers and either 0 (the operand's dim in that
   place) or one -1 becomes constant (`xform.graph.reshape` says why not with both, unless the model has the -1 itself);
   a Reshape to two dims that merges the axes before and behind one place becomes Flatten.
4. `whole_slice`: a Slice by computed bounds that keeps every element.
5. `filled`: ConstantOfShape of a constant shape, up to `fill_limit` elements.

Dims of one name are one number, as ONNX says and the oracle checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph import dims
from xform.graph.dims import Expr
from xform.graph.reshape import constant_target
from xform.graph.shape_data import Elements, ShapeData
from xform.graph.values import ONNX_DOMAINS, attribute, is_constant, shape_of
from xform.passes.cleanup.local import NodeRule, bypass_allowed, given, integers
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import Pass, PassContext
from xform.rewrite.pattern import Key
from xform.rewrite.rewriter import Rewriter
from xform.rewrite.rule import QUIET, Failure

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


class _ShapeRule(NodeRule):
    """A rule that reads the analysis of the graph. New nodes are not in it, so nothing is decided about them."""

    levels: ClassVar[int] = 1

    def __init__(self, data: ShapeData) -> None:
        self.data = data

    def elements(self, value: ir.Value | None) -> Elements | None:
        """All elements of `value`, or None unless every one is known."""
        found = self.data.elements(value)
        return found if found is not None and all(e is not None for e in found) else None


class KnownValue(_ShapeRule):
    """Rule 1."""

    name = "known"

    def anchors(self) -> frozenset[Key] | None:
        return None

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if node.domain in ONNX_DOMAINS and node.op_type != "Constant" and len(node.outputs) == 1:
            yield Match(nodes={"node": node}, roots=(node.outputs[0],))

    def check(self, match: Match, context: PassContext) -> Failure | None:
        value = match.roots[0]
        found, shape = self.data.known.get(value), shape_of(value)
        if found is None or shape is None or len(shape) > 1 or value.dtype not in _INTEGERS:
            return QUIET
        if value.is_graph_output() or not all(isinstance(e, int) for e in found):
            return QUIET
        match.data["array"] = np.array(found, dtype=value.dtype.numpy()).reshape([len(found)] * len(shape))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.constant(match.data["array"], "shape")


class SameValue(_ShapeRule):
    """Rule 2."""

    name = "same_value"
    op_types = ("Where", "Max", "Min", "Mul", "Add", "Sub", "Div", "Abs", "Concat", "Expand", "Reshape", "Slice")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        output = node.outputs[0]
        found = self.elements(output)
        if found is None:
            return QUIET
        for source in node.inputs:
            if source is None or source.dtype != output.dtype or shape_of(source) != shape_of(output):
                continue
            if not is_constant(source) and self.elements(source) == found and bypass_allowed(node, source):
                match.data["source"] = source
                return None
        return QUIET

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        source: ir.Value = match.data["source"]
        return source


class ReshapeTarget(_ShapeRule):
    """Rule 3."""

    name = "reshape_target"
    op_types = ("Reshape",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        if is_constant(node.inputs[1]):
            return QUIET
        target = self.data.elements(node.inputs[1])
        source = self.data.dims(node.inputs[0])
        found = _target(target, source, keep_zero=bool(attribute(node, "allowzero", 0)))
        axis = None if found is not None else _flattened(target, source)
        if found is None and axis is None:
            return QUIET
        match.data.update(target=found, axis=axis)
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        if match.data["axis"] is not None:
            return build.op("Flatten", match.node("node").inputs[0], axis=match.data["axis"])
        target = build.constant(np.array(match.data["target"], dtype=np.int64), "shape")
        return build.op("Reshape", match.node("node").inputs[0], target)


def _flattened(target: Elements | None, source: Elements | None) -> int | None:
    """The axis of the Flatten that a Reshape to two dims is, or None."""
    if target is None or source is None or len(target) != 2 or any(size is None for size in (*target, *source)):
        return None
    for axis in range(len(source) + 1):
        parts = (source[:axis], source[axis:])
        sizes = [dims.product([size for size in part if size is not None]) for part in parts]
        if sizes == target:
            return axis
    return None


def _target(target: Elements | None, source: Elements | None, *, keep_zero: bool) -> list[int] | None:
    """A constant target of the same meaning, or None."""
    if target is None or (keep_zero and 0 in target):
        return None
    if -1 not in target and 0 not in target:
        return constant_target(target, source)
    found: list[int] = []
    for index, size in enumerate(target):  # beside a -1 of the model's own a 0 fails, here as there
        if isinstance(size, int):
            found.append(size)
        elif size is not None and source is not None and index < len(source) and source[index] == size:
            found.append(0)
        else:  # also an element that is not known at all: it is what the others leave over, whatever it is
            found.append(-1)
    return found if found.count(-1) <= 1 and (-1 in target or found.count(-1) == 0) else None


class WholeComputedSlice(_ShapeRule):
    """Rule 4."""

    name = "whole_slice"
    op_types = ("Slice",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        x = node.inputs[0]
        source = self.data.dims(x)
        starts, ends = (self.data.elements(given(node, i)) for i in (1, 2))
        if x is None or source is None or starts is None or ends is None or not bypass_allowed(node, x):
            return QUIET
        axes = integers(given(node, 3)) if given(node, 3) is not None else list(range(len(starts)))
        steps = integers(given(node, 4)) if given(node, 4) is not None else [1] * len(starts)
        if axes is None or steps is None or any(step != 1 for step in steps):
            return QUIET
        for start, end, axis in zip(starts, ends, axes, strict=True):
            if not -len(source) <= axis < len(source) or not _whole(source[axis], start, end):
                return QUIET
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value | Failure:
        return match.node("node").inputs[0] or QUIET


def _whole(size: Expr | None, start: Expr | None, end: Expr | None) -> bool:
    if start != 0 or end is None:
        return False
    return (size is not None and end == size) or (isinstance(end, int) and end >= 2**31 - 1)


class Filled(NodeRule):
    """Rule 5."""

    name = "filled"
    op_types = ("ConstantOfShape",)

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        shape = integers(node.inputs[0])
        fill = attribute(node, "value")
        if shape is None or any(d < 0 for d in shape) or np.prod(shape, dtype=np.float64) > self.limit:
            return QUIET
        if node.outputs[0].is_graph_output() or (fill is not None and fill.dtype == ir.DataType.STRING):
            return QUIET
        match.data["shape"] = shape
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        fill = attribute(match.node("node"), "value")
        element = np.zeros(1, np.float32) if fill is None else fill.numpy().reshape(-1)[:1]
        dtype = ir.DataType.FLOAT if fill is None else fill.dtype
        return build.constant(ir.tensor(np.full(match.data["shape"], element[0], element.dtype), dtype=dtype), "filled")


@dataclass(frozen=True)
class FoldShapeArithmetic(Pass):
    """Folding of shape arithmetic.

    Attributes:
        fill_limit: Largest number of elements of a constant made from ConstantOfShape.
    """

    name = "fold_shape_arithmetic"
    fill_limit: int = 4096

    def run(self, model: ir.Model, context: PassContext) -> bool:
        data = ShapeData()
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            data.visit(node)
        rules = (
            KnownValue(data),
            SameValue(data),
            ReshapeTarget(data),
            WholeComputedSlice(data),
            Filled(self.fill_limit),
        )
        return Rewriter(model, pass_name=self.name, context=context).apply(rules)
