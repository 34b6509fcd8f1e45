"""What the user should know while nothing fails: a Python warning, a line in the log, an entry in the report.

Each goes out once, through `tell`, so that no part of xform chooses its own way: `warnings.warn(XformWarning)` reaches
whoever calls from Python and can be silenced or turned into an error there, and the logger "xform" reaches a service.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from xform.errors import XformWarning
from xform.text import paragraph

LOG = logging.getLogger("xform")
LOG.addHandler(logging.NullHandler())  # where nobody set up logging, warnings.warn is enough
_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextmanager
def each_once() -> Iterator[None]:
    """Inside, what was told already is not told again: of a search's beginning and in its report, for one."""
    token = _told.set(set())
    try:
        yield
    finally:
        _told.reset(token)


def tell(message: str) -> None:
    """Warn of something: as an XformWarning that points at the caller of xform, and in the log."""
    text = paragraph(message)
    told = _told.get()
    if told is not None:
        if text in told:
            return
        told.add(text)
    LOG.warning("%s", text)
    warnings.warn(text, XformWarning, stacklevel=_levels_of_xform() + 1)


def _levels_of_xform() -> int:
    """How many frames above `tell` there are up to the outermost one of xform, which the user's line called.

    What lies in between may be of a library: `generate` calls transformers and torch, which call xform again.
    """
    outermost, frame, level = 1, sys._getframe(1).f_back, 1
    while frame is not None:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] == "xform":
            outermost = level
        frame = frame.f_back
    return outermost
