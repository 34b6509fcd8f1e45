"""Matrix products with constant weights in int8, everything else in float.

    X [.., K] W [K, N]  ~  (Xq - z) Wq * (s * t)      Xq, s, z = DynamicQuantizeLinear(X),  Wq = round(W / t),
                                                       t [N] = max|W[:, n]| / limit

Activations are uint8 with one scale for the tensor, found at run time, so nothing is calibrated and no range is
exceeded; weights are int8 with one scale per output channel. The sums are exact int32. Written as ONNX Runtime fuses it
(`DynamicQuantizeMatMul`, or `MatMulIntegerToFloat` where several products read one input).

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.1; Bhandare et al. 2019, "Efficient 8-Bit Quantization of Transformer Neural Machine
Language Translation Model", for the choice of products.

Legal: a constant float32 weight of rank 2 with finite entries, a float32 operand.
Profitable: at least `smallest` weights, K and N at least 32: below, finding the range of X costs more than the product
saves. Products in `keep` (original node names) stay in float; `xform.pipeline.sensitivity` finds which have to.

The limit. Without dot-product instructions (VNNI and the like) x86 adds two products u8 * s8 in 16 bits, which
saturates at 2 * 255 * 127 > 32767. With |Wq| <= 63 it cannot: 2 * 255 * 63 = 32130. So `weight_bits` is 8 where this
machine has such instructions and 7 elsewhere; an artifact made with 8 is meant for machines that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, constant, constant_tensor, display_name
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import Fidelity, PassContext, RewritePass
from xform.rewrite.pattern import const, op, var
from xform.rewrite.rule import QUIET, Failure, Rule

_NARROWEST = 32
_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


class QuantizeProduct(Rule):
    """One product."""

    name = "dynamic"
    concept = "int8"
    pattern = op("MatMul", var("x"), const(name="w"), name="product")

    def __init__(self, weight_bits: int, keep: frozenset[str], smallest: int) -> None:
        self._limit = 2 ** (weight_bits - 1) - 1
        self._keep = keep
        self._smallest = smallest

    def check(self, match: Match, context: PassContext) -> Failure | None:
        x, weight = match["x"], constant_tensor(match["w"])
        if weight is None or len(weight.shape) != 2 or x.dtype is not ir.DataType.FLOAT:
            return QUIET
        if weight.dtype is not ir.DataType.FLOAT:
            return QUIET
        array = constant(match["w"])
        if array is None or not bool(np.isfinite(array).all()):
            return Failure("a weight is not finite", (match.node("product"),))
        return None

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """Weights K * N at least `smallest`, K and N at least 32; and the product is not one that has to stay."""
        node, weight = match.node("product"), constant_tensor(match["w"])
        assert weight is not None
        rows, columns = weight.shape.numpy()
        if display_name(node) in self._keep:
            return Failure("it would cost too much accuracy in int8", (node,))
        if rows * columns < self._smallest or min(rows, columns) < _NARROWEST:
            return Failure(f"a weight of {rows} x {columns} is too small to pay", (node,))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        weight = constant(match["w"])
        assert weight is not None
        quantized, scale = quantize_weight(weight, self._limit)
        rows, row_scale, zero = build.ops("DynamicQuantizeLinear", [match["x"]], 3)
        name = match["w"].name or "weight"
        sums = build.op("MatMulInteger", rows, build.constant(quantized, f"{name}_int8"), zero)
        factor = build.op("Mul", row_scale, build.constant(scale, f"{name}_scale"))
        return build.op("Mul", build.op("Cast", sums, to=int(ir.DataType.FLOAT)), factor)


def quantize_weight(weight: Array, limit: int) -> tuple[Array, Array]:
    """int8 [K, N] within +-limit, and float32 scales [N]; a column of zeros gets scale 1."""
    largest = np.abs(weight.astype(np.float64)).max(axis=0)
    scale = np.where(largest > 0, largest / limit, 1.0)
    quantized = np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8)
    return quantized, scale.astype(np.float32)


def dot_product_instructions() -> bool:
    """Whether this machine sums products of bytes in 32 bits."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    words = set(text.split())
    return any(name in words for name in _DOT_PRODUCTS)


@dataclass(frozen=True)
class QuantizeProducts(RewritePass):
    """Matrix products in int8.

    Attributes:
        keep: Original names of product nodes that stay in float.
        weight_bits: 8, 7, or 0 for what suits this machine.
        smallest: Number of weights from which on a product pays.
        max_error: Relative error of the outputs that the search for `keep` allows; a cosine of 0.999 is about 0.045.
    """

    name: ClassVar[str] = "quantize_products"
    fidelity: ClassVar[Fidelity] = "approximate"

    keep: tuple[str, ...] = ()
    weight_bits: int = 0
    smallest: int = 1 << 13
    max_error: float = 0.04

    def rules(self) -> Sequence[Rule]:
        bits = self.weight_bits or (8 if dot_product_instructions() else 7)
        return (QuantizeProduct(bits, frozenset(self.keep), self.smallest),)
