"""Is ONNX Runtime here, and what can it run."""

from __future__ import annotations

import importlib.util

from xform.backends.base import Missing
from xform.target import Target

INSTALL = "pip install onnxruntime"
PROVIDERS = ("CPUExecutionProvider",)


def missing(target: Target) -> Missing | None:
    """None if ONNX Runtime can serve the target, else what is missing with the command that installs it."""
    if importlib.util.find_spec("onnxruntime") is None:
        return Missing("the package onnxruntime is not installed", INSTALL)
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    absent = [name for name in PROVIDERS if name not in providers]
    if absent:
        return Missing(f"this build of onnxruntime has no {absent[0]}, only {', '.join(providers)}", INSTALL)
    return None
