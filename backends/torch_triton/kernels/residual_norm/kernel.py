"""Residual sum and norm in one pass over memory."""

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
from xform.backends.torch_triton.kernels.residual_norm import naive


@triton.jit
def _residual_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, result, total, x_stride, residual_stride, columns, epsilon,
    IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    a = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(WIDE)
    b = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(WIDE)
    rounded = (a + b).to(total.dtype.element_ty)  # the stream that the next layer reads, in its own dtype
    tl.store(total + row * columns + at, rounded, mask=inside)
    value = rounded.to(WIDE)
    if IS_RMS:
        centred = value
    else:
        centred = tl.where(inside, value - tl.sum(value, 0) / columns, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / columns + epsilon)
    normed = centred * scale * tl.load(weight + at, mask=inside, other=0.0).to(WIDE)
    if HAS_BIAS:
        normed += tl.load(bias + at, mask=inside, other=0.0).to(WIDE)
    tl.store(result + row * columns + at, normed.to(result.dtype.element_ty), mask=inside)


@triton_op("xform::residual_norm", mutates_args={})
def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    is_rms: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `naive.residual_norm`. Statistics are in float32, or float64 for float64."""
    columns = x.shape[-1]
    if columns > common.MAX_COLUMNS or x.numel() == 0:
        return naive.residual_norm(x, residual, weight, bias, epsilon, is_rms)
    a, b = common.rows_of(x), common.rows_of(residual)
    result, total = common.empty(x.shape, x), common.empty(x.shape, x)
    wrap_triton(_residual_norm)[(a.shape[0],)](
        a, b, weight, weight if bias is None else bias, result, total, a.stride(0), b.stride(0), columns, epsilon,
        IS_RMS=is_rms, HAS_BIAS=bias is not None, WIDE=tl.float64 if x.dtype is torch.float64 else tl.float32,
        BLOCK=triton.next_power_of_2(columns), num_warps=common.warps_for(columns),
    )  # fmt: skip
    return result, total


def fuse(module: GraphModule) -> int:
    """norm(a + b) over the last axis, where a and b have one shape."""
    count = 0
    for node in list(module.graph.nodes):
        if not common.is_call(node, F.layer_norm, F.rms_norm):
            continue
        total, dims, weight, *rest = _arguments(node)
        if not common.is_call(total, operator.add) or len(dims) != 1 or weight is None:
            continue
        left, right = total.args
        if not (isinstance(left, Node) and isinstance(right, Node) and common.same_shape(left, right)):
            continue
        is_rms = node.target is F.rms_norm
        bias, epsilon = (None, rest[0]) if is_rms else (rest[0], rest[1])
        with module.graph.inserting_before(node):
            both = module.graph.call_function(
                torch.ops.xform.residual_norm.default, (left, right, weight, bias, epsilon, is_rms)
            )
            normed = module.graph.call_function(operator.getitem, (both, 0))
            stream = module.graph.call_function(operator.getitem, (both, 1))
        if any(_before(user, both) for user in total.users if user is not node):
            module.graph.erase_node(stream)
        else:
            common.swap(module, total, stream)
        common.swap(module, node, normed)
        count += 1
    return common.tidy(module, count)


def _arguments(node: Node) -> tuple[Any, ...]:
    """x, dims, weight(, bias), epsilon."""
    return tuple(node.args)


def _before(user: Node, both: Node) -> bool:
    """Whether a reader of the sum stands before the kernel, where its result is not there yet."""
    return user < both


KERNEL = common.Kernel("residual_norm", torch.ops.xform.residual_norm, naive.residual_norm, fuse)
