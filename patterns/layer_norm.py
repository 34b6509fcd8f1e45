"""LayerNorm as it is spelled without its operator.

    d = x - mean(x);  y = d / sqrt(mean(d^2) + epsilon)          over the same axes, both reductions keeping dims

The variance is written as a mean of Pow(d, 2) or of d * d, or with the sum divided by the size (`var` of newer
exports); the quotient as Div, as a product with Reciprocal(Sqrt(.)), or with a power of -1/2.
"""

from __future__ import annotations

from xform.patterns.arithmetic import mean, normalized, square
from xform.rewrite.pattern import op, total, var

X = var("x")
CENTERED = op("Sub", X, mean(X, "mean_axes"))
VARIANCE = mean(square(CENTERED), "variance_axes")
SHIFTED = total(None, VARIANCE, name="epsilon")
LAYER_NORM = normalized(CENTERED, SHIFTED)
