"""A report for the terminal, as rich renderables, and the wording that the HTML report shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xform.report.schema import PassReport, Report, Size, VerificationReport
from xform.rewrite.remarks import Remark
from xform.text import paragraph, shown

NODES_SHOWN = 2
PLACES_SHOWN = 2
_NAME = 200  # characters of a cell that is one name
_FACT = 4000  # of a value in words
_CELL = 200_000  # of a cell of several lines: all nodes of a finding, each of them shortened


@dataclass(frozen=True)
class Finding:
    """Remarks of one rule with one reason, told as one line.

    Attributes:
        rule: "pass/rule", or just the pass where the two have one name.
        verdict: Verdict of all of them.
        reason: Their reason.
        concept: Their concept.
        places: The nodes of each, in order.
    """

    rule: str
    verdict: str
    reason: str
    concept: str
    places: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        """How many remarks there are."""
        return len(self.places)


def findings(remarks: Iterable[Remark]) -> list[Finding]:
    """Group remarks by rule, verdict and reason, most frequent first."""
    groups: dict[tuple[str, str, str, str], list[Remark]] = {}
    for remark in remarks:
        rule = remark.pass_name if remark.rule in ("", remark.pass_name) else f"{remark.pass_name}/{remark.rule}"
        groups.setdefault((rule, remark.verdict, remark.reason, remark.concept), []).append(remark)
    found = [
        Finding(rule, verdict, reason, concept, tuple(remark.nodes for remark in group))
        for (rule, verdict, reason, concept), group in groups.items()
    ]
    return sorted(found, key=lambda finding: -finding.count)


def report_view(report: Report, *, verbose: bool = False, warnings: bool = True) -> RenderableType:
    """Everything that a user should see after an optimization.

    Args:
        verbose: Show passes that had nothing to do, and every missed remark with all its nodes.
        warnings: Show the warnings too; whoever has shown them already does without.
    """
    parts: list[RenderableType] = [Text(headline(report), style="bold"), pass_table(report.passes, verbose=verbose)]
    parts.append(facts_table(facts(report)))
    missed = findings(r for r in report.remarks if r.verdict != "applied")
    if missed:
        parts += [Text("\nnot done, and why", style="bold"), findings_table(missed, limit=None if verbose else 12)]
    else:
        parts.append(Text("no near misses, nothing rolled back", style="dim"))
    parts += [Text(f"warning: {paragraph(w)}", style="yellow") for w in report.warnings if warnings]
    return Group(*parts)


def headline(report: Report) -> str:
    """`model.onnx for cpu with onnxruntime, preset exact`."""
    return f"{shown(report.source)} for {report.target} with {report.backend}, preset {report.preset}"


def pass_table(passes: Sequence[PassReport], *, verbose: bool = False) -> RenderableType:
    """One row per pass that did or missed something."""
    table = plain_table()
    table.add_column("pass", no_wrap=True)
    for name in ("applied", "near misses", "rolled back", "nodes", "rel error", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    listed = [p for p in passes if verbose or p.status != "unchanged" or p.missed]
    for entry in listed:
        style = "red" if entry.status == "rolled_back" else None
        table.add_row(entry.name, *pass_cells(entry), style=style)
    idle = len(passes) - len(listed)
    rest = Text(
        f"{idle} {'more ' if listed else ''}pass run{'' if idle == 1 else 's'} found nothing to do", style="dim"
    )
    return Group(*([table] if listed else []), *([rest] if idle else []))


def pass_cells(entry: PassReport) -> list[str]:
    """Cells of a pass's row, after its name."""
    return [
        str(entry.applied or ""),
        str(entry.missed or ""),
        str(entry.rolled_back or ("all" if entry.status == "rolled_back" else "")),
        change(entry.before.nodes if entry.before else None, entry.after.nodes if entry.after else None),
        "" if entry.max_rel_error is None else f"{entry.max_rel_error:.1e}",
        f"{entry.seconds:.2f}",
    ]


def facts(report: Report) -> list[tuple[str, str]]:
    """What changed overall, as name and value."""
    rows: list[tuple[str, str]] = []
    if report.before and report.after:
        rows += _size_facts(report.before, report.after)
    if report.opset_before is not None:
        rows.append(("opset", change(report.opset_before, report.opset_after)))
    if report.concepts:
        rows.append(("found", ", ".join(f"{count} {name}" for name, count in sorted(report.concepts.items()))))
    lowered = report.artifact.get("lowered")
    if lowered:
        rows.append(("lowered", ", ".join(f"{count} x {form}" for form, count in lowered.items())))
    if report.placement:
        rows.append(("runs on", ", ".join(f"{where}: {count} nodes" for where, count in report.placement.items())))
    rows.append(("verified", verification_text(report)))
    if report.latency is not None:
        latency = report.latency
        rows.append(
            (
                "latency",
                f"{milliseconds(latency.before_ms)} -> {milliseconds(latency.after_ms)} ms, "
                f"{latency.speedup:.2f} times as fast "
                f"(medians over the middle half of {latency.rounds} rounds in turn)",
            )
        )
    if report.seconds:
        rows.append(("time", ", ".join(f"{step} {seconds:.1f} s" for step, seconds in report.seconds.items())))
    return rows


def milliseconds(latency: float) -> str:
    """With as many digits as a ratio of two such figures needs to be checked by hand."""
    return f"{latency:.0f}" if latency >= 1000 else f"{latency:.1f}" if latency >= 100 else f"{latency:.3g}"


def _size_facts(before: Size, after: Size) -> list[tuple[str, str]]:
    rows = [
        ("nodes", change(before.nodes, after.nodes)),
        ("parameters", change(before.parameters, after.parameters)),
        ("weights", change(before.bytes, after.bytes) + " bytes"),
    ]
    if before.flops is not None or after.flops is not None:
        rows.append(("FLOPs (dynamic dims as 1)", change(before.flops, after.flops)))
    return rows


def verification_text(report: Report) -> str:
    """The outcome of verification in words."""
    outcome = report.verification
    if outcome.passed is None:
        return f"no ({outcome.reason})" if outcome.reason else "no (verification was off)"
    error = "" if outcome.max_rel_error is None else f", largest relative error {outcome.max_rel_error:.1e}"
    absolute = "" if outcome.max_abs_error is None else f", absolute {outcome.max_abs_error:.1e}"
    return f"{'yes' if outcome.passed else 'FAILED: ' + outcome.reason}{verified_on(outcome)}{error}{absolute}"


def verified_on(outcome: VerificationReport) -> str:
    """` on 3 given and 4 random inputs (batch: 1, 2; 4 mask styles), 2 of 2 branches`; empty if nothing was."""
    kinds = [(outcome.given, "given"), (outcome.derived, "derived"), (outcome.random, "random")]
    counts = [f"{number} {kind}" for number, kind in kinds if number]
    if not counts:
        return ""
    detail = [*map(shown, outcome.sizes), *([f"{len(outcome.masks)} mask styles"] if outcome.masks else [])]
    among = f" ({'; '.join(detail)})" if detail else ""
    compared = outcome.reached + outcome.forced
    went = f", {compared} of {outcome.branches} branches" if outcome.branches else ""
    return f" on {' and '.join(counts)} input{'s' if outcome.cases != 1 else ''}{among}{went}"


def facts_table(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = plain_table(show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(paragraph(value, _FACT)))
    return table


class _Table(Table):
    """A table whose cells are text, never markup, and safe to show before its columns are measured."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """See rich."""
        super().add_row(*map(_safe, cells), **options)


def _safe(cell: RenderableType | None) -> RenderableType | None:
    if isinstance(cell, str):
        return Text(shown(cell, _NAME))
    if isinstance(cell, Text) and not cell.spans:
        return Text(paragraph(cell.plain, _CELL), style=cell.style)
    return cell


def plain_table(*, show_header: bool = True) -> Table:
    """A table without lines."""
    return _Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=show_header, header_style="dim")


def findings_table(found: Sequence[Finding], *, limit: int | None = None) -> RenderableType:
    """Findings with their counts, reasons and nodes; at most `limit` of them."""
    table = plain_table()
    table.add_column("", justify="right")
    table.add_column("rule", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("nodes", overflow="fold")
    for finding in found[:limit]:
        reason = f"rolled back: {finding.reason}" if finding.verdict == "rolled_back" else finding.reason
        table.add_row(
            str(finding.count),
            Text(finding.rule),
            Text(reason),
            Text(place_list(finding.places, brief=limit is not None)),
        )
    if limit is None or len(found) <= limit:
        return table
    return Group(table, Text(f"and {len(found) - limit} more", style="dim"))


def place_list(places: Sequence[Sequence[str]], *, brief: bool) -> str:
    """The nodes of each place on a line of its own; brief: the first nodes of the first places on one line."""
    known = [nodes for nodes in places if nodes]
    if not brief:
        return "\n".join(", ".join(map(shown, nodes)) for nodes in known)
    told = [
        ", ".join(map(shown, nodes[:NODES_SHOWN])) + (", ..." if len(nodes) > NODES_SHOWN else "")
        for nodes in known[:PLACES_SHOWN]
    ]
    rest = len(known) - PLACES_SHOWN
    return "; ".join(told) + (f"; and {rest} more" if rest > 0 else "")


def change(before: int | None, after: int | None) -> str:
    """`430 -> 210`, or one number where nothing changed."""
    if before is None and after is None:
        return "unknown"
    if before == after:
        return f"{after:,}"
    return " -> ".join("unknown" if n is None else f"{n:,}" for n in (before, after))
