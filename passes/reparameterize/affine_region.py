"""Regions of affine operators: written as sums of affine maps of a few source values, and how much that costs.

A region starts at one or more root values, each the identity of itself. Expanding a source replaces it by the affine
parts of the node that produces it; parts that read the same value over the same axis become one map. Every step is
exact or refused. The nodes whose results nothing outside the region needs any more are saved; the maps that are left
have to be built. The region pays if

    cost = FLOPs + parameters

of what is built is no more than of what is saved, and fewer nodes are built than saved. Parameters count as one
operation each, since each is read at least once per run: that decides whether a shared weight is worth a copy. A
multiply-add is two operations; symbolic dims count as `ASSUMED_SIZE`. A weight that other nodes read is not saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from xform.graph import dims
from xform.graph.channel_axis import VIEWS, axis_before
from xform.graph.values import Array, attribute, display_name, is_op, rank_of, shape_of
from xform.passes.reparameterize.affine_map import AffineMap, add, compose, identity, scaling, without_shift
from xform.passes.reparameterize.affine_read import DENSE, OPERATORS, channels_of, outputs_of, read
from xform.passes.reparameterize.constant_expression import expression

ASSUMED_SIZE = 16  # of a symbolic dim, for costs
MAX_NODES = 40  # affine nodes looked at behind one root


@dataclass(frozen=True)
class Term:
    """One summand of a root: `views` of `map` applied to `source`, whose channels lie on `axis`.

    Attributes:
        views: Transposes and reshapes between the map and the root, in the order of the data flow.
    """

    source: ir.Value
    axis: int
    map: AffineMap
    views: tuple[ir.Node, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a node could not be taken into a region."""

    node: ir.Node
    reason: str


@dataclass
class Region:
    """The roots as sums of terms, and the nodes that this takes over.

    Attributes:
        roots: Values that are replaced, with their channel axes.
        terms: Per root.
        absorbed: Expanded nodes.
        constants: Nodes that compute their weights from other weights.
        lenient: Look only at sizes: take every map that is nearly affine for one. Shows what a refusal costs; never
            built.
        refusals: What could not be expanded or composed.
    """

    roots: tuple[tuple[ir.Value, int], ...]
    terms: list[list[Term]]
    absorbed: dict[ir.Node, None] = field(default_factory=dict)
    constants: dict[ir.Node, None] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    lenient: bool = False

    @staticmethod
    def at(roots: Sequence[tuple[ir.Value, int]], *, lenient: bool = False) -> Region | None:
        """The region before any expansion; None where the number of channels is not known."""
        terms = []
        for value, axis in roots:
            producer = value.producer()
            channels = outputs_of(producer, axis) if producer is not None else None
            if channels is None:
                return None
            terms.append([Term(value, axis, identity(channels))])
        return Region(tuple(roots), terms, lenient=lenient)

    def copy(self) -> Region:
        """A snapshot."""
        return replace(
            self,
            terms=[list(row) for row in self.terms],
            absorbed=dict(self.absorbed),
            constants=dict(self.constants),
            refusals=list(self.refusals),
        )

    def sources(self) -> dict[ir.Value, None]:
        """The values that the terms read."""
        return {term.source: None for terms in self.terms for term in terms}

    def expand(self, node: ir.Node) -> bool:
        """Replace the result of `node` by its parts in every term; False, with a refusal, if that is not exact."""
        value = node.outputs[0]
        expanded: list[list[Term]] = []
        for terms in self.terms:
            row: list[Term] = []
            for term in terms:
                found = [term] if term.source is not value else _parts(node, term, lenient=self.lenient)
                if isinstance(found, str):
                    if found:
                        self.refusals.append(Refusal(node, found))
                    return False
                for part in found:
                    reason = _join(row, part)
                    if reason is not None:
                        self.refusals.append(Refusal(node, reason))
            expanded.append(row)
        self.terms = expanded
        self.absorbed[node] = None
        for operand in node.inputs:
            self.constants.update(dict.fromkeys(expression(operand) or ()))
        return True

    def settle(self) -> None:
        """Leave out terms that are constant: their shift joins another term of the same root."""
        self.terms = [_settled(row) for row in self.terms]

    def saved(self) -> list[ir.Node]:
        """Absorbed nodes that nothing outside needs once the roots are replaced."""
        roots = {id(value) for value, _ in self.roots}
        dead: dict[ir.Node, None] = {}
        for node in self.absorbed:  # in the order of expansion readers come before what they read
            if id(node.outputs[0]) in roots or _unread(node, dead):
                dead[node] = None
        return list(dead)

    def saved_constants(self) -> list[ir.Node]:
        """Nodes among `constants` that nothing outside needs once the roots are replaced."""
        dead = dict.fromkeys(self.saved())
        found: list[ir.Node] = []
        left = list(self.constants)
        while fresh := [n for n in left if _unread(n, dead)]:
            found.extend(fresh)
            dead.update(dict.fromkeys(fresh))
            left = [n for n in left if n not in dead]
        return found


def _settled(row: list[Term]) -> list[Term]:
    """One root's terms with the shifts of constant ones in another one; of constants alone, one is left.

    Terms are told apart by identity: equality does not look at the numbers of a map.
    """
    plain = [t for t in row if not t.views]
    if len(plain) < 2 or not any(t.map.zero for t in plain):
        return row
    keep = max(plain, key=lambda t: (not t.map.zero, not t.map.diagonal))
    gone = [t for t in plain if t.map.zero and t is not keep]
    if not gone:
        return row
    shift = np.sum([t.map.arrays[1] for t in gone], axis=0)
    shifted = compose(scaling(np.ones(1), shift, keep.map.outputs), keep.map)
    if isinstance(shifted, str):
        return row
    left = [t for t in row if all(t is not other for other in gone)]
    return [replace(t, map=shifted) if t is keep else t for t in left]


def _unread(node: ir.Node, dead: Mapping[ir.Node, None]) -> bool:
    value = node.outputs[0]
    return not value.is_graph_output() and all(use.node in dead for use in value.uses())


def _parts(node: ir.Node, term: Term, *, lenient: bool = False) -> list[Term] | str:
    """The terms that `term` becomes when the node that produces its source is expanded."""
    operand = node.inputs[0] if node.inputs else None
    if is_op(node, "Transpose", *VIEWS):
        axis = axis_before(node, term.axis)
        if operand is None or axis is None:
            return f"{display_name(node)} does not keep the channels as one axis"
        if not term.map.window.is_pointwise:
            return f"{display_name(node)} moves the axes that a convolution reads"
        if channels_of(operand, axis) != term.map.inputs:
            return f"{display_name(node)} does not keep the channels as one axis"
        before = (node, *term.views)
        views = _reduced(before, operand, axis, term.map.outputs)
        stated = not is_op(node, "Transpose") and term.map.inputs != term.map.outputs
        if stated and len(views) == len(before):  # it would have to be written anew, with another number
            return f"{display_name(node)} states the number of channels, which the maps around it change"
        return [replace(term, source=operand, axis=axis, views=views)]
    parts = read(node, term.axis, lenient=lenient)
    if isinstance(parts, str):
        return parts
    result: list[Term] = []
    for index, part in enumerate(parts):  # M(p + q) + c = (M p + c) + M q: the shift counts once
        mapped = compose(term.map if index == 0 else without_shift(term.map), part.map, lenient=lenient)
        if isinstance(mapped, str):
            return mapped
        result.append(Term(part.operand, part.axis, mapped, term.views))
    return result


def _reduced(views: tuple[ir.Node, ...], source: ir.Value, axis: int, channels: int) -> tuple[ir.Node, ...]:
    """`views` without a leading run that leads back to the layout of `source`.

    Args:
        axis: Channel axis of `source`.
        channels: Number of channels that the map between `source` and the views gives. It can differ from that of
            `source`: a product of rows, [B, S, K] -> [B S, K] -> [B S, N] -> [B, S, N], is one over the last axis.
    """
    order: list[int] | None = None
    only_reshapes = True
    for count, view in enumerate(views, start=1):
        if is_op(view, "Transpose"):
            only_reshapes = False
            perm = attribute(view, "perm")
            if perm is None or (order is None and count > 1):
                return views
            order = list(perm) if order is None else [order[p] for p in perm]
            if order == sorted(order):
                return _reduced(views[count:], source, axis, channels)
        else:
            order = None
            if not only_reshapes:
                return views
            before, after = shape_of(source), shape_of(view.outputs[0])
            if before is not None and None not in before:
                mapped = (*before[:axis], channels, *before[axis + 1 :])
                if mapped == after:
                    return _reduced(views[count:], source, axis, channels)
    return views


def _join(row: list[Term], new: Term) -> str | None:
    """Put `new` among the terms of a root, summed with one over the same value; else the reason why it stays apart."""
    reason: str | None = None
    for index, term in enumerate(row):
        if term.source is new.source and term.axis == new.axis and _same_views(term.views, new.views):
            total = add(term.map, new.map)
            if not isinstance(total, str):
                row[index] = replace(term, map=total)
                return None
            reason = total
    row.append(new)
    return reason


def _same_views(a: tuple[ir.Node, ...], b: tuple[ir.Node, ...]) -> bool:
    def key(view: ir.Node) -> tuple[object, ...]:
        if is_op(view, "Transpose"):
            return ("Transpose", tuple(attribute(view, "perm") or ()))
        return ("Reshape", shape_of(view.outputs[0]))

    return len(a) == len(b) and all(x is y or key(x) == key(y) for x, y in zip(a, b, strict=True))


# Search


def candidates(root: ir.Node) -> list[ir.Node]:
    """`root` and the affine nodes and views behind it that nothing else needs, each before what it reads.

    What is read elsewhere as well stays in any case, so that nothing is won by looking behind it. At most `MAX_NODES`.
    """
    order: dict[ir.Node, None] = {root: None}
    frontier = [root]
    while frontier and len(order) < MAX_NODES:
        node = frontier.pop()
        for value in dict.fromkeys(node.inputs):
            maker = value.producer() if value is not None else None
            if maker is None or maker in order or maker.graph is not root.graph or not is_op(maker, *_TAKEN):
                continue
            if _unread(maker, order):
                order[maker] = None
                frontier.append(maker)
    return list(order)


_TAKEN = ("Transpose", *VIEWS, *OPERATORS)


def grow(region: Region, nodes: Iterable[ir.Node], worth: Callable[[Region], float]) -> tuple[Region, float]:
    """Expand `nodes` in turn; the best region on the way and its worth."""
    best, value = region.copy(), -math.inf
    for node in nodes:
        if node.outputs[0] not in region.sources() or not region.expand(node):
            continue
        region.settle()
        gain = worth(region)
        if gain > value:
            best, value = region.copy(), gain
    best.refusals = region.refusals
    return best, value


# Cost


def elements(value: ir.Value | None) -> int:
    """Number of elements, symbolic dims counted as `ASSUMED_SIZE`."""
    total = 1
    for size in shape_of(value) or ():
        if isinstance(size, int):
            total *= size
        else:
            total *= ASSUMED_SIZE if size is None else dims.evaluate(dims.parse(size), {}, ASSUMED_SIZE)
    return total


def gain(region: Region) -> float:
    """Cost saved less cost built; negative where the region is not even smaller."""
    return saved_cost(region) - built_cost(region)


def built_cost(region: Region) -> int:
    """FLOPs and parameters of the terms that have to be built."""
    return sum(_row_cost(terms, root) for terms, (root, _) in zip(region.terms, region.roots, strict=True))


def _row_cost(terms: Sequence[Term], root: ir.Value) -> int:
    size = elements(root)
    total = (len(terms) - 1) * size
    for term in terms:
        if term.map.diagonal:
            steps = factor_and_shift(term.map)
            total += sum(size + term.map.outputs for step in steps if step is not None)
            continue
        flops = term.map.flops(elements(term.source) // term.map.inputs, size // term.map.outputs)
        total += flops + term.map.parameters
    return total


def built_nodes(region: Region) -> int:
    """Number of nodes that have to be built."""
    total = 0
    for terms in region.terms:
        total += len(terms) - 1
        for term in terms:
            total += len(term.views)
            if term.map.diagonal:
                total += sum(step is not None for step in factor_and_shift(term.map))
            else:
                total += 2 if as_product(term) and not term.map.unbiased else 1
    return total


def as_product(term: Term) -> bool:
    """Whether a map that is not diagonal becomes a MatMul and an Add (channels last), and no convolution (axis 1)."""
    return term.axis != 1 or rank_of(term.source) == 2


def factor_and_shift(part: AffineMap) -> tuple[Array | None, Array | None]:
    """Of a map that is a factor and a shift per channel: each, float64 [channels], or None where it does nothing."""
    kernel, shift = part.arrays
    factor = kernel.reshape(-1)
    return None if np.all(factor == 1) else factor, None if not np.any(shift) else shift


def saved_cost(region: Region) -> int:
    """FLOPs and parameters of the nodes that the region makes superfluous."""
    saved, constants = region.saved(), region.saved_constants()
    gone = {*saved, *constants}
    return sum(node_cost(node) for node in saved) + sum(_freed(node, gone) for node in gone)


def node_cost(node: ir.Node) -> int:
    """FLOPs of one affine node."""
    size = elements(node.outputs[0])
    if is_op(node, "Transpose", *VIEWS, "Pad"):
        return 0
    if is_op(node, "BatchNormalization"):
        return 2 * size
    if is_op(node, "AveragePool"):
        return size * math.prod(int(k) for k in attribute(node, "kernel_shape", (1,)))
    if is_op(node, "Sum"):
        return size * (len(node.inputs) - 1)
    if not is_op(node, *DENSE):
        return size
    weight = shape_of(node.inputs[1]) or ()
    taps = math.prod(s for s in weight[2:] if isinstance(s, int)) if not is_op(node, "MatMul") else 1
    bias = size if len(node.inputs) > 2 and node.inputs[2] is not None else 0
    rows = weight[1] if is_op(node, "Conv", "ConvTranspose") else weight[0]
    per: int = 2 * taps * (rows if isinstance(rows, int) else 1)
    positions = elements(node.inputs[0]) if is_op(node, "ConvTranspose") else size
    return per * positions + bias


def _freed(node: ir.Node, gone: set[ir.Node]) -> int:
    """Elements of the constants that only nodes in `gone` read."""
    total = 0
    for value in dict.fromkeys(node.inputs):
        if value is None or value.producer() is not None or value.const_value is None or value.is_graph_output():
            continue
        readers = [use.node for use in value.uses()]
        if all(reader in gone for reader in readers):
            total += value.const_value.size // len(set(readers))
    return total
