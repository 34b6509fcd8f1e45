"""Bias and activation in one pass over memory."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.fx import GraphModule, Node
from torch.library import triton_op, wrap_triton

from xform.backends.torch_triton.kernels import common
from xform.backends.torch_triton.kernels.bias_activation import naive
from xform.backends.torch_triton.kernels.tuning import by_element, many, tuned

KINDS = ("gelu", "gelu_tanh", "silu")
CONFIGURATIONS = by_element()


@triton.jit
def activate(v, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """GELU (0), its tanh form (1), or SiLU (2)."""
    if KIND == 0:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if KIND == 1:
        # 1 + tanh(u) = 2 sigmoid(2 u)
        return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    return v * tl.sigmoid(v)


@tuned(CONFIGURATIONS, key=("columns", "KIND", "MANY"))
@triton.jit
def _bias_activation(  # type: ignore[no-untyped-def]
    x, bias, result, x_stride, columns,
    KIND: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    v = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
    v += tl.load(bias + at, mask=inside, other=0.0).to(WIDE)
    v = v.to(result.dtype.element_ty).to(WIDE)  # rounded as a separate sum would be
    tl.store(result + row * columns + at, activate(v, KIND).to(result.dtype.element_ty), mask=inside)


@triton_op("xform::bias_activation", mutates_args={})
def bias_activation(x: torch.Tensor, bias: torch.Tensor, kind: str) -> torch.Tensor:
    """See `naive.bias_activation`."""
    if x.numel() == 0:
        return naive.bias_activation(x, bias, kind)
    rows, columns = common.rows_of(x), x.shape[-1]
    result = common.empty(x.shape, x)
    wrap_triton(_bias_activation)[lambda chosen: (rows.shape[0], triton.cdiv(columns, chosen["BLOCK"]))](
        rows, bias, result, rows.stride(0), columns, KIND=KINDS.index(kind), MANY=many(rows.shape[0]),
        WIDE=tl.float64 if x.dtype is torch.float64 else tl.float32,
    )  # fmt: skip
    return result


def fuse(module: GraphModule) -> list[common.Finding]:
    """act(x + b) with a vector b, where nothing else reads the sum."""
    found: list[common.Finding] = []
    for node in list(module.graph.nodes):
        if not common.is_call(node, F.gelu, F.silu) or not common.is_call(node.args[0], operator.add):
            continue
        total = node.args[0]
        kind = "silu" if node.target is F.silu else "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
        where = "bias_activation", kind.removesuffix("_tanh"), common.origins(total, node)
        operands = _operands(total)
        if operands is None or not common.used_once(total):
            no_vector = "no summand is a vector with one element for each column"
            found.append(common.Finding(*where, no_vector if operands is None else "the sum is read elsewhere too"))
            continue
        found.append(common.Finding(*where))
        with module.graph.inserting_before(node):
            fused = common.call(module, torch.ops.xform.bias_activation.default, (*operands, kind), found[-1])
        common.swap(module, node, fused)
    return common.tidy(module, found)


def restore(module: GraphModule, node: Node) -> None:
    """The sum and the activation apart, so that a product can take the bias."""
    x, bias, kind = node.args
    with module.graph.inserting_before(node):
        total = module.graph.call_function(operator.add, (x, bias))
        if kind == "silu":
            opened = module.graph.call_function(F.silu, (total,))
        else:
            approximate = "tanh" if kind == "gelu_tanh" else "none"
            opened = module.graph.call_function(F.gelu, (total,), {"approximate": approximate})
    common.swap(module, node, opened)
    module.graph.erase_node(node)


def _operands(total: Node) -> tuple[Any, Any] | None:
    """The product and the bias of a sum, in either order."""
    for x, bias in (total.args, total.args[::-1]):
        shape, length = common.shape_of(x), common.shape_of(bias)
        if shape is not None and length is not None and len(shape) > 1 and length == shape[-1:]:
            return x, bias
    return None


KERNEL = common.Kernel(
    "bias_activation", torch.ops.xform.bias_activation, naive.bias_activation, fuse, tuner=_bias_activation,
    restore=restore,
)  # fmt: skip
