"""Convolutions, and products with constant weights, in int8 with scales from calibration, everything else in float.

    Conv(X, W) + b  ~  Conv(D(Q(X)), D(Wq)) + b      Q(x) = clip(round(x / s) + z, 0, 255),    D(q) = (q - z) s
                                                     Wq [m, ..] = round(W[m, ..] / t[m]),      D(Wq) = Wq t

s and z hold for a whole activation tensor, from its calibrated range widened to contain zero; t is one scale per output
channel. Written in standard ONNX (QuantizeLinear, DequantizeLinear), which runtimes turn into integer kernels: the sums
are then exact int32 and D(Q(.)) is what the pair means in float, so the numbers do not depend on who runs it.

Only what a product reads is quantized, never what it gives: bias, activation function, residual sum and the norm after
it see float, and stay fused to the kernel as its epilogue; a rounding less is an error less, too. All readers of one
activation share one pair.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.1, for the scheme; Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.3,
for scales per channel.

Few rows. A product of at most `few_rows` rows (a classifier after pooling) is bound by reading its weight, so there the
weight alone is int8, and the sums are float:

    X W  ~  X D(Wq)         OpenVINO reads the bytes and scales in registers

Products can have scales found at run time instead, of few rows too (`passes.integer.grouped_products`).

Legal: float32, a constant finite weight, an activation whose range was measured (which only "static" products and
convolutions need).
Profitable, as measured in OpenVINO with AVX2 (docs/performance.md):
- Conv: at least 4 input channels per group, or one group. Integer kernels sum four bytes at a time; depthwise
  convolutions have one, and those with several outputs per group run three times slower than in float.
- MatMul of few rows: 1.9 to 2.6 times as fast as float for 1 row, 1.2 times for 8; at least 65,536 weights, as less of
  them stays in the cache anyway.
- other MatMul: only with dot-product instructions; without, int8 is 0.8 to 1.3 times as fast as float.
- at least `smallest` multiply-adds: below (convolutions of pooled vectors), quantizing the input costs what is saved.
Products in `keep` (original node names) stay in float; `xform.pipeline.sensitivity` finds which have to.

Saturation. Where there are no dot-product instructions, x86 adds the products of two neighbouring input channels in 16
bits, which holds if the weights of no such pair exceed 128 in sum: 255 * 128 < 2^15. Weights are scaled so that they do
not, which costs far less than a bit, since two large weights of one sign are seldom neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.values import (
    Array,
    attribute,
    attributes_of,
    constant,
    constant_tensor,
    display_name,
    is_op,
    shape_of,
)
from xform.passes.integer.grouped_products import (
    FEWEST_WEIGHTS,
    FINEST,
    GroupedCodes,
    GroupOptions,
    GroupProducts,
    rows_of,
)
from xform.passes.integer.shared_input import SharedInput, for_each_reader
from xform.passes.integer.weight_codes import default_error_bound, dot_product_instructions, weight_codes
from xform.passes.normalize.ranges import ChannelRange, Ranges, load_ranges
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import Fidelity, PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure, Rule

ProductForm = Literal["auto", "grouped", "static", "float"]

_CODES = 255  # largest uint8
_SUMMED_AT_ONCE = 4  # bytes, by the instructions of every integer kernel
_ALL_BITS = 8  # of a weight that is not multiplied in integers: nothing saturates


def quantizable_inputs(model: ir.Model) -> list[ir.Value]:
    """Activations of the main graph that convolutions and products with constant weights read: what needs a range."""
    readers = (node for node in model.graph if _operands(node) is None)
    return list(dict.fromkeys(value for node in readers if (value := node.inputs[0]) is not None))


def _operands(node: ir.Node) -> Failure | None:
    """Whether the pass has to do with a node, judged without the data of its weight."""
    if not is_op(node, "Conv", "MatMul") or len(node.inputs) < 2:
        return QUIET
    x, weight = node.inputs[0], constant_tensor(node.inputs[1])
    if x is None or weight is None or x.dtype is not ir.DataType.FLOAT or weight.dtype is not ir.DataType.FLOAT:
        return QUIET
    return QUIET if is_op(node, "MatMul") and len(weight.shape) != 2 else None


def activation_codes(span: ChannelRange) -> tuple[Array, Array]:
    """Scale (float32) and zero point (uint8), both of rank 0, so that the codes cover `span` and zero is exact.

    Args:
        span: Of the whole tensor; of one with a range per channel the widest is taken.
    """
    low, high = min(float(span.low.min()), 0.0), max(float(span.high.max()), 0.0)
    scale = np.float32((high - low) / _CODES)
    if not scale > 0:  # nothing but zeros, or nearly: any scale serves
        return np.asarray(1.0, np.float32), np.asarray(0, np.uint8)
    return np.asarray(scale), np.asarray(np.clip(np.rint(-low / scale), 0, _CODES), np.uint8)


def multiply_adds(node: ir.Node) -> int | None:
    """Of one convolution or product; None where a size is dynamic."""
    weight, shape = constant_tensor(node.inputs[1]), shape_of(node.outputs[0])
    if weight is None or shape is None:
        return None
    columns = 1 if is_op(node, "Conv") else -1  # where the output channels, which the weight counts, stand
    sizes = [dim for axis, dim in enumerate(shape) if axis != columns % len(shape)]
    if not all(isinstance(dim, int) for dim in sizes):
        return None
    return int(weight.size * math.prod(dim for dim in sizes if isinstance(dim, int)))


def _reads_weight_only(node: ir.Node, options: QuantizeStatic) -> bool:
    """Whether a product has so few rows that reading its weight is what takes the time."""
    rows = rows_of(node) if is_op(node, "MatMul") and _operands(node) is None else None
    return rows is not None and rows <= options.few_rows


class QuantizeWeight(Rule):
    """A product of few rows, whose weight alone becomes int8."""

    name = "weight"
    concept = "int8"

    def __init__(self, options: QuantizeStatic) -> None:
        self._options = options

    def anchors(self) -> frozenset[Key] | None:
        return frozenset((("", "MatMul"),))

    def reach(self) -> int:
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if _reads_weight_only(node, self._options):  # of others QuantizeReaders tells what becomes of them
            yield Match(nodes={"product": node}, roots=(node.outputs[0],))

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("product")
        weight = constant(node.inputs[1])
        finite = weight is not None and bool(np.isfinite(weight).all())
        return None if finite else Failure("a weight is not finite", (node,))

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """At least 65,536 weights, and not one that has to stay."""
        node = match.node("product")
        weight = constant_tensor(node.inputs[1])
        assert weight is not None
        if display_name(node) in self._options.keep:
            return Failure("it would cost too much accuracy in int8", (node,))
        if weight.size < FEWEST_WEIGHTS:
            return Failure(f"{weight.size} weights are too few to pay", (node,))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x, value = match.node("product").inputs
        weight = constant(value)
        assert value is not None and weight is not None
        return build.op("MatMul", x, _dequantized(value, weight, 1, 0, _ALL_BITS, build))


class QuantizeReaders(SharedInput):
    """One activation, and all convolutions and products that read it."""

    name = "static"
    concept = "int8"

    def __init__(self, ranges: Ranges, options: QuantizeStatic) -> None:
        self._ranges = ranges
        self._options = options
        self._keep = frozenset(options.keep)
        self._products = options.form_of_products
        self._bits = options.weight_bits or (8 if dot_product_instructions() else 0)

    def anchors(self) -> frozenset[Key] | None:
        return frozenset((("", "Conv"), ("", "MatMul")))

    def problem(self, node: ir.Node) -> Failure | None:
        """Why a node stays in float."""
        failure = _operands(node)
        if failure is not None:
            return failure
        grouped = is_op(node, "MatMul") and self._products == "grouped"  # of those GroupProducts tells
        if grouped or _reads_weight_only(node, self._options):
            return QUIET
        x = node.inputs[0]
        name = (x.name if x is not None else None) or ""
        if name not in self._ranges:
            return Failure(f"there is no range for {name or 'its input'}", (node,))
        span, weight = self._ranges[name], constant(node.inputs[1])
        if weight is None or not bool(np.isfinite(weight).all()):
            return Failure("a weight is not finite", (node,))
        if not (np.isfinite(span.low).all() and np.isfinite(span.high).all()):
            return Failure(f"the range of {name} is not finite", (node,))
        if display_name(node) in self._keep:
            return Failure("it would cost too much accuracy in int8", (node,))
        return self._unprofitable(node)

    def _unprofitable(self, node: ir.Node) -> Failure | None:
        """See the module's docstring."""
        if is_op(node, "MatMul") and self._products == "float":
            return Failure(
                "int8 products do not pay here: this machine has no dot-product instructions; those of the backend "
                "onnxruntime pay without",
                (node,),
            )
        weight = constant_tensor(node.inputs[1])
        assert weight is not None
        channels = int(weight.shape.numpy()[1])
        if is_op(node, "Conv") and attribute(node, "group", 1) > 1 and channels < _SUMMED_AT_ONCE:
            return Failure(f"groups of {channels} input channels do not pay in int8", (node,))
        work = multiply_adds(node)
        if work is not None and work < self._options.smallest:
            return Failure(
                f"{work} multiply-adds are too few to pay: fewer than {self._options.smallest:,} "
                "(quantize_static.smallest)",
                (node,),
            )
        return None

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        x = match["x"]
        name = x.name or "activation"
        scale, zero = activation_codes(self._ranges[name])
        s, z = build.constant(scale, f"{name}_scale"), build.constant(zero, f"{name}_zero")
        read = build.op("DequantizeLinear", build.op("QuantizeLinear", x, s, z), s, z)
        return for_each_reader(match, build, lambda node: self._product(node, read, build))

    def _product(self, node: ir.Node, x: ir.Value, build: Builder) -> ir.Value:
        value, weight = node.inputs[1], constant(node.inputs[1])
        assert value is not None and weight is not None
        axes = (0, 1) if is_op(node, "Conv") else (1, 0)
        read = _dequantized(value, weight, *axes, self._bits, build)
        return build.op(node.op_type, x, read, *node.inputs[2:], **attributes_of(node))


def _dequantized(
    value: ir.Value, weight: Array, output_axis: int, input_axis: int, bits: int, build: Builder
) -> ir.Value:
    """The weight as int8 codes, read through their scales."""
    codes, scale = weight_codes(weight, output_axis, input_axis, bits)
    name = value.name or "weight"
    stored = build.constant(codes, f"{name}_int8")
    return build.op("DequantizeLinear", stored, build.constant(scale, f"{name}_scale"), axis=output_axis)


@dataclass(frozen=True)
class QuantizeStatic(RewritePass):
    """Convolutions and products in int8 with calibrated scales.

    Attributes:
        ranges: Of activations by name (`xform.pipeline.calibration.activation_ranges`), or the file that holds them.
        keep: Original names of nodes that stay in float.
        weight_bits: 8, 7, or 0 for 8 without saturation on this machine; products of few rows always have 8.
        products: What becomes of matrix products: "grouped" (scales by groups of channels, found at run time),
            "static" (scales from calibration), "float" but for those of few rows, or "auto": "grouped" where this
            machine has dot-product instructions, else "float".
        group: Input channels that share a scale in grouped products.
        codes: Weights of grouped products in uint8 by name (`xform.pipeline.rounding.compensated_grouped_weights`);
            others are rounded here.
        smallest: Number of multiply-adds from which on a node pays.
        few_rows: Products of at most so many rows that are not grouped have int8 weights alone; 0 for none.
        max_error: Relative error of the outputs that the search for `keep` allows; a cosine of 0.999 is about 0.045.
            By default 0.021 where this machine has dot-product instructions, else 0.025.
    """

    name: ClassVar[str] = "quantize_static"
    fidelity: ClassVar[Fidelity] = "approximate"

    ranges: str | Ranges = field(default="", hash=False)
    keep: tuple[str, ...] = ()
    weight_bits: int = 0
    products: ProductForm = "auto"
    group: int = FINEST
    codes: GroupedCodes = field(default_factory=dict, hash=False, repr=False)
    smallest: int = 1 << 19
    few_rows: int = 8
    max_error: float = field(default_factory=default_error_bound)

    def rules(self) -> Sequence[Rule]:
        if self.weight_bits not in (0, 7, 8):
            raise UsageError(f"weight_bits must be 8, 7 or 0, not {self.weight_bits}")
        if self.products not in get_args(ProductForm):
            raise UsageError(f"products must be one of {', '.join(get_args(ProductForm))}, not {self.products!r}")
        if self.group < 1:
            raise UsageError(f"group must be a number of channels, not {self.group}")
        products: Rule = QuantizeWeight(self)
        if self.form_of_products == "grouped":
            products = GroupProducts(GroupOptions(self.group, frozenset(self.keep), self.codes, self.smallest))
        return products, QuantizeReaders(load_ranges(self.ranges), self)

    @property
    def form_of_products(self) -> ProductForm:
        """What "auto" means on this machine."""
        if self.products != "auto":
            return self.products
        return "grouped" if dot_product_instructions() else "float"


__all__ = ["ProductForm", "QuantizeStatic", "activation_codes", "multiply_adds", "quantizable_inputs"]
