"""Streams as a networkx graph, and as text.

stream 1: 32 channels, 5 sums, read by 5 layer_norm
  + linear    vit.embeddings.patch_embeddings.projection/conv2d
  + constant  vit.embeddings.position_embeddings
  >           layer_norm  vit.encoder.layer.0.layernorm_before
  + linear    vit.encoder.layer.0.attention.output.dense/linear_3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import networkx as nx
import onnx_ir as ir

from xform.graph.streams import Reader, Stream, Writer
from xform.graph.values import display_name
from xform.text import shown


def stream_graph(streams: Sequence[Stream]) -> nx.DiGraph:
    """Writers, joins, readers and streams as one directed graph, data flowing along its edges.

    Every graph node has `kind` ("writer", "join", "reader"), `label` (the original name), `stream` (its index) and, for
    writers and readers, `role` ("linear", "constant", "layer_norm", ...). A normalization that reads one stream and
    writes another one joins the two.
    """
    graph = nx.DiGraph()
    for index, stream in enumerate(streams):
        for writer in stream.writers:
            graph.add_node(writer.value, kind="writer", role=writer.kind, label=writer.name, stream=index)
        for join in stream.joins:
            graph.add_node(join, kind="join", role=join.op_type, label=display_name(join), stream=index)
        for reader in stream.readers:
            graph.add_node(_key(reader), kind="reader", role=reader.kind, label=reader.name, stream=index)
        _add_edges(graph, stream)
    return graph


def _key(reader: Reader) -> Any:
    return reader.node if reader.node is not None else ("output", reader.value)


def _add_edges(graph: nx.DiGraph, stream: Stream) -> None:
    writers = {writer.value for writer in stream.writers}

    def source(value: ir.Value | None) -> Any:
        return value if value in writers else value.producer() if value is not None else None

    for node, index in stream.edges:
        if source(node.inputs[index]) in graph:
            graph.add_edge(source(node.inputs[index]), node)
    for reader in stream.readers:
        if source(reader.value) in graph:
            graph.add_edge(source(reader.value), _key(reader))
    for writer in stream.writers:
        producer = writer.value.producer()
        if producer in graph and producer is not None:
            graph.add_edge(producer, writer.value)


def draw(streams: Sequence[Stream]) -> str:
    """Every stream from its first writer to its last reader, one line each, in the order of computation."""
    lines: list[str] = []
    for number, stream in enumerate(streams, 1):
        read = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(r.kind for r in stream.readers).items()))
        lines.append(f"stream {number}: {stream.channels} channels, {stream.additions()} sums, read by {read}")
        place = {node: 2 * index for index, node in enumerate(stream.joins)}
        events = [(_entry(w, stream, place), _writer_line(w)) for w in stream.writers]
        events += [(_exit(r, place), _reader_line(r)) for r in stream.readers]
        lines += [text for _, text in sorted(events, key=lambda event: event[0])]
    return "\n".join(lines) + "\n" if lines else "no residual stream\n"


def _entry(writer: Writer, stream: Stream, place: dict[ir.Node, int]) -> int:
    """When a writer enters the stream: with the first join that takes it."""
    return min((place.get(n, -2) for n, i in stream.edges if n.inputs[i] is writer.value), default=-2)


def _exit(reader: Reader, place: dict[ir.Node, int]) -> int:
    """When a reader has what it reads: after the join that gives it."""
    producer = reader.value.producer()
    return (place.get(producer, -2) if producer is not None else -2) + 1


def _writer_line(writer: Writer) -> str:
    note = f"  ({writer.reason})" if writer.reason else "  (read elsewhere too)" if writer.shared else ""
    return f"  + {writer.kind:10} {shown(writer.name)}{note}"


def _reader_line(reader: Reader) -> str:
    note = f"  ({reader.reason})" if reader.reason else ""
    return f"  > {reader.kind:10} {shown(reader.name)}{note}"


def describe(streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """JSON form of the streams."""
    return [
        {
            "channels": stream.channels,
            "sums": stream.additions(),
            "writers": [
                {"name": w.name, "kind": w.kind, "shared": w.shared, "reason": w.reason} for w in stream.writers
            ],
            "readers": [{"name": r.name, "kind": r.kind, "reason": r.reason} for r in stream.readers],
        }
        for stream in streams
    ]
