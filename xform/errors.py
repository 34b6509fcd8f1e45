"""Every error that xform raises on purpose, each with the exit code that the command line ends with.

An error says what happened, where (the original node or file name), and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from xform.text import paragraph, shown

MAX_PLACES = 12  # names shown; `where` holds them all


class XformWarning(UserWarning):
    """Something that the user should know and nothing failed for: a pass rolled back, random calibration data."""


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
        text = paragraph(self.what)
        if self.where:
            more = f" and {len(self.where) - MAX_PLACES} more" if len(self.where) > MAX_PLACES else ""
            text += f"\n  where: {', '.join(shown(place) for place in self.where[:MAX_PLACES])}{more}"
        if self.hint:
            text += f"\n  what to do: {paragraph(self.hint)}"
        return text


class UsageError(XformError):
    """A bad argument, option or configuration key."""

    exit_code = 2


class ModelError(XformError):
    """The model could not be read: not ONNX, truncated, inconsistent, unsupported."""

    exit_code = 3


class LimitError(ModelError):
    """The model asks for more than a limit of `xform.limits` allows.

    Attributes:
        limit: Name of the limit.
    """

    def __init__(self, limit: str, what: str, *, where: str | Sequence[str] = (), hint: str | None = None) -> None:
        self.limit = limit
        super().__init__(what, where=where, hint=hint)


class CaptureError(ModelError):
    """A torch module could not be captured."""


class RequirementError(XformError):
    """A `--require` was not met."""

    exit_code = 4


class VerificationError(XformError):
    """The optimized model does not compute what the original model computes."""

    exit_code = 5


class BudgetError(XformError):
    """A latency, size or accuracy budget was missed."""

    exit_code = 6


class TargetError(XformError):
    """The target or its backend is not available, or cannot run the graph."""

    exit_code = 7


class KernelError(TargetError):
    """A backend has no kernel for an operator in its dtype; another backend may have one.

    Attributes:
        operator: Its name.
        node: Original name of the node.
        dtype: Of its first input, as NumPy calls it.
    """

    def __init__(self, backend: str, operator: str, node: str, dtype: str, *, hint: str | None = None) -> None:
        self.operator, self.node, self.dtype = operator, node, dtype
        super().__init__(f"{backend} has no kernel for {operator} in {dtype}", where=node, hint=hint)


class OutputError(UsageError):
    """The result could not be written: no rights, no space, not a folder."""
