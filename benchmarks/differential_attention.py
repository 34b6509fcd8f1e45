"""Motifs of attention: every spelling of heads, scales and masks, rotary embeddings, caches, and near misses."""

from __future__ import annotations

import math

import numpy as np
from differential_registry import motif, tokens
from differential_sketch import BOOL, F16, F32, I32, I64, Array, Dim, Sketch, Value, broadcast

FILLS = (-np.inf, "lowest", -1e9, -1e4, -1.0, "half")
MASK_STYLES = ("full", "left", "right", "holes", "empty row", "empty", "one token", "random")


def mask_array(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A mask of ones and zeros over the last axis, in a style drawn at random."""
    style = MASK_STYLES[int(rng.integers(len(MASK_STYLES)))]
    mask = np.ones(shape, bool)
    if not mask.size or style == "full":
        return mask
    length = shape[-1]
    rows = mask.reshape(-1, length)
    if style == "empty":
        rows[:] = False
    elif style in ("random", "holes"):
        rows[:] = rng.random(rows.shape) < 0.7
        rows[:, -1] |= style == "holes"
    else:
        for i, row in enumerate(rows):
            keep = int(rng.integers(1, length + 1))
            if style == "one token":
                row[:] = np.arange(length) == keep - 1
            elif style == "left":
                row[:] = np.arange(length) >= length - keep
            else:
                row[:] = np.arange(length) < keep
                if style == "empty row" and i == 0:
                    row[:] = False
    return mask


def _fill(s: Sketch, dtype: int) -> float:
    chosen = s.pick(*FILLS)
    lowest = -65504.0 if dtype == F16 else -3.4028234663852886e38
    return (
        lowest
        if chosen == "lowest"
        else lowest / 2
        if chosen == "half"
        else max(float(chosen), lowest)
        if (chosen != -np.inf)
        else -np.inf
    )


def _condition(s: Sketch, batch: Dim, queries: Dim, keys: Dim) -> Value | None:
    """True where a key may be seen: bool, broadcast to [B, H, S, T]."""
    form = s.pick("padding", "padding", "padding4", "causal", "full", "square")
    if form == "causal" or (form == "square" and not (isinstance(queries, int) and isinstance(keys, int))):
        if not isinstance(queries, int) or not isinstance(keys, int):
            return _computed_causal(s, queries, keys)
        shape = (1,) * s.pick(0, 2) + (queries, keys)
        return s.const(np.tril(np.ones((queries, keys), bool), keys - queries).reshape(shape))
    kind = s.pick(BOOL, I64, I32, s.dtype)
    shape: tuple[Dim, ...] = {
        "padding": (batch, keys), "padding4": (batch, 1, 1, keys), "square": (queries, keys),
        "full": (batch, 1, queries, keys),
    }[form]  # fmt: skip
    mask = s.input(kind, shape, mask_array, "mask")
    if form == "padding":
        mask = s.unsqueeze(mask, [1, 2])
    if kind == BOOL:
        return mask
    if s.chance(0.5) and kind in (I64, I32):
        return s.cast(mask, BOOL)
    zero = s.const(np.asarray(0, mask_dtype(s, kind)))
    masked = s.op("Equal", mask, zero, dtype=BOOL)
    return s.op("Not", masked, dims=masked.dims, dtype=BOOL)


def mask_dtype(s: Sketch, kind: int) -> np.dtype:
    """NumPy's form of a mask's dtype."""
    return {I64: np.dtype(np.int64), I32: np.dtype(np.int32), BOOL: np.dtype(bool)}.get(kind, s.numpy)


def _computed_causal(s: Sketch, queries: Dim, keys: Dim) -> Value | None:
    names = {v.dims: v for v, _ in s.inputs.values() if v.rank >= 2}
    source = next(((v, i) for v in names.values() for i, d in enumerate(v.dims) if d == queries and d == keys), None)
    if source is None:
        return None
    value, axis = source
    shape = s.op("Shape", value, dims=(value.rank,), dtype=I64)
    size = s.op("Gather", shape, s.const(np.asarray(axis, np.int64)), dims=(), dtype=I64, axis=0)
    zero, one = s.const(np.asarray(0, np.int64)), s.const(np.asarray(1, np.int64))
    steps = s.op("Range", zero, size, one, dims=(queries,), dtype=I64)
    rows = s.unsqueeze(steps, [1])
    masked = s.op("Less", rows, s.unsqueeze(steps, [0]), dims=(queries, keys), dtype=BOOL)
    return s.op("Not", masked, dims=masked.dims, dtype=BOOL)


def mask_logits(s: Sketch, logits: Value, batch: Dim) -> Value | None:
    """One mask step on logits [.., S, T]; None where it does not fit them."""
    if logits.rank != 4:
        cond = s.const(s.rng.random((1, logits.last)) < 0.7) if logits.last else None
    else:
        cond = _condition(s, batch, logits.dims[2], logits.dims[3])
    if cond is None:
        return None
    fill = _fill(s, logits.dtype)
    form = s.pick("where", "where", "inverse", "select", "select", "product", "gate", "bias")
    if form == "where":
        return s.op("Where", cond, logits, s.literal(fill, logits), dtype=logits.dtype)
    if form == "inverse":
        closed = s.op("Not", cond, dims=cond.dims, dtype=BOOL)
        return s.op("Where", closed, s.literal(fill, logits), logits, dtype=logits.dtype)
    if form == "select":
        pair = s.const(np.zeros((), s.numpy)), s.const(np.asarray(fill).astype(s.numpy))
        bias = s.op("Where", cond, *(p if p.dtype == logits.dtype else s.cast(p, logits.dtype) for p in pair),
                    dims=cond.dims, dtype=logits.dtype)  # fmt: skip
        return s.either("Add", logits, bias)
    if form == "bias":
        if not logits.static:
            return None
        bias = s.const(s.rng.standard_normal(logits.dims[-3:] if logits.rank > 2 else logits.dims).astype(s.numpy))
        return s.add(logits, bias if bias.dtype == logits.dtype else s.cast(bias, logits.dtype))
    number = s.cast(cond, logits.dtype)
    if form == "gate":
        return s.op("Mul", logits, number)
    closed = (
        s.op("Sub", s.const(np.ones((), s.numpy).astype(mask_dtype(s, -1))), number, dims=number.dims)
        if (number.dtype == s.dtype)
        else s.op("Sub", s.cast(s.const(np.ones((), s.numpy)), number.dtype), number, dims=number.dims)
    )
    finite = fill if math.isfinite(fill) else -1e4
    return s.either("Add", logits, s.mul(closed, finite))


def attend(s: Sketch, q: Value, k: Value, v: Value, k_turned: bool = False) -> Value | None:
    """softmax(q k^T) v with scales, masks, and a guard; operands [.., S, D], [.., T, D] or [.., D, T], [.., T, Dv]."""
    scale = 1 / math.sqrt(q.last or 8)
    scale = s.near(scale, 1.0, 3.0, -0.5, p=0.2)
    where = s.pick("logits", "logits", "query", "both", "none")
    if where == "query":
        q = s.mul(q, scale)
    elif where == "both" and scale > 0:
        q, k = s.mul(q, math.sqrt(scale)), s.mul(k, math.sqrt(scale))
    turned = [*list(range(k.rank - 2)), k.rank - 1, k.rank - 2]
    kt = k if k_turned else s.transpose(k, turned)
    logits = s.matmul(q, kt)
    if where == "logits":
        logits = s.mul(logits, scale)
    if s.chance(0.08) and logits.rank == 4 and isinstance(logits.dims[1], int):
        shape = (logits.dims[1], 1, s.near(1, logits.last or 1))
        temperature = s.const((1 + 0.2 * s.rng.random(shape)).astype(s.numpy))
        logits = s.mul(logits, temperature)
    if s.chance(0.08):
        logits = s.mul(s.op("Tanh", s.mul(logits, 0.2)), 5.0)
    for _ in range(s.pick(0, 1, 1, 2)):
        masked = mask_logits(s, logits, q.dims[0])
        logits = logits if masked is None else masked
        if s.chance(0.12):
            logits = s.mul(logits, s.pick(0.5, 2.0, 1e-4))
    if s.chance(0.1):
        s.live.append(logits)
    weights = _weights(s, logits)
    if s.chance(0.06):
        s.live.append(weights)
    return s.matmul(weights, v)


def _weights(s: Sketch, logits: Value) -> Value:
    wide = logits.dtype == F16 and s.chance(0.5)
    source = s.cast(logits, F32) if wide else logits
    w = s.softmax(source, s.near(-1, source.rank - 1, source.rank - 2, p=0.25) if s.opset >= 13 else -1)
    w = s.cast(w, logits.dtype) if wide else w
    if s.chance(0.15):
        test = s.op("IsNaN", w, dims=w.dims, dtype=BOOL)
        w = s.op("Where", test, s.literal(0.0, w), w, dtype=w.dtype)
    if s.chance(0.1):
        w = s.op("Dropout", w, dims=w.dims)
    if s.chance(0.06):
        w = s.mul(w, s.pick(1.0, 0.5))
    return w


@motif(tokens, weight=3.0)
def self_attention(s: Sketch, x: Value) -> Value | None:
    """Heads of projected tokens: split in several ways, shared by groups, rotated, merged again."""
    if x.dtype != s.dtype:
        return None
    heads = s.pick(1, 2, 4)
    size = s.pick(4, 8)
    shared = s.pick(heads, heads, 1, 2 if heads == 4 else heads)
    b, n = x.dims[0], x.dims[1]

    def project(count: int) -> Value:
        y = s.matmul(x, s.weight(x.last, count * size))
        y = s.add(y, s.vector(count * size)) if s.chance(0.4) else y
        y = s.reshape(y, s.pick([0, 0, count, size], [0, 0, count, -1], [0, 0, -1, size]), (b, n, count, size))
        return s.transpose(y, [0, 2, 1, 3])

    if s.chance(0.2) and shared == heads:
        packed = s.matmul(x, s.weight(x.last, 3 * heads * size))
        if s.chance(0.5):
            parts = s.split(packed, -1, [heads * size] * 3)
            q, k, v = (s.transpose(s.reshape(p, [0, 0, heads, size], (b, n, heads, size)), [0, 2, 1, 3]) for p in parts)
        else:
            packed = s.reshape(packed, [0, 0, 3, heads, size], (b, n, 3, heads, size))
            packed = s.transpose(packed, [2, 0, 3, 1, 4])
            index = [s.const(np.asarray(i, np.int64)) for i in range(3)]
            q, k, v = (s.op("Gather", packed, i, dims=packed.dims[1:], dtype=x.dtype, axis=0) for i in index)
    else:
        q, k, v = project(heads), project(shared), project(shared)
    if s.chance(0.25):
        q, k = rotate(s, q), rotate(s, k)
    if s.chance(0.1):
        past = s.input(x.dtype, (b, shared, "P", size), lambda rng, shape: rng.standard_normal(shape), "past")
        k, v = s.concat([past, k], 2), s.concat([past, v], 2)
        s.outputs.append(k)
    if shared != heads:
        k, v = (_repeated(s, t, heads // shared) for t in (k, v))
    y = attend(s, q, k, v)
    if y is None:
        return None
    y = s.transpose(y, [0, 2, 1, 3])
    y = s.reshape(y, [0, 0, heads * size], (b, n, heads * size))
    return s.matmul(y, s.weight(heads * size, x.last)) if s.chance(0.7) else y


def _repeated(s: Sketch, x: Value, times: int) -> Value:
    """Heads repeated for groups of queries; tiled instead, now and then, which is something else."""
    heads = x.dims[1]
    assert isinstance(heads, int)
    dims = (x.dims[0], heads * times, *x.dims[2:])
    if s.chance(0.12):
        return s.op("Tile", x, s.ints([1, times, 1, 1]), dims=dims)
    y = s.unsqueeze(x, [2])
    wide = (x.dims[0], heads, times, *x.dims[2:])
    y = s.op("Expand", y, s.ints([1, 1, times, 1, 1]), dims=wide)
    shape = s.op("Shape", x, dims=(4,), dtype=I64)
    n, length = (s.op("Gather", shape, s.ints([i]), dims=(1,), dtype=I64, axis=0) for i in (0, 2))
    target = s.concat([n, s.ints([heads * times]), length, s.ints([x.last])], 0)
    return s.op("Reshape", y, target, dims=dims)


def rotate(s: Sketch, x: Value) -> Value:
    """A rotary embedding of [B, H, S, D] in one of its spellings, sometimes with a wrong sign or order."""
    size = x.last
    half = size // 2
    length = x.dims[2] if isinstance(x.dims[2], int) else 1
    angle = s.rng.standard_normal((length, half))
    paired = s.chance(0.3)
    full = np.repeat(angle, 2, -1) if paired else np.concatenate([angle, angle], -1)
    if s.chance(0.08):
        full = s.rng.standard_normal(full.shape)
    shape = s.pick((length, size), (1, 1, length, size))
    cos, sin = (s.const(f(full).reshape(shape).astype(s.numpy), "w") for f in (np.cos, np.sin))
    if paired:
        even, odd = s.slice(x, -1, 0, 2**31 - 1, 2), s.slice(x, -1, 1, 2**31 - 1, 2)
        first, second = s.op("Neg", odd, dims=odd.dims), even
        pair = s.concat([s.unsqueeze(first, [4]), s.unsqueeze(second, [4])], -1)
        turned = s.reshape(pair, [0, 0, -1, size] if not isinstance(x.dims[2], int) else [0, 0, 0, size], x.dims)
    else:
        low, high = (
            s.split(x, -1, [half, half])
            if s.chance(0.4)
            else [s.slice(x, -1, 0, half), s.slice(x, -1, half, 2**63 - 1)]
        )
        parts = s.near([s.op("Neg", high, dims=high.dims), low], [high, low], [s.op("Neg", low, dims=low.dims), high])
        turned = s.concat(parts, -1)
    return s.add(s.either("Mul", x, cos), s.either("Mul", turned, sin))


@motif(tokens)
def rotary_alone(s: Sketch, x: Value) -> Value | None:
    """Heads that are rotated and merged again."""
    if x.dtype != s.dtype:
        return None
    size = x.last // 2
    y = s.reshape(x, [0, 0, 2, size], (x.dims[0], x.dims[1], 2, size))
    y = rotate(s, s.transpose(y, [0, 2, 1, 3]))
    y = s.transpose(y, [0, 2, 1, 3])
    return s.reshape(y, [0, 0, x.last], x.dims)


@motif(lambda x: x.is_float and 2 <= x.rank <= 5 and x.last >= 2, weight=2.5)
def attention_of_inputs(s: Sketch, x: Value) -> Value | None:
    """Queries behind a value, keys and values as inputs, in two to five axes, keys stored either way."""
    if x.dtype != s.dtype:
        return None
    lead, keys = x.dims[:-2], s.pick("T", 3, 5)
    turned = s.chance(0.4)
    wide = s.near(x.last, 5)
    narrow = (*lead[:-1], 1) if lead and s.chance(0.1) else lead
    normal = lambda rng, shape: rng.standard_normal(shape)  # noqa: E731
    k = s.input(s.dtype, (*narrow, x.last, keys) if turned else (*narrow, keys, x.last), normal, "k")
    v = s.input(s.dtype, (*narrow, keys, wide), normal, "v")
    y = attend(s, x, k, v, turned)
    return None if y is None else Value(y.name, y.dtype, (*broadcast(lead, narrow), x.dims[-2], wide))


@motif(lambda x: x.is_float and x.rank == 4 and x.last >= 2, dtypes=(F32,))
def attention_by_einsum(s: Sketch, x: Value) -> Value | None:
    """Both products as Einsum, heads as the second or third axis."""
    if x.dtype != F32:
        return None
    keys = s.pick("T", 4)
    form = s.pick("bhsd,bhtd->bhst", "bshd,bthd->bhst")
    middle = form.startswith("bsh")
    b, one, two, d = x.dims
    heads, queries = (two, one) if middle else (one, two)
    dims = (b, keys, heads, d) if middle else (b, heads, keys, d)
    k, v = (s.input(F32, dims, lambda rng, shape: rng.standard_normal(shape), "k") for _ in range(2))
    logits = s.op("Einsum", x, k, dims=(b, heads, queries, keys), equation=form)
    logits = s.mul(logits, 0.4)
    masked = mask_logits(s, logits, b) if s.chance(0.6) else None
    w = _weights(s, logits if masked is None else masked)
    back = "bhst,bthd->bshd" if middle else "bhst,bhtd->bhsd"
    return s.op("Einsum", w, v, dims=x.dims, equation=back)


@motif(lambda x: x.is_float and x.rank == 4 and x.last >= 2, opset=23, weight=3.0, dtypes=(F32, F16))
def attention_operator(s: Sketch, x: Value) -> Value | None:
    """Attention as an operator, with and without scale, mask, cap and causal rule."""
    if x.dtype != s.dtype or not isinstance(x.dims[1], int):
        return None
    keys = s.pick("T", 4)
    dims = (x.dims[0], x.dims[1], keys, x.last)
    k, v = (s.input(s.dtype, dims, lambda rng, shape: rng.standard_normal(shape), "k") for _ in range(2))
    k = s.mul(k, 0.5) if s.chance(0.3) else k
    mask = None
    if s.chance(0.5):
        mask = s.input(s.pick(BOOL, s.dtype), (x.dims[2], keys), mask_array, "mask")
    attributes = {"scale": s.pick(None, 0.3), "softcap": s.near(None, 2.0), "is_causal": s.near(None, 1)}
    return s.op("Attention", x, k, v, mask, dims=x.dims, **attributes)
