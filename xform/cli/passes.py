"""`xform passes`: every pass with its fidelity, options and purpose, and every preset."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from xform.cli.common import Debug, Json, Quiet, examples, session_of
from xform.report.terminal import plain_table

if TYPE_CHECKING:
    from xform.rewrite.passes import Pass

EXAMPLES = examples("xform passes | grep norm")


def passes(context: typer.Context, quiet: Quiet = False, json: Json = False, debug: Debug = False) -> None:
    """List the passes that can be named in --passes, and the presets with their lists."""
    from xform.passes import PASSES
    from xform.pipeline.presets import PRESETS

    session = session_of(context)
    entries = [describe_pass(pass_class) for pass_class in PASSES.values()]
    presets = {name: [str(entry) for entry in names] for name, names in PRESETS.items()}
    session.document.update({"passes": entries, "presets": presets})
    table = plain_table()
    for column in ("pass", "fidelity", "what it does"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(entry["name"], entry["fidelity"], Text(entry["doc"]))
        for option in entry["options"]:
            table.add_row("", "", Text(f"--set {entry['name']}.{option['name']}={option['default']}", style="dim"))
    session.show(table)
    for name, names in presets.items():
        session.show(f"\npreset {name}: {', '.join(names)}", soft_wrap=True)


def describe_pass(pass_class: type[Pass]) -> dict[str, Any]:
    """JSON form of a pass: name, fidelity, first line of its documentation, options with types and defaults."""
    return {
        "name": pass_class.name,
        "fidelity": pass_class.fidelity,
        "doc": (pass_class.__doc__ or "").strip().partition("\n")[0],
        "options": [{"name": f.name, "type": str(f.type), "default": _default(f)} for f in fields(pass_class)],
    }


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()
