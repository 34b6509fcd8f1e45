"""Motifs of layers: linear, norms, activations, softmax, adapters, in their spellings and nearly in them."""

from __future__ import annotations

import math

import numpy as np
from differential_registry import any_float, axes_float, channels_last, motif, tokens
from differential_sketch import F16, F32, Sketch, Value


@motif(channels_last, weight=2.0)
def linear(s: Sketch, x: Value) -> Value:
    """A product with constant weights and a bias of some rank, on either side; Gemm with its factors."""
    n = int(s.rng.integers(2, 9)) if s.chance(0.6) else x.last
    if x.rank == 2 and s.chance(0.5):
        alpha, beta = s.near(1.0, 0.5, 2.0, 0.0), s.near(1.0, 0.25, 0.0)
        flip, turn = s.pick(0, 1), int(s.chance(0.1) and x.static)
        w = s.weight(n, x.last) if flip else s.weight(x.last, n)
        a = s.transpose(x, [1, 0]) if turn else x
        b = s.pick(None, s.vector(n), s.weight(1, n), s.weight(1, 1), s.weight(1), s.const(np.asarray(0.3, s.numpy)))
        return s.op("Gemm", a, w, b, dims=(x.dims[0], n), alpha=alpha, beta=beta, transA=turn, transB=flip)
    if s.chance(0.25):
        w = s.transpose(s.weight(n, x.last), [1, 0])
    else:
        w = s.weight(x.last, n)
    if s.chance(0.1) and x.rank > 2:
        w = s.unsqueeze(w, [0])
    y = s.matmul(x, w)
    if s.chance(0.75):
        shape = s.pick((n,), (n,), (1, n), (1,) * (x.rank - 1) + (n,), (1,) * x.rank + (n,), (), (1,))
        b = s.const((0.3 * s.rng.standard_normal(shape)).astype(s.numpy))
        y = s.either("Add", y, b) if s.chance(0.85) else s.op("Sub", y, b)
    return y


@motif(channels_last, weight=1.5)
def linear_chain(s: Sketch, x: Value) -> Value:
    """Products in a row with factors and shifts between them, and sometimes a second reader."""
    y = x
    for _ in range(int(s.rng.integers(2, 4))):
        y = s.matmul(y, s.weight(y.last, int(s.rng.integers(2, 9))))
        if s.chance(0.4):
            y = s.add(y, s.vector(y.last))
        if s.chance(0.3):
            y = s.mul(y, s.vector(y.last, around=1.0) if s.chance(0.6) else 0.5)
        if s.chance(0.12):
            s.live.append(y)
    return y


@motif(channels_last, weight=1.5)
def low_rank(s: Sketch, x: Value) -> Value:
    """x W + s (x A) B, and what looks like it: an activation between, another input, a shared weight."""
    n, r = int(s.rng.integers(4, 9)), int(s.rng.integers(1, 4))
    w = s.weight(x.last, n)
    base = s.matmul(x, w)
    down = s.matmul(s.near(x, s.op("Tanh", x, dims=x.dims)), s.weight(x.last, r))
    down = s.op(s.near("Identity", "Relu", "Tanh"), down, dims=down.dims)
    up = s.matmul(down, s.weight(r, n))
    if s.chance(0.6):
        up = s.mul(up, 0.5)
    y = s.add(base, up)
    y = s.add(y, s.vector(n)) if s.chance(0.4) else y
    if s.chance(0.1):
        y = s.op("Add", y, s.reduce("ReduceMean", s.matmul(x, w), [-1], 1))
    return y


@motif(channels_last)
def parallel_products(s: Sketch, x: Value) -> Value:
    """Two or three products of one value, added, multiplied or joined."""
    n = int(s.rng.integers(2, 9))
    parts = [s.matmul(x, s.weight(x.last, n)) for _ in range(int(s.rng.integers(2, 4)))]
    if s.chance(0.4):
        parts = [s.add(p, s.vector(n)) for p in parts]
    if s.chance(0.3):
        return s.concat(parts, -1)
    if s.chance(0.4):
        gate = s.op(s.pick("Sigmoid", "Tanh", "Relu"), parts[0], dims=parts[0].dims)
        return s.op("Mul", gate, parts[1])
    return s.op("Sum", *parts)


@motif(tokens)
def grouped_products(s: Sketch, x: Value) -> Value:
    """Block-diagonal products through views and transposes."""
    g = s.pick(2, 4)
    k, n = x.last // g, int(s.rng.integers(1, 5))
    y = s.reshape(x, [0, 0, g, k], (*x.dims[:2], g, k))
    y = s.transpose(y, [0, 2, 1, 3])
    y = s.matmul(y, s.weight(g, k, n, scale=1 / math.sqrt(k)))
    y = s.transpose(y, [0, 2, 1, 3] if s.chance(0.8) else [0, 2, 3, 1])
    return s.reshape(y, [0, 0, g * n], (*x.dims[:2], g * n))


@motif(channels_last)
def einsums(s: Sketch, x: Value) -> Value | None:
    """Einsum of one to three operands."""
    if x.rank not in (2, 3) or x.dtype == F16:
        return None
    lead = "ab"[: x.rank - 1]
    n = int(s.rng.integers(2, 6))
    form = s.pick("one", "two", "swap", "three", "sum")
    if form == "one":
        dims = x.dims[::-1]
        letters = f"{lead}k"
        return s.op("Einsum", x, dims=dims, equation=f"{letters}->{letters[::-1]}")
    if form == "sum":
        return s.op("Einsum", x, dims=x.dims[:-1], equation=f"{lead}k->{lead}")
    if form == "swap":
        return s.op(
            "Einsum", s.weight(n, x.last), x, dims=(*x.dims[:-1], n), dtype=x.dtype, equation=f"nk,{lead}k->{lead}n"
        )
    if form == "three":
        a, b = s.weight(x.last, n), s.weight(n, 3)
        return s.op("Einsum", x, a, b, dims=(*x.dims[:-1], 3), equation=f"{lead}k,kn,nm->{lead}m")
    return s.op("Einsum", x, s.weight(x.last, n), dims=(*x.dims[:-1], n), equation=f"{lead}k,kn->{lead}n")


@motif(axes_float, weight=3.0)
def layer_norm(s: Sketch, x: Value) -> Value | None:
    """LayerNorm spelled out: axes, variance, root and affine part in their forms, one of them sometimes off."""
    if x.rank < 2 or x.dims[-1] == 1:
        return None
    axes = s.near([-1], [x.rank - 1], [0], [1], [-2, -1], p=0.2)
    mean = s.reduce("ReduceMean", x, axes, 1)
    d = s.op("Sub", x, mean) if s.chance(0.93) else s.op("Sub", mean, x)
    if s.chance(0.1):
        d2 = s.op("Sub", x, mean)
    else:
        d2 = d
    square = s.op("Pow", d2, s.near(2.0, 3.0, p=0.03)) if s.chance(0.5) else s.op("Mul", d2, d2)
    other = axes if s.chance(0.93) else [0]
    size = x.last
    if s.chance(0.15) and size > 1 and axes in ([-1], [x.rank - 1]):
        var = s.op("Div", s.reduce("ReduceSum", square, axes, 1), float(s.near(size, size - 1)))
    else:
        var = s.reduce("ReduceMean", square, other, 1)
    y = _normalized(s, d, var, s.near(1e-5, 1e-12, 0.1, 1e-3))
    return _affine(s, y, x)


@motif(axes_float, weight=2.0)
def rms_norm(s: Sketch, x: Value) -> Value | None:
    """RMSNorm spelled out, with the statistics in float32 in half precision, and nearly it."""
    if x.rank < 2:
        return None
    wide = x.dtype == F16 and s.chance(0.7)
    v = s.cast(x, F32) if wide else x
    square = s.op("Pow", v, 2.0) if s.chance(0.5) else s.op("Mul", v, v)
    axes = s.near([-1], [x.rank - 1], [0], [-2, -1], p=0.15)
    mean = s.reduce(s.near("ReduceMean", "ReduceSum", p=0.05), square, axes, 1)
    y = _normalized(s, v, mean, s.near(1e-6, 1e-3, 0.5))
    if wide and s.chance(0.7):
        y = s.cast(y, x.dtype)
        return _affine(s, y, x, bias=0.1)
    y = _affine(s, y, x, bias=0.1)
    return s.cast(y, x.dtype) if y.dtype != x.dtype else y


def _normalized(s: Sketch, d: Value, var: Value, epsilon: float) -> Value:
    if s.chance(0.06):  # epsilon beside the root, not under it
        return s.op("Div", d, s.add(s.op("Sqrt", var), epsilon))
    shifted = s.either("Add", var, epsilon) if s.chance(0.92) else s.clip(var, epsilon, None)
    form = s.pick("div", "mul", "power", "root", "rsqrt")
    if form == "div":
        return s.op("Div", d, s.op("Sqrt", shifted))
    if form == "mul":
        return s.either("Mul", d, s.op("Reciprocal", s.op("Sqrt", shifted)))
    if form == "power":
        return s.either("Mul", d, s.op("Pow", shifted, s.near(-0.5, 0.5, -0.25)))
    if form == "rsqrt":
        root = s.op("Sqrt", shifted)
        return s.either("Mul", d, s.op("Div", s.literal(1.0, root), root))
    return s.op("Div", d, s.op("Pow", shifted, 0.5))


def _affine(s: Sketch, y: Value, x: Value, bias: float = 0.6) -> Value:
    n = x.last
    for kind, p in (("Mul", 0.75), ("Add", bias)):
        if not s.chance(p):
            continue
        shapes = [(), (1,), (1,) * (x.rank + 1)]
        if n:
            shapes += [(n,)] * 5 + [(1, n), (1,) * (x.rank - 1) + (n,), (1,) * x.rank + (n,)]
        if x.rank >= 3 and isinstance(x.dims[1], int):
            shapes += [(x.dims[1], 1), (x.dims[1],) + (1,) * (x.rank - 2)]
        array = s.rng.standard_normal(s.pick(*shapes)) * 0.3 + (kind == "Mul")
        c = s.const(array.astype(s.numpy))
        c = c if c.dtype == y.dtype else s.cast(c, y.dtype)
        y = s.either(kind, y, c) if s.chance(0.9) else s.op("Sub" if kind == "Add" else "Div", y, c)
    return y


@motif(channels_last, opset=17, weight=1.5)
def norm_operator(s: Sketch, x: Value) -> Value | None:
    """LayerNormalization as an operator, its statistics read or not, with an affine map behind it."""
    axis = s.near(-1, x.rank - 1, 1)
    tail = x.dims[axis % x.rank :]
    if not all(isinstance(d, int) for d in tail):
        return None
    scale = s.const((1 + 0.3 * s.rng.standard_normal(tail)).astype(s.numpy))
    bias = s.const((0.3 * s.rng.standard_normal(tail)).astype(s.numpy)) if s.chance(0.6) else None
    epsilon = float(s.near(1e-5, 1e-2, 1e-12))
    if x.dtype != s.dtype:
        return None
    if s.opset >= 23 and s.chance(0.4):
        y = s.op("RMSNormalization", x, scale, dims=x.dims, axis=axis, epsilon=epsilon)
    else:
        y = s.op("LayerNormalization", x, scale, bias, dims=x.dims, axis=axis, epsilon=epsilon)
    return _affine(s, y, x) if s.chance(0.6) else y


@motif(any_float, weight=2.0)
def gelu(s: Sketch, x: Value) -> Value:
    """GELU by erf or tanh in its associations, with constants that are sometimes slightly off."""
    if s.chance(0.6):
        inner = s.mul(x, s.near(math.sqrt(0.5), 0.7, 0.70710, 1.0))
        gate = s.add(s.op("Erf", inner), s.near(1.0, 0.999, 2.0))
    else:
        cubic = s.near(0.044715, 0.0447, 0.05)
        if s.chance(0.5):
            cube = s.mul(s.op("Pow", x, s.near(3.0, 2.0, p=0.05)), cubic)
            poly = s.add(x, cube)
        else:
            square = s.op("Mul", x, x)
            poly = s.op("Mul", x, s.add(s.mul(square, cubic), 1.0))
        inner = s.mul(poly, s.near(math.sqrt(2 / math.pi), 0.8, 0.79788))
        gate = s.add(s.op("Tanh", inner), 1.0)
    half = s.near(0.5, 0.25, 0.49)
    if s.chance(0.5):
        return s.mul(s.either("Mul", x, gate), half)
    return s.either("Mul", s.mul(x, half), gate)


@motif(any_float, opset=20)
def gelu_operator(s: Sketch, x: Value) -> Value:
    """Gelu and, where the opset has them, its siblings as operators."""
    if s.chance(0.3):
        return s.op("Mish", x, dims=x.dims) if x.dtype == F32 else s.op("Softplus", x, dims=x.dims)
    return s.op("Gelu", x, dims=x.dims, approximate=s.pick("none", "tanh"))


@motif(any_float, weight=2.0)
def gated(s: Sketch, x: Value) -> Value:
    """Sigmoid, SiLU, HardSwish, HardSigmoid, Mish spelled out, and nearly."""
    form = s.pick("sigmoid", "silu", "quotient", "hard", "hardsigmoid", "mish", "quick")
    if form in ("sigmoid", "quotient"):
        e = s.op("Exp", s.op("Neg", x, dims=x.dims) if s.chance(0.7) else s.op("Mul", x, -1.0))
        below = s.add(e, s.near(1.0, 1.001, 2.0))
        if form == "quotient":
            return s.op("Div", x, below)
        return s.op("Reciprocal", below) if s.chance(0.5) else s.op("Div", s.literal(1.0, x), below)
    if form == "silu":
        other = s.near(x, s.op("Neg", x, dims=x.dims), p=0.06)
        return s.either("Mul", x, s.op("Sigmoid", other))
    if form == "quick":
        return s.either("Mul", x, s.op("Sigmoid", s.mul(x, s.pick(1.702, 1.0))))
    if form == "mish":
        return s.either("Mul", x, s.op("Tanh", s.op("Softplus", x)))
    relu6 = s.clip(s.add(x, s.near(3.0, 2.5)), 0.0, s.near(6.0, 5.0))
    if form == "hardsigmoid":
        return s.mul(relu6, s.near(1 / 6, 0.2))
    if s.chance(0.2):
        return s.either("Mul", x, s.op("HardSigmoid", x, dims=x.dims, alpha=1 / 6, beta=s.near(0.5, 0.4)))
    return s.op("Div", s.either("Mul", x, relu6), s.near(6.0, 5.0))


@motif(axes_float, weight=1.5)
def softmax_spelled(s: Sketch, x: Value) -> Value | None:
    """Softmax by its parts over one axis or two different ones; as an operator between transposes."""
    if x.rank < 2:
        return None
    if s.chance(0.4):
        perm = [int(i) for i in s.rng.permutation(x.rank)]
        y = s.softmax(s.transpose(x, perm), -1, s.near("Softmax", "LogSoftmax"))
        return s.transpose(y, s.near([int(i) for i in np.argsort(perm)], perm))
    axis = s.pick(-1, x.rank - 1, 0, 1)
    shifted = x if s.chance(0.12) else s.op("Sub", x, s.reduce("ReduceMax", x, [axis], 1))
    e = s.op("Exp", s.op("Tanh", x) if shifted is x else shifted)
    total = s.reduce("ReduceSum", e, [s.near(axis, 0, -1)], 1)
    return s.op("Div", e, total) if s.chance(0.6) else s.op("Mul", e, s.op("Reciprocal", total))


@motif(axes_float)
def softmax_operator(s: Sketch, x: Value) -> Value:
    """Softmax, LogSoftmax with any axis: flattening below opset 13."""
    return s.softmax(x, int(s.rng.integers(-x.rank, x.rank)), s.near("Softmax", "LogSoftmax"))


@motif(channels_last, weight=1.5)
def feed_forward(s: Sketch, x: Value) -> Value:
    """Two products with an activation between and a residual, or a gated pair."""
    wide = 2 * x.last
    h = s.add(s.matmul(x, s.weight(x.last, wide)), s.vector(wide))
    if s.chance(0.4):
        gate, value = s.split(h, -1, [x.last, x.last])
        h = s.op("Mul", s.op("Mul", gate, s.op("Sigmoid", gate)), value)
    else:
        h = s.op(s.pick("Relu", "Tanh", "Sigmoid"), h, dims=h.dims)
    y = s.matmul(h, s.weight(h.last, x.last))
    y = s.add(y, s.vector(x.last)) if s.chance(0.6) else y
    return s.add(x, y)


@motif(tokens)
def rows_read(s: Sketch, x: Value) -> Value | None:
    """A token-wise block of which one row is read: the first, the last, another axis, or two."""
    y = s.matmul(x, s.weight(x.last, x.last))
    y = s.op("Relu", y, dims=y.dims)
    if s.chance(0.4):
        y = s.softmax(y, s.pick(-1, 1))
    y = s.matmul(y, s.weight(x.last, x.last))
    if s.chance(0.6):
        index = s.const(np.asarray(s.pick(0, -1, 0), np.int64))
        return s.op("Gather", y, index, dims=(x.dims[0], x.last), axis=1)
    return s.slice(y, 1, s.pick(0, -1), s.pick(1, 2**63 - 1), size=1)


@motif(channels_last, opset=13, dtypes=(F32,))
def quantized(s: Sketch, x: Value) -> Value | None:
    """QuantizeLinear and DequantizeLinear around a value, dynamic quantization, and integer products."""
    if x.dtype != F32:
        return None
    form = s.pick("qdq", "dynamic", "integer")
    if form == "qdq":
        scale, zero = (
            s.const(np.asarray(0.05, np.float32)),
            s.const(np.asarray(s.pick(0, 3), s.pick(np.int8, np.uint8))),
        )
        q = s.op("QuantizeLinear", x, scale, zero, dims=x.dims, dtype=zero.dtype)
        return s.op("DequantizeLinear", q, scale, zero, dims=x.dims, dtype=F32)
    q, scale, zero = s.ops("DynamicQuantizeLinear", [x], [x.dims, (), ()], [2, F32, 2])
    if form == "dynamic":
        return s.op("DequantizeLinear", q, scale, zero, dims=x.dims, dtype=F32)
    n = 4
    w = s.const(s.rng.integers(-20, 20, (x.last, n)).astype(np.int8))
    product = s.op("MatMulInteger", q, w, zero, dims=(*x.dims[:-1], n), dtype=6)
    return s.mul(s.cast(product, F32), 0.01)


@motif(tokens, dtypes=(F32,))
def recurrent(s: Sketch, x: Value) -> Value | None:
    """A small LSTM, GRU or RNN over the tokens."""
    kind, gates = s.pick(("LSTM", 4), ("GRU", 3), ("RNN", 1))
    if x.dtype != F32:
        return None
    hidden, directions = 4, s.pick(1, 2)
    y = s.transpose(x, [1, 0, 2])
    w = s.const((0.3 * s.rng.standard_normal((directions, gates * hidden, x.last))).astype(np.float32))
    r = s.const((0.3 * s.rng.standard_normal((directions, gates * hidden, hidden))).astype(np.float32))
    b = s.const((0.1 * s.rng.standard_normal((directions, 2 * gates * hidden))).astype(np.float32))
    dims = (x.dims[1], directions, x.dims[0], hidden)
    direction = {"direction": "bidirectional" if directions == 2 else s.pick("forward", "reverse")}
    out = s.op(kind, y, w, r, s.near(b, None), dims=dims, hidden_size=hidden, **direction)
    out = s.transpose(out, [2, 0, 1, 3])
    return s.reshape(out, [0, 0, directions * hidden], (x.dims[0], x.dims[1], directions * hidden))
