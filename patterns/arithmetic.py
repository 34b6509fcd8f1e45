"""Small arithmetic spellings that several concepts share."""

from __future__ import annotations

from xform.rewrite.pattern import Or, Pattern, any_of, const, op


def square(x: Pattern) -> Or:
    """x^2 as Pow or as a product with itself."""
    return any_of(op("Pow", x, 2.0), op("Mul", x, x))


def mean(x: Pattern, axes: str) -> Pattern:
    """ReduceMean over constant axes, bound to the name `axes`, keeping dims."""
    return op("ReduceMean", x, const(name=axes), keepdims=1)


def reciprocal(x: Pattern) -> Or:
    """1 / x."""
    return any_of(op("Reciprocal", x), op("Div", 1.0, x), op("Pow", x, -1.0))


def inverse_root(x: Pattern) -> Or:
    """1 / sqrt(x)."""
    root = any_of(op("Sqrt", x), op("Pow", x, 0.5))
    return any_of(op("Pow", x, -0.5), reciprocal(root), op("Sqrt", reciprocal(x)))


def normalized(x: Pattern, shifted: Pattern) -> Or:
    """x / sqrt(shifted) in its spellings."""
    root = any_of(op("Sqrt", shifted), op("Pow", shifted, 0.5))
    return any_of(op("Div", x, root), op("Mul", x, inverse_root(shifted)))
