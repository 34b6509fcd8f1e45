"""The gated unit of SwiGLU and GeGLU in one pass over memory."""

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
from xform.backends.torch_triton.kernels.bias_activation.kernel import KINDS, activate
from xform.backends.torch_triton.kernels.gated_unit import naive

_BLOCK = 1024


@triton.jit
def _gated_unit(  # type: ignore[no-untyped-def]
    gate, up, result, gate_stride, up_stride, columns, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(WIDE)
    opened = activate(g, KIND).to(result.dtype.element_ty).to(WIDE)
    tl.store(result + row * columns + at, (opened * u).to(result.dtype.element_ty), mask=inside)


@triton_op("xform::gated_unit", mutates_args={})
def gated_unit(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """See `naive.gated_unit`."""
    if gate.numel() == 0:
        return naive.gated_unit(gate, up, kind)
    a, b, columns = common.rows_of(gate), common.rows_of(up), gate.shape[-1]
    result = common.empty(gate.shape, gate)
    block = min(_BLOCK, triton.next_power_of_2(columns))
    wrap_triton(_gated_unit)[(a.shape[0], triton.cdiv(columns, block))](
        a, b, result, a.stride(0), b.stride(0), columns, KIND=KINDS.index(kind),
        WIDE=tl.float64 if gate.dtype is torch.float64 else tl.float32, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return result


def fuse(module: GraphModule) -> int:
    """act(g) * u, with SiLU also as g * sigmoid(g), where nothing else reads the activation."""
    count = 0
    for node in list(module.graph.nodes):
        if not common.is_call(node, operator.mul):
            continue
        found = _operands(node)
        if found is None:
            continue
        with module.graph.inserting_before(node):
            fused = module.graph.call_function(torch.ops.xform.gated_unit.default, found)
        common.swap(module, node, fused)
        count += 1
    return common.tidy(module, count)


def _operands(node: Node) -> tuple[Any, Any, str] | None:
    """gate, up and the activation."""
    left, right = node.args
    for opened, up in ((left, right), (right, left)):
        if not (isinstance(opened, Node) and isinstance(up, Node) and common.used_once(opened)):
            continue
        kind = gate = None
        if common.is_call(opened, F.silu, F.gelu):
            gate = opened.args[0]
            tanh = opened.kwargs.get("approximate") == "tanh"
            kind = "silu" if opened.target is F.silu else "gelu_tanh" if tanh else "gelu"
        elif common.is_call(opened, operator.mul):
            first, second = opened.args
            for x, sigmoid in ((first, second), (second, first)):
                if not (isinstance(sigmoid, Node) and common.is_call(sigmoid, torch.sigmoid)):
                    continue
                if sigmoid.args[0] is x and common.used_once(sigmoid):
                    gate, kind = x, "silu"
        if kind is not None and common.same_shape(gate, up):
            return gate, up, kind
    return None


# before bias_activation, which would take the activation
KERNEL = common.Kernel("gated_unit", torch.ops.xform.gated_unit, naive.gated_unit, fuse, order=5)
