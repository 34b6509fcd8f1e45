"""Every error that xform raises on purpose, each with the exit code that the command line ends with.

An error says what happened, where (the original node or file name), and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class XformError(Exception):
    """Base of all deliberate errors.

    Args:
        what: What happened, one sentence.
        where: Original node names, a file, or a line of the user's model.
        hint: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | Sequence[str] = (), hint: str | None = None) -> None:
        self.what = what
        self.where: tuple[str, ...] = (where,) if isinstance(where, str) else tuple(where)
        self.hint = hint
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f"\n  where: {', '.join(self.where)}"
        if self.hint:
            text += f"\n  what to do: {self.hint}"
        return text


class UsageError(XformError):
    """A bad argument, option or configuration key."""

    exit_code = 2


class ModelError(XformError):
    """The model could not be read: not ONNX, truncated, inconsistent, unsupported."""

    exit_code = 3


class CaptureError(ModelError):
    """A torch module could not be captured."""


class RequirementError(XformError):
    """A `--require` was not met."""

    exit_code = 4


class VerificationError(XformError):
    """The optimized model does not compute what the captured model computes."""

    exit_code = 5


class BudgetError(XformError):
    """A latency, size or accuracy budget was missed."""

    exit_code = 6


class TargetError(XformError):
    """The target or its backend is not available, or cannot run the graph."""

    exit_code = 7


class OutputError(UsageError):
    """The result could not be written: no rights, no space, not a folder."""
