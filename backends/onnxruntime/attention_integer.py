"""Self-attention with its projections in int8 in one operator: com.microsoft.QAttention.

    Y = QAttention(Xq [B, S, C], Wq [C, 3 * H * D], b, s, t [3 * H * D], mask, z)

What com.microsoft.Attention is to float projections: the sums are exact int32, scaled and biased while they are written
where the products of the attention read them, in float, so that biases, Split, Squeeze, Reshape and Transpose vanish.
Measured (docs/onnxruntime-notes.md) it takes 3 to 21 % less than the product with MultiHeadAttention. It knows masks
of two values only, and adds one number, `mask_filter_value`, where they are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from xform.backends.onnxruntime.attention_mask import make_bias
from xform.backends.onnxruntime.attention_packed import as_tokens
from xform.backends.onnxruntime.emit import MICROSOFT, Body, Site
from xform.backends.onnxruntime.projections import IntegerProjection, read_integer_projection
from xform.graph.masks import MAX_SCANNED
from xform.graph.values import Array, constant, constant_tensor, is_op, rank_of, same_dim, scalar, shape_of

if TYPE_CHECKING:
    from xform.backends.onnxruntime.attention import Operands

FORM = "attention: QAttention"
_LOWEST = float(np.finfo(np.float32).min)


def integer_attention(site: Site, a: Operands) -> tuple[ir.Value, int, int] | None:
    """[B, S, H*D] with the number of heads and their size; None where the operator cannot say it.

    It cannot where `packed_attention` cannot, with masks that differ by head or add more than one number, and with a
    mask and the causal rule together. A constant mask that is the causal rule (GPT-2's) is said as that.
    """
    if a.softcap or a.precision is not None or a.past_key is not None or a.query_heads != a.kv_heads:
        return None
    if any(rank_of(v) != 4 for v in (a.query, a.key, a.value)) or (a.causal and a.mask is not None):
        return None
    parts = [part for v in (a.query, a.key, a.value) if (part := read_integer_projection(v)) is not None]
    if len(parts) < 3 or not _one_source(site, parts) or len({part.codes.shape for part in parts}) > 1:
        return None
    two_valued = None if a.mask is None else _two_valued(a.mask)
    causal = a.causal or (two_valued is not None and _is_causal(two_valued))
    mask = None if two_valued is None or causal else _raw_mask(site, two_valued, a)
    if a.mask is not None and not causal and mask is None:
        return None
    first = parts[0]
    tokens = as_tokens(site, first.source, a.query)
    if tokens is None:
        return None
    shape = shape_of(a.query)
    assert shape is not None
    name = site.node.name
    inputs = (
        tokens,
        site.emitter.weight(np.concatenate([p.codes for p in parts], axis=1), f"{name}_qkv_int8"),
        site.emitter.weight(np.concatenate([p.bias for p in parts]).astype(np.float32), f"{name}_qkv_bias"),
        first.scale,
        site.emitter.weight(np.concatenate([p.steps for p in parts]).astype(np.float32), f"{name}_qkv_scale"),
        mask,
        first.zero,
    )
    options = {
        "domain": MICROSOFT,
        "num_heads": a.query_heads,
        "scale": a.scale,
        "unidirectional": int(causal) or None,
        "mask_filter_value": two_valued.added if two_valued is not None else _LOWEST if causal else None,
    }
    width = first.codes.shape[1]
    result = _of_any_batch(site, inputs, options, (shape[0], shape[2], width))
    bias = None if a.mask is None or causal else make_bias(site, ir.DataType.FLOAT, a.mask, None)
    if bias is not None and bias.empty_rows is not None:
        empty = site.op("Squeeze", bias.empty_rows, site.emitter.ints(1))  # [B, 1, S, 1] to [B, S, 1]
        of_empty = site.emitter.constant(np.nan if a.nan_rows else 0, ir.DataType.FLOAT, "of_empty_rows")
        result = site.op("Where", empty, of_empty, result)
    return result, a.query_heads, width // a.query_heads


def _of_any_batch(
    site: Site, inputs: Sequence[ir.Value | None], options: Mapping[str, Any], shape: tuple[Any, ...]
) -> ir.Value:
    """QAttention, [B, S, H*D], where B may be 0: its kernel divides by the batch, which ends the process.

    Where B is dynamic, the operator is in a branch that an empty batch does not take. A branch costs 3 us (ONNX Runtime
    1.31, 2026-12-01).
    """
    tokens, weight = inputs[0], inputs[1]
    assert tokens is not None and weight is not None

    def typed(value: ir.Value) -> ir.Value:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return value

    if isinstance(shape[0], int) and shape[0] > 0:
        return typed(site.op("QAttention", *inputs, **options))

    def is_filled() -> ir.Value:
        value: ir.Value = site.op("Cast", site.op("Size", tokens), to=ir.DataType.BOOL)
        return value

    def empty(body: Body) -> ir.Value:
        """No sequence, or sequences of no token: nothing, in the right shape."""
        lengths = body.op("Slice", body.op("Shape", tokens), site.emitter.ints(0), site.emitter.ints(2))
        sizes = body.op("Concat", lengths, site.emitter.ints(shape[2]), axis=0)
        return typed(body.op("ConstantOfShape", sizes))

    filled = site.emitter.shared(site.graph, ("filled", tokens), is_filled)
    return site.branch(filled, lambda body: typed(body.op("QAttention", *inputs, **options)), empty)


def _one_source(site: Site, parts: list[IntegerProjection]) -> bool:
    """Whether all read one quantized input, and nothing else reads what vanishes."""
    first = parts[0]
    if any((p.source, p.scale, p.zero) != (first.source, first.scale, first.zero) for p in parts):
        return False
    return site.takes_in(node for part in parts for node in part.nodes)


@dataclass(frozen=True)
class TwoValued:
    """A mask that adds nothing where `allowed` is true (false if `inverted`), and one finite number elsewhere.

    `constant` has the conditions, true where it adds nothing, where the mask is constant; `allowed` is the mask then.
    """

    allowed: ir.Value
    inverted: bool
    added: float
    constant: Array | None = field(default=None, compare=False)


def _two_valued(mask: ir.Value) -> TwoValued | None:
    """A boolean mask, or `Where(allowed, 0, number)` or its inverse, or a constant that has no other numbers."""
    if constant_tensor(mask) is not None:
        return _constant_two_valued(mask)
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


def _constant_two_valued(mask: ir.Value) -> TwoValued | None:
    data = constant(mask, max_elements=MAX_SCANNED)
    if data is None:  # too large to look at
        return TwoValued(mask, False, _LOWEST) if mask.dtype is ir.DataType.BOOL else None
    allowed = data if data.dtype.kind == "b" else data == 0
    added = np.full(1, _LOWEST) if data.dtype.kind == "b" else np.unique(data[~allowed])
    if len(added) != 1 or not added[0] < np.inf:
        return None
    return TwoValued(mask, False, max(float(added[0]), _LOWEST), allowed)


def _is_causal(mask: TwoValued) -> bool:
    """Whether a mask is constant and leaves query i the keys 0 to i, and nothing of the others."""
    allowed = mask.constant
    if allowed is None or mask.added != _LOWEST or allowed.ndim < 2 or allowed.shape[-1] != allowed.shape[-2]:
        return False
    return bool((allowed == np.tri(allowed.shape[-1], dtype=bool)).all())


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
        axes = (1,) if per_query else (1, 2)
        value: ir.Value
        if mask.constant is not None:
            value = site.emitter.weight(np.squeeze(mask.constant, axes).astype(np.int32), f"{site.node.name}_allowed")
        else:
            allowed = site.op("Not", mask.allowed) if mask.inverted else mask.allowed
            value = site.op("Squeeze", site.op("Cast", allowed, to=ir.DataType.INT32), site.emitter.ints(*axes))
        return value if fits else site.op("Expand", value, site.emitter.ints(*sizes))

    raw: ir.Value = site.emitter.shared(site.graph, ("raw mask", mask, wanted), make)
    return raw
