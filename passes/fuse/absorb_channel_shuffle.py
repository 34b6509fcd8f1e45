"""Channel shuffles absorbed in the weights of the convolution that reads them.

A shuffle views the C = a b channels as a grid and transposes it: shuffle(x)[q a + p] = x[p b + q]. A convolution over
all channels reads them in any order if its weight has that order too:

    Conv(shuffle(x), W) = Conv(x, W'),   W'[:, p b + q] = W[:, q a + p].

Rules
1. `into_convolution`: Reshape [N, a, b, ...], Transpose of a and b, Reshape back, before a Conv of one group with a
   constant weight. In between may be operators that treat every channel alike (activations), and depthwise
   convolutions, whose kernels and biases are reordered.
Left alone: a shuffle that another operator reads stays for it; a value in between that somebody else reads; grouped
convolutions, which see only a part of the channels.

Nothing is computed that was not before, so it always pays. The pass is exact, up to the order of the sum. Shuffles:
Zhang et al., "ShuffleNet", arXiv 1707.01083.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import (
    Array,
    attribute,
    attributes_of,
    constant,
    is_constant,
    is_op,
    same_dim,
    shape_of,
    used_once,
)
from xform.passes.cleanup.local import NodeRule, given
from xform.patterns.elementwise import UNARY
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule


@dataclass(frozen=True)
class Shuffle:
    """A value [N, a * b, ...] whose channels are `source`'s, seen as a grid [a, b] and transposed."""

    source: ir.Value
    rows: int
    columns: int

    def undo(self, array: Array, axis: int) -> Array:
        """`array`, which has one entry per shuffled channel along `axis`, in the order of the source's channels."""
        shape = array.shape
        grid = array.reshape(*shape[:axis], self.columns, self.rows, *shape[axis + 1 :])
        return np.ascontiguousarray(grid.swapaxes(axis, axis + 1)).reshape(shape)


def read_shuffle(value: ir.Value | None) -> Shuffle | None:
    """`value` as a channel shuffle, told by the shapes; None if it is none."""
    back = value.producer() if value is not None else None
    swap = _below(back, "Reshape", "Transpose")
    split = _below(swap, "Transpose", "Reshape")
    if back is None or swap is None or split is None or split.inputs[0] is None:
        return None
    source = split.inputs[0]
    before, grid, after = shape_of(source), shape_of(split.outputs[0]), shape_of(value)
    if before is None or grid is None or after is None or len(before) < 3 or len(grid) < 3 or before != after:
        return None
    rows, columns = grid[1], grid[2]
    perm = attribute(swap, "perm")
    if not isinstance(rows, int) or not isinstance(columns, int) or rows * columns != before[1] or None in before:
        return None
    if not same_dim(before[0], grid[0]) or perm is None or list(perm) != [0, 2, 1, *range(3, len(grid))]:
        return None
    return Shuffle(source, rows, columns)


def _below(node: ir.Node | None, op_type: str, producer: str) -> ir.Node | None:
    """The `producer` operator that makes the first input of `node`, if `node` is an `op_type`."""
    if node is None or not is_op(node, op_type) or node.inputs[0] is None:
        return None
    below = node.inputs[0].producer()
    return below if below is not None and is_op(below, producer) else None


class IntoConvolution(NodeRule):
    """Rule 1."""

    name = "into_convolution"
    op_types = ("Conv",)
    concept = "convolution"
    levels = 8

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        between: list[ir.Node] = []
        at = node.inputs[0]
        shuffle = read_shuffle(at)
        while shuffle is None and at is not None and used_once(at):
            maker = at.producer()
            if maker is None or maker.graph is not node.graph or not _channelwise(maker):
                return QUIET
            between.insert(0, maker)
            at = maker.inputs[0]
            shuffle = read_shuffle(at)
        if shuffle is None or attribute(node, "group", 1) != 1:
            return QUIET
        if not is_constant(node.inputs[1]):
            return Failure(
                "the weight of the convolution is computed, so that its channels cannot be reordered", (node,)
            )
        match.data.update(shuffle=shuffle, between=between)
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        shuffle: Shuffle = match.data["shuffle"]
        value = shuffle.source
        for inner in match.data["between"]:
            value = build.op(inner.op_type, value, *_reordered(build, shuffle, inner), **attributes_of(inner))
        node = match.node("node")
        weight = _undone(build, shuffle, node.inputs[1], 1)
        return build.op("Conv", value, weight, *node.inputs[2:], **attributes_of(node))


def _channelwise(node: ir.Node) -> bool:
    """Whether channel c of the result is made of channel c of the first input, in a way that can be reordered."""
    if is_op(node, *UNARY):
        return len(node.inputs) == 1
    if not is_op(node, "Conv"):
        return False
    kernel, constants = shape_of(node.inputs[1]), all(v is None or is_constant(v) for v in node.inputs[1:])
    return constants and kernel is not None and kernel[1] == 1 and kernel[0] == attribute(node, "group", 1)


def _reordered(build: Builder, shuffle: Shuffle, node: ir.Node) -> list[ir.Value | None]:
    """The inputs after the first of an operator in between: kernels and biases, with the channels as first axis."""
    return [
        None if given(node, i) is None else _undone(build, shuffle, given(node, i), 0)
        for i in range(1, len(node.inputs))
    ]


def _undone(build: Builder, shuffle: Shuffle, value: ir.Value | None, axis: int) -> ir.Value:
    array = constant(value)
    assert array is not None and value is not None
    return build.constant(shuffle.undo(array, axis), value.name or "weight")


@dataclass(frozen=True)
class AbsorbChannelShuffle(RewritePass):
    """Channel shuffles absorbed in the weights of the convolutions that read them."""

    name: ClassVar[str] = "absorb_channel_shuffle"

    def rules(self) -> Sequence[Rule]:
        return (IntoConvolution(),)
