"""Kernels for GPUs, a folder each: `naive.py` (what it computes), `kernel.py` (the kernel and `KERNEL`), a README.

A new kernel is a new folder; nothing else has to be edited. `KERNEL` says how calls of it are found in a lowered
module. The kernels are `torch.library.triton_op`s of namespace `xform`, so torch.compile, CUDA graphs and AOTInductor
see through them. On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil

from xform.backends.torch_triton.kernels.common import Finding, Kernel

__all__ = ["Finding", "Kernel", "kernels"]


@functools.cache
def kernels() -> dict[str, Kernel]:
    """All kernels by name, in the order in which they look for their calls; none where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return {}
    found = []
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            found.append(importlib.import_module(f"{__name__}.{module.name}.kernel").KERNEL)
    return {kernel.name: kernel for kernel in sorted(found, key=lambda kernel: (kernel.order, kernel.name))}
