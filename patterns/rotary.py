"""Rotary position embedding (Su et al., arXiv 2104.09864) as it is spelled without its operator.

    y = x * cos + rotate(x) * sin

    half-split:   rotate(x) = concat(-x[.., d/2:], x[.., :d/2])               cos, sin repeat after d/2
    interleaved:  rotate(x) = stack(-x[.., 1::2], x[.., ::2], -1) flattened    cos, sin repeat every element twice

`rotate` is a permutation with signs; it is read here by running it symbolically on the positions 0 .. d-1 of the last
axis, so that Slice, Split, Gather, Concat, stack, reshape and Neg may spell it in any way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xform.graph.values import attribute, constant, is_op, rank_of, shape_of

Signed = npt.NDArray[np.int64]  # entry i holds s * (1 + source position), s = +-1

MAX_DEPTH = 16


def half_split(size: int) -> Signed:
    """The signed permutation of the half-split form for a last axis of `size`."""
    half = size // 2
    return np.concatenate([-(np.arange(half, size) + 1), np.arange(half) + 1])


def interleaved(size: int) -> Signed:
    """The signed permutation of the interleaved form."""
    out = np.empty(size, np.int64)
    out[0::2], out[1::2] = -(np.arange(1, size, 2) + 1), np.arange(0, size, 2) + 1
    return out


def signed_permutation(value: ir.Value, x: ir.Value, size: int) -> tuple[Signed, list[ir.Node]] | None:
    """`value` as a signed permutation of the last axis of `x` (of static `size`), with the nodes that spell it.

    None where `value` is anything else.
    """
    nodes: list[ir.Node] = []
    found = _read(value, x, size, nodes, MAX_DEPTH)
    if found is None or found.ndim != 1 or found.shape[0] != size:
        return None
    return found, list(dict.fromkeys(nodes))


def _read(value: ir.Value | None, x: ir.Value, size: int, nodes: list[ir.Node], depth: int) -> Signed | None:
    """Trailing axes of `value` (1, or 2 after a stack or a view in pairs) as signed positions of `x`."""
    if value is x:
        return np.arange(size) + 1
    node = value.producer() if value is not None else None
    if value is None or node is None or depth == 0:
        return None
    nodes.append(node)

    def inner(index: int = 0) -> Signed | None:
        return _read(node.inputs[index], x, size, nodes, depth - 1)

    if is_op(node, "Neg"):
        source = inner()
        return None if source is None else -source
    if is_op(node, "Slice"):
        return _slice(node, inner())
    if is_op(node, "Split"):
        return _split(node, value, inner())
    if is_op(node, "Gather"):
        return _gather(node, inner())
    if is_op(node, "Concat"):
        return _concat(node, [inner(i) for i in range(len(node.inputs))])
    if is_op(node, "Unsqueeze"):
        source, axes, rank = inner(), constant(node.inputs[1]), rank_of(value)
        last = axes is not None and rank is not None and [int(a) % rank for a in axes.reshape(-1)] == [rank - 1]
        return source[..., None] if source is not None and last else None
    if is_op(node, "Squeeze"):
        source = inner()
        return source[..., 0] if source is not None and source.ndim == 2 and source.shape[-1] == 1 else None
    if is_op(node, "Reshape", "Flatten"):
        return _reshape(node, value, inner())
    return None


def _last_axis(node: ir.Node, axis: int, source: Signed) -> int | None:
    """`axis` of the node's input counted from the end as an axis of `source`; None if it is not one of its axes."""
    rank = rank_of(node.inputs[0])
    if rank is None:
        return None
    from_end = int(axis) % rank - rank
    return from_end if -from_end <= source.ndim else None


def _slice(node: ir.Node, source: Signed | None) -> Signed | None:
    arrays = [constant(v) if v is not None else None for v in (*node.inputs[1:], None, None)][:4]
    starts, ends, axes, steps = arrays
    if source is None or starts is None or ends is None or axes is None or starts.size != 1:
        return None
    axis = _last_axis(node, int(axes.reshape(-1)[0]), source)
    if axis is None:
        return None
    step = 1 if steps is None else int(steps.reshape(-1)[0])
    index = [slice(None)] * source.ndim
    index[axis] = slice(int(starts.reshape(-1)[0]), int(ends.reshape(-1)[0]), step)
    return source[tuple(index)] if step > 0 else None


def _split(node: ir.Node, value: ir.Value, source: Signed | None) -> Signed | None:
    axis = None if source is None else _last_axis(node, int(attribute(node, "axis", 0)), source)
    if source is None or axis is None:
        return None
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is not None:
        ends = np.cumsum(sizes.reshape(-1))[:-1].tolist()
        return np.split(source, ends, axis)[value.index() or 0]
    count = len(node.outputs)
    return np.split(source, count, axis)[value.index() or 0] if source.shape[axis] % count == 0 else None


def _gather(node: ir.Node, source: Signed | None) -> Signed | None:
    axis = None if source is None else _last_axis(node, int(attribute(node, "axis", 0)), source)
    indices = constant(node.inputs[1])
    if source is None or axis is None or indices is None or indices.ndim > 1:
        return None
    return np.take(source, indices, axis)


def _concat(node: ir.Node, parts: list[Signed | None]) -> Signed | None:
    known = [p for p in parts if p is not None]
    if len(known) != len(parts) or len({p.ndim for p in known}) != 1:
        return None
    axis = _last_axis(node, int(attribute(node, "axis", 0)), known[0])
    return None if axis is None else np.concatenate(known, axis)


def _reshape(node: ir.Node, value: ir.Value, source: Signed | None) -> Signed | None:
    """Only views that pair up or flatten trailing axes: the leading dims must stay as they are."""
    before, after = shape_of(node.inputs[0]), shape_of(value)
    if source is None or before is None or after is None:
        return None
    size = source.size
    for ndim in (1, 2):
        tail = after[len(after) - ndim :]
        if len(after) - ndim != len(before) - source.ndim or not all(isinstance(d, int) for d in tail):
            continue
        if int(np.prod([d for d in tail if isinstance(d, int)])) == size:
            lead = zip(before[: len(before) - source.ndim], after[: len(after) - ndim], strict=True)
            if all(a == b and a is not None for a, b in lead):
                return source.reshape([d for d in tail if isinstance(d, int)])
    return None
