"""BatchNormalization folded into the linear map before it, or after it where that is exact.

In inference BatchNormalization is a * x + c per channel (`xform.patterns.batch_norm`). The algebra of folding it into a
Conv, ConvTranspose, Gemm or MatMul with constant weight is in `linear_map`: W' and b' are computed in float64 and cast
once to the type that the weight had. Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, section 3.2 (the forward direction).

Rules
1. Into the map before it (always exact). Between the two may stand transposes and reshapes that keep the channel as one
   axis (BatchNorm1d over tokens), and arithmetic with one constant per channel (a bias Add), which is folded as well.
2. Else into every map that reads it, over the same kinds of operators and over what averages or selects positions
   within a channel (pooling, means, slices, interpolation). Not through a convolution that pads with zeros
   and not into a ConvTranspose with overlap or cropping, unless the shift c is zero; not if any reader is something
   else (the normalization would have to stay for that one).
Left alone, with a remark: training mode; statistics or weights that are not constant; a value in between that is read
elsewhere or is a graph output; a neighbour that is not linear; a fold that would overflow the weight's type.

A weight that other nodes read as well is left to them: the folded map gets a weight of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from xform.graph.channel_axis import VIEWS, axis_before
from xform.graph.rounding import folding_loss
from xform.graph.values import Array, display_name, is_op, used_once
from xform.passes.reparameterize import channel_path, linear_map
from xform.passes.reparameterize.channel_path import Affine
from xform.passes.reparameterize.linear_map import LinearMap
from xform.patterns import batch_norm
from xform.patterns.batch_norm import CHANNEL_AXIS, BatchNorm
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule


@dataclass(frozen=True)
class _Fold:
    """One map with its new weight and bias, and the operators to repeat around it, in the order of the data flow.

    Attributes:
        linear: The map.
        weight, bias: Of the folded map, in float64.
        before: Views between the operand that stays and the map.
        after: Views between the map and the value that is replaced.
        x: The operand that stays.
        root: The value that is replaced.
        absorbed: Every node whose work the folded map takes over.
    """

    linear: LinearMap
    weight: Array
    bias: Array | None
    before: tuple[ir.Node, ...]
    after: tuple[ir.Node, ...]
    x: ir.Value
    root: ir.Value
    absorbed: tuple[ir.Node, ...]

    def build(self, build: Builder) -> ir.Value:
        """The new subgraph."""
        value = self.x
        for node in self.before:
            value = channel_path.rebuild(build, node, value)
        value = self.linear.build(build, value, self.weight, self.bias)
        for node in self.after:
            value = channel_path.rebuild(build, node, value)
        return value


class FoldIntoLinear(Rule):
    """Rules 1 and 2; one remark for each BatchNormalization."""

    name = "fold"
    concept = "batch_norm"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "BatchNormalization")})

    def reach(self) -> int:
        return 4

    def ahead(self) -> int:
        return 4

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        norm = batch_norm.read(node)
        if isinstance(norm, str):
            yield Failure(norm, (node,))
            return
        forward = _into_producer(norm)
        if isinstance(forward, _Fold):
            yield _match(node, [forward])
            return
        backward = _into_readers(norm)
        if isinstance(backward, str):
            yield Failure(f"before it: {forward}; after it: {backward}", (node,))
            return
        yield _match(node, backward)

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        folds: list[_Fold] = match.data["folds"]
        return [fold.build(build) for fold in folds]


def _match(node: ir.Node, folds: Sequence[_Fold]) -> Match:
    nodes: dict[Hashable, ir.Node] = {
        f"{i}.{j}": n for i, fold in enumerate(folds) for j, n in enumerate(fold.absorbed)
    }
    note = linear_map.shared_note([node, *nodes.values()])
    return Match(nodes={"norm": node, **nodes}, roots=tuple(f.root for f in folds), data={"folds": folds}, note=note)


def _exposed(value: ir.Value) -> str | None:
    """Why `value` must stay as it is, although one reader could do without; None if nothing else needs it."""
    if used_once(value):
        return None
    maker = value.producer()
    name = display_name(maker) if maker is not None else value.name
    return f"the result of {name} is {'a graph output' if value.is_graph_output() else 'read elsewhere too'}"


# Rule 1


def _into_producer(norm: BatchNorm) -> _Fold | str:
    value, axis = norm.node.inputs[0], CHANNEL_AXIS
    affine = Affine(norm.a, norm.c)
    views: list[ir.Node] = []
    absorbed = [norm.node]
    while True:
        node = value.producer() if value is not None else None
        if value is None or node is None:
            return f"its operand {value.name if value is not None else ''} is no result of an operator"
        if is_op(node, *linear_map.OPERATORS):
            break
        if is_op(node, "Transpose", *VIEWS):
            before = axis_before(node, axis)
            if before is None:
                return f"{node.op_type} does not keep the channels as one axis"
            views.insert(0, node)
            step, axis = node.inputs[0], before
        else:
            found = _arithmetic(node, axis, len(norm.a))
            if found is None:
                return f"{node.op_type} is no linear map with a weight"
            step, inner = found
            affine = affine.after(inner)
        if (reason := _exposed(value)) is not None:
            return reason
        absorbed.append(node)
        value = step
    linear = linear_map.read(node)
    if isinstance(linear, str):
        return linear
    if (reason := _exposed(value)) is not None:
        return reason
    if node.graph is not norm.node.graph:
        return f"{node.op_type} is in another graph"
    if linear.output_axis() != axis or linear.output_channels() != len(norm.a):
        return f"it does not normalize the output channels of {node.op_type}"
    weight, bias = linear.scale_output(affine.a, affine.c)
    return _checked(linear, weight, bias, (), tuple(views), norm.node.outputs[0], absorbed)


def _arithmetic(node: ir.Node, axis: int, channels: int) -> tuple[ir.Value, Affine] | None:
    for operand in node.inputs:
        if operand is not None and operand.producer() is not None:
            found = channel_path.affine_of(node, operand, axis, channels)
            if found is not None:
                return operand, found
    return None


# Rule 2


def _into_readers(norm: BatchNorm) -> list[_Fold] | str:
    output = norm.node.outputs[0]
    if output.is_graph_output():
        return "it is a graph output"
    readers = list(dict.fromkeys(node for node, _ in output.uses()))
    if not readers:
        return "nothing reads it"
    folds: list[_Fold] = []
    for reader in readers:
        found = _into_reader(norm, reader)
        if isinstance(found, str):
            return found if len(readers) == 1 else f"{found} (in {display_name(reader)}, one of {len(readers)} readers)"
        folds.append(found)
    return folds


def _into_reader(norm: BatchNorm, reader: ir.Node) -> _Fold | str:
    node, value, axis = reader, norm.node.outputs[0], CHANNEL_AXIS
    affine = Affine(norm.a, norm.c)
    views: list[ir.Node] = []
    absorbed = [norm.node]
    while not is_op(node, *linear_map.OPERATORS):
        if is_op(node, "Transpose", *VIEWS, *channel_path.COMMUTING) and node.inputs[0] is value:
            after = channel_path.axis_through(node, value, axis, affine)
            if after is None:
                return f"{node.op_type} does not commute with a factor and a shift per channel"
            views.append(node)
            axis = after
        else:
            found = channel_path.affine_of(node, value, axis, len(norm.a))
            if found is None or node.graph is not norm.node.graph:
                return f"{node.op_type} is no linear map with a weight"
            affine = found.after(affine)
        absorbed.append(node)
        value = node.outputs[0]
        if (reason := _exposed(value)) is not None:
            return reason
        node = next(iter(value.uses())).node
    linear = linear_map.read(node)
    if isinstance(linear, str):
        return linear
    reason = _misfit(linear, value, axis, affine)
    if reason is not None or node.graph is not norm.node.graph:
        return reason or "its reader is inside another graph"
    source = norm.node.inputs[0]
    if source is None:
        return "it has no operand"
    root = node.outputs[0]
    added = _bias_add(linear) if linear.bias is None and np.any(affine.c) else None
    if added is not None:
        absorbed.append(node)
        node, linear = added
        root = node.outputs[0]
        absorbed.append(node)
    weight, bias = linear.scale_input(affine.a, affine.c)
    return _checked(linear, weight, bias, tuple(views), (), root, absorbed, source)


def _bias_add(linear: LinearMap) -> tuple[ir.Node, LinearMap] | None:
    """The Add of a bias that alone reads the map, and the map with that bias."""
    output, axis = linear.node.outputs[0], linear.output_axis()
    if not used_once(output) or axis is None:
        return None
    node = next(iter(output.uses())).node
    if node.graph is not linear.node.graph or not is_op(node, "Add"):
        return None
    found = channel_path.affine_of(node, output, axis, linear.output_channels())
    return None if found is None else (node, replace(linear, bias=found.c))


def _misfit(linear: LinearMap, value: ir.Value, axis: int, affine: Affine) -> str | None:
    """Why the affine map over `axis` of `value` cannot move into `linear`; None if it can."""
    node = linear.node
    if node.inputs[0] is not value or any(v is value for v in node.inputs[1:]):
        return f"{node.op_type} does not read it as its operand"
    if linear.input_axis() != axis or linear.input_channels() != len(affine.a):
        return f"it does not normalize the input channels of {node.op_type}"
    return linear.shift_is_uniform() if np.any(affine.c) else None


def _checked(
    linear: LinearMap,
    weight: Array,
    bias: Array | None,
    before: tuple[ir.Node, ...],
    after: tuple[ir.Node, ...],
    root: ir.Value,
    absorbed: Sequence[ir.Node],
    x: ir.Value | None = None,
) -> _Fold | str:
    loss = folding_loss(weight, bias, linear.dtype)
    if loss is not None:
        return f"the folded weight {loss}"
    operand = x if x is not None else linear.node.inputs[0]
    if operand is None:
        return f"{linear.node.op_type} has no operand"
    return _Fold(linear, weight, bias, before, after, operand, root, (*absorbed, linear.node))


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Folding of BatchNormalization into linear maps."""

    name = "fold_batch_norm"

    def rules(self) -> Sequence[Rule]:
        return (FoldIntoLinear(),)
