"""What absorption, RepQuant and SmoothQuant share: an affine map per channel moved from a norm into its readers.

norm:  y = g n + b.     With y = a y' + c per channel, a != 0:
y' = (g / a) n + (b - c) / a         the norm with another affine map
L(y; W, d) = L(y'; W', d')           W' = W scaled by a over its input channels, d' = d + L(c; W, 0)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.norms import NORMS
from xform.graph.values import ORIGIN, Array, display_name, rank_of
from xform.passes.normalize.readers import LinearReader, Paths, linear_readers
from xform.patterns import norm as norms
from xform.patterns.norm import Norm
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule


@dataclass(frozen=True)
class Change:
    """y = a * y' + c, and the norm's affine map that gives y'.

    Attributes:
        a, c: float64 [C].
        scale, bias: Of the new norm, float64 [C].
        metadata: For the new norm's node.
    """

    a: Array
    c: Array
    scale: Array
    bias: Array
    metadata: tuple[tuple[str, str], ...] = ()


class MoveIntoReaders(Rule):
    """A rule that changes a norm's affine map and undoes the change in the linear maps that read it."""

    concept = "layer_norm"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset(("", name) for name in NORMS)

    def reach(self) -> int:
        return 2

    @abstractmethod
    def change(self, norm: Norm, readers: Sequence[LinearReader]) -> Change | Failure:
        """What to do with one norm, or why nothing; `QUIET` where there is nothing to tell."""

    def wanted(self, norm: Norm) -> Failure | None:
        """Whether the norm is to be changed at all, before its readers are looked at."""
        return None

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        norm = norms.read(node)
        if isinstance(norm, str):
            yield Failure(norm, (node,))
            return
        failure = self.wanted(norm)
        if failure is not None:
            yield failure
            return
        axis = (rank_of(norm.output) or 1) - 1
        readers = linear_readers(norm.output, axis, norm.channels)
        if isinstance(readers, Failure):
            yield readers
            return
        change = self.change(norm, readers)
        if isinstance(change, Failure):
            yield change
            return
        nodes: dict[Hashable, ir.Node] = dict(enumerate([*norm.nodes, *(n for r in readers for n in r.nodes)]))
        data = {"norm": norm, "readers": readers, "change": change}
        yield Match(nodes=nodes, roots=tuple(r.root for r in readers), data=data)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        change: Change = match.data["change"]
        for reader in match.data["readers"]:
            reason = reader.problem(change.a, change.c)
            if reason is not None:
                return Failure(reason, (reader.linear.node,))
        return None

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        change: Change = match.data["change"]
        norm: Norm = match.data["norm"]
        y = norm.build(build, change.scale, change.bias)
        for node in build.nodes:
            node.metadata_props[ORIGIN] = display_name(norm.node)
        build.nodes[0].metadata_props.update(change.metadata)
        made: Paths = {}
        values = []
        for reader in match.data["readers"]:
            start = len(build.nodes)
            values.append(reader.build(build, y, change.a, change.c, made))
            for node in build.nodes[start:]:
                node.metadata_props[ORIGIN] = display_name(reader.linear.node)
        return values
