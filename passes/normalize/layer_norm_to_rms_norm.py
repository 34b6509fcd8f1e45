"""LayerNorm to RMSNorm over a residual stream without a mean (Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm
Transformers", arXiv 2305.14858, sections 3.1 and 3.2).

A pre-norm network reads its residual stream through LayerNormalization alone, which does not see the mean over
channels. So nothing needs to write a mean. With P = I - 1 1^T / d, d the width:

    LN(x; g, b) = LN(P x; g, b) = RMS(P x; g) + b         since P x has mean zero; the same epsilon
    P (W x + c) = (P W) x + P c,    P (x + y) = P x + P y  and P commutes with everything that treats channels alike

so every linear writer and every constant of the stream is recentred, in float64, and every LayerNormalization that
reads it becomes RMSNormalization, followed by an Add where it has a bias that is not zero.

Rules
1. `stream`: all of this for one stream (`xform.graph.streams`), at once. A constant that something else reads as well
   (an embedding tied to the head) gets a copy of its own. Arithmetic with one constant per channel between a linear map
   and the stream (layer scale) is folded into the map.
2. A writer that is not linear (a GELU, a gate, a graph input, a normalization), or is read outside the stream too, is
   recentred explicitly: x - mean(x).
Left alone, with a remark that names the node: a stream that something other than LayerNormalization reads (it would
see that the mean is gone): an output of the graph, a pooled head, a convolution, the joining of several tokens'
channels (patch merging: the differences of their means count); a stream where rule 2 would cost more than it saves
(post-norm networks, a gate in every block); normalization over other axes than the last.

Preconditions: linear weights are constant and in floating point; grouped convolutions are not recentred, since the
result would have no groups. The pass is exact: only rounding differs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.norms import normalized_axis
from xform.graph.streams import Stream, Writer
from xform.graph.values import ORIGIN, attribute, attributes_of, constant, display_name, is_constant
from xform.passes.normalize.stream_cache import StreamCache
from xform.passes.normalize.writers import mapped_constant, read_writer, recentred, unwritable
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule

PASS_NAME = "layer_norm_to_rms_norm"
RECENTRING_COST = 2.0
# Kinds of target on which whole models were measured to gain more than the weights' rewriting is worth: none yet. On
# "cpu" a norm takes half the time, which is about one percent of a model (docs/normalization.md).
FASTER_ON: frozenset[str] = frozenset()
_MAX_NAMED = 3


class ConvertStream(Rule):
    """Rules 1 and 2."""

    name = "stream"
    concept = "layer_norm"

    def __init__(self, only_where_faster: bool) -> None:
        self.only_where_faster = only_where_faster
        self._cache = StreamCache()

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "LayerNormalization")})

    def reach(self) -> int:
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        stream = self._cache.at(node) if normalized_axis(node) is not None else None
        if stream is None:
            yield Failure("it does not run over exactly the last axis, or its mean is read", (node,))
            return
        if node is not next(r.node for r in stream.readers if r.kind == "layer_norm"):
            return  # the first one stands for all of them
        failure = self._cache.refusal(stream) or _refusal(stream)
        if failure is not None:
            yield self._cache.refuse(stream, failure)
            return
        norms = stream.norms()
        replaced = {w.value for w in stream.writers if not _in_place(w)}
        rebuilt = [
            j for j in stream.joins if any(v in replaced and (j, i) in stream.edges for i, v in enumerate(j.inputs))
        ]
        linear = [w for w in stream.writers if _in_place(w)]
        roots = [w.value for w in linear] + [o for j in rebuilt for o in j.outputs] + [n.outputs[0] for n in norms]
        nodes: dict[Hashable, ir.Node] = dict(enumerate([*norms, *(n for w in linear for n in w.nodes), *rebuilt]))
        data = {"stream": stream, "linear": linear, "rebuilt": rebuilt}
        yield Match(nodes=nodes, roots=tuple(roots), data=data)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        stream: Stream = match.data["stream"]
        for writer in stream.writers:
            reason = unwritable(writer, stream.channels, recentred) if _in_place(writer) else None
            if reason is not None:
                return self._cache.refuse(stream, Failure(reason, writer.nodes[-1:]))
        match.data["context"] = context
        return None

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """RMSNormalization saves one reduction and one subtraction over [..., d]. An explicit recentring costs as much
        again, in kernels of its own: it counts as `RECENTRING_COST` = 2 normalizations. Recentred weights cost nothing.
        With `only_where_faster`, the target must be one of `FASTER_ON`.
        """
        stream: Stream = match.data["stream"]
        kind = context.target.kind
        if self.only_where_faster and kind not in FASTER_ON:
            reason = f"on target {kind} a whole model was not measured to gain from RMSNormalization"
            return self._cache.refuse(stream, Failure(reason, tuple(stream.norms()[:1])))
        explicit = [w for w in stream.writers if w.kind != "constant" and not _in_place(w)]
        saved = len(stream.norms())
        if saved > RECENTRING_COST * len(explicit):
            return None
        named = "; ".join(f"{w.name} {_why_explicit(w)}" for w in explicit[:_MAX_NAMED])
        more = f" and {len(explicit) - _MAX_NAMED} more" if len(explicit) > _MAX_NAMED else ""
        blamed = tuple(p for w in explicit[:_MAX_NAMED] if (p := w.value.producer()) is not None)
        number = f"{len(explicit)} writer{'s' if len(explicit) > 1 else ''}"
        reason = (
            f"{number} would be recentred by operators of their own, which costs more than RMSNormalization for "
            f"{saved} LayerNormalization saves: {named}{more}"
        )
        return self._cache.refuse(stream, Failure(reason, blamed))

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        stream: Stream = match.data["stream"]
        self._cache.changed()
        inputs = {w.value: _recentred_input(w, build) for w in stream.writers if not _in_place(w)}
        values: list[ir.Value] = []
        for writer in match.data["linear"]:
            start = len(build.nodes)
            found = read_writer(writer, stream.channels)
            assert not isinstance(found, str)
            values.append(found.build(build, recentred))
            _attribute(build, start, writer.nodes)
        for join in match.data["rebuilt"]:
            start = len(build.nodes)
            values += _rebuild(build, join, stream, inputs)
            _attribute(build, start, (join,))
        for norm in stream.norms():
            start = len(build.nodes)
            values.append(_rms_norm(build, norm, inputs))
            _attribute(build, start, (norm,))
        _tell_copies(stream, match.data["context"])
        return values


def _in_place(writer: Writer) -> bool:
    """Whether the writer itself is recentred, so that nothing is added."""
    return writer.kind == "linear" and not writer.shared


def _refusal(stream: Stream) -> Failure | None:
    """The first reader that would see that the mean is gone."""
    for reader in stream.readers:
        if reader.kind == "layer_norm":
            continue
        nodes = (reader.node,) if reader.node is not None else ()
        why = "RMSNormalization does not remove it" if reader.kind == "rms_norm" else reader.reason
        producer = reader.value.producer()
        made = f" (of {display_name(producer)})" if reader.node is None and producer is not None else ""
        reason = f"{reader.name}{made} reads the stream and sees its mean: {why}"
        return Failure(reason, nodes or ((producer,) if producer is not None else ()))
    return None


def _why_explicit(writer: Writer) -> str:
    return writer.reason if writer.kind == "other" else "is read outside the stream as well"


def _recentred_input(writer: Writer, build: Builder) -> ir.Value:
    value = writer.value
    if writer.kind == "constant":
        return build.constant(mapped_constant(writer, recentred), f"{value.name}_centred")
    start = len(build.nodes)
    mean = build.op("ReduceMean", value, [writer.axis], keepdims=1)
    centred = build.op("Sub", value, mean)
    producer = value.producer()
    _attribute(build, start, () if producer is None else (producer,))
    return centred


def _rebuild(build: Builder, join: ir.Node, stream: Stream, inputs: dict[ir.Value, ir.Value]) -> Sequence[ir.Value]:
    given = [
        inputs.get(value, value) if value is not None and (join, index) in stream.edges else value
        for index, value in enumerate(join.inputs)
    ]
    attributes = attributes_of(join)
    return build.ops(join.op_type, given, len(join.outputs), domain=join.domain, **attributes)


def _rms_norm(build: Builder, norm: ir.Node, inputs: dict[ir.Value, ir.Value]) -> ir.Value:
    x, scale, bias = (*norm.inputs, None)[:3]
    assert x is not None
    normed = build.op(
        "RMSNormalization",
        inputs.get(x, x),
        scale,
        axis=attribute(norm, "axis", -1),
        epsilon=attribute(norm, "epsilon", 1e-5),
        stash_type=attribute(norm, "stash_type", 1),
    )
    if bias is None or (is_constant(bias) and not np.any(constant(bias))):
        return normed
    return build.op("Add", normed, bias)


def _attribute(build: Builder, start: int, nodes: Sequence[ir.Node]) -> None:
    """Name the source of the nodes built since `start`: not the whole stream, but what each of them stands for."""
    names = ", ".join(dict.fromkeys(part for node in nodes for part in display_name(node).split(", ")))
    for node in build.nodes[start:] if names else ():
        node.metadata_props[ORIGIN] = names


def _tell_copies(stream: Stream, context: PassContext) -> None:
    """A remark for every constant that keeps other readers, such as an embedding tied to the head."""
    for writer in stream.writers:
        others = [n for n, i in writer.value.uses() if (n, i) not in stream.edges]
        if writer.kind == "constant" and others:
            names = tuple(dict.fromkeys(display_name(n) for n in others))
            reason = f"a copy of {writer.value.name} is recentred; {', '.join(names[:_MAX_NAMED])} keeps the original"
            context.remark(PASS_NAME, "copy", "applied", names, reason, "layer_norm")


@dataclass(frozen=True)
class LayerNormToRMSNorm(RewritePass):
    """LayerNormalization over a recentred residual stream as RMSNormalization.

    Attributes:
        only_where_faster: Do nothing for targets on which whole models were not measured to gain.
    """

    name: ClassVar[str] = PASS_NAME
    only_where_faster: bool = False

    def rules(self) -> Sequence[Rule]:
        return (ConvertStream(self.only_where_faster),)
