"""Finding attention between `pack_tokens`' packing and unpacking in a lowered module.

    q, k, v = heads(a[places]), heads(b[places]), heads(c[places])       a, b, c: packed rows [T, ..]
    result = merge(attention(q, k, v, mask)).flatten()[rows]

where both index vectors come from one vector `valid` [B S] of the positions that have a row: rows [T] = nonzero(valid)
are the positions of the rows, and places [B, S] = valid ? cumsum(valid) - 1 : 0 the rows of the positions.
Then the result is attention among the rows themselves (padding.py), and nothing is unpacked.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from xform.backends.torch_triton.functions import attention, indexing, reductions
from xform.backends.torch_triton.kernels import common
from xform.backends.torch_triton.kernels.packed_attention.padding import attend, plan

_HEADS = [0, 2, 1, 3]


@dataclass(frozen=True)
class _Operand:
    """Queries, keys or values: the packed rows, the index that unpacked them, how to get them, and their heads."""

    rows: Node
    places: Node
    part: Node | None  # the piece of a split that they are
    heads: int


def fuse(module: GraphModule) -> list[common.Finding]:
    """Attention of unpacked rows whose result is packed again."""
    found: list[common.Finding] = []
    plans: dict[tuple[Node, Node], Node] = {}
    for node in list(module.graph.nodes):
        if not common.is_call(node, F.scaled_dot_product_attention, attention.grouped_attention):
            continue
        operands = [_operand(x) for x in node.args]
        if not any(operands):
            continue
        where = "packed_attention", "attention", common.origins(node)
        reason = _replace(module, node, operands, plans)
        found.append(common.Finding(*where, reason))
    return common.tidy(module, found)


def _replace(
    module: GraphModule, node: Node, operands: list[_Operand | None], plans: dict[tuple[Node, Node], Node]
) -> str:
    """Put attention among rows in place of the padded one; why not, or empty."""
    query, key, value = operands
    if query is None or key is None or value is None:
        return "between packed rows and attention there is more than the split into heads"
    valid = _valid(query.places)
    if valid is None or key.places is not query.places or value.places is not query.places:
        return "queries, keys and values were not unpacked alike"
    mask = node.kwargs.get("attn_mask")
    if common.is_call(mask, attention.lifted):
        assert isinstance(mask, Node)
        mask = mask.args[0]
    shape = common.shape_of(mask)
    if not isinstance(mask, Node) or shape is None or len(shape) != 4 or key.heads != value.heads:
        return f"the mask has shape {shape}"
    end = _packed_again(node, valid)
    if end is None:
        return "the padded result is read by more than what packs it again"
    packed, rows = end
    with module.graph.inserting_before(packed):
        pieces = [_piece(module, operand) for operand in (query, key, value)]
        if (valid, mask) not in plans:
            plans[valid, mask] = module.graph.call_function(plan, (valid, query.places, mask))
        heads = (query.heads, key.heads)
        scale = node.kwargs.get("scale")
        arguments = (*pieces, heads, plans[valid, mask], rows, query.places, mask, scale)
        result = module.graph.call_function(attend, arguments)
    common.swap(module, packed, result)
    return ""


def _operand(x: Any) -> _Operand | None:
    """rows[places] as [B, H, S, D], through one reshape and one permutation."""
    if not (isinstance(x, Node) and common.is_call(x, torch.permute) and list(x.args[1]) == _HEADS):  # type: ignore[arg-type]
        return None
    view = x.args[0]
    shape = common.shape_of(view)
    if not _is_method(view, "reshape") or shape is None or len(shape) != 4 or not isinstance(shape[2], int):
        return None
    assert isinstance(view, Node)
    unpacked, part = view.args[0], None
    if common.is_call(unpacked, operator.getitem):
        assert isinstance(unpacked, Node)
        part, split = unpacked, unpacked.args[0]
        if not (isinstance(split, Node) and common.is_call(split, torch.split) and split.args[2] in (-1, 2)):
            return None
        unpacked = split.args[0]
    if not common.is_call(unpacked, indexing.gather):
        return None
    assert isinstance(unpacked, Node)
    rows, places, axis = unpacked.args
    shape_of_rows = common.shape_of(rows)
    if axis != 0 or shape_of_rows is None or len(shape_of_rows) != 2 or not isinstance(places, Node):
        return None
    assert isinstance(rows, Node)
    return _Operand(rows, places, part, shape[2])


def _piece(module: GraphModule, operand: _Operand) -> Node:
    """The rows of one operand, cut from those of all if they were multiplied together."""
    if operand.part is None:
        return operand.rows
    split, index = operand.part.args
    assert isinstance(split, Node)
    pieces = module.graph.call_function(torch.split, (operand.rows, split.args[1], -1))
    return module.graph.call_function(operator.getitem, (pieces, index))


def _valid(places: Node) -> Node | None:
    """The vector that `places` was counted from."""
    where = places.args[0] if common.is_call(places, indexing.gather) else None
    if not common.is_call(where, torch.where):
        return None
    assert isinstance(where, Node)
    valid, order, other = where.args
    if other != 0 or not isinstance(valid, Node) or not common.is_call(order, operator.sub):
        return None
    assert isinstance(order, Node)
    count, one = order.args
    if one != 1 or not common.is_call(count, reductions.cumulative):
        return None
    assert isinstance(count, Node)
    cast = count.args[0]
    plain = list(count.args[1:]) == [0, False, False, False]
    return valid if plain and _is_method(cast, "to") and cast.args[0] is valid else None  # type: ignore[union-attr]


def _packed_again(node: Node, valid: Node) -> tuple[Node, Node] | None:
    """The node that packs the result of an attention, and the index that it packs by, if nothing else reads it."""
    chain = list(_only_readers(node))
    if chain and common.is_call(chain[0], torch.where):  # zeros for queries that may see nothing
        chain = chain[1:]
    if not chain or not common.is_call(chain[0], torch.permute) or list(chain[0].args[1]) != _HEADS:  # type: ignore[arg-type]
        return None
    rest = chain[1:]
    while rest and _is_method(rest[0], "reshape"):
        rest = rest[1:]
    if not rest or not common.is_call(rest[0], torch.index_select) or rest[0].args[1] != 0:
        return None
    flat, places = common.shape_of(rest[0].args[0]), rest[0].args[2]
    if common.is_call(places, indexing.from_the_front):
        assert isinstance(places, Node)
        places = places.args[0]
    if flat is None or len(flat) != 2 or not isinstance(places, Node) or not _is_method(places, "reshape"):
        return None
    nonzero = places.args[0]
    if not common.is_call(nonzero, indexing.non_zero) or nonzero.args[0] is not valid:  # type: ignore[union-attr]
        return None
    return rest[0], places


def _only_readers(node: Node) -> Iterator[Node]:
    """What reads a node, what reads that, and so on while there is one reader; its size counts for none."""
    while True:
        readers = [user for user in node.users if not _is_size(user)]
        if len(readers) != 1:
            return
        node = readers[0]
        yield node


def _is_size(node: Node) -> bool:
    """Whether a node asks for a size that only tells how to reshape or to count."""
    layout = all(_is_method(user, "reshape") or common.is_call(user, indexing.from_the_front) for user in node.users)
    return layout and _is_method(node, "size")


def _is_method(node: Any, name: str) -> bool:
    """Whether a node calls a method of tensors."""
    return common.is_call(node, getattr(torch.Tensor, name)) or (
        isinstance(node, Node) and node.op == "call_method" and node.target == name
    )
