"""Shapes that are written down and do not fit each other, where only a run would tell.

ONNX's inference looks at most operators' shapes; what it lets pass, and every runtime then fails at, is found here. A
dim that is not a number fits everything.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import onnx_ir as ir

from xform.errors import ModelError
from xform.graph.upgrade_inputs import EQUAL_SPLIT
from xform.graph.values import ONNX_DOMAINS, Dim, attribute, constant, display_name, scalar, shape_of

Problem = str | None
_Shape = tuple[Dim, ...] | None


def check_shapes(model: ir.Model) -> None:
    """Refuse a node whose inputs can never fit it.

    Args:
        model: After shape inference.

    Raises:
        ModelError: Names the node, and the shapes.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        rule = _RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
        problem = None if rule is None else rule(node)
        if problem is not None:
            raise ModelError(
                f"a node does not fit its operator: {problem}", where=f"{display_name(node)} ({node.op_type})"
            )


def _shape(node: ir.Node, index: int) -> _Shape:
    return shape_of(node.inputs[index]) if index < len(node.inputs) else None


def _differ(a: Dim, b: Dim) -> bool:
    """Whether two dims can never be equal."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _divides(divisor: int, dim: Dim) -> bool:
    return not isinstance(dim, int) or (divisor > 0 and dim % divisor == 0)


def _transpose(node: ir.Node) -> Problem:
    shape, perm = _shape(node, 0), attribute(node, "perm")
    if shape is not None and perm is not None and len(perm) != len(shape):
        return f"'perm' has {len(perm)} axes, its input {len(shape)}"
    return None


def _conv(node: ir.Node) -> Problem:
    """Input [N, C, ...], weight [M, C / group, kernel...]."""
    x, w, group = _shape(node, 0), _shape(node, 1), attribute(node, "group", 1)
    if x is None or w is None:
        return None
    if len(x) != len(w) or len(x) < 3:
        return f"its input has {len(x)} axes, its weight {len(w)}"
    if isinstance(w[1], int) and _differ(x[1], w[1] * group):
        return f"its input has {x[1]} channels, its weight takes {w[1]} in each of {group} groups"
    if not _divides(group, w[0]):
        return f"{w[0]} output channels do not divide into {group} groups"
    return _kernel(node, w)


def _conv_transpose(node: ir.Node) -> Problem:
    """Input [N, C, ...], weight [C, M / group, kernel...]."""
    x, w, group = _shape(node, 0), _shape(node, 1), attribute(node, "group", 1)
    if x is None or w is None:
        return None
    if len(x) != len(w) or len(x) < 3:
        return f"its input has {len(x)} axes, its weight {len(w)}"
    if _differ(x[1], w[0]):
        return f"its input has {x[1]} channels, its weight takes {w[0]}"
    return _kernel(node, w) if _divides(group, w[0]) else f"{w[0]} channels do not divide into {group} groups"


def _kernel(node: ir.Node, weight: tuple[Dim, ...]) -> Problem:
    kernel = attribute(node, "kernel_shape")
    if kernel is None:
        return None
    if len(kernel) != len(weight) - 2 or any(_differ(k, w) for k, w in zip(kernel, weight[2:], strict=True)):
        return f"'kernel_shape' is {list(kernel)}, its weight has {list(weight[2:])}"
    return None


def _depth_to_space(node: ir.Node) -> Problem:
    shape, size = _shape(node, 0), attribute(node, "blocksize", 1)
    if shape is None or len(shape) != 4 or _divides(size * size, shape[1]):
        return None
    return f"{shape[1]} channels do not divide into blocks of {size} by {size}"


def _space_to_depth(node: ir.Node) -> Problem:
    shape, size = _shape(node, 0), attribute(node, "blocksize", 1)
    if shape is None or len(shape) != 4 or (_divides(size, shape[2]) and _divides(size, shape[3])):
        return None
    return f"{shape[2]} by {shape[3]} does not divide into blocks of {size}"


def _channel_norm(node: ir.Node) -> Problem:
    """Batch, instance and group normalization: one parameter for each channel."""
    shape = _shape(node, 0)
    if shape is None or len(shape) < 2:
        return None
    for value in node.inputs[1:]:
        found = shape_of(value)
        if found is not None and (len(found) != 1 or _differ(found[0], shape[1])):
            return f"its input has {shape[1]} channels, its parameter '{value.name if value else ''}' {list(found)}"
    if not _divides(attribute(node, "num_groups", 1), shape[1]):
        return f"{shape[1]} channels do not divide into {attribute(node, 'num_groups')} groups"
    return None


def _layer_norm(node: ir.Node) -> Problem:
    """Scale and bias must broadcast to the input's shape, from `axis` on."""
    shape, axis = _shape(node, 0), attribute(node, "axis", -1)
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    for value in node.inputs[1:]:
        found = shape_of(value)
        if found is None:
            continue
        if len(found) > len(shape) or any(
            d != 1 and _differ(d, s) for d, s in zip(found[::-1], shape[::-1], strict=False)
        ):
            return f"its input is {list(shape)}, its parameter '{value.name if value else ''}' {list(found)}"
    return None


def _reshape(node: ir.Node) -> Problem:
    shape, target = _shape(node, 0), constant(node.inputs[1], max_elements=64)
    if shape is None or target is None or not all(isinstance(dim, int) for dim in shape):
        return None
    zero = not attribute(node, "allowzero", 0)
    wanted = [int(size) for size in target.reshape(-1)]
    filled = [shape[i] if s == 0 and zero and i < len(shape) else s for i, s in enumerate(wanted)]
    have, rest = prod(d for d in shape if isinstance(d, int)), prod(d for d in filled if isinstance(d, int) and d != -1)
    fits = (rest > 0 and have % rest == 0) or (have == 0 and rest == 0) if -1 in filled else have == rest
    return None if fits else f"{list(shape)} cannot be reshaped to {wanted}"


def _split(node: ir.Node) -> Problem:
    shape, axis, parts = _shape(node, 0), attribute(node, "axis", 0), len(node.outputs)
    if EQUAL_SPLIT not in node.meta or shape is None or not -len(shape) <= axis < len(shape):
        return None
    return None if _divides(parts, shape[axis]) else f"{shape[axis]} does not divide into {parts} equal parts"


def _recurrent(gates: int) -> Callable[[ir.Node], Problem]:
    """W [directions, gates * hidden, inputs], R [directions, gates * hidden, hidden]."""

    def rule(node: ir.Node) -> Problem:
        w, r, hidden = _shape(node, 1), _shape(node, 2), attribute(node, "hidden_size")
        for found, name in ((w, "W"), (r, "R")):
            if found is not None and hidden is not None and (len(found) != 3 or _differ(found[1], gates * hidden)):
                return f"'hidden_size' is {hidden}, its weight {name} {list(found)}"
        return None

    return rule


def _axis_input(node: ir.Node) -> Problem:
    shape, axis = _shape(node, 0), scalar(node.inputs[1])
    if shape is None or axis is None or -len(shape) <= axis < max(len(shape), 1):
        return None
    return f"its axis is {axis}, its input has {len(shape)} axes"


def _gather(node: ir.Node) -> Problem:
    shape, axis, indices = _shape(node, 0), attribute(node, "axis", 0), constant(node.inputs[1], max_elements=4096)
    if shape is None or indices is None or not indices.size or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    if not isinstance(size, int) or (-size <= indices.min() and indices.max() < size):
        return None
    return f"it takes indices from {indices.min()} to {indices.max()} of {size}"


def _one_hot(node: ir.Node) -> Problem:
    depth = scalar(node.inputs[1])
    return f"its depth is {depth}" if depth is not None and depth <= 0 else None


_RULES: dict[str, Callable[[ir.Node], Problem]] = {
    "Transpose": _transpose,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "BatchNormalization": _channel_norm,
    "InstanceNormalization": _channel_norm,
    "GroupNormalization": _channel_norm,
    "LayerNormalization": _layer_norm,
    "Reshape": _reshape,
    "Split": _split,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "CumSum": _axis_input,
    "Gather": _gather,
    "OneHot": _one_hot,
}
