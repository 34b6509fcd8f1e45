"""Transposes absorbed by storing the matrices between two products the other way round.

    (A B)^T = B^T A^T,   f(X)^T = f(X^T) for elementwise f,   Split(X, axis)^T = Split(X^T, other axis)

Rules
1. `flip_region`: a region of matrices that are tied by elementwise operators, Split, Slice, Concat and Pad
   (`xform.patterns.matrix_layout`) is stored transposed, where its border then holds smaller Transposes.
Left alone: regions in which something needs its axes where they are (a Softmax, a norm, a Reshape in the middle); and,
with a remark, regions that would need as many Transposes as before.

The pass is exact, up to the order of sums. Linear attention is where this matters: its heads come from convolutions by
columns and were transposed to rows and back (Cai et al., "EfficientViT", arXiv 2205.14756).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import attributes_of, constant, is_constant, is_op, rank_of, shape_of
from xform.patterns.elementwise import BINARY
from xform.patterns.matrix_layout import Region, is_product, is_swap, region_of
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure, Rule


class FlipRegion(Rule):
    """Rule 1."""

    name = "flip_region"
    concept = "layout"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "Transpose")})

    def reach(self) -> int:
        return 8

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if not is_swap(node):
            return
        for seed in (node.inputs[0], node.outputs[0]):
            region = region_of(seed) if seed is not None else None
            if region is None:
                continue
            before, after = region.moved(flipped=False), region.moved(flipped=True)
            match = Match(
                roots=_roots(region),
                interior=tuple(region.nodes),
                data={"region": region, "before": before, "after": after},
                note=f"Transposes move {after} elements, {before} before",
            )
            yield match

    def check(self, match: Match, context: PassContext) -> Failure | None:
        return None if match.roots else QUIET

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """Cost = elements that Transposes move at the border of the region; Transposes into products are free."""
        before, after = match.data["before"], match.data["after"]
        if after < before:
            return None
        region: Region = match.data["region"]
        if before == 0:
            return QUIET
        return Failure(
            f"stored transposed, its border would move {after} elements, it moves {before} now", tuple(region.nodes[:3])
        )

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        flip = _Flip(match.data["region"], build)
        results = []
        for root in match.roots:
            maker = root.producer()
            before = maker.inputs[0] if maker is not None and is_swap(maker) else None
            vanishes = before is not None and root not in flip.region.values
            results.append(flip.of(before) if before is not None and vanishes else _swap(build, flip.of(root)))
        return results


def _roots(region: Region) -> tuple[ir.Value, ...]:
    """What is read outside: results of Transposes that vanish, and values that others read as they were."""
    roots: list[ir.Value] = []
    for value in region.values:
        outside = [user for user, _ in value.uses() if user not in region.nodes]
        roots.extend(user.outputs[0] for user in outside if is_swap(user))
        made_inside = value.producer() in region.nodes
        if made_inside and (value.is_graph_output() or any(not is_swap(user) for user in outside)):
            roots.append(value)
    return tuple(dict.fromkeys(roots))


class _Flip:
    """The values of a region, transposed, each built once."""

    def __init__(self, region: Region, build: Builder) -> None:
        self.region = region
        self.build = build
        self._done: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        if value not in self._done:
            maker = value.producer()
            if maker is None or maker not in self.region.nodes:
                self._done[value] = _swap(self.build, value)
            else:
                for old, new in zip(maker.outputs, self._again(maker), strict=True):
                    self._done[old] = new
        return self._done[value]

    def _again(self, node: ir.Node) -> Sequence[ir.Value]:
        """`node` on transposed operands."""
        if is_product(node):
            left, right = node.inputs
            assert left is not None and right is not None
            return [self.build.op("MatMul", self._operand(right), self._operand(left))]
        attributes = attributes_of(node)
        rank = rank_of(node.outputs[0])
        assert rank is not None and node.inputs[0] is not None
        inputs: list[Any] = [self.of(node.inputs[0]), *node.inputs[1:]] if not is_op(node, "Concat", *BINARY) else []
        if is_op(node, "Concat", *BINARY):
            inputs = [self._tied(v, rank) for v in node.inputs]
        if is_op(node, "Split", "Concat"):
            attributes["axis"] = _other(attributes.get("axis", 0), rank)
        elif is_op(node, "Slice"):
            axes = constant(node.inputs[3])
            assert axes is not None
            inputs[3] = np.array([_other(int(axis), rank) for axis in axes.reshape(-1)], axes.dtype)
        elif is_op(node, "Pad"):
            pads = constant(node.inputs[1])
            assert pads is not None
            inputs[1] = pads.reshape(2, rank)[:, _swapped(rank)].reshape(-1)
        return self.build.ops(node.op_type, inputs, len(node.outputs), **attributes)

    def _operand(self, value: ir.Value) -> ir.Value:
        """An operand of a product, transposed; a member of the region only if the product reads its own region."""
        return self.of(value) if value in self.region.values else _swap(self.build, value)

    def _tied(self, value: ir.Value | None, rank: int) -> ir.Value:
        assert value is not None
        if value in self.region.values:
            return self.of(value)
        if not is_constant(value):
            return value  # a single number
        array, shape = constant(value), shape_of(value)
        assert array is not None and shape is not None
        if array.size == 1 and rank > array.ndim:
            return value
        wide = array.reshape((1,) * max(2 - array.ndim, 0) + array.shape)
        return self.build.constant(np.ascontiguousarray(wide.swapaxes(-1, -2)), value.name or "constant")


def _swap(build: Builder, value: ir.Value) -> ir.Value:
    """`value` with its last two axes swapped: what it was made from by a Transpose, or a Transpose of it."""
    maker = value.producer()
    if maker is not None and is_swap(maker) and maker.inputs[0] is not None:
        return maker.inputs[0]
    rank = rank_of(value)
    assert rank is not None
    return build.op("Transpose", value, perm=_swapped(rank))


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _other(axis: int, rank: int) -> int:
    """The axis that `axis` becomes."""
    return _swapped(rank)[axis % rank]


@dataclass(frozen=True)
class AbsorbTransposes(RewritePass):
    """Matrices between products stored the way that needs fewer Transposes."""

    name: ClassVar[str] = "absorb_transposes"

    def rules(self) -> Sequence[Rule]:
        return (FlipRegion(),)
