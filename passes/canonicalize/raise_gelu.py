"""GELU in any spelling to Gelu (Hendrycks & Gimpel, arXiv 1606.08415; ONNX Gelu-20).

Rules
1. `erf`: x/2 (1 + erf(x/sqrt 2)) becomes Gelu(x, approximate="none").
2. `tanh`: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) becomes Gelu(x, approximate="tanh").
3. `microsoft`: com.microsoft's Gelu and FastGelu (without or with a bias) become the standard operator.

The constants must be the right ones to a few units of their own rounding (1e-6 relative in float32): 0.7979 is another
function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from xform.patterns import gelu
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule


class Erf(Rule):
    """Rule 1."""

    name = "erf"
    concept = "gelu"
    pattern = gelu.GELU_ERF
    near_miss = 4

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Gelu", match["x"], approximate="none")


class Tanh(Rule):
    """Rule 2."""

    name = "tanh"
    concept = "gelu"
    pattern = gelu.GELU_TANH
    near_miss = 6

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Gelu", match["x"], approximate="tanh")


class Microsoft(Rule):
    """Rule 3."""

    name = "microsoft"
    concept = "gelu"

    def anchors(self) -> frozenset[Key]:
        return frozenset(("com.microsoft", name) for name in ("Gelu", "FastGelu"))

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        yield Match(roots=(node.outputs[0],))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        node = match.roots[0].producer()
        assert node is not None and node.inputs[0] is not None
        x = node.inputs[0]
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            x = build.op("Add", x, node.inputs[1])
        return build.op("Gelu", x, approximate="tanh" if node.op_type == "FastGelu" else "none")


@dataclass(frozen=True)
class RaiseGelu(RewritePass):
    """Raise every spelling of GELU to Gelu."""

    name: ClassVar[str] = "raise_gelu"

    def rules(self) -> Sequence[Rule]:
        return (Erf(), Tanh(), Microsoft())
