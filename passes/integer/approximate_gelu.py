"""GELU without erf, where eight bits follow anyway.

Rules, one of which the pass has
1. `tanh`: every float32 Gelu of the exact form, one operator for one:

    x/2 (1 + erf(x / sqrt 2))  ~  x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

2. `polynomial`: the same ones, in standard operators:

    x/2 (1 + erf(x / sqrt 2))  ~  x (1/2 + u P(u^2))        u = clip(x, -c, c)

   with P of degree 5 and c = 3.66, and c P(c^2) = 1/2 up to rounding, so that it is x and 0 beyond c.
Left alone, quietly: Gelu that is approximated already; other dtypes, whose kernels were not measured.

Either is at most 4.76e-4 off (at |x| near 2.7 by tanh; rule 2 far beyond c by about 2e-7 |x|, which is rounding); one
code of an activation that reaches 1 is 3.9e-3. Which is fast depends on the runtime: ONNX Runtime's kernel of tanh
takes 0.61 of the time of erf (docs/onnxruntime-notes.md), but it does not fuse what rule 2 writes. OpenVINO does: as an
epilogue of int8 convolutions erf costs a fifth of RepViT and a quarter of FastViT, tanh three times as much, the
polynomial half (docs/performance.md). For presets that are approximate.

Sources: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units (GELUs)", section 2; rule 2 is a polynomial on a
clipped argument, as Kim et al. 2021, "I-BERT: Integer-only BERT Quantization", section 3.4, have for erf, of a higher
degree. Its coefficients minimize the largest error of the product with x (a linear program over 2,000 points).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.values import attribute
from xform.passes.cleanup.local import NodeRule
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import Fidelity, PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule

_CLIPPED_AT = 3.66
_COEFFICIENTS = (  # of u, u^3, ..., u^11
    0.3965523540973663,
    -0.06268073618412018,
    0.007884063757956028,
    -0.0006232499727047980,
    2.7306215997668914e-05,
    -5.011120265407953e-07,
)


@dataclass(frozen=True)
class _ExactGelu(NodeRule):
    """Every float32 Gelu of the exact form."""

    op_types = ("Gelu",)
    concept = "gelu"

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        exact = str(attribute(node, "approximate", "none")) == "none"
        return None if exact and node.outputs[0].dtype is ir.DataType.FLOAT else QUIET


@dataclass(frozen=True)
class Tanh(_ExactGelu):
    """Rule 1."""

    name = "tanh"

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Gelu", match.node("node").inputs[0], approximate="tanh")


@dataclass(frozen=True)
class Polynomial(_ExactGelu):
    """Rule 2."""

    name = "polynomial"

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x = match.node("node").inputs[0]
        clipped = build.op("Clip", x, -_CLIPPED_AT, _CLIPPED_AT)
        square = build.op("Mul", clipped, clipped)
        *lower, leading = _COEFFICIENTS
        polynomial = build.op("Add", build.op("Mul", square, leading), lower[-1])
        for coefficient in reversed(lower[:-1]):
            polynomial = build.op("Add", build.op("Mul", polynomial, square), coefficient)
        share = build.op("Add", build.op("Mul", polynomial, clipped), 0.5)
        return build.op("Mul", share, x)


@dataclass(frozen=True)
class ApproximateGelu(RewritePass):
    """GELU by tanh, or by a polynomial.

    Attributes:
        form: "tanh", which ONNX Runtime runs faster than erf, or "polynomial", which OpenVINO does.
    """

    name: ClassVar[str] = "approximate_gelu"
    fidelity: ClassVar[Fidelity] = "approximate"

    form: Literal["tanh", "polynomial"] = "tanh"

    def rules(self) -> Sequence[Rule]:
        rules: dict[str, Rule] = {"tanh": Tanh(), "polynomial": Polynomial()}
        if self.form not in rules:
            raise UsageError(f"form must be 'tanh' or 'polynomial', not {self.form!r}")
        return (rules[self.form],)
