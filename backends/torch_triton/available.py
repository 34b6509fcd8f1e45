"""Is there what the target needs."""

from __future__ import annotations

import importlib.util

from xform.backends.base import Missing
from xform.target import Target


def missing(target: Target) -> Missing | None:
    """None if torch can serve the target here, else what is missing and how to get it."""
    if importlib.util.find_spec("torch") is None:
        return Missing("the package torch is not installed", "pip install torch")
    if target.kind == "cpu":
        return None
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return Missing(
            f"torch {torch.__version__} is a build without CUDA", "install a CUDA build of torch from pytorch.org"
        )
    if not torch.cuda.is_available():
        return Missing("no NVIDIA GPU or driver was found", "run `nvidia-smi` to see what is there")
    if importlib.util.find_spec("triton") is None:
        return Missing("the package triton is not installed", "pip install triton")
    return None
