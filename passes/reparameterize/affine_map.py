"""Affine maps over a channel axis and a window of positions, and their algebra.

An `AffineMap` sends x with I channels to y with O channels; b is its bias, K its kernel, s the strides, d the dilations
and p the padding at the begin of each spatial axis. Positions outside x count as zeros:

    y[o, q] = b[o] + sum over i, t of K[o, i, t] * x[i, q*s + t*d - p]                    (convolution)
    y[o, r] = b[o] + sum over i, t, q with q*s + t*d - p = r of K[o, i, t] * x[i, q]      (transposed convolution)

A map without spatial axes (`Window()`, "pointwise") acts on every position alone: a matrix product over tokens, a 1x1
convolution, a factor and a shift per channel, the identity. Two operations are enough for all reparameterizations:

Sum. y = A(x) + B(x) is one map if the strides agree. Each tap reads x at an offset t*d - p; the window of the sum is
the smallest lattice that holds the offsets of both, and a map that is pointwise sits at offset 0. Exact at the borders
too, since every tap outside x reads zero on both sides. (RepVGG, Ding et al. 2021; ACNet, Ding et al. 2019; DBB, Ding
et al. 2021, transforms II, V and VI.)

Composition. B(A(x)) is one map
- if B does not pad: offsets add up, `p_A + s_A * t_B * d_B`, strides multiply;
- if B pads with zeros: only where A, continued over zeros, is zero outside its own result. So A must have a kernel of
  one tap and no bias: B would see zeros where the merged map sees the bias of A (DBB transform III holds only if the
  intermediate is padded with its own bias value).
- a transposed convolution composes with pointwise maps only, in front of it with those that have no bias.

Groups: a kernel with g groups is block-diagonal with g blocks, and so has gcd(g, h) groups beside one with h.

Kernels and biases are float64, and computed only when asked for: geometry and cost need shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from xform.graph.values import Array

Arrays = tuple[Array, Array]


@dataclass(frozen=True)
class Window:
    """Which positions an output position reads; one entry per spatial axis, none for a pointwise map.

    Attributes:
        kernel: Taps.
        strides, dilations: As in ONNX Conv.
        begins: Zeros before the first position.
        slack: Padding at both ends less the reach of the kernel, begin + end - dilation * (kernel - 1). A convolution
            gives floor((size + slack - 1) / stride) + 1 positions; a transposed one, whose slack is
            dilation * (kernel - 1) + output padding - begin - end, gives (size - 1) * stride + 1 + slack.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    slack: tuple[int, ...] = ()

    @staticmethod
    def pointwise(rank: int) -> Window:
        """One tap per axis, at offset 0."""
        one, zero = (1,) * rank, (0,) * rank
        return Window(one, one, one, zero, zero)

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """Whether every position is treated alone."""
        return self == Window.pointwise(self.rank)

    def ends(self, *, transposed: bool = False) -> tuple[int, ...]:
        """Zeros after the last position (for a transposed convolution: what is cropped, less the output padding)."""
        reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilations, strict=True)]
        if transposed:
            return tuple(r - s - b for r, s, b in zip(reach, self.slack, self.begins, strict=True))
        return tuple(s + r - b for r, s, b in zip(reach, self.slack, self.begins, strict=True))

    @property
    def pads(self) -> bool:
        """Whether a convolution over this window reads zeros around its operand."""
        return any(self.begins) or any(e > 0 for e in self.ends())


@dataclass(frozen=True)
class AffineMap:
    """One affine map; see the module's docstring.

    Attributes:
        inputs, outputs: Channels I and O.
        group: Blocks of the kernel.
        window: Positions read.
        unbiased: The bias is known to be zero.
        compute: Gives the kernel, float64 [O, I/group, *window.kernel], and the bias, float64 [O].
        transposed: A transposed convolution.
        name: Name of the first weight in it, for the merged weight.
        zero: The kernel is known to be zero: the map is a constant.
    """

    inputs: int
    outputs: int
    group: int
    window: Window
    unbiased: bool
    compute: Callable[[], Arrays] = field(compare=False, repr=False)
    transposed: bool = False
    name: str = ""
    zero: bool = False

    @cached_property
    def arrays(self) -> Arrays:
        """Kernel and bias in float64."""
        kernel, bias = self.compute()
        expected = (self.outputs, self.inputs // self.group, *self.window.kernel)
        if kernel.shape != expected or bias.shape != (self.outputs,):
            raise ValueError(f"a kernel of shape {kernel.shape} and a bias of shape {bias.shape} for {expected}")
        return kernel, bias

    @property
    def diagonal(self) -> bool:
        """Whether it is a factor and a shift per channel."""
        return self.group == self.inputs == self.outputs and self.window.is_pointwise

    @property
    def parameters(self) -> int:
        """Elements of the kernel and, where there is one, the bias."""
        return self.outputs * (self.inputs // self.group) * self.window.taps + (0 if self.unbiased else self.outputs)

    def flops(self, positions_in: int, positions_out: int) -> int:
        """2 I/group O taps for each position (of the operand where transposed), and O for the bias."""
        inner = 2 * self.outputs * (self.inputs // self.group) * self.window.taps
        positions = positions_in if self.transposed else positions_out
        return inner * positions + (0 if self.unbiased else self.outputs * positions_out)


def identity(channels: int) -> AffineMap:
    """y = x."""
    return scaling(np.ones(1), None, channels)


def scaling(factor: Array, shift: Array | None, channels: int, name: str = "") -> AffineMap:
    """y = factor * x + shift per channel; both broadcast to [channels]."""

    def compute() -> Arrays:
        a = np.broadcast_to(factor.astype(np.float64).reshape(-1), (channels,))
        c = np.zeros(1) if shift is None else shift.astype(np.float64).reshape(-1)
        return a.reshape(channels, 1), np.broadcast_to(c, (channels,))

    unbiased = shift is None or not np.any(shift)
    return AffineMap(channels, channels, channels, Window(), unbiased, compute, name=name)


def without_shift(part: AffineMap) -> AffineMap:
    """The same map with a bias of zero."""
    if part.unbiased:
        return part
    return replace(part, unbiased=True, compute=lambda: (part.arrays[0], np.zeros(part.outputs)))


def compose(outer: AffineMap, inner: AffineMap, *, lenient: bool = False) -> AffineMap | str:
    """outer(inner(x)) as one map, or why it is none.

    Args:
        lenient: Pretend that no border spoils it, to see what it would cost. The result must not be computed.
    """
    if outer.inputs != inner.outputs:
        return f"{inner.outputs} channels meet a map of {outer.inputs}"
    window = _composed_window(outer, replace(inner, unbiased=True) if lenient else inner, lenient)
    if isinstance(window, str):
        return window
    group = math.gcd(outer.group, inner.group)

    def compute() -> Arrays:
        (k2, b2), (k1, b1) = outer.arrays, inner.arrays
        if outer.diagonal:  # rows scaled, columns scaled: no need for a product
            factor = k2.reshape(-1)
            scaled = k1 * factor.reshape(-1, *[1] * (k1.ndim - 1))
            return _regrouped(_ranked(scaled, window.rank), inner.group, group, inner.inputs), factor * b1 + b2
        if inner.diagonal:
            columns = k1.reshape(outer.group, 1, -1, *[1] * (k2.ndim - 2))
            scaled = (k2.reshape(outer.group, -1, *k2.shape[1:]) * columns).reshape(k2.shape)
            return _ranked(scaled, window.rank), b2 + _response(k2, outer.group, b1)
        a = _regrouped(_ranked(k2, window.rank), outer.group, group, outer.inputs)
        c = _regrouped(_ranked(k1, window.rank), inner.group, group, inner.inputs)
        return _product(a, c, group, outer, inner, window), b2 + _response(k2, outer.group, b1)

    return AffineMap(
        inner.inputs,
        outer.outputs,
        group,
        window,
        outer.unbiased and inner.unbiased,
        compute,
        transposed=outer.transposed or inner.transposed,
        name=inner.name or outer.name,
        zero=outer.zero or inner.zero,
    )


def _composed_window(outer: AffineMap, inner: AffineMap, lenient: bool) -> Window | str:
    a, b = inner.window, outer.window
    if inner.transposed or outer.transposed:
        if outer.transposed and not inner.transposed:
            if not a.is_pointwise:
                return "a convolution before a transposed convolution is no single one"
            return b if inner.unbiased else "the transposed convolution spreads a shift unevenly over its output"
        if outer.transposed or not b.is_pointwise:
            return "a convolution after a transposed convolution is no single one"
        return a
    if b.rank == 0:
        return a
    if b.pads and not inner.unbiased:
        return "the convolution pads its operand with zeros, which the shift before it does not reach"
    if a.rank == 0:
        return b
    if a.rank != b.rank:
        return f"a window over {a.rank} axes meets one over {b.rank}"
    if b.pads and a.taps != 1 and not lenient:
        return "the convolution pads the intermediate result with zeros, where the merged one would see its border"
    return _chained(a, b)


def _chained(inner: Window, outer: Window) -> Window:
    kernel, strides, dilations, begins, slack = [], [], [], [], []
    for axis in range(inner.rank):
        k1, d1, s1, p1 = inner.kernel[axis], inner.dilations[axis], inner.strides[axis], inner.begins[axis]
        k2, d2, s2, p2 = outer.kernel[axis], outer.dilations[axis], outer.strides[axis], outer.begins[axis]
        step = math.gcd(d1 if k1 > 1 else 0, d2 * s1 if k2 > 1 else 0) or 1
        reach = d1 * (k1 - 1) + s1 * d2 * (k2 - 1)
        kernel.append(reach // step + 1)
        strides.append(s1 * s2)
        dilations.append(step)
        begins.append(p1 + s1 * p2)
        # the end of the padded intermediate, in positions of the operand; see the docstring of Window for the formula
        slack.append(inner.slack[axis] + s1 * outer.slack[axis])
    return Window(tuple(kernel), tuple(strides), tuple(dilations), tuple(begins), tuple(slack))


def add(a: AffineMap, b: AffineMap) -> AffineMap | str:
    """a(x) + b(x) as one map, or why it is none."""
    if (a.inputs, a.outputs) != (b.inputs, b.outputs):
        return "the branches have different numbers of channels"
    spatial = [m for m in (a, b) if not m.window.is_pointwise]
    if len({m.transposed for m in spatial}) > 1:
        return "a convolution meets a transposed convolution"
    transposed = any(m.transposed for m in spatial)
    window = _union(a.window, b.window, transposed)
    if isinstance(window, str):
        return window
    group = math.gcd(a.group, b.group)

    def compute() -> Arrays:
        kernel = np.zeros((a.outputs, a.inputs // group, *window.kernel))
        bias = np.zeros(a.outputs)
        for part in (a, b):
            k, c = part.arrays
            kernel[:, :, *_taps(part.window, window)] += _regrouped(
                _ranked(k, window.rank), part.group, group, part.inputs
            )
            bias = bias + c
        return kernel, bias

    dense = max((a, b), key=lambda m: (bool(m.name), m.parameters))
    unbiased = a.unbiased and b.unbiased
    return AffineMap(
        a.inputs, a.outputs, group, window, unbiased, compute, transposed, dense.name, zero=a.zero and b.zero
    )


def _union(a: Window, b: Window, transposed: bool) -> Window | str:
    rank = max(a.rank, b.rank)
    if a.rank not in (0, rank) or b.rank not in (0, rank):
        return f"a window over {a.rank} axes meets one over {b.rank}"
    a, b = (w if w.rank else Window.pointwise(rank) for w in (a, b))
    if a.strides != b.strides:
        return f"the strides differ: {list(a.strides)} and {list(b.strides)}"
    kernel, dilations, begins = [], [], []
    for k1, d1, p1, k2, d2, p2 in zip(a.kernel, a.dilations, a.begins, b.kernel, b.dilations, b.begins, strict=True):
        first, last = min(-p1, -p2, 0), max(d1 * (k1 - 1) - p1, d2 * (k2 - 1) - p2)
        step = math.gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0, p1 + first, p2 + first) or 1
        kernel.append((last - first) // step + 1)
        dilations.append(step)
        begins.append(-first)
    # Both give the same number of positions; the larger slack is one whose end padding is no crop of the other.
    slack = tuple(map(max, a.slack, b.slack))
    merged = Window(tuple(kernel), a.strides, tuple(dilations), tuple(begins), slack)
    if not transposed and any(e < 0 for e in merged.ends()):
        return "one branch leaves out the border that the other one reads"
    return merged


def _taps(part: Window, whole: Window) -> tuple[slice, ...]:
    """Where the taps of `part` stand among those of `whole`."""
    part = part if part.rank else Window.pointwise(whole.rank)
    places = []
    for k, d, p, step, begin in zip(
        part.kernel, part.dilations, part.begins, whole.dilations, whole.begins, strict=True
    ):
        start, stride = (begin - p) // step, max(d // step, 1) if k > 1 else 1
        places.append(slice(start, start + (k - 1) * stride + 1, stride))
    return tuple(places)


def _ranked(kernel: Array, rank: int) -> Array:
    """`kernel` with `rank` spatial axes; a pointwise one gets axes of size 1."""
    return kernel if kernel.ndim == rank + 2 else kernel.reshape(*kernel.shape[:2], *[1] * rank)


def _regrouped(kernel: Array, group: int, fewer: int, inputs: int) -> Array:
    """A kernel [O, I/group, ...] as [O, I/fewer, ...], zeros off its blocks; `fewer` divides `group`."""
    if group == fewer:
        return kernel
    outputs, width = kernel.shape[0], inputs // group
    ratio = group // fewer
    result = np.zeros((outputs, inputs // fewer, *kernel.shape[2:]))
    block = np.arange(outputs) // (outputs // group) % ratio  # place of each row's block among those that merge
    columns = block[:, None] * width + np.arange(width)[None, :]
    result[np.arange(outputs)[:, None], columns] = kernel
    return result


def _response(kernel: Array, group: int, constant: Array) -> Array:
    """What a map without bias gives for an operand that is `constant` per channel at every position it reads."""
    sums = kernel.reshape(*kernel.shape[:2], -1).sum(axis=2)
    grouped = sums.reshape(group, -1, sums.shape[1])
    result: Array = np.einsum("goi,gi->go", grouped, constant.reshape(group, -1)).reshape(-1)
    return result


def _product(outer: Array, inner: Array, group: int, b: AffineMap, a: AffineMap, window: Window) -> Array:
    """Kernel of the composition, from kernels of `group` groups and equal rank."""
    o, m = b.outputs // group, a.outputs // group
    k2, k1 = outer.reshape(group, o, m, -1), inner.reshape(group, m, a.inputs // group, -1)
    # [g, o, taps2, m] x [g, m, i * taps1]
    left = np.ascontiguousarray(k2.transpose(0, 1, 3, 2)).reshape(group, -1, m)
    both = (left @ k1.reshape(group, m, -1)).reshape(b.outputs, *outer.shape[2:], a.inputs // group, *inner.shape[2:])
    rank = window.rank
    if rank == 0 or window.taps == 1:
        return np.ascontiguousarray(both.reshape(b.outputs, -1, *window.kernel))
    if b.window.taps == 1:  # one tap outside: the window is the inner one
        return both.reshape(b.outputs, -1, *inner.shape[2:])
    if a.window.taps == 1:
        return np.ascontiguousarray(np.moveaxis(both.reshape(*both.shape[: rank + 2]), rank + 1, 1))
    result = np.zeros((b.outputs, a.inputs // group, *window.kernel))
    steps = a.window.strides if a.window.rank else (1,) * rank
    wide, narrow = (w if w.rank else Window.pointwise(rank) for w in (b.window, a.window))
    for taps in np.ndindex(*outer.shape[2:]):
        place = []
        for axis, t in enumerate(taps):
            step = window.dilations[axis]
            start = t * wide.dilations[axis] * steps[axis] // step
            stride = max(narrow.dilations[axis] // step, 1) if narrow.kernel[axis] > 1 else 1
            place.append(slice(start, start + (narrow.kernel[axis] - 1) * stride + 1, stride))
        result[:, :, *place] += both[:, *taps]
    return result
