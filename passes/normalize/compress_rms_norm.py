"""Compressed RMSNorm: a residual stream without a mean needs one channel fewer (Jiang et al., "Pre-RMSNorm and
Pre-CRMSNorm Transformers", arXiv 2305.14858, section 3.3).

If the d channels of x sum to zero, the last one is minus the sum of the others. With x' the first d - 1:

    mean(x^2) = (sum x'^2 + (sum x')^2) / d
    W x       = (W[:, :-1] - W[:, -1:]) x'

so writers lose their last output, readers take the difference of weights, and the norm becomes

    x' / sqrt((sum x'^2 + (sum x')^2) / d + epsilon)

Rules
1. `compress`: for a stream that only RMSNormalization reads, each of them read by linear maps alone; scales and biases
   of the norms move into those first.
Left alone, with a remark: a stream whose writers have a mean (run `layer_norm_to_rms_norm` before); other readers;
element types other than float32 and float64, where the sums could overflow.

Off by default, as its width is odd: see `profit`. The pass is exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.channel_axis import results
from xform.graph.streams import Stream, Writer
from xform.graph.values import Array, attribute, attributes_of, constant, display_name, is_op, rank_of, shape_of
from xform.passes.normalize.readers import LinearReader, linear_readers
from xform.passes.normalize.stream_cache import StreamCache
from xform.passes.normalize.writers import mapped_constant, read_writer
from xform.patterns import norm as norms
from xform.patterns.norm import Norm
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule

_SPELLED = ("Reshape", "Expand")  # operators that spell the width in a shape
_MEANLESS = 1e-5  # largest mean of weights that are recentred and then rounded to float32, relative to the largest


def dropped(array: Array, axis: int) -> Array:
    """The array without the last entry of `axis`."""
    return np.delete(array, -1, axis=axis)


class Compress(Rule):
    """Rule 1."""

    name = "compress"
    concept = "rms_norm"

    def __init__(self, multiple_of: int) -> None:
        self.multiple_of = multiple_of
        self._cache = StreamCache()

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "RMSNormalization")})

    def reach(self) -> int:
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        stream = self._cache.at(node)
        if stream is None:
            yield Failure("it does not run over exactly the last axis", (node,))
            return
        if node is not next(r.node for r in stream.readers if r.kind == "rms_norm"):
            return
        found = self._cache.refusal(stream) or _readers(stream) or _obstacle(stream)
        if isinstance(found, Failure):
            yield self._cache.refuse(stream, found)
            return
        pairs = [(n, linear_readers(n.output, (rank_of(n.output) or 1) - 1, n.channels)) for n in _norms(stream)]
        readers = [(n, r) for n, found_readers in pairs if isinstance(found_readers, list) for r in found_readers]
        involved = [*stream.joins, *(n for w in stream.writers for n in w.nodes), *stream.norms("rms_norm")]
        nodes: dict[Hashable, ir.Node] = dict(enumerate([*involved, *(n for _, r in readers for n in r.nodes)]))
        roots = tuple(reader.root for _, reader in readers)
        yield Match(nodes=nodes, roots=roots, data={"stream": stream, "readers": readers})

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """It saves one part in d of the products. It costs a norm of eight operators in place of one, and a width of
        d - 1, which matrix units that work on multiples of `multiple_of` pad up again. On ONNX Runtime's CPU kernels
        the odd width costs nothing, but the norm does: whole models take 1.02 times as long (docs/normalization.md).
        So it fires only where `multiple_of` divides d - 1.
        """
        width = match.data["stream"].channels - 1
        if width % self.multiple_of == 0:
            return None
        return Failure(
            f"{width} channels are no multiple of {self.multiple_of}, so kernels take as long as for {width + 1}",
            tuple(match.data["stream"].norms("rms_norm")[:1]),
        )

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        stream: Stream = match.data["stream"]
        self._cache.changed()
        narrow = _narrow_stream(stream, build)
        normed: dict[ir.Node, ir.Value] = {}
        values = []
        for norm, reader in match.data["readers"]:
            if norm.node not in normed:
                x = norm.node.inputs[0]
                assert x is not None
                normed[norm.node] = _compressed_norm(build, narrow[x], norm.node, stream.channels)
            values.append(_read(build, norm, reader, normed[norm.node], stream.channels))
        return values


def _norms(stream: Stream) -> list[Norm]:
    found = [norms.read(node) for node in stream.norms("rms_norm")]
    return [norm for norm in found if not isinstance(norm, str)]


def _readers(stream: Stream) -> Failure | None:
    """Why the readers do not allow it."""
    for reader in stream.readers:
        if reader.kind != "rms_norm" or reader.node is None:
            nodes = (reader.node,) if reader.node is not None else ()
            return Failure(f"{reader.name} reads the stream and is no RMSNormalization", nodes)
        norm = norms.read(reader.node)
        if isinstance(norm, str):
            return Failure(norm, (reader.node,))
        if reader.value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return Failure("its sums of squares could overflow", (reader.node,))
        found = linear_readers(norm.output, (rank_of(norm.output) or 1) - 1, norm.channels)
        if isinstance(found, Failure):
            return found
        for one in found:
            if (failure := next((f for n in one.path if (f := _unspelled(n))), None)) is not None:
                return failure
            if one.linear.shift_is_uniform() is not None or not is_op(one.linear.node, "MatMul", "Gemm"):
                return Failure(f"{display_name(one.linear.node)} is no matrix product", (one.linear.node,))
    return None


def _obstacle(stream: Stream) -> Failure | None:
    """Why the writers, or what is between them, do not allow it."""
    for writer in stream.writers:
        reason = _has_mean(writer, stream.channels)
        if reason is not None:
            producer = writer.value.producer()
            return Failure(f"{writer.name} {reason}", (producer,) if producer is not None else ())
    return next((failure for node in stream.joins if (failure := _unspelled(node)) is not None), None)


def _unspelled(node: ir.Node) -> Failure | None:
    if is_op(node, *_SPELLED) and not isinstance((shape_of(node.inputs[1]) or (None,))[0], int):
        return Failure(f"{display_name(node)} has a target shape of unknown length", (node,))
    return None


def _has_mean(writer: Writer, channels: int) -> str | None:
    """Why what is written may have a mean, or cannot be narrowed; None if it is recentred."""
    if writer.kind == "other":
        return None if _is_recentred(writer) else "is not linear and may have a mean"
    if writer.kind == "constant":
        array = constant(writer.value)
        return None if array is not None and _meanless(array.astype(np.float64), writer.axis) else "has a mean"
    if writer.shared:
        return "is read outside the stream as well"
    found = read_writer(writer, channels)
    if isinstance(found, str):
        return f"cannot be narrowed: {found}"
    means = []

    def note(array: Array, axis: int) -> Array:
        means.append(_meanless(array, axis))
        return array

    found.mapped(note)
    failure = next((f for n in writer.nodes[:-1] if (f := _unspelled(n)) is not None), None)
    return failure.reason if failure else None if all(means) else "writes a mean"


def _meanless(array: Array, axis: int) -> bool:
    return bool(np.abs(array.mean(axis=axis)).max(initial=0) <= _MEANLESS * max(np.abs(array).max(initial=0), 1e-30))


def _is_recentred(writer: Writer) -> bool:
    """u - mean(u) over the channels."""
    node = writer.value.producer()
    mean = node.inputs[1].producer() if is_op(node, "Sub") and node is not None and node.inputs[1] is not None else None
    if mean is None or node is None or not is_op(mean, "ReduceMean") or mean.inputs[0] is not node.inputs[0]:
        return False
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return (
        axes is not None and axes.size == 1 and int(axes.reshape(-1)[0]) % (rank_of(writer.value) or 1) == writer.axis
    )


def _narrow_stream(stream: Stream, build: Builder) -> dict[ir.Value, ir.Value]:
    """Every value of the stream without its last channel."""
    narrow: dict[ir.Value, ir.Value] = {}
    for writer in stream.writers:
        narrow[writer.value] = _narrow_writer(writer, stream.channels, build)
    pending = list(stream.joins)
    while pending:
        waiting = []
        for node in pending:
            inner = [v for i, v in enumerate(node.inputs) if (node, i) in stream.edges and v is not None]
            if any(v not in narrow for v in inner):
                waiting.append(node)
                continue
            axis = next(stream.axes[o] for o in node.outputs if o in stream.axes)
            inputs = [narrow.get(v, v) if v is not None else None for v in node.inputs]
            outputs = _respelled(build, node, inputs, axis, stream.channels)
            narrow.update(zip(node.outputs, outputs, strict=True))
        assert len(waiting) < len(pending), "a stream without a beginning"
        pending = waiting
    return narrow


def _narrow_writer(writer: Writer, channels: int, build: Builder) -> ir.Value:
    if writer.kind == "constant":
        return build.constant(mapped_constant(writer, dropped), f"{writer.value.name}_narrow")
    if writer.kind == "other":
        return build.op("Slice", writer.value, [0], [channels - 1], [writer.axis])
    found = read_writer(writer, channels)
    assert not isinstance(found, str)
    operand = found.linear.node.inputs[0]
    assert operand is not None
    value = found.linear.build(build, operand, *found.mapped(dropped))
    axis = found.linear.output_axis()
    assert axis is not None
    return _along(build, found.views, value, axis, channels)


def _respelled(
    build: Builder, node: ir.Node, inputs: Sequence[ir.Value | None], axis: int, channels: int
) -> Sequence[ir.Value]:
    """A node over narrower operands; a shape that spells the width, at `axis` of the result, spells the new one."""
    attributes = attributes_of(node)
    given: list[ir.Value | Array | None] = list(inputs)
    if is_op(node, *_SPELLED):
        given[1] = _narrow_shape(build, node, axis, channels)
    return build.ops(node.op_type, given, len(node.outputs), domain=node.domain, **attributes)


def _narrow_shape(build: Builder, node: ir.Node, axis: int, channels: int) -> ir.Value | Array:
    """The target shape with the new width at `axis` of the result, whatever stood there: the width, 0 or -1."""
    target, rank = node.inputs[1], rank_of(node.outputs[0])
    length = (shape_of(target) or (None,))[0]
    assert target is not None and rank is not None and isinstance(length, int)
    place = axis - rank
    if -place > length:  # Expand leaves out leading sizes
        return target
    known = constant(target)
    if known is not None:
        shape: Array = known.copy()
        shape[place] = channels - 1
        return shape
    there = np.arange(-length, 0) == place
    return build.op("Where", there, np.asarray(channels - 1, np.int64), target)


def _along(build: Builder, path: Sequence[ir.Node], value: ir.Value, axis: int, channels: int) -> ir.Value:
    """Single-operand nodes again, over a narrower `value` whose channels are at `axis`."""
    for node in path:
        onward = results(node, 0, axis)
        assert not isinstance(onward, str)
        axis = onward[0]
        value = _respelled(build, node, [value, *node.inputs[1:]], axis, channels)[0]
    return value


def _compressed_norm(build: Builder, x: ir.Value, norm: ir.Node, channels: int) -> ir.Value:
    epsilon = float(attribute(norm, "epsilon", 1e-5))
    squares = build.op("ReduceSumSquare", x, [-1], keepdims=1)
    total = build.op("ReduceSum", x, [-1], keepdims=1)
    mean = build.op("Mul", build.op("Add", squares, build.op("Mul", total, total)), 1 / channels)
    return build.op("Div", x, build.op("Sqrt", build.op("Add", mean, epsilon)))


def _read(build: Builder, norm: Norm, reader: LinearReader, y: ir.Value, channels: int) -> ir.Value:
    value = _along(build, reader.path, y, (rank_of(norm.output) or 1) - 1, channels)
    weight, bias = reader.linear.scale_input(norm.scale, norm.bias)
    axis = 1 if is_op(reader.linear.node, "Gemm") and attribute(reader.linear.node, "transB", 0) else 0
    last = np.take(weight, [-1], axis=axis)
    return reader.linear.build(build, value, dropped(weight, axis) - last, bias)


@dataclass(frozen=True)
class CompressRMSNorm(RewritePass):
    """Residual streams without a mean, narrower by one channel.

    Attributes:
        multiple_of: Fire where this divides the new width; 1 for always.
    """

    name: ClassVar[str] = "compress_rms_norm"
    multiple_of: int = 8

    def rules(self) -> Sequence[Rule]:
        return (Compress(self.multiple_of),)
