"""Linear maps that read a value: where an affine map per channel of that value can move to.

    y = a * y' + c     then     L(y; W, b) = L(y'; W', b')     with W' = W scaled by a over its input channels

(`xform.passes.reparameterize.linear_map`). Between the value and a map may stand operators through which a map per
channel passes: views, slices, picking tokens, means over positions. All readers must be linear, since what is read
changes for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from xform.graph.channel_axis import VIEWS, results
from xform.graph.rounding import folding_loss
from xform.graph.values import Array, attribute, attributes_of, display_name, is_op, used_once
from xform.passes.reparameterize import linear_map
from xform.passes.reparameterize.channel_path import affine_of
from xform.passes.reparameterize.linear_map import OPERATORS, LinearMap
from xform.rewrite.builder import Builder
from xform.rewrite.rule import Failure

_PASSED = (*VIEWS, "Transpose", "Slice", "Gather", "GatherND", "Expand", "ReduceMean", "GlobalAveragePool")
Paths = dict[tuple[ir.Node, ...], ir.Value]


@dataclass(frozen=True)
class LinearReader:
    """One linear map that reads a value.

    Attributes:
        linear: The map, with the bias of the Add after it where there is one.
        path: Operators between the value and the map.
        add: The Add of the bias.
    """

    linear: LinearMap
    path: tuple[ir.Node, ...]
    add: ir.Node | None

    @property
    def root(self) -> ir.Value:
        """What the map, with its bias, gives."""
        return (self.add or self.linear.node).outputs[0]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The map, its Add, and the path."""
        return (*self.path, self.linear.node, *([self.add] if self.add is not None else []))

    def input_peaks(self) -> Array | str:
        """Largest |weight| per input channel, float64 [C]."""
        node, weight = self.linear.node, np.abs(self.linear.weight)
        if is_op(node, "ConvTranspose") or self.linear.group != 1:
            return f"{display_name(node)} has groups"
        outputs_first = is_op(node, "Conv") or (is_op(node, "Gemm") and attribute(node, "transB", 0))
        axis = 1 if outputs_first else 0
        peaks: Array = weight.max(axis=tuple(i for i in range(weight.ndim) if i != axis))
        return peaks

    def needs_bias(self, c: Array) -> bool:
        """Whether a shift c would give the map a bias that it does not have yet, and that costs an Add."""
        return bool(np.any(c)) and self.linear.bias is None and is_op(self.linear.node, "MatMul")

    def problem(self, a: Array, c: Array) -> str | None:
        """Why a * y' + c cannot move into the map; None if it can."""
        name = display_name(self.linear.node)
        if np.any(c) and (reason := self.linear.shift_is_uniform()) is not None:
            return f"{name}: {reason}"
        weight, bias = self.linear.scale_input(a, c)
        loss = folding_loss(weight, bias, self.linear.dtype)
        return None if loss is None else f"the new weight of {name} {loss}"

    def build(self, build: Builder, y: ir.Value, a: Array, c: Array, made: Paths) -> ir.Value:
        """The map over y' = (y - c) / a. `made` keeps what paths became, for readers that share a part of theirs."""
        value = y
        for number, node in enumerate(self.path, 1):
            key = self.path[:number]
            if key not in made:
                attributes = attributes_of(node)
                made[key] = build.op(node.op_type, value, *node.inputs[1:], **attributes)
            value = made[key]
        return self.linear.build(build, value, *self.linear.scale_input(a, c))


def linear_readers(value: ir.Value, axis: int, channels: int) -> list[LinearReader] | Failure:
    """The linear maps that read `value` over its channel axis, if nothing else reads it."""
    found: list[LinearReader] = []
    stack: list[tuple[ir.Value, int, tuple[ir.Node, ...]]] = [(value, axis, ())]
    while stack:
        current, place, path = stack.pop()
        if current.is_graph_output():
            maker = current.producer()
            return Failure(f"{current.name} is an output of the graph", () if maker is None else (maker,))
        for node, index in current.uses():
            if is_op(node, *OPERATORS):
                reader = _reader(node, index, place, channels, path)
                if isinstance(reader, str):
                    return Failure(f"{display_name(node)}: {reader}", (node,))
                found.append(reader)
                continue
            onward = results(node, index, place) if is_op(node, *_PASSED) and index == 0 else None
            if not onward or isinstance(onward, str) or node.graph is not value.graph:
                return Failure(f"{display_name(node)} ({node.op_type}) reads it and is not linear", (node,))
            stack.append((node.outputs[0], onward[0], (*path, node)))
    return found or Failure("nothing reads it")


def _reader(node: ir.Node, index: int, axis: int, channels: int, path: Sequence[ir.Node]) -> LinearReader | str:
    linear = linear_map.read(node)
    if isinstance(linear, str):
        return linear
    if index != 0 or linear.input_axis() != axis or linear.input_channels() != channels:
        return f"{node.op_type} does not read these channels as its input channels"
    output, place = node.outputs[0], linear.output_axis()
    if linear.bias is None and place is not None and used_once(output):
        use = next(iter(output.uses())).node
        found = affine_of(use, output, place, linear.output_channels()) if is_op(use, "Add") else None
        if found is not None and use.graph is node.graph:
            return LinearReader(replace(linear, bias=found.c), tuple(path), use)
    return LinearReader(linear, tuple(path), None)
