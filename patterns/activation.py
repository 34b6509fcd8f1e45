"""Sigmoid-gated activations as they are spelled without an operator of their own.

sigmoid    1 / (1 + exp(-x))
SiLU       x * sigmoid(x), or x / (1 + exp(-x))                 (Elfwing et al., arXiv 1702.03118)
HardSwish  x * clip(x + 3, 0, 6) / 6                            (Howard et al., arXiv 1905.02244)
Mish       x * tanh(softplus(x))                                (Misra, arXiv 1908.08681)
"""

from __future__ import annotations

from xform.patterns.arithmetic import reciprocal
from xform.rewrite.pattern import any_of, op, product, total, var

X = var("x")
_ONE_PLUS_EXP = total(1.0, op("Exp", product(-1.0, X)))
SIGMOID = reciprocal(_ONE_PLUS_EXP)
SILU_QUOTIENT = op("Div", X, _ONE_PLUS_EXP)
SILU = op("Mul", X, op("Sigmoid", X))

_RELU6 = op("Clip", total(3.0, X), 0.0, 6.0)
HARD_SIGMOID = product(1 / 6, _RELU6)
HARD_SWISH = any_of(
    product(1 / 6, X, _RELU6),
    product(1.0, X, op("HardSigmoid", X, alpha=1 / 6, beta=0.5)),
)
MISH = product(1.0, X, op("Tanh", op("Softplus", X)))
