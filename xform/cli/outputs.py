"""Where results may be written: refused before any work, not after an hour of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from xform.cli.common import STANDARD, Session, no_standard
from xform.errors import UsageError
from xform.report.files import check_report_suffix
from xform.text import shown


def check_outputs(
    session: Session,
    model: Path,
    output: Path | None,
    report: Path | None,
    backend: str | None,
    target: str,
    inputs: Path | None,
    calibration: Path | None,
    settings: Sequence[str] | None = None,
) -> None:
    """Refuse outputs that cannot be written, whose format is not known, or that would overwrite what the run reads.

    Args:
        settings: Options of passes, "PASS.OPTION=VALUE": a value may name a file.

    Raises:
        UsageError: See above.
        OutputError: There is no such folder, or the path is a folder or a device.
    """
    from xform.graph.atomic import refuse_overwriting, resolve

    no_standard(report, "--report", "--json prints the report on stdout")
    no_standard(calibration, "--calibration", "write the arrays to an .npz file")
    if report is not None:
        check_report_suffix(report)
    if output == STANDARD and session.json:
        raise UsageError("-o - and --json both write to stdout", hint="give -o a file name")
    if output == STANDARD:
        output = None
    elif output is not None:
        _check_suffix(output, backend, target)
    written = [path for path in (output, report) if path is not None]
    for path in written:
        resolve(path)
    if output is not None and report is not None and output.resolve() == report.resolve():
        raise UsageError("-o and --report name one file", where=str(output), hint="give them two names")
    if written:
        refuse_overwriting(written, _read(model, [inputs, calibration, *_named(settings)], written))


def _check_suffix(output: Path, backend: str | None, target: str) -> None:
    from xform.backends import DEFAULT, check_suffix
    from xform.target import Target

    chosen = backend or DEFAULT.get(Target.parse(target).kind)
    if chosen is not None:  # without a backend for the target, that is told
        check_suffix(output, chosen)


def check_measurable(backend: str | None, target: str) -> None:
    """Refuse to measure what no process of its own can run. Raises UsageError."""
    from xform.backends import BACKENDS, DEFAULT
    from xform.report.latency import MEASURABLE
    from xform.target import Target

    chosen = backend or DEFAULT.get(Target.parse(target).kind)
    if chosen in BACKENDS and chosen not in MEASURABLE:  # others are told of as such
        raise UsageError(
            f"--measure and --max-latency-ratio time files of {' and '.join(MEASURABLE)}, not of {shown(chosen)}",
            hint="leave them out, or give another --backend",
        )


def _named(settings: Sequence[str] | None) -> list[Path]:
    return [Path(text.partition("=")[2].strip()) for text in settings or ()]


def _read(model: Path, given: Sequence[Path | None], written: list[Path]) -> list[Path]:
    """Every file that the run reads and an output could overwrite."""
    from xform.cachefile import entries
    from xform.graph.atomic import beside

    if not any(path.exists() for output in written for path in (output, *beside(output))):
        return []  # nothing is there yet, so nothing can be overwritten, and the model need not be read for this
    from xform.capture.onnx_file import files_of

    read = [] if model == STANDARD else files_of(model)
    for path in given:
        if path is not None and path != Path():
            read += [path] if not os.path.isdir(path) else [one for one in path.iterdir() if one.is_file()]
    with contextlib.suppress(RuntimeError, OSError):  # a user without a home folder, or rights on it, has no cache
        read += entries()
    return read
