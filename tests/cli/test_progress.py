"""The progress bar: on a terminal with the step and the time left, elsewhere nothing."""

from __future__ import annotations

import io
import re

from rich.console import Console

from xform.cli.common import Session
from xform.cli.progress import progress_bar


def _shown(terminal: bool) -> str:
    session, file = Session(), io.StringIO()
    session.stderr = Console(file=file, force_terminal=terminal, width=100)
    with progress_bar(session, "reading") as advance:
        for done in range(4):
            advance(f"step {done}", done, 4)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_a_terminal_sees_the_step_and_the_time_left() -> None:
    text = _shown(terminal=True)
    assert "step 3" in text and "3/4" in text and "left" in text


def test_logs_stay_free_of_it() -> None:
    assert _shown(terminal=False) == ""
