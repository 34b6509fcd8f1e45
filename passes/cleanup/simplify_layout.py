"""Merge and remove operators that only rearrange: Transpose, Reshape, Squeeze, Unsqueeze, Flatten.

Rules (a view is a Reshape, Flatten, Squeeze or Unsqueeze: it keeps the elements in their order)
1. `transpose_identity`: Transpose by the identity permutation.
2. `transpose_twice`: Transpose(Transpose(x, p), q) = Transpose(x, p[q]).
3. `view_identity`: a view whose result has provably the shape of its operand. One dim may be unknown on both sides,
   as long as the others agree and none of them is 0.
4. `view_of_view`: the outer view already has, some views below, an operand of its own shape: read that.
5. `reshape_of_view`: Reshape(view(x), t) = Reshape(x, t), for constant t; a 0 in t is first resolved to the dim it
   stands for.
6. `squeeze_twice`, `unsqueeze_twice`: the axes of both in one operator.
7. `view_of_reshape`: Squeeze or Unsqueeze of Reshape(x, t) = Reshape(x, t'), for constant t without 0.
8. `transpose_between_views`: Reshape(Transpose(view(x))) = Transpose(Reshape(x)), where the outer view only divides
   axes of the Transpose, so that it can be done before: what flattening a batch of matrices around a Transpose leaves.

A view below that other nodes read stays for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from xform.graph.values import Dim, attribute, is_op, shape_of, used_once
from xform.passes.cleanup.local import NodeRule, axes_of, bypass_allowed, given, integers, known_rank
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def permutation(node: ir.Node) -> list[int] | None:
    """The permutation of a Transpose; None if it is implicit and the rank unknown."""
    perm = attribute(node, "perm")
    if perm is not None:
        return list(perm)
    rank = known_rank(node.inputs[0])
    return list(reversed(range(rank))) if rank >= 0 else None


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value` as its first output, if it is one of these operators."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_op(node, *op_types) and node.outputs[0] is value else None


class TransposeIdentity(NodeRule):
    """Rule 1."""

    name = "transpose_identity"
    op_types = ("Transpose",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        perm, x = permutation(node), node.inputs[0]
        if perm is None or x is None or perm != sorted(perm) or not bypass_allowed(node, x):
            return QUIET
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value | Failure:
        return match.node("node").inputs[0] or QUIET


class TransposeTwice(NodeRule):
    """Rule 2."""

    name = "transpose_twice"
    op_types = ("Transpose",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        outer = match.node("node")
        inner = _producer(outer.inputs[0], "Transpose")
        first = permutation(inner) if inner is not None else None
        second = permutation(outer)
        if inner is None or first is None or second is None or inner.inputs[0] is None:
            return QUIET
        match.data.update(source=inner.inputs[0], perm=[first[axis] for axis in second])
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        source: ir.Value = match.data["source"]
        perm: list[int] = match.data["perm"]
        if perm == sorted(perm) and bypass_allowed(match.node("node"), source):
            return source
        return build.op("Transpose", source, perm=perm)


def _sources(node: ir.Node) -> Iterator[ir.Value]:
    """Operands of the views below, from near to far, all with the elements of the node's output in order."""
    value = node.inputs[0]
    while value is not None:
        yield value
        below = _producer(value, *VIEWS)
        value = below.inputs[0] if below is not None else None


def _equal_shapes(a: Sequence[Dim] | None, b: Sequence[Dim] | None) -> bool:
    """Whether two shapes with one number of elements are provably the same: at most one dim is not seen to agree."""
    if a is None or b is None or len(a) != len(b):
        return False
    differing = [(x, y) for x, y in zip(a, b, strict=True) if x is None or x != y]
    if not differing:
        return True
    agreed = [x for x, y in zip(a, b, strict=True) if x is not None and x == y]
    return len(differing) == 1 and all(isinstance(x, int) and x > 0 for x in agreed)


class ViewOfEqualShape(NodeRule):
    """Rules 3 and 4."""

    name = "view_identity"
    op_types = VIEWS
    levels = 4

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        shape = shape_of(node.outputs[0])
        for source in _sources(node):
            if _equal_shapes(shape, shape_of(source)) and bypass_allowed(node, source):
                match.data["source"] = source
                return None
        return QUIET

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        source: ir.Value = match.data["source"]
        return source


def _resolved(node: ir.Node) -> list[int] | None:
    """The constant target of a Reshape without a 0 that copies a dim, or None."""
    target = integers(given(node, 1))
    if target is None or attribute(node, "allowzero", 0):
        return None if target is None or 0 in target else target
    shape = shape_of(node.inputs[0])
    for index, size in enumerate(target):
        if size == 0:
            dim = shape[index] if shape is not None and index < len(shape) else None
            if isinstance(dim, int) and dim > 0:
                target[index] = dim
            elif -1 not in target and target.count(0) == 1:
                target[index] = -1
            else:
                return None
    return target


class ReshapeOfView(NodeRule):
    """Rule 5."""

    name = "reshape_of_view"
    op_types = ("Reshape",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        sources = list(_sources(node))
        if len(sources) < 2:
            return QUIET
        copied = _copied_dims(node, sources[-1])
        target = copied if copied is not None else _resolved(node)
        if target is None:
            return QUIET
        match.data.update(source=sources[-1], target=target)
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        target = build.constant(np.array(match.data["target"], dtype=np.int64), "shape")
        return build.op("Reshape", match.data["source"], target)


def _copied_dims(node: ir.Node, source: ir.Value) -> list[int] | None:
    """The target as it stands, if every 0 in it copies a dim that `source` has at the same place."""
    target = integers(given(node, 1))
    near, far = shape_of(node.inputs[0]), shape_of(source)
    if target is None or (attribute(node, "allowzero", 0) and 0 in target):
        return None
    for index, size in enumerate(target):
        if size == 0 and (
            near is None
            or far is None
            or index >= min(len(near), len(far))
            or near[index] != far[index]
            or near[index] is None
        ):
            return None
    return target


class SqueezeTwice(NodeRule):
    """Rule 6 for Squeeze."""

    name = "squeeze_twice"
    op_types = ("Squeeze",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        outer = match.node("node")
        inner = _producer(outer.inputs[0], "Squeeze")
        if inner is None or inner.inputs[0] is None:
            return QUIET
        rank = known_rank(inner.inputs[0])
        first = axes_of(inner, rank) if rank >= 0 else None
        second = axes_of(outer, rank - len(first)) if first is not None else None
        if first is None or second is None:
            return QUIET
        left = [axis for axis in range(rank) if axis not in first]
        match.data.update(source=inner.inputs[0], axes=sorted([*first, *(left[a] for a in second)]))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Squeeze", match.data["source"], match.data["axes"])


class UnsqueezeTwice(NodeRule):
    """Rule 6 for Unsqueeze."""

    name = "unsqueeze_twice"
    op_types = ("Unsqueeze",)

    def check(self, match: Match, context: PassContext) -> Failure | None:
        outer = match.node("node")
        inner = _producer(outer.inputs[0], "Unsqueeze")
        first, second = integers(given(inner, 1)) if inner is not None else None, integers(given(outer, 1))
        if inner is None or inner.inputs[0] is None or first is None or second is None:
            return QUIET
        rank = known_rank(inner.inputs[0])
        if rank < 0:
            return QUIET
        middle = rank + len(first)
        total = middle + len(second)
        new = [a % total for a in second]
        kept = [axis for axis in range(total) if axis not in new]  # where the axes of the middle value go
        match.data.update(source=inner.inputs[0], axes=sorted([*new, *(kept[a % middle] for a in first)]))
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        return build.op("Unsqueeze", match.data["source"], match.data["axes"])


class ViewOfReshape(NodeRule):
    """Rule 7."""

    name = "view_of_reshape"
    op_types = ("Squeeze", "Unsqueeze")

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        inner = _producer(node.inputs[0], "Reshape")
        axes = integers(given(node, 1))
        target = _resolved(inner) if inner is not None else None
        if inner is None or target is None or axes is None:
            return QUIET
        if node.op_type == "Squeeze":
            dropped = {a % len(target) for a in axes} if target else set()
            if any(target[a] != 1 for a in dropped):
                return QUIET
            result = [size for axis, size in enumerate(target) if axis not in dropped]
        else:
            rank = len(target) + len(axes)
            rest = iter(target)
            new = {a % rank for a in axes}
            result = [1 if axis in new else next(rest) for axis in range(rank)]
        match.data.update(source=inner.inputs[0], target=result)
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        target = build.constant(np.array(match.data["target"], dtype=np.int64), "shape")
        return build.op("Reshape", match.data["source"], target)


class TransposeBetweenViews(NodeRule):
    """Rule 8."""

    name = "transpose_between_views"
    op_types = ("Reshape",)
    levels = 3

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        swap = _producer(node.inputs[0], "Transpose")
        view = _producer(swap.inputs[0], *VIEWS) if swap is not None else None
        perm = permutation(swap) if swap is not None else None
        if (
            swap is None
            or view is None
            or perm is None
            or not (used_once(swap.outputs[0]) and swap.graph is node.graph)
        ):
            return QUIET
        groups = _divided(shape_of(swap.outputs[0]), shape_of(node.outputs[0]))
        if groups is None:
            return QUIET
        parts: dict[int, list[Dim]] = dict(zip(perm, groups, strict=True))
        before = [parts[axis] for axis in range(len(perm))]
        target = [dim for group in before for dim in group]
        if sum(not isinstance(dim, int) for dim in target) > 1:
            return QUIET
        starts = [sum(map(len, before[:axis])) for axis in range(len(perm))]
        match.data.update(
            source=view.outputs[0],
            target=[dim if isinstance(dim, int) else -1 for dim in target],
            perm=[starts[axis] + i for axis in perm for i in range(len(parts[axis]))],
        )
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        target = build.constant(np.array(match.data["target"], dtype=np.int64), "shape")
        return build.op("Transpose", build.op("Reshape", match.data["source"], target), perm=match.data["perm"])


def _divided(shape: Sequence[Dim] | None, parts: Sequence[Dim] | None) -> list[list[Dim]] | None:
    """`parts` in consecutive groups whose products are the dims of `shape`, or None; a symbol divides into itself."""
    if shape is None or parts is None or not shape or 0 in shape:
        return None
    groups: list[list[Dim]] = []
    rest = list(parts)
    for dim in shape:
        group: list[Dim] = []
        while rest and not _makes(group, dim):
            group.append(rest.pop(0))
        if dim is None or not _makes(group, dim):
            return None
        groups.append(group)
    if any(dim != 1 for dim in rest):
        return None
    groups[-1].extend(rest)
    return groups


def _makes(group: Sequence[Dim], dim: Dim) -> bool:
    """Whether the product of `group`, which is not empty, is `dim`."""
    if not group:
        return False
    if isinstance(dim, int):
        numbers = [part for part in group if isinstance(part, int)]
        return len(numbers) == len(group) and prod(numbers) == dim
    return [part for part in group if part != 1] == [dim]


@dataclass(frozen=True)
class SimplifyLayout(RewritePass):
    """Simplification of chains of views and transposes."""

    name = "simplify_layout"

    def rules(self) -> Sequence[Rule]:
        return (
            TransposeIdentity(),
            TransposeTwice(),
            ViewOfEqualShape(),
            ReshapeOfView(),
            SqueezeTwice(),
            UnsqueezeTwice(),
            ViewOfReshape(),
            TransposeBetweenViews(),
        )
