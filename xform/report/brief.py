"""A report in a few lines: what `str(report)` and a notebook show."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from xform.text import shown

if TYPE_CHECKING:
    from xform.report.schema import Report

_LINES = 10
_WIDTH = 160  # characters of a heading
_VALUE = 1000  # of what is said about one thing: enough for the longest warning of xform itself


def verdict(report: Report) -> str:
    """Whether it was verified, in a few words."""
    found = report.verification
    if found.passed is None:
        return "not verified"
    if not found.passed:
        return "verification failed"
    error = "" if found.max_rel_error is None else f", relative error {found.max_rel_error:.1e}"
    return f"verified{error}"


def lines(report: Report) -> list[tuple[str, str]]:
    """Names and values of what a person wants to know first, at most nine."""
    from xform.report.terminal import facts

    known = dict(facts(report))
    wanted = ("nodes", "weights", "opset", "found", "verified", "latency")
    rows = [(name, known[name]) for name in wanted if name in known]
    rows += [("warning", warning) for warning in report.warnings[:2]]
    if len(report.warnings) > 2:
        rows.append(("", f"and {len(report.warnings) - 2} more warnings, in .warnings"))
    return rows[: _LINES - 1]


def as_text(report: Report) -> str:
    """At most ten lines."""
    from xform.report.terminal import headline

    rows = [f"  {name:9s}{shown(value, _VALUE)}" for name, value in lines(report)]
    return "\n".join([shown(headline(report), _WIDTH), *rows])


def as_html(report: Report) -> str:
    """A small table for a notebook."""
    from xform.report.terminal import headline

    rows = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align:left'>{escape(shown(value, _VALUE))}</td></tr>"
        for name, value in lines(report)
    )
    return f"<table><caption>{escape(shown(headline(report), _WIDTH))}</caption>{rows}</table>"
