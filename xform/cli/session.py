"""One invocation of the command line: where its output goes, and how it ends.

stdout carries what the command was asked for: its result, or one JSON document with `--json`. stderr carries the rest:
progress, notes, warnings, errors.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

import typer

from xform.cli.console import Escaping, console_of, printed
from xform.cli.spelling import in_cli_spelling
from xform.errors import OutputError, XformError, XformWarning
from xform.text import escaped, paragraph

_TOLD = 500  # characters that tell one warning from another


@contextlib.contextmanager
def _read_no_more(stream: TextIO) -> Iterator[None]:
    """Let the reader of a stream go away inside: the command goes on, and its exit code says what came of it."""
    try:
        yield
    except BrokenPipeError:
        _to_nowhere(stream)


@contextlib.contextmanager
def _written(stream: TextIO) -> Iterator[None]:
    """Tell where a stream takes no more for another reason: OutputError, as for any file that cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _to_nowhere(stream)
        raise OutputError(f"stdout cannot be written: {error.strerror}", hint="the output is incomplete") from error


def _to_nowhere(stream: TextIO) -> None:
    """Let what is left in a stream's buffer not fail again when Python flushes it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Session:
    """One invocation of the command line.

    Attributes:
        json: Whether stdout carries one JSON document.
        debug: Whether errors come with a traceback.
        quiet: Whether only results, warnings and errors are printed.
        document: The JSON document so far; a failing command may have filled it before it failed.
        running: Whether a command runs, not only its help.
        stderr: The console for everything but results.
        stdout: The console for results.
    """

    def __init__(self, *, json: bool = False, debug: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.debug = debug
        self.quiet = quiet
        self.document: dict[str, Any] = {}
        self._out, self._err = sys.stdout, sys.stderr
        if isinstance(self._out, io.TextIOWrapper):  # a name that the terminal's encoding lacks is escaped too
            self._out.reconfigure(errors="backslashreplace")
        self.stderr = console_of(self._err, folded=True)
        self.stdout = console_of(self._out, folded=False)
        self.running = False
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Let what libraries print, warn of and log pass the filter inside, and stay out of the document."""
        sys.stderr = cast(TextIO, Escaping(self._err))
        if self.json:
            sys.stdout = sys.stderr
        logger, silent = logging.getLogger("xform"), logging.NullHandler()
        logger.addHandler(silent)  # every entry of this log is a warning as well, and that is shown
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", XformWarning)
                warnings.showwarning = self._show_warning
                yield
        finally:
            logger.removeHandler(silent)
            sys.stdout, sys.stderr = self._out, self._err

    def started(self) -> None:
        """A command runs from here on: help has been printed, so stdout is for results only."""
        self.running = True
        if isinstance(sys.stderr, Escaping):
            sys.stdout = sys.stderr

    def say(self, text: object = "", **style: Any) -> None:
        """Print beside the result, on stderr; with --quiet nothing. `text` may be any rich renderable."""
        if not self.quiet:
            self._print_error(text, **style)

    def show(self, result: object = "", **style: Any) -> None:
        """Print a result on stdout; with --json nothing, as the document holds it."""
        if not self.json:
            with _read_no_more(self._out), _written(self._out):  # rich writes nothing, which flushes what was before
                self._out.write(printed(self.stdout, _text(result), **style))

    def write(self, text: str) -> None:
        """Write a result that is text, long lines unfolded, to stdout."""
        text = escaped(text, keep="\n\t")
        self._to_out(text if text.endswith("\n") else text + "\n")

    def write_bytes(self, data: bytes) -> None:
        """Write a file's content to stdout."""
        with _read_no_more(self._out), _written(self._out):
            self._out.flush()
            self._out.buffer.write(data)

    def warn(self, message: str) -> None:
        """Print a warning on stderr, each text once."""
        text = in_cli_spelling(message)
        begin = escaped(text[:_TOLD])  # a long one is shortened in a report and whole in another place
        if begin not in self._warned:
            self._warned.add(begin)
            self._print_error(f"warning: {text}", style="yellow", soft_wrap=True)

    def fail(self, error: XformError) -> int:
        """Tell of a deliberate error and return its exit code."""
        what, hint = in_cli_spelling(error.what), None if error.hint is None else in_cli_spelling(error.hint)
        self.document["error"] = {
            "kind": type(error).__name__,
            "what": what,
            "where": list(error.where),
            "hint": hint,
        }
        self.complain(f"error: {XformError(what, where=error.where, hint=hint)}")
        return type(error).exit_code

    def complain(self, text: str) -> None:
        """Print an error on stderr."""
        self._print_error(text, style="red", soft_wrap=True)

    def finish(self, code: int) -> int:
        """Print the document, if one was asked for, and return the exit code."""
        try:
            with _read_no_more(self._out), _written(self._out):
                if self.json:
                    from xform.report.schema import plain

                    json.dump(plain({**self.document, "exit_code": code}), self._out, indent=2, allow_nan=False)
                    self._out.write("\n")
                self._out.flush()
        except OutputError as error:
            return code or self.fail(error)
        return code

    def _to_out(self, text: str) -> None:
        with _read_no_more(self._out), _written(self._out):
            self._out.write(text)

    def _print_error(self, text: object, **style: Any) -> None:
        with _read_no_more(self._err):
            if self.stderr.is_terminal:  # a progress bar may be there, which moves aside for what is printed
                self.stderr.print(_text(text), **style)
            else:
                self.stderr.file.write(printed(self.stderr, _text(text), **style))

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """In place of Python's own way, which prints a line of xform's source."""
        if issubclass(category, XformWarning):
            self.warn(str(message))
        else:
            self.say(f"{category.__name__} from a library: {paragraph(message)}", style="dim", soft_wrap=True)


def _text(what: Any) -> Any:
    """Text made safe before it is laid out, so that escapes count in the width; other renderables as they are."""
    return paragraph(what, width=100_000) if isinstance(what, str) else what


def session_of(context: typer.Context) -> Session:
    """The session of a command's context; from here on the command runs."""
    session = context.find_object(Session)
    if session is None:
        raise RuntimeError("a command ran outside main()")
    session.started()
    return session
