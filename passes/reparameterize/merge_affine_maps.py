"""Sequences and sums of affine maps collapsed into single ones, with BatchNormalization and adapters among them.

One theory covers what trains with many parameters and runs with few: every operator between two nonlinearities is an
affine map over channels (and, for convolutions, a window of positions). `affine_read` says which map a node is,
`affine_map` adds and composes maps exactly or says why that is not exact, and `affine_region` finds out for each node
whether what ends there is cheaper as a sum of merged maps of some value further up. Nothing here knows a library's
module names; the structures that go away are, among others:

- RepVGG, MobileOne, RepViT, FastViT, ACNet and DBB blocks: parallel convolutions of any sizes with aligned centres,
  pointwise, depthwise, grouped, dilated, average-pooling, BatchNorm and identity branches, nested (Ding et al. 2021;
  Vasu et al. 2022 and 2023; Wang et al. 2023);
- LoRA, rsLoRA, DoRA, LoHa, LoKr, (IA)3: x W + s (x A) B and the like (Hu et al. 2021; Kalajdzievski 2023; Liu et al.
  2024; Hyeon-Woo et al. 2021; Liu et al. 2022);
- linear adapters, serial and parallel (ZeroI2V, Li et al. 2023), masked sparsification modules (PAT, 2024), RepBN
  (SLAB, Guo et al. 2024), layer scale, factors and shifts per channel.

Exact: only if every step is; see `affine_map` for the border rule. Rounding differs: weights are merged in float64 and
cast once.

Profit: FLOPs + parameters of the merged form are no more than those of the nodes that go away, and there are fewer
nodes (`affine_region`). So the dense form of a low-rank pair is not built unless it hides in a sum or another map; the
remark gives both figures. A weight that other nodes read stays with them; the merged map gets a copy of its own, and
the remark says so.

Refused with a reason: an intermediate with a shift that a convolution pads with zeros; padding in reflect or edge mode;
count_include_pad=0 at a padded border; BatchNormalization in training mode; quantized weights; results that overflow
the weight's type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.channel_axis import VIEWS, axis_after
from xform.graph.values import is_op, used_once
from xform.passes.reparameterize import affine_build
from xform.passes.reparameterize.adapters import NonlinearAdapter
from xform.passes.reparameterize.affine_read import DENSE, OPERATORS, channel_axes, outputs_of, read
from xform.passes.reparameterize.affine_region import (
    Region,
    built_cost,
    built_nodes,
    candidates,
    gain,
    grow,
    saved_cost,
)
from xform.passes.reparameterize.bias_padding import BiasPadding
from xform.passes.reparameterize.channel_path import affine_of
from xform.passes.reparameterize.fold_batch_norm import FoldIntoLinear
from xform.passes.reparameterize.join_attention import JoinAttention
from xform.passes.reparameterize.join_branches import WidenFeedForward
from xform.passes.reparameterize.linear_map import shared_note
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.remarks import Cost
from xform.rewrite.rule import Failure, Rule

MAX_READERS = 8
_REACH = 6


def _anchors() -> frozenset[Key]:
    return frozenset(("", op_type) for op_type in OPERATORS)


class MergeAt(Rule):
    """What ends at one node, as merged maps of what lies before it."""

    name = "merge"
    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return _anchors()

    def reach(self) -> int:
        return _REACH

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        nodes = candidates(node)
        if len(nodes) < 2:
            return
        for axis in channel_axes(node):
            start = Region.at([(node.outputs[0], axis)])
            if start is None:
                continue
            region, worth = grow(start, nodes, _worth)
            if worth >= 0:
                yield _match(region)
            failure = _missed(node, axis, nodes, region)
            if failure is not None:
                yield failure

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value] | Failure:
        return _rewrite(match, build)


class MergeIntoReaders(Rule):
    """An affine map with several readers, merged into each of them, where all of them can take it."""

    name = "merge_into_readers"
    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return _anchors()

    def reach(self) -> int:
        return _REACH

    def ahead(self) -> int:
        return 4  # a reader, views before it, its bias

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        value = node.outputs[0]
        uses = value.uses()
        if not 2 <= len(uses) <= MAX_READERS or value.is_graph_output():
            return
        for axis in channel_axes(node):
            readers = _affine_readers(node, axis)
            if readers is None:
                continue
            start = Region.at([(reader.path[0].outputs[0], reader.axis) for reader in readers])
            if start is None:
                continue
            nodes = [n for reader in readers for n in reader.path]
            region, worth = grow(start, [*nodes, *candidates(node)], _worth)
            if worth >= 0 and node in region.absorbed:
                yield _match(region)

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value] | Failure:
        return _rewrite(match, build)


@dataclass(frozen=True)
class _Reader:
    """One affine reader of a value.

    Attributes:
        path: From the root to the node that reads the value: factors and shifts behind the reader (its bias), the
            reader, the views before it.
        axis: Channel axis of the root.
    """

    path: tuple[ir.Node, ...]
    axis: int


def _affine_readers(node: ir.Node, axis: int) -> list[_Reader] | None:
    """Every reader of the result of `node`; None if one is not affine."""
    found = [_affine_reader(node, use, axis) for use in dict.fromkeys(u.node for u in node.outputs[0].uses())]
    readers = [reader for reader in found if reader is not None]
    return readers if len(readers) == len(found) else None


def _affine_reader(node: ir.Node, current: ir.Node, axis: int) -> _Reader | None:
    value, path = node.outputs[0], list[ir.Node]()
    while is_op(current, "Transpose", *VIEWS) and current.inputs[0] is value:
        after = axis_after(current, axis)
        if after is None or not used_once(current.outputs[0]):
            return None
        path.insert(0, current)
        value, axis = current.outputs[0], after
        current = next(iter(value.uses())).node
    for place in channel_axes(current):
        parts = read(current, place)
        if not isinstance(parts, str) and any(p.operand is value and p.axis == axis for p in parts):
            break
    else:
        return None
    if current.graph is not node.graph:
        return None
    path.insert(0, current)
    while used_once(current.outputs[0]):  # its bias
        reader = next(iter(current.outputs[0].uses())).node
        channels = outputs_of(current, place)
        if channels is None or reader.graph is not node.graph:
            break
        if affine_of(reader, current.outputs[0], place, channels) is None:
            break
        path.insert(0, reader)
        current = reader
    return _Reader(tuple(path), place)


def _worth(region: Region) -> float:
    """The gain of a region that can be built with fewer nodes; else a negative number."""
    if built_nodes(region) >= len(region.saved()) or not affine_build.buildable(region):
        return -1
    return gain(region)


def _match(region: Region) -> Match:
    saved = region.saved()
    note = shared_note([*saved, *region.saved_constants()])
    return Match(
        nodes=dict(enumerate([*saved, *region.saved_constants()])),
        roots=tuple(value for value, _ in region.roots),
        data={"region": region},
        note=note,
        cost_before=Cost(len(saved), flops=saved_cost(region)),
        cost_after=Cost(built_nodes(region), flops=built_cost(region)),
    )


def _rewrite(match: Match, build: Builder) -> Sequence[ir.Value] | Failure:
    result = affine_build.build(match.data["region"], build)
    if isinstance(result, affine_build.Problem):
        return Failure(result.reason, tuple(match.nodes.values()))
    return result


def _missed(node: ir.Node, axis: int, nodes: Sequence[ir.Node], tried: Region) -> Failure | None:
    """What would have been merged at `node` if it were exact, or if it paid."""
    if tried.refusals:
        start = Region.at([(node.outputs[0], axis)], lenient=True)
        region, worth = grow(start, nodes, _worth) if start is not None else (tried, -1)
        if worth >= 0:
            for refusal in tried.refusals:
                if refusal.node in region.absorbed:
                    return Failure(refusal.reason, (node, refusal.node))
    return _costlier(node, axis, nodes)


def _costlier(node: ir.Node, axis: int, nodes: Sequence[ir.Node]) -> Failure | None:
    """A pair of linear maps, one read by the other alone, whose product costs more than both."""
    if not is_op(node, *DENSE):
        return None
    region = Region.at([(node.outputs[0], axis)])
    value, inner = node.inputs[0], None
    if region is None or not region.expand(node):
        return None
    for current in nodes[1:]:
        if value is None or current.outputs[0] is not value or len(value.uses()) != 1 or not region.expand(current):
            continue
        if is_op(current, *DENSE):
            inner = current
            break
        value = next(iter(region.sources()), None) if len(region.sources()) == 1 else None
    if inner is None or gain(region) >= 0:
        return None
    return Failure(
        f"one map in place of both would cost {built_cost(region):,} FLOPs and parameters, they cost "
        f"{saved_cost(region):,}",
        (node, inner),
    )


@dataclass(frozen=True)
class MergeAffineMaps(RewritePass):
    """Collapse sequences and sums of affine maps: BatchNorm, parallel branches, adapters, scales."""

    name = "merge_affine_maps"

    def rules(self) -> Sequence[Rule]:
        return (
            BiasPadding(),
            FoldIntoLinear(),
            MergeAt(),
            MergeIntoReaders(),
            WidenFeedForward(),
            JoinAttention(),
            NonlinearAdapter(),
        )
