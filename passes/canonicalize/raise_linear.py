"""Linear layers to one spelling: MatMul(x, W[K, N]), then Add(., b[N]) with the bias as second operand.

Rules
1. `gemm`: Gemm(A, B, C) with a constant B becomes MatMul(A, W) + b, with W = alpha B (or alpha B^T) and b = beta C.
2. `transposed_weight`: MatMul(x, Transpose(W)) with a constant W becomes MatMul(x, W^T).
3. `bias_order`: Add(b, MatMul(x, W)) with a constant b becomes Add(MatMul(x, W), b).
4. `bias_shape`: a constant bias of shape [1, .., 1, N] becomes [N] where no dim of the result comes from it.

A transposed weight is a lazy tensor: it is computed when it is written or run, one weight at a time, so that a model
of many gigabytes does not have to fit in memory. alpha and beta are folded in float64. The ONNX Runtime backend turns
a rank-2 MatMul + Add back into Gemm, which runs faster there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, constant, constant_tensor, is_constant, rank_of, shape_of
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import const, maybe, op, var
from xform.rewrite.rule import QUIET, Failure, Rule


def derived(build: Builder, source: ir.Value, change: Callable[[Array], Array], shape: Sequence[int]) -> ir.Value:
    """A new constant, `change` of the data of `source`, computed when it is needed."""
    tensor = constant_tensor(source)
    assert tensor is not None
    name = source.name or "weight"
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(change(tensor.numpy())), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    return build.constant(lazy, name)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


class Gemm(Rule):
    """Rule 1."""

    name = "gemm"
    concept = "linear"
    pattern = op("Gemm", var("a"), var("b", where=is_constant), maybe(var("c")), name="gemm")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        weight, c = match["b"], match.get("c")
        if constant_tensor(weight) is None or len(constant_tensor(weight).shape) != 2:  # type: ignore[union-attr]
            return Failure("the weight is no constant matrix")
        if not _is_float(weight):
            return QUIET
        if c is not None and rank_of(c) is None:
            return Failure("the rank of the bias is unknown")
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        gemm, weight, c = match.node("gemm"), match["b"], match.get("c")
        alpha, beta = float(attribute(gemm, "alpha", 1.0)), float(attribute(gemm, "beta", 1.0))
        a = build.op("Transpose", match["a"], perm=[1, 0]) if attribute(gemm, "transA", 0) else match["a"]
        transposed = bool(attribute(gemm, "transB", 0))
        if alpha != 1.0:
            array, dtype = constant(weight), weight.dtype
            assert array is not None and dtype is not None
            wide = array.astype(np.float64) * alpha
            weight = build.folded(wide.T if transposed else wide, dtype, weight.name or "weight")
        elif transposed:
            tensor = constant_tensor(weight)
            assert tensor is not None
            weight = derived(build, weight, lambda w: w.T, tuple(reversed(tensor.shape.numpy())))
        product = build.op("MatMul", a, weight)
        if c is None or beta == 0.0:
            return product
        bias = c if beta == 1.0 else _scale_bias(build, c, beta)
        return build.op("Add", product, bias)


def _scale_bias(build: Builder, bias: ir.Value, beta: float) -> ir.Value:
    array, dtype = constant(bias), bias.dtype
    if array is None or dtype is None:
        return build.op("Mul", bias, beta)
    return build.folded(array.astype(np.float64) * beta, dtype, bias.name or "bias", summand=True)


class TransposedWeight(Rule):
    """Rule 2."""

    name = "transposed_weight"
    concept = "linear"
    pattern = op("MatMul", var("x"), op("Transpose", const(name="w"), name="transpose"))

    def check(self, match: Match, context: PassContext) -> Failure | None:
        shape = shape_of(match["w"])
        return None if shape is not None and len(shape) == 2 else QUIET

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        tensor = constant_tensor(match["w"])
        assert tensor is not None
        perm = attribute(match.node("transpose"), "perm", [1, 0])
        weight = match["w"]
        if list(perm) == [1, 0]:
            rows, columns = tensor.shape.numpy()
            weight = derived(build, weight, lambda w: w.T, (columns, rows))
        return build.op("MatMul", match["x"], weight)


_LINEAR = op("MatMul", var("x"), const(name="w"), name="product")


class BiasOrder(Rule):
    """Rule 3."""

    name = "bias_order"
    concept = "linear"
    pattern = op("Add", const(name="bias"), _LINEAR)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        add = match.roots[0].producer()
        return None if add is not None and add.inputs[1] is match["product"] else QUIET

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Add", match["product"], match["bias"])


class BiasShape(Rule):
    """Rule 4."""

    name = "bias_shape"
    concept = "linear"
    pattern = op("Add", _LINEAR, const(name="bias"))

    def check(self, match: Match, context: PassContext) -> Failure | None:
        bias, rank = shape_of(match["bias"]), rank_of(match["product"])
        if bias is None or rank is None or not 1 < len(bias) <= rank or any(d != 1 for d in bias[:-1]):
            return QUIET
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        bias = constant(match["bias"])
        assert bias is not None
        return build.op("Add", match["product"], build.constant(bias.reshape(-1), match["bias"].name or "bias"))


@dataclass(frozen=True)
class RaiseLinear(RewritePass):
    """Bring every linear layer to MatMul with a constant [K, N] weight, then Add of its bias."""

    name: ClassVar[str] = "raise_linear"

    def rules(self) -> Sequence[Rule]:
        return (Gemm(), TransposedWeight(), BiasOrder(), BiasShape())
