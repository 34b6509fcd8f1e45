"""Moving a model up to a newer opset, in place, on onnx_ir.

ONNX's own converter is not used: it goes through one protobuf (2 GB limit, weights copied), drops what it does not know
(metadata, functions, quantization annotations) and has no adapter for many steps. onnxscript's converter on onnx_ir
starts at opset 18 and carries three adapters (DFT, GridSample, GroupNormalization), of which the last is skipped in
silence when a shape is unknown; the same three steps are covered here without that. Every change of every operator
since opset 1 is classified in `upgrade_steps`, either as a relabel or with an adapter.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from xform.errors import ModelError
from xform.graph import upgrade_inputs, upgrade_meaning  # noqa: F401 - they register their adapters
from xform.graph.opset_emit import Emitter, GraphLike, Names, drop_unread, replace, subgraphs, unread
from xform.graph.opset_schema import NEWEST_OPSET, OLDEST_OPSET, next_version, since
from xform.graph.shapes import infer_shapes
from xform.graph.upgrade_steps import ADAPTERS
from xform.graph.values import ONNX_DOMAINS

IR_OPSET = 23


def opset_of(model: ir.Model | ir.Function) -> int | None:
    """The version of the default domain that is imported, or None if it is not."""
    return next((model.opset_imports[d] for d in ONNX_DOMAINS if d in model.opset_imports), None)


def upgrade(model: ir.Model, to: int = IR_OPSET) -> None:
    """Rewrites every node of the default domain to its definition at opset `to`, in place.

    The main graph, the bodies of If, Loop, Scan and SequenceMap, and model-local functions are converted. A part that
    is at `to` or newer already stays as it is. Old meanings are kept, e.g. the flattening Softmax of opset 12.

    Args:
        model: A model at any opset from 1 on. Shapes are inferred first where an adapter is going to be used.
        to: The wanted opset, at most the newest that the installed onnx knows.

    Raises:
        ModelError: An opset that onnx does not know, or a node whose old meaning cannot be expressed.
    """
    opset = opset_of(model)
    if opset is not None and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(
            f"the model is written at opset {opset}; this installation reads {OLDEST_OPSET} to {NEWEST_OPSET}",
            hint="install a newer onnx package" if opset > NEWEST_OPSET else "export the model again",
        )
    if not OLDEST_OPSET <= to <= NEWEST_OPSET:
        raise ModelError(f"opset {to} does not exist; this installation knows {OLDEST_OPSET} to {NEWEST_OPSET}")
    _settle_references(model, opset, to)
    parts: list[tuple[GraphLike, int]] = [(model.graph, opset if opset is not None else to)]
    parts += [(f, opset_of(f) or to) for f in model.functions.values()]
    if any(_needs_adapter(graph, frm, to) for graph, frm in parts):
        infer_shapes(model)
    graphs = [graph for graph, _ in parts]
    names, unread_before = Names(graphs), unread(graphs)
    for graph, frm in parts:
        if frm < to:
            _upgrade_graph(graph, frm, to, names)
    drop_unread(graphs, unread_before)
    _stamp(model.graph, max(to, opset or to))
    for function in model.functions.values():
        _stamp(function, max(to, opset_of(function) or to))


def _settle_references(model: ir.Model, opset: int | None, to: int) -> None:
    """Inlines the functions where an adapter would need an attribute that the function's caller gives.

    Raises:
        ModelError: They are written at another opset than the model, so they cannot be inlined before.
    """
    asking = [
        function
        for function in model.functions.values()
        if any(
            any(attr.is_ref() for attr in node.attributes.values()) and _node_needs_adapter(node, version, to)
            for version in [opset_of(function) or to]
            for node in function.all_nodes()
        )
    ]
    if not asking:
        return
    if any(opset_of(function) not in (None, opset) for function in model.functions.values()):
        raise ModelError(
            f"functions written at another opset than the model's {opset} take attributes from their callers",
            where=[f"{function.domain}.{function.name}" for function in asking],
            hint="inline the functions (onnx.inliner.inline_local_functions) and try again",
        )
    InlinePass()(model)


def _stamp(graph: GraphLike, opset: int) -> None:
    graph.opset_imports.pop("ai.onnx", None)
    graph.opset_imports[""] = opset


def _needs_adapter(graph: GraphLike, opset: int, to: int) -> bool:
    """Whether any node is not merely relabelled on the way."""
    for node in graph:
        if _node_needs_adapter(node, opset, to):
            return True
        if any(_needs_adapter(body, opset, to) for body in subgraphs(node)):
            return True
    return False


def _node_needs_adapter(node: ir.Node, opset: int, to: int) -> bool:
    return node.domain in ONNX_DOMAINS and _changes(node.op_type, opset, to)


def _changes(op_type: str, opset: int, to: int) -> bool:
    """Whether the meaning of an operator changed between two opsets, by more than new types or attributes."""
    version = next_version(op_type, opset)
    while version is not None and version <= to:
        if (op_type, version) in ADAPTERS:
            return True
        version = next_version(op_type, version)
    return False


def same_meaning(domain: str, op_type: str, one: int, other: int) -> bool:
    """Whether an operator means the same at two opsets of its domain.

    An operator that exists at one of them only does not. Operators of domains that ONNX does not define, and those of
    `ai.onnx.ml` and the like, are taken to mean the same where their version is the same.
    """
    older, newer = sorted((one, other))
    if domain in ONNX_DOMAINS:
        return since(op_type, older) is not None and not _changes(op_type, older, newer)
    if not onnx.defs.has(op_type, domain):
        return True
    return bool(_version_in(domain, op_type, older) == _version_in(domain, op_type, newer))


def _version_in(domain: str, op_type: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op_type, opset, domain).since_version)
    except onnx.defs.SchemaError:
        return None


def _upgrade_graph(graph: GraphLike, opset: int, to: int, names: Names) -> None:
    for node in tuple(graph):
        for body in subgraphs(node):
            _upgrade_graph(body, opset, to, names)
            if body.opset_imports:
                _stamp(body, to)
        if node.domain in ONNX_DOMAINS:
            upgrade_node(node, opset, to, names)


def upgrade_node(node: ir.Node, opset: int, to: int, names: Names) -> None:
    """Moves one node (not its bodies), and whatever comes out of it, from `opset` to `to`."""
    work = [(node, opset)]
    while work:
        current, version = work.pop()
        current.version = None
        step = next_version(current.op_type, version)
        if step is None or step > to:
            continue
        adapter = ADAPTERS.get((current.op_type, step))
        if adapter is None:
            work.append((current, step))
            continue
        emitter = Emitter(current, step, names)
        outputs = adapter(current, emitter)
        if outputs is not None:
            replace(current, emitter, outputs)
        else:
            assert current.graph is not None
            current.graph.insert_before(current, emitter.nodes)
            work.append((current, step))
        work.extend((made, step) for made in emitter.nodes)
