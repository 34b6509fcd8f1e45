"""Depthwise convolutions with several outputs per channel, as so many plain depthwise convolutions.

A convolution with as many groups as input channels C and m C outputs (channel multiplier m) writes output g m + j from
channel g and kernel W[g m + j]. The kernels of one j are those of a plain depthwise convolution, so

    Conv(x, W; group=C) = shuffle(Concat_j Conv(x, W[j::m]; group=C)),

where the shuffle brings channels in the order (j, g) to the order (g, j): Reshape, Transpose, Reshape.

Rules
1. `split_multiplier`: as above, for a constant weight and bias and m > 1.
Left alone, with a remark: a weight or bias that is computed; more than one unknown size in space; more outputs per
channel than pay; targets other than the CPU.

Runtimes have fast kernels for m = 1 only: the others go group by group through a product of one row. The pass is exact,
to the bit. Channel multiplier: Chollet, "Xception", arXiv 1610.02357, and MobileNet, arXiv 1704.04861.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import Dim, attribute, constant, is_constant, shape_of
from xform.passes.cleanup.local import NodeRule, given
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule

_SPATIAL = ("strides", "pads", "dilations", "kernel_shape", "auto_pad")


@dataclass(frozen=True)
class SplitMultiplier(NodeRule):
    """Rule 1."""

    name = "split_multiplier"
    op_types = ("Conv",)
    concept = "convolution"
    levels = 1

    largest: int

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        weight, bias = node.inputs[1], given(node, 2)
        kernel, out = shape_of(weight), shape_of(node.outputs[0])
        groups = attribute(node, "group", 1)
        if kernel is None or groups < 2 or kernel[1] != 1 or not isinstance(kernel[0], int) or kernel[0] == groups:
            return QUIET
        if not is_constant(weight) or not (bias is None or is_constant(bias)):
            return Failure("its weight or bias is computed, so that it cannot be split offline", (node,))
        if out is None or sum(not isinstance(size, int) for size in out[2:]) > 1:
            return Failure("more than one size of its output in space is unknown", (node,))
        match.data.update(groups=groups, times=kernel[0] // groups, space=out[2:])
        return None

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """Time ~ outputs / rate: 4 to 7 GFLOP/s grouped, 25 to 45 plain; each part reads x again.

        Measured in docs/onnxruntime-notes.md: faster up to m = 4 even where the shuffle stays; no gain at 8.
        """
        node, times = match.node("node"), match.data["times"]
        if context.target.kind != "cpu":
            return Failure(f"measured to pay on the CPU only, the target is {context.target}", (node,))
        if times > self.largest:
            return Failure(f"{times} outputs per channel: more than {self.largest} parts do not pay", (node,))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        node = match.node("node")
        groups, times = match.data["groups"], match.data["times"]
        weight, bias = constant(node.inputs[1]), constant(given(node, 2))
        assert weight is not None
        base = node.inputs[1].name if node.inputs[1] is not None and node.inputs[1].name else "weight"
        spatial = {name: attribute(node, name) for name in _SPATIAL}
        parts = []
        for j in range(times):
            kernel = build.constant(np.ascontiguousarray(weight[j::times]), f"{base}_{j}")
            offset = None if bias is None else build.constant(np.ascontiguousarray(bias[j::times]), f"{base}_bias_{j}")
            parts.append(build.op("Conv", node.inputs[0], kernel, offset, group=groups, **spatial))
        joined = build.op("Concat", *parts, axis=1)
        return _shuffled(build, joined, times, groups, match.data["space"])


def _shuffled(build: Builder, x: ir.Value, times: int, groups: int, space: Sequence[Dim]) -> ir.Value:
    """Channels in the order (j, g) in the order (g, j). Sizes in space are one axis meanwhile, if they are known."""
    if all(isinstance(size, int) for size in space):
        grid = build.reshape(x, slice(0, 1), times, groups, slice(2, None))
        swapped = build.op("Transpose", grid, perm=[0, 2, 1, 3])
        return build.reshape(swapped, slice(0, 1), times * groups, *(size for size in space if isinstance(size, int)))
    axes = [slice(axis, axis + 1) for axis in range(2, 2 + len(space))]
    grid = build.reshape(x, slice(0, 1), times, groups, *axes)
    swapped = build.op("Transpose", grid, perm=[0, 2, 1, *range(3, 3 + len(space))])
    return build.reshape(swapped, slice(0, 1), times * groups, *(slice(a.start + 1, a.stop + 1) for a in axes))


@dataclass(frozen=True)
class SplitChannelMultiplier(RewritePass):
    """Depthwise convolutions with several outputs per channel as plain ones.

    Attributes:
        largest: Most outputs per channel that are split.
    """

    name: ClassVar[str] = "split_channel_multiplier"
    largest: int = 4

    def rules(self) -> Sequence[Rule]:
        return (SplitMultiplier(self.largest),)
