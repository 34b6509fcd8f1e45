"""Before lowering: a copy with shapes inferred, functions inlined, and operators without a lowering written out.

An operator that the table lacks but that has a body is expanded into it: functions that travel with the model (domain
`xform`), and the bodies that ONNX's own schemas define.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from xform.backends.torch_triton import operators  # noqa: F401 - fills the table
from xform.backends.torch_triton.lower.table import find
from xform.errors import ModelError
from xform.graph.clone import clone
from xform.graph.downgrade_bodies import expand_by_schema
from xform.graph.downgrade_steps import Unavailable
from xform.graph.opset_emit import Emitter, Names, replace
from xform.graph.opset_schema import since
from xform.graph.shapes import infer_shapes
from xform.graph.values import ONNX_DOMAINS

_MAX_ROUNDS = 4  # bodies within bodies


def prepare(model: ir.Model) -> ir.Model:
    """The copy that is lowered."""
    copy = clone(model)
    if copy.functions:
        _inline(copy)
    infer_shapes(copy)
    for _ in range(_MAX_ROUNDS):
        if not _expand_all(copy):
            break
        infer_shapes(copy)
    return copy


def _inline(model: ir.Model) -> None:
    """Inline the functions of the model, but those whose operator has a lowering of its own."""
    lowered = {key for key in model.functions if find(ir.Node(key[0], key[1], []), model.opset_imports.get(key[0], 1))}
    used = {(node.domain, node.op_type, node.overload) for node in model.graph.all_nodes()}
    if used & (set(model.functions) - lowered):
        for key in lowered:
            model.functions.pop(key)
        common_passes.InlinePass()(model)
    model.functions.clear()


def _expand_all(model: ir.Model) -> bool:
    """Expand every node that has no lowering and has a body; whether there was one."""
    opset = model.opset_imports.get("", 23)
    names: Names | None = None
    changed = False
    for node in list(model.graph.all_nodes()):
        own = model.opset_imports.get(node.domain, 1)
        if find(node, opset if node.domain in ONNX_DOMAINS else own) is not None:
            continue
        if node.domain not in ONNX_DOMAINS:
            changed |= _as_function(model, node, own)
            continue
        names = names or Names([model.graph])
        version = since(node.op_type, opset)
        try:
            if version is None:
                continue
            emitter, outputs = expand_by_schema(node, version, opset, _emitter(node, names))
        except (Unavailable, ModelError):
            changed |= _as_function(model, node, opset)
            continue
        replace(node, emitter, list(outputs))
        changed = True
    if model.functions:
        common_passes.InlinePass()(model)
        model.functions.clear()
    return changed


def _as_function(model: ir.Model, node: ir.Node, opset: int) -> bool:
    """Make a node whose body has control flow a call of a function of its own; False if there is no body.

    A node without a body is refused by name afterwards, together with all others.
    """
    if any(attr.type is ir.AttributeType.GRAPH for attr in node.attributes.values()):
        return False  # the inliner cannot hand graphs to a body
    function = _body(node, opset)
    if function is None:
        return False
    domain, name = "xform.bodies", f"{node.op_type}_{len(model.functions)}"
    function.domain, function.name = domain, name
    made = ir.serde.deserialize_function(function)
    upgrade_to = model.opset_imports.get("", opset)
    made.opset_imports[""] = max(made.opset_imports.get("", upgrade_to), upgrade_to)
    model.functions[made.identifier()] = made
    model.opset_imports[domain] = 1
    node.domain, node.op_type = domain, name
    node.version = None
    return True


def _body(node: ir.Node, opset: int) -> onnx.FunctionProto | None:
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
    if schema.has_function:
        return _parsed(schema.function_body.SerializeToString())
    if not schema.has_context_dependent_function:
        return None
    types = []
    for value in node.inputs:
        proto = onnx.TypeProto()
        if value is not None and value.type is not None:
            ir.serde.serialize_type_into(proto, value.type)
            if value.shape is not None:
                ir.serde.serialize_shape_into(proto, value.shape)
        types.append(proto.SerializeToString())
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    version = max(versions or schema.context_dependent_function_opset_versions)
    try:
        text = schema.get_context_dependent_function_with_opset_version(
            version, ir.serde.serialize_node(node).SerializeToString(), types
        )
    except (RuntimeError, onnx.checker.ValidationError):
        return None
    return _parsed(text) if text else None


def _parsed(text: bytes) -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.ParseFromString(text)
    return function


def _emitter(node: ir.Node, names: Names):  # type: ignore[no-untyped-def]
    return lambda at: Emitter(node, at, names)
