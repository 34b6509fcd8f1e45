"""Attention among packed tokens, sequence by sequence, where the padded form would unpack and pack them again.

`pack_tokens` leaves

    q, k, v = heads(a[places]), heads(b[places]), heads(c[places])       a, b, c: packed tokens [T, ..]
    result = merge(Attention(q, k, v, mask)).flatten()[rows]

where both index vectors come from one vector `valid` [B * S], true for positions that have a token: rows [T] =
NonZero(valid), and places [B, S] = valid ? CumSum(valid) - 1 : 0. The tokens of sequence i are the rows from starts[i]
to ends[i], so

    result = concat over i of Attention(a[starts[i]:ends[i]], b[..], c[..], mask[i][tokens of i, tokens of i])

is the same for every token, with sum L_i^2 instead of B S^2 products, and neither copies nor masks for pads: all that
the mask says among tokens (windows, distances, other lengths) is in what is taken of it.

ONNX has no operator on ragged batches, so this is a Loop over the sequences that collects the results; what is taken of
the mask is collected once for all layers. Sequences without tokens are left out. MiniLM-L6, 16 sentences of 9 to 124
tokens of 128: an attention takes 2.8 ms instead of 11.7 on one thread, 2.2 instead of 6.7 on two. 256 sequences of up
to 32 positions take as long by either form, 1024 of up to 16 a third longer by this one, so known short sequences
stay padded (2026-11-22).

Source: Zhai et al. 2023, "ByteTransformer" (arXiv 2210.03052), section III.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from xform.backends.onnxruntime.attention_mask import make_bias
from xform.backends.onnxruntime.emit import Body, Site
from xform.backends.onnxruntime.projections import before_layout, is_head_swap, order_of_columns
from xform.graph.values import Dim, attribute, is_op, rank_of, same_dim, scalar, shape_of, used_once

if TYPE_CHECKING:
    from xform.backends.onnxruntime.attention import Operands

FORM = "attention: by sequence"
SEQUENCE_LOOPS_SINCE = 13  # a Loop of an older opset carries tensors alone
_SHORTEST = 32  # positions of a sequence; below, the loop (35 us a sequence) costs more than the pads


@dataclass(frozen=True)
class _Tokens:
    """Queries, keys or values [B, H, S, D] as columns `first` to `first` + H * D of packed tokens.

    Attributes:
        packed: [T, C].
        places: [B, S], the rows of `packed` in the positions.
        first: The column.
        width: H * D.
    """

    packed: ir.Value
    places: ir.Value
    first: int
    width: int


@dataclass(frozen=True)
class _Sequences:
    """Where the N sequences that have tokens lie among packed tokens.

    Attributes:
        count: N, int64 scalar.
        places: [N], which of the batch they are.
        starts: [N, 1], the first row of each.
        ends: [N, 1], the row behind the last of each.
        positions: [T], of the tokens in their sequences.
    """

    count: ir.Value
    places: ir.Value
    starts: ir.Value
    ends: ir.Value
    positions: ir.Value


def attention_per_sequence(site: Site, a: Operands) -> bool:
    """Lower one attention; False where its operands are no packed tokens, or it is more than a softmax under a mask."""
    if a.causal or a.softcap or a.precision is not None or a.past_key is not None or a.query_heads != a.kv_heads:
        return False
    if a.mask is None or a.query.dtype is not ir.DataType.FLOAT:
        return False
    parts = [tokens for v in (a.query, a.key, a.value) if (tokens := _read_tokens(v)) is not None]
    if len(parts) < 3 or any(tokens.places is not parts[0].places for tokens in parts):
        return False
    places = parts[0].places
    length = (shape_of(places) or (None, None))[1]
    if isinstance(length, int) and length < _SHORTEST:
        return False
    valid = _valid(places)
    packing = None if valid is None else _packing(site.node.outputs[0], valid, parts[2].width)
    if valid is None or packing is None or packing.graph is not site.graph or not _fits(a.mask, places):
        return False
    rows = packing.inputs[1]
    assert rows is not None
    result = _attend(site, a, parts, _sequences(site, valid, rows, places))
    site.emitter.at(packing).replace([(packing.outputs[0], result)], FORM)
    return True


def _read_tokens(value: ir.Value) -> _Tokens | None:
    _, chain = before_layout(value)
    at = max((at for at, (node, _) in enumerate(chain) if _is_unpacking(node)), default=None)
    if at is None:
        return None
    node, unpacked = chain[at]
    packed, places = node.inputs
    order = order_of_columns(unpacked, chain[at + 1 :], value)
    if packed is None or places is None or order is None or (order != order[0] + np.arange(len(order))).any():
        return None
    return _Tokens(packed, places, int(order[0]), len(order))


def _is_unpacking(node: ir.Node) -> bool:
    by_row = is_op(node, "Gather") and attribute(node, "axis", 0) == 0
    return by_row and rank_of(node.inputs[0]) == 2 and rank_of(node.inputs[1]) == 2


def _valid(places: ir.Value) -> ir.Value | None:
    """The vector that `places` was counted from, as `pack_tokens` does."""
    where = _made_by(_read_by(places, "Gather"), "Where")
    if where is None or scalar(where.inputs[2]) != 0:
        return None
    order = _made_by(where.inputs[1], "Sub")
    count = _made_by(order.inputs[0], "CumSum") if order is not None and scalar(order.inputs[1]) == 1 else None
    if count is None or scalar(count.inputs[1]) != 0:
        return None
    if attribute(count, "exclusive", 0) or attribute(count, "reverse", 0):
        return None
    valid = where.inputs[0]
    return valid if _read_by(count.inputs[0], "Cast") is valid else None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and is_op(node, op_type) else None


def _read_by(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The first input of the operator of this type that makes `value`."""
    node = _made_by(value, op_type)
    return None if node is None else node.inputs[0]


def _packing(output: ir.Value, valid: ir.Value, width: int) -> ir.Node | None:
    """The Gather that packs the result of an attention by the rows of `valid`, if nothing else reads it."""
    readers = list(_only_readers(output))
    if rank_of(output) == 4:
        if not readers or not is_head_swap(readers[0]):
            return None
        readers = readers[1:]
    packing = next((node for node in readers if not is_op(node, "Reshape")), None)
    if packing is None or not is_op(packing, "Gather") or attribute(packing, "axis", 0) != 0:
        return None
    flat = shape_of(packing.inputs[0])
    if flat is None or len(flat) != 2 or flat[1] != width:
        return None
    return packing if _read_by(_read_by(packing.inputs[1], "Reshape"), "NonZero") is valid else None


def _only_readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a value first, what reads that, and so on while there is one reader."""
    while used_once(value):
        (use,) = value.uses()
        if use.idx != 0:
            return
        yield use.node
        value = use.node.outputs[0]


def _fits(mask: ir.Value, places: ir.Value) -> bool:
    """Whether the mask is [B or 1, .., S or 1, S or 1] by the names of its dims."""
    shape, sizes = shape_of(mask), shape_of(places)
    if shape is None or sizes is None or len(shape) != 4:
        return False
    wanted = ((shape[0], sizes[0]), (shape[2], sizes[1]), (shape[3], sizes[1]))
    return all(given == 1 or same_dim(given, size) for given, size in wanted)


def _sequences(site: Site, valid: ir.Value, rows: ir.Value, places: ir.Value) -> _Sequences:
    """Made once for all layers."""

    def make() -> _Sequences:
        ints = site.emitter.ints
        zero = site.emitter.constant(0, ir.DataType.INT64, "zero")
        sizes = site.op("Shape", places)
        length = site.op("Slice", sizes, ints(1), ints(2))
        unflatten = places.producer()
        assert unflatten is not None  # the Gather that `_valid` found
        tokens = site.op("Cast", site.op("Gather", valid, unflatten.inputs[1], axis=0), to=ir.DataType.INT64)
        lengths = site.op("ReduceSum", tokens, ints(1), keepdims=1)
        # ONNX Runtime's fused products die (SIGFPE) on tensors without elements: leave out sequences without tokens
        which = site.op("Reshape", site.op("NonZero", site.op("Reshape", lengths, ints(-1))), ints(-1))
        ends = site.op("CumSum", lengths, zero)
        first, behind = (site.op("Gather", of_all, which, axis=0) for of_all in (site.op("Sub", ends, lengths), ends))
        length = site.op("Max", length, ints(1))  # without tokens there are no rows, but Mod still takes it as divisor
        return _Sequences(site.op("Size", which), which, first, behind, site.op("Mod", rows, length))

    found: _Sequences = site.emitter.shared(site.graph, ("sequences", valid, rows, places), make)
    return found


def _attend(site: Site, a: Operands, parts: list[_Tokens], sequences: _Sequences) -> ir.Value:
    """[T, H * D]."""
    bias, shape = make_bias(site, ir.DataType.FLOAT, a.mask, None, finds_empty=not a.nan_rows), shape_of(a.mask)
    assert bias is not None and shape is not None
    added = _by_sequence(site, bias.value, shape, sequences)
    empty = None if bias.empty_rows is None else _empty_rows(site, added, sequences)

    def step(body: Body, index: ir.Value, results: ir.Value) -> ir.Value:
        pieces: dict[ir.Value, ir.Value] = {}
        for tokens in parts:
            if tokens.packed not in pieces:
                pieces[tokens.packed] = _rows_of(body, index, tokens.packed, sequences)
        query, key, value = (_heads(body, pieces[tokens.packed], tokens, a.query_heads) for tokens in parts)
        logits = body.op(
            "MatMul", body.op("Transpose", query, perm=[1, 0, 2]), body.op("Transpose", key, perm=[1, 2, 0])
        )
        if a.scale != 1.0:
            logits = body.op("Mul", logits, site.emitter.constant(a.scale, ir.DataType.FLOAT, "scale"))
        weights = body.op("Softmax", body.op("Add", logits, body.op("SequenceAt", added, index)), axis=-1)
        result = body.op("MatMul", weights, body.op("Transpose", value, perm=[1, 0, 2]))
        if empty is not None:
            zero = site.emitter.constant(0, ir.DataType.FLOAT, "zero")
            result = body.op("Where", body.op("SequenceAt", empty, index), zero, result)
        merged = body.op("Transpose", result, perm=[1, 0, 2])
        return body.op("SequenceInsert", results, body.op("Reshape", merged, site.emitter.ints(-1, parts[2].width)))

    nothing = site.emitter.constant(np.zeros((0, parts[2].width)), ir.DataType.FLOAT, "no_rows")
    start: ir.Value = site.op("SequenceConstruct", nothing)  # an empty batch has no sequences, and rows all the same
    start.type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    results = site.loop(sequences.count, start, step)
    joined: ir.Value = site.op("ConcatFromSequence", results, axis=0)
    joined.type = ir.TensorType(ir.DataType.FLOAT)
    return joined


def _rows_of(body: Body, index: ir.Value, packed: ir.Value, sequences: _Sequences) -> ir.Value:
    """What belongs to one sequence, of values by token."""
    start, end = (body.op("Gather", of_all, index, axis=0) for of_all in (sequences.starts, sequences.ends))
    return body.op("Slice", packed, start, end, body.site.emitter.ints(0))


def _heads(body: Body, rows: ir.Value, tokens: _Tokens, heads: int) -> ir.Value:
    """[L, H, D] of the tokens of one sequence [L, C]."""
    ints, all_columns = body.site.emitter.ints, shape_of(tokens.packed)
    if all_columns is None or all_columns[1] != tokens.width:
        rows = body.op("Slice", rows, ints(tokens.first), ints(tokens.first + tokens.width), ints(1))
    return body.op("Reshape", rows, ints(-1, heads, tokens.width // heads))


def _by_sequence(site: Site, values: ir.Value, shape: Sequence[Dim], sequences: _Sequences) -> ir.Value:
    """What a mask [B or 1, H, S or 1, S or 1] says among the tokens of each sequence [H, L or 1, L or 1]."""

    def step(body: Body, index: ir.Value, results: ir.Value) -> ir.Value:
        positions = _rows_of(body, index, sequences.positions, sequences)
        shared = shape[0] == 1  # by the whole batch
        zero = site.emitter.constant(0, ir.DataType.INT64, "zero")
        place = zero if shared else body.op("Gather", sequences.places, index, axis=0)
        taken = body.op("Gather", values, place, axis=0)
        for axis in (1, 2):
            if shape[axis + 1] != 1:
                taken = body.op("Gather", taken, positions, axis=axis)
        return body.op("SequenceInsert", results, taken)

    def make() -> ir.Value:
        return site.loop(sequences.count, _no_tensors(site, ir.DataType.FLOAT), step)

    found: ir.Value = site.emitter.shared(site.graph, ("by sequence", values, sequences), make)
    return found


def _empty_rows(site: Site, added: ir.Value, sequences: _Sequences) -> ir.Value:
    """Of each sequence, whether the mask leaves a token no token [H, L or 1, 1]; what it leaves of pads is none."""

    def step(body: Body, index: ir.Value, results: ir.Value) -> ir.Value:
        highest = body.op("ReduceMax", body.op("SequenceAt", added, index), site.emitter.ints(-1), keepdims=1)
        closed = site.emitter.constant(-np.inf, ir.DataType.FLOAT, "minus_inf")
        return body.op("SequenceInsert", results, body.op("Equal", highest, closed))

    def make() -> ir.Value:
        return site.loop(sequences.count, _no_tensors(site, ir.DataType.BOOL), step)

    found: ir.Value = site.emitter.shared(site.graph, ("empty rows", added), make)
    return found


def _no_tensors(site: Site, dtype: ir.DataType) -> ir.Value:
    """A sequence to collect tensors in."""
    value: ir.Value = site.op("SequenceEmpty", dtype=dtype)
    value.type = ir.SequenceType(ir.TensorType(dtype))
    return value
