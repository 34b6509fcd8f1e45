"""A border that is padded with the bias of the convolution before it, written so that the two can merge.

Diverse Branch Block pads the result of a 1x1 convolution with the value that the convolution has where its input is
zero, its bias b (after BatchNormalization): only then is K2 * pad(K1 * x + b) one convolution (Ding et al. 2021,
transform III). Exporters write such padding as a Pad with zeros whose border slices are overwritten by ScatterND. With
L the convolution without its bias,

    overwrite(Pad(L(x) + b), b) = Pad(L(x)) + b

where the right side is affine as it stands. What is overwritten is found by running the chain on markers, so any order
of slices and any width of padding is recognized. Exact if every border element, and no other, is overwritten with the
bias of its channel (compared to `_CLOSE`, since trainers compute it in their own precision).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array, attribute, attributes_of, constant, display_name, is_op, shape_of, used_once
from xform.passes.reparameterize import linear_map
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure, Rule

_CLOSE = 1e-4  # relative to the largest bias
_MAX_ELEMENTS = 1 << 25


class BiasPadding(Rule):
    """Pad, then ScatterND into the border, as Pad and an Add per channel."""

    name = "bias_padding"
    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "Pad")})

    def reach(self) -> int:
        return 6

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        chain = _chain(node)
        if not any(is_op(n, "ScatterND") for n in chain):
            return
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is None or not is_op(producer, "Conv") or not used_once(producer.outputs[0]):
            yield Failure("what is padded is not the result of a convolution that nothing else reads", (node,))
            return
        linear = linear_map.read(producer)
        border = _border(node, chain)
        if isinstance(linear, str) or isinstance(border, str):
            yield Failure(linear if isinstance(linear, str) else str(border), (node,))
            return
        bias = np.zeros(linear.output_channels()) if linear.bias is None else linear.bias
        if np.abs(border - bias).max() > _CLOSE * max(np.abs(bias).max(), np.finfo(np.float32).tiny):
            reason = f"the border is filled with other values than the bias of {display_name(producer)}"
            yield Failure(reason, (node, producer))
            return
        yield Match(
            nodes=dict(enumerate([producer, node, *chain])),
            roots=(chain[-1].outputs[0],),
            data={"linear": linear, "bias": bias},
        )

    def rewrite(self, match: Match, build: Builder) -> ir.Value | Failure:
        linear, pad = match.data["linear"], match.nodes[1]
        x = linear.node.inputs[0]
        if x is None:
            return QUIET
        plain = linear.build(build, x, linear.weight, None)
        attributes = attributes_of(pad)
        padded = build.op("Pad", plain, *pad.inputs[1:], **attributes)
        shift = match.data["bias"].reshape(-1, *[1] * (linear.weight.ndim - 2))
        return build.op("Add", padded, build.folded(shift, linear.dtype, "border", summand=True))


def _chain(pad: ir.Node) -> list[ir.Node]:
    """The Transposes and ScatterNDs that alone read the result of `pad`, up to the last ScatterND's layout."""
    nodes: list[ir.Node] = []
    value = pad.outputs[0]
    while used_once(value):
        use = next(iter(value.uses()))
        if use.idx != 0 or not is_op(use.node, "Transpose", "ScatterND"):
            break
        nodes.append(use.node)
        value = use.node.outputs[0]
    return nodes


def _border(pad: ir.Node, chain: list[ir.Node]) -> Array | str:
    """The value per channel that fills the border, float64, or why there is none."""
    shape, pads = shape_of(pad.outputs[0]), constant(pad.inputs[1])
    if shape is None or not all(isinstance(s, int) for s in shape) or pads is None or len(pads) != 2 * len(shape):
        return "the shape of what is padded is not static"
    sizes = [s for s in shape if isinstance(s, int)]
    if int(np.prod(sizes)) > _MAX_ELEMENTS:
        return "what is padded is too large to find its border"
    marks = np.zeros(sizes)
    inside = tuple(slice(int(b), s - int(e)) for b, e, s in zip(pads, pads[len(sizes) :], sizes, strict=False))
    marks[inside] = np.nan
    for node in chain:
        if is_op(node, "Transpose"):
            marks = marks.transpose(attribute(node, "perm") or None)
            continue
        indices, updates = constant(node.inputs[1]), constant(node.inputs[2])
        if indices is None or updates is None or attribute(node, "reduction", "none") != "none":
            return "what overwrites the border is not constant"
        marks = marks.copy()
        marks[tuple(np.moveaxis(indices, -1, 0))] = updates
    kept = np.isnan(marks)
    if list(marks.shape) != sizes or not kept[inside].all() or kept.sum() != kept[inside].size:
        return "something else than the border is overwritten"
    rows = np.moveaxis(marks, 1, 0).reshape(sizes[1], -1)
    values: Array = np.nanmax(rows, axis=1)
    spread = np.nanmax(rows, axis=1) - np.nanmin(rows, axis=1)
    if np.any(spread > _CLOSE * max(float(np.abs(values).max()), 1e-30)):
        return "the border is not filled with one value per channel"
    return values
