"""What the user should know while nothing fails: a Python warning, a line in the log, an entry in the report.

Each goes out once, through `tell`, so that no part of xform chooses its own way: `warnings.warn(XformWarning)` reaches
whoever calls from Python and can be silenced or turned into an error there, and the logger "xform" reaches a service.
"""

from __future__ import annotations

import logging
import sys
import warnings

from xform.errors import XformWarning
from xform.text import paragraph

LOG = logging.getLogger("xform")
LOG.addHandler(logging.NullHandler())  # where nobody set up logging, warnings.warn is enough


def tell(message: str) -> None:
    """Warn of something: as an XformWarning that points at the caller of xform, and in the log."""
    text = paragraph(message)
    LOG.warning("%s", text)
    warnings.warn(text, XformWarning, stacklevel=_levels_of_xform() + 1)


def _levels_of_xform() -> int:
    """How many frames above `tell` still belong to xform, so that the warning names the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "xform":
        level, frame = level + 1, frame.f_back
    return level - 1
