"""Streams of a graph while rules change it: found once, and again only where a rewrite touched one."""

from __future__ import annotations

import onnx_ir as ir

from xform.graph.streams import Stream, find_streams
from xform.rewrite.rule import Failure


class StreamCache:
    """The streams by the normalizations that read them, and the verdicts on those that were refused.

    A cache, not a channel for data: what it gives is what `find_streams` would give now.
    """

    def __init__(self) -> None:
        self._streams: dict[ir.Graph, dict[ir.Node, Stream]] = {}
        self._refused: dict[int, Failure] = {}
        self._checked: set[int] = set()  # streams that hold since the last change

    def at(self, norm: ir.Node) -> Stream | None:
        """The stream that `norm` reads, or None."""
        graph = norm.graph
        if not isinstance(graph, ir.Graph):
            return None
        if graph not in self._streams or not self._sound(graph, norm):
            found = find_streams(graph)
            self._streams[graph] = {r.node: s for s in found for r in s.readers if r.node is not None}
            self._refused.clear()
            self._checked = {id(s) for s in found}
        return self._streams[graph].get(norm)

    def changed(self) -> None:
        """Say that the graph is about to change."""
        self._checked.clear()

    def refuse(self, stream: Stream, failure: Failure) -> Failure:
        """Remember that `stream` was refused."""
        self._refused[id(stream)] = failure
        return failure

    def refusal(self, stream: Stream) -> Failure | None:
        """Why `stream` was refused before, if it was."""
        return self._refused.get(id(stream))

    def _sound(self, graph: ir.Graph, norm: ir.Node) -> bool:
        """Whether what is known of the stream of `norm` still holds."""
        stream = self._streams[graph].get(norm)
        if stream is None:
            return False
        if id(stream) in self._checked:
            return True
        if any(node.graph is None or node.inputs[index] not in stream.axes for node, index in stream.edges):
            return False
        if any(node.graph is None for w in stream.writers for node in w.nodes):
            return False
        self._checked.add(id(stream))
        return True
