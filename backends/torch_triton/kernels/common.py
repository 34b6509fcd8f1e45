"""What the kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

Fuse = Callable[[GraphModule], int]
MAX_COLUMNS = 32768  # a row is held in registers whole; beyond, torch's own kernels are as good


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: Name of its folder.
        op: The registered operator.
        naive: The same in plain torch, with the same arguments.
        fuse: Puts the operator in place of what it computes in a lowered module; how often.
        order: Kernels with lower numbers look first.
    """

    name: str
    op: Callable[..., Any]
    naive: Callable[..., Any]
    fuse: Fuse
    order: int = 10


def empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Memory for a result; every element is written by the kernel."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, columns] with dense columns; a view where the strides allow."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def warps_for(columns: int) -> int:
    """Warps for a row of so many elements."""
    return 1 if columns <= 256 else 4 if columns <= 2048 else 8 if columns <= 8192 else 16


# --- finding calls --------------------------------------------------------------------------------------------------


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of these functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def used_once(node: Node) -> bool:
    """Whether one node reads `node`."""
    return len(node.users) == 1


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Shape as inferred in the graph, None if unknown; sizes that nobody named differ from all others."""
    found = node.meta.get("onnx_shape") if isinstance(node, Node) else None
    return found if found is None or None not in found else None


def same_shape(a: Any, b: Any) -> bool:
    """Whether two values certainly have one shape."""
    found = shape_of(a)
    return found is not None and found == shape_of(b)


def swap(module: GraphModule, old: Node, new: Node) -> None:
    """Let `new` stand for `old`."""
    new.meta.update({key: value for key, value in old.meta.items() if key not in new.meta})
    old.replace_all_uses_with(new)


def tidy(module: GraphModule, count: int) -> int:
    """Drop what nothing reads any more, after `count` changes."""
    if count:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return count
