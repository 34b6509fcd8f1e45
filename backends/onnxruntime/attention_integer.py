"""Self-attention with its projections in int8 in one operator: com.microsoft.QAttention.

    Y = QAttention(Xq [B, S, C], Wq [C, 3 * H * D], b, s, t [3 * H * D], mask, z)

What com.microsoft.Attention is to float projections: the sums are exact int32, scaled and biased while they are written
where the products of the attention read them, in float, so that biases, Split, Squeeze, Reshape and Transpose vanish.
Measured (docs/onnxruntime-notes.md) it takes 3 to 21 % less than the product with MultiHeadAttention. It knows masks
of two values only, and adds one number, `mask_filter_value`, where they are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from xform.backends.onnxruntime.attention_mask import make_bias
from xform.backends.onnxruntime.emit import MICROSOFT, Site
from xform.backends.onnxruntime.projections import IntegerProjection, read_integer_projection
from xform.graph.values import is_op, rank_of, same_dim, scalar, shape_of

if TYPE_CHECKING:
    from xform.backends.onnxruntime.attention import Operands

FORM = "attention: QAttention"
_LOWEST = float(np.finfo(np.float32).min)


def integer_attention(site: Site, a: Operands) -> tuple[ir.Value, int, int] | None:
    """[B, S, H*D] with the number of heads and their size; None where the operator cannot say it.

    It cannot where `packed_attention` cannot, with masks that differ by head or add more than one number, and with a
    mask and the causal rule together.
    """
    if a.softcap or a.precision is not None or a.past_key is not None or a.query_heads != a.kv_heads:
        return None
    if any(rank_of(v) != 4 for v in (a.query, a.key, a.value)) or (a.causal and a.mask is not None):
        return None
    parts = [part for v in (a.query, a.key, a.value) if (part := read_integer_projection(v)) is not None]
    if len(parts) < 3 or not _one_source(site, parts) or rank_of(parts[0].source) != 3:
        return None
    if len({part.codes.shape for part in parts}) > 1:
        return None
    two_valued = None if a.mask is None else _two_valued(a.mask)
    mask = None if two_valued is None else _raw_mask(site, two_valued, a)
    if a.mask is not None and mask is None:
        return None
    first, name = parts[0], site.node.name
    result = site.op(
        "QAttention",
        first.source,
        site.emitter.weight(np.concatenate([p.codes for p in parts], axis=1), f"{name}_qkv_int8"),
        site.emitter.weight(np.concatenate([p.bias for p in parts]).astype(np.float32), f"{name}_qkv_bias"),
        first.scale,
        site.emitter.weight(np.concatenate([p.steps for p in parts]).astype(np.float32), f"{name}_qkv_scale"),
        mask,
        first.zero,
        domain=MICROSOFT,
        num_heads=a.query_heads,
        scale=a.scale,
        unidirectional=int(a.causal) or None,
        mask_filter_value=None if two_valued is None else two_valued.added,
    )
    result.type = ir.TensorType(ir.DataType.FLOAT)
    bias = None if a.mask is None else make_bias(site, ir.DataType.FLOAT, a.mask, None)
    if bias is not None and bias.empty_rows is not None:
        empty = site.op("Squeeze", bias.empty_rows, site.emitter.ints(1))  # [B, 1, S, 1] to [B, S, 1]
        result = site.op("Where", empty, site.emitter.constant(0, ir.DataType.FLOAT, "zero"), result)
    return result, a.query_heads, first.codes.shape[1] // a.query_heads


def _one_source(site: Site, parts: list[IntegerProjection]) -> bool:
    """Whether all read one quantized input, and nothing else reads what vanishes."""
    first = parts[0]
    if any((p.source, p.scale, p.zero) != (first.source, first.scale, first.zero) for p in parts):
        return False
    return site.takes_in(node for part in parts for node in part.nodes)


@dataclass(frozen=True)
class TwoValued:
    """A mask that adds nothing where `allowed` is true (false if `inverted`), and one finite number elsewhere."""

    allowed: ir.Value
    inverted: bool
    added: float


def _two_valued(mask: ir.Value) -> TwoValued | None:
    """A boolean mask, or `Where(allowed, 0, number)` or its inverse."""
    if mask.dtype is ir.DataType.BOOL:
        return TwoValued(mask, False, _LOWEST)
    node = mask.producer()
    condition = node.inputs[0] if node is not None and is_op(node, "Where") else None
    numbers = [] if node is None or condition is None else [scalar(value) for value in node.inputs[1:3]]
    if condition is None or 0.0 not in numbers or None in numbers:
        return None
    inverted = numbers[0] != 0
    added = float(np.float32(numbers[0 if inverted else 1]))
    # minus infinity is told apart from a number by rows that mask everything, which are made zero
    return TwoValued(condition, inverted, max(added, _LOWEST)) if added < np.inf else None


def _raw_mask(site: Site, mask: TwoValued, a: Operands) -> ir.Value | None:
    """Conditions [B, 1, S or 1, T] as int32 [B, S, T] or [B, T]; made once for all layers."""
    shape, queries, keys = shape_of(mask.allowed), shape_of(a.query), shape_of(a.key)
    if shape is None or len(shape) != 4 or shape[1] != 1:
        return None
    assert queries is not None and keys is not None
    per_query = shape[2] != 1
    wanted = (queries[0], *((queries[2],) if per_query else ()), keys[2])
    given = (shape[0], *((shape[2],) if per_query else ()), shape[3])
    fits = all(same_dim(x, y) for x, y in zip(given, wanted, strict=True))
    sizes = [size for size in wanted if isinstance(size, int)]
    if not fits and len(sizes) < len(wanted):
        return None

    def make() -> ir.Value:
        allowed = site.op("Not", mask.allowed) if mask.inverted else mask.allowed
        axes = site.emitter.ints(1) if per_query else site.emitter.ints(1, 2)
        value: ir.Value = site.op("Squeeze", site.op("Cast", allowed, to=ir.DataType.INT32), axes)
        return value if fits else site.op("Expand", value, site.emitter.ints(*sizes))

    raw: ir.Value = site.emitter.shared(site.graph, ("raw mask", mask, wanted), make)
    return raw
