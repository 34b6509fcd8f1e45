"""Attention (opset 23) in the form that ONNX Runtime's CPU kernels run fastest.

Measured (docs/onnxruntime-notes.md): the opset-23 kernel and `MatMul, Softmax, MatMul` take the same time, and
com.microsoft's MultiHeadAttention without a mask is faster (its flash kernel, 10 to 20 %). The kernel of opset 23 also
refuses masks that broadcast over queries. Among packed tokens each sequence has an attention of its own
(`attention_per_sequence`). Otherwise fastest is com.microsoft's Attention, which takes the projections in; see
`attention_packed`, and with projections in int8 QAttention, which does the same (`attention_integer`). So an attention
becomes, in this order, attention by sequence, packed Attention or QAttention where its projections allow,
MultiHeadAttention where it has no mask, and else it is written out so that ONNX Runtime fuses the transpose and the
scale into the first product:

    Y = Softmax(softcap(scale * Q K^T) + bias) V

Grouped heads never repeat keys and values: Q [B, Hq, S, D] is viewed as [B, Hkv, (Hq/Hkv) S, D], which is the same
memory, so that each key head meets all of its query heads in one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from xform.backends.onnxruntime.attention_integer import FORM as INTEGER_FORM
from xform.backends.onnxruntime.attention_integer import integer_attention
from xform.backends.onnxruntime.attention_mask import Bias, Lengths, is_neutral, make_bias
from xform.backends.onnxruntime.attention_packed import FORM, packed_attention
from xform.backends.onnxruntime.attention_per_sequence import SEQUENCE_LOOPS_SINCE, attention_per_sequence
from xform.backends.onnxruntime.emit import MICROSOFT, Emitter, Site
from xform.backends.onnxruntime.projections import SWAP_HEADS, is_head_swap
from xform.graph.masks import without_nan_rows
from xform.graph.values import attribute, is_op, rank_of, same_dim, shape_of, used_once

FORMS = ("packed", "multi_head")


@dataclass(frozen=True)
class Operands:
    """One Attention node, read.

    Attributes:
        query_heads, kv_heads: How many; both 1 where there are as many of both and nobody knows how many.
        nan_rows: Whether a row without a key gives NaN, as a plain softmax does, and not zeros.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    past_key: ir.Value | None
    past_value: ir.Value | None
    scale: float
    causal: bool
    softcap: float
    precision: ir.DataType | None
    logits_mode: int
    query_heads: int
    kv_heads: int
    nan_rows: bool

    @property
    def plain(self) -> bool:
        """Whether it is nothing but softmax(scale * Q K^T) V."""
        return not (self.causal or self.softcap or self.precision) and self.mask is None and self.past_key is None


def lower_attention(emitter: Emitter, node: ir.Node, forms: Sequence[str], opset: int) -> bool:
    """Lower one Attention node; False where it has to stay (unknown head counts, or options newer than opset 23).

    Args:
        forms: Those to try before it is written out, of `FORMS`.
        opset: At which the graph will be written.
    """
    site = emitter.at(node)
    if not _lowerable(node):
        return False
    attention = _read(site)
    if attention is None:
        return False
    extra = [o for o in node.outputs[1:] if o.uses() or o.is_graph_output()]
    if not isinstance((shape_of(attention.query) or (None, None))[1], int):
        forms = ()  # they write the number of heads down
    if "packed" in forms and not extra:
        if opset >= SEQUENCE_LOOPS_SINCE and attention_per_sequence(site, attention):
            return True
        packed = packed_attention(site, attention)
        if packed is not None:
            _deliver(site, *packed, form=FORM)
            return True
        integer = integer_attention(site, attention)
        if integer is not None:
            _deliver(site, *integer, form=INTEGER_FORM)
            return True
    if "multi_head" in forms and attention.plain and not extra and _multi_head(site, attention):
        return True
    _write_out(site, attention)
    return True


def _lowerable(node: ir.Node) -> bool:
    newer = len(node.inputs) > 6 and node.inputs[6] is not None
    windowed = any(attribute(node, name, -1) != -1 for name in ("left_window_size", "right_window_size"))
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    return not newer and not windowed and dtype is not None and not _mask_is_short(node)


def _mask_is_short(node: ir.Node) -> bool:
    """Whether the mask covers fewer keys than there are (the standard then pads it), or that is unknown."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return False
    shape, keys = shape_of(mask), shape_of(node.inputs[1])
    has_past = len(node.inputs) > 4 and node.inputs[4] is not None
    if shape is None or not shape:
        return True
    if has_past or keys is None:
        return shape[-1] == 1
    if shape[-1] == 1:
        return keys[-2] != 1
    return isinstance(shape[-1], int) and isinstance(keys[-2], int) and shape[-1] < keys[-2]


def _read(site: Site) -> Operands | None:
    node = site.node
    query, key, value, mask, past_key, past_value = (*node.inputs, *[None] * 6)[:6]
    if query is None or key is None or value is None:
        return None
    query_heads, kv_heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    head_size: object = None
    if rank_of(query) == 4:
        query_shape, key_shape = shape_of(query), shape_of(key)
        assert query_shape is not None
        query_heads, head_size = query_shape[1], query_shape[3]
        kv_heads = key_shape[1] if key_shape is not None else None
        if not isinstance(query_heads, int) and same_dim(query_heads, kv_heads):
            query_heads = kv_heads = 1  # as many of both, whatever their number
    elif rank_of(query) == 3 and query_heads and kv_heads:
        width = (shape_of(query) or (None,))[-1]
        head_size = width // query_heads if isinstance(width, int) else None
        query, key, value = (
            _split_heads(site, x, h) for x, h in ((query, query_heads), (key, kv_heads), (value, kv_heads))
        )
    causal = bool(attribute(node, "is_causal", 0))
    plain = None if mask is None or causal else without_nan_rows(mask)
    mask = plain if plain is not None else mask
    mask = None if mask is None or is_neutral(mask) else mask
    if not isinstance(query_heads, int) or not isinstance(kv_heads, int) or query_heads % kv_heads:
        return None
    scale = attribute(node, "scale")
    if scale is None and not isinstance(head_size, int):
        return None
    precision = attribute(node, "softmax_precision", 0)
    return Operands(
        query,
        key,
        value,
        mask,
        past_key,
        past_value,
        scale=float(scale) if scale is not None else 1 / math.sqrt(float(str(head_size))),
        causal=causal,
        softcap=float(attribute(node, "softcap", 0.0)),
        precision=ir.DataType(precision) if precision and ir.DataType(precision) is not query.dtype else None,
        logits_mode=int(attribute(node, "qk_matmul_output_mode", 0)),
        query_heads=query_heads,
        kv_heads=kv_heads,
        nan_rows=plain is not None,
    )


def _split_heads(site: Site, value: ir.Value, heads: int) -> ir.Value:
    """[B, S, H*D] to [B, H, S, D]."""
    shape = shape_of(value)
    size = shape[2] // heads if shape is not None and isinstance(shape[2], int) else -1
    split = site.typed(site.op("Reshape", value, site.emitter.ints(0, 0, heads, size)), value)
    result: ir.Value = site.typed(site.op("Transpose", split, perm=SWAP_HEADS), value)
    if shape is not None:
        result.shape = ir.Shape((shape[0], heads, shape[1], None if size == -1 else size))
    return result


def _write_out(site: Site, a: Operands) -> None:
    """Products and a softmax, in standard operators of opset 13 and up."""
    emitter, node = site.emitter, site.node
    dtype = a.query.dtype
    assert dtype is not None
    key, value = a.key, a.value
    if a.past_key is not None and a.past_value is not None:
        key, value = _append(site, a.past_key, a.key), _append(site, a.past_value, a.value)
    grouped = a.query_heads != a.kv_heads
    query = _regrouped(site, a, a.query) if grouped else a.query
    logits = site.op("MatMul", query, site.op("Transpose", key, perm=[0, 1, 3, 2]))
    if a.scale != 1.0:
        logits = site.op("Mul", logits, emitter.constant(a.scale, dtype, "scale"))
    logits = _ungrouped(site, a, logits) if grouped else logits
    stages = [logits]
    if a.softcap:
        cap = emitter.constant(a.softcap, dtype, "softcap")
        logits = site.op("Mul", site.op("Tanh", site.op("Div", logits, cap)), cap)
    stages.append(logits)
    causal = Lengths(a.query, a.key, a.past_key, key) if a.causal else None
    bias = make_bias(site, dtype, a.mask, causal, finds_empty=not a.nan_rows)
    if bias is not None:
        logits = site.op("Add", logits, bias.value)
    stages.append(logits)
    probabilities = _softmax(site, a, logits, dtype)
    exposed = a.logits_mode == 3 and len(node.outputs) > 3
    if exposed:
        probabilities = _zero_empty_rows(site, probabilities, bias, dtype)
    stages.append(probabilities)
    weights = _regrouped(site, a, probabilities) if grouped else probabilities
    result = site.op("MatMul", weights, value)
    result = _ungrouped(site, a, result) if grouped else result
    if not exposed:
        result = _zero_empty_rows(site, result, bias, dtype)
    if rank_of(node.outputs[0]) == 3 or rank_of(node.inputs[0]) == 3:
        result = _merge_heads(site, result, _last(a.value) * a.query_heads)
    outputs = [result, key, value, stages[a.logits_mode]]
    if len(node.outputs) > 3:
        logits_shape = shape_of(a.query) or (None, a.query_heads, None)
        node.outputs[3].shape = ir.Shape((*logits_shape[:3], None))  # ONNX infers 0 for a length that it cannot tell
    read = [(old, new) for old, new in zip(node.outputs, outputs, strict=False) if old.uses() or old.is_graph_output()]
    site.replace(read, "attention: MatMul, Softmax, MatMul")


def _append(site: Site, past: ir.Value, new: ir.Value) -> ir.Value:
    """Past and new keys [B, H, T, D] in one; only a static length is written down."""
    joined = site.typed(site.op("Concat", past, new, axis=2), new)
    before, after = shape_of(past), shape_of(new)
    if before is not None and after is not None:
        total = before[2] + after[2] if isinstance(before[2], int) and isinstance(after[2], int) else None
        joined.shape = ir.Shape((*after[:2], total, after[3]))
    return joined


def _softmax(site: Site, a: Operands, logits: ir.Value, dtype: ir.DataType) -> ir.Value:
    if a.precision is not None:
        logits = site.op("Cast", logits, to=a.precision)
    result: ir.Value = site.op("Softmax", logits, axis=-1)
    return site.op("Cast", result, to=dtype) if a.precision is not None else result


def _zero_empty_rows(site: Site, value: ir.Value, bias: Bias | None, dtype: ir.DataType) -> ir.Value:
    if bias is None or bias.empty_rows is None:
        return value
    result: ir.Value = site.op("Where", bias.empty_rows, site.emitter.constant(0, dtype, "zero"), value)
    return result


def _merge_heads(site: Site, value: ir.Value, width: int) -> ir.Value:
    """[B, H, S, D] to [B, S, H*D]; `width` is H*D, negative where it is not known.

    ONNX Runtime refuses a view with an inferred dim beside one of size 0, so dims that are known are written down.
    """
    swapped = site.op("Transpose", value, perm=SWAP_HEADS)
    result: ir.Value = site.op("Reshape", swapped, site.emitter.ints(0, 0, max(width, -1)))
    return result


def _last(value: ir.Value) -> int:
    """The last dim of a value, -1 where it is not known."""
    size = (shape_of(value) or (None,))[-1]
    return size if isinstance(size, int) else -1


def _regrouped(site: Site, a: Operands, value: ir.Value) -> ir.Value:
    """[B, Hq, S, X] as [B, Hkv, (Hq/Hkv) S, X]."""
    return _viewed(site, a, value, a.kv_heads, a.query_heads // a.kv_heads)


def _ungrouped(site: Site, a: Operands, value: ir.Value) -> ir.Value:
    """[B, Hkv, (Hq/Hkv) S, X] as [B, Hq, S, X]."""
    return _viewed(site, a, value, a.query_heads, 1)


def _viewed(site: Site, a: Operands, value: ir.Value, heads: int, times: int) -> ir.Value:
    """`value` as [B, heads, times * S, X], for empty batches and sequences too."""
    shape, ints = shape_of(a.query) or (None,) * 4, site.emitter.ints
    batch, length = shape[0], shape[2]
    target: ir.Value
    if isinstance(length, int):
        target = ints(0, heads, times * length, 0)
    elif isinstance(batch, int) and batch:
        target = ints(batch, heads, -1, 0)  # no dim can be 0 but the inferred one and the last
    else:

        def make() -> ir.Value:
            sizes = site.op("Mul", site.op("Shape", a.query), ints(1, heads, times, 0))
            made: ir.Value = site.op("Div", sizes, ints(1, a.query_heads, 1, 1))
            return made

        key = ("grouped", length if length is not None else a.query, heads, times)
        target = site.emitter.shared(site.graph, key, make)
    result: ir.Value = site.op("Reshape", value, target)
    return result


def _multi_head(site: Site, a: Operands) -> bool:
    """com.microsoft.MultiHeadAttention, where the heads are equal and the dtype has a kernel."""
    key_shape, value_shape = shape_of(a.key), shape_of(a.value)
    if a.query_heads != a.kv_heads or a.query.dtype is not ir.DataType.FLOAT or not key_shape or not value_shape:
        return False
    heads, head_size = a.query_heads, value_shape[3]
    if not isinstance(head_size, int):
        return False
    key, value = a.key, a.value  # the kernel takes both as [B, H, T, D], then of one size, or both as [B, T, H*D]
    if _is_head_split(key) and _is_head_split(value):
        key, value = _tokens(site, key), _tokens(site, value)
    elif key_shape[3] != head_size:
        return False
    query = _tokens(site, a.query)
    merged = site.op("MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=heads, scale=a.scale)
    _deliver(site, merged, heads, head_size)
    return True


def _is_head_split(value: ir.Value) -> bool:
    """Whether `value` is a transpose that swaps the heads and the sequence: [B, S, H, D] to [B, H, S, D], or back."""
    producer = value.producer()
    return producer is not None and is_head_swap(producer)


def _tokens(site: Site, value: ir.Value) -> ir.Value:
    """[B, H, S, D] as [B, S, H*D]: what its head split came from, or a transpose of it."""
    producer = value.producer()
    if producer is None or not _is_head_split(value):
        shape = shape_of(value)
        width = shape[1] * shape[3] if shape and isinstance(shape[1], int) and isinstance(shape[3], int) else -1
        return _merge_heads(site, value, width)
    split = producer.inputs[0]
    assert split is not None
    before = split.producer()
    flat = before.inputs[0] if before is not None and is_op(before, "Reshape") else None
    if flat is not None and _is_flat_form(flat, split):
        return flat
    shape = shape_of(split) or (None,) * 4
    width = shape[2] * shape[3] if isinstance(shape[2], int) and isinstance(shape[3], int) else -1
    result: ir.Value = site.op("Reshape", split, site.emitter.ints(0, 0, width))
    return result


def _is_flat_form(flat: ir.Value, split: ir.Value) -> bool:
    """Whether `flat` is [B, S, H*D] of `split` [B, S, H, D], by their shapes."""
    a, b = shape_of(flat), shape_of(split)
    if a is None or b is None or len(a) != 3 or len(b) != 4 or None in a or None in b:
        return False
    return a[:2] == b[:2] and isinstance(b[2], int) and isinstance(b[3], int) and a[2] == b[2] * b[3]


def _deliver(
    site: Site, merged: ir.Value, heads: int, head_size: int, form: str = "attention: MultiHeadAttention"
) -> None:
    """Put [B, S, H*D] in place of the output [B, H, S, D], without the transpose that merges the heads again."""
    output, emitter = site.node.outputs[0], site.emitter
    if rank_of(output) == 3:
        site.replace([(output, merged)], form)
        return
    split = site.typed(site.op("Reshape", merged, emitter.ints(0, 0, heads, head_size)), output)
    shape = shape_of(output)
    if shape is not None:  # what reads it writes its dims down, for empty batches
        split.shape = ir.Shape((shape[0], shape[2], heads, head_size))
    reader = next(iter(output.uses())).node if used_once(output) else None
    if reader is not None and reader.graph is site.graph and _is_head_split(reader.outputs[0]):
        emitter.at(reader).replace([(reader.outputs[0], split)], "head merge absorbed")
        site.graph.remove(site.node, safe=True)
        emitter.count(form)
        return
    site.replace([(output, site.op("Transpose", split, perm=SWAP_HEADS))], form)
