"""A progress bar on stderr with the time left; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xform.cli.session import Session
from xform.text import shown

_WIDTH = 60  # characters of a step


@contextmanager
def progress_bar(session: Session, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that vanishes at the end; yields `advance(step, done, total)`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    disabled = session.quiet or not session.stderr.is_terminal
    with Progress(*columns, console=session.stderr, transient=True, disable=disabled) as bar:
        task = bar.add_task(what, total=None)

        def advance(step: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=shown(step, _WIDTH))

        yield advance
