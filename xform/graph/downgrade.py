"""Writing a model at an older opset, in place: the reverse adapters, and bodies of operators that did not exist yet.

Every node whose definition is newer than the wanted opset goes down one version at a time (`downgrade_steps`, adapters
in `downgrade_inputs` and `downgrade_meaning`); an operator that did not exist is replaced by a body: our own for
those that networks are made of (`downgrade_norms`, `downgrade_attention`, `downgrade_bodies`), ONNX's otherwise. What
comes out goes on down, until every node has a schema that is valid at the wanted opset and means the same.

Each node is tried on a copy first, so a model that cannot be written is left as it was.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import onnx_ir as ir

from xform.errors import ModelError
from xform.graph import downgrade_attention, downgrade_inputs, downgrade_meaning, downgrade_norms  # noqa: F401
from xform.graph.downgrade_bodies import expand_by_schema
from xform.graph.downgrade_steps import (
    EXPAND,
    LOWER,
    Unavailable,
    check_types,
    conform,
    drop_defaults,
    step_defaults,
    version_before,
)
from xform.graph.opset import opset_of, upgrade_node
from xform.graph.opset_emit import Emitter, GraphLike, Names, drop_unread, replace, subgraphs, unread
from xform.graph.opset_schema import NEWEST_OPSET, OLDEST_OPSET, default_attributes, input_limit, schema_at, since
from xform.graph.shapes import infer_shapes
from xform.graph.upgrade_inputs import EQUAL_SPLIT
from xform.graph.values import ONNX_DOMAINS, constant_tensor, display_name, shape_of

OLDEST_WRITTEN = 7  # runtimes start there; a model of opset 6 is written at 7
Answers = dict[Hashable, str | None]
_COMPARED_ELEMENTS = 64  # constants up to this size are compared by content
_NAMED_AT_MOST = 8  # nodes that an error lists


def downgrade(model: ir.Model, opset: int) -> None:
    """Rewrites every node of the default domain to its definition at `opset`, in place; an older model stays as it is.

    Raises:
        ModelError: Nodes cannot be expressed there; it names them, why, and the lowest opset that would do. The model
            is unchanged.
    """
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(f"opset {opset} does not exist; this installation knows {OLDEST_OPSET} to {NEWEST_OPSET}")
    parts = [(graph, frm) for graph, frm in _parts(model) if frm > opset]
    if not parts:
        return
    _complete_types(model)
    _demand_writable(model, parts, opset)
    graphs = [graph for graph, _ in _parts(model)]
    names, unread_before = Names(graphs), unread(graphs)
    for graph, frm in parts:
        for node in tuple(_nodes(graph)):
            if node.domain in ONNX_DOMAINS:
                _lower(node, frm, opset, names, expands=True)
        for stamped in (graph, *_bodies(graph)):
            stamped.opset_imports.pop("ai.onnx", None)
            stamped.opset_imports[""] = opset
    drop_unread(graphs, unread_before)


def lowest_opset(model: ir.Model, at_least: int, *, expand: bool = False) -> int:
    """The smallest opset from `at_least` on that the model can be written at.

    Args:
        at_least: Usually the opset that the user's model had.
        expand: Whether operators may be written out in more elementary ones to get lower. By default they stay: an
            operator that was fused or raised needs the opset that has it.

    Returns:
        An opset between `at_least` (at least 7) and the model's own, or the model's own if that is not newer.
    """
    own = opset_of(model)
    if own is None or own <= at_least:
        return own if own is not None else at_least
    _complete_types(model)
    return _lowest(list(_parts(model)), max(at_least, OLDEST_WRITTEN), own, expand)


def _lowest(parts: list[tuple[GraphLike, int]], at_least: int, own: int, expand: bool) -> int:
    opset, settled = at_least, False
    known: Answers = {}
    while (
        not settled
    ):  # a node that can be written at an opset may in theory not be at a later one, so ask until all agree
        settled = True
        for graph, frm in parts:
            for node in _nodes(graph):
                while opset < own and why_not(node, frm, opset, expands=expand, known=known) is not None:
                    opset, settled = opset + 1, False
    return opset


def why_not(
    node: ir.Node, version: int, opset: int, *, expands: bool = True, known: Answers | None = None
) -> str | None:
    """Why a node written at opset `version` cannot be written at `opset`; None if it can. Changes nothing.

    Args:
        expands: Whether it may be written out in other operators.
        known: Answers for nodes that look the same; layers repeat.
    """
    if node.domain not in ONNX_DOMAINS:
        return None
    current = since(node.op_type, version)
    if current is None or current <= opset or _is_relabel(node, current, opset):
        return None
    if any(attr.is_ref() for attr in node.attributes.values()):
        return "it takes an attribute from the function that it is in; inline the function first"
    if any(True for _ in subgraphs(node)):
        return f"{node.op_type} with a body does not go below opset {current} with these types"
    if known is None:
        return _try(node, version, opset, expands)
    key = (version, opset, expands, _looks(node))
    if key not in known:
        known[key] = _try(node, version, opset, expands)
    return known[key]


def _try(node: ir.Node, version: int, opset: int, expands: bool) -> str | None:
    copy = _detached(node)
    assert copy.graph is not None
    try:
        _lower(copy, version, opset, Names([copy.graph]), expands)
    except Unavailable as reason:
        return str(reason)
    return None


def _looks(node: ir.Node) -> Hashable:
    """All of a node that decides how it is written at another opset."""
    inputs = tuple(_value_looks(v) for v in node.inputs)
    outputs = tuple((str(o.type), bool(o.uses()) or o.is_graph_output()) for o in node.outputs)
    attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values()))
    return node.op_type, attributes, inputs, outputs, bool(node.meta.get(EQUAL_SPLIT))


def _value_looks(value: ir.Value | None) -> Hashable:
    if value is None:
        return None
    tensor = constant_tensor(value)
    held: Hashable = None
    if tensor is not None:
        small = tensor.size <= _COMPARED_ELEMENTS and tensor.dtype != ir.DataType.STRING
        held = tensor.tobytes() if small else id(tensor)
    return str(value.type), shape_of(value), held


def _is_relabel(node: ir.Node, version: int, opset: int) -> bool:
    """Whether every step down leaves the node as it is. Only a shortcut: the long way gives the same."""
    while version > opset:
        older = version_before(node.op_type, version)
        if older is None or (node.op_type, version) in LOWER:
            return False
        schema = schema_at(node.op_type, older)
        if schema is None or schema.deprecated or len(node.inputs) > input_limit(node.op_type, older):
            return False
        if any(name not in schema.attributes for name in node.attributes):
            return False
        if default_attributes(node.op_type, version) != default_attributes(node.op_type, older):
            return False
        try:
            check_types(node, older)
        except Unavailable:
            return False
        version = older
    return True


def _lower(node: ir.Node, version: int, opset: int, names: Names, expands: bool) -> None:
    """Moves one node, and whatever comes out of it, from opset `version` to `opset`.

    Raises:
        Unavailable: It cannot be done; the graph may be half changed then, so try on a copy first.
    """
    work = [(node, version)]
    while work:
        current, at = work.pop()
        current.version = None
        if at < opset:  # a body written at an older opset
            upgrade_node(current, at, opset, names)
            continue
        version = since(current.op_type, at) or 0
        if version <= opset:
            continue
        older = version_before(current.op_type, version)
        if older is None:
            if not expands:
                raise Unavailable(f"{current.op_type} is new in opset {version}")
            emitter, outputs = _expanded(current, version, opset, names)
        else:
            step_defaults(current, version, older)
            emitter = Emitter(current, version - 1, names, expands)
            adapter = LOWER.get((current.op_type, version))
            lowered = adapter(current, emitter) if adapter is not None else None
            if lowered is None:
                drop_defaults(current, version, older)
                conform(current, older)
                assert current.graph is not None
                current.graph.insert_before(current, emitter.nodes)
                work.append((current, older))
                work.extend((made, emitter.opset) for made in emitter.nodes)
                continue
            outputs = list(lowered)
        for made in emitter.nodes:
            check_types(made, emitter.opset)
        replace(current, emitter, outputs)
        work.extend((made, emitter.opset) for made in emitter.nodes)


def _expanded(node: ir.Node, version: int, opset: int, names: Names) -> tuple[Emitter, list[ir.Value]]:
    own = EXPAND.get(node.op_type)
    if own is None:
        emitter, outputs = expand_by_schema(node, version, opset, lambda at: Emitter(node, at, names))
        return emitter, list(outputs)
    emitter = Emitter(node, version - 1, names)
    return emitter, list(own(node, emitter) or ())


def _detached(node: ir.Node) -> ir.Node:
    """A copy of `node` alone in a graph, whose inputs have the types, shapes and constants of the real ones."""
    values: dict[ir.Value, ir.Value] = {}
    constants: list[ir.Value] = []
    for index, value in enumerate(node.inputs):
        if value is None or value in values:
            continue
        twin = ir.Value(name=value.name or f"input_{index}", type=value.type, shape=_copied(value.shape))
        tensor = constant_tensor(value)
        if tensor is not None:
            twin.const_value = tensor
            constants.append(twin)
        values[value] = twin
    attributes = [ir.Attr(a.name, a.type, a.value) for a in node.attributes.values()]
    outputs = [
        ir.Value(name=o.name or f"output_{i}", type=o.type, shape=_copied(o.shape)) for i, o in enumerate(node.outputs)
    ]
    inputs = [None if v is None else values[v] for v in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=node.name)
    copy.meta.update(node.meta)
    live = [twin for twin, o in zip(outputs, node.outputs, strict=True) if o.uses() or o.is_graph_output()]
    free = [v for v in values.values() if v not in constants]
    ir.Graph(free, live, nodes=[copy], initializers=constants)
    return copy


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape(list(shape.dims))


def _demand_writable(model: ir.Model, parts: list[tuple[GraphLike, int]], opset: int) -> None:
    known: Answers = {}
    nodes = [(n, frm) for graph, frm in parts for n in _nodes(graph)]
    reasons = [(n, why) for n, frm in nodes if (why := why_not(n, frm, opset, known=known)) is not None]
    if not reasons:
        return
    own = max(frm for _, frm in parts)
    lowest = _lowest(parts, opset + 1, own, expand=True)
    kinds = sorted({n.op_type for n, _ in reasons})
    raise ModelError(
        f"{len(reasons)} node(s) cannot be written at opset {opset} ({', '.join(kinds)}); "
        f"the lowest opset that works is {lowest}",
        where=[f"{display_name(n)} ({n.op_type}: {why})" for n, why in reasons[:_NAMED_AT_MOST]],
        hint=f"ask for opset {lowest} or newer",
    )


def _complete_types(model: ir.Model) -> None:
    """Infers types once where any is missing."""
    untyped = any(
        v is not None and v.type is None for graph, _ in _parts(model) for n in _nodes(graph) for v in n.inputs
    )
    if untyped:
        infer_shapes(model)


def _parts(model: ir.Model) -> Iterator[tuple[GraphLike, int]]:
    """The main graph and the functions, each with its opset."""
    own = opset_of(model)
    if own is not None:
        yield model.graph, own
    for function in model.functions.values():
        opset = opset_of(function)
        if opset is not None:
            yield function, opset


def _nodes(graph: GraphLike) -> Iterator[ir.Node]:
    """All nodes, those of bodies before the node that has the body."""
    for node in graph:
        for body in subgraphs(node):
            yield from _nodes(body)
        yield node


def _bodies(graph: GraphLike) -> Iterator[ir.Graph]:
    for node in graph:
        for body in subgraphs(node):
            yield body
            yield from _bodies(body)
