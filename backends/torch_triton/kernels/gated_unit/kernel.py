"""The gated unit of SwiGLU and GeGLU in one pass over memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator
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
from xform.backends.torch_triton.kernels.tuning import by_element, many, tuned

CONFIGURATIONS = by_element()


@tuned(CONFIGURATIONS, key=("columns", "KIND", "MANY"))
@triton.jit
def _gated_unit(  # type: ignore[no-untyped-def]
    gate, up, result, gate_stride, up_stride, columns,
    KIND: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    wrap_triton(_gated_unit)[lambda chosen: (a.shape[0], triton.cdiv(columns, chosen["BLOCK"]))](
        a, b, result, a.stride(0), b.stride(0), columns, KIND=KINDS.index(kind), MANY=many(a.shape[0]),
        WIDE=tl.float64 if gate.dtype is torch.float64 else tl.float32,
    )  # fmt: skip
    return result


def fuse(module: GraphModule) -> list[common.Finding]:
    """act(g) * u, with SiLU also as g * sigmoid(g), where nothing else reads the activation."""
    found: list[common.Finding] = []
    for node in list(module.graph.nodes):
        missed: list[common.Finding] = []
        for opened, gate, up, kind in _gates(node):
            where = "gated_unit", kind.removesuffix("_tanh"), common.origins(opened, node)
            if not common.used_once(opened):
                missed.append(common.Finding(*where, "the activation is read elsewhere too"))
                continue
            if not common.same_shape(gate, up):
                shapes = f"{common.shape_of(gate)} and {common.shape_of(up)}"
                missed.append(common.Finding(*where, f"gate and operand have shapes {shapes}, and none is broadcast"))
                continue
            found.append(common.Finding(*where))
            with module.graph.inserting_before(node):
                fused = common.call(module, torch.ops.xform.gated_unit.default, (gate, up, kind), found[-1])
            common.swap(module, node, fused)
            break
        else:
            found += missed
    return common.tidy(module, found)


def _gates(node: Node) -> Iterator[tuple[Node, Any, Node, str]]:
    """Ways to read a product as act(gate) * up: the activation, gate, up, and its kind."""
    if not common.is_call(node, operator.mul):
        return
    left, right = node.args
    for opened, up in ((left, right), (right, left)):
        if not (isinstance(opened, Node) and isinstance(up, Node)):
            continue
        if common.is_call(opened, F.silu, F.gelu):
            tanh = opened.kwargs.get("approximate") == "tanh"
            yield opened, opened.args[0], up, "silu" if opened.target is F.silu else "gelu_tanh" if tanh else "gelu"
        elif common.is_call(opened, operator.mul):
            for x, sigmoid in (opened.args, opened.args[::-1]):
                if not (isinstance(sigmoid, Node) and common.is_call(sigmoid, torch.sigmoid)):
                    continue
                if sigmoid.args[0] is x and common.used_once(sigmoid):
                    yield opened, x, up, "silu"
                    break


# before bias_activation, which would take the activation
KERNEL = common.Kernel("gated_unit", torch.ops.xform.gated_unit, naive.gated_unit, fuse, tuner=_gated_unit, order=5)
