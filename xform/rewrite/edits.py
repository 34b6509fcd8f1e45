"""One application of a rule as a record that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from xform.rewrite.builder import Builder


@dataclass
class Replacement:
    """A value whose readers were moved to another value."""

    old: ir.Value
    new: ir.Value
    uses: list[tuple[ir.Node, int]]
    outputs: list[tuple[ir.Graph, int]]
    old_name: str | None
    new_name: str | None
    new_type: ir.TypeProtocol | None
    new_shape: ir.Shape | None


@dataclass
class Removal:
    """A node that was taken out. Its place is not kept: whoever takes edits back sorts the graph afterwards."""

    node: ir.Node
    graph: ir.Graph
    inputs: tuple[ir.Value | None, ...]


@dataclass
class Edit:
    """All changes of one application.

    Attributes:
        rule: Name of the rule.
        origin: Names of the source nodes.
        graph: The graph that holds the roots.
        added, initializers, replacements, removals: What was changed, in order.
    """

    rule: str
    origin: str
    graph: ir.Graph | None
    added: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)
    removals: list[Removal] = field(default_factory=list)


def commit(
    rule: str,
    origin: str,
    roots: Sequence[ir.Value],
    values: Sequence[ir.Value],
    builder: Builder,
    unique: Callable[[str], str],
) -> Edit:
    """Insert what `builder` holds before the first root's node, move the readers of `roots`, remove what died.

    A root that is a graph output hands its name on; where the new value cannot carry it (it is an input, an
    initializer, an output itself, or serves another output), an Identity does. A value that serves several roots has
    the name of the first of them that is an output, or else of the first.
    """
    anchor = roots[0].producer()
    if anchor is None or anchor.graph is None or not isinstance(anchor.graph, ir.Graph):
        raise ValueError(f"rule {rule}: the root {roots[0].name} is no output of a node in a graph")
    graph = anchor.graph
    edit = Edit(rule, origin, graph)
    owners: dict[ir.Value, ir.Value] = {}  # the root whose name a value takes
    final = []
    for old, new in zip(roots, values, strict=True):
        carrier = _carrier(old, new, builder)
        if old.is_graph_output() and owners.setdefault(carrier, old) is not old:
            carrier = builder.op("Identity", new)
            owners[carrier] = old
        final.append(carrier)
    for value in builder.initializers:
        graph.register_initializer(value)
        edit.initializers.append(value)
    graph.insert_before(anchor, builder.nodes)
    edit.added = list(builder.nodes)
    fresh = {id(o) for n in builder.nodes for o in n.outputs}
    for old, new in zip(roots, final, strict=True):
        owned = owners.setdefault(new, old) is old
        edit.replacements.append(_replace(old, new, owned and id(new) in fresh, unique))
    edit.removals = _remove_dead([p for r in roots if (p := r.producer()) is not None])
    return edit


def undo(edit: Edit) -> None:
    """Take `edit` back, in reverse order of the edits. Nodes return at the end of their graph: sort it afterwards."""
    for removal in reversed(edit.removals):
        _reinsert(removal)
    for r in reversed(edit.replacements):
        for node, index in r.uses:
            node.replace_input_with(index, r.old)
        for graph, index in r.outputs:
            graph.outputs[index] = r.old
        r.new.name, r.old.name = r.new_name, r.old_name
        r.new.type, r.new.shape = r.new_type, r.new_shape
    for node in reversed(edit.added):
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    for value in edit.initializers:
        if edit.graph is not None and value.name is not None:
            edit.graph.initializers.pop(value.name, None)


def _carrier(old: ir.Value, new: ir.Value, builder: Builder) -> ir.Value:
    """`new`, or an Identity of it where `old` is a graph output whose name `new` cannot take."""
    if not old.is_graph_output():
        return new
    taken = new.is_graph_input() or new.is_initializer() or new.is_graph_output()
    if not taken and new.producer() is not None and new not in builder.initializers and not _outside(old, new):
        return new
    return builder.op("Identity", new)


def _outside(old: ir.Value, new: ir.Value) -> bool:
    """Whether `new` already stands in another graph than `old` (an outer scope)."""
    producer, home = new.producer(), old.producer()
    return producer is not None and producer.graph is not None and home is not None and producer.graph is not home.graph


def _replace(old: ir.Value, new: ir.Value, fresh: bool, unique: Callable[[str], str]) -> Replacement:
    uses = [(node, index) for node, index in old.uses()]
    outputs: list[tuple[ir.Graph, int]] = []
    record = Replacement(old, new, uses, outputs, old.name, new.name, new.type, new.shape)
    graph = old.graph
    if old.is_graph_output() and graph is not None:
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
                outputs.append((graph, index))
    for node, index in uses:
        node.replace_input_with(index, new)
    if fresh or outputs:
        name = old.name
        old.name = unique(f"{name}_replaced")
        new.name = name
    if new.type is None:
        new.type = old.type
    if not new.is_graph_input():  # what the caller declared stays
        new.shape = _merged(old.shape, new.shape)
    return record


def _merged(old: ir.Shape | None, new: ir.Shape | None) -> ir.Shape | None:
    """The better known of two shapes of one value, dim by dim; names that the user gave are kept."""
    if old is None or new is None or len(old) != len(new):
        return new if new is not None else old
    dims: list[int | ir.SymbolicDim] = []
    for a, b in zip(old.dims, new.dims, strict=True):
        dims.append(next((d for d in (b, a) if isinstance(d, int)), b if _unnamed(a) else a))
    return ir.Shape(dims)


def _unnamed(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is None


def _remove_dead(start: list[ir.Node]) -> list[Removal]:
    removals: list[Removal] = []
    stack = list(start)
    while stack:
        node = stack.pop()
        graph = node.graph
        if not isinstance(graph, ir.Graph) or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            continue  # its subgraphs hold readers of outer values; dead-code elimination takes such nodes whole
        removals.append(Removal(node, graph, tuple(node.inputs)))
        graph.remove(node, safe=True)
        stack.extend(p for v in removals[-1].inputs if v is not None and (p := v.producer()) is not None)
    return removals


def _reinsert(removal: Removal) -> None:
    for index, value in enumerate(removal.inputs):
        removal.node.replace_input_with(index, value)
    removal.graph.append(removal.node)
