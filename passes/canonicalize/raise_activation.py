"""Sigmoid, SiLU, HardSwish and Mish to one spelling each.

Rules
1. `sigmoid`: 1 / (1 + exp(-x)) becomes Sigmoid(x).
2. `silu_quotient`: x / (1 + exp(-x)) becomes Mul(x, Sigmoid(x)).
3. `silu_order`: Mul(Sigmoid(x), x) becomes Mul(x, Sigmoid(x)), the canonical SiLU below opset 24.
4. `swish`: an opset-24 Swish with alpha 1 stays; nothing is done. com.microsoft QuickGelu becomes x * sigmoid(alpha x).
5. `hard_swish`, `mish`: become HardSwish and Mish; `hard_sigmoid`: clip(x + 3, 0, 6) / 6 becomes HardSigmoid.

Exact up to rounding. Where exp(-x) overflows to infinity, 1 / (1 + inf) = 0 is what Sigmoid gives too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from xform.graph.values import attribute
from xform.patterns import activation
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.rule import QUIET, Failure, Rule


class Sigmoid(Rule):
    """Rule 1."""

    name = "sigmoid"
    concept = "sigmoid"
    pattern = activation.SIGMOID

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Sigmoid", match["x"])


class SiluQuotient(Rule):
    """Rule 2."""

    name = "silu_quotient"
    concept = "silu"
    pattern = activation.SILU_QUOTIENT

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Mul", match["x"], build.op("Sigmoid", match["x"]))


class SiluOrder(Rule):
    """Rule 3."""

    name = "silu_order"
    concept = "silu"
    pattern = activation.SILU

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.roots[0].producer()
        return QUIET if node is not None and node.inputs[0] is match["x"] else None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Mul", match["x"], build.op("Sigmoid", match["x"]))


class QuickGelu(Rule):
    """Rule 4."""

    name = "quick_gelu"
    concept = "silu"
    pattern = op("QuickGelu", var("x"), domain="com.microsoft", name="node")

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x, alpha = match["x"], float(attribute(match.node("node"), "alpha", 1.702))
        return build.op("Mul", x, build.op("Sigmoid", x if alpha == 1.0 else build.op("Mul", x, alpha)))


class HardSwish(Rule):
    """Rule 5."""

    name = "hard_swish"
    concept = "hard_swish"
    pattern = activation.HARD_SWISH

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("HardSwish", match["x"])


class HardSigmoid(Rule):
    """Rule 5."""

    name = "hard_sigmoid"
    concept = "hard_sigmoid"
    pattern = activation.HARD_SIGMOID

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("HardSigmoid", match["x"], alpha=1 / 6, beta=0.5)


class Mish(Rule):
    """Rule 5."""

    name = "mish"
    concept = "mish"
    pattern = activation.MISH

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Mish", match["x"])


@dataclass(frozen=True)
class RaiseActivation(RewritePass):
    """Raise sigmoid-gated activations to one spelling each."""

    name: ClassVar[str] = "raise_activation"

    def rules(self) -> Sequence[Rule]:
        return (HardSwish(), Mish(), SiluQuotient(), Sigmoid(), SiluOrder(), QuickGelu(), HardSigmoid())
