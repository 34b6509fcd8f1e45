"""Before lowering: a copy with shapes inferred, functions inlined, and operators without a lowering written out.

An operator that the table lacks but that has a body is expanded into it: functions that travel with the model (domain
`xform`), and the bodies that ONNX's own schemas define.
"""

from __future__ import annotations

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
        if node.domain not in ONNX_DOMAINS or find(node, opset) is not None:
            continue
        names = names or Names([model.graph])
        version = since(node.op_type, opset)
        try:
            if version is None:
                continue
            emitter, outputs = expand_by_schema(node, version, opset, _emitter(node, names))
        except (Unavailable, ModelError):
            continue  # refused by name afterwards, together with all others
        replace(node, emitter, list(outputs))
        changed = True
    return changed


def _emitter(node: ir.Node, names: Names):  # type: ignore[no-untyped-def]
    return lambda at: Emitter(node, at, names)
