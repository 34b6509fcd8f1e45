"""Which nodes leave the range of float16: measured, as a processor without float16 arithmetic never shows it.

ONNX Runtime computes float16 nodes in float32 where it has no float16 kernel for the processor, so a result that would
be infinite elsewhere is finite here. So the float32 graph is run first, and nodes that read or give numbers near the
end of the range stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import Array, constant_tensor, display_name
from xform.passes.precision import ConvertPrecision
from xform.pipeline.calibration import counterparts
from xform.pipeline.oracle import Inputs, Session
from xform.rewrite.passes import PassContext
from xform.rewrite.remarks import Remark

_LARGEST = float(np.finfo(np.float16).max) / 4  # other inputs than those at hand give other numbers
_CASES = 4


def within_range(
    candidate: ConvertPrecision, model: ir.Model, batches: Sequence[Inputs]
) -> tuple[ConvertPrecision, tuple[Remark, ...]]:
    """The pass, with `keep` filled with what leaves the range on `batches`, and what is to be told of it.

    Args:
        model: The graph as the pass will get it.
        batches: Inputs by name, of which a few are used.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    context = PassContext()
    candidate.run(clone(model), context)
    names = {name for remark in context.remarks if remark.verdict == "applied" for name in remark.nodes}
    nodes = [node for node in model.graph if display_name(node) in names]
    values = dict.fromkeys(value for node in nodes for value in _floats(node))
    largest = peaks(model, batches[:_CASES], list(values))
    sizes = {display_name(n): max(largest[value] for value in _floats(n)) for n in nodes if _floats(n)}
    beyond = {name: peak for name, peak in sizes.items() if peak > _LARGEST}
    if not beyond:
        return candidate, ()
    told = f"float16 ends at 65504, and numbers there reach {max(beyond.values()):.3g}, so they stay in float32"
    remark = Remark(candidate.name, "range", "missed", tuple(beyond), told, "precision")
    return replace(candidate, keep=(*candidate.keep, *beyond)), (remark,)


def peaks(model: ir.Model, batches: Iterable[Inputs], values: Sequence[ir.Value]) -> dict[ir.Value, float]:
    """The largest finite magnitude of each value over all batches; 0 where it never has elements.

    They are found inside the graph, so that no more than one value is held at a time.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    observed = clone(model)
    twins = counterparts(model, observed)
    inputs = {value.name: value for value in observed.graph.inputs}
    outputs = []
    for index, value in enumerate(values):
        twin = twins.get(value) or inputs[value.name]
        flat = ir.node("Reshape", [twin, _constant(observed, f"peak_{index}_shape", np.array([-1]))])
        size = ir.node("Abs", [flat.outputs[0]])
        zero = _constant(observed, f"peak_{index}_zero", np.zeros(1, np.float32))
        joined = ir.node("Concat", [size.outputs[0], zero], {"axis": 0})  # of nothing, there is no largest
        peak = ir.node("ReduceMax", [joined.outputs[0]], {"keepdims": 0})
        for place, node in enumerate((flat, size, joined, peak)):
            node.name = node.outputs[0].name = f"peak_{index}_{place}"
            observed.graph.append(node)
        peak.outputs[0].type, peak.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        outputs.append(peak.outputs[0])
    observed.graph.outputs.extend(outputs)
    found = dict.fromkeys(values, 0.0)
    with Session(observed) as session:
        for batch in batches:
            results = session.run(batch)
            for value, output in zip(values, outputs, strict=True):
                number = float(results[output.name or ""])
                found[value] = max(found[value], number if np.isfinite(number) else 0.0)
    return found


def _floats(node: ir.Node) -> list[ir.Value]:
    """Float32 values that a node reads or gives, but for constants."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return [value for value in values if value.dtype is ir.DataType.FLOAT and constant_tensor(value) is None]


def _constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value
