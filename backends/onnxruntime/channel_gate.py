"""Squeeze and excitation without leaving ONNX Runtime's blocked layout.

    y = x * g,   g [N, C, 1, 1] = gate(mean over space of x)

ONNX Runtime keeps convolutions and what lies between them in blocks of channels, and reorders at every operator that it
has no blocked form of. It has one for GlobalAveragePool and none for ReduceMean, and it multiplies blocked tensors of
equal shapes only. So the mean becomes GlobalAveragePool, and the gate is enlarged to the size of `x` by a Resize, which
has a blocked form: writing C H W numbers costs less than four reorders (docs/onnxruntime-notes.md). Sums with a
residual then stay in the convolution before them too.
"""

from __future__ import annotations

import onnx_ir as ir

from xform.backends.onnxruntime.emit import Emitter
from xform.graph.values import attribute, constant, is_op, same_dim, shape_of

RESIZE_SINCE = 13  # with the scales as third input, and as cheap to write at every later opset
_BLOCKED = ("Relu", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "LeakyRelu", "Clip")
_DEPTH = 4  # activations between a value and the convolution that it comes from


def lower_spatial_mean(emitter: Emitter, node: ir.Node) -> bool:
    """`ReduceMean(x [N, C, H, W], [2, 3])` that keeps its axes, of a convolution, to GlobalAveragePool."""
    x, axes = node.inputs[0], constant(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = shape_of(x)
    if x is None or shape is None or len(shape) != 4 or axes is None or not attribute(node, "keepdims", 1):
        return False
    if sorted(int(a) % 4 for a in axes.reshape(-1)) != [2, 3] or not _is_blocked(x):
        return False
    site = emitter.at(node)
    site.replace([(node.outputs[0], site.op("GlobalAveragePool", x))], "spatial mean: GlobalAveragePool")
    return True


def lower_channel_gate(emitter: Emitter, node: ir.Node) -> bool:
    """`Mul(x, g)` with both made by convolutions and read by one to `Mul(x, Resize(g))`; `node` is the Mul."""
    output = node.outputs[0]
    for x, gate in (node.inputs, tuple(reversed(node.inputs))):
        if x is None or gate is None or not _gates(x, gate) or not _is_blocked(x) or not _is_blocked(gate):
            continue
        if not any(is_op(user, "Conv") for user, _ in output.uses()):
            return False
        shape = shape_of(x)
        assert shape is not None
        site = emitter.at(node)
        scales = emitter.constant((1.0, 1.0, *shape[2:]), ir.DataType.FLOAT, "scales")
        enlarged = site.op(
            *("Resize", gate, None, scales),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        enlarged.type, enlarged.shape = x.type, x.shape
        site.replace([(output, site.op("Mul", x, enlarged))], "channel gate: Resize")
        return True
    return False


def _gates(x: ir.Value, gate: ir.Value) -> bool:
    """Whether the shapes are [N, C, H, W] with known H and W, more than one place, and [N, C, 1, 1], in float32."""
    wide, narrow = shape_of(x), shape_of(gate)
    if wide is None or narrow is None or len(wide) != 4 or len(narrow) != 4 or x.dtype is not ir.DataType.FLOAT:
        return False
    places = [size for size in wide[2:] if isinstance(size, int)]
    known = len(places) == 2 and max(places) > 1
    return known and narrow[2:] == (1, 1) and all(same_dim(a, b) for a, b in zip(wide[:2], narrow[:2], strict=True))


def _is_blocked(value: ir.Value) -> bool:
    """Whether ONNX Runtime holds `value` in blocks: a convolution made it, activations in between."""
    node = value.producer()
    for _ in range(_DEPTH):
        if node is None or is_op(node, "Conv"):
            break
        inner = node.inputs[0] if is_op(node, *_BLOCKED) else None
        node = inner.producer() if inner is not None else None
    return node is not None and is_op(node, "Conv")
