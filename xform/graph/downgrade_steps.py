"""One step down: a node of some version of its operator becomes one or more nodes of the version before.

What the two schemas say decides the common cases without an adapter: an attribute that the older version lacks may go
if it holds its default; a default that changed is written out; omitted inputs go; types are checked. `LOWER` holds
adapters for the rest, keyed by the version they leave. An adapter edits the node in place (None) or gives replacements
for its outputs; what it emits is valid at the opset before its version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from xform.graph.opset_emit import Emitter, set_attribute
from xform.graph.opset_schema import (
    allowed_types,
    default_attributes,
    input_limit,
    output_limit,
    schema_at,
    since,
    type_string,
)
from xform.graph.values import attribute, rank_of

Adapter = Callable[[ir.Node, Emitter], Sequence[ir.Value] | None]

LOWER: dict[tuple[str, int], Adapter] = {}
EXPAND: dict[str, Adapter] = {}


class Unavailable(Exception):  # noqa: N818 - no error by itself: `downgrade` turns it into one, `lowest_opset` asks on
    """The older opset cannot express the node; the message says why."""


def lower(version: int, *op_types: str) -> Callable[[Adapter], Adapter]:
    """Registers the adapter for leaving `version` of these operators."""

    def register(adapter: Adapter) -> Adapter:
        for op_type in op_types:
            assert (op_type, version) not in LOWER
            LOWER[op_type, version] = adapter
        return adapter

    return register


def expand(*op_types: str) -> Callable[[Adapter], Adapter]:
    """Registers our own body of operators, used below the opset that introduced them."""

    def register(adapter: Adapter) -> Adapter:
        for op_type in op_types:
            assert op_type not in EXPAND
            EXPAND[op_type] = adapter
        return adapter

    return register


def conform(node: ir.Node, opset: int) -> None:
    """Makes `node` a valid node of its operator at `opset`, where that only means leaving out what says nothing.

    Raises:
        Unavailable: An attribute, input, output or type that the older version does not have.
    """
    schema = schema_at(node.op_type, opset)
    if schema is None or (schema.deprecated and node.op_type != "GroupNormalization"):
        raise Unavailable(f"{node.op_type} does not exist at opset {opset}")
    _attributes(node, opset, set(schema.attributes))
    _arity(node, opset)
    check_types(node, opset)


def step_defaults(node: ir.Node, newer: int, older: int) -> None:
    """Writes out a default whose value differs between two versions, so that the node keeps its meaning."""
    before, after = default_attributes(node.op_type, newer), default_attributes(node.op_type, older)
    for name, value in before.items():
        if name not in node.attributes and name in after and after[name] != value:
            set_attribute(node, name, value)


def drop_defaults(node: ir.Node, newer: int, older: int) -> None:
    """Removes attributes that the older version does not have and that hold the newer default."""
    schema = schema_at(node.op_type, older)
    known = set(schema.attributes) if schema is not None else set()
    defaults = default_attributes(node.op_type, newer)
    for name in [n for n in node.attributes if n not in known]:
        if name in defaults and attribute(node, name) == defaults[name]:
            node.attributes.pop(name)


def nonnegative_axes(node: ir.Node) -> None:
    """Counts `axis` and `axes` from the front, as definitions before opset 11 want."""
    rank = rank_of(node.inputs[0]) if node.inputs else None
    for name in ("axis", "axes"):
        given = attribute(node, name)
        values = [given] if isinstance(given, int) else list(given or ())
        if not any(v < 0 for v in values):
            continue
        if rank is None:
            raise Unavailable(f"{name}={given} counts from the end, and the rank of the input is unknown")
        total = rank + len(values) if node.op_type == "Unsqueeze" else rank
        front = [v + total if v < 0 else v for v in values]
        set_attribute(node, name, front[0] if isinstance(given, int) else front)


def _attributes(node: ir.Node, opset: int, known: set[str]) -> None:
    for name in node.attributes:
        if name not in known:
            raise Unavailable(f"attribute {name}={_short(attribute(node, name))} is newer than opset {opset}")


def _arity(node: ir.Node, opset: int) -> None:
    limit = input_limit(node.op_type, opset)
    while len(node.inputs) > limit:
        if node.inputs[-1] is not None:
            raise Unavailable(f"input {len(node.inputs) - 1} is newer than opset {opset}")
        node.resize_inputs(len(node.inputs) - 1)
    kept = output_limit(node.op_type, opset)
    for output in node.outputs[kept:]:
        if output.uses() or output.is_graph_output():
            raise Unavailable(f"output {output.index()} is newer than opset {opset}")
    if len(node.outputs) > kept:
        node.resize_outputs(kept)


def check_types(node: ir.Node, opset: int) -> None:
    """Whether the known types of inputs and outputs are allowed at `opset`.

    Raises:
        Unavailable: One is not.
    """
    for values, output in ((node.inputs, False), (node.outputs, True)):
        for index, value in enumerate(values):
            found = type_string(value.type) if value is not None else None
            allowed = allowed_types(node.op_type, opset, index, output=output)
            if found is not None and allowed and found not in allowed:
                raise Unavailable(
                    f"{'output' if output else 'input'} {index} has type {found}, which it does not take there"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def version_before(op_type: str, version: int) -> int | None:
    """The version of `op_type` that `version` replaced, or None if it introduced the operator."""
    return since(op_type, version - 1)
