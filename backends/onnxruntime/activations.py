"""Activations and norms in the spelling that ONNX Runtime's own fusions recognize, where the opset lacks the operator.

Each function is an identity by the definition of the operator; what it is fused to was read off the optimized model
that ONNX Runtime 1.31 writes (docs/onnxruntime-notes.md).
"""

from __future__ import annotations

import math

import onnx_ir as ir

from xform.backends.onnxruntime.emit import Emitter, Site
from xform.graph.norms import computing_type
from xform.graph.values import attribute, is_op, rank_of, shape_of


def lower_swish(emitter: Emitter, node: ir.Node) -> bool:
    """Swish(x; alpha) = x * Sigmoid(alpha x). ONNX Runtime has no kernel for Swish; this becomes QuickGelu."""
    site = emitter.at(node)
    x = node.inputs[0]
    if x is None or x.dtype is None:
        return False
    alpha = float(attribute(node, "alpha", 1.0))
    scaled = x if alpha == 1.0 else site.op("Mul", x, emitter.constant(alpha, x.dtype, "alpha"))
    site.replace([(node.outputs[0], site.op("Mul", x, site.op("Sigmoid", scaled)))], "swish: Mul, Sigmoid")
    return True


def lower_gelu(emitter: Emitter, node: ir.Node) -> bool:
    """Gelu(x) = (x * (1 + erf(x / sqrt 2))) * 0.5, or its tanh form, for opsets below 20."""
    site = emitter.at(node)
    x = node.inputs[0]
    if x is None or x.dtype is None:
        return False

    def constant(number: float) -> ir.Value:
        assert x is not None and x.dtype is not None
        return emitter.constant(number, x.dtype, "gelu")

    if attribute(node, "approximate", "none") == "tanh":
        # ONNX Runtime fuses the power to its FastGelu, which takes no scalar, and the product not (1.31.1)
        cube = site.op("Mul", site.op("Mul", x, x), x) if not rank_of(x) else site.op("Pow", x, constant(3.0))
        cubed = site.op("Mul", cube, constant(0.044715))
        inner = site.op("Mul", site.op("Add", x, cubed), constant(math.sqrt(2 / math.pi)))
        gate = site.op("Add", site.op("Tanh", inner), constant(1.0))
        result = site.op("Mul", site.op("Mul", x, constant(0.5)), gate)
        form = "gelu: tanh written out"
    else:
        gate = site.op("Add", site.op("Erf", site.op("Div", x, constant(math.sqrt(2)))), constant(1.0))
        result = site.op("Mul", site.op("Mul", x, gate), constant(0.5))
        form = "gelu: erf written out"
    site.replace([(node.outputs[0], result)], form)
    return True


def lower_rms_normalization(emitter: Emitter, node: ir.Node) -> bool:
    """RMSNormalization(x) = x / sqrt(mean(x^2) + epsilon) * scale, for opsets below 23.

    Computed in `stash_type`, as the operator says; ONNX Runtime fuses it to its SimplifiedLayerNormalization. It must
    not in float64, where it would take another epsilon than the graph's, nor behind mean - x, where it would take the
    whole for a LayerNormalization, with the wrong sign (1.31.1): the square is a product there, which it does not fuse.
    """
    site = emitter.at(node)
    x, scale = node.inputs[:2]
    rank = rank_of(x)
    if x is None or scale is None or x.dtype is None or rank is None:
        return False
    stash = computing_type(node, x.dtype)
    axis = int(attribute(node, "axis", -1))
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis - rank, 0))
    inner = x if x.dtype is stash else site.op("Cast", x, to=stash)
    if stash is ir.DataType.DOUBLE or _is_mean_minus(x):
        squared = site.op("Mul", inner, inner)
    else:
        squared = site.op("Pow", inner, emitter.constant(2.0, stash, "two"))
    mean = _reduce_mean(site, squared, axes)
    root = site.op("Sqrt", site.op("Add", mean, emitter.constant(attribute(node, "epsilon", 1e-5), stash, "epsilon")))
    normed = site.op("Div", inner, root)
    normed = normed if x.dtype is stash else site.op("Cast", normed, to=x.dtype)
    site.replace([(node.outputs[0], site.op("Mul", normed, scale))], "rms_norm: written out")
    return True


def _is_mean_minus(value: ir.Value) -> bool:
    """Whether a value is mean(y) - y."""
    node = value.producer()
    mean = node.inputs[0].producer() if node is not None and is_op(node, "Sub") and node.inputs[0] is not None else None
    return mean is not None and is_op(mean, "ReduceMean") and mean.inputs[0] is node.inputs[1]  # type: ignore[union-attr]


def lower_layer_normalization(emitter: Emitter, node: ir.Node) -> bool:
    """LayerNormalization written out, for opsets below 17; ONNX Runtime fuses it again.

    d = x - mean(x);  y = d / sqrt(mean(d^2) + epsilon) * scale + bias, in `stash_type` up to the division.
    """
    site = emitter.at(node)
    x, scale, bias = (*node.inputs, None)[:3]
    rank = rank_of(x)
    if x is None or scale is None or x.dtype is None or rank is None:
        return False
    stash = computing_type(node, x.dtype)
    axis = int(attribute(node, "axis", -1))
    axes = list(range(axis, 0)) if axis < 0 else list(range(axis - rank, 0))
    inner = x if x.dtype is stash else site.op("Cast", x, to=stash)
    mean = _reduce_mean(site, inner, axes)
    centred = site.op("Sub", inner, mean)
    if stash is ir.DataType.DOUBLE:
        squared = site.op("Mul", centred, centred)
    else:
        squared = site.op("Pow", centred, emitter.constant(2.0, stash, "two"))
    variance = _reduce_mean(site, squared, axes)
    epsilon = emitter.constant(attribute(node, "epsilon", 1e-5), stash, "epsilon")
    deviation = site.op("Sqrt", site.op("Add", variance, epsilon))
    normed = site.op("Div", centred, deviation)
    normed = normed if x.dtype is stash else site.op("Cast", normed, to=x.dtype)
    result = site.op("Mul", normed, scale)
    result = result if bias is None else site.op("Add", result, bias)
    outputs = [result, mean]
    if len(node.outputs) > 2:
        outputs.append(site.op("Reciprocal", deviation))
    read = [(old, new) for old, new in zip(node.outputs, outputs, strict=False) if old.uses() or old.is_graph_output()]
    site.replace(read, "layer_norm: written out")
    return True


def _reduce_mean(site: Site, value: ir.Value, axes: list[int]) -> ir.Value:
    result: ir.Value = site.op("ReduceMean", value, site.emitter.ints(*axes), keepdims=1)
    return result


def lower_rotary(emitter: Emitter, node: ir.Node) -> bool:
    """RotaryEmbedding of X [B, H, S, D] written out, for opsets below 23.

    Half-split: (x1, x2) are the halves of the rotated part; interleaved: its even and odd elements.
    y1 = cos x1 - sin x2, y2 = sin x1 + cos x2. What lies beyond `rotary_embedding_dim` passes unchanged.
    """
    site = emitter.at(node)
    x, cos, sin, positions = (*node.inputs, None)[:4]
    shape = shape_of(x)
    if x is None or cos is None or sin is None or shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return False
    size = int(attribute(node, "rotary_embedding_dim", 0)) or shape[3]
    interleaved = bool(attribute(node, "interleaved", 0))
    if positions is not None:
        cos, sin = site.op("Gather", cos, positions), site.op("Gather", sin, positions)
    cos, sin = (site.op("Unsqueeze", v, emitter.ints(1)) for v in (cos, sin))  # [B, 1, S, size/2]
    rest = None
    if size < shape[3]:
        x, rest = site.op("Split", x, emitter.ints(size, shape[3] - size), axis=-1, outputs=2)
    first, second = _halves(site, x, size, interleaved)
    real = site.op("Sub", site.op("Mul", first, cos), site.op("Mul", second, sin))
    imaginary = site.op("Add", site.op("Mul", first, sin), site.op("Mul", second, cos))
    if interleaved:
        pairs = site.op("Concat", *(site.op("Unsqueeze", v, emitter.ints(-1)) for v in (real, imaginary)), axis=-1)
        result = site.op("Reshape", pairs, emitter.ints(0, 0, 0, size))
    else:
        result = site.op("Concat", real, imaginary, axis=-1)
    result = result if rest is None else site.op("Concat", result, rest, axis=-1)
    site.replace([(node.outputs[0], result)], "rotary: written out")
    return True


def _halves(site: Site, x: ir.Value, size: int, interleaved: bool) -> tuple[ir.Value, ir.Value]:
    emitter = site.emitter
    if not interleaved:
        first, second = site.op("Split", x, emitter.ints(size // 2, size // 2), axis=-1, outputs=2)
        return first, second
    pairs = site.op("Reshape", x, emitter.ints(0, 0, 0, size // 2, 2))
    first, second = site.op("Split", pairs, emitter.ints(1, 1), axis=-1, outputs=2)
    return site.op("Squeeze", first, emitter.ints(-1)), site.op("Squeeze", second, emitter.ints(-1))
