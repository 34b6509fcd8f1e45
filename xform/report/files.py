"""Writing a report to a file."""

from __future__ import annotations

from pathlib import Path

from xform.graph.atomic import write_bytes
from xform.report.html import to_html
from xform.report.schema import Report


def write_report(report: Report, path: Path) -> None:
    """Write `report` to `path` atomically: HTML where the name ends in .html, else JSON. Raises OutputError."""
    text = to_html(report) if path.suffix.lower() in (".html", ".htm") else report.to_json()
    write_bytes(path, text.encode())
