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

Outliers. Where `ranges` say that a few input channels are much larger than the others, those stay in float:

    X W  =  (X m) W  +  X[:, O] W[O]        m = 0 on the outliers O and 1 elsewhere

so that they do not take the resolution of the rest. O are the channels whose peak is beyond `_FLAT` times that of the
channel at rank K / 32, if that makes the range of the rest at most half as large. Cost: one pass over X and 2 |O| N
multiply-adds per row in float; an error in the choice of O costs resolution, never range.
Source: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 3.2, with O
chosen offline.

Rows. With `per_row` every row of X (a token) gets its own scale, the largest magnitude in it:

    X W  =  ((X / r) W) r                   r [.., 1] = max_k |X[.., k]|

so that a token with large numbers does not take the resolution of the others; `row_scaled` names single products.
Cost: three passes over X and one over the result, and no bias in the product's own kernel. Source: Yao et al. 2022,
"ZeroQuant", section 4.1 (token-wise quantization).
Where `ranges` say that X hardly goes below zero (what follows GELU or SiLU, low = min X), rows are divided by their
largest value instead, but at least by 8 |low|:

    r = max(max_k X[.., k], 8 |low|)

so that what is below zero takes an eighth of the codes of any row, not up to half of them; and one pass less. As the
range of X / r is found at run time, what calibration did not see costs resolution, never range.

`weight_bits` is 8 where this machine has dot-product instructions, and elsewhere 8 so that 16-bit sums of pairs cannot
saturate (`passes.integer.weight_codes`); an artifact made with 8 is meant for machines that have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.values import Array, constant, constant_tensor, display_name
from xform.passes.integer.weight_codes import default_error_bound, dot_product_instructions, weight_codes
from xform.passes.normalize.ranges import ChannelRange, Ranges, load_ranges
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import Fidelity, PassContext, RewritePass
from xform.rewrite.pattern import const, op, var
from xform.rewrite.rule import QUIET, Failure, Rule

_NARROWEST = 32
_FEW_OF = 32  # one channel in so many may be an outlier
_TINY = 1e-30  # instead of the magnitude of a row of zeros, by which it is divided
_ONE_SIDED = 8  # times as far above zero as below it
_FLAT = 1.25  # times the peak of the channel at that rank: what is above it is an outlier

Codes = tuple[Array, Array]  # int8 [K, N], and float32 scales [N]


class QuantizeProduct(Rule):
    """One product."""

    name = "dynamic"
    concept = "int8"
    pattern = op("MatMul", var("x"), const(name="w"), name="product")

    def __init__(self, weight_bits: int, ranges: Ranges, options: QuantizeProducts) -> None:
        self._bits = weight_bits
        self._keep = frozenset(options.keep)
        self._per_row = options.per_row
        self._row_scaled = frozenset(options.row_scaled)
        self._smallest = options.smallest
        self._ranges = ranges
        self._codes = options.codes

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
        small = f"a weight of {rows} x {columns} is too small to pay"
        if min(rows, columns) < _NARROWEST:
            return Failure(f"{small}: it has fewer than {_NARROWEST} rows or columns", (node,))
        if rows * columns < self._smallest:
            return Failure(f"{small}: fewer than {self._smallest:,} numbers (quantize_products.smallest)", (node,))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x, weight = match["x"], constant(match["w"])
        assert weight is not None
        name = match["w"].name or "weight"
        span = self._ranges.get(x.name or "")
        span = span if span is not None and len(span.low) == len(weight) else None
        apart = outliers(span) if span is not None else np.zeros(0, np.int64)
        codes = self._codes.get(name) or weight_codes(without_rows(weight, apart), 1, 0, self._bits)
        rest = x
        if len(apart):
            kept = np.ones(len(weight), np.float32)
            kept[apart] = 0
            rest = build.op("Mul", x, build.constant(kept, f"{x.name}_inliers"))
        if self._per_row or display_name(match.node("product")) in self._row_scaled:
            peak = _peak(rest, _least_peak(span, apart), build)
            result = build.op("Mul", self._integer(build.op("Div", rest, peak), codes, name, build), peak)
        else:
            result = self._integer(rest, codes, name, build)
        if not len(apart):
            return result
        large = build.op("Gather", x, build.constant(apart, f"{x.name}_outliers"), axis=-1)
        return build.op("Add", result, build.op("MatMul", large, build.constant(weight[apart], f"{name}_outliers")))

    def _integer(self, x: ir.Value, weight: Codes, name: str, build: Builder) -> ir.Value:
        """The product of one scale, in the spelling that ONNX Runtime fuses."""
        codes, scale = weight
        rows, row_scale, zero = build.ops("DynamicQuantizeLinear", [x], 3)
        sums = build.op("MatMulInteger", rows, build.constant(codes, f"{name}_int8"), zero)
        factor = build.op("Mul", row_scale, build.constant(scale, f"{name}_scale"))
        return build.op("Mul", build.op("Cast", sums, to=int(ir.DataType.FLOAT)), factor)


class ConvolutionInFloat(Rule):
    """Says of convolutions that this form leaves them as they are; changes nothing."""

    name = "convolution"
    concept = "int8"
    pattern = op("Conv", var("x"), const(name="w"), name="conv", more_inputs=True)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        weight = constant_tensor(match["w"])
        if weight is None or weight.dtype is not ir.DataType.FLOAT:
            return QUIET
        return Failure(
            "convolutions have no int8 form with ranges found at run time; the backend openvino runs them in int8 "
            "with ranges from calibration",
            (match.node("conv"),),
        )

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        raise AssertionError("check accepts nothing")


def _peak(x: ir.Value, least: float | None, build: Builder) -> ir.Value:
    """What the rows of `x` are divided by, [.., 1]: `least` or their largest value, or by default their magnitude."""
    last = build.constant(np.array([-1], np.int64), "last_axis")
    peak = build.op("ReduceMax", build.op("Abs", x) if least is None else x, last, keepdims=1)
    return build.op("Max", peak, build.constant(np.asarray(_TINY if least is None else least, np.float32), "least"))


def _least_peak(span: ChannelRange | None, apart: Array) -> float | None:
    """What every row of an input that hardly goes below zero is at least divided by; None of another one."""
    if span is None:
        return None
    low, high = float(np.delete(span.low, apart).min()), float(np.delete(span.high, apart).max())
    return max(_ONE_SIDED * -low, _TINY) if high > _ONE_SIDED * -low else None


def outliers(span: ChannelRange) -> Array:
    """Indices of the channels that stay in float, ascending; empty where nothing stands out.

    Args:
        span: Smallest and largest value per channel, [K].
    """
    peaks = span.peak
    ranked = np.sort(peaks)[::-1]
    most = len(peaks) // _FEW_OF
    if most == 0:
        return np.zeros(0, np.int64)
    found = np.flatnonzero(peaks > _FLAT * ranked[most])
    pays = len(found) and ranked[len(found)] <= ranked[0] / 2
    return found if pays else found[:0]


def without_rows(weight: Array, rows: Array) -> Array:
    """`weight` [K, N] with some rows zero."""
    left = weight.copy()
    left[rows] = 0
    return left


@dataclass(frozen=True)
class QuantizeProducts(RewritePass):
    """Matrix products in int8.

    Attributes:
        keep: Original names of product nodes that stay in float.
        ranges: Per channel, of the inputs of products by name (`xform.pipeline.calibration.channel_ranges`), or the
            file that holds them; without them no channel stays in float.
        per_row: Whether each row of every input gets a scale of its own; a tenth slower, and a fourth of the error
            where tokens differ much (MiniLM-L6, 2026-11-22).
        row_scaled: Original names of products whose input gets them, where not all do
            (`xform.pipeline.row_scales`).
        codes: Weights in int8 by name (`xform.pipeline.rounding.compensated_weights`); others are rounded here.
        weight_bits: 8, 7, or 0 for 8 without saturation on this machine.
        smallest: Number of weights from which on a product pays.
        max_error: Relative error of the outputs that the search for `keep` allows; a cosine of 0.999 is about 0.045.
            By default 0.021 where this machine has dot-product instructions, else 0.025.
    """

    name: ClassVar[str] = "quantize_products"
    fidelity: ClassVar[Fidelity] = "approximate"

    ranges: str | Ranges = field(default="", hash=False)
    per_row: bool = False
    row_scaled: tuple[str, ...] = ()
    codes: Mapping[str, Codes] = field(default_factory=dict, hash=False, repr=False)
    keep: tuple[str, ...] = ()
    weight_bits: int = 0
    smallest: int = 1 << 13
    max_error: float = field(default_factory=default_error_bound)

    def rules(self) -> Sequence[Rule]:
        if self.weight_bits not in (0, 7, 8):
            raise UsageError(f"weight_bits must be 8, 7 or 0, not {self.weight_bits}")
        bits = self.weight_bits or (8 if dot_product_instructions() else 0)
        ranges = load_ranges(self.ranges) if self.ranges else {}
        return (QuantizeProduct(bits, ranges, self), ConvolutionInFloat())
