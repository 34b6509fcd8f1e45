"""Rewrites of an exported program, before ONNX export, for what torch's ONNX exporter refuses.

Each keeps what the program computes:

1. `view(x, s)` -> `reshape(x, s)`. A view is legal for the strides that the tensor had when it was exported, and those
   come from the kernel that ran: fused attention leaves its heads innermost, so the view that merges them is legal,
   but once attention is translated or decomposed the strides are others and the view is refused. reshape is the same
   function of the values and never refuses.
2. `scaled_dot_product_attention` on tensors of rank 3, 5 or more -> on rank 4, with all leading dims but the last
   gathered in the batch. Windowed and hierarchical attention (Hiera, MViT, MaxViT's relatives) is written so.
   softmax(Q K^T) V acts on the last two dims only, so the leading ones can be regrouped freely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}

Node = torch.fx.Node


def normalize(program: ExportedProgram) -> int:
    """Apply every rewrite to the program's graphs, in place; how many nodes were rewritten."""
    count = 0
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            count += _normalize_node(node)
        module.graph.lint()
        module.recompile()
    return count


def _normalize_node(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _VIEWS:
        node.target = _VIEWS[node.target]
        return True
    if node.target is _SDPA:
        return attention_to_rank_4(node)
    return False


def value_of(argument: Any) -> Any:
    """The fake tensor that a node stands for; anything else as it is."""
    return argument.meta["val"] if isinstance(argument, Node) else argument


def insert_call(
    before: Node, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Node:
    """A new call in front of `before`, with the fake value and the source line that belong to it."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta = {key: before.meta[key] for key in ("stack_trace", "nn_module_stack") if key in before.meta}
    node.meta["val"] = _evaluate(before, node)
    return node


def _evaluate(near: Node, node: Node) -> Any:
    """The fake value of a call, under the fake mode of its operands or of a node next to it."""
    values, keywords = torch.fx.map_arg((node.args, node.kwargs), value_of)
    mode = detect_fake_mode(torch.utils._pytree.tree_leaves((values, keywords, near.meta.get("val"))))
    assert mode is not None and callable(node.target), f"{node.name} has no fake value"
    with mode, torch.no_grad():
        return node.target(*values, **keywords)


def attention_to_rank_4(node: Node) -> bool:
    """Rewrite an attention whose query, key or value are not of rank 4; False if they are."""
    query, key, value = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    ranks = {value_of(operand).ndim for operand in (query, key, value)}
    if ranks == {4}:
        return False
    shapes = [value_of(operand).shape[:-2] for operand in (query, key, value)]
    leading = list(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    operands = [_gather(node, operand, leading) for operand in (query, key, value)]
    output = value_of(node)
    arguments = [*operands, _mask_to_rank_4(node, mask, leading)]
    arguments += node.args[4:]
    keywords = {name: argument for name, argument in node.kwargs.items() if name != "attn_mask"}
    shape = _shape_nodes(node, output)
    node.args, node.kwargs = tuple(arguments), keywords
    node.meta["val"] = _evaluate(node, node)
    restored = insert_call(node.next, aten.reshape.default, (node, shape))
    node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    return True


def _sizes(before: Node, tensor: Node, axes: Sequence[int]) -> list[Any]:
    """Sizes of a tensor's axes: numbers where static, nodes where not."""
    sizes: list[Any] = []
    for axis in axes:
        size = value_of(tensor).shape[axis]
        sizes.append(size if isinstance(size, int) else insert_call(before, aten.sym_size.int, (tensor, axis)))
    return sizes


def _shape_nodes(node: Node, output: torch.Tensor) -> list[Any]:
    """The output's shape: leading dims and length from the query, features from the value."""
    query, value = node.args[0], node.args[2]
    assert isinstance(query, Node) and isinstance(value, Node)
    source = max((query, value), key=lambda operand: value_of(operand).ndim)
    if value_of(source).ndim != output.ndim:
        raise NotImplementedError(f"attention whose result has rank {output.ndim} but whose operands have not")
    sizes = _sizes(node, query, range(value_of(query).ndim - 1))
    return sizes + _sizes(node, value, [-1])


def _gather(node: Node, operand: Any, leading: Sequence[Any]) -> Node:
    """An operand as [everything else, last leading dim, length, features]."""
    shape = value_of(operand).shape
    if len(shape) - 2 < len(leading) or any(a != b for a, b in zip(shape[:-2], leading, strict=True)):
        operand = insert_call(node, aten.expand.default, (operand, [*leading, *shape[-2:]]))
        shape = value_of(operand).shape
    tail = _sizes(node, operand, range(len(shape) - 3, len(shape)))
    if len(shape) == 3:
        return insert_call(node, aten.unsqueeze.default, (operand, 0))
    return insert_call(node, aten.reshape.default, (operand, [-1, *tail]))


def _mask_to_rank_4(node: Node, mask: Any, leading: Sequence[Any]) -> Any:
    """A mask that broadcasts to the gathered logits as it did to the original ones."""
    if mask is None:
        return None
    shape = value_of(mask).shape
    if len(shape) <= 3:
        # At most the last leading dim takes part, and that one is still where it was.
        return mask
    if all(size == 1 for size in shape[:-3]):
        return insert_call(node, aten.reshape.default, (mask, [1, *_sizes(node, mask, range(-3, 0))]))
    expanded = insert_call(node, aten.expand.default, (mask, [*leading[:-1], *shape[-3:]]))
    return insert_call(node, aten.reshape.default, (expanded, [-1, *_sizes(node, mask, range(-3, 0))]))
