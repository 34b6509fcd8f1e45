"""The values of shape arithmetic, symbolically: what `Shape -> Gather -> Concat -> Reshape` chains compute.

ONNX's data propagation stops at products of symbols and at `-1`; here values are polynomials over dim names
(`xform.graph.dims`), so `Reshape([batch, seq, 768], [batch, -1, 12, 64])` is seen to give `[batch, seq, 12, 64]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from xform.graph import dims
from xform.graph.dims import Expr
from xform.graph.values import ONNX_DOMAINS, attribute, constant, constant_tensor, rank_of, shape_of

ELEMENTS_LIMIT = 64  # shape vectors are short; longer integer constants are data
Elements = list[Expr | None]
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)


@dataclass
class ShapeData:
    """What is known of the elements of integer values of rank 0 and 1.

    Attributes:
        known: Elements per value; None where one is unknown. Booleans count as 0 and 1.
        spelling: How an expression is written as a dim name: as the model first wrote it.
    """

    known: dict[ir.Value, Elements | None] = field(default_factory=dict)
    spelling: dict[Expr, str] = field(default_factory=dict)
    _parsed: dict[str, Expr] = field(default_factory=dict)

    def dims(self, value: ir.Value | None) -> Elements | None:
        """The dims of `value` as expressions, or None if its rank is unknown."""
        shape = shape_of(value)
        return None if shape is None else [self.parse(d) if isinstance(d, str) else d for d in shape]

    def parse(self, name: str) -> Expr:
        """The expression of a dim name."""
        expr = self._parsed.get(name)
        if expr is None:
            expr = self._parsed[name] = dims.parse(name)
            self.spelling.setdefault(expr, name)
        return expr

    def spell(self, expr: Expr | None) -> int | str | None:
        """The dim that an expression is."""
        if expr is None or isinstance(expr, int):
            return expr
        return self.spelling.get(expr) or str(expr)

    def elements(self, value: ir.Value | None) -> Elements | None:
        """The elements of `value`, or None."""
        if value is None:
            return None
        if value in self.known:
            return self.known[value]
        tensor = constant_tensor(value)
        if tensor is None or tensor.size > ELEMENTS_LIMIT or len(tensor.shape) > 1 or tensor.dtype not in _INTEGERS:
            return None
        return self.known.setdefault(value, [int(x) for x in tensor.numpy().reshape(-1)])

    def visit(self, node: ir.Node) -> None:
        """Compute the elements of the node's output, if the operator does shape arithmetic."""
        if node.domain in ONNX_DOMAINS and (rule := _ELEMENTS.get(node.op_type)) is not None:
            found = rule(node, self)
            if found is not None and len(found) <= ELEMENTS_LIMIT:
                self.known[node.outputs[0]] = found

    def output_dims(self, node: ir.Node) -> Elements | None:
        """The dims of the node's first output where its shape depends on values or on sums and products of dims."""
        if node.domain not in ONNX_DOMAINS or (rule := _DIMS.get(node.op_type)) is None:
            return None
        return rule(node, self)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _ints(value: ir.Value | None) -> list[int] | None:
    """A constant vector (or scalar) of integers."""
    array = constant(value, max_elements=ELEMENTS_LIMIT)
    return None if array is None else [int(x) for x in array.reshape(-1)]


# Elements of the output


def _shape(node: ir.Node, data: ShapeData) -> Elements | None:
    found = data.dims(node.inputs[0])
    if found is None:
        return None
    return found[slice(attribute(node, "start", 0), attribute(node, "end", None))]


def _size(node: ir.Node, data: ShapeData) -> Elements | None:
    return _product(data.dims(node.inputs[0]))


def _product(values: Elements | None) -> Elements | None:
    if values is None or any(v is None for v in values):
        return None
    return [dims.product([v for v in values if v is not None])]


def _gather(node: ir.Node, data: ShapeData) -> Elements | None:
    source, index = data.elements(node.inputs[0]), data.elements(node.inputs[1])
    if source is None or index is None or rank_of(node.inputs[0]) != 1:
        return None
    if any(not isinstance(i, int) or not -len(source) <= i < len(source) for i in index):
        return None
    return [source[i] for i in index if isinstance(i, int)]


def _slice(node: ir.Node, data: ShapeData) -> Elements | None:
    source = data.elements(node.inputs[0])
    starts, ends = (data.elements(_input(node, i)) for i in (1, 2))
    steps = [1] if _input(node, 4) is None else _ints(node.inputs[4])
    if source is None or not starts or not ends or not steps or rank_of(node.inputs[0]) != 1:
        return None
    start, end, step = starts[0], ends[0], steps[0]
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    if step < 0 and end < -len(source):
        return source[start::step]
    return source[start:end:step]


def _concat(node: ir.Node, data: ShapeData) -> Elements | None:
    parts = [data.elements(v) for v in node.inputs]
    if all(p is None for p in parts):
        return None
    joined: Elements = []
    for value, part in zip(node.inputs, parts, strict=True):
        if part is None:
            length = shape_of(value)
            if length is None or len(length) != 1 or not isinstance(length[0], int) or length[0] > ELEMENTS_LIMIT:
                return None
            part = [None] * length[0]
        joined += part
    return joined


def _same(node: ir.Node, data: ShapeData) -> Elements | None:
    """Squeeze, Unsqueeze, Reshape, Flatten: the same elements, as long as the rank stays at most 1."""
    rank = rank_of(node.outputs[0])
    return data.elements(node.inputs[0]) if rank is not None and rank <= 1 else None


def _cast(node: ir.Node, data: ShapeData) -> Elements | None:
    source = data.elements(node.inputs[0])
    to = attribute(node, "to")
    if source is None or to not in (ir.DataType.INT32, ir.DataType.INT64):
        return None
    return source


def _binary(operation: Callable[[Expr, Expr], Expr | None]) -> Callable[[ir.Node, ShapeData], Elements | None]:
    def rule(node: ir.Node, data: ShapeData) -> Elements | None:
        a, b = data.elements(node.inputs[0]), data.elements(node.inputs[1])
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        size = max(len(a), len(b)) if a and b else 0
        a, b = (v * size if len(v) == 1 else v for v in (a, b))
        return [None if x is None or y is None else operation(x, y) for x, y in zip(a, b, strict=True)]

    return rule


def _divide(a: Expr, b: Expr) -> Expr | None:
    if isinstance(a, int) and isinstance(b, int) and b != 0:
        quotient = abs(a) // abs(b)  # ONNX truncates toward zero
        return quotient if (a < 0) == (b < 0) else -quotient
    return dims.exact_div(a, b)


def _modulo(a: Expr, b: Expr) -> Expr | None:
    if isinstance(a, int) and isinstance(b, int):
        return a % b if b > 0 and a >= 0 else None
    return 0 if dims.exact_div(a, b) is not None else None


def _equal(a: Expr, b: Expr) -> Expr | None:
    """1 or 0 where it is certain; a dim is never negative."""
    if a == b:
        return 1
    difference = dims.sub(a, b)
    if isinstance(difference, int):
        return 0
    for value, other in ((a, b), (b, a)):
        if isinstance(other, int) and other < 0 and dims.is_positive(value):
            return 0
    return None


def _maximum(a: Expr, b: Expr) -> Expr | None:
    difference = dims.sub(a, b)
    return (a if difference >= 0 else b) if isinstance(difference, int) else None


def _minimum(a: Expr, b: Expr) -> Expr | None:
    difference = dims.sub(a, b)
    return (b if difference >= 0 else a) if isinstance(difference, int) else None


def _negate(node: ir.Node, data: ShapeData) -> Elements | None:
    source = data.elements(node.inputs[0])
    return None if source is None else [None if v is None else dims.mul(-1, v) for v in source]


def _absolute(node: ir.Node, data: ShapeData) -> Elements | None:
    source = data.elements(node.inputs[0])
    if source is None:
        return None
    return [abs(v) if isinstance(v, int) else v if v is not None and dims.is_positive(v) else None for v in source]


def _reduce_product(node: ir.Node, data: ShapeData) -> Elements | None:
    return _product(data.elements(node.inputs[0])) if rank_of(node.inputs[0]) == 1 else None


def _where(node: ir.Node, data: ShapeData) -> Elements | None:
    condition, a, b = (data.elements(v) for v in node.inputs)
    if condition is None or a is None or b is None:
        return None
    size = max(len(condition), len(a), len(b))
    if any(len(v) not in (1, size) for v in (condition, a, b)):
        return None
    condition, a, b = (v * size if len(v) == 1 else v for v in (condition, a, b))
    return [x if c == 1 else y if c == 0 else None for c, x, y in zip(condition, a, b, strict=True)]


def _constant_of_shape(node: ir.Node, data: ShapeData) -> Elements | None:
    length = data.elements(node.inputs[0])
    fill = attribute(node, "value")
    if length is None or len(length) != 1 or not isinstance(length[0], int) or length[0] > ELEMENTS_LIMIT:
        return None
    if fill is None or fill.dtype not in _INTEGERS:
        return None
    return [int(fill.numpy().reshape(-1)[0])] * length[0]


def _range(node: ir.Node, data: ShapeData) -> Elements | None:
    bounds = [data.elements(v) for v in node.inputs]
    if any(b is None or len(b) != 1 or not isinstance(b[0], int) for b in bounds):
        return None
    start, limit, delta = (b[0] for b in bounds if b is not None)
    if not isinstance(start, int) or not isinstance(limit, int) or not isinstance(delta, int) or delta == 0:
        return None
    values = range(start, limit, delta)
    return list(values) if len(values) <= ELEMENTS_LIMIT else None


def _expand_elements(node: ir.Node, data: ShapeData) -> Elements | None:
    source, target = data.elements(node.inputs[0]), data.elements(node.inputs[1])
    if source is None or target is None or len(target) > 1:
        return None
    if not target or target[0] == 1:
        return source
    if len(source) == 1 and isinstance(target[0], int) and target[0] <= ELEMENTS_LIMIT:
        return source * target[0]
    return source if target[0] == len(source) else None


# Dims of the output


def _reshape_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    target, source = data.elements(node.inputs[1]), data.dims(node.inputs[0])
    if target is None:
        return None
    keep_zero = bool(attribute(node, "allowzero", 0))
    found: Elements = []
    for index, size in enumerate(target):
        if size == 0 and not keep_zero:
            found.append(source[index] if source is not None and index < len(source) else None)
        else:
            found.append(size)
    # With one element unknown, it may have been -1 at run time, but the dim there is what is left over all the same.
    left_over = [i for i, size in enumerate(found) if size is None or size == -1]
    for index in left_over:
        found[index] = None
    if len(left_over) == 1 and source is not None and all(s is not None for s in source):
        total = dims.product([s for s in source if s is not None])
        rest = dims.product([s for s in found if s is not None])
        if total != 0 and rest != 0:
            found[left_over[0]] = dims.exact_div(total, rest)
    return [None if isinstance(s, int) and s < 0 else s for s in found]


def broadcast_dim(a: Expr | None, b: Expr | None) -> Expr | None:
    """The dim that two dims, either unknown, broadcast to, or None."""
    if a is None or b is None:
        known = b if a is None else a
        return known if isinstance(known, int) and known != 1 else None
    return dims.broadcast(a, b)


def _expand_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    target, source = data.elements(node.inputs[1]), data.dims(node.inputs[0])
    if target is None or source is None:
        return None
    rank = max(len(target), len(source))
    a: Elements = [*[1] * (rank - len(source)), *source]
    b: Elements = [*[1] * (rank - len(target)), *target]
    return [broadcast_dim(x, y) for x, y in zip(a, b, strict=True)]


def _constant_of_shape_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    return data.elements(node.inputs[0])


def _range_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    bounds = [data.elements(v) for v in node.inputs]
    if any(b is None or len(b) != 1 for b in bounds):
        return None
    start, limit, delta = (b[0] for b in bounds if b is not None)
    if start is None or limit is None or delta != 1:
        return None
    length = dims.sub(limit, start)
    if isinstance(length, int):
        return [max(length, 0)]
    return [length] if dims.is_positive(length) else None


def _concat_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    shapes = [data.dims(v) for v in node.inputs]
    axis = attribute(node, "axis", 0)
    if any(s is None or not -len(s) <= axis < len(s) for s in shapes):
        return None
    found = [s for s in shapes if s is not None]
    if len({len(s) for s in found}) != 1:
        return None  # invalid; left for the checker
    total: Expr | None = 0
    for shape in found:
        total = None if total is None or shape[axis] is None else dims.add(total, shape[axis] or 0)
    result: Elements = list(found[0])
    for i in range(len(result)):
        result[i] = _agreed([s[i] for s in found])
    result[axis] = total
    return result


def _agreed(values: Sequence[Expr | None]) -> Expr | None:
    """Dims that must be equal: the number among them, else any name."""
    numbers = [v for v in values if isinstance(v, int)]
    return numbers[0] if numbers else next((v for v in values if v is not None), None)


def _flatten_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    source = data.dims(node.inputs[0])
    if source is None:
        return None
    axis = attribute(node, "axis", 1)
    axis = axis + len(source) if axis < 0 else axis
    return [(_product(part) or [None])[0] for part in (source[:axis], source[axis:])]


def _tile_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    source, repeats = data.dims(node.inputs[0]), data.elements(node.inputs[1])
    if source is None or repeats is None or len(source) != len(repeats):
        return None
    return [None if s is None or r is None else dims.mul(s, r) for s, r in zip(source, repeats, strict=True)]


def _slice_dims(node: ir.Node, data: ShapeData) -> Elements | None:
    """Slices from the start up to a symbolic end that is the dim itself, or up to a dim of the same name."""
    source = data.dims(node.inputs[0])
    starts, ends, axes = (data.elements(_input(node, i)) for i in (1, 2, 3))
    steps = data.elements(_input(node, 4)) if _input(node, 4) is not None else [1] * len(starts or [])
    if source is None or starts is None or ends is None or steps is None:
        return None
    if _input(node, 3) is None:
        axes = list(range(len(starts)))
    if axes is None or not len(axes) == len(starts) == len(ends) == len(steps):
        return None
    result: Elements = list(source)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if not isinstance(axis, int) or not -len(source) <= axis < len(source):
            return None
        result[axis] = _sliced(source[axis], start, end, step)
    return result


def _sliced(size: Expr | None, start: Expr | None, end: Expr | None, step: Expr | None) -> Expr | None:
    if size is None or step != 1 or start is None or end is None:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(size)[start:end])
    if start == 0 and (end == size or (isinstance(end, int) and end >= 2**31 - 1)):
        return size
    if start == 0 and isinstance(size, int) and isinstance(end, dims.Poly) and dims.is_positive(end):
        return dims.at_most(size, end)
    if isinstance(size, dims.Poly) and isinstance(start, int) and isinstance(end, int):
        if start == 0 and end > 0:
            return dims.at_most(end, size)
        if start < 0 and end >= 2**31 - 1:
            return dims.at_most(-start, size)
    return None


_ELEMENTS: dict[str, Callable[[ir.Node, ShapeData], Any]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Squeeze": _same,
    "Unsqueeze": _same,
    "Reshape": _same,
    "Flatten": _same,
    "Identity": _same,
    "Cast": _cast,
    "Add": _binary(dims.add),
    "Sub": _binary(dims.sub),
    "Mul": _binary(dims.mul),
    "Div": _binary(_divide),
    "Mod": _binary(_modulo),
    "Max": lambda node, data: _binary(_maximum)(node, data) if len(node.inputs) == 2 else None,
    "Min": lambda node, data: _binary(_minimum)(node, data) if len(node.inputs) == 2 else None,
    "Equal": _binary(_equal),
    "Neg": _negate,
    "Abs": _absolute,
    "ReduceProd": _reduce_product,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Expand": _expand_elements,
}

_DIMS: dict[str, Callable[[ir.Node, ShapeData], Elements | None]] = {
    "Reshape": _reshape_dims,
    "Expand": _expand_dims,
    "ConstantOfShape": _constant_of_shape_dims,
    "Range": _range_dims,
    "Concat": _concat_dims,
    "Flatten": _flatten_dims,
    "Tile": _tile_dims,
    "Slice": _slice_dims,
}
