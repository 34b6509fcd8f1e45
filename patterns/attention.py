"""Scaled dot-product attention as exporters spell it: product, softmax, product.

    weights = softmax(logits(q k^T))        out = weights v

`recognize` anchors at the second product. It reads the weights down to the softmax, the logits down to the first
product (`xform.patterns.attention_logits`) and the operands of both (`xform.patterns.attention_operands`). Splitting
heads from a hidden size is no part of it, so one packed product or three, split in any way, are all the same.

Between softmax and second product may stand casts, a view, and the guard `Where(IsNaN(w), 0, w)` of newer exports. The
guard sets the weights of a row without any key to zero, and that is what the Attention operator does with such a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.values import attribute, display_name, is_constant, is_op, rank_of, scalar, shape_of
from xform.patterns.attention_fill import settle
from xform.patterns.attention_logits import FLOATS, Logits, walk_logits
from xform.patterns.attention_operands import Operand, peel, product_operands, weighted_sums
from xform.rewrite.rule import Failure

LONGEST_SHAPE_CHAIN = 64
LONGEST_MIX = 10
_MIXERS = ("MatMul", "Add", "Mul", "Conv", "Gemm", "BatchNormalization")


@dataclass(frozen=True)
class Core:
    """One attention, before its operands are brought to four axes.

    Attributes:
        queries: [.., S, D], constant factors peeled into its scale.
        keys: [.., T, D], likewise.
        values: [.., T, Dv].
        logits: What stands between the first product and the softmax.
        out_perm: Perm from [.., S, Dv] to the output of `node`.
        node: The second product.
        nodes: The nodes between the operands and the output: what the operator replaces.
        precision: dtype of the softmax where it is not that of the operands.
        guarded: Whether rows of NaN weights are made zeros, as the operator does with rows without a key.
    """

    queries: Operand
    keys: Operand
    values: Operand
    logits: Logits
    out_perm: tuple[int, ...]
    node: ir.Node
    nodes: tuple[ir.Node, ...]
    precision: ir.DataType | None
    guarded: bool

    @property
    def scale(self) -> float:
        """The whole factor on q k^T before the soft cap."""
        return self.queries.scale * self.keys.scale * self.logits.scale


def recognize(node: ir.Node) -> Core | Failure | None:
    """Read `node` as the second product of an attention.

    Returns:
        The attention; a Failure where a softmax feeds the product but something else is missing; None where no softmax
        feeds it.
    """
    for weights, values, out_perm in weighted_sums(node):
        chain = _weights(weights)
        if chain is not None:
            return _core(node, chain, values, out_perm)
    return _mixed_heads(node)


def _mixed_heads(node: ir.Node) -> Failure | None:
    """A near miss: constant linear operators between the softmax and the product (talking heads)."""
    if len(node.inputs) != 2 or is_constant(node.inputs[1]):
        return None
    value = node.inputs[0]
    mixer: ir.Node | None = None
    for _ in range(LONGEST_MIX):
        below = value.producer() if value is not None else None
        if below is None:
            return None
        if is_op(below, "Softmax"):
            reason = f"{display_name(mixer)} mixes the weights after the softmax" if mixer is not None else ""
            return Failure(reason, (mixer, below)) if mixer is not None else None
        inputs = [v for v in below.inputs if v is not None and not is_constant(v)]
        if not is_op(below, *_MIXERS, "Transpose", "Reshape") or len(inputs) != 1:
            return None
        mixer = below if is_op(below, *_MIXERS) else mixer
        value = inputs[0]
    return None


def _weights(weights: Operand) -> list[ir.Node] | None:
    """The nodes from a product's operand down to the softmax over its last axis, the softmax last."""
    nodes: list[ir.Node] = []
    value, perm = weights.value, weights.perm
    identity = tuple(range(len(perm)))
    while (node := value.producer()) is not None and len(nodes) < 8:
        if is_op(node, "Softmax"):
            return [*nodes, node] if perm == identity else None
        source: ir.Value | None = node.inputs[0] if node.inputs else None
        if is_op(node, "Transpose") and perm != identity and rank_of(source) == len(perm):
            inner = attribute(node, "perm", list(identity)[::-1])
            perm = tuple(inner[i] for i in perm)
        elif is_op(node, "Where"):
            source = _guarded(node, nodes)
        elif not is_op(node, "Identity", "Cast", "Reshape"):
            return None
        if source is None:
            return None
        nodes.append(node)
        value = source
    return None


def _guarded(node: ir.Node, nodes: list[ir.Node]) -> ir.Value | None:
    """w of `Where(IsNaN(w), 0, w)`; the IsNaN joins `nodes`."""
    condition, zero, weights = node.inputs
    test = condition.producer() if condition is not None else None
    if test is None or not is_op(test, "IsNaN") or test.inputs[0] is not weights or scalar(zero) != 0:
        return None
    nodes.append(test)
    return weights


def _core(node: ir.Node, chain: list[ir.Node], values: Operand, out_perm: tuple[int, ...]) -> Core | Failure | None:
    softmax = chain[-1]
    failure = _check_softmax(softmax) or _check_views(chain)
    if failure is not None:
        return failure
    source = softmax.inputs[0]
    assert source is not None
    logits = walk_logits(source)
    if isinstance(logits, Failure):
        return logits
    if (
        len(logits.product.inputs) > 1
        and is_constant(logits.product.inputs[1])
        and rank_of(logits.product.inputs[1]) == 2
    ):
        return None  # a linear layer and a softmax: a gate or a classifier
    pair = product_operands(logits.product, logits.swapped)
    if isinstance(pair, Failure):
        return pair
    queries, keys = peel(pair[0], transposes=False), peel(pair[1])
    nodes = tuple(dict.fromkeys([node, *chain, *reversed(logits.nodes)]))
    failure = (
        _check_readers(node, nodes)
        or _check_types(queries, keys, values, logits, node)
        or _check_leading(queries, keys, values, node)
    )
    if failure is not None:
        return failure
    dtype = queries.value.dtype
    assert dtype is not None  # one of FLOATS
    settled = settle(logits, dtype)
    if isinstance(settled, Failure):
        return settled
    precision = softmax.outputs[0].dtype
    guarded = any(is_op(n, "IsNaN") for n in chain)
    return Core(
        queries, keys, values, settled, out_perm, node, nodes, precision if precision != dtype else None, guarded
    )


def _check_softmax(softmax: ir.Node) -> Failure | None:
    rank, axis = rank_of(softmax.inputs[0]), attribute(softmax, "axis", -1)
    if axis == -1 or (rank is not None and axis == rank - 1):
        return None
    return Failure(f"the softmax {display_name(softmax)} is over axis {axis}, not over the keys", (softmax,))


def _check_views(chain: list[ir.Node]) -> Failure | None:
    """A view between softmax and product must leave queries and keys alone."""
    for node in chain:
        if not is_op(node, "Reshape"):
            continue
        before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
        if before is None or after is None or before[-2:] != after[-2:] or None in after[-2:]:
            return Failure(f"{display_name(node)} gives the weights another shape", (node,))
    return None


def _check_readers(node: ir.Node, nodes: tuple[ir.Node, ...]) -> Failure | None:
    """Nothing between the two products may be read elsewhere: the operator would compute it a second time."""
    inside = set(nodes)
    for inner in nodes:
        if inner is node:
            continue
        for value in inner.outputs:
            other = next((user for user, _ in value.uses() if user not in inside and not _serves(user, inside)), None)
            if other is not None:
                return Failure(f"{display_name(other)} also reads the attention's {value.name}", (inner, other))
            if value.is_graph_output():
                return Failure(f"the attention's {value.name} is an output of the model", (inner,))
    return None


def _serves(node: ir.Node, inside: set[ir.Node]) -> bool:
    """Whether all that comes of `node` is the shape of a view inside the attention, read off the logits."""
    stack, seen = [node], {node}
    while stack:
        for value in stack.pop().outputs:
            if any(user in inside and (user.op_type, index) != ("Reshape", 1) for user, index in value.uses()):
                return False
            readers = {user for user, _ in value.uses()} - inside - seen
            seen |= readers
            stack += readers
            if value.is_graph_output() or len(seen) > LONGEST_SHAPE_CHAIN:
                return False
    return True


def _check_types(queries: Operand, keys: Operand, values: Operand, logits: Logits, node: ir.Node) -> Failure | None:
    kinds = [operand.value.dtype for operand in (queries, keys, values)]
    if kinds[0] not in FLOATS or any(k != kinds[0] for k in kinds):
        return Failure(f"queries, keys and values are of types {', '.join(map(str, kinds))}", (node, logits.product))
    if logits.widened is not None and logits.widened.itemsize <= (kinds[0].itemsize if kinds[0] is not None else 0):
        return Failure(f"the softmax is computed in {logits.widened}, which is no wider type", (logits.product,))
    return None


def _check_leading(queries: Operand, keys: Operand, values: Operand, node: ir.Node) -> Failure | None:
    """Batch and heads must agree, except for one shared key/value head, or operands of batch 1, over four axes."""
    names = ("queries", "keys", "values")
    leads = [g.shape()[:-2] for g in (queries, keys, values) if g.rank == queries.rank]
    for name, lead in zip(names, leads, strict=False):
        if None in lead:
            return Failure(f"the leading dims of the {name} are unknown", (node,))
    batches = {lead[0] for lead in leads if queries.rank == 4} - {1}
    if queries.rank == 4 and len(batches) <= 1:
        heads = [lead[1] for lead in leads]
        if heads[0] == heads[1] == heads[-1] or heads[1] == heads[-1] == 1:
            return None
    elif all(lead == leads[0] for lead in leads):
        return None
    shapes = ", ".join(f"{name} {list(lead)}" for name, lead in zip(names, leads, strict=False))
    return Failure(f"the leading dims differ: {shapes}", (node,))
