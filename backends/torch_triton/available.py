"""Is there what the target needs."""

from __future__ import annotations

import importlib.util

from xform.target import Target


def missing(target: Target) -> str | None:
    """None if torch can serve the target here, else what is missing and how to get it."""
    if importlib.util.find_spec("torch") is None:
        return "the package torch is not installed\n  what to do: pip install torch"
    if target.kind == "cpu":
        return None
    import torch

    if not torch.backends.cuda.is_built():
        return (
            f"torch {torch.__version__} is a build without CUDA\n"
            "  what to do: install a CUDA build of torch from pytorch.org, or give compile_only=True to lower without a GPU"
        )
    if not torch.cuda.is_available():
        return (
            "no NVIDIA GPU or driver was found\n"
            "  what to do: run `nvidia-smi` to see what the driver sees, or give compile_only=True to lower without a GPU"
        )
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed\n  what to do: pip install triton"
    return None
