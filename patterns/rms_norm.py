"""RMSNorm as it is spelled without its operator.

    y = x / sqrt(mean(x^2) + epsilon)

The square may be taken in float32 of a half-precision x, and the result cast back before or after the scale.
"""

from __future__ import annotations

from xform.patterns.arithmetic import mean, normalized, square
from xform.rewrite.pattern import total, var

X = var("x")
MEAN_SQUARE = mean(square(X), "axes")
SHIFTED = total(None, MEAN_SQUARE, name="epsilon")
RMS_NORM = normalized(X, SHIFTED)
