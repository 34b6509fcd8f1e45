"""Putting kernels in place of what they compute, in a lowered module for a GPU."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from xform.backends.torch_triton.functions import activations
from xform.backends.torch_triton.kernels import Finding, common, kernels


def fuse(module: GraphModule) -> list[Finding]:
    """Put kernels into a module and its submodules; where they are now, and where they nearly were."""
    found: list[Finding] = []
    for part in module.modules():
        if isinstance(part, GraphModule):
            _take_gelu_of_torch(part)
            for kernel in kernels().values():
                found += kernel.fuse(part)
            found += fuse_linear(part)
    return found


def _take_gelu_of_torch(module: GraphModule) -> None:
    """The GELU that is exact on a CPU calls torch's on a GPU, which is what kernels look for."""
    calls = module.graph.find_nodes(op="call_function", target=activations.gelu)
    for node in calls:
        node.target = F.gelu
    if calls:
        module.recompile()


def counts(found: list[Finding]) -> dict[str, int]:
    """How many calls of which kernel there are."""
    return dict(sorted(Counter(finding.kernel for finding in found if not finding.missed).items()))


def fuse_linear(module: GraphModule) -> list[Finding]:
    """x W + b with a weight W [K, N] and a bias b [N] as one product whose epilogue adds the bias."""
    done: list[Finding] = []
    for node in list(module.graph.nodes):
        found = _product_and_bias(node)
        if found is None:
            continue
        product, bias = found
        x, weight = product.args
        with module.graph.inserting_before(node):
            turned = module.graph.call_function(torch.t, (weight,))  # a view
            linear = module.graph.call_function(F.linear, (x, turned, bias))
        done.append(Finding("linear", "linear", common.origins(product, node)))
        linear.meta["onnx_node"] = ", ".join(done[-1].nodes)
        common.swap(module, node, linear)
    return common.tidy(module, done)


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
