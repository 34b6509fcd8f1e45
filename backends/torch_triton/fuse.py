"""Putting kernels in place of what they compute, in a lowered module for a GPU."""

from __future__ import annotations

from torch.fx import GraphModule

from xform.backends.torch_triton.kernels import kernels


def fuse(module: GraphModule) -> dict[str, int]:
    """How many calls of which kernel there are now in the module (in its submodules too)."""
    found: dict[str, int] = {}
    for part in module.modules():
        if not isinstance(part, GraphModule):
            continue
        for kernel in kernels().values():
            count = kernel.fuse(part)
            if count:
                found[kernel.name] = found.get(kernel.name, 0) + count
    return found
