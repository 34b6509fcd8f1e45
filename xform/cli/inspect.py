"""`xform inspect`: a model as text, with its interface, sizes and fingerprint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from xform.cli.common import Debug, Json, ModelPath, Session, human_bytes, session_of
from xform.report.terminal import facts_table

if TYPE_CHECKING:
    import onnx_ir as ir

    from xform.graph.count import ModelCounts


def inspect(
    context: typer.Context,
    model: ModelPath,
    counts: Annotated[
        bool, typer.Option("--counts", help="FLOPs, bytes and parameters per operator type instead of the dump.")
    ] = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="With --counts: per node too.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a model as xform reads it: functions inlined, constants lifted, at the IR's opset.

    The dump (or the tables of --counts) goes to stdout, the summary to stderr.
    """
    from xform.capture.onnx_file import capture_onnx
    from xform.graph.count import count
    from xform.graph.dump import dump
    from xform.graph.fingerprint import fingerprint
    from xform.report.concepts import count_concepts, count_op_types

    session = session_of(context)
    graph = capture_onnx(model)
    counted = count(graph)
    summary: dict[str, Any] = {
        "model": str(model),
        "opset": graph.meta.get("xform.source_opset"),
        "ir_opset": graph.opset_imports.get(""),
        "fingerprint": fingerprint(graph),
        "inputs": [_value(v) for v in graph.graph.inputs if v.name not in graph.graph.initializers],
        "outputs": [_value(v) for v in graph.graph.outputs],
        "operators": count_op_types(graph),
        "concepts": count_concepts(graph),
        "notes": list(graph.meta.get("xform.notes", ())),
    }
    session.document.update(summary)
    _say_summary(session, summary)
    if counts:
        _show_counts(session, counted, nodes)
    elif session.json:
        session.document["text"] = dump(graph)
    else:
        session.write(dump(graph))


def _value(value: ir.Value) -> dict[str, Any]:
    """JSON form of an input or output; dynamic dims are text, unknown ones null."""
    from xform.graph.dump import short_type
    from xform.graph.values import shape_of

    dims = shape_of(value)
    dtype = None if value.dtype is None else value.dtype.name
    return {"name": value.name, "dtype": dtype, "shape": dims, "type": short_type(value)}


def _say_summary(session: Session, summary: dict[str, Any]) -> None:
    concepts = ", ".join(f"{count} {name}" for name, count in sorted(summary["concepts"].items()))
    rows = [
        ("model", summary["model"]),
        ("opset", f"{summary['opset']}, read as {summary['ir_opset']}"),
        ("fingerprint", summary["fingerprint"]),
        *[("input", f"{entry['name']}: {entry['type']}") for entry in summary["inputs"]],
        *[("output", f"{entry['name']}: {entry['type']}") for entry in summary["outputs"]],
        ("contains", concepts or "none of the known concepts"),
    ]
    session.say(facts_table(rows))
    for note in summary["notes"]:
        session.say(f"note: {note}", style="yellow", soft_wrap=True)
