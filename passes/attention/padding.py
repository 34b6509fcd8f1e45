"""Which input says what is padding, and what is computed token by token."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.values import (
    Dim,
    attribute,
    constant_tensor,
    is_constant,
    is_op,
    rank_of,
    same_dim,
    same_size,
    shape_of,
)
from xform.patterns.elementwise import BINARY, UNARY

_LAYOUT = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Gather", "Identity")


@dataclass(frozen=True)
class Padding:
    """The padding of a batch.

    Attributes:
        mask: Graph input [B, S], nonzero where there is a token.
        dims: B and S.
        attentions: Every Attention node; its mask is computed from `mask`.
        opset: Of the graph.
    """

    mask: ir.Value
    dims: tuple[Dim, Dim]
    attentions: tuple[ir.Node, ...]
    opset: int


def find_padding(model: ir.Model) -> Padding | str:
    """The key-padding mask that all attentions share, or why there is none."""
    attentions = tuple(node for node in model.graph if is_op(node, "Attention"))
    if not attentions:
        return "there is no attention"
    common: set[ir.Value] | None = None
    for node in attentions:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            return "an attention has no mask"
        inputs = {v for v in _sources(mask) if rank_of(v) == 2}
        common = inputs if common is None else common & inputs
    assert common is not None
    if len(common) != 1:
        return "the masks of the attentions are not computed from one input [batch, tokens]"
    mask = common.pop()
    shape = shape_of(mask)
    if shape is None or None in shape:
        return f"the size of {mask.name} is unknown"
    if any(is_op(reader, "Gather") and index == 1 for reader, index in mask.uses()):
        return f"{mask.name} selects embeddings, so it is no mask"
    return Padding(mask, (shape[0], shape[1]), attentions, model.opset_imports.get("", 23))


def _sources(value: ir.Value) -> set[ir.Value]:
    """Graph inputs that a value is computed from, shapes of them aside."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        node = at.producer()
        if node is None:
            if at.is_graph_input():
                found.add(at)
            continue
        if not is_op(node, "Shape", "Size"):
            waiting += [v for v in node.inputs if v is not None]
    return found


def computed_from_mask_alone(value: ir.Value | None, padding: Padding) -> bool:
    """Whether the mask is the only input that a value depends on."""
    return value is not None and not is_constant(value) and _sources(value) == {padding.mask}


def holds_tokens(value: ir.Value | None, padding: Padding) -> bool:
    """Whether a value is [B, S, C]."""
    shape = shape_of(value)
    return shape is not None and len(shape) == 3 and shape[:2] == padding.dims and isinstance(shape[2], int)


def is_token_wise(node: ir.Node, padding: Padding) -> bool:
    """Whether each row of the result depends on the same row of the operands only, and nothing else but constants."""
    if not holds_tokens(node.outputs[0], padding) or len([o for o in node.outputs if o.uses()]) > 1:
        return False
    if is_op(node, "MatMul"):
        weight = constant_tensor(node.inputs[1])
        return holds_tokens(node.inputs[0], padding) and weight is not None and len(weight.shape) == 2
    if is_op(node, "LayerNormalization", "RMSNormalization"):
        constants = all(v is None or is_per_channel(v) for v in node.inputs[1:])
        return constants and holds_tokens(node.inputs[0], padding) and attribute(node, "axis", -1) in (-1, 2)
    if is_op(node, *UNARY, "Clip"):
        return holds_tokens(node.inputs[0], padding) and all(v is None or is_constant(v) for v in node.inputs[1:])
    if is_op(node, *BINARY, "Sum", "Where"):
        return all(v is None or holds_tokens(v, padding) or is_per_channel(v) for v in node.inputs)
    return False


def is_per_channel(value: ir.Value) -> bool:
    """Whether a value is a constant that is the same for all tokens."""
    tensor = constant_tensor(value)
    if tensor is None:
        return False
    dims = list(tensor.shape.numpy())
    return all(dim == 1 for dim in dims[:-1])


def is_layout(node: ir.Node) -> bool:
    """Whether a node only moves elements."""
    return is_op(node, *_LAYOUT)


def axis_after(node: ir.Node, axis: int | None) -> int | None:
    """Where an axis of a layout operator's operand is in its results; None where it is not, or sizes do not tell."""
    before, after = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if axis is None or before is None or after is None:
        return None
    if is_op(node, "Identity"):
        return axis
    if is_op(node, "Transpose"):
        perm = attribute(node, "perm")
        return list(perm).index(axis) if perm is not None else len(before) - 1 - axis
    if is_op(node, "Split", "Slice") and len(before) == len(after):
        return axis if same_dim(before[axis], after[axis]) else None
    if is_op(node, "Reshape", "Squeeze", "Unsqueeze"):
        stays = (i for i in range(len(after)) if same_dim(after[i], before[axis]) and _lies_at(before, axis, after, i))
        return next(stays, None)
    return None


def _lies_at(before: tuple[Dim, ...], axis: int, after: tuple[Dim, ...], at: int) -> bool:
    """Whether as many elements lie in front of and behind an axis of a view and one of its operand."""
    return same_size(before[:axis], after[:at]) and same_size(before[axis + 1 :], after[at + 1 :])
