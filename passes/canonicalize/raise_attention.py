"""Attention in any spelling to the Attention operator (Vaswani et al., arXiv 1706.03762; ONNX Attention-23).

    softmax(scale * q k^T + mask) v   ->   Attention(q, k, v, mask; scale)        q [B, Hq, S, D], k [B, Hkv, T, D]

Rules
1. `product`: softmax between two products. Splitting and merging heads stays outside. Operands of rank 2, 3 and 5 are
   brought to four axes (`xform.patterns.attention_layout`), masks of every kind become one additive mask
   (`xform.patterns.attention_mask`), soft caps and the precision of the softmax become attributes.
2. `three_axes`: Attention of [batch, sequence, hidden] with head counts as attributes gets four axes.
3. `explicit_scale`: a scale left to the default 1/sqrt(D) is written down.
4. `scale`: a constant positive factor on queries or keys moves into the scale.
5. `shared_heads`: keys and values repeated for groups of query heads are read unrepeated (Ainslie et al., arXiv
   2305.13245).
6. `cache`: keys and values joined with a cache become past_key/past_value, the joined ones present_key/present_value.
7. `fill`: a mask filled with the lowest number of its type is filled with 5/8 of it (`xform.patterns.attention_mask`
   says why that is the same by the operator's definition, and not the same in ONNX Runtime's kernel).

Preconditions: the softmax is over the keys; nothing between the products is read elsewhere; factors are constant and
positive; operands are of one floating-point type; batch and heads provably agree; fills are numbers that an additive
mask can stand for (`xform.patterns.attention_fill`); in float64, scale and soft cap are float32 numbers, as attributes
are, or the scale goes onto the queries.

Exact for finite queries, keys and values up to rounding, rows without a key included: they keep equal weights, zeros or
NaN. One remark: `Where(IsNaN(weights), 0, weights)` is dropped. By it a row of NaN logits that come from NaN or
overflowing inputs gave zeros; the operator gives NaN there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import attribute, attributes_of, display_name, rank_of, shape_of
from xform.patterns.attention import Core, recognize
from xform.patterns.attention_fill import deep_number
from xform.patterns.attention_heads import cached, repeated_heads
from xform.patterns.attention_layout import Layout, choose, dim
from xform.patterns.attention_mask import build_mask, lowest_fill
from xform.patterns.attention_operands import operand, peel
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import Failure, Rule

INPUTS = 7  # Q, K, V, attn_mask, past_key, past_value, and from opset 24 on nonpad_kv_seqlen
MASK, PAST, LENGTHS = 3, 4, 6


class Product(Rule):
    """Rule 1."""

    name = "product"
    concept = "attention"

    def anchors(self) -> frozenset[Key]:
        return frozenset({("", "MatMul"), ("", "Einsum")})

    def reach(self) -> int:
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        core = recognize(node)
        layout = choose(core) if isinstance(core, Core) else core
        if isinstance(core, Core) and not holds(core.logits.softcap, core.queries.value.dtype):
            layout = Failure(f"the soft cap {core.logits.softcap} is no float32, as the operator wants it", (node,))
        if isinstance(layout, Failure):
            yield layout
        if not isinstance(core, Core) or not isinstance(layout, Layout):
            return
        yield Match(roots=(node.outputs[0],), interior=core.nodes, data={"core": core, "layout": layout})

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        core: Core = match.data["core"]
        layout: Layout = match.data["layout"]
        q, k, v = _one_batch(build, [layout.lift(build, g) for g in (core.queries, core.keys, core.values)])
        for factor in core.logits.factors:
            q = build.op("Mul", q, factor)
        dtype = core.queries.value.dtype
        assert dtype is not None
        scale = core.scale
        if not holds(scale, dtype):
            q, scale = build.op("Mul", q, np.asarray(scale, dtype=dtype.numpy())), 1.0
        mask = build_mask(build, core.logits, layout, q, k, dtype, core.guarded)
        out = build.op(
            "Attention",
            q,
            k,
            v,
            mask,
            scale=scale,
            softcap=core.logits.softcap or None,
            softmax_precision=None if core.precision is None else core.precision.value,
        )
        out = layout.lower(build, out, core.values)
        identity = tuple(range(len(core.out_perm)))
        return out if core.out_perm == identity else build.op("Transpose", out, perm=list(core.out_perm))


def _one_batch(build: Builder, values: list[ir.Value]) -> list[ir.Value]:
    """Expand operands of batch 1 beside operands of another batch."""
    batches = [dim(v, 0) for v in values]
    other = next((b for b in batches if b != 1), 1)
    return [
        build.op("Expand", v, _first_dim(build, other)) if b == 1 and other != 1 else v
        for v, b in zip(values, batches, strict=True)
    ]


def _first_dim(build: Builder, size: int | tuple[ir.Value, int]) -> ir.Value | list[int]:
    if isinstance(size, int):
        return [size, 1, 1, 1]
    value, axis = size
    return build.op("Concat", build.op("Shape", value, start=axis, end=axis + 1), [1, 1, 1], axis=0)


def holds(number: float, dtype: ir.DataType | None) -> bool:
    """Whether an attribute, a float32, says a number as precisely as operands of `dtype` need it."""
    return dtype is not ir.DataType.DOUBLE or float(np.float32(number)) == number


class _OnAttention(Rule):
    """Rules that start at an Attention operator."""

    concept = "attention"

    def anchors(self) -> frozenset[Key]:
        return frozenset({("", "Attention")})

    def reach(self) -> int:
        return 1


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (INPUTS - len(node.inputs))]


def _attributes(node: ir.Node, **changed: Any) -> dict[str, Any]:
    """The node's attributes as plain values, with changes; None removes one."""
    return {**attributes_of(node), **changed}


def _used(node: ir.Node) -> tuple[ir.Value, ...]:
    """Outputs that somebody reads, the first one included in any case."""
    return tuple(o for i, o in enumerate(node.outputs) if i == 0 or o.uses() or o.is_graph_output())


def _again(build: Builder, node: ir.Node, inputs: Sequence[ir.Value | None], **changed: Any) -> tuple[ir.Value, ...]:
    """The same Attention with other inputs and attributes; its outputs in the order of `_used`."""
    outputs = build.ops("Attention", inputs, len(node.outputs), **_attributes(node, **changed))
    used = _used(node)
    return tuple(new for old, new in zip(node.outputs, outputs, strict=True) if old in used)


class ThreeAxes(_OnAttention):
    """Rule 2."""

    name = "three_axes"

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if rank_of(node.inputs[0]) != 3:
            return
        heads = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
        if not all(heads) or any(rank_of(v) != 3 for v in node.inputs[:3]):
            yield Failure("Attention of three axes without head counts for all of its operands", (node,))
            return
        yield Match(roots=_used(node), nodes={"attention": node})

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        node = match.nodes["attention"]
        heads = (attribute(node, "q_num_heads"), *[attribute(node, "kv_num_heads")] * 2)
        inputs = _inputs(node)
        for index, count in enumerate(heads):
            split = build.op("Reshape", inputs[index], [0, 0, count, _size(inputs[index], count)])
            inputs[index] = build.op("Transpose", split, perm=[0, 2, 1, 3])
        out, *others = _again(build, node, inputs, q_num_heads=None, kv_num_heads=None)
        merged = build.op("Transpose", out, perm=[0, 2, 1, 3])
        return build.op("Reshape", merged, [0, 0, _size(node.outputs[0])]), *others


def _size(value: ir.Value | None, heads: int = 1) -> int:
    """The last dim by head, -1 where it is not known; a dim that is written down does for empty batches too."""
    last = (shape_of(value) or (None,))[-1]
    return last // heads if isinstance(last, int) else -1


class ExplicitScale(_OnAttention):
    """Rule 3."""

    name = "explicit_scale"

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if attribute(node, "scale") is not None or rank_of(node.inputs[0]) != 4:
            return
        shape = shape_of(node.inputs[0])
        size = shape[3] if shape is not None else None
        if not isinstance(size, int):
            yield Failure("the head size behind the default scale is not known before the model runs", (node,))
            return
        if not size or not holds(1 / math.sqrt(size), node.inputs[0].dtype if node.inputs[0] is not None else None):
            return
        yield Match(roots=_used(node), nodes={"attention": node}, data={"scale": 1 / math.sqrt(size)})

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        node = match.nodes["attention"]
        return _again(build, node, node.inputs, scale=match.data["scale"])


class Scale(_OnAttention):
    """Rule 4."""

    name = "scale"

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        scale = attribute(node, "scale")
        given = [operand(v) if v is not None else None for v in node.inputs[:2]]
        if scale is None or given[0] is None or given[1] is None or _inputs(node)[PAST] is not None:
            return
        found = [peel(g, transposes=False) for g in given if g is not None]
        product = scale * math.prod(f.scale for f in found)
        if all(f.scale == 1.0 for f in found) or not holds(product, found[0].value.dtype):
            return
        interior = tuple(p for g in given if g is not None and (p := g.value.producer()) is not None)
        data = {"values": [f.value for f in found], "scale": product}
        yield Match(roots=_used(node), nodes={"attention": node}, interior=interior, data=data)

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        node = match.nodes["attention"]
        return _again(build, node, [*match.data["values"], *node.inputs[2:]], scale=match.data["scale"])


class SharedHeads(_OnAttention):
    """Rule 5."""

    name = "shared_heads"

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if _inputs(node)[PAST] is not None:
            return
        keys, values = repeated_heads(node.inputs[1]), repeated_heads(node.inputs[2])
        if keys is None or values is None or keys.times != values.times:
            if keys is not None or values is not None:
                yield Failure("keys and values are not repeated alike", (node,))
            return
        interior = (node, *keys.nodes, *values.nodes)
        yield Match(roots=_used(node), interior=interior, data={"node": node, "sources": (keys.source, values.source)})

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        node: ir.Node = match.data["node"]
        sources = [s.build(build) for s in match.data["sources"]]
        return _again(build, node, [node.inputs[0], *sources, *node.inputs[3:]])


class Cached(_OnAttention):
    """Rule 6. The joined keys and values may be read by the attention and be outputs, and nothing else."""

    name = "cache"

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if (
            _inputs(node)[PAST] is not None
            or _inputs(node)[LENGTHS] is not None
            or len(node.outputs) > 1
            or attribute(node, "is_causal", 0)
        ):
            return
        keys, values = cached(node.inputs[1]), cached(node.inputs[2])
        if keys is None or values is None:
            return
        for joined in (keys.node, values.node):
            other = next((user for user, _ in joined.outputs[0].uses() if user is not node), None)
            if other is not None:
                yield Failure(f"{display_name(other)} also reads the joined cache", (joined, other))
                return
        roots = (node.outputs[0], keys.node.outputs[0], values.node.outputs[0])
        yield Match(roots=roots, data={"node": node, "keys": keys, "values": values})

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        node: ir.Node = match.data["node"]
        keys, values = match.data["keys"], match.data["values"]
        inputs = [node.inputs[0], keys.new, values.new, _inputs(node)[MASK], keys.past, values.past]
        return build.ops("Attention", inputs, 3, **_attributes(node))


class Filled(_OnAttention):
    """Rule 7."""

    name = "fill"

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        found = lowest_fill(_inputs(node)[MASK])
        if found is not None:
            yield Match(roots=(found[0].outputs[0],), data={"filled": found[0], "index": found[1]})

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        filled: ir.Node = match.data["filled"]
        inputs: list[Any] = list(filled.inputs)
        dtype = filled.outputs[0].dtype
        assert dtype is not None
        inputs[match.data["index"]] = np.asarray(deep_number(dtype), dtype=dtype.numpy())
        return build.op(filled.op_type, *inputs)


@dataclass(frozen=True)
class RaiseAttention(RewritePass):
    """Raise every spelling of scaled dot-product attention to the Attention operator with four axes."""

    name: ClassVar[str] = "raise_attention"

    def rules(self) -> Sequence[Rule]:
        return (Product(), ThreeAxes(), ExplicitScale(), Scale(), SharedHeads(), Cached(), Filled())
