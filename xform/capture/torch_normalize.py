"""Rewrites of an exported program, before ONNX export, for what torch's ONNX exporter refuses.

Each keeps what the program computes:

1. `view(x, s)` -> `reshape(x, s)`. A view is legal for the strides that the tensor had when it was exported, and those
   come from the kernel that ran: fused attention leaves its heads innermost, so the view that merges them is legal,
   but once attention is translated or decomposed the strides are others and the view is refused. reshape is the same
   function of the values and never refuses.
2. `scaled_dot_product_attention` on tensors of rank 3, 5 or more -> on rank 4, with all leading dims but the last
   gathered in the batch. Windowed and hierarchical attention (Hiera, MViT, MaxViT's relatives) is written so.
   softmax(Q K^T) V acts on the last two dims only, so the leading ones can be regrouped freely.
3. Attention whose heads or batches only broadcasting reconciles (multi-query attention, a key shared by the batch) ->
   grouped-query attention where there is one key/value head, expanded operands elsewhere. ONNX's Attention does not
   broadcast.
4. A mask that broadcasts over queries or keys -> the expanded mask. ONNX Runtime asks for as many mask rows as queries.
"""

from __future__ import annotations

import itertools
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
        return attention_to_rank_4(node) | match_heads(node) | spread_mask(node)
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
    operands = _operands(node)
    if {value_of(operand).ndim for operand in operands} == {4}:
        return False
    leading = _leading(operands)
    gathered = [_gather(node, operand, leading) for operand in operands]
    shape = [*_size_nodes(node, leading), *_sizes(node, operands[0], [-2]), *_sizes(node, operands[2], [-1])]
    mask = _mask_to_rank_4(node, _mask(node), leading)
    _set_arguments(node, gathered, mask)
    node.meta["val"] = _evaluate(node, node)
    restored = insert_call(node.next, aten.reshape.default, (node, shape))
    node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
    return True


def match_heads(node: Node) -> bool:
    """Spell out broadcast batches and heads of a rank-4 attention; False if there are none.

    A single key/value head for many query heads is grouped-query attention with one group, which has a flag of its own.
    Anything else that only broadcasting reconciles is expanded.
    """
    query, key, value = _operands(node)
    shapes = [value_of(operand).shape for operand in (query, key, value)]
    batches, heads = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    grouped = bool(node.kwargs.get("enable_gqa", False))
    if grouped and _all_equal(heads):
        node.kwargs = {**node.kwargs, "enable_gqa": False}
        return True
    if _all_equal(batches) and (grouped or _all_equal(heads)):
        return False
    one_group = heads[1] == heads[2] == 1 and heads[0] != 1 and not grouped
    expanded = []
    for operand, shape in zip((query, key, value), shapes, strict=True):
        head = shape[1] if grouped or one_group else _broadcast(heads)
        target = [_broadcast(batches), head, *shape[2:]]
        same = all(_all_equal(pair) for pair in zip(target, shape, strict=True))
        expanded.append(
            operand if same else insert_call(node, aten.expand.default, (operand, _size_nodes(node, target)))
        )
    _set_arguments(node, expanded, _mask(node))
    if one_group:
        node.kwargs = {**node.kwargs, "enable_gqa": True}
    return True


def spread_mask(node: Node) -> bool:
    """Spell out a mask [.., 1, keys] or [.., queries, 1] of a rank-4 attention; False if it has both dims."""
    mask = _mask(node)
    if mask is None:
        return False
    query, key, _ = _operands(node)
    shape = list(value_of(mask).shape)
    wanted = [*shape[:-2], value_of(query).shape[-2], value_of(key).shape[-2]]
    if len(shape) >= 2 and all(_all_equal(pair) for pair in zip(shape, wanted, strict=True)):
        return False
    spread = insert_call(node, aten.expand.default, (mask, _size_nodes(node, wanted)))
    _set_arguments(node, _operands(node), spread)
    return True


def _operands(node: Node) -> list[Node]:
    names = ("query", "key", "value")
    return [node.args[i] if i < len(node.args) else node.kwargs[name] for i, name in enumerate(names)]  # type: ignore[misc]


def _mask(node: Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _set_arguments(node: Node, operands: Sequence[Node], mask: Any) -> None:
    keywords = {n: a for n, a in node.kwargs.items() if n not in ("query", "key", "value", "attn_mask")}
    node.args, node.kwargs = (*operands, mask, *node.args[4:]), keywords


def _all_equal(sizes: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal; asking symbolic sizes themselves would restrict the program."""
    expressions = [size if isinstance(size, int) else size.node.expr for size in sizes]
    return all(expression == expressions[0] for expression in expressions)


def _broadcast(sizes: Sequence[Any]) -> Any:
    return next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1)


def _leading(operands: Sequence[Node]) -> list[Any]:
    """Batch dims that the operands broadcast to."""
    shapes = [value_of(operand).shape[:-2] for operand in operands]
    return list(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _size_nodes(node: Node, sizes: Sequence[Any]) -> list[Any]:
    """Sizes as numbers where static, and as nodes that read them from a tensor before the node where not."""
    return [size if isinstance(size, int) else size_node(node, size) for size in sizes]


def size_node(node: Node, size: torch.SymInt) -> Node:
    """A node that reads a dynamic size from a tensor that comes before `node`.

    Raises:
        NotImplementedError: No such tensor has that size.
    """
    for earlier in itertools.chain(node.all_input_nodes, node.graph.nodes):
        if earlier is node:
            break
        value = earlier.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for axis, other in enumerate(value.shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return insert_call(node, aten.sym_size.int, (earlier, axis))
    raise NotImplementedError(
        f"{node.target} needs the size {size}, which no tensor before it has; capture it with static sizes"
    )


def _sizes(before: Node, tensor: Node, axes: Sequence[int]) -> list[Any]:
    """Sizes of a tensor's axes: numbers where static, nodes where not."""
    sizes: list[Any] = []
    for axis in axes:
        size = value_of(tensor).shape[axis]
        sizes.append(size if isinstance(size, int) else insert_call(before, aten.sym_size.int, (tensor, axis)))
    return sizes


def _gather(node: Node, operand: Any, leading: Sequence[Any]) -> Node:
    """An operand as [everything else, last leading dim, length, features]; one leading dim is the batch."""
    shape = value_of(operand).shape
    if len(shape) - 2 < len(leading) or not all(_all_equal(pair) for pair in zip(shape[:-2], leading, strict=True)):
        operand = insert_call(node, aten.expand.default, (operand, _size_nodes(node, [*leading, *shape[-2:]])))
        shape = value_of(operand).shape
    if len(shape) <= 3:
        for axis in (0, 0) if len(shape) == 2 else (1,):
            operand = insert_call(node, aten.unsqueeze.default, (operand, axis))
        return operand  # type: ignore[no-any-return]
    tail = _sizes(node, operand, range(len(shape) - 3, len(shape)))
    return insert_call(node, aten.reshape.default, (operand, [-1, *tail]))


def _mask_to_rank_4(node: Node, mask: Any, leading: Sequence[Any]) -> Any:
    """A mask that broadcasts to the gathered logits as it did to the original ones."""
    if mask is None:
        return None
    shape = value_of(mask).shape
    if len(shape) == 3 and len(leading) == 1:
        return insert_call(node, aten.unsqueeze.default, (mask, 1))
    if len(shape) <= 3:
        # At most the last leading dim takes part, and that one is still where it was.
        return mask
    if all(size == 1 for size in shape[:-3]):
        return insert_call(node, aten.reshape.default, (mask, [1, *_sizes(node, mask, range(-3, 0))]))
    expanded = insert_call(node, aten.expand.default, (mask, _size_nodes(node, [*leading[:-1], *shape[-3:]])))
    return insert_call(node, aten.reshape.default, (expanded, [-1, *_sizes(node, mask, range(-3, 0))]))
