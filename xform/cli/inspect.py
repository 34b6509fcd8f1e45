"""`xform inspect`: a model as text, with its interface, sizes and fingerprint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from xform.cli.common import (
    OUT,
    Debug,
    Json,
    LimitTexts,
    ModelPath,
    Quiet,
    Session,
    Sizes,
    examples,
    human_bytes,
    in_limits,
    model_source,
    parse_sizes,
    session_of,
)
from xform.errors import UsageError
from xform.report.terminal import facts_table, plain_table
from xform.text import shown

if TYPE_CHECKING:
    import onnx_ir as ir

    from xform.graph.count import ModelCounts, NodeCounts

EXAMPLES = examples("xform inspect model.onnx", "xform inspect model.onnx --counts --size batch=8")


def inspect(
    context: typer.Context,
    model: ModelPath,
    counts: Annotated[
        bool,
        typer.Option(
            "--counts",
            help="FLOPs, bytes and parameters per operator type instead of the dump.",
            rich_help_panel=OUT,
        ),
    ] = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="With --counts: per node too.", rich_help_panel=OUT)] = False,
    streams: Annotated[
        bool,
        typer.Option(
            "--streams",
            help="Residual streams, their writers and readers, instead of the dump.",
            rich_help_panel=OUT,
        ),
    ] = False,
    size: Sizes = None,
    limit: LimitTexts = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a model as xform reads it: functions inlined, constants lifted, at the IR's opset.

    The dump, or what is asked for instead of it, goes to stdout, a summary to stderr. Dynamic dimensions count as 1
    unless --size gives a number. --streams raises norms and linear layers first, since streams are found by them.
    """
    from xform.capture.onnx_file import capture_onnx
    from xform.graph.count import count
    from xform.graph.dump import dump
    from xform.graph.fingerprint import fingerprint
    from xform.pipeline.random_inputs import check_sizes
    from xform.report.concepts import count_concepts, count_op_types

    session = session_of(context)
    sizes = parse_sizes(size)
    if (nodes or sizes) and not counts:
        raise UsageError(f"{'--nodes' if nodes else '--size'} says nothing without --counts", hint="add --counts")
    if streams and counts:
        raise UsageError("--streams and --counts are shown one at a time", hint="run inspect twice")
    with in_limits(limit):
        graph = capture_onnx(model_source(model))
    check_sizes(graph, sizes)
    counted = count(graph, sizes)
    summary: dict[str, Any] = {
        "model": str(model),
        "opset": graph.meta.get("xform.source_opset"),
        "ir_opset": graph.opset_imports.get(""),
        "fingerprint": fingerprint(graph),
        "inputs": [_value(v) for v in graph.graph.inputs if v.name not in graph.graph.initializers],
        "outputs": [_value(v) for v in graph.graph.outputs],
        "operators": count_op_types(graph),
        "concepts": count_concepts(graph),
        "parameters": counted.parameters,
        "parameter_bytes": counted.parameter_bytes,
        "notes": list(graph.meta.get("xform.notes", ())),
    }
    session.document.update(summary)
    _say_summary(session, summary)
    if streams:
        _show_streams(session, graph)
    elif counts:
        session.document["counts"] = asdict(counted)
        _show_counts(session, counted, nodes)
    elif session.json:
        session.document["text"] = dump(graph)
    else:
        session.write(dump(graph))


def _show_streams(session: Session, graph: ir.Model) -> None:
    """The residual streams of the canonical graph: as text on stdout, or as data."""
    from xform.graph.stream_view import describe, draw
    from xform.graph.streams import find_streams
    from xform.pipeline.manager import run_pipeline
    from xform.pipeline.presets import resolve

    canonical = run_pipeline(graph, resolve("exact"), verify="off").model
    found = find_streams(canonical.graph)
    session.document["streams"] = describe(found)
    if not session.json:
        session.write(draw(found))


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
        *[("input", f"{shown(entry['name'])}: {shown(entry['type'])}") for entry in summary["inputs"]],
        *[("output", f"{shown(entry['name'])}: {shown(entry['type'])}") for entry in summary["outputs"]],
        ("parameters", f"{summary['parameters']:,} in {human_bytes(summary['parameter_bytes'])}"),
        ("contains", concepts or "none of the known concepts"),
    ]
    session.say(facts_table(rows))
    for note in summary["notes"]:
        session.warn(note)


def _show_counts(session: Session, counted: ModelCounts, per_node: bool) -> None:
    """Tables of counts by operator, and by node if asked, costliest first."""
    by_op: dict[str, list[NodeCounts]] = defaultdict(list)
    for node in counted.nodes:
        by_op[node.op_type].append(node)
    rows = [(op, str(len(group)), *_sums(group)) for op, group in by_op.items()]
    total = ("total", str(len(counted.nodes)), counted.flops, counted.bytes, counted.parameters)
    session.show(_counts_table(("operator", "nodes"), [*sorted(rows, key=lambda row: (-row[2], -row[3])), total]))
    if per_node:
        each = [(n.name, n.op_type, n.flops, n.bytes, n.parameters) for n in counted.nodes]
        session.show(_counts_table(("node", "operator"), each))
    if counted.assumed:
        names = ", ".join(map(shown, counted.assumed))
        session.show(f"counted as 1, since --size gives no number: {names}", style="yellow", soft_wrap=True)
    if counted.unknown:
        session.show(f"FLOPs unknown for {len(counted.unknown)} nodes", style="yellow")


def _sums(group: list[NodeCounts]) -> tuple[int, int, int]:
    return sum(n.flops or 0 for n in group), sum(n.bytes for n in group), sum(n.parameters for n in group)


def _counts_table(head: tuple[str, str], rows: Sequence[tuple[str, str, int | None, int, int]]) -> Table:
    table = plain_table()
    table.add_column(head[0], overflow="fold")
    table.add_column(head[1], justify="right" if head[1] == "nodes" else "left")
    for name in ("FLOPs", "bytes moved", "parameters"):
        table.add_column(name, justify="right")
    for first, second, *numbers in rows:
        table.add_row(first, second, *("?" if n is None else f"{n:,}" for n in numbers))
    return table
