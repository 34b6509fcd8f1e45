"""Is ONNX Runtime here, and what can it run."""

from __future__ import annotations

import importlib.util

from xform.target import Target

INSTALL = "pip install onnxruntime"
PROVIDERS = ("CPUExecutionProvider",)


def missing(target: Target) -> str | None:
    """None if ONNX Runtime can serve the target, else what is missing with the command that installs it."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"the package onnxruntime is not installed\n  what to do: {INSTALL}"
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    absent = [name for name in PROVIDERS if name not in providers]
    if absent:
        return f"this build of onnxruntime has no {absent[0]}, only {', '.join(providers)}\n  what to do: {INSTALL}"
    return None
