"""`xform diff`: how two graphs differ in structure."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xform.cli.common import (
    OUT,
    Debug,
    Json,
    LimitTexts,
    Quiet,
    Session,
    examples,
    in_limits,
    model_source,
    no_standard,
    session_of,
)
from xform.report.terminal import plain_table
from xform.text import shown

if TYPE_CHECKING:
    import onnx_ir as ir

_SHOWN = 40
_WIDE = 500  # characters of one line

EXAMPLES = examples("xform diff model.onnx fast.onnx", "xform diff model.onnx fast.onnx --text | less")


def diff(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="ONNX file; - reads it from stdin.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="ONNX file.", show_default=False)],
    text: Annotated[
        bool, typer.Option("--text", help="Print a unified diff of the two dumps instead.", rich_help_panel=OUT)
    ] = False,
    limit: LimitTexts = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the interface, the operators and the nodes of two models.

    Both are read as xform sees them (functions inlined, constants lifted, at the IR's opset), so that files which
    differ only in how they were written do not differ here.
    """
    from xform.capture.onnx_file import capture_onnx
    from xform.graph.dump import dump
    from xform.report.concepts import count_op_types

    session = session_of(context)
    no_standard(b, "B", "only A can come from stdin")
    with in_limits(limit):
        first, second = capture_onnx(model_source(a)), capture_onnx(b)
    operators = compare_counts(count_op_types(first), count_op_types(second))
    document = {
        "interface": _interface_changes(first, second),
        "operators": operators,
        "parameters": [_parameters(first), _parameters(second)],
        **compare_nodes(first, second),
    }
    document["same"] = not any(
        (document["interface"], operators, *(document[k] for k in ("removed", "added", "changed")))
    )
    session.document.update(document)
    if not text:
        _show(session, document)
    elif not session.json:
        import difflib

        lines = difflib.unified_diff(dump(first).splitlines(), dump(second).splitlines(), str(a), str(b), lineterm="")
        session.write("\n".join(lines))


def compare_counts(first: dict[str, int], second: dict[str, int]) -> dict[str, list[int]]:
    """Operators whose number differs, with both numbers, in alphabetical order."""
    return {
        op: [first.get(op, 0), second.get(op, 0)]
        for op in sorted({*first, *second})
        if first.get(op, 0) != second.get(op, 0)
    }


def compare_nodes(first: ir.Model, second: ir.Model) -> dict[str, Any]:
    """Nodes of only one graph, and nodes of one name that differ. Linear in the number of nodes.

    A node is known by its name, or by its first output where it has none or shares it.
    """
    old, new = _nodes(first), _nodes(second)
    return {
        "removed": [{"name": name, "op": node[0]} for name, node in old.items() if name not in new],
        "added": [{"name": name, "op": node[0]} for name, node in new.items() if name not in old],
        "changed": [
            {"name": name, "before": _spell(old[name]), "after": _spell(node)}
            for name, node in new.items()
            if name in old and old[name] != node
        ],
    }


_Signature = tuple[str, tuple[str, ...], tuple[str, ...]]


def _nodes(model: ir.Model) -> dict[str, _Signature]:
    from xform.report.concepts import op_name

    nodes = list(model.graph.all_nodes())
    shared = Counter(node.name for node in nodes)
    signatures: dict[str, _Signature] = {}
    for node in nodes:
        first_output = next((o.name for o in node.outputs if o.name), None)
        name = node.name if node.name and shared[node.name] == 1 else first_output
        attributes = tuple(f"{a.name}={_attribute(a)}" for a in sorted(node.attributes.values(), key=lambda a: a.name))
        inputs = tuple("" if value is None else value.name or "" for value in node.inputs)
        signatures[name or f"#{len(signatures)}"] = (op_name(node), inputs, attributes)
    return signatures


def _attribute(attribute: ir.Attr) -> str:
    """A value in short: graphs and tensors by their kind, since their nodes and data are compared elsewhere."""
    if attribute.type.name in ("GRAPH", "GRAPHS", "TENSOR", "TENSORS"):
        return attribute.type.name.lower()
    return str(attribute.value)


def _spell(signature: _Signature) -> str:
    op, inputs, attributes = signature
    return f"{op}({', '.join(inputs)}" + (f"; {', '.join(attributes)})" if attributes else ")")


def _parameters(model: ir.Model) -> int:
    return sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)


def _interface_changes(first: ir.Model, second: ir.Model) -> list[str]:
    from xform.graph.dump import short_type

    changes = []
    for kind in ("inputs", "outputs"):
        old = {v.name: short_type(v) for v in getattr(first.graph, kind)}
        new = {v.name: short_type(v) for v in getattr(second.graph, kind)}
        changes += [f"{kind[:-1]} {n} {t} is gone" for n, t in old.items() if n not in new]
        changes += [f"{kind[:-1]} {n} {t} is new" for n, t in new.items() if n not in old]
        changes += [f"{kind[:-1]} {n}: {old[n]} -> {t}" for n, t in new.items() if n in old and old[n] != t]
        if list(old) != list(new) and old.keys() == new.keys():
            changes.append(f"{kind} in another order: {', '.join(old)} -> {', '.join(new)}")
    return changes


def _show(session: Session, document: dict[str, Any]) -> None:
    if document["same"]:
        session.show("the graphs are the same in structure", style="green")
        return
    for line in document["interface"]:
        session.show(shown(line, _WIDE), style="yellow", soft_wrap=True)
    if document["operators"]:
        table = plain_table()
        table.add_column("operator")
        for name in ("A", "B", "change"):
            table.add_column(name, justify="right")
        for op, (before, after) in document["operators"].items():
            table.add_row(op, str(before), str(after), f"{after - before:+d}")
        session.show(table)
    for kind, mark in (("removed", "-"), ("added", "+"), ("changed", "~")):
        entries = document[kind]
        session.show(f"{len(entries)} nodes {kind}", style="bold")
        for entry in entries[:_SHOWN]:
            what = entry["op"] if "op" in entry else f"{entry['before']} -> {entry['after']}"
            session.show(f"  {mark} {shown(entry['name'])}: {shown(what, _WIDE)}", soft_wrap=True)
        if len(entries) > _SHOWN:
            session.show(f"  and {len(entries) - _SHOWN} more (all of them with --json)", style="dim")
