"""Four axes for every attention: [batch, heads, sequence, size], whatever rank the graph computes in.

rank 4   as it is
rank 5   [A, B, H, S, D]: the first two become the batch
rank 3   [B*H, S, D] where a view or the operands' own reshapes tell the heads; else one head, batch first
rank 2   one head, one batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.values import Dim, is_op, rank_of, shape_of
from xform.patterns.attention import Core
from xform.patterns.attention_logits import AddMask, Fill, Multiply
from xform.patterns.attention_operands import Operand
from xform.rewrite.builder import Builder
from xform.rewrite.rule import Failure

Part = int | tuple[ir.Value, int]  # a number, or the dim of a value at an axis


def dim(value: ir.Value, axis: int) -> Part:
    """The dim of `value` at `axis`: a number where it is known, else where to find it when the model runs."""
    shape = shape_of(value)
    known = shape[axis] if shape is not None else None
    return known if isinstance(known, int) else (value, axis % (rank_of(value) or 1))


def vector(build: Builder, parts: Sequence[Part]) -> ir.Value | list[int]:
    """A shape operand made of numbers and dims."""
    if all(isinstance(p, int) for p in parts):
        return [p for p in parts if isinstance(p, int)]
    pieces: list[ir.Value | list[int]] = []
    for part in parts:
        if not isinstance(part, int):
            value, axis = part
            pieces.append(build.op("Shape", value, start=axis, end=axis + 1))
        elif pieces and isinstance(pieces[-1], list):
            pieces[-1].append(part)
        else:
            pieces.append([part])
    return build.op("Concat", *pieces, axis=0) if len(pieces) > 1 else pieces[0]


def same(first: int, last: int) -> list[slice]:
    """The axes from `first` up to `last`, as `Builder.reshape` takes axes that stay what they are."""
    return [slice(axis, axis + 1) for axis in range(first, last)]


@dataclass(frozen=True)
class Layout:
    """How operands of one rank become four axes.

    Attributes:
        rank: Rank of the operands.
        heads: For rank 3: the number of heads folded into the first axis; None for one head.
        inner: The second of two leading axes that are folded into the batch: of operands of rank 5, or of a view of
            rank 5 in which masks are added. None where there is none.
    """

    rank: int
    heads: int | None = None
    inner: int | None = None

    def lift(self, build: Builder, given: Operand) -> ir.Value:
        """[batch, heads, sequence, size] of an operand, its scale left out."""
        if given.rank == 4:
            return given.build(build)
        if given.rank == 2:
            return build.op("Unsqueeze", given.build(build), [0, 1])
        if given.rank == 3 and self.heads is not None and (unfolded := unfold(given, self.heads)) is not None:
            return unfolded.build(build)
        value = given.build(build)
        if given.rank == 5:
            return build.reshape(value, slice(0, 2), *same(2, 5))
        if self.heads is None:
            return build.op("Unsqueeze", value, [1])
        return build.reshape(value, (slice(0, 1), self.heads), self.heads, *same(1, 3))

    def lower(self, build: Builder, value: ir.Value, values: Operand) -> ir.Value:
        """The result with four axes in the rank of `values`, the operand of the second product."""
        if values.rank == 4:
            return value
        if values.rank == 2:
            return build.op("Squeeze", value, [0, 1])
        if values.rank == 3 and self.heads is None:
            return build.op("Squeeze", value, [1])
        if values.rank == 3:
            return build.reshape(value, slice(0, 2), *same(2, 4))
        assert self.inner is not None  # `choose` has seen to it
        return build.reshape(value, (slice(0, 1), self.inner), self.inner, *same(1, 4))

    def lift_mask(self, build: Builder, mask: ir.Value, view: tuple[Dim, ...] | None, queries: ir.Value) -> ir.Value:
        """[batch or 1, heads or 1, queries or 1, keys or 1] of a mask that broadcasts against logits of this rank.

        Args:
            view: Shape in which the logits were viewed when the mask was applied; None for their own.
            queries: The queries with four axes: they tell the batch size.
        """
        rank = self.rank if view is None else len(view)
        missing = max(rank, 4 if rank != 3 else 3) - (rank_of(mask) or 0)
        if missing:
            mask = build.op("Unsqueeze", mask, list(range(missing)))
        shape = shape_of(mask) or ()
        if rank == 3 and self.heads is None:
            return build.op("Unsqueeze", mask, [1])
        if rank == 3 and shape[0] == 1:
            return build.op("Unsqueeze", mask, [0])
        if rank == 3:
            heads = self.heads or 1
            return build.reshape(mask, (slice(0, 1), heads), heads, *same(1, 3))
        if rank <= 4:
            return mask
        if shape[0] == shape[1] == 1:
            return build.op("Squeeze", mask, [0])
        return self._merged(build, mask, queries)

    def _merged(self, build: Builder, mask: ir.Value, queries: ir.Value) -> ir.Value:
        """A mask [A or 1, inner or 1, h, s, t] as [A * inner, h, s, t]."""
        assert self.inner is not None  # `choose` has seen to it
        batch = (shape_of(queries) or (None,))[0]
        if isinstance(batch, int):
            target: ir.Value | list[int] = [batch // self.inner, self.inner, 1, 1, 1]
        else:
            outer = build.op("Div", build.op("Shape", queries, start=0, end=1), [self.inner])
            target = build.op("Concat", outer, [self.inner, 1, 1, 1], axis=0)
        return build.reshape(build.op("Expand", mask, target), slice(0, 2), *same(2, 5))


def choose(core: Core) -> Layout | Failure:
    """The layout of an attention, or what is not known about its shapes."""
    rank = core.queries.rank
    steps = [s for s in core.logits.steps if isinstance(s, AddMask | Fill)]
    views = [s.view for s in steps if s.view is not None]
    views += [core.logits.view] if core.logits.view is not None else []
    if core.logits.factors and rank != 4:
        return Failure(f"a factor that is no number on logits of rank {rank}", (core.logits.product,))
    if rank not in (2, 3, 4, 5):
        return Failure(f"queries of rank {rank}", (core.logits.product,))
    if any(v[:-2] != views[0][:-2] for v in views):
        return Failure("the logits are viewed in two different shapes", (core.logits.product,))
    folded = views[0][1] if views else None
    if rank == 3:
        heads = folded if views else _heads_of_operands(core)
        if heads is not None and not isinstance(heads, int):
            return Failure("the number of heads is not known before the model runs", (core.logits.product,))
        layout = Layout(rank, heads=heads)
    else:
        inner = core.queries.shape()[1] if rank == 5 else folded
        if (rank == 5 or views) and not isinstance(inner, int):
            return Failure("the second batch dim is not known before the model runs", (core.logits.product,))
        layout = Layout(rank, inner=inner if isinstance(inner, int) else None)
    return _check_masks(core, layout) or layout


def _check_masks(core: Core, layout: Layout) -> Failure | None:
    for step in core.logits.steps:
        if isinstance(step, Multiply):
            continue
        mask = step.mask if isinstance(step, AddMask) else step.condition
        view = step.view
        rank = rank_of(mask)
        if rank is None or rank > (layout.rank if view is None else len(view)):
            return Failure(f"the rank of the mask {mask.name} is unknown or above that of the logits", (core.node,))
    if core.values.rank not in (layout.rank, 4 if layout.heads or core.logits.view else layout.rank):
        return Failure(f"values of rank {core.values.rank} under queries of rank {layout.rank}", (core.node,))
    return None


def _heads_of_operands(core: Core) -> int | None:
    """The heads that all three operands of rank 3 were reshaped from; None where they do not tell."""
    found = set()
    for given in (core.queries, core.keys, core.values):
        node = given.value.producer()
        shape = shape_of(node.inputs[0]) if node is not None and is_op(node, "Reshape") else None
        found.add(shape[1] if shape is not None and len(shape) == 4 else None)
    heads = found.pop()
    if found or not isinstance(heads, int):
        return None
    return heads if all(unfold(g, heads) is not None for g in (core.queries, core.keys, core.values)) else None


def unfold(given: Operand, heads: int) -> Operand | None:
    """The operand of rank 4 that an operand [B*heads, S, D] was reshaped from."""
    node = given.value.producer()
    if given.perm[0] != 0 or node is None or not is_op(node, "Reshape") or node.inputs[0] is None:
        return None
    before, after = shape_of(node.inputs[0]), shape_of(given.value)
    if before is None or after is None or len(before) != 4 or None in after[1:]:
        return None
    if before[1] != heads or before[2:] != after[1:]:
        return None
    return Operand(node.inputs[0], (0, 1, given.perm[1] + 1, given.perm[2] + 1), given.scale)
