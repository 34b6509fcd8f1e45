"""xform: a compiler and graph-rewriting framework for trained neural networks."""

from __future__ import annotations

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
