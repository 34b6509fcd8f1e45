"""Rules about one activation and all operators that read it, so that they share what is made of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence

import onnx_ir as ir

from xform.graph.values import ORIGIN, display_name
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.rule import Failure, Rule


class SharedInput(Rule):
    """Matches an activation `x` with all of its readers that have no `problem`."""

    def reach(self) -> int:
        return 1

    @abstractmethod
    def problem(self, node: ir.Node) -> Failure | None:
        """Why a reader is left as it is."""

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        failure = self.problem(node)
        if failure is not None:
            yield failure
            return
        x = node.inputs[0]
        assert x is not None
        alike = dict.fromkeys(n for n, at in x.uses() if at == 0 and n.graph is node.graph and n is not node)
        readers = [node, *(other for other in alike if self.problem(other) is None)]
        nodes: dict[Hashable, ir.Node] = dict(enumerate(readers))
        yield Match(values={"x": x}, nodes=nodes, roots=tuple(reader.outputs[0] for reader in readers))


def for_each_reader(match: Match, build: Builder, make: Callable[[ir.Node], ir.Value]) -> Sequence[ir.Value]:
    """What `make` gives for each reader of a match; its nodes come from that reader alone."""
    values = []
    for root in match.roots:
        node = root.producer()
        assert node is not None
        start = len(build.nodes)
        values.append(make(node))
        for made in build.nodes[start:]:
            made.metadata_props[ORIGIN] = display_name(node)
    return values


__all__ = ["SharedInput", "for_each_reader"]
