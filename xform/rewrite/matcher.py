"""The search: every way in which a pattern matches at a value, lazily.

Matching is backtracking over generators: each operand yields its bindings one at a time and the next operand continues
from each, so a condition that fails later tries the next binding, commutative operands are permuted only where they
stand, and nothing is enumerated that nobody asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import onnx
import onnx_ir as ir

from xform.graph.kernels import computing_type
from xform.graph.values import is_constant, is_op, rank_of, scalar
from xform.rewrite.pattern import COMMUTATIVE, Const, Flat, Maybe, Op, Or, Out, Outputs, Pattern, Var
from xform.rewrite.remarks import Cost

_EPSILON = {
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
    ir.DataType.FLOAT: 2.0**-23,
}
_DOUBLE = 1e-11  # relative, for float64 values: 0.7978845608 is sqrt(2 / pi), the float32 nearest to it is not

# Operators whose result has the rank of the operand with more axes, a constant of a single element included.
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")


@dataclass
class Match:
    """One binding of a pattern.

    Attributes:
        values: Bound values by variable name and by pattern object.
        nodes: Bound nodes by Op name and by pattern object.
        numbers: Coefficients of named `product` and `total` patterns.
        roots: The values that a rewrite replaces, in the order of the pattern.
        interior: Nodes that belong to the match without a pattern object of their own (inside sums and products).
        data: What `check` computed and `rewrite` needs.
        note: What was done, for the remark, where the rule's name does not say it all.
        cost_before, cost_after: Of the region, for the remark.
    """

    values: Mapping[Hashable, ir.Value] = field(default_factory=dict)
    nodes: Mapping[Hashable, ir.Node] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    roots: tuple[ir.Value, ...] = ()
    interior: tuple[ir.Node, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    cost_before: Cost | None = None
    cost_after: Cost | None = None

    def __getitem__(self, key: str | Pattern) -> ir.Value:
        return self.values[key]

    def get(self, key: str | Pattern) -> ir.Value | None:
        """The bound value, or None where an optional input or another alternative left it unbound."""
        return self.values.get(key)

    def node(self, key: str | Op) -> ir.Node:
        """The node bound to an Op pattern or its name."""
        return self.nodes[key]

    def all_nodes(self) -> list[ir.Node]:
        """Every matched node, once, roots first."""
        roots = [p for v in self.roots if (p := v.producer()) is not None]
        return list(dict.fromkeys([*roots, *self.nodes.values(), *self.interior]))


@dataclass(frozen=True)
class _Bindings:
    values: Mapping[Hashable, ir.Value] = field(default_factory=dict)
    nodes: Mapping[Hashable, ir.Node] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    interior: tuple[ir.Node, ...] = ()

    def bind_value(self, pattern: Pattern, value: ir.Value) -> _Bindings:
        key: Hashable = pattern.name if pattern.name is not None else pattern
        extra: dict[Hashable, ir.Value] = {key: value, pattern: value}
        return _Bindings({**self.values, **extra}, self.nodes, self.numbers, self.interior)

    def bind_node(self, pattern: Op, node: ir.Node) -> _Bindings:
        extra: dict[Hashable, ir.Node] = {pattern: node}
        values = dict(self.values)
        values[pattern] = node.outputs[0]
        if pattern.name is not None:
            extra[pattern.name] = node
            values[pattern.name] = node.outputs[0]
        return _Bindings(values, {**self.nodes, **extra}, self.numbers, self.interior)


@dataclass(frozen=True)
class NearMiss:
    """The furthest that a failed search came: how many nodes it had bound, and what it wanted next."""

    bound: tuple[ir.Node, ...]
    wanted: str
    at: ir.Node | None


class Search:
    """Matches patterns in one model.

    Args:
        opsets: Opset versions per domain, for schema defaults of attributes.
    """

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self.opsets = opsets
        self.near_miss: NearMiss | None = None

    def at(self, pattern: Pattern | Outputs, node: ir.Node) -> Iterator[Match]:
        """Every match whose (first) root is an output of `node`."""
        self.near_miss = None
        if isinstance(pattern, Outputs):
            yield from self._many(pattern, node)
            return
        for value, bindings in self._root(pattern, node, _Bindings()):
            yield _match(bindings, (value,))

    def _root(self, pattern: Pattern, node: ir.Node, b: _Bindings) -> Iterator[tuple[ir.Value, _Bindings]]:
        for value in node.outputs if isinstance(pattern, Out | Or) else node.outputs[:1]:
            for found in self.value(pattern, value, b):
                yield value, found

    # -- values -------------------------------------------------------------------------------------------------

    def value(self, pattern: Pattern, value: ir.Value | None, b: _Bindings) -> Iterator[_Bindings]:
        """Every extension of `b` in which `pattern` stands for `value`."""
        if isinstance(pattern, Maybe):
            yield from (b,) if value is None else self.value(pattern.inner, value, b)
            return
        if value is None:
            return
        bound = b.values.get(pattern.name if pattern.name is not None else pattern)
        if bound is not None:
            if _same_value(bound, value):
                yield b
            return
        if isinstance(pattern, Var):
            if pattern.where is None or pattern.where(value):
                yield b.bind_value(pattern, value)
        elif isinstance(pattern, Const):
            if self._constant(pattern, value, b):
                yield b.bind_value(pattern, value)
        elif isinstance(pattern, Op):
            producer = value.producer()
            if producer is not None and value.index() == 0:
                yield from self._node(pattern, producer, b)
        elif isinstance(pattern, Out):
            producer = value.producer()
            if producer is not None and value.index() == pattern.index:
                for found in self._node(pattern.node, producer, b):
                    yield found.bind_value(pattern, value)
        elif isinstance(pattern, Or):
            for alternative in pattern.alternatives:
                for found in self.value(alternative, value, b):
                    yield found.bind_value(pattern, value)
        elif isinstance(pattern, Flat):
            yield from self._flat(pattern, value, b)
        else:
            raise TypeError(f"unknown pattern {pattern!r}")

    def _constant(self, pattern: Const, value: ir.Value, b: _Bindings) -> bool:
        if not is_constant(value):
            return False
        if pattern.value is not None:
            number = scalar(value)
            if number is None or not close(float(number), pattern.value, _tolerance(pattern.tolerance, value.dtype)):
                self._missed(b, f"the constant {pattern.value:g}, found {number}", None)
                return False
        return pattern.where is None or pattern.where(value)

    # -- nodes --------------------------------------------------------------------------------------------------

    def _node(self, pattern: Op, node: ir.Node, b: _Bindings) -> Iterator[_Bindings]:
        bound = b.nodes.get(pattern)
        if bound is not None:
            if bound is node:
                yield b
            return
        if not is_op(node, *pattern.op_types, domain=pattern.domain):
            self._missed(b, f"{' or '.join(pattern.op_types)}, found {node.op_type}", node)
            return
        for name, expected in pattern.attributes.items():
            actual = self._attribute(node, name)
            if not (expected(actual) if callable(expected) else _equal(actual, expected, computing_type(node))):
                self._missed(b, f"{node.op_type} with attribute {name} = {expected}, found {actual}", node)
                return
        if pattern.where is not None and not pattern.where(node):
            return
        if any(isinstance(p, Const) and p.value is not None for p in pattern.inputs) and _raises_rank(node):
            self._missed(b, f"{node.op_type} by a number that adds no axis to the other operand", node)
            return
        inputs = _inputs(node)
        if len(inputs) > len(pattern.inputs) and not pattern.more_inputs:
            return
        inputs += [None] * (len(pattern.inputs) - len(inputs))
        inner = b.bind_node(pattern, node)
        if node.op_type in COMMUTATIVE and len(pattern.inputs) > 1:
            if len(inputs) == len(pattern.inputs):
                yield from self._any_order(pattern.inputs, inputs, inner)
        else:
            yield from self._in_order(pattern.inputs, inputs, inner)

    def _in_order(
        self, patterns: Sequence[Pattern | None], values: Sequence[ir.Value | None], b: _Bindings
    ) -> Iterator[_Bindings]:
        if not patterns:
            yield b
            return
        first, rest = patterns[0], patterns[1:]
        if first is None:
            if values[0] is None:
                yield from self._in_order(rest, values[1:], b)
            return
        for found in self.value(first, values[0], b):
            yield from self._in_order(rest, values[1:], found)

    def _any_order(
        self, patterns: Sequence[Pattern | None], values: Sequence[ir.Value | None], b: _Bindings
    ) -> Iterator[_Bindings]:
        if not patterns:
            yield b
            return
        first = patterns[0]
        seen: list[ir.Value | None] = []
        for i, value in enumerate(values):
            if first is None or any(value is s for s in seen):
                continue
            seen.append(value)
            for found in self.value(first, value, b):
                yield from self._any_order(patterns[1:], [*values[:i], *values[i + 1 :]], found)

    def _attribute(self, node: ir.Node, name: str) -> Any:
        attr = node.attributes.get(name)
        if attr is not None:
            return attr.value
        return _schema_default(node.op_type, self.opsets.get(node.domain, 1), node.domain, name)

    # -- sums and products --------------------------------------------------------------------------------------

    def _flat(self, pattern: Flat, value: ir.Value, b: _Bindings) -> Iterator[_Bindings]:
        cut = product_cuts if pattern.kind == "product" else sum_cuts
        for coefficient, leaves, nodes in cut(value, len(pattern.terms)):
            if len(leaves) != len(pattern.terms) or (not nodes and not pattern.is_neutral_allowed()):
                continue
            if pattern.coefficient is not None and not close(
                coefficient, pattern.coefficient, _tolerance(pattern.tolerance, value.dtype)
            ):
                continue
            numbers = {**b.numbers, pattern.name: coefficient} if pattern.name else b.numbers
            inner = _Bindings(b.values, b.nodes, numbers, (*b.interior, *nodes))
            for found in self._any_order(pattern.terms, leaves, inner):
                yield found.bind_value(pattern, value)

    # -- several outputs ----------------------------------------------------------------------------------------

    def _many(self, pattern: Outputs, node: ir.Node) -> Iterator[Match]:
        for value, b in self._root(pattern.patterns[0], node, _Bindings()):
            for values, found in self._others(pattern.patterns[1:], (value,), b):
                yield _match(found, values)

    def _others(
        self, patterns: Sequence[Pattern], roots: tuple[ir.Value, ...], b: _Bindings
    ) -> Iterator[tuple[tuple[ir.Value, ...], _Bindings]]:
        if not patterns:
            yield roots, b
            return
        taken = {id(r.producer()) for r in roots}
        for candidate in _climb(patterns[0], b):
            if id(candidate.producer()) in taken:
                continue
            for found in self.value(patterns[0], candidate, b):
                yield from self._others(patterns[1:], (*roots, candidate), found)

    def _missed(self, b: _Bindings, wanted: str, at: ir.Node | None) -> None:
        bound = tuple(dict.fromkeys([*b.nodes.values(), *b.interior]))
        if bound and (self.near_miss is None or len(bound) > len(self.near_miss.bound)):
            self.near_miss = NearMiss(bound, wanted, at)


def _match(b: _Bindings, roots: tuple[ir.Value, ...]) -> Match:
    return Match(b.values, b.nodes, b.numbers, roots, b.interior)


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _raises_rank(node: ir.Node) -> bool:
    """Whether a constant of one element gives the result of an elementwise operator more axes than the rest has.

    An operand of unknown rank is taken to have one axis at least.
    """
    if node.op_type not in _BROADCASTING:
        return False
    single = [value for value in node.inputs if scalar(value) is not None]
    ranks = [rank_of(value) for value in node.inputs if value is not None and value not in single]
    most = max((1 if rank is None else rank for rank in ranks), default=0)
    return any((rank_of(value) or 0) > most for value in single)


def _same_value(a: ir.Value, b: ir.Value) -> bool:
    if a is b:
        return True
    x, y = scalar(a), scalar(b)  # exporters write one scalar as many initializers
    return x is not None and x == y and a.dtype == b.dtype


def close(actual: float, expected: float, tolerance: float) -> bool:
    """Whether two coefficients are the same number up to the rounding of their constants."""
    return math.isclose(actual, expected, rel_tol=tolerance, abs_tol=1e-30)


def _tolerance(base: float, dtype: ir.DataType | None) -> float:
    """How far two spellings of one number may be apart, relative, among values of `dtype`."""
    if dtype is ir.DataType.DOUBLE:
        return min(base, _DOUBLE)
    return max(base, 4 * _EPSILON.get(dtype, 0.0)) if dtype is not None else base


def _equal(actual: Any, expected: Any, dtype: ir.DataType | None) -> bool:
    if isinstance(expected, float) and isinstance(actual, int | float):
        return close(float(actual), expected, _tolerance(1e-6, dtype))
    if isinstance(expected, list | tuple) and actual is not None:
        return list(actual) == list(expected)
    return bool(actual == expected)


@lru_cache(maxsize=4096)
def _schema_default(op_type: str, version: int, domain: str, name: str) -> Any:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None  # an operator unknown to ONNX has no defaults
    definition = schema.attributes.get(name)
    if definition is None or not definition.default_value.name:
        return None
    value = onnx.helper.get_attribute_value(definition.default_value)
    return value.decode() if isinstance(value, bytes) else value


Cut = tuple[float, tuple[ir.Value, ...], tuple[ir.Node, ...]]


def product_cuts(value: ir.Value, limit: int) -> Iterator[Cut]:
    """Every way to read `value` as coefficient * leaves with at most `limit` leaves: (coefficient, leaves, nodes)."""
    number = scalar(value)
    if isinstance(number, int | float):
        yield float(number), (), ()
        return
    if limit >= 1:
        yield 1.0, (value,), ()
    node = value.producer()
    if node is None or _raises_rank(node):
        return
    if is_op(node, "Neg"):
        yield from _through(node, lambda c: -c, product_cuts, limit)
    elif is_op(node, "Div"):
        divisor = scalar(node.inputs[1])
        if isinstance(divisor, float) and divisor != 0:
            yield from _through(node, lambda c: c / divisor, product_cuts, limit)
    elif is_op(node, "Mul"):
        yield from _both(node, lambda a, b: a * b, product_cuts, limit)


def sum_cuts(value: ir.Value, limit: int) -> Iterator[Cut]:
    """Every way to read `value` as constant + leaves with at most `limit` leaves: (constant, leaves, nodes)."""
    number = scalar(value)
    if isinstance(number, int | float):
        yield float(number), (), ()
        return
    if limit >= 1:
        yield 0.0, (value,), ()
    node = value.producer()
    if node is None or _raises_rank(node):
        return
    if is_op(node, "Sub"):
        subtrahend = scalar(node.inputs[1])
        if isinstance(subtrahend, int | float):
            yield from _through(node, lambda c: c - subtrahend, sum_cuts, limit)
    elif is_op(node, "Add"):
        yield from _both(node, lambda a, b: a + b, sum_cuts, limit)


_Cuts = Callable[[ir.Value, int], Iterator[Cut]]


def _through(node: ir.Node, change: Callable[[float], float], cuts: _Cuts, limit: int) -> Iterator[Cut]:
    first = node.inputs[0]
    if first is not None:
        for coefficient, leaves, nodes in cuts(first, limit):
            yield change(coefficient), leaves, (node, *nodes)


def _both(node: ir.Node, join: Callable[[float, float], float], cuts: _Cuts, limit: int) -> Iterator[Cut]:
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return
    for c1, leaves1, nodes1 in cuts(a, limit):
        for c2, leaves2, nodes2 in cuts(b, limit - len(leaves1)):
            yield join(c1, c2), (*leaves1, *leaves2), (node, *nodes1, *nodes2)


def _climb(pattern: Pattern, b: _Bindings) -> Iterator[ir.Value]:
    """Values that `pattern` could stand for, reached from what `b` has bound inside it."""
    path = _path_to_bound(pattern, b)
    if path is None:
        return
    *ancestors, bound = path
    start = b.values[bound.name if bound.name is not None else bound]
    level: dict[int, ir.Value] = {id(start): start}
    for ancestor in reversed(ancestors):
        if isinstance(ancestor, Or | Maybe):
            continue
        steps = len(ancestor.terms) + 1 if isinstance(ancestor, Flat) else 1
        if isinstance(ancestor, Out):
            level = {id(o): o for v in level.values() if (p := v.producer()) for o in p.outputs}
            continue
        reached: dict[int, ir.Value] = dict(level) if isinstance(ancestor, Flat) else {}
        frontier = level
        for _ in range(steps):
            frontier = {id(n.outputs[0]): n.outputs[0] for v in frontier.values() for n, _ in v.uses() if n.outputs}
            reached.update(frontier)
        level = reached
    yield from level.values()


def _path_to_bound(pattern: Pattern, b: _Bindings) -> list[Pattern] | None:
    """Shortest chain of patterns from `pattern` down to one that is bound, breadth first."""
    queue: list[list[Pattern]] = [[pattern]]
    while queue:
        path = queue.pop(0)
        last = path[-1]
        key: Hashable = last.name if last.name is not None else last
        if key in b.values and (len(path) > 1 or not isinstance(last, Op)):
            return path
        queue.extend([*path, child] for child in last.children())
    return None
