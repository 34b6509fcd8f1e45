"""GELU (Hendrycks & Gimpel, arXiv 1606.08415), exact and by its tanh approximation.

    exact:  x/2 * (1 + erf(x / sqrt 2))
    tanh:   x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

The factors stand in any order and association; the cube as Pow, as x*x*x, or drawn out as x * (1 + 0.044715 x^2).
"""

from __future__ import annotations

import math

from xform.patterns.arithmetic import square
from xform.rewrite.pattern import any_of, op, product, total, var

CUBIC = 0.044715
SLOPE = math.sqrt(2 / math.pi)

X = var("x")
GELU_ERF = product(0.5, X, total(1.0, op("Erf", product(math.sqrt(0.5), X))))

_CUBE = any_of(
    product(CUBIC, op("Pow", X, 3.0)),
    product(CUBIC, X, X, X),
    product(CUBIC, X, square(X)),
)
_INNER = any_of(
    product(SLOPE, total(0.0, X, _CUBE)),
    product(SLOPE, X, total(1.0, any_of(product(CUBIC, square(X)), product(CUBIC, X, X)))),
    total(0.0, product(SLOPE, X), product(SLOPE * CUBIC, op("Pow", X, 3.0))),
    total(0.0, product(SLOPE, X), product(SLOPE * CUBIC, X, X, X)),
)
GELU_TANH = product(0.5, X, total(1.0, op("Tanh", _INNER)))
