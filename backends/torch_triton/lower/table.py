"""The table of operators: (domain, operator, opset since which it holds) to the function that writes it in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from xform.graph.values import ONNX_DOMAINS

if TYPE_CHECKING:
    from xform.backends.torch_triton.lower.site import Site

Lowering = Callable[["Site"], Any]
_TABLE: dict[tuple[str, str], list[tuple[int, Lowering]]] = {}


def lowers(*op_types: str, domain: str = "", since: int = 1) -> Callable[[Lowering], Lowering]:
    """Enters a function as the lowering of operators from opset `since` of their domain on.

    The function gets a `Site` and gives the outputs: one fx node (or `Ints`), or a tuple with one for each output.
    """

    def enter(lowering: Lowering) -> Lowering:
        for op_type in op_types:
            entries = _TABLE.setdefault((domain, op_type), [])
            entries.append((since, lowering))
            entries.sort(key=lambda entry: -entry[0])
        return lowering

    return enter


def find(node: ir.Node, opset: int) -> Lowering | None:
    """The newest lowering of `node` at an opset of its domain, or None."""
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    kind = node.op_type if domain != "torch" else "*"
    return next((lowering for since, lowering in _TABLE.get((domain, kind), ()) if since <= opset), None)


def operators() -> list[str]:
    """Every operator in the table as `domain::name`, sorted."""
    return sorted(f"{domain or 'ai.onnx'}::{op_type}" for domain, op_type in _TABLE)
