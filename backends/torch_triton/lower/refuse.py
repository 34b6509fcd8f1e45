"""Refusing graphs with operators that the table lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from xform.backends.torch_triton.lower.table import find
from xform.errors import TargetError
from xform.graph.values import display_name

_MAX_NAMED = 12


def unknown_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes, those of subgraphs included, whose operator is not in the table."""
    imports = model.opset_imports
    return [node for node in model.graph.all_nodes() if find(node, opset_of(node, imports)) is None]


def opset_of(node: ir.Node, imports: Mapping[str, int]) -> int:
    """The opset that a node is written in."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return imports.get(domain, imports.get("ai.onnx", 23) if domain == "" else 1)


def refuse_unknown(model: ir.Model) -> None:
    """Raise one TargetError about every node whose operator is not in the table."""
    unknown = unknown_nodes(model)
    if not unknown:
        return
    kinds = sorted({f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in unknown})
    raise TargetError(
        f"the torch backend cannot run {len(unknown)} node(s) of: {', '.join(kinds)}",
        where=named([display_name(node) for node in unknown]),
        hint="replace these operators in the model, or choose another backend",
    )


def named(names: Sequence[str]) -> list[str]:
    """The first names, and how many there are besides."""
    more = len(names) - _MAX_NAMED
    return [*names[:_MAX_NAMED], f"and {more} more"] if more > 0 else list(names)
