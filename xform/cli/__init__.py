"""The command line. `main` turns every outcome into an exit code; docs/errors-and-exit-codes.md lists them."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from xform.cli import bench, bisect, completion, diff, doctor, explain, inspect, optimize, passes, verify
from xform.cli.command import Command
from xform.cli.common import first_line
from xform.cli.session import Session
from xform.errors import UsageError, XformError
from xform.text import shown

INTERRUPTED = 130
TERMINATED = 143
INTERNAL = 1

# typer brings its own copy of click from some version on; its errors share this base in either case
_ClickError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_HELP = {"help_option_names": ["-h", "--help"]}


def _build_app() -> typer.Typer:
    app = typer.Typer(
        context_settings=_HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Optimize trained networks; every rewrite verified, nothing silent.",
    )
    app.callback()(_root)
    for module, command in (
        (optimize, optimize.optimize),
        (inspect, inspect.inspect),
        (explain, explain.explain),
        (verify, verify.verify),
        (bisect, bisect.bisect),
        (diff, diff.diff),
        (bench, bench.bench),
        (passes, passes.passes),
        (doctor, doctor.doctor),
        (completion, completion.completion),
    ):
        app.command(command.__name__, cls=Command, epilog=module.EXAMPLES, context_settings=_HELP)(command)
    return app


def _show_version(value: bool) -> None:
    if value:
        from xform import __version__

        typer.echo(f"xform {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments without the program's name; None takes the process's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    session = Session(json="--json" in arguments, debug="--debug" in arguments)
    with session.opened():
        code = _run(arguments, session)
    return session.finish(code)


def _run(argv: list[str], session: Session) -> int:
    with _terminable():
        return _dispatch(argv, session)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _dispatch(argv: list[str], session: Session) -> int:
    try:
        result = _build_app()(args=argv, prog_name="xform", obj=session, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except XformError as error:
        _trace(session)
        return session.fail(error)
    except _ClickError as error:
        return session.fail(_usage_error(error))
    except (KeyboardInterrupt, typer.Abort):
        return _stopped("interrupted", INTERRUPTED, session)
    except SystemExit as end:
        if end.code != TERMINATED:
            raise
        return _stopped("terminated", TERMINATED, session)
    except BrokenPipeError as error:
        return 0 if not session.running else _internal(error, session)  # while help was printed, its reader has gone
    except Exception as error:
        return _internal(error, session)


def _stopped(how: str, code: int, session: Session) -> int:
    session.document["error"] = {"kind": how, "what": "the command was stopped from outside", "where": [], "hint": None}
    session.complain(how)
    return code


def _usage_error(error: BaseException) -> UsageError:
    """Click's complaint as ours, with the command whose help to read."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "xform"
    message = getattr(error, "format_message", lambda: first_line(error))()
    if type(error).__name__ == "NoArgsIsHelpError":
        message = "no command given"
    return UsageError(message, hint=f"see `{command} --help`")


def _internal(error: Exception, session: Session) -> int:
    """An exception that nobody meant: a bug, told in one line."""
    summary = f"{type(error).__name__}: {first_line(error)}"
    session.document["error"] = {"kind": "internal", "what": summary, "where": [], "hint": "run again with --debug"}
    _trace(session)
    more = "" if session.debug else " (a bug in xform; run again with --debug for the traceback)"
    session.complain(f"internal error: {shown(summary, 1000)}{more}")
    return INTERNAL


def _trace(session: Session) -> None:
    if session.debug:
        session.complain(traceback.format_exc())


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)
