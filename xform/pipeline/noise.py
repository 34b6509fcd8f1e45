"""How much rounding alone moves a model's outputs: the noise that no rewrite can be blamed for.

Near a cancellation the last bit of an intermediate value can move an output by more than any tolerance, and some
outputs are discontinuous (ArgMax, TopK, a threshold). To tell that from a wrong rewrite, the captured model is run
again with every weight nudged by a few units of roundoff, seeded, and every input too where an operator reads it that
rounds: a rewrite cannot move an input, so what is exact (a comparison, a move, a Round) reads it as it is.

A value beyond its tolerance is excused if nudging moves that very value, or one within four values of it, by at least
an eighth as much. An output that nudging moves beyond the tolerance of the whole output is discontinuous; then sizes
and numbers of such elements count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import Array
from xform.pipeline.neighbourhood import largest_nearby
from xform.pipeline.reference import run_anywhere
from xform.pipeline.tolerance import Difference

NOISE_FACTOR = 8.0
_NUDGE = 4.0  # units of roundoff
_SETTINGS = 16  # fewer numbers than this may be settings: scales of a Resize, an exponent, limits
_SEEDS = 1 << 24  # seeds of ONNX are float32, which tells whole numbers below it apart
_MAX_NUDGED_BYTES = 1 << 28  # of weights, which are copied for it; the first ones of the graph

# unit roundoff; other dtypes are left alone
_EPSILON = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.FLOAT: 2.0**-24, ir.DataType.DOUBLE: 2.0**-53}
_CONTROL = frozenset({"If", "Loop", "Scan"})
_EXACT = frozenset(
    {
        "Abs", "ArgMax", "ArgMin", "Ceil", "Clip", "Compress", "Concat", "DepthToSpace", "Equal", "Expand", "Flatten",
        "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN",
        "Less", "LessOrEqual", "Max", "MaxPool", "Min", "Neg", "NonZero", "Pad", "ReduceMax", "ReduceMin", "Relu",
        "Reshape", "Round", "Shape", "Sign", "Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK",
        "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip


def nudged_outputs(model: ir.Model, inputs: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Outputs of `model` on one set of inputs, all nudged.

    Raises:
        CouldNotRunError: The model does not run on nudged inputs.
    """
    rng = np.random.default_rng([seed, 0x6E6F6973])
    return run_anywhere(_nudged_model(rng, model, seed), [inputs])[0]


def excuses(found: Difference, movement: Array | None) -> bool:
    """Whether every value of `found` beyond its tolerance is one that nudging moves about as much.

    Args:
        movement: How far nudging moved each value, the largest of all rounds; None where it cannot be said.
    """
    if found.beyond is None or movement is None or movement.shape != found.beyond.shape:
        return False
    return bool(np.all(found.beyond <= NOISE_FACTOR * largest_nearby(movement)))


def movement(still: Any, nudged: Any) -> Array | None:
    """How far nudging moved each value of an output; None for what is no float array of one shape."""
    if not (isinstance(still, np.ndarray) and isinstance(nudged, np.ndarray)) or still.shape != nudged.shape:
        return None
    if still.dtype.kind not in "fcV":
        return None
    wide = np.complex128 if still.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):
        moved = np.abs(nudged.astype(wide) - still.astype(wide))
    return np.where(np.isfinite(moved), moved, 0.0)


def is_within(found: Difference, noise: Difference) -> bool:
    """Whether a disagreement is explained by a discontinuity: the noise breaks the tolerance too, in size and count."""
    if noise.agrees:
        return False
    return found.max_rel <= NOISE_FACTOR * noise.max_rel and found.outside <= NOISE_FACTOR * noise.outside


def _nudged_model(rng: np.random.Generator, model: ir.Model, seed: int) -> ir.Model:
    """A copy whose float weights are nudged; the smallest ones may be settings and stay."""
    copy = clone(model)
    _nudge_readers(copy, seed)
    room = _MAX_NUDGED_BYTES
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.size < _SETTINGS or tensor.dtype not in _EPSILON:
                continue
            room -= tensor.nbytes
            if room < 0:
                return copy
            value.const_value = ir.Tensor(_nudged(rng, tensor.numpy()), dtype=tensor.dtype, name=value.name)
    return copy


def _nudged(rng: np.random.Generator, value: Array) -> Array:
    size = _NUDGE * _EPSILON[ir.DataType.from_numpy(value.dtype)]
    wide: type[np.floating[Any]] = np.float64 if value.dtype.itemsize == 8 else np.float32
    factor = 1 + size * (2 * np.asarray(rng.random(value.shape, wide)) - 1)
    return np.asarray(value.astype(wide) * factor.astype(wide)).astype(value.dtype)


def _nudge_readers(model: ir.Model, seed: int) -> None:
    """Put a nudge between each input, or what exact operators make of it, and every operator that rounds."""
    queue = [value for value in model.graph.inputs if value.dtype in _EPSILON]
    seen = set(queue)
    count = 0
    while queue:
        value = queue.pop()
        for node, position in list(value.uses()):
            if node.op_type in _EXACT:
                fresh = [output for output in node.outputs if output not in seen and output.dtype in _EPSILON]
                seen.update(fresh)
                queue.extend(fresh)
            elif node.op_type not in _CONTROL:
                count += 1
                node.replace_input_with(position, _nudge_before(node, value, count, (seed * 1009 + count) % _SEEDS))


def _nudge_before(node: ir.Node, value: ir.Value, count: int, seed: int) -> ir.Value:
    """`value + value * size * random`, computed just before a node."""
    dtype = value.dtype
    assert dtype is not None and node.graph is not None
    like = {"dtype": int(ir.DataType.FLOAT), "low": -1.0, "high": 1.0, "seed": float(seed)}
    size = np.asarray(_NUDGE * _EPSILON[dtype], dtype.numpy())
    nodes = [ir.node("RandomUniformLike", [value], like), ir.node("Constant", [], {"value": ir.tensor(size)})]
    nodes.append(ir.node("Cast", [nodes[0].outputs[0]], {"to": int(dtype)}))
    nodes.append(ir.node("Mul", [nodes[2].outputs[0], nodes[1].outputs[0]]))
    nodes.append(ir.node("Mul", [value, nodes[3].outputs[0]]))
    nodes.append(ir.node("Add", [value, nodes[4].outputs[0]]))
    for index, one in enumerate(nodes):
        one.outputs[0].name = one.name = f"xform_nudge_{count}_{index}"
    node.graph.insert_before(node, nodes)
    return nodes[-1].outputs[0]
