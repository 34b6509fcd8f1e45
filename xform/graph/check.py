"""Structural invariants that every graph must keep, checked without touching weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from xform.graph.values import display_name


@dataclass(frozen=True)
class Interface:
    """Names, dtypes and ranks of a model's inputs and outputs: what no pass may change."""

    inputs: tuple[tuple[str | None, str, int | None], ...]
    outputs: tuple[tuple[str | None, str, int | None], ...]

    @staticmethod
    def of(model: ir.Model) -> Interface:
        """The interface of `model`."""
        return Interface(_signature(model.graph.inputs), _signature(model.graph.outputs))

    def difference(self, other: Interface) -> str | None:
        """How `other` differs, in words; None if it does not. An unknown rank agrees with every rank."""
        for kind, mine, theirs in (("input", self.inputs, other.inputs), ("output", self.outputs, other.outputs)):
            if len(mine) != len(theirs):
                return f"{len(mine)} {kind}s became {len(theirs)}"
            for a, b in zip(mine, theirs, strict=True):
                ranks_differ = a[2] is not None and b[2] is not None and a[2] != b[2]
                types_differ = "None" not in (a[1], b[1]) and a[1] != b[1]
                if a[0] != b[0] or types_differ or ranks_differ:
                    return f"{kind} {a} became {b}"
        return None


def _signature(values: Iterable[ir.Value]) -> tuple[tuple[str | None, str, int | None], ...]:
    return tuple((v.name, str(v.type), None if v.shape is None else len(v.shape)) for v in values)


def check(model: ir.Model) -> list[str]:
    """Problems of the structure, one sentence each; empty when the model is sound.

    Sound means: nodes sorted, no dangling or doubly defined value, every name unique in its scope, every output
    produced, every initializer typed, every operator's domain imported.
    """
    problems: list[str] = []
    _check_graph(model.graph, frozenset(), frozenset(), problems, model.opset_imports, {f[0] for f in model.functions})
    return problems


def _check_graph(
    graph: ir.Graph,
    outer: frozenset[ir.Value],
    outer_names: frozenset[str],
    problems: list[str],
    opsets: dict[str, int],
    function_domains: set[str],
) -> None:
    defined: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    names: set[str] = {v.name for v in defined if v.name}
    for name, value in graph.initializers.items():
        if value.const_value is None and value not in graph.inputs:
            problems.append(f"initializer {name} has no data")
        if value.name != name:
            problems.append(f"initializer {name} is registered under another name than its own, {value.name}")
    for node in graph:
        where = f"node {display_name(node)} ({node.op_type})"
        if node.domain not in opsets and node.domain not in function_domains and node.domain != "ai.onnx":
            problems.append(f"{where}: domain {node.domain!r} is not imported")
        for read in node.inputs:
            if read is not None and read not in defined and read not in outer:
                problems.append(f"{where} reads {read.name}, which is not defined before it")
        for attr in node.attributes.values():
            inner = _graphs(attr)
            if inner:
                scope = outer | frozenset(defined)
                for subgraph in inner:
                    _check_graph(subgraph, scope, outer_names | frozenset(names), problems, opsets, function_domains)
        for value in node.outputs:
            if value.name and value.name in names:
                problems.append(f"{where} defines {value.name}, which is defined already")
            if value.name:
                names.add(value.name)
            elif value.uses() or value.is_graph_output():
                problems.append(f"{where} has an output without a name that is read")
            defined.add(value)
    for value in graph.outputs:
        if value not in defined and value not in outer:
            problems.append(f"output {value.name} is not produced")


def _graphs(attr: ir.Attr) -> list[ir.Graph]:
    if attr.is_ref():
        return []
    if attr.type is ir.AttributeType.GRAPH:
        return [attr.as_graph()]
    return list(attr.as_graphs()) if attr.type is ir.AttributeType.GRAPHS else []
