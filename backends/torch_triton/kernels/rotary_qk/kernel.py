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
from xform.backends.torch_triton.kernels.tuning import many, tuned

# One program turns some heads of one token: a single head is little work, and all of them share the tables. With 8
# heads for each warp, a thread reads 16 bytes at once of heads of 64 in half precision; with 4, of heads of 128.
_HEADS_AND_WARPS = ((8, 4), (1, 1), (4, 2), (8, 1), (16, 2), (16, 4), (32, 8))
CONFIGURATIONS = tuple(triton.Config({"HEADS": heads}, num_warps=warps) for heads, warps in _HEADS_AND_WARPS)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    source, result, cos, sin, begin, heads, head_size, turned, s1, s3,
    INTERLEAVED: tl.constexpr, PARTIAL: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = begin + tl.arange(0, HEADS).to(tl.int64)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    half = turned // 2
    live = pair < half
    inside = live & (head < heads)
    first = pair * 2 if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + half
    c = tl.load(cos + pair, mask=live, other=0.0).to(WIDE)
    s = tl.load(sin + pair, mask=live, other=0.0).to(WIDE)
    read, write = source + head * s1, result + head * head_size
    a = tl.load(read + first * s3, mask=inside, other=0.0).to(WIDE)
    b = tl.load(read + second * s3, mask=inside, other=0.0).to(WIDE)
    tl.store(write + first, (a * c - b * s).to(result.dtype.element_ty), mask=inside)
    tl.store(write + second, (a * s + b * c).to(result.dtype.element_ty), mask=inside)
    if PARTIAL:
        for part in tl.static_range(2):  # head_size <= 2 BLOCK
            rest = pair + part * BLOCK
            kept = (rest >= turned) & (rest < head_size) & (head < heads)
            tl.store(write + rest, tl.load(read + rest * s3, mask=kept, other=0.0), mask=kept)


@tuned(CONFIGURATIONS, key=("heads", "key_heads", "head_size", "INTERLEAVED", "PARTIAL", "MANY"))
@triton.jit
def _rotary_qk(  # type: ignore[no-untyped-def]
    query, key, cos, sin, out_query, out_key, heads, key_heads, length, head_size, turned,
    q0, q1, q2, q3, k0, k1, k2, k3, c0, c1, s0, s1,
    INTERLEAVED: tl.constexpr, PARTIAL: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch, step = place // length, place % length
    cos += batch * c0 + step * c1
    sin += batch * s0 + step * s1
    parts = tl.cdiv(heads, HEADS)
    if part < parts:
        source = query + batch * q0 + step * q2
        result = out_query + place * heads * head_size
        _turn(
            source, result, cos, sin, part * HEADS, heads, head_size, turned, q1, q3,
            INTERLEAVED, PARTIAL, WIDE, HEADS, BLOCK,
        )  # fmt: skip
    else:
        source = key + batch * k0 + step * k2
        result = out_key + place * key_heads * head_size
        _turn(
            source, result, cos, sin, (part - parts) * HEADS, key_heads, head_size, turned, k1, k3,
            INTERLEAVED, PARTIAL, WIDE, HEADS, BLOCK,
        )  # fmt: skip


@triton_op("xform::rotary_qk", mutates_args={})
def rotary_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `naive.rotary_qk`. The results are views of dense [B, S, H, D] memory whatever the strides of the inputs.

    torch's attention writes its result in the layout of the queries, so the merge of the heads behind it is a view.
    """
    batch, heads, length, size = query.shape
    key_heads = key.shape[1]
    if query.numel() == 0 or key.numel() == 0:
        first, second = naive.rotary_qk(query, key, cos, sin, interleaved)
        return first.clone(), second.clone()
    cos, sin = (table.expand(batch, length, -1) for table in (cos.contiguous(), sin.contiguous()))
    results = [common.empty((batch, length, count, size), query) for count in (heads, key_heads)]
    wrap_triton(_rotary_qk)[
        lambda chosen: (batch * length, triton.cdiv(heads, chosen["HEADS"]) + triton.cdiv(key_heads, chosen["HEADS"]))
    ](
        query, key, cos, sin, *results, heads, key_heads, length, size, 2 * cos.shape[-1],
        *query.stride(), *key.stride(), cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1),
        INTERLEAVED=interleaved, PARTIAL=2 * cos.shape[-1] != size, MANY=many(batch * length),
        WIDE=tl.float64 if query.dtype is torch.float64 else tl.float32,
        BLOCK=triton.next_power_of_2(triton.cdiv(size, 2)),
    )  # fmt: skip
    return results[0].transpose(1, 2), results[1].transpose(1, 2)


def fuse(module: GraphModule) -> list[common.Finding]:
    """Two rotary embeddings by the same tables, of tensors of as many steps."""
    waiting: dict[tuple[Any, ...], Node] = {}
    found: list[common.Finding] = []
    for node in list(module.graph.nodes):
        if not common.is_call(node, rotary):
            continue
        reason = _missed(node)
        if reason:
            found.append(common.Finding("rotary_qk", "rotary", common.origins(node), reason))
            continue
        x, cos, sin, _, _, interleaved, _ = node.args
        cos, sin = _table(cos), _table(sin)
        shape = common.shape_of(x)
        assert shape is not None
        key = (cos, sin, interleaved, shape[0], shape[2], shape[3])
        earlier = waiting.pop(key, None)
        if earlier is None:
            waiting[key] = node
            continue
        where = "rotary_qk", "rotary", common.origins(earlier, node)
        if _depends(x, earlier) or any(user < node for user in earlier.users):
            found.append(common.Finding(*where, "one is needed before the other can be computed"))
            continue
        found.append(common.Finding(*where))
        _replace(module, earlier, node, (cos, sin, interleaved), found[-1])
    alone = "no other tensor of as many steps turns by the same tables"
    found += [common.Finding("rotary_qk", "rotary", common.origins(node), alone) for node in waiting.values()]
    return common.tidy(module, found)


def _missed(node: Node) -> str:
    """Why a rotary embedding is left to torch; empty if it is not."""
    x, cos, _, positions, size, _, heads = node.args
    shape, table = common.shape_of(x), common.shape_of(_table(cos))
    if positions is not None:
        return "rows of the tables are looked up by position ids"
    if heads or shape is None or len(shape) != 4:
        return f"the heads of shape {shape} are not apart"
    if table is None or len(table) != 3 or (size not in (0, shape[-1]) and not isinstance(table[-1], int)):
        return f"the tables have shape {table}"
    return ""


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


def _replace(module: GraphModule, query: Node, key: Node, tables: tuple[Any, ...], finding: common.Finding) -> None:
    with module.graph.inserting_before(key):
        arguments = (query.args[0], key.args[0], *tables)
        both = common.call(module, torch.ops.xform.rotary_qk.default, arguments, finding)
        first = module.graph.call_function(operator.getitem, (both, 0))
        second = module.graph.call_function(operator.getitem, (both, 1))
    common.swap(module, query, first)
    common.swap(module, key, second)


KERNEL = common.Kernel("rotary_qk", torch.ops.xform.rotary_qk, naive.rotary_qk, fuse, tuner=_rotary_qk)
