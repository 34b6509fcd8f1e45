"""Progress of a compilation, shown in Python: a bar, or the user's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xform.text import shown

Progress = Callable[[str, int, int], None]


class Bar:
    """A bar on stderr (in a notebook, below the cell) that vanishes when the last step is done."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps are done and that `step` is under way."""
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                transient=True,
            )
            self._task = self._bar.add_task(shown(step), total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=shown(step))

    def close(self) -> None:
        """Take the bar away; the next step shows a new one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
