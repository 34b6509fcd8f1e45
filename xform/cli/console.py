"""Where output goes, and the one filter that all of it passes.

A model's names, a file's name and a library's message may hold anything, and a terminal obeys control characters. So
whatever is printed passes `SafeConsole` (rich's tables and text, ours) or `Escaping` (what libraries print): both leave
line breaks and tabs, and write every other control, format and separator character as a backslash escape. Colors
are added after that.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from xform.text import escaped

_WIDTH_OF_LOGS = 140  # characters a line on stderr where that is not a terminal
_UNFOLDED = 100_000  # characters a line on stdout where that is not a terminal: a search finds whole names
_KEPT = "\n\t"


class SafeConsole(Console):
    """A console that escapes what it prints; styles and cursor movements are rich's own and stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich; the text of every segment is escaped."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(escaped(text, keep=_KEPT), style)


class Escaping(io.TextIOBase):
    """A text stream in front of another one that escapes what is written, for the messages of libraries."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, escaped."""
        self._stream.write(escaped(text, keep=_KEPT))
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """Whether the stream behind is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream behind, for child processes."""
        return self._stream.fileno()

    def flush(self) -> None:
        """Flush the stream behind."""
        self._stream.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in the stub
        """Of the stream behind."""
        return self._stream.encoding


def console_of(stream: TextIO, *, folded: bool) -> SafeConsole:
    """A console on `stream`, as wide as the terminal or COLUMNS say.

    Args:
        folded: Elsewhere, whether long lines are folded, as for a log, or left whole, as for a search.
    """
    known = stream.isatty() or "COLUMNS" in os.environ
    width = None if known else _WIDTH_OF_LOGS if folded else _UNFOLDED
    return SafeConsole(file=stream, highlight=False, markup=False, emoji=False, width=width)


def printed(console: Console, what: RenderableType, **style: Any) -> str:
    """What `console` would print, without the spaces at the ends of lines that tables are padded with."""
    with console.capture() as capture:
        console.print(what, **style)
    return "".join(f"{line.rstrip(' ')}\n" for line in capture.get().removesuffix("\n").split("\n"))
