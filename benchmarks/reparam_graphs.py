"""What benchmarks/reparam.py reads off graphs: counts, remarks, errors, and a float32 twin of a float64 graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import constant_tensor, display_name, is_op, used_once
from xform.passes import PASSES
from xform.pipeline.presets import EXACT, resolve
from xform.rewrite.passes import PassContext
from xform.rewrite.remarks import Remark

Array = npt.NDArray[Any]

LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm")
REPARAMETERIZE = frozenset(
    name for name, kind in PASSES.items() if kind.__module__.startswith("xform.passes.reparameterize")
)
CANONICAL = tuple(name for name in EXACT if name not in REPARAMETERIZE)


def linear_ops(model: ir.Model) -> int:
    """Convolutions and matrix products with a constant weight."""
    return sum(is_op(n, *LINEAR) and any(constant_tensor(v) is not None for v in n.inputs[:2]) for n in model.graph)


def batch_norms(model: ir.Model) -> list[ir.Node]:
    """The BatchNormalization nodes."""
    return [node for node in model.graph if is_op(node, "BatchNormalization")]


def unfoldable(model: ir.Model, remarks: Iterable[Remark]) -> int:
    """BatchNormalizations left with a remark that names them.

    One right behind a convolution or product that nothing else reads can always be folded: whatever a remark says, it
    does not count.
    """
    told = {n for r in remarks if r.verdict == "missed" and r.concept == "batch_norm" for n in r.nodes}
    return sum(display_name(node) in told and not _behind_linear(node) for node in batch_norms(model))


def _behind_linear(node: ir.Node) -> bool:
    source = node.inputs[0]
    maker = source.producer() if source is not None else None
    if source is None or maker is None or not used_once(source) or not is_op(maker, *LINEAR):
        return False
    return constant_tensor(maker.inputs[1]) is not None


def rerun_changes(model: ir.Model) -> list[str]:
    """The reparameterization passes that still change an optimized graph."""
    again = clone(model)
    passes = resolve(passes=[name for name in EXACT if name in REPARAMETERIZE])
    return [one.name for one in passes if one.run(again, PassContext())]


def relative_error(actual: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest max|a - b| / max|b| over the outputs; infinite where shapes differ or numbers are not finite."""
    worst = 0.0
    if len(actual) != len(expected):
        return float("inf")
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
            return float("inf")
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)
        worst = max(worst, float(difference / max(np.abs(b).max(initial=0.0), 1e-30)))
    return worst


def to_float32(model: ir.Model) -> ir.Model:
    """The float64 graph with every double number rounded to float32: the graph of the float32 module.

    A float32 module that was turned to double by `.double()` gets its own parameters back, bit for bit.
    """
    narrow = clone(model)
    for graph in narrow.graphs():
        for value in [*graph.inputs, *graph.initializers.values()]:
            _narrow_value(value)
        for node in graph:
            for output in node.outputs:
                _narrow_value(output)
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.INT and attribute.value == ir.DataType.DOUBLE and name == "to":
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
                elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.DOUBLE:
                    array = attribute.value.numpy().astype(np.float32)
                    node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
    return narrow


def _narrow_value(value: ir.Value) -> None:
    if value.dtype == ir.DataType.DOUBLE:
        value.dtype = ir.DataType.FLOAT
    tensor = value.const_value
    if tensor is not None and tensor.dtype == ir.DataType.DOUBLE:
        value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
        value.dtype = ir.DataType.FLOAT
