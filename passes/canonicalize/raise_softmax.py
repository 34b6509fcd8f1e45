"""Softmax as exp(x - max x) / sum to Softmax (ONNX Softmax-13).

Rules
1. `decomposed`: both reductions over the same single axis, keeping dims. The shifted form is the same function in
   floating point; the form without the maximum overflows where Softmax does not, so it is left with a remark.
2. `transposed`: Transpose, Softmax over the last axis, the inverse Transpose (how exporters below opset 13 wrote
   other axes) becomes Softmax over that axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from xform.graph.values import attribute, rank_of, used_once
from xform.passes.canonicalize.axes import reduction_axes
from xform.patterns import softmax
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.rule import QUIET, Failure, Rule


class Decomposed(Rule):
    """Rule 1."""

    name = "decomposed"
    concept = "softmax"
    pattern = softmax.SOFTMAX
    near_miss = 3

    def check(self, match: Match, context: PassContext) -> Failure | None:
        x = match["x"]
        a, b = reduction_axes(match["max_axes"], x), reduction_axes(match["sum_axes"], x)
        if a is None or b is None:
            return Failure("the rank of the input is unknown")
        if a != b or len(a) != 1:
            return Failure(f"maximum over axes {a} and sum over axes {b}: not one common axis")
        match.data["axis"] = a[0]
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Softmax", match["x"], axis=match.data["axis"])


class Transposed(Rule):
    """Rule 2."""

    name = "transposed"
    concept = "softmax"
    pattern = op("Transpose", op("Softmax", op("Transpose", var("x"), name="before"), name="softmax"), name="after")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        rank = rank_of(match["x"])
        before, after = attribute(match.node("before"), "perm"), attribute(match.node("after"), "perm")
        if rank is None or before is None or after is None or not used_once(match.node("softmax").outputs[0]):
            return QUIET
        if [before[i] for i in after] != list(range(rank)):
            return QUIET
        match.data["axis"] = int(before[int(attribute(match.node("softmax"), "axis", -1)) % rank])
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Softmax", match["x"], axis=match.data["axis"])


@dataclass(frozen=True)
class RaiseSoftmax(RewritePass):
    """Raise every spelling of Softmax to Softmax."""

    name: ClassVar[str] = "raise_softmax"

    def rules(self) -> Sequence[Rule]:
        return (Decomposed(), Transposed())
