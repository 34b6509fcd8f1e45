"""torch operators that ONNX has no meaning for: kept in the graph as nodes of domain `torch`.

A kept node is called like the operator (`aten.igamma.default`). Its inputs are the operator's tensor arguments, and
its attribute `inputs` says which: `x`, or `tensors[1]` for the second of a list. Sizes that depend on the input are
inputs too (int64 scalars). All other arguments given are attributes by the operator's own argument names; dtypes,
devices and memory formats as strings (`torch.float32`), and an empty list as the string `[]`. The operator's schema
(`torch.ops.<name>._schema`) says what type each had.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx.ops._dtype_mappings import ONNX_DTYPE_TO_TORCH_DTYPE
from torch.onnx.ops._symbolic_impl import EncodedAttrs

from xform.capture.torch_normalize import insert_call, size_node, value_of

TORCH_DOMAIN = "torch"
INPUTS = "inputs"
_ONNX_DTYPES = {dtype: number for number, dtype in ONNX_DTYPE_TO_TORCH_DTYPE.items()}
_ENCODED = ("attr_keys", "attr_types", "attr_pos", "attr_ints", "attr_floats", "attr_strs")

Node = torch.fx.Node


def keep_operator(program: ExportedProgram, target: torch._ops.OpOverload) -> int:
    """Turn every call of one operator into a symbolic ONNX node of domain `torch`, in place; how many there were."""
    count = 0
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        # By name: torch makes more than one object for an overload.
        calls = [node for node in module.graph.nodes if node.op == "call_function" and str(node.target) == str(target)]
        for node in calls:
            _keep_node(node)
        count += len(calls)
        module.graph.lint()
        module.recompile()
    return count


def _arguments(node: Node) -> Iterator[tuple[str, Any]]:
    """Arguments of a call by the names that the operator's schema gives them."""
    schema = node.target._schema  # type: ignore[union-attr]
    for argument, value in zip(schema.arguments, node.args, strict=False):
        yield argument.name, value
    yield from node.kwargs.items()


def _as_tensor(before: Node, argument: Any) -> Node:
    """A node that is a tensor; numbers and sizes become scalars."""
    value = value_of(argument)
    if isinstance(value, torch.Tensor):
        return argument  # type: ignore[no-any-return]
    dtype = torch.float64 if isinstance(value, (float, torch.SymFloat)) else torch.int64
    return insert_call(before, torch.ops.aten.scalar_tensor.default, (argument,), {"dtype": dtype})


def _tensors(value: Any) -> list[Any]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _split_arguments(node: Node) -> tuple[list[Node], dict[str, Any]]:
    """Tensor inputs, and attributes with the list of the inputs' names among them."""
    inputs: list[Node] = []
    names: list[str] = []
    attributes: dict[str, Any] = {}
    for name, value in _arguments(node):
        if isinstance(value, Node):
            inputs.append(_as_tensor(node, value))
            names.append(name)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Node) for item in value):
            for index, item in enumerate(value):
                if item is None:
                    continue
                inputs.append(_as_tensor(node, item))
                names.append(f"{name}[{index}]")
        elif value is not None:
            attributes[name] = _attribute(value)
    attributes[INPUTS] = names or "[]"
    return inputs, attributes


def _attribute(value: Any) -> int | float | str | list[Any]:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_attribute(item) for item in value] or "[]"
    return str(value)


def _keep_node(node: Node) -> None:
    inputs, attributes = _split_arguments(node)
    outputs = _tensors(node.meta["val"])
    encoded = EncodedAttrs.from_dict(attributes)
    keywords = {
        "shapes": [
            [size if isinstance(size, int) else size_node(node, size) for size in output.shape] for output in outputs
        ],
        **{field: getattr(encoded, field) for field in _ENCODED},
        "metadata_props_keys": [],
        "metadata_props_values": [],
        "domain": TORCH_DOMAIN,
        "version": 1,
    }
    dtypes = [_ONNX_DTYPES[output.dtype] for output in outputs]
    arguments = (inputs, str(node.target), dtypes)
    kept = insert_call(node, torch.ops.onnx_symbolic._symbolic_multi_out.default, arguments, keywords)
    replacement = insert_call(node, operator.getitem, (kept, 0)) if isinstance(node.meta["val"], torch.Tensor) else kept
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)
