"""Operators that treat every element alike, whatever its place."""

from __future__ import annotations

UNARY = (
    *("Relu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "LeakyRelu", "Elu", "Selu", "Celu", "Mish"),
    *("Softplus", "Softsign", "Swish", "Erf", "Abs", "Neg", "Sqrt", "Reciprocal", "Exp", "Log", "Cast", "Identity"),
)
BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
