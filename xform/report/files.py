"""Writing a report to a file."""

from __future__ import annotations

from pathlib import Path

from xform.errors import UsageError
from xform.graph.atomic import write_bytes
from xform.report.html import to_html
from xform.report.schema import Report

SUFFIXES = (".json", ".html", ".htm")


def write_report(report: Report, path: Path) -> None:
    """Write `report` to `path` atomically: HTML where the name ends in .html, JSON where it ends in .json.

    Raises:
        UsageError: Another suffix.
        OutputError: It cannot be written.
    """
    check_report_suffix(path)
    write_bytes(path, (report.to_json() if path.suffix.lower() == ".json" else to_html(report)).encode())


def check_report_suffix(path: Path) -> None:
    """Refuse a name whose suffix does not say what to write. Raises UsageError."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"a report cannot be written as {path.suffix or 'a file without a suffix'}",
            where=str(path),
            hint="end the name in .json or .html",
        )


def report_path(model: Path) -> Path:
    """Where the report of a model goes that is saved at `model`: `m.report.json` beside `m.onnx`."""
    return model.with_suffix(".report.json")
