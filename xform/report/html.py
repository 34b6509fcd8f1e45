"""A report as one HTML file that needs nothing beside it: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as _escape

from xform.report.schema import Report
from xform.report.terminal import facts, findings, headline, pass_cells
from xform.text import paragraph, shown

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
th { color: #666; font-weight: normal; border-bottom: 1px solid #ddd } td.n, th.n { text-align: right }
tr.rolled_back td { color: #a00 } code { font-size: .9em; overflow-wrap: anywhere } summary { cursor: pointer }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } th { border-color: #444 } }
"""
_LONGEST = 20_000  # characters of one reason or warning


def escape(text: str) -> str:
    """Text for HTML: markup is shown as it is written, and control characters and marks of direction are spelled."""
    return _escape(paragraph(text, _LONGEST))


def to_html(report: Report) -> str:
    """The report as a self-contained page."""
    title = escape(headline(report))
    body = [
        f"<h1>{title}</h1>",
        _table((), [(name, escape(value)) for name, value in facts(report)]),
        *[f"<p><strong>warning:</strong> {escape(warning)}</p>" for warning in report.warnings],
        "<h2>Passes</h2>",
        _passes(report),
    ]
    for verdict, heading in (
        ("applied", "Done"),
        ("missed", "Near misses, and why"),
        ("rolled_back", "Rolled back, and why"),
    ):
        rows = _findings(report, verdict)
        if rows:
            body += [f"<h2>{heading}</h2>", _table(("times", "rule", "why", "nodes"), rows, numbers=(0,))]
    body += ["<h2>Environment</h2>", _environment(report)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _passes(report: Report) -> str:
    head = ("pass", "fidelity", "applied", "near misses", "rolled back", "nodes", "rel error", "seconds")
    rows = [(escape(p.name), escape(p.fidelity), *map(escape, pass_cells(p))) for p in report.passes]
    return _table(head, rows, numbers=range(2, len(head)), classes=[p.status for p in report.passes])


def _findings(report: Report, verdict: str) -> list[tuple[str, ...]]:
    found = findings(r for r in report.remarks if r.verdict == verdict)
    return [(str(f.count), _code(f.rule), escape(f.reason), _places(f.places)) for f in found]


def _places(places: Sequence[Sequence[str]]) -> str:
    lines = [", ".join(map(_code, nodes)) for nodes in places if nodes]
    if len(lines) <= 1:
        return "".join(lines)
    return f"<details><summary>{len(lines)} places</summary>{'<br>'.join(lines)}</details>"


def _environment(report: Report) -> str:
    here = report.environment
    rows = [
        ("system", escape(here.system)),
        ("processor", escape(f"{here.processor}, {here.cores} cores, {' '.join(here.cpu_features)}")),
        ("python", escape(here.python)),
        *[(escape(name), escape(version)) for name, version in here.versions.items()],
    ]
    return _table((), rows)


def _code(text: str) -> str:
    return f"<code>{escape(shown(text))}</code>"


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    classes: Sequence[str] = (),
) -> str:
    """A table of cells that are HTML already; columns in `numbers` are aligned right."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    lines = [f"<tr>{cells('th', head)}</tr>"] if head else []
    for index, row in enumerate(rows):
        name = f' class="{classes[index]}"' if classes else ""
        lines.append(f"<tr{name}>{cells('td', row)}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"
