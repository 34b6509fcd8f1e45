"""Channels of an activation moved so that they lie around zero before it is quantized, and the products moved back.

    X W + b = (X - c) W + (b + c W)        c [K], one number per input channel

Scales by groups of channels (`passes.integer.grouped_products`) are symmetric: a channel that lies on one side of zero
(after GELU, or with a bias of its own) leaves half of its codes unused, and the largest number of a group is smaller if
all its channels lie around zero. The subtraction is elementwise, which runtimes fuse to what comes before it, and c W
is constant and joins the bias, so this costs next to nothing. Codes with a zero point (`quantize_products`, static
products) need it less.

Source: Wei et al. 2023, "Outlier Suppression+: Accurate quantization of large language models by equivalent and
effective shifting and scaling" (arXiv 2304.09145), section 4.1; there c is the middle of a channel's range, here
calibration decides (`xform.pipeline.channel_shifts`).

Rule `shift`: every activation with shifts, and all products with constant weights that read it. Exact but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import ORIGIN, Array, constant, display_name, is_op
from xform.passes.integer.scale_channels import PerChannel
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import RewritePass
from xform.rewrite.rule import Rule

Shifts = Mapping[str, Array]  # name of the activation -> c, float64 [K]


class Shift(PerChannel):
    """One activation and the products that read it, with their biases."""

    name = "shift"

    def fits(self, numbers: Array) -> bool:
        return bool(np.isfinite(numbers).all())

    def root(self, reader: ir.Node) -> ir.Value:
        """The product with its bias, where it has one."""
        product = reader.outputs[0]
        uses = list(product.uses())
        reads = uses[0][0] if len(uses) == 1 and not product.is_graph_output() else None
        if reads is None or reads.graph is not reader.graph or _bias(reads, product) is None:
            return product
        return reads.outputs[0]

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        x = match["x"]
        shifts = self.given[x.name or ""].astype(np.float32)
        moved = build.op("Sub", x, build.constant(shifts, f"{x.name}_shifts"))
        values = []
        for root, node in zip(match.roots, match.nodes.values(), strict=True):
            value, weight, last = node.inputs[1], constant(node.inputs[1]), root.producer()
            assert value is not None and weight is not None and last is not None
            bias = None if last is node else _bias(last, node.outputs[0])
            back = shifts.astype(np.float64) @ weight + (0.0 if bias is None else bias.astype(np.float64))
            start = len(build.nodes)
            product = build.op("MatMul", moved, value)
            values.append(build.op("Add", product, build.constant(back.astype(np.float32), f"{value.name}_bias")))
            build.nodes[start].metadata_props[ORIGIN] = display_name(node)
            build.nodes[start + 1].metadata_props[ORIGIN] = display_name(last)
        return values


def _bias(node: ir.Node, product: ir.Value) -> Array | None:
    """The constant [N] that `node` adds to a product."""
    if not is_op(node, "Add"):
        return None
    other = next((value for value in node.inputs if value is not product), None)
    array = constant(other)
    return array if array is not None and array.ndim == 1 and array.dtype == np.float32 else None


@dataclass(frozen=True)
class ShiftChannels(RewritePass):
    """Channels moved around zero, for quantization with symmetric codes.

    Attributes:
        shifts: By name of the activation.
    """

    name: ClassVar[str] = "shift_channels"
    shifts: Shifts = field(default_factory=dict, hash=False)

    def rules(self) -> Sequence[Rule]:
        return (Shift(self.shifts),)
