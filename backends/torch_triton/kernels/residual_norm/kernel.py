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
from xform.backends.torch_triton.kernels.tuning import many, tuned

# a row is one block; what there is to choose is how many threads share it
CONFIGURATIONS = tuple(triton.Config({}, num_warps=warps) for warps in (4, 1, 2, 8, 16))


@tuned(CONFIGURATIONS, key=("columns", "IS_RMS", "MANY"))
@triton.jit
def _residual_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, result, total, x_stride, residual_stride, columns, epsilon,
    IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
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
    # torch.compile passes Python's floats on as float64, to which everything behind would be widened
    small = tl.full((), epsilon, WIDE)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / columns + small)
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
        IS_RMS=is_rms, HAS_BIAS=bias is not None, MANY=many(a.shape[0]),
        WIDE=tl.float64 if x.dtype is torch.float64 else tl.float32, BLOCK=triton.next_power_of_2(columns),
    )  # fmt: skip
    return result, total


def fuse(module: GraphModule) -> list[common.Finding]:
    """norm(a + b) over the last axis, where a and b have one shape."""
    found: list[common.Finding] = []
    for node in list(module.graph.nodes):
        if not common.is_call(node, F.layer_norm, F.rms_norm):
            continue
        total, dims, weight, *rest = node.args
        if not common.is_call(total, operator.add):
            continue
        is_rms = node.target is F.rms_norm
        where = "residual_norm", "rms_norm" if is_rms else "layer_norm", common.origins(total, node)
        reason = _missed(total, dims, weight)
        if reason:
            found.append(common.Finding(*where, reason))
            continue
        left, right = total.args
        bias, epsilon = (None, rest[0]) if is_rms else (rest[0], rest[1])
        finding = common.Finding(*where)
        with module.graph.inserting_before(node):
            op, arguments = torch.ops.xform.residual_norm.default, (left, right, weight, bias, epsilon, is_rms)
            both = common.call(module, op, arguments, finding)
            normed = module.graph.call_function(operator.getitem, (both, 0))
            stream = module.graph.call_function(operator.getitem, (both, 1))
        if any(user < both for user in total.users if user is not node):  # it reads the sum before the kernel makes it
            module.graph.erase_node(stream)
        else:
            common.swap(module, total, stream)
        common.swap(module, node, normed)
        found.append(finding)
    return common.tidy(module, found)


def _missed(total: Node, dims: Any, weight: Any) -> str:
    """Why the norm of a sum is left to torch; empty if it is not."""
    left, right = total.args
    if not (isinstance(left, Node) and isinstance(right, Node) and common.same_shape(left, right)):
        return f"the summands have shapes {common.shape_of(left)} and {common.shape_of(right)}, and none is broadcast"
    if len(dims) != 1 or weight is None:
        return f"the norm is over {len(dims)} axes" if weight is not None else "the norm has no scale"
    if isinstance(dims[0], int) and dims[0] > common.MAX_COLUMNS:
        return f"a row of {dims[0]} elements does not fit in registers"
    return ""


KERNEL = common.Kernel("residual_norm", torch.ops.xform.residual_norm, naive.residual_norm, fuse, tuner=_residual_norm)
