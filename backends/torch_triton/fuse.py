"""Putting kernels in place of what they compute, in a lowered module for a GPU."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from xform.backends.torch_triton.kernels import common, kernels


def fuse(module: GraphModule) -> dict[str, int]:
    """How many calls of which kernel there are now in the module (in its submodules too)."""
    found: dict[str, int] = {}
    for part in module.modules():
        if not isinstance(part, GraphModule):
            continue
        counts = {kernel.name: kernel.fuse(part) for kernel in kernels().values()}
        counts["linear"] = fuse_linear(part)
        for name, count in counts.items():
            if count:
                found[name] = found.get(name, 0) + count
    return found


def fuse_linear(module: GraphModule) -> int:
    """x W + b with a weight W [K, N] and a bias b [N] as one product whose epilogue adds the bias."""
    count = 0
    for node in list(module.graph.nodes):
        found = _product_and_bias(node)
        if found is None:
            continue
        product, bias = found
        x, weight = product.args
        with module.graph.inserting_before(node):
            turned = module.graph.call_function(torch.t, (weight,))  # a view
            linear = module.graph.call_function(F.linear, (x, turned, bias))
        common.swap(module, node, linear)
        count += 1
    return common.tidy(module, count)


def _product_and_bias(node: Node) -> tuple[Node, Any] | None:
    if not common.is_call(node, operator.add):
        return None
    left, right = node.args
    for product, bias in ((left, right), (right, left)):
        if not (isinstance(product, Node) and common.is_call(product, operator.matmul) and common.used_once(product)):
            continue
        weight, shape = common.shape_of(product.args[1]), common.shape_of(product.args[0])
        if weight is None or shape is None or len(weight) != 2 or len(shape) < 2:
            continue
        if common.shape_of(bias) == weight[-1:] and isinstance(bias, Node) and bias.op == "get_attr":
            return product, bias
    return None
