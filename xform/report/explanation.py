"""What was done about one thing, and what was not, and why: the text that `explain` gives."""

from __future__ import annotations

import onnx_ir as ir

from xform.report.concepts import ALIASES, CONCEPTS, COUNTED, TOPICS, places
from xform.report.schema import Report
from xform.rewrite.remarks import Remark
from xform.text import paragraph, shown

_SHOWN = 4
_VERDICTS = {"applied": "done", "missed": "missed", "rolled_back": "rolled back"}


def explanation(report: Report, graph: ir.Model, concept: str | None = None) -> str:
    """Every decision, or those about one concept, pass or rule, one a line.

    Args:
        report: What was done.
        graph: The result, to say where the concept is in it.
        concept: "attention", "batch_norm", "raise_gelu", ...; None for everything.
    """
    if concept is None:
        return "\n".join(map(_line, report.remarks))
    name = ALIASES.get(concept, concept)
    remarks = report.about(name)
    head = heading(graph, name, bool(remarks))
    if remarks or name in CONCEPTS:
        return "\n".join([head, *map(_line, remarks)])
    known = sorted({topic for remark in report.remarks for topic in topics_of(remark)} | {*report.concepts})
    return f"{head}. Remarks are about: {', '.join(known) or 'nothing, as no pass did anything'}"


def heading(graph: ir.Model, name: str, touched: bool) -> str:
    """How often a concept is in the result, and whether some pass had to do with it."""
    if name not in COUNTED:
        return f"{shown(name)}:" if touched else f"{shown(name)}: no pass touched it"
    untouched = "" if touched else "; no pass touched it"
    found = places(graph, name)
    if touched or not found:
        return f"{name}: {len(found)} in the result{untouched}"
    where = ", ".join(map(shown, found[:_SHOWN])) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    return f"{name}: {len(found)} in the result, as the model came with it (at {where}){untouched}"


def topics_of(remark: Remark) -> set[str]:
    """Every name by which `explain` finds a remark, but for rules."""
    return {remark.concept, remark.pass_name, *remark.touches} - {""}


def _line(remark: Remark) -> str:
    nodes = ", ".join(map(shown, remark.nodes[:_SHOWN]))
    more = f" and {len(remark.nodes) - _SHOWN} more" if len(remark.nodes) > _SHOWN else ""
    name = "/".join(part for part in (remark.pass_name, remark.rule) if part)
    text = f"  {_VERDICTS[remark.verdict]:12s}{shown(name)}" + (f" at {nodes}{more}" if nodes else "")
    return text + (f": {paragraph(remark.reason)}" if remark.reason else "")


__all__ = ["TOPICS", "explanation", "heading", "topics_of"]
