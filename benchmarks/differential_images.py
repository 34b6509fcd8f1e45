"""Motifs of convolutional networks: convolutions and what is merged into them, pools, shuffles, sizes that change."""

from __future__ import annotations

from typing import Any

import numpy as np
from differential_registry import image, motif, plane
from differential_sketch import F16, F32, Dim, Sketch, Value


def _channels(x: Value) -> int:
    assert isinstance(x.dims[1], int)
    return x.dims[1]


def _extent(size: Dim, kernel: int, stride: int, dilation: int, pad: tuple[int, int]) -> Dim:
    if not isinstance(size, int):
        return size if stride == 1 and sum(pad) == dilation * (kernel - 1) else None
    return (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1


def conv(s: Sketch, x: Value, outputs: int, kernel: int = 3, **options: Any) -> Value | None:
    """A Conv; options: group, stride, dilation, pad (per side), bias. None where the kernel exceeds the image."""
    space = x.rank - 2
    group, stride, dilation = options.get("group", 1), options.get("stride", 1), options.get("dilation", 1)
    pad = options.get("pad", (kernel // 2, kernel // 2))
    dims = [_extent(d, kernel, stride, dilation, pad) for d in x.dims[2:]]
    if any(isinstance(d, int) and d < 1 for d in dims):
        return None
    w = s.weight(outputs, _channels(x) // group, *[kernel] * space)
    b = s.vector(outputs) if options.get("bias", s.chance(0.5)) else None
    attributes = {
        "group": group if group != 1 or s.chance(0.3) else None,
        "strides": [stride] * space if stride != 1 or s.chance(0.3) else None,
        "dilations": [dilation] * space if dilation != 1 else None,
        "kernel_shape": [kernel] * space if s.chance(0.6) else None,
        "pads": [pad[0]] * space + [pad[1]] * space if any(pad) or s.chance(0.3) else None,
    }
    return s.op("Conv", x, w, b, dims=(x.dims[0], outputs, *dims), **attributes)


def batch_norm(s: Sketch, x: Value) -> Value:
    """A BatchNormalization with random statistics, as an operator or spelled out."""
    c = _channels(x)
    scale, bias = s.vector(c, around=1.0), s.vector(c)
    mean, var = s.vector(c), s.const((0.2 + s.rng.random(c)).astype(s.numpy))
    epsilon = float(s.pick(1e-5, 1e-3, 0.1))
    if s.chance(0.85):
        return s.op("BatchNormalization", x, scale, bias, mean, var, dims=x.dims, epsilon=epsilon)
    shape = (c,) + (1,) * (x.rank - 2)
    factor = s.const((1 + 0.3 * s.rng.standard_normal(shape)).astype(s.numpy))
    return s.add(s.mul(x, factor), s.const(s.rng.standard_normal(shape).astype(s.numpy)))


def _options(s: Sketch, c: int) -> dict[str, Any]:
    kernel = s.pick(1, 2, 3)
    return {
        "kernel": kernel,
        "group": s.pick(1, 1, 1, c, 2 if c % 2 == 0 else 1),
        "stride": s.pick(1, 1, 1, 2),
        "dilation": s.pick(1, 1, 1, 2),
        "pad": s.pick((0, 0), (kernel // 2, kernel // 2), (1, 0), (0, 1)),
    }


@motif(image, weight=2.0, dtypes=(F32,))
def convolution(s: Sketch, x: Value) -> Value | None:
    """A convolution of any form, with BatchNorm behind or before it."""
    c = _channels(x)
    options = _options(s, c)
    if s.chance(0.2):
        x = batch_norm(s, x)
    y = conv(s, x, options["group"] * int(s.rng.integers(1, 4)), **options)
    if y is None:
        return None
    if s.chance(0.15):
        s.live.append(y)
    y = batch_norm(s, y) if s.chance(0.6) else y
    return s.op("Relu", y, dims=y.dims) if s.chance(0.4) else y


@motif(image, dtypes=(F32,))
def transposed_convolution(s: Sketch, x: Value) -> Value | None:
    """ConvTranspose with BatchNorm."""
    if x.rank > 4 or not all(isinstance(d, int) for d in x.dims[2:]):
        return None
    space, outputs, stride, kernel = x.rank - 2, int(s.rng.integers(2, 5)), s.pick(1, 2), s.pick(2, 3)
    dims = [(d - 1) * stride + kernel for d in x.dims[2:]]
    if max(dims) > 12:
        return None
    w = s.weight(_channels(x), outputs, *[kernel] * space)
    y = s.op("ConvTranspose", x, w, dims=(x.dims[0], outputs, *dims), strides=[stride] * space)
    return batch_norm(s, y) if s.chance(0.6) else y


@motif(plane, weight=2.0, dtypes=(F32,))
def parallel_branches(s: Sketch, x: Value) -> Value | None:
    """Branches of RepVGG's kind: kernels of several sizes, identity, pools, BatchNorm; centres aligned or not."""
    c = _channels(x)
    stride, group = s.pick(1, 1, 2), s.pick(1, 1, c)
    branches: list[Value | None] = []
    for _ in range(int(s.rng.integers(2, 4))):
        kernel = s.pick(1, 3, 3, 2)
        pad = s.near((kernel // 2, kernel // 2) if kernel != 2 else (0, 1), (1, 1), (0, 0))
        branches.append(conv(s, x, c, kernel, stride=stride, group=group, pad=pad, dilation=s.near(1, 2, p=0.04)))
    if stride == 1 and s.chance(0.5):
        branches.append(x)
    if stride == 1 and s.chance(0.25):
        attributes = {"pads": [1] * 4, "count_include_pad": s.pick(0, 1)}
        branches.append(s.op("AveragePool", x, dims=x.dims, kernel_shape=[3, 3], strides=[1, 1], **attributes))
    made = [b for b in branches if b is not None]
    if len(made) < 2 or any(b.dims[2:] != made[0].dims[2:] for b in made):
        return None
    made = [batch_norm(s, b) if s.chance(0.6) else b for b in made]
    y = made[0]
    for b in made[1:]:
        y = s.add(y, b)
    return s.op("Relu", y, dims=y.dims) if s.chance(0.5) else y


@motif(plane, weight=1.5, dtypes=(F32,))
def convolutions_in_a_row(s: Sketch, x: Value) -> Value | None:
    """1x1 after 3x3 and the other way, biases before padding, depthwise between."""
    y: Value | None = x
    for _ in range(2):
        if y is None:
            return None
        c, kernel = _channels(y), s.pick(1, 1, 3)
        depthwise = s.chance(0.3)
        pad = s.pick((0, 0), (kernel // 2,) * 2)
        y = conv(s, y, c if depthwise else int(s.rng.integers(2, 5)), kernel, group=c if depthwise else 1, pad=pad)
        if y is not None and s.chance(0.3):
            y = batch_norm(s, y)
    return y


@motif(plane, weight=1.5, dtypes=(F32,))
def pool_and_convolution(s: Sketch, x: Value) -> Value | None:
    """Pools by themselves and beside a convolution: ceil_mode, pads counted or not, windows larger than the image."""
    if not all(isinstance(d, int) and d >= 2 for d in x.dims[2:]):
        return s.op("GlobalAveragePool", x, dims=(*x.dims[:2], 1, 1))
    kind = s.pick("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")
    y: Value | None = conv(s, x, _channels(x), 1) if s.chance(0.5) else x
    if y is None:
        return None
    if kind.startswith("Global"):
        return s.op(kind, y, dims=(*y.dims[:2], 1, 1))
    kernel, stride, pad, ceil = s.pick(1, 2, 3), s.pick(1, 2), s.pick(0, 0, 1), int(s.chance(0.2))
    kernel = s.near(kernel, 5, p=0.05)
    if pad >= kernel or kind == "LpPool":
        pad = 0
    ceil = ceil if (kind == "AveragePool" and s.opset >= 11) or kind == "MaxPool" else 0
    dims = [_extent(d, kernel, stride, 1, (pad, pad)) for d in y.dims[2:]]
    if ceil:
        dims = [None, None]
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
    if kind != "LpPool":
        attributes["ceil_mode"] = ceil
    if kind == "AveragePool":
        attributes["count_include_pad"] = s.pick(0, 1)
    z = s.op(kind, y, dims=(*y.dims[:2], *dims), **attributes)
    if s.chance(0.3) and not ceil and all(isinstance(d, int) and d >= 1 for d in dims):
        return conv(s, z, int(s.rng.integers(2, 5)), 1)
    return z


@motif(image, weight=1.5)
def image_norm(s: Sketch, x: Value) -> Value | None:
    """InstanceNorm and GroupNorm, as operators and by views."""
    c = _channels(x)
    scale, bias = s.vector(c, around=1.0), s.vector(c)
    if x.dtype != s.dtype or not all(isinstance(d, int) for d in x.dims[2:]) or np.prod(x.dims[2:]) < 2:
        return None
    if s.chance(0.4):
        return s.op("InstanceNormalization", x, scale, bias, dims=x.dims, epsilon=float(s.pick(1e-5, 1e-2)))
    groups = s.pick(1, 2 if c % 2 == 0 else 1, c)
    if s.opset >= 21 and s.chance(0.4):
        return s.op("GroupNormalization", x, scale, bias, dims=x.dims, num_groups=groups)
    inner = c // groups * int(np.prod(x.dims[2:]))
    flat = s.reshape(x, [0, groups, -1], (x.dims[0], groups, inner))
    ones, zeros = s.const(np.ones(groups, s.numpy)), s.const(np.zeros(groups, s.numpy))
    y = s.op("InstanceNormalization", flat, ones, zeros, dims=flat.dims, epsilon=1e-5)
    y = s.reshape(y, [-1, *x.dims[1:]], x.dims)
    shape = (c,) + (1,) * (x.rank - 2)
    y = s.mul(y, s.const((1 + 0.2 * s.rng.standard_normal(shape)).astype(s.numpy)))
    return s.add(y, s.const((0.2 * s.rng.standard_normal(shape)).astype(s.numpy)))


@motif(plane, weight=1.5)
def channels_first_norm(s: Sketch, x: Value) -> Value | None:
    """LayerNorm over the channels of an image, by transposes or spelled out along axis 1."""
    c = _channels(x)
    if c < 2:
        return None
    if s.chance(0.5):
        mean = s.reduce("ReduceMean", x, [1], 1)
        d = s.op("Sub", x, mean)
        var = s.reduce("ReduceMean", s.op("Mul", d, d), [1], 1)
        y = s.op("Div", d, s.op("Sqrt", s.add(var, 1e-5)))
        w = s.const((1 + 0.2 * s.rng.standard_normal((c, 1, 1))).astype(s.numpy))
        return s.mul(y, w if w.dtype == y.dtype else s.cast(w, y.dtype))
    y = s.transpose(x, [0, 2, 3, 1])
    mean = s.reduce("ReduceMean", y, [-1], 1)
    d = s.op("Sub", y, mean)
    var = s.reduce("ReduceMean", s.op("Pow", d, 2.0), [-1], 1)
    y = s.op("Div", d, s.op("Sqrt", s.add(var, 1e-6)))
    return s.transpose(y, s.near([0, 3, 1, 2], [0, 3, 2, 1]))


@motif(plane)
def channel_shuffle(s: Sketch, x: Value) -> Value | None:
    """Channels shuffled before a convolution that sees all of them, or only groups."""
    c = _channels(x)
    if c % 2 or c < 4 or not all(isinstance(d, int) for d in x.dims[2:]):
        return None
    a, b = s.pick((2, c // 2), (c // 2, 2))
    y = s.reshape(x, [-1, a, b, *x.dims[2:]], (x.dims[0], a, b, *x.dims[2:]))
    y = s.transpose(y, [0, 2, 1, 3, 4])
    y = s.reshape(y, [-1, c, *x.dims[2:]], x.dims)
    if s.dtype != F32 or x.dtype != F32:
        return y
    y = s.op("Relu", y, dims=y.dims) if s.chance(0.5) else y
    if s.chance(0.3):
        z = conv(s, y, c, 3, group=c)
        y = y if z is None else z
    return conv(s, y, 2 * int(s.rng.integers(1, 3)), 1, group=s.near(1, 2))


@motif(plane)
def squeeze_and_excite(s: Sketch, x: Value) -> Value:
    """Channels scaled by a gate of their own mean."""
    c = _channels(x)
    if s.chance(0.5):
        y = s.op("GlobalAveragePool", x, dims=(*x.dims[:2], 1, 1)) if x.dtype == F32 else None
    else:
        y = None
    y = s.reduce("ReduceMean", x, [2, 3], 1) if y is None else y
    flat = s.op("Flatten", y, dims=(x.dims[0], c), axis=1)
    if x.dtype == s.dtype:
        flat = s.add(s.matmul(flat, s.weight(c, c)), s.vector(c))
    gate = s.unsqueeze(s.op("Sigmoid", flat, dims=flat.dims), [2, 3])
    return s.op("Mul", x, gate)


@motif(plane, dtypes=(F32,))
def resized(s: Sketch, x: Value) -> Value | None:
    """Resize, DepthToSpace, SpaceToDepth, LRN."""
    c = _channels(x)
    form = s.pick("Resize", "DepthToSpace", "SpaceToDepth", "LRN")
    if form == "LRN":
        return s.op("LRN", x, dims=x.dims, size=3)
    if form == "DepthToSpace":
        if c % 4 or not all(isinstance(d, int) and d <= 6 for d in x.dims[2:]):
            return None
        dims = (x.dims[0], c // 4, *[2 * d for d in x.dims[2:]])
        return s.op(form, x, dims=dims, blocksize=2, mode=s.pick("DCR", "CRD"))
    if form == "SpaceToDepth":
        if not all(isinstance(d, int) and d % 2 == 0 and d for d in x.dims[2:]):
            return None
        return s.op(form, x, dims=(x.dims[0], c * 4, *[d // 2 for d in x.dims[2:]]), blocksize=2)
    if not all(isinstance(d, int) and d <= 6 for d in x.dims[2:]):
        return None
    scales = s.const(np.asarray([1, 1, 2, 2], np.float32))
    mode = s.pick("nearest", "linear")
    dims = (*x.dims[:2], *[2 * d for d in x.dims[2:]])
    extra = {"nearest_mode": "floor"} if mode == "nearest" else {}
    how = s.pick("asymmetric", "half_pixel")
    roi = None if s.opset >= 13 else s.const(np.zeros(0, np.float32))
    return s.op("Resize", x, roi, scales, dims=dims, mode=mode, coordinate_transformation_mode=how, **extra)


@motif(plane, weight=1.5, dtypes=(F32,))
def patch_embedding(s: Sketch, x: Value) -> Value | None:
    """A convolution of patches, flattened to tokens."""
    if not all(isinstance(d, int) and d % 2 == 0 and d for d in x.dims[2:]):
        return None
    y = conv(s, x, 8, 2, stride=2, pad=(0, 0))
    if y is None:
        return None
    count = int(np.prod(y.dims[2:]))
    y = s.reshape(y, [0, 8, -1], (x.dims[0], 8, count))
    return s.transpose(y, [0, 2, 1])


@motif(image)
def scaled_channels(s: Sketch, x: Value) -> Value:
    """BatchNorm alone, layer scale, PRelu per channel."""
    c = _channels(x)
    if x.dtype != s.dtype:
        return s.op("Relu", x, dims=x.dims)
    form = s.pick("norm", "scale", "prelu")
    shape = (c,) + (1,) * (x.rank - 2)
    if form == "norm" and s.dtype != F16:
        return batch_norm(s, x)
    if form == "prelu":
        return s.op("PRelu", x, s.const((0.2 * s.rng.random(shape)).astype(s.numpy)), dims=x.dims)
    shape = s.near(shape, (1, *shape), (x.last or 1,), p=0.3)
    return s.mul(x, s.const((1 + 0.3 * s.rng.standard_normal(shape)).astype(s.numpy)))


@motif(image, dtypes=(F32,))
def to_tokens(s: Sketch, x: Value) -> Value:
    """An image as tokens: space flattened, channels last."""
    space = list(x.dims[2:])
    count = int(np.prod(space)) if all(isinstance(d, int) for d in space) else None
    y = s.reshape(x, [0, 0, -1], (*x.dims[:2], count))
    return s.transpose(y, [0, 2, 1])
