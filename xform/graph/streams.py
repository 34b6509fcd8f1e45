"""Residual streams: maximal sets of values that hold one vector of channels, and who writes to and reads from them.

A stream is what the operand of a normalization over channels is made of. Going up from the operand, through everything
that treats all channels alike (`xform.graph.channel_axis`: sums, views, the class token's Concat, position embeddings,
slices, pooling over positions), one meets the *writers*: linear maps, constants, and everything else. Going down from
every value that was met, one meets the *readers*: normalizations over exactly these channels, which do not see a number
that is added to all channels (LayerNormalization) or do (RMSNormalization), and everything else, which does.

Two normalizations whose operands share a value, or a writer, read one stream. Encoder and decoder, or the stages of a
hierarchical network, have streams of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx
import onnx_ir as ir

from xform.graph.channel_axis import VIEWS, linear_axis, operands, results
from xform.graph.norms import NORMS, normalized_axis
from xform.graph.values import (
    attribute,
    constant_tensor,
    display_name,
    is_constant,
    is_op,
    rank_of,
    shape_of,
    used_once,
)

WriterKind = Literal["linear", "constant", "other"]
ReaderKind = Literal["layer_norm", "rms_norm", "other"]
_KINDS: dict[str, ReaderKind] = {"LayerNormalization": "layer_norm", "RMSNormalization": "rms_norm"}
Edge = tuple[ir.Node, int]  # a node and the index of one of its inputs
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True)
class Writer:
    """A value that the stream is made of, and that is not itself a sum or a view of such values.

    Attributes:
        value: What is written.
        axis: Its channel axis.
        kind: "linear" (a linear map with constant weight, and per-channel arithmetic after it), "constant" or "other".
        nodes: For "linear": from the producer of `value` down to the linear map.
        shared: Whether something outside the stream reads `value` as well.
        reason: For "other": what it is.
    """

    value: ir.Value
    axis: int
    kind: WriterKind
    nodes: tuple[ir.Node, ...] = ()
    shared: bool = False
    reason: str = ""

    @property
    def name(self) -> str:
        """What a user knows it by."""
        producer = self.value.producer()
        return display_name(producer) if producer is not None else str(self.value.name)


@dataclass(frozen=True)
class Reader:
    """Who reads a value of the stream, other than the sums and views that are part of it.

    Attributes:
        value: What is read.
        node: The reader; None if `value` is an output of the graph.
        kind: "layer_norm", "rms_norm" or "other".
        reason: For "other": why it belongs neither to the stream nor to the normalizations.
    """

    value: ir.Value
    node: ir.Node | None
    kind: ReaderKind
    reason: str = ""

    @property
    def name(self) -> str:
        """What a user knows it by."""
        return display_name(self.node) if self.node is not None else f"output {self.value.name}"


@dataclass(frozen=True)
class Stream:
    """One residual stream.

    Attributes:
        channels: Its width.
        axes: Every value of the stream, writers included -> its channel axis.
        joins: The sums, views and so on that connect them, in graph order.
        edges: Inputs of joins and normalizations through which the stream flows.
        writers, readers: See there.
    """

    channels: int
    axes: dict[ir.Value, int]
    joins: tuple[ir.Node, ...]
    edges: frozenset[Edge]
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]

    def norms(self, kind: ReaderKind = "layer_norm") -> list[ir.Node]:
        """The normalizations that read the stream."""
        return [r.node for r in self.readers if r.kind == kind and r.node is not None]

    def additions(self) -> int:
        """How many sums it has."""
        return sum(is_op(node, "Add", "Sub", "Sum") for node in self.joins)


def find_streams(graph: ir.Graph) -> list[Stream]:
    """The streams of one graph (not of its subgraphs), in the order of their first normalization."""
    return _Search(graph).streams()


_Place = tuple[ir.Value, int]  # a value and its channel axis


class _Search:
    """One walk over a graph: up from every normalization, then down from what was met."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.links = nx.utils.UnionFind()  # places that belong to one stream
        self.seeds: list[tuple[ir.Node, _Place]] = []
        self.writers: dict[_Place, Writer] = {}
        self.joins: dict[_Place, ir.Node] = {}
        self.constants: dict[_Place, list[Writer]] = defaultdict(list)  # that a join reads
        self.inflow: dict[_Place, set[Edge]] = defaultdict(set)  # inputs that a place is made of
        self.order = {node: number for number, node in enumerate(graph)}

    def streams(self) -> list[Stream]:
        for node in self.graph:
            axis = normalized_axis(node)
            if axis is not None and node.inputs[0] is not None:
                place = (node.inputs[0], axis)
                self.seeds.append((node, place))
                self._climb(place)
        groups: dict[_Place, list[_Place]] = defaultdict(list)
        for place in [*self.joins, *self.writers]:
            groups[self.links[place]].append(place)
        found: dict[_Place, None] = dict.fromkeys(self.links[place] for _, place in self.seeds)
        return [self._stream(groups[root]) for root in found]

    def _climb(self, start: _Place) -> None:
        stack = [start]
        while stack:
            place = stack.pop()
            if place in self.joins or place in self.writers:
                continue
            value, axis = place
            carried = self._operands(value, axis)
            chain = _linear_chain(value, axis)
            if chain or isinstance(carried, str) or _is_shifted_norm(value, axis):
                self.writers[place] = _writer(value, axis, chain, carried if isinstance(carried, str) else "")
                self.links[place]
                continue
            node = value.producer()
            assert node is not None
            self.joins[place] = node
            for index, inner in carried.items():
                operand = node.inputs[index]
                assert operand is not None
                self.inflow[place].add((node, index))
                if is_constant(operand):  # streams that read one constant are not one stream: each gets a copy
                    self.constants[place].append(Writer(operand, inner, "constant"))
                else:
                    self.links.union(place, (operand, inner))
                    stack.append((operand, inner))

    def _operands(self, value: ir.Value, axis: int) -> dict[int, int] | str:
        node = value.producer()
        if node is None:
            return "is an input of the graph"
        if node.graph is not self.graph:
            return "comes from outside the subgraph"
        found = operands(node, axis, value.index() or 0)
        return found if isinstance(found, str) else dict(found)

    def _stream(self, places: list[_Place]) -> Stream:
        members = set(places)
        joins = sorted({self.joins[p] for p in places if p in self.joins}, key=lambda n: self.order[n])
        norms = [(node, place) for node, place in self.seeds if place in members]
        edges = frozenset([*(e for p in places for e in self.inflow[p]), *((node, 0) for node, _ in norms)])
        constants = {(w.value, w.axis): w for p in places for w in self.constants[p]}
        writers = [_with_shared(self.writers[p], edges) for p in places if p in self.writers]
        writers += [w for place, w in constants.items() if place not in self.writers]
        readers = [Reader(place[0], node, _KINDS[node.op_type]) for node, place in norms]
        readers += self._outside(places, edges)
        width = (shape_of(places[0][0]) or ())[places[0][1]]
        assert isinstance(width, int)
        return Stream(width, dict([*constants, *places]), tuple(joins), edges, tuple(writers), tuple(readers))

    def _outside(self, places: list[_Place], edges: frozenset[Edge]) -> Iterator[Reader]:
        """Readers that are neither joins nor normalizations, looked for through views that lead to no normalization."""
        stack = [p for p in places if p in self.joins]
        seen = set(stack)
        while stack:
            value, axis = stack.pop()
            if value.is_graph_output():
                yield Reader(value, None, "other", "it is an output of the graph")
            for node, index in value.uses():
                if (node, index) in edges or is_op(node, "Shape", "Size"):
                    continue
                onward = results(node, index, axis) if node.graph is self.graph else "it is inside a subgraph"
                if isinstance(onward, str):
                    yield Reader(value, node, "other", onward)
                    continue
                fresh = [(node.outputs[i], a) for i, a in onward.items() if (node.outputs[i], a) not in seen]
                seen.update(fresh)
                stack += fresh


def _writer(value: ir.Value, axis: int, chain: tuple[ir.Node, ...], reason: str) -> Writer:
    if chain:
        return Writer(value, axis, "linear", chain)
    if is_constant(value):
        return Writer(value, axis, "constant")
    node = value.producer()
    if is_op(node, *NORMS) or _is_shifted_norm(value, axis):
        reason = "is the result of another normalization, as in post-norm networks"
    elif is_op(node, "Conv", "ConvTranspose"):
        reason = "is a convolution in groups, which mixing all of its channels would undo"
    return Writer(value, axis, "other", reason=reason)


def _with_shared(writer: Writer, edges: frozenset[Edge]) -> Writer:
    if writer.kind == "constant":
        return writer
    shared = writer.value.is_graph_output() or any((n, i) not in edges for n, i in writer.value.uses())
    return replace(writer, shared=shared)


def _linear_chain(value: ir.Value, axis: int) -> tuple[ir.Node, ...]:
    """The nodes from the producer of `value` down to a linear map whose output channels are those of `value`.

    Between the two may stand views and arithmetic with one constant per channel, read by nothing else.
    """
    nodes: list[ir.Node] = []
    current: ir.Value | None = value
    while current is not None and (node := current.producer()) is not None:
        if nodes and not used_once(current):
            return ()
        nodes.append(node)
        found = linear_axis(node)
        if found is not None:
            return tuple(nodes) if found == axis and int(attribute(node, "group", 1)) == 1 else ()
        if is_op(node, *VIEWS, "Transpose"):
            inner = operands(node, axis)
            if isinstance(inner, str):
                return ()
            current, axis = node.inputs[0], inner[0]
        else:
            index = _varying_operand(node, axis)
            if index is None:
                return ()
            axis = axis - (rank_of(node.outputs[0]) or 0) + (rank_of(node.inputs[index]) or 0)
            current = node.inputs[index]
    return ()


def _is_shifted_norm(value: ir.Value, axis: int) -> bool:
    """Whether `value` is a normalization and a constant per channel: its own bias, written as an Add."""
    node = value.producer()
    index = _varying_operand(node, axis) if is_op(node, "Add") and node is not None else None
    inner = node.inputs[index] if node is not None and index is not None else None
    return inner is not None and is_op(inner.producer(), *NORMS) and used_once(inner)


def _varying_operand(node: ir.Node, axis: int) -> int | None:
    """Which operand of per-channel arithmetic is not the constant; None if `node` is something else."""
    if not is_op(node, *_ARITHMETIC) or len(node.inputs) != 2:
        return None
    rank = rank_of(node.outputs[0])
    for index in (0, 1) if not is_op(node, "Div") else (0,):
        tensor = constant_tensor(node.inputs[1 - index])
        if tensor is None or rank is None or rank_of(node.inputs[index]) != rank:
            continue
        shape = [1] * (rank - len(tensor.shape)) + list(tensor.shape.numpy())
        if len(shape) == rank and all(size == 1 for i, size in enumerate(shape) if i != axis):
            return index
    return None
