"""Rotary embedding of queries and keys in one kernel, which also does the split into heads."""

from __future__ import annotations

import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch.fx import GraphModule, Node
from torch.library import triton_op, wrap_triton

from xform.backends.torch_triton.functions.attention import rotary
from xform.backends.torch_triton.functions.sizes import expand
from xform.backends.torch_triton.kernels import common
from xform.backends.torch_triton.kernels.rotary_qk import naive


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    source, result, cos, sin, head_size, turned, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    s3,
):  # fmt: skip
    pair = tl.arange(0, BLOCK)
    half = turned // 2
    live = pair < half
    first = pair * 2 if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + half
    c = tl.load(cos + pair, mask=live, other=0.0).to(WIDE)
    s = tl.load(sin + pair, mask=live, other=0.0).to(WIDE)
    a = tl.load(source + first * s3, mask=live, other=0.0).to(WIDE)
    b = tl.load(source + second * s3, mask=live, other=0.0).to(WIDE)
    tl.store(result + first, (a * c - b * s).to(result.dtype.element_ty), mask=live)
    tl.store(result + second, (a * s + b * c).to(result.dtype.element_ty), mask=live)
    for part in tl.static_range(2):  # head_size <= 2 BLOCK
        rest = tl.arange(0, BLOCK) + part * BLOCK
        kept = (rest >= turned) & (rest < head_size)
        tl.store(result + rest, tl.load(source + rest * s3, mask=kept, other=0.0), mask=kept)


@triton.jit
def _rotary_qk(  # type: ignore[no-untyped-def]
    query, key, cos, sin, out_query, out_key, heads, key_heads, length, head_size, turned,
    q0, q1, q2, q3, k0, k1, k2, k3, c0, c1, s0, s1,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch, step = place // length, place % length
    cos += batch * c0 + step * c1
    sin += batch * s0 + step * s1
    if head < heads:
        source = query + batch * q0 + head * q1 + step * q2
        result = out_query + ((batch * heads + head) * length + step) * head_size
        _turn(source, result, cos, sin, head_size, turned, INTERLEAVED, WIDE, BLOCK, q3)
    else:
        source = key + batch * k0 + (head - heads) * k1 + step * k2
        result = out_key + ((batch * key_heads + head - heads) * length + step) * head_size
        _turn(source, result, cos, sin, head_size, turned, INTERLEAVED, WIDE, BLOCK, k3)


@triton_op("xform::rotary_qk", mutates_args={})
def rotary_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `naive.rotary_qk`. The results are dense [B, H, S, D] whatever the strides of the inputs."""
    batch, heads, length, size = query.shape
    if query.numel() == 0 or key.numel() == 0:
        first, second = naive.rotary_qk(query, key, cos, sin, interleaved)
        return first.clone(), second.clone()
    cos, sin = (table.expand(batch, length, -1) for table in (cos.contiguous(), sin.contiguous()))
    results = common.empty(query.shape, query), common.empty(key.shape, key)
    wrap_triton(_rotary_qk)[(batch * length, heads + key.shape[1])](
        query, key, cos, sin, *results, heads, key.shape[1], length, size, 2 * cos.shape[-1],
        *query.stride(), *key.stride(), cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1),
        INTERLEAVED=interleaved, WIDE=tl.float64 if query.dtype is torch.float64 else tl.float32,
        BLOCK=triton.next_power_of_2(triton.cdiv(size, 2)), num_warps=1,
    )  # fmt: skip
    return results


def fuse(module: GraphModule) -> int:
    """Two rotary embeddings by the same tables, of tensors of as many steps."""
    waiting: dict[tuple[Any, ...], Node] = {}
    count = 0
    for node in list(module.graph.nodes):
        if not common.is_call(node, rotary):
            continue
        x, cos, sin, positions, size, interleaved, heads = node.args
        cos, sin = _table(cos), _table(sin)
        shape, table = common.shape_of(x), common.shape_of(cos)
        if positions is not None or heads or shape is None or len(shape) != 4 or table is None or len(table) != 3:
            continue
        if size not in (0, shape[-1]) and not isinstance(table[-1], int):
            continue
        key = (cos, sin, interleaved, shape[0], shape[2], shape[3])
        earlier = waiting.pop(key, None)
        if earlier is None:
            waiting[key] = node
            continue
        if _depends(x, earlier):
            continue
        count += _replace(module, earlier, node, (cos, sin, interleaved))
    return common.tidy(module, count)


def _table(value: Any) -> Any:
    """The table behind a broadcast over the batch, which the kernel does itself."""
    spread = isinstance(value, Node) and value.op == "call_method" and value.target == "expand"
    found = value.args[0] if spread or common.is_call(value, expand) else value
    shape = common.shape_of(found)
    return found if shape is not None and len(shape) == 3 else value


def _depends(x: Any, earlier: Node) -> bool:
    """Whether `x` is computed from `earlier`; looked for as far back as that."""
    pending, seen = [x], set()
    while pending:
        node = pending.pop()
        if node is earlier:
            return True
        if isinstance(node, Node) and node not in seen and not node < earlier:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def _replace(module: GraphModule, query: Node, key: Node, tables: tuple[Any, ...]) -> int:
    if any(user < key for user in query.users):
        return 0  # the turned query is read before the key is there
    with module.graph.inserting_before(key):
        both = module.graph.call_function(torch.ops.xform.rotary_qk.default, (query.args[0], key.args[0], *tables))
        first = module.graph.call_function(operator.getitem, (both, 0))
        second = module.graph.call_function(operator.getitem, (both, 1))
    common.swap(module, query, first)
    common.swap(module, key, second)
    return 1


KERNEL = common.Kernel("rotary_qk", torch.ops.xform.rotary_qk, naive.rotary_qk, fuse)
