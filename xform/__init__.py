"""xform: a compiler and graph-rewriting framework for trained neural networks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from xform.errors import (
    BudgetError,
    CaptureError,
    LimitError,
    ModelError,
    OutputError,
    RequirementError,
    TargetError,
    UsageError,
    VerificationError,
    XformError,
    XformWarning,
)
from xform.target import Target
from xform.version import __version__

if TYPE_CHECKING:
    from xform.api import load, optimize
    from xform.optimized import Optimized

# From 1.29 on ONNX Runtime reports names and hashes of the models that it loads over the network, and leaves a number
# for the machine in the user's cache folder. It reads this once, when it is imported; its function that turns the
# reports off comes too late. Who wants them sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "BudgetError",
    "CaptureError",
    "LimitError",
    "ModelError",
    "Optimized",
    "OutputError",
    "RequirementError",
    "Target",
    "TargetError",
    "UsageError",
    "VerificationError",
    "XformError",
    "XformWarning",
    "__version__",
    "load",
    "optimize",
]


def __getattr__(name: str) -> Any:
    """Load what needs torch only when it is asked for, so that `xform --help` is quick."""
    if name in ("load", "optimize"):
        from xform import api

        return getattr(api, name)
    if name == "Optimized":
        from xform.optimized import Optimized

        return Optimized
    raise AttributeError(f"module 'xform' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
