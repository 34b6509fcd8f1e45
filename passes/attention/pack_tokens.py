"""Padding-free execution: tokens are packed once, and only attention sees sequences.

With a key-padding mask M [B, S] the tokens that are none still cost as much as the others. Let rows be the positions of
the T valid tokens in the flattened batch. A token-wise operator f (a product with a constant weight, a bias, an
activation, a norm, a residual sum) satisfies f(x)[rows] = f(x[rows]), so the whole chain runs on [T, C]. Before an
attention, queries, keys and values return to [B, S, C]: position p reads packed row inverse(p), and a position without
token reads row 0, whose weight the mask makes zero. After it the rows are packed again.

    flat = M != 0, [B * S]         rows = NonZero(flat)         inverse = Where(flat, CumSum(flat) - 1, 0) as [B, S]
    pack(x) = Gather(Reshape(x, [-1, C]), rows)                  unpack(p) = Gather(p, inverse)

Position 0 of the batch always counts as valid, so that [T, C] is never empty. Where the first token of every sequence
is read, all first positions do, and all positions of a sequence without tokens: a sequence that is padded on the left
begins with a pad, which attends to its tokens, and the queries of an empty one may attend to all of its pads.

Sources: Zhai et al. 2023, "ByteTransformer" (arXiv 2210.03052), zero padding algorithm; Portes et al. 2023,
"MosaicBERT" (arXiv 2312.17482), unpadding.

Rules
1. Legal: all masks are computed from one input [B, S]; what reads unpacked rows ignores those without token: attention
   (by its mask, which is looked at for masks of all kinds, `xform.passes.attention.probe`), packing, the first token of
   a sequence, shapes, and `Where(condition from M alone, rows, constant)`, which `xform.pipeline.padding` puts before
   the outputs. Otherwise nothing is changed, and the remark names the reader.
2. Exact on valid rows. Pads are whatever that `Where` puts there: zeros.
3. Profitable: if at least one product is packed. What it wins grows with the share of pads; with none it costs two
   copies of the rows per attention, where a backend has no form of attention for packed tokens (ONNX Runtime has).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from xform.graph.values import Array, attributes_of, constant, display_name, is_op, rank_of, shape_of
from xform.passes.attention.padding import (
    Padding,
    axis_after,
    computed_from_mask_alone,
    find_padding,
    holds_tokens,
    is_layout,
    is_token_wise,
)
from xform.passes.attention.probe import Probe, closes_pads, hides, probes
from xform.rewrite.builder import Builder
from xform.rewrite.passes import Pass, PassContext

_CONCEPT = "padding"


@dataclass(frozen=True)
class PackTokens(Pass):
    """Run token-wise operators on valid tokens only."""

    name: ClassVar[str] = "pack_tokens"

    def run(self, model: ir.Model, context: PassContext) -> bool:
        padding = find_padding(model)
        if isinstance(padding, str):
            context.remark(self.name, "pack", "missed", (), padding, _CONCEPT)
            return False
        packed = _packed_nodes(model, padding)
        if not any(is_op(node, "MatMul") for node in packed):
            context.remark(self.name, "pack", "missed", (), "no product is computed token by token", _CONCEPT)
            return False
        if any(is_op(node, "GatherND", "Gather") and _is_packing(node) for node in model.graph):
            return False
        kinds = probes(padding)
        reads_first, offender = False, _offender(packed, padding, kinds, reads_first=False)
        if offender is not None:
            reads_first, offender = True, _offender(packed, padding, kinds, reads_first=True)
        if offender is not None:
            reason = f"{offender.op_type} reads rows of pads too, which would hold something else"
            context.remark(self.name, "pack", "missed", (display_name(offender),), reason, _CONCEPT)
            return False
        _Rewrite(model, padding, self.name, reads_first).run(packed)
        names = [display_name(node) for node in packed]
        context.remark(self.name, "pack", "applied", names, f"{len(packed)} operators run on packed tokens", _CONCEPT)
        return True


def _offender(
    packed: Sequence[ir.Node], padding: Padding, kinds: Sequence[Probe], *, reads_first: bool
) -> ir.Node | None:
    """A node that would see what stands in the rows of pads under one of the probes."""
    for probe in kinds:
        computed = probe.tokens
        if reads_first:
            empty = ~probe.tokens.any(axis=1, keepdims=True)
            computed = computed | empty | (np.arange(computed.shape[1]) == 0)
        found = _Readers(packed, padding, probe, computed, reads_first).offender()
        if found is not None:
            return found
    return None


def _packed_nodes(model: ir.Model, padding: Padding) -> list[ir.Node]:
    """Token-wise nodes from the first product on."""
    packed: list[ir.Node] = []
    values: set[ir.Value] = set()
    for node in model.graph:
        if is_op(node, "Where") and computed_from_mask_alone(node.inputs[0], padding):
            continue  # what gives pads their value stays outside
        starts = is_op(node, "MatMul") or any(v in values for v in node.inputs)
        if starts and is_token_wise(node, padding):
            packed.append(node)
            values.add(node.outputs[0])
    return packed


def _is_packing(node: ir.Node) -> bool:
    return node.metadata_props.get("xform.pass") == PackTokens.name


@dataclass(frozen=True)
class _Readers:
    """What reads the rows of packed operators.

    Attributes:
        computed: [B, S] of the probe's masks, true for positions whose rows are computed.
        reads_first: Whether the first position of every sequence is among them, so that it may be read.
    """

    packed: Sequence[ir.Node]
    padding: Padding
    probe: Probe
    computed: Array
    reads_first: bool = False

    def offender(self) -> ir.Node | None:
        """A node that would see what stands in the rows of pads; a graph output that would, as its producer."""
        inside = set(self.packed)
        waiting: list[tuple[ir.Value, int | None]] = [(node.outputs[0], 1) for node in self.packed]
        seen: set[tuple[ir.Value, int | None]] = set()
        while waiting:
            value, axis = waiting.pop()  # and which of its axes are the tokens, None where that is not followed
            if (value, axis) in seen:
                continue
            seen.add((value, axis))
            producer = value.producer()
            if value.is_graph_output() and producer is not None:
                return producer
            for reader, index in value.uses():
                if reader in inside or self._ignores_pads(reader, index, axis):
                    continue
                if reader.graph is not self.padding.attentions[0].graph:
                    return reader
                if is_layout(reader) and index == 0:
                    waiting += [(output, axis_after(reader, axis)) for output in reader.outputs]
                elif reader in self.padding.attentions and index < 3 and self._attends(reader, index, axis):
                    if index == 0:
                        waiting.append((reader.outputs[0], axis))
                else:
                    return reader
        return None

    def _attends(self, attention: ir.Node, index: int, axis: int | None) -> bool:
        """Whether an attention sees no pads in its keys and values, for all queries whose results may be read."""
        if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
            return False  # keys and values as a cache, or the logits, of pads too
        if index == 0:
            return True  # a query only makes the row that it stands for
        mask, query = attention.inputs[3], attention.inputs[0]
        rank = rank_of(attention.inputs[index])
        if mask is None or query is None or rank is None or axis != rank - 2:  # [B, H, S, D] or [B, S, H * D]
            return False
        return closes_pads(mask, self.probe, self.computed, for_all=not self._is_unpacked(query))

    def _is_unpacked(self, value: ir.Value) -> bool:
        """Whether queries are rows of a packed operator, pads among them, which nobody reads then."""
        node: ir.Node | None = value.producer()
        at: ir.Value | None = value
        while node is not None and node not in self.packed and is_layout(node):
            at = node.inputs[0]
            node = at.producer() if at is not None else None
        shape = shape_of(value)
        return node in self.packed and shape is not None and shape[-2] == self.padding.dims[1]

    def _ignores_pads(self, reader: ir.Node, index: int, axis: int | None) -> bool:
        if is_op(reader, "Shape", "Size"):
            return True
        if is_op(reader, "Where"):
            condition = reader.inputs[0]
            from_mask = condition is not None and computed_from_mask_alone(condition, self.padding)
            return (
                index == 1 and from_mask and condition is not None and hides(condition, self.probe, self.computed, axis)
            )
        if axis is None or index != 0 or not self.reads_first:
            return False
        if is_op(reader, "Gather"):
            which = constant(reader.inputs[1], max_elements=1)
            along = reader.attributes.get_int("axis", 0)
            return along == axis and which is not None and which.size == 1 and int(which.reshape(())) == 0
        if is_op(reader, "Slice"):
            parameters = [constant(v, max_elements=1) for v in reader.inputs[1:4]]
            return [None if p is None else p.tolist() for p in parameters] == [[0], [1], [axis]]
        return False


@dataclass
class _Rewrite:
    """One run of the pass."""

    model: ir.Model
    padding: Padding
    name: str
    reads_first: bool
    rows: dict[ir.Value, ir.Value] = field(default_factory=dict)  # [B, S, C] to [T, C]
    unpacked: dict[ir.Value, ir.Value] = field(default_factory=dict)
    counter: int = 0

    def run(self, packed: Sequence[ir.Node]) -> None:
        graph = self.model.graph
        first = next(iter(graph))
        self.valid, self.inverse = self._positions(first)
        inside = set(packed)
        for node in list(graph):
            if node in inside:
                self._pack(node)
            elif not _is_packing(node):
                for index, value in enumerate(node.inputs):
                    if value is not None and value in self.rows and value.producer() in inside:
                        node.replace_input_with(index, self._unpack(node, value))
        for node in reversed(list(packed)):
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)
        common_passes.RemoveUnusedNodesPass()(self.model)
        graph.sort()

    def _build(self, anchor: ir.Node, origin: str) -> Builder:
        return Builder(self.model.graph.opset_imports, self._unique, origin, self.name, "pack")

    def _unique(self, base: str) -> str:
        self.counter += 1
        return f"{base}_packed_{self.counter}"

    def _insert(self, anchor: ir.Node, build: Builder) -> None:
        for value in build.initializers:
            self.model.graph.register_initializer(value)
        self.model.graph.insert_before(anchor, build.nodes)

    def _positions(self, anchor: ir.Node) -> tuple[ir.Value, ir.Value]:
        build = self._build(anchor, self.padding.mask.name or "mask")
        given = self.padding.mask
        mask = given if given.dtype is ir.DataType.BOOL else build.op("Cast", given, to=int(ir.DataType.BOOL))
        if self.reads_first:
            length = build.op("Squeeze", build.op("Shape", given, start=1, end=2), [0])
            zero, one = build.constant(np.array(0)), build.constant(np.array(1))
            first = build.op("Equal", build.op("Range", zero, length, one), zero)
            most = build.op("ReduceMax", build.op("Cast", mask, to=int(ir.DataType.INT32)), [1], keepdims=1)
            empty = build.op("Equal", most, build.constant(np.array(0, np.int32)))
            flat = build.op("Reshape", build.op("Or", build.op("Or", mask, first), empty), [-1])
        else:
            flat = build.op("Reshape", mask, [-1])
            start = build.op("Or", build.op("Slice", flat, [0], [1], [0]), build.constant(np.array(True)))
            rest = build.op("Slice", flat, [1], [np.iinfo(np.int64).max], [0])
            flat = build.op("Concat", start, rest, axis=0)
        rows = build.op("Reshape", build.op("NonZero", flat), [-1])
        count = build.op("CumSum", build.op("Cast", flat, to=int(ir.DataType.INT64)), build.constant(np.array(0)))
        order = build.op("Sub", count, build.constant(np.array(1)))
        inverse = build.op("Where", flat, order, build.constant(np.array(0)))
        # not a Reshape: for masks of no tokens it would need allowzero, which is not there below opset 14
        inverse = build.op("Gather", inverse, self._grid(build, given), axis=0)
        inverse.shape = ir.Shape(self.padding.dims)
        self._insert(anchor, build)
        return rows, inverse

    def _grid(self, build: Builder, mask: ir.Value) -> ir.Value:
        """[B, S] of the numbers from 0 to B * S."""
        zero, one = build.constant(np.array(0)), build.constant(np.array(1))
        sizes = [build.op("Squeeze", build.op("Shape", mask, start=i, end=i + 1), [0]) for i in range(2)]
        row, column = (build.op("Range", zero, size, one) for size in sizes)
        return build.op("Add", build.op("Unsqueeze", build.op("Mul", row, sizes[1]), [1]), column)

    def _pack(self, node: ir.Node) -> None:
        build = self._build(node, display_name(node))
        inputs: list[Any] = []
        for value in node.inputs:
            if value is None or not holds_tokens(value, self.padding):
                inputs.append(self._per_channel(build, value))
                continue
            if value not in self.rows:
                shape = shape_of(value)
                assert shape is not None
                flat = build.op("Reshape", value, [-1, int(str(shape[2]))])
                self.rows[value] = build.op("Gather", flat, self.valid, axis=0)
            inputs.append(self.rows[value])
        attributes = attributes_of(node)
        if is_op(node, "LayerNormalization", "RMSNormalization"):
            attributes["axis"] = -1
        self.rows[node.outputs[0]] = build.op(node.op_type, *inputs, domain=node.domain, **attributes)
        self._insert(node, build)

    def _per_channel(self, build: Builder, value: ir.Value | None) -> Any:
        """A constant for all tokens, with no more than two axes."""
        if value is None or value.shape is None or len(value.shape) < 3:
            return value
        array = constant(value)
        assert array is not None
        return build.constant(array.reshape(array.shape[-1]), value.name or "constant")

    def _unpack(self, anchor: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self.unpacked:
            build = self._build(anchor, display_name(anchor))
            result = build.op("Gather", self.rows[value], self.inverse, axis=0)
            result.shape, result.type = value.shape, value.type
            self.unpacked[value] = result
            self._insert(anchor, build)
        return self.unpacked[value]
