"""A pass of your own, run and verified like those of xform, without changing xform.

    python examples/own_pass.py

The pass replaces x / sqrt(d) by a product with a constant. A second one is wrong on purpose: verification undoes it and
names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

import xform
from xform.graph.dump import dump
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import const, op, var
from xform.rewrite.rule import Rule

MODEL = """
    <ir_version: 10, opset_import: ["" : 17]>
    scaled (float[batch, 8] x) => (float[batch, 8] y)
    <float size = {64.0}> {
        root = Sqrt(size)
        scaled = Div(x, root)
        y = Tanh(scaled)
    }
"""


class DivideByRoot(Rule):
    """x / sqrt(d) = x * d^-1/2, for a constant d > 0."""

    name = "divide_by_root"
    concept = "scale"
    pattern = op("Div", var("x"), op("Sqrt", const(name="d")))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        size = match["d"].const_value.numpy()
        return build.op("Mul", match["x"], build.constant(size**-0.5))


class DropTanh(Rule):
    """tanh(x) = x: wrong."""

    name = "drop_tanh"
    pattern = op("Tanh", var("x"))

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return match["x"]


@dataclass(frozen=True)
class MultiplyByRoot(RewritePass):
    """Divide by square roots by multiplying."""

    name: ClassVar[str] = "multiply_by_root"

    def rules(self) -> Sequence[Rule]:
        return (DivideByRoot(),)


@dataclass(frozen=True)
class Wrong(RewritePass):
    """Forget about tanh."""

    name: ClassVar[str] = "wrong"

    def rules(self) -> Sequence[Rule]:
        return (DropTanh(),)


def main() -> None:
    """Run both passes."""
    fast = xform.optimize(onnx.parser.parse_model(MODEL), passes=[MultiplyByRoot(), Wrong()])
    print(dump(fast.graph))
    print(fast.explain())


if __name__ == "__main__":
    main()
