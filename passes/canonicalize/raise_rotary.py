"""Rotary position embedding in any spelling to RotaryEmbedding (Su et al., arXiv 2104.09864; ONNX 23).

Rules
1. `rotary`: x * cos + rotate(x) * sin becomes RotaryEmbedding(x, cos/2, sin/2) for the half-split and the interleaved
   form (`xform/patterns/rotary.py`), where cos/2 keeps one of each pair of equal columns.
2. `batch`: RotaryEmbedding whose caches of [1, sequence, size/2] are shared by the batch, as torch's exporter writes it
   at opset 23, gets caches of x's batch: the definition asks for it, and ONNX Runtime refuses anything else.

Preconditions of rule 1
- x is [batch, heads, sequence, size] with a static even size; cos and sin do not vary over the heads.
- cos and sin hold every column twice in the order of the form: proved from how they are computed (elementwise ops of
  a Concat of a value with itself, of a repeated value), or by looking, where they are constants.

The operator wants caches of [batch, sequence, size/2]; a cache that is shared by the batch is expanded. Exact: the
same products and sums, only their grouping differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import attribute, constant, is_op, rank_of, same_dim, shape_of
from xform.patterns.rotary import half_split, interleaved, signed_permutation
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.pattern import Key, op, var
from xform.rewrite.rule import QUIET, Failure, Rule

ELEMENTWISE = ("Cos", "Sin", "Cast", "Mul", "Add", "Sub", "Div", "Neg")


class Rotary(Rule):
    """Rule 1."""

    name = "rotary"
    concept = "rotary"

    def anchors(self) -> frozenset[Key]:
        return frozenset({("", "Add"), ("", "Sub")})

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        if len(node.inputs) != 2 or not is_op(node, "Add"):
            return
        left, right = (v.producer() if v is not None else None for v in node.inputs)
        if left is None or right is None or not is_op(left, "Mul") or not is_op(right, "Mul"):
            return
        for plain, turned in ((left, right), (right, left)):
            for i in (0, 1):
                for j in (0, 1):
                    x, cos, rotated, sin = (
                        plain.inputs[i],
                        plain.inputs[1 - i],
                        turned.inputs[j],
                        turned.inputs[1 - j],
                    )
                    if x is None or cos is None or rotated is None or sin is None or rotated is x:
                        continue
                    yield from self._candidate(node, x, cos, rotated, sin, [plain, turned])

    def _candidate(
        self, node: ir.Node, x: ir.Value, cos: ir.Value, rotated: ir.Value, sin: ir.Value, nodes: list[ir.Node]
    ) -> Iterator[Match | Failure]:
        shape = shape_of(x)
        if not shape or not isinstance(shape[-1], int) or shape[-1] % 2 or shape[-1] == 0:
            return
        size = shape[-1]
        found = signed_permutation(rotated, x, size)
        if found is None:
            return
        permutation, spelled = found
        is_half = bool(np.array_equal(permutation, half_split(size)))
        if not is_half and not np.array_equal(permutation, interleaved(size)):
            return
        if len(shape) != 4:
            yield Failure(f"the rotated value has rank {len(shape)}, not [batch, heads, sequence, size]", (node,))
            return
        for name, cache in (("cos", cos), ("sin", sin)):
            if not _repeats(cache, size, is_half):
                yield Failure(f"the columns of {name} ({cache.name}) are not provably equal in pairs", (node,))
                return
            if _cache_dims(cache) is None:
                yield Failure(f"{name} ({cache.name}) of shape {shape_of(cache)} varies over the heads", (node,))
                return
        data = {"x": x, "cos": cos, "sin": sin, "half": is_half, "size": size}
        yield Match(roots=(node.outputs[0],), interior=(*nodes, *spelled), data=data)

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        d = match.data
        x: ir.Value = d["x"]
        caches = [_half_cache(build, d[k], x, d["size"], d["half"]) for k in ("cos", "sin")]
        return build.op("RotaryEmbedding", x, *caches, interleaved=0 if d["half"] else 1)


def _cache_dims(cache: ir.Value) -> tuple[int | str | None, ...] | None:
    """(batch, sequence, size) of a cache that is [sequence, size] or has one head, None otherwise."""
    shape = shape_of(cache)
    if shape is None or len(shape) not in (2, 4):
        return None
    if len(shape) == 2:
        return (1, *shape)
    return (shape[0], *shape[2:]) if shape[1] == 1 else None


def _half_cache(build: Builder, cache: ir.Value, x: ir.Value, size: int, half: bool) -> ir.Value:
    """[batch, sequence, size/2] from a repeated cache."""
    dims, x_shape = _cache_dims(cache), shape_of(x)
    assert dims is not None and x_shape is not None
    array = constant(cache)
    start, end, step = ([0], [size // 2], [1]) if half else ([0], [size], [2])
    if array is not None:
        kept = array.reshape(array.shape[0] if array.ndim == 4 else 1, array.shape[-2], size)[..., : end[0] : step[0]]
        value = build.constant(np.ascontiguousarray(kept), f"{cache.name}_half")
    else:
        flat = build.op("Squeeze", cache, [1]) if rank_of(cache) == 4 else build.op("Unsqueeze", cache, [0])
        value = build.op("Slice", flat, start, end, [-1], step)
    if same_dim(dims[0], x_shape[0]) and same_dim(dims[1], x_shape[2]):
        return value
    batch_and_sequence = build.op("Gather", build.op("Shape", x), [0, 2])
    shape = build.op("Concat", batch_and_sequence, build.constant(np.array([size // 2])), axis=0)
    return build.op("Expand", value, shape)


def _repeats(cache: ir.Value, size: int, half: bool) -> bool:
    """Whether the last axis of `cache` provably holds every column twice: c[i] = c[i + d/2], or c[2i] = c[2i + 1]."""
    shape = shape_of(cache)
    if shape is None or shape[-1] != size:
        return False
    array = constant(cache)
    if array is not None:
        a, b = (array[..., : size // 2], array[..., size // 2 :]) if half else (array[..., ::2], array[..., 1::2])
        return bool(np.array_equal(a, b))
    return _repeats_by_structure(cache, size, half, 16)


def _repeats_by_structure(value: ir.Value | None, size: int, half: bool, depth: int) -> bool:
    node = value.producer() if value is not None else None
    shape = shape_of(value)
    if value is None or depth == 0 or shape is None or not shape:
        return False
    if shape[-1] == 1:
        return True  # broadcast along the axis
    if constant(value) is not None:
        return _repeats(value, size, half)
    if node is None:
        return False
    if is_op(node, "Unsqueeze", "Squeeze"):
        inner = shape_of(node.inputs[0])
        return (
            inner is not None and inner[-1:] == (size,) and _repeats_by_structure(node.inputs[0], size, half, depth - 1)
        )
    if is_op(node, *ELEMENTWISE):
        return all(rank_of(v) == 0 or _repeats_by_structure(v, size, half, depth - 1) for v in node.inputs)
    if is_op(node, "Slice", "Gather", "Reshape", "Transpose", "Expand", "Concat"):
        return _moved(node, value, size, half, depth)
    return False


def _moved(node: ir.Node, value: ir.Value, size: int, half: bool, depth: int) -> bool:
    """Operators that move data: the repetition made here, or one kept because the last axis is not touched."""
    rank = rank_of(value)
    if is_op(node, "Concat"):
        last = rank is not None and int(attribute(node, "axis", 0)) % rank == rank - 1
        if last:
            return half and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        return all(_repeats_by_structure(v, size, half, depth - 1) for v in node.inputs)
    source = node.inputs[0]
    source_shape = shape_of(source)
    if source_shape is None or rank is None or not source_shape:
        return False
    if is_op(node, "Transpose"):
        perm = attribute(node, "perm")
        kept = perm is not None and perm[-1] == rank - 1
    elif is_op(node, "Slice"):
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
        kept = axes is not None and all(int(a) % rank != rank - 1 for a in axes.reshape(-1))
    elif is_op(node, "Gather"):
        kept = int(attribute(node, "axis", 0)) % len(source_shape) != len(source_shape) - 1
    elif is_op(node, "Reshape"):
        kept = source_shape[-1] == size
        if not kept:
            return _interleaved_view(source, source_shape, size, half)
    else:  # Expand
        kept = source_shape[-1] in (size, 1)
    return bool(kept) and _repeats_by_structure(source, size, half, depth - 1)


def _interleaved_view(
    source: ir.Value | None, source_shape: tuple[int | str | None, ...], size: int, half: bool
) -> bool:
    """[.., d/2, 2] with two equal columns, viewed as [.., d]: stack([f, f], -1), or f[.., None] expanded to two."""
    if half or source is None or source_shape[-2:] != (size // 2, 2):
        return False
    node = source.producer()
    if is_op(node, "Expand") and node is not None:
        inner = shape_of(node.inputs[0])
        return inner is not None and inner[-1] == 1
    if is_op(node, "Concat") and node is not None:
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    return False


class Batch(Rule):
    """Rule 2."""

    name = "batch"
    concept = "rotary"
    pattern = op("RotaryEmbedding", var("x"), var("cos"), var("sin"), name="rotary")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        x, cos, sin = (shape_of(match[k]) for k in ("x", "cos", "sin"))
        if x is None or cos is None or sin is None or len(cos) != 3 or len(sin) != 3:
            return QUIET
        return None if cos[0] == sin[0] == 1 and x[0] != 1 else QUIET

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        x, node = match["x"], match.node("rotary")
        shape = build.op("Concat", build.op("Shape", x, start=0, end=1), [1, 1], axis=0)
        caches = [build.op("Expand", match[k], shape) for k in ("cos", "sin")]
        return build.op("RotaryEmbedding", x, *caches, **{n: a.value for n, a in node.attributes.items()})


@dataclass(frozen=True)
class RaiseRotary(RewritePass):
    """Raise every spelling of rotary position embedding to RotaryEmbedding."""

    name: ClassVar[str] = "raise_rotary"

    def rules(self) -> Sequence[Rule]:
        return (Rotary(), Batch())
