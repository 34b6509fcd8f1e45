"""Motifs that move elements: views, transposes, slices, gathers, shapes that are computed, reductions and indices."""

from __future__ import annotations

from math import prod

import numpy as np
from differential_registry import any_float, any_value, axes_float, channels_last, motif, static_float
from differential_sketch import BOOL, F16, F32, F64, I32, I64, Dim, Sketch, Value, broadcast


def _permutation(s: Sketch, rank: int) -> list[int]:
    return [int(i) for i in s.rng.permutation(rank)]


@motif(axes_float, weight=1.5)
def transposes(s: Sketch, x: Value) -> Value:
    """Transposes around something that does not mind, undone or not."""
    first = _permutation(s, x.rank)
    y = s.transpose(x, first)
    if s.chance(0.5):
        y = s.op(s.pick("Relu", "Neg", "Tanh"), y, dims=y.dims)
    back = [int(i) for i in np.argsort(first)]
    return s.transpose(y, s.near(back, _permutation(s, x.rank), list(range(x.rank)), p=0.3))


@motif(static_float, weight=1.5)
def views(s: Sketch, x: Value) -> Value:
    """Reshape, Flatten, Squeeze and Unsqueeze in a row, with 0 and -1 in the target."""
    y = x
    for _ in range(int(s.rng.integers(1, 4))):
        inner = prod(d for d in y.dims[1:] if isinstance(d, int))
        form = s.pick("flatten", "unsqueeze", "squeeze", "merge", "split", "same")
        if form == "flatten":
            y = s.op("Flatten", y, dims=(y.dims[0], inner), axis=1)
        elif form == "unsqueeze":
            y = s.unsqueeze(y, [s.pick(0, 1, y.rank, -1)])
            if y.dims[0] == 1 and y.rank > 1 and not isinstance(y.dims[1], int):
                y = s.squeeze(y, [0])
        elif form == "squeeze":
            ones = [i for i, d in enumerate(y.dims) if d == 1 and i]
            y = s.squeeze(y, [s.pick(*ones)]) if ones else y
        elif form == "merge":
            y = s.reshape(y, [s.pick(0, -1), inner] if s.chance(0.5) else [0, -1], (y.dims[0], inner))
        elif form == "split" and inner % 2 == 0 and inner:
            y = s.reshape(y, s.pick([0, 2, -1], [0, 2, inner // 2], [-1, 2, inner // 2]), (y.dims[0], 2, inner // 2))
        else:
            y = s.reshape(y, [0] * y.rank, y.dims)
    return y


@motif(static_float)
def transpose_between_views(s: Sketch, x: Value) -> Value | None:
    """A view, a transpose, and a view that undoes the first one or does not."""
    inner = prod(d for d in x.dims[1:] if isinstance(d, int))
    if inner % 6:
        return None
    y = s.reshape(x, [0, 2, 3, inner // 6], (x.dims[0], 2, 3, inner // 6))
    y = s.transpose(y, s.pick([0, 2, 1, 3], [0, 3, 1, 2], [0, 1, 3, 2], [0, 2, 3, 1]))
    return s.reshape(y, [0, -1], (x.dims[0], inner))


@motif(axes_float)
def slices(s: Sketch, x: Value) -> Value | None:
    """Slices: whole, partial, backwards, in steps, beyond the end."""
    axes = [i for i, d in enumerate(x.dims) if isinstance(d, int) and d >= 2]
    if not axes:
        return s.slice(x, 0, 0, s.pick(2**31 - 1, 2**63 - 1), size=x.dims[0])
    axis = int(s.pick(*axes))
    bounds = s.pick((0, 2**63 - 1, 1), (0, 1, 1), (1, 2**31 - 1, 1), (-1, -(2**31), -1), (0, 1000, 2), (0, -1, 1))
    written = axis - x.rank if s.chance(0.5) else axis
    y = s.slice(x, written, *bounds)
    return s.add(y, y) if s.chance(0.3) else y


@motif(channels_last)
def split_concat(s: Sketch, x: Value) -> Value:
    """Split and join again, in the same order or another, with something between."""
    n = x.last
    first = int(s.rng.integers(1, n))
    parts = s.split(x, -1, [first, n - first])
    if s.chance(0.5):
        parts[0] = s.op(s.pick("Relu", "Neg"), parts[0], dims=parts[0].dims)
    if s.chance(0.3):
        parts = parts[::-1]
    return s.concat(parts, -1)


@motif(channels_last)
def split_slices(s: Sketch, x: Value) -> Value:
    """The same halves by slices, joined with a part that has no elements now and then."""
    half = x.last // 2
    first, second = s.slice(x, -1, 0, half), s.slice(x, -1, half, 2**63 - 1)
    parts = [first, second] if s.chance(0.6) else [second, first]
    if s.chance(0.3):
        parts.append(s.slice(x, -1, 0, 0))
    return s.concat(parts, -1)


@motif(axes_float)
def gathers(s: Sketch, x: Value) -> Value | None:
    """Gather with one index, several, negative ones, or a matrix of them."""
    axes = [i for i, d in enumerate(x.dims) if isinstance(d, int) and d >= 1]
    if not axes:
        return None
    axis = int(s.pick(*axes))
    size = x.dims[axis]
    shape = s.pick((), (1,), (2,), (2, 2), (3,))
    index = s.ints(s.rng.integers(-size, size, shape))
    return s.op("Gather", x, index, dims=(*x.dims[:axis], *shape, *x.dims[axis + 1 :]), axis=axis)


@motif(lambda x: x.is_float and x.static and x.rank >= 2 and x.dims[0] not in (0,))
def gather_elements(s: Sketch, x: Value) -> Value:
    """GatherElements, GatherND and their scatters, on constant indices."""
    form = s.pick("GatherElements", "GatherND", "ScatterElements", "ScatterND")
    axis = int(s.rng.integers(x.rank))
    if form == "GatherElements":
        index = s.ints(s.rng.integers(0, x.dims[axis], x.dims))
        return s.op(form, x, index, dims=x.dims, axis=axis)
    if form == "GatherND":
        index = s.ints(s.rng.integers(0, x.dims[0], (2, 1)))
        return s.op(form, x, index, dims=(2, *x.dims[1:]))
    if form == "ScatterElements":
        rows = np.stack([s.rng.permutation(x.dims[0])[:1]] * prod(x.dims[1:]), -1).reshape(1, *x.dims[1:])
        updates = s.const(s.rng.standard_normal(rows.shape).astype(s.numpy))
        return s.op(form, x, s.ints(rows), s.cast(updates, x.dtype), dims=x.dims, axis=0)
    index = s.ints([[int(s.rng.integers(x.dims[0]))]])
    updates = s.const(s.rng.standard_normal((1, *x.dims[1:])).astype(s.numpy))
    return s.op(form, x, index, s.cast(updates, x.dtype), dims=x.dims)


@motif(axes_float, weight=1.5)
def shape_arithmetic(s: Sketch, x: Value) -> Value | None:
    """Shapes that are computed from shapes: what exporters write for dynamic sizes."""
    shape = s.op("Shape", x, dims=(x.rank,), dtype=I64)
    form = s.pick("same", "rows", "expand", "zeros", "range", "tile", "size", "slice")
    if form == "same":
        return s.op("Reshape", x, shape, dims=x.dims)
    if form == "rows":
        first = s.slice(shape, 0, 0, 1)
        target = s.concat([first, s.ints([-1])], 0)
        if x.rank < 2:
            return None
        inner = prod(x.dims[1:]) if all(isinstance(d, int) for d in x.dims[1:]) else None
        return s.op("Reshape", x, target, dims=(x.dims[0], inner))
    if form == "expand":
        row = s.vector(x.last) if x.last else s.literal(0.5, x)
        wide = s.op("Expand", s.cast(row, x.dtype), shape, dims=broadcast(row.dims, x.dims))
        return s.add(x, wide)
    if form == "zeros":
        from onnx import helper, numpy_helper

        number = numpy_helper.from_array(np.full(1, s.pick(0, 1, 0.5), helper.tensor_dtype_to_np_dtype(x.dtype)))
        filled = s.op("ConstantOfShape", shape, dims=x.dims, dtype=x.dtype, value=number)
        return s.either(s.pick("Add", "Mul"), x, filled)
    if form == "range":
        index = s.op("Gather", shape, s.const(np.asarray(s.pick(0, -1), np.int64)), dims=(), axis=0)
        whole = Value(index.name, I64, ())
        zero, one = s.const(np.asarray(0, np.int64)), s.const(np.asarray(1, np.int64))
        steps = s.op("Range", zero, whole, one, dims=(None,), dtype=I64)
        return s.add(s.reduce("ReduceSum", s.cast(steps, x.dtype), None, 0), x)
    if form == "tile":
        times = [1] * x.rank
        times[int(s.rng.integers(x.rank))] = s.pick(1, 2)
        dims = [d if t == 1 else d * t if isinstance(d, int) else None for d, t in zip(x.dims, times, strict=True)]
        return s.op("Tile", x, s.ints(times), dims=dims)
    if form == "size":
        size = s.op("Size", x, dims=(), dtype=I64)
        return s.op("Div", x, s.op("Add", s.cast(size, x.dtype), 1.0))
    if not isinstance(x.dims[0], str):
        return None
    end = s.op("Gather", shape, s.ints([0]), dims=(1,), dtype=I64, axis=0)
    return s.op("Slice", x, s.ints([0]), end, s.ints([0]), dims=x.dims)


@motif(static_float)
def computed_target(s: Sketch, x: Value) -> Value | None:
    """A Reshape whose target is put together from sizes and products of sizes."""
    if x.rank != 3:
        return None
    shape = s.op("Shape", x, dims=(3,), dtype=I64)
    index = [s.const(np.asarray(i, np.int64)) for i in range(3)]
    n, a, b = (s.op("Gather", shape, i, dims=(), dtype=I64, axis=0) for i in index)
    if s.chance(0.5):
        parts = [n, s.op("Mul", a, b, dims=())]
        dims: tuple[Dim, ...] = (x.dims[0], prod(x.dims[1:]))
    else:
        parts = [s.op("Mul", n, a, dims=()), b]
        dims = (x.dims[0] * x.dims[1] if isinstance(x.dims[0], int) else None, x.dims[2])
    target = s.concat([s.unsqueeze(Value(p.name, I64, ()), [0]) for p in parts], 0)
    return s.op("Reshape", x, target, dims=dims)


@motif(axes_float, weight=1.5)
def reductions(s: Sketch, x: Value) -> Value:
    """Reductions over one, several or all axes, keeping dims or not."""
    kind = s.pick(*(f"Reduce{k}" for k in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")))
    if kind in ("ReduceMax", "ReduceMin") and not x.static:
        kind = "ReduceSum"
    if s.chance(0.08):
        y = s.add(s.op("Abs", x, dims=x.dims), 0.5)
        return s.reduce("ReduceLogSum", y, [y.rank - 1], 1)
    count = int(s.rng.integers(1, x.rank + 1))
    axes = sorted(int(a) for a in s.rng.permutation(x.rank)[:count])
    keep = s.pick(0, 1)
    y = s.reduce(kind, x, axes if s.chance(0.85) else None, keep)
    return s.op("Sub", x, y) if keep and s.chance(0.5) else y


@motif(channels_last)
def indices(s: Sketch, x: Value) -> Value | None:
    """ArgMax, TopK and OneHot on the last axis, whose numbers are told apart by a ramp."""
    if x.dtype == F16:
        return None
    ramp = s.const((np.arange(x.last) * 1e-2).astype(s.numpy))
    y = s.add(s.op("Tanh", x, dims=x.dims), s.cast(ramp, x.dtype))
    form = s.pick("ArgMax", "ArgMin", "TopK", "OneHot")
    if form == "TopK":
        k = int(s.rng.integers(1, x.last + 1))
        dims = (*x.dims[:-1], k)
        return s.ops("TopK", [y, s.ints([k])], [dims, dims], [None, I64], axis=-1)[0]
    kind = "ArgMax" if form == "OneHot" else form
    index = s.op(kind, y, dims=x.dims[:-1], dtype=I64, axis=-1, keepdims=0)
    if form == "OneHot":
        values = s.const(np.asarray([0.0, 1.0], s.numpy))
        return s.op("OneHot", index, s.ints([x.last]), values, dims=(*x.dims[:-1], x.last), dtype=s.dtype, axis=-1)
    return s.mul(s.cast(index, x.dtype), 0.25)


@motif(channels_last, dtypes=(F32, F64))
def running_sums(s: Sketch, x: Value) -> Value:
    """CumSum in its four forms."""
    axis = s.const(np.asarray(s.pick(-1, x.rank - 1, 0), s.pick(np.int32, np.int64)))
    y = x if x.dtype in (F32, F64) else s.cast(x, F32)
    return s.op("CumSum", y, axis, dims=x.dims, exclusive=s.pick(0, 1), reverse=s.pick(0, 1))


@motif(lambda x: x.is_float and x.rank >= 2, opset=14)
def triangles(s: Sketch, x: Value) -> Value:
    """Trilu, upper or lower, shifted."""
    shift = s.const(np.asarray(s.pick(0, 1, -1, -5), np.int64)) if s.chance(0.6) else None
    return s.op("Trilu", x, shift, dims=x.dims, upper=s.pick(0, 1))


@motif(lambda x: x.is_float and x.rank >= 1)
def pads(s: Sketch, x: Value) -> Value | None:
    """Pads by constants, edges and reflections; by nothing; by negative numbers."""
    mode = s.pick("constant", "constant", "edge", "reflect")
    amounts = [[0, 0] for _ in range(x.rank)]
    axes = [i for i, d in enumerate(x.dims) if isinstance(d, int) and d >= 2]
    if axes and s.chance(0.75):
        amounts[int(s.pick(*axes))] = s.pick([1, 0], [0, 1], [1, 1], [0, -1] if mode == "constant" else [1, 1])
    dims = [d + sum(a) if isinstance(d, int) else d for d, a in zip(x.dims, amounts, strict=True)]
    written = s.ints([a[0] for a in amounts] + [a[1] for a in amounts])
    number = s.const(np.asarray(s.pick(0.0, 0.7), s.numpy)) if mode == "constant" and s.chance(0.5) else None
    if number is not None and number.dtype != x.dtype:
        number = s.cast(number, x.dtype)
    return s.op("Pad", x, written, number, dims=dims, mode=mode)


@motif(axes_float)
def expanded(s: Sketch, x: Value) -> Value:
    """Expand to its own shape, to one more axis, or along an axis of one."""
    form = s.pick("ones", "more", "wide")
    if form == "ones":
        return s.op("Expand", x, s.ints([1] * s.pick(1, x.rank)), dims=x.dims)
    if form == "more":
        return s.op("Expand", x, s.ints([s.pick(1, 2)] + [1] * x.rank), dims=(None, *x.dims))
    y = s.reduce("ReduceMean", x, [x.rank - 1], 1)
    return s.op("Expand", y, s.ints([1] * (x.rank - 1) + [3]), dims=(*x.dims[:-1], 3))


@motif(axes_float)
def repeated_work(s: Sketch, x: Value) -> Value:
    """The same subexpression twice, once with another attribute or constant."""
    kind, change = s.pick("ReduceMean", "Softmax", "Mul", "Cast"), s.chance(0.3)
    if kind == "ReduceMean":
        a = s.reduce(kind, x, [-1], 1)
        b = s.reduce(kind, x, [-1 if not change else 0], 1)
    elif kind == "Softmax":
        a, b = s.softmax(x, -1), s.softmax(x, x.rank - 1 if not change else -1)
    elif kind == "Mul":
        a, b = s.op("Mul", x, 0.3), s.op("Mul", x, 0.3 if not change else 0.30001)
    else:
        a, b = s.cast(x, F64), s.cast(x, F64)
        return s.cast(s.op("Sub", a, b), x.dtype)
    return s.op("Add", a, b)


@motif(any_value)
def constants_alone(s: Sketch, x: Value) -> Value | None:
    """A subgraph of constants: folded, at every opset."""
    if not x.is_float:
        return None
    a, b = s.weight(2, 4), s.weight(4, 3)
    y = s.matmul(a, b)
    y = s.op(s.pick("Relu", "Tanh", "Abs"), y, dims=y.dims)
    y = s.reduce(s.pick("ReduceMean", "ReduceSum", "ReduceMax"), y, s.pick([0], [0, 1]), 0)
    if s.chance(0.4):
        y = s.reduce("ReduceSum", y, None, 0)
    y = s.reduce("ReduceMean", y, None, 0)
    return s.add(x, s.cast(y, x.dtype))


@motif(channels_last)
def distances(s: Sketch, x: Value) -> Value | None:
    """NonZero, Compress, ReverseSequence and Unique: data-dependent or seldom used."""
    form = s.pick("NonZero", "Compress", "EyeLike", "Hardmax", "LpNormalization", "Shrink")
    if form == "NonZero":
        found = s.op("NonZero", s.op("Greater", x, 0.0, dtype=BOOL), dims=(x.rank, None), dtype=I64)
        count = s.op("Shape", found, dims=(2,), dtype=I64)
        number = s.reduce("ReduceMax", s.cast(count, F32), None, 0)
        return s.add(x, s.cast(number, x.dtype))
    if form == "Compress":
        keep = s.rng.random(x.last) < 0.6
        keep[0] = True
        return s.op("Compress", x, s.const(keep), dims=(*x.dims[:-1], int(keep.sum())), axis=x.rank - 1)
    if form == "EyeLike":
        if x.rank != 2 or x.dtype == F16:
            return None
        return s.add(x, s.op("EyeLike", x, dims=x.dims, k=s.pick(0, 1)))
    if form == "LpNormalization":
        return s.op(form, s.add(x, 0.1), axis=-1, p=s.pick(1, 2)) if x.dtype != F16 else None
    if form == "Shrink":
        return s.op(form, x, dims=x.dims, lambd=0.3, bias=s.pick(0.0, 0.1)) if x.dtype != F16 else None
    return s.op("Hardmax", x, dims=x.dims, axis=-1) if x.dtype == F32 else None


@motif(any_float)
def index_casts(s: Sketch, x: Value) -> Value | None:
    """Lookup of a table by computed indices that are cast between integer types."""
    if x.rank > 3 or x.dtype == F16:
        return None
    scaled = s.op("Mul", s.op("Abs", s.op("Tanh", x, dims=x.dims), dims=x.dims), 5.0)
    index = s.cast(s.cast(scaled, I32), s.pick(I32, I64))
    table = s.weight(7, 4, scale=1.0)
    return s.op("Gather", table, index, dims=(*x.dims, 4), axis=0)
