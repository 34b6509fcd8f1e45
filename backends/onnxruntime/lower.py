"""Lowering a canonical graph to what ONNX Runtime runs fastest on the CPU, at the opset that was asked for.

Three steps. First, semantic operators that have no fast kernel, or none at the opset, are written out in spellings that
ONNX Runtime fuses at load. Then what only moves data becomes as few copies as possible. Then the whole graph is
written at the opset: the source's own, unless a kernel that pays needs a newer one (LayerNormalization 17,
RotaryEmbedding 23).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from xform.backends.base import LowerOptions
from xform.backends.onnxruntime import activations
from xform.backends.onnxruntime.attention import FORMS, lower_attention
from xform.backends.onnxruntime.channel_gate import RESIZE_SINCE, lower_channel_gate, lower_spatial_mean
from xform.backends.onnxruntime.emit import Emitter
from xform.backends.onnxruntime.gather_moves import gather_moves
from xform.backends.onnxruntime.linear import lower_linear
from xform.backends.onnxruntime.residual import lower_residual
from xform.errors import TargetError, UsageError
from xform.graph.clone import clone, source_opset
from xform.graph.downgrade import downgrade, lowest_opset
from xform.graph.values import ONNX_DOMAINS, display_name, is_op
from xform.version import __version__

_MAX_NAMED = 8
_IR_VERSION = 10  # the newest that every ONNX Runtime since 1.20 reads; a newer stamp would change nothing else
# opset from which on an operator exists; below it, it is written out here
_SINCE = {"Gelu": 20, "RMSNormalization": 23, "LayerNormalization": 17, "RotaryEmbedding": 23}
# operators whose kernel is worth a newer opset than the source's, when no opset was asked for
_WORTH_IT = ("LayerNormalization", "RotaryEmbedding")


def lower(graph: ir.Model, options: LowerOptions) -> tuple[ir.Model, dict[str, int]]:
    """The lowered copy of `graph`, and how many nodes were lowered to which form.

    Raises:
        TargetError: Nodes that ONNX Runtime cannot run, by name.
        UsageError: An opset that does not exist.
        ModelError: The graph cannot be written at the opset asked for.
    """
    refuse_foreign(graph)
    model = clone(graph)
    current = model.opset_imports.get("", 0)
    if options.opset is not None and not 7 <= options.opset <= max(current, 23):
        raise UsageError(f"cannot write opset {options.opset}", hint=f"use 7 to {max(current, 23)}")
    model.producer_name, model.producer_version = "xform", __version__
    if options.verbatim:
        _write_at_opset(model, options)
        if options.portable:
            _refuse_own(model)
        model.ir_version = min(model.ir_version, _IR_VERSION)
        return model, {}
    emitter = Emitter(model)
    nodes = list(model.graph.all_nodes())
    _lower_all(emitter, nodes, options, _planned_opset(nodes, model, options))
    common_passes.RemoveUnusedNodesPass()(model)
    if not options.portable:
        gather_moves(emitter)
        common_passes.RemoveUnusedNodesPass()(model)  # constants of moves that are no more
    _write_at_opset(model, options)
    if options.portable:
        _refuse_own(model)
    model.ir_version = min(model.ir_version, _IR_VERSION)
    return model, dict(sorted(emitter.lowered.items()))


def _refuse_own(model: ir.Model) -> None:
    """Refuse operators that ONNX does not define: what reads portable models need not be ONNX Runtime.

    Raises:
        TargetError: Naming the operators and their nodes.
    """
    standard = _standard_operators()
    own = [n for n in model.graph.all_nodes() if (n.domain if n.domain != "ai.onnx" else "", n.op_type) not in standard]
    if own:
        kinds = ", ".join(sorted({f"{node.domain}.{node.op_type}".lstrip(".") for node in own}))
        raise TargetError(
            f"the result cannot be portable: the model has operators that are not standard ONNX, {kinds}",
            where=_named(own),
            hint="leave portable=True out, or replace these operators in the model",
        )


@functools.cache
def _standard_operators() -> frozenset[tuple[str, str]]:
    return frozenset((schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history())


def _named(nodes: Sequence[ir.Node]) -> list[str]:
    more = len(nodes) - _MAX_NAMED
    return [*map(display_name, nodes[:_MAX_NAMED]), *([f"and {more} more"] if more > 0 else ())]


def refuse_foreign(graph: ir.Model) -> None:
    """Refuse torch operators that have no ONNX meaning.

    Raises:
        TargetError: Naming the operators and their nodes.
    """
    foreign = [node for node in graph.graph.all_nodes() if node.domain == "torch"]
    if foreign:
        kinds = sorted({node.op_type for node in foreign})
        raise TargetError(
            f"ONNX Runtime cannot run the torch operators {', '.join(kinds)}: they have no meaning in ONNX",
            where=_named(foreign),
            hint="replace these operators in the model; xform passes leave them as they are",
        )


def _planned_opset(nodes: Iterable[ir.Node], model: ir.Model, options: LowerOptions) -> int:
    if options.opset is not None:
        return options.opset
    opset = source_opset(model)
    worth = [_SINCE[n.op_type] for n in nodes if n.op_type in _WORTH_IT and n.domain in ONNX_DOMAINS]
    return max([opset, *worth]) if not options.portable else opset


def _lower_all(emitter: Emitter, nodes: Iterable[ir.Node], options: LowerOptions, opset: int) -> None:
    forms = () if options.portable else FORMS[FORMS.index(options.attention) :] if options.attention in FORMS else ()
    nodes = list(nodes)
    for node in nodes:  # first, as it reads the linear layers that its operands come from
        if is_op(node, "Attention"):
            lower_attention(emitter, node, forms, opset)
    common_passes.RemoveUnusedNodesPass()(emitter.model)  # projections that were taken in are no linear layers any more
    for node in nodes:
        if node.graph is None or node.domain not in ONNX_DOMAINS:
            continue
        if is_op(node, "Add"):
            if not lower_linear(emitter, node) and not options.portable:
                lower_residual(emitter, node)
        elif is_op(node, "ReduceMean") and not options.portable:
            lower_spatial_mean(emitter, node)
        elif is_op(node, "Mul") and not options.portable and opset >= RESIZE_SINCE:
            lower_channel_gate(emitter, node)
        elif is_op(node, "Swish"):
            activations.lower_swish(emitter, node)
        elif node.op_type in _SINCE and opset < _SINCE[node.op_type]:
            _write_out(emitter, node)


def _write_out(emitter: Emitter, node: ir.Node) -> None:
    if is_op(node, "Gelu"):
        activations.lower_gelu(emitter, node)
    elif is_op(node, "RMSNormalization"):
        activations.lower_rms_normalization(emitter, node)
    elif is_op(node, "LayerNormalization"):
        activations.lower_layer_normalization(emitter, node)
    elif is_op(node, "RotaryEmbedding"):
        activations.lower_rotary(emitter, node)


def _write_at_opset(model: ir.Model, options: LowerOptions) -> None:
    if options.opset is not None:
        downgrade(model, options.opset)
        return
    planned = _planned_opset(list(model.graph.all_nodes()), model, options)
    target = lowest_opset(model, planned)
    if target < model.opset_imports.get("", 0):
        downgrade(model, target)
