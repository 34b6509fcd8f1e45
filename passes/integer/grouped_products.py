"""Products with constant weights in int8, their inputs by groups of channels with scales found at run time.

    X [.., K] W [K, N]  ~  G(X) D(Wq)         G(x) = s round(x / s),  s = max|x| / 127 over g channels of one row
                                              D(q) [k, n] = t[k / g, n] (q[k, n] - z[k / g, n]),  q uint8

A token, or a channel, with large numbers then takes the resolution of g numbers of one row, not of the whole tensor.
Nothing is calibrated and no range is exceeded. Codes of weights have a scale and a zero point for the same g channels
of a column, which costs nothing more, as sums are scaled by groups anyway: one whose largest and smallest weight differ
in size wastes no codes.

G is written in standard ONNX (opset 21):

    s = Max(ReduceMax(Abs(Reshape(x, [.., K / g, g])), -1) * (1 / 127), tiny)
    G(x) = DequantizeLinear(QuantizeLinear(x, s, axis=-1, block_size=g), s, axis=-1, block_size=g)
    D(q) = DequantizeLinear(q, t, z, axis=0, block_size=g)

so the numbers do not depend on who runs it. OpenVINO's kernels of products with int8 weights do just that where the
processor has dot-product instructions ("dynamic quantization"); its backend recognizes G
(`xform.graph.channel_groups.group_of`), leaves it out and says g in the settings instead.

Source: Yao et al. 2022, "ZeroQuant", sections 4.1 and 4.2 (token-wise activations, fine-grained groups); Dettmers et
al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1, for absmax blocks.

Legal: float32, a constant finite weight of rank 2, K a multiple of g, an input of known rank.
Profitable: at least `smallest` multiply-adds; for products of up to 8 rows at least 65,536 weights, as less of them
stays in the cache anyway. Groups of 32 cost a product about 1.45, of 64 1.15, of 128 1.03 times what one group for the
whole row does; float costs 4 times (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.channel_groups import LARGEST_CODE
from xform.graph.values import (
    constant,
    constant_tensor,
    display_name,
    is_op,
    rank_of,
    shape_of,
)
from xform.passes.integer.shared_input import SharedInput, for_each_reader
from xform.passes.integer.weight_codes import AsymmetricCodes, asymmetric_codes
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure

FINEST = 32  # channels of a group: finer ones cost more than they spare
_MULTIPLE = 16  # of which OpenVINO takes groups
_STEPS = (128, 64, 32)
_TINY = 1e-30  # instead of the scale of a group of zeros, by which it is divided
_FEW_ROWS = 8
FEWEST_WEIGHTS = 1 << 16  # of a product of few rows, and of one that groups are chosen for

GroupedCodes = Mapping[str, AsymmetricCodes]  # by name of the weight


@dataclass(frozen=True)
class GroupOptions:
    """What `GroupProducts` needs to know.

    Attributes:
        group: Input channels that share a scale.
        keep: Original names of products that stay in float.
        codes: Of weights by name; others are rounded here.
        smallest: Number of multiply-adds from which on a product pays.
    """

    group: int
    keep: frozenset[str]
    codes: GroupedCodes
    smallest: int


class GroupProducts(SharedInput):
    """One activation, and all products that read it."""

    name = "groups"
    concept = "int8"

    def __init__(self, options: GroupOptions) -> None:
        self._options = options

    def anchors(self) -> frozenset[Key] | None:
        return frozenset((("", "MatMul"),))

    def problem(self, node: ir.Node) -> Failure | None:
        """Why a node stays in float."""
        if not is_product(node):
            return QUIET
        weight = constant(node.inputs[1])
        if weight is None or not bool(np.isfinite(weight).all()):
            return Failure("a weight is not finite", (node,))
        if display_name(node) in self._options.keep:
            return Failure("it would cost too much accuracy in int8", (node,))
        if len(weight) % self._options.group:
            return Failure(f"{len(weight)} input channels are no multiple of groups of {self._options.group}", (node,))
        rows = rows_of(node)
        if rows is not None and rows <= _FEW_ROWS and weight.size < FEWEST_WEIGHTS:
            return Failure(f"{weight.size} weights are too few to pay", (node,))
        if rows is not None and rows > _FEW_ROWS and rows * weight.size < self._options.smallest:
            return Failure(f"{rows * weight.size} multiply-adds are too few to pay", (node,))
        return None

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        first = match.roots[0].producer()
        weight = constant_tensor(first.inputs[1]) if first is not None else None
        assert weight is not None
        read = grouped(match["x"], int(weight.shape.numpy()[0]), self._options.group, build)

        def product(node: ir.Node) -> ir.Value:
            value, weight = node.inputs[1], constant(node.inputs[1])
            assert value is not None and weight is not None
            name = value.name or "weight"
            codes, scale, zero = self._options.codes.get(name) or asymmetric_codes(weight, self._options.group)
            stored = build.constant(codes, f"{name}_uint8")
            whole = len(scale) == 1  # one block: as every opset from 13 on has it
            scales = build.constant(scale[0] if whole else scale, f"{name}_scale")
            zeros = build.constant(zero[0] if whole else zero, f"{name}_zero")
            if whole:
                return build.op("MatMul", read, build.op("DequantizeLinear", stored, scales, zeros, axis=1))
            block = len(codes) // len(scale)
            decoded = build.op("DequantizeLinear", stored, scales, zeros, axis=0, block_size=block)
            return build.op("MatMul", read, decoded)

        return for_each_reader(match, build, product)


def rows_of(node: ir.Node) -> int | None:
    """Rows of the left operand of a product; None where a size is dynamic."""
    shape = shape_of(node.outputs[0])
    if not shape or not all(isinstance(dim, int) for dim in shape[:-1]):
        return None
    return math.prod(dim for dim in shape[:-1] if isinstance(dim, int))


def is_product(node: ir.Node) -> bool:
    """Whether a node is a float32 product with a constant matrix, of an input whose rank is known."""
    weight = constant_tensor(node.inputs[1]) if is_op(node, "MatMul") else None
    x = node.inputs[0] if weight is not None else None
    if x is None or weight is None or len(weight.shape) != 2 or (rank_of(x) or 0) < 2:
        return False
    return x.dtype is ir.DataType.FLOAT and weight.dtype is ir.DataType.FLOAT


def widest_group(model: ir.Model) -> int:
    """The largest group that divides the input channels of all products, at least 32; 0 where there are none.

    Products whose channels would make it smaller are left out, smallest weights first.
    """
    weights = [constant_tensor(node.inputs[1]) for node in model.graph.all_nodes() if is_product(node)]
    sizes = [weight.shape.numpy() for weight in weights if weight is not None and weight.size >= FEWEST_WEIGHTS]
    group = 0
    for rows, _ in sorted(sizes, key=lambda size: -size[0] * size[1]):
        common = math.gcd(group, int(rows))
        if common >= FINEST and common % _MULTIPLE == 0:
            group = common
    return group


def finer_groups(group: int) -> list[int]:
    """Divisors of a group that are worth trying where it is too coarse, descending to 32."""
    fitting = [size for size in range(FINEST, group) if group % size == 0 and size % _MULTIPLE == 0]
    steps = ([size for size in fitting if size <= limit] for limit in _STEPS)
    return list(dict.fromkeys(sizes[-1] for sizes in steps if sizes))


def grouped(x: ir.Value, channels: int, group: int, build: Builder) -> ir.Value:
    """`x` [.., K] rounded to int8 by groups of one row, as float32: see the module's docstring.

    Args:
        channels: K, a multiple of `group`.
    """
    rank, shape = rank_of(x), shape_of(x)
    assert rank is not None
    # said in numbers: where there are no rows, -1 could be anything
    rows, count = [0] * (rank - 1), channels // group
    if shape is None or shape[-1] != group:
        blocks = build.op("Reshape", x, np.array([*rows, count, group], np.int64))
        peak = build.op("ReduceMax", build.op("Abs", blocks), np.array([-1], np.int64), keepdims=0)
    else:
        peak = build.op("ReduceMax", build.op("Abs", x), np.array([-1], np.int64), keepdims=1)
    if shape is None or not all(isinstance(dim, int) and dim for dim in shape[:-1]):
        # ONNX Runtime (1.31) gives what it reduces the shape of its input where that is empty
        peak = build.op("Reshape", peak, np.array([*rows, count], np.int64))
    scale = build.op("Max", build.op("Mul", peak, 1 / LARGEST_CODE), _TINY)
    codes = build.op("QuantizeLinear", x, scale, axis=rank - 1, block_size=group, output_dtype=int(ir.DataType.INT8))
    return build.op("DequantizeLinear", codes, scale, axis=rank - 1, block_size=group)
