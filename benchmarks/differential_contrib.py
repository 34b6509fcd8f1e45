"""Motifs that need a file's other operators: ONNX Runtime's own, and Attention and RotaryEmbedding of three axes."""

from __future__ import annotations

import numpy as np
from differential_attention import mask_array
from differential_registry import any_float, channels_last, motif, tokens
from differential_sketch import F16, F32, Sketch, Value

_MICROSOFT = "com.microsoft"


@motif(any_float, dtypes=(F32,))
def microsoft_activation(s: Sketch, x: Value) -> Value | None:
    """Gelu, FastGelu, QuickGelu and BiasGelu as ONNX Runtime's optimizer writes them."""
    if x.dtype != F32 or s.kind == "function" or not x.rank:
        return None
    kind = s.pick("Gelu", "FastGelu", "QuickGelu", "BiasGelu")
    if kind == "BiasGelu":
        return s.op(kind, x, s.vector(x.last), dims=x.dims, domain=_MICROSOFT) if x.last else None
    bias = s.vector(x.last) if kind == "FastGelu" and x.last and s.chance(0.5) else None
    attributes = {"alpha": float(s.pick(1.702, 1.0))} if kind == "QuickGelu" and s.chance(0.6) else {}
    return s.op(kind, x, bias, dims=x.dims, domain=_MICROSOFT, **attributes)


@motif(channels_last, dtypes=(F32,))
def microsoft_norm(s: Sketch, x: Value) -> Value | None:
    """SimplifiedLayerNormalization and SkipSimplifiedLayerNormalization."""
    if x.dtype != F32 or s.kind == "function":
        return None
    scale = s.vector(x.last, around=1.0)
    if s.chance(0.6) or x.rank != 3:
        return s.op("SimplifiedLayerNormalization", x, scale, dims=x.dims, axis=-1, epsilon=1e-5)
    other = s.op("Tanh", x, dims=x.dims)
    return s.op("SkipSimplifiedLayerNormalization", x, other, scale, dims=x.dims, domain=_MICROSOFT, epsilon=1e-5)


@motif(tokens, opset=23, weight=2.0, dtypes=(F32, F16))
def attention_of_three_axes(s: Sketch, x: Value) -> Value | None:
    """Attention of [batch, tokens, hidden] with head counts, shared heads, a mask, the default scale."""
    if x.dtype != s.dtype:
        return None
    heads = s.pick(1, 2, 4)
    shared = s.near(heads, 1)
    width = x.last // heads * shared
    k, v = (s.matmul(x, s.weight(x.last, width)) for _ in range(2))
    keys = x.dims[1]
    mask = s.input(s.dtype, (x.dims[1], keys), mask_array, "mask") if s.chance(0.3) else None
    attributes = {"q_num_heads": heads, "kv_num_heads": shared, "scale": s.pick(None, None, 0.4)}
    return s.op("Attention", x, k, v, mask, dims=x.dims, is_causal=s.near(None, 1), **attributes)


@motif(tokens, opset=23, dtypes=(F32,))
def rotary_operator(s: Sketch, x: Value) -> Value | None:
    """RotaryEmbedding with caches per position, interleaved or not."""
    length, size = x.dims[1], x.last // 2
    if x.dtype != F32 or not isinstance(length, int) or size % 2:
        return None
    y = s.transpose(s.reshape(x, [0, 0, 2, size], (x.dims[0], length, 2, size)), [0, 2, 1, 3])
    angle = s.rng.standard_normal((9, size // 2))
    cos, sin = (s.const(f(angle).astype(s.numpy)) for f in (np.cos, np.sin))
    place = s.input(7, (x.dims[0], length), lambda rng, shape: rng.integers(0, 9, shape), "position")
    y = s.op("RotaryEmbedding", y, cos, sin, place, dims=y.dims, interleaved=s.pick(0, 1))
    return s.reshape(s.transpose(y, [0, 2, 1, 3]), [0, 0, x.last], x.dims)


@motif(channels_last)
def parallel_blocks(s: Sketch, x: Value) -> Value:
    """Feed-forward networks and adapters of one value side by side, added."""
    parts = []
    kind = s.pick("Relu", "Tanh")
    for _ in range(2):
        wide = int(s.rng.integers(2, 2 * x.last + 1))
        h = s.add(s.matmul(x, s.weight(x.last, wide)), s.vector(wide))
        h = s.op(s.near(kind, "Sigmoid"), h, dims=h.dims)
        parts.append(s.matmul(h, s.weight(wide, x.last)))
    y = s.add(parts[0], parts[1])
    return s.add(y, x) if s.chance(0.5) else y


@motif(any_float)
def axes_in_and_out(s: Sketch, x: Value) -> Value:
    """Unsqueeze and Squeeze in a row, of the same axes or others."""
    y = s.unsqueeze(s.unsqueeze(x, [0]), [s.pick(0, 1)])
    y = s.op("Relu", y, dims=y.dims) if s.chance(0.3) else y
    if s.chance(0.3):
        return s.squeeze(y, [0])
    return s.squeeze(s.squeeze(y, [0]), [0])


@motif(channels_last)
def empty_parts(s: Sketch, x: Value) -> Value | None:
    """Constants without elements beside computed values; slices of everything; casts to the own type."""
    form = s.pick("concat", "slice", "cast")
    if form == "cast":
        return s.op("Relu", s.cast(s.op("Relu", x, dims=x.dims), x.dtype), dims=x.dims)
    if form == "slice":
        return s.slice(s.op("Tanh", x, dims=x.dims), -1, 0, s.pick(x.last, 2**31 - 1, x.last - 1))
    if not x.static or x.dtype != s.dtype:
        return None
    none = s.const(np.zeros((*x.dims[:-1], 0), s.numpy))
    return s.concat([x, none] if s.chance(0.5) else [none, x], -1)
