"""Softmax as it is spelled without its operator: exp(x - max x) / sum, both reductions over one axis, keeping dims.

The form without the maximum is not the same function in floating point: it overflows where softmax does not.
"""

from __future__ import annotations

from xform.patterns.arithmetic import reciprocal
from xform.rewrite.pattern import any_of, const, op, var

X = var("x")
_EXP = op("Exp", op("Sub", X, op("ReduceMax", X, const(name="max_axes"), keepdims=1)))
_SUM = op("ReduceSum", _EXP, const(name="sum_axes"), keepdims=1)
SOFTMAX = any_of(op("Div", _EXP, _SUM), op("Mul", _EXP, reciprocal(_SUM)))
