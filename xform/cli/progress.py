"""A progress bar on stderr with the time left; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xform.cli.common import Session


@contextmanager
def progress_bar(session: Session, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that vanishes at the end; yields `advance(step, done, total)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    disabled = not session.stderr.is_terminal
    with Progress(*columns, console=session.stderr, transient=True, disable=disabled) as bar:
        task = bar.add_task(what, total=None)

        def advance(step: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=step)

        yield advance
