"""Is there what the target needs."""

from __future__ import annotations

import importlib.util

from xform.target import Target

_WITHOUT = "give compile_only=True to lower without a GPU"


def missing(target: Target) -> str | None:
    """None if torch can serve the target here, else what is missing and how to get it."""
    if importlib.util.find_spec("torch") is None:
        return "the package torch is not installed\n  what to do: pip install torch"
    if target.kind == "cpu":
        return None
    import torch

    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return (
            f"torch {torch.__version__} is a build without CUDA\n"
            f"  what to do: install a CUDA build of torch from pytorch.org, or {_WITHOUT}"
        )
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU or driver was found\n  what to do: run `nvidia-smi` to see what is there, or {_WITHOUT}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed\n  what to do: pip install triton"
    return None
