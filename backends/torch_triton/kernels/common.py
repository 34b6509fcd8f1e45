"""What the kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

MAX_COLUMNS = 32768  # a row is held in registers whole; beyond, torch's own kernels are as good


@dataclass(frozen=True)
class Finding:
    """A place where a kernel was put, or nearly was.

    Attributes:
        kernel: Its name.
        concept: What users call what it computes.
        nodes: Original names of the nodes that it computes.
        missed: Why torch computes them instead; empty where the kernel does.
    """

    kernel: str
    concept: str
    nodes: tuple[str, ...]
    missed: str = ""


Fuse = Callable[[GraphModule], list[Finding]]
Restore = Callable[[GraphModule, Node], None]


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: Name of its folder.
        op: The registered operator.
        naive: The same in plain torch, with the same arguments.
        fuse: Puts the operator in place of what it computes in a lowered module; where, and where nearly.
        tuner: The Triton function, which knows the configurations that it chose; None where a library has the kernel.
        order: Kernels with lower numbers look first.
        restore: Puts torch's own calls back in place of a call of the operator, where a part of them can be fused with
            something else; by default it becomes a call of `naive`.
    """

    name: str
    op: Callable[..., Any]
    naive: Callable[..., Any]
    fuse: Fuse
    tuner: Any = None
    order: int = 10
    restore: Restore | None = None


def empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Memory for a result; every element is written by the kernel."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, columns] with dense columns; a view where the strides allow."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


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


def origins(*nodes: Any) -> tuple[str, ...]:
    """Original names of what these nodes compute, each once."""
    names = (str(node.meta.get("onnx_node", node.name)).split(", ") for node in nodes if isinstance(node, Node))
    return tuple(dict.fromkeys(name for several in names for name in several))


def call(module: GraphModule, op: Any, arguments: tuple[Any, ...], finding: Finding) -> Node:
    """A call of a kernel that remembers where it was put."""
    node = module.graph.call_function(op, arguments)
    node.meta["finding"] = finding
    return node


def swap(module: GraphModule, old: Node, new: Node) -> None:
    """Let `new` stand for `old`."""
    new.meta.update({key: value for key, value in old.meta.items() if key not in new.meta})
    old.replace_all_uses_with(new)


def tidy(module: GraphModule, found: list[Finding]) -> list[Finding]:
    """Drop what nothing reads any more, if anything changed."""
    if any(not finding.missed for finding in found):
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return found
