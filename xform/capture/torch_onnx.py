"""An exported program as an ONNX graph, by torch's own exporter.

Operators that the exporter has no translation for are handled in this order: decomposed by torch where torch knows a
decomposition, and otherwise kept, as nodes of the domain `torch` that carry the operator's name and arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.onnx._internal.exporter import _core, _registration

from xform.capture.onnx_file import notes
from xform.capture.quiet import quiet
from xform.capture.torch_errors import failing_node
from xform.capture.torch_operators import keep_operator
from xform.capture.torch_program import PREFIX

OPSET = 23
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
WRITTEN = "xform.written"  # key in model.meta: names of buffers and parameters that forward writes into


def translate(program: ExportedProgram) -> ir.Model:
    """The program as an ONNX model at opset 23 that shares its tensors; what it leaves out is in the model's notes.

    Raises:
        Exception: What the exporter raised on an operator that can neither be decomposed nor kept.
    """
    decomposed: set[torch._ops.OpOverload] = set()
    while True:
        try:
            return _export(program)
        except Exception as error:
            node = failing_node(error)
            if node is None or not isinstance(node.target, torch._ops.OpOverload):
                raise
            if node.target not in decomposed and (table := _decomposition(node.target)):
                decomposed.add(node.target)
                program = program.run_decompositions(table)
            elif not _keep(program, node):
                raise


def _keep(program: ExportedProgram, refused: torch.fx.Node) -> bool:
    """Keep a refused operator as it is; where it came out of a decomposition, the operator that was decomposed."""
    sources = {source.name for source in refused.meta.get("from_node", ())}
    origins = [node.target for node in program.graph.nodes if node.name in sources]
    candidates = (refused.target, refused.meta.get("original_aten"), *origins)
    return any(keep_operator(program, t) for t in candidates if isinstance(t, torch._ops.OpOverload))


@functools.cache
def _registry() -> _registration.ONNXRegistry:
    """The exporter's translations. torch.onnx.export makes them anew at every call, which takes seconds."""
    return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


def _export(program: ExportedProgram) -> ir.Model:
    with quiet():
        exported = _core.export(program, registry=_registry(), opset_version=OPSET, optimize=False, verbose=False)
    if exported.exported_program is not None:
        _note_writes(exported.model, exported.exported_program.graph_signature)
        _restore_doubles(exported.model, exported.exported_program)
    return exported.model


def _restore_doubles(model: ir.Model, program: ExportedProgram) -> None:
    """Python numbers in a float64 module as the float64 numbers that they are.

    The exporter writes each as a float32 constant and a Cast, which leaves 8 of its 16 digits.
    """
    target = torch.ops.aten.scalar_tensor.default
    numbers = {
        node.name: node.args[0]
        for node in program.graph.nodes
        if node.target is target and isinstance(node.args[0], float) and node.meta["val"].dtype == torch.float64
    }
    for node in list(model.graph):
        output = node.outputs[0]
        if node.op_type != "Cast" or output.name not in numbers:
            continue
        value = ir.Value(name=f"{output.name}_double", type=output.type, shape=ir.Shape([]))
        value.const_value = ir.tensor(np.float64(numbers[output.name]), name=value.name)
        model.graph.register_initializer(value)
        output.replace_all_uses_with(value, replace_graph_outputs=False)


def _note_writes(model: ir.Model, signature: ExportGraphSignature) -> None:
    """Tell of what forward writes into: a graph has no side effects."""
    buffers = [name.removeprefix(PREFIX) for name in signature.buffers_to_mutate.values()]
    parameters = [name.removeprefix(PREFIX) for name in signature.parameters_to_mutate.values()]
    model.meta[WRITTEN] = (*buffers, *parameters)
    notes(model).extend(
        f"forward writes into its {what}; the captured graph starts from what was there when it was captured, at every "
        "call, and writes nothing"
        for what in (*(f"buffer {name}" for name in buffers), *(f"parameter {name}" for name in parameters))
    )
    notes(model).extend(
        f"forward writes into its argument {name}; the captured graph computes the same result but does not write there"
        for name in signature.user_inputs_to_mutate.values()
    )


def _decomposition(target: torch._ops.OpOverload) -> dict[Any, Callable[..., Any]]:
    """torch's decomposition of one operator into others, as a table; empty if it knows none."""
    for table in (torch.export.default_decompositions(), torch._decomp.decomposition_table):
        if target in table:
            return {target: table[target]}
    return {}


def draws_random_numbers(model: ir.Model) -> bool:
    """Whether a captured graph draws random numbers: it samples, or drops out although it is in evaluation mode."""
    return any(
        node.op_type in _RANDOM or (node.op_type == "Dropout" and len(node.inputs) > 2 and _is_true(node.inputs[2]))
        for node in model.graph.all_nodes()
    )


def _is_true(value: ir.Value | None) -> bool:
    held = None if value is None else ir.convenience.get_const_tensor(value)
    return held is not None and bool(held.numpy())
