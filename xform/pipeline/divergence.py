"""Where two graphs start to differ: intermediate values of the same name, compared in order of computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import display_name
from xform.pipeline.oracle import CouldNotRunError, run_model
from xform.pipeline.tolerance import coarser, computed_in, difference, resolve_tolerance

_MAX_EXPOSED_BYTES = 1 << 30  # of intermediate values held at a time


@dataclass(frozen=True)
class Divergence:
    """The first value that differs.

    Attributes:
        value: Its name in both graphs.
        node: Original name of the node that computes it in the second graph.
        operator: That node's operator.
        max_abs_error: Largest absolute error of the value.
        max_rel_error: Largest relative error of the value.
        reason: How it differs, in words.
        compared: Number of values compared, this one included.
    """

    value: str
    node: str
    operator: str
    max_abs_error: float
    max_rel_error: float
    reason: str
    compared: int


def first_divergence(before: ir.Model, after: ir.Model, inputs: Mapping[str, Any]) -> Divergence | None:
    """The first value that both graphs compute under one name and that differs; None if there is none.

    Values are compared in the order in which `after` computes them, a bounded number of bytes at a time.

    Raises:
        CouldNotRunError: One of the graphs does not run.
    """
    known = {value.name for node in before.graph for value in node.outputs if value.name}
    shared = [value for node in after.graph for value in node.outputs if value.name in known]
    coarsest = ir.DataType.DOUBLE
    for dtype in computed_in(before).values():
        coarsest = coarser(coarsest, dtype)
    compared = 0
    for chunk in _chunks(shared, inputs):
        names = [value.name or "" for value in chunk]
        expected, found = (_intermediates(model, names, inputs) for model in (before, after))
        for value in chunk:
            name = value.name or ""
            compared += 1
            dtype = value.dtype or ir.DataType.FLOAT
            limit = resolve_tolerance(None, name, dtype, "exact", coarsest)
            gap = difference(found[name], expected[name], limit)
            if not gap.agrees:
                node = value.producer()
                assert node is not None
                where = display_name(node)
                return Divergence(name, where, node.op_type, gap.max_abs, gap.max_rel, gap.reason, compared)
    return None


def _chunks(values: list[ir.Value], inputs: Mapping[str, Any]) -> list[list[ir.Value]]:
    """Values in groups of a bounded size; dims that are not known count as the largest dim of the inputs."""
    largest = max((max(getattr(array, "shape", ()), default=1) for array in inputs.values()), default=1)
    chunks: list[list[ir.Value]] = [[]]
    room = _MAX_EXPOSED_BYTES
    for value in values:
        size = 8
        for dim in value.shape.dims if value.shape is not None else ():
            size *= dim if isinstance(dim, int) else largest
        if room < size and chunks[-1]:
            chunks.append([])
            room = _MAX_EXPOSED_BYTES
        chunks[-1].append(value)
        room -= size
    return chunks


def _intermediates(model: ir.Model, names: list[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, computed with those values as the graph's only outputs."""
    copy = clone(model)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    outputs = [values[name] for name in names]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    return run_model(copy, [inputs])[0] if outputs else {}


__all__ = ["CouldNotRunError", "Divergence", "first_divergence"]
