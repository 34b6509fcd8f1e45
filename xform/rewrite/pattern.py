"""What a subgraph looks like, as plain Python expressions.

    x = var("x")
    erf = op("Erf", product(2**-0.5, x))
    gelu = product(0.5, x, total(1.0, erf))          # 0.5 * x * (1 + erf(x / sqrt 2)), however it is associated

A pattern object stands for one value (or node): used twice, named or not, it must bind the same value both times.
Patterns are immutable descriptions; the search is in `matcher.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

Predicate = Callable[[ir.Value], bool]

# Operators whose inputs may stand in any order. Max, Min, Sum and Mean take any number of inputs.
COMMUTATIVE = frozenset(
    {"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Max", "Min", "Sum", "Mean"}
)

Key = tuple[str, str]  # (domain, op type)


class Pattern:
    """Base of all patterns. `+ - * /` build standard operators, `|` builds an alternative."""

    name: str | None = None

    def __add__(self, other: Pattern | float) -> Op:
        return op("Add", self, other)

    def __radd__(self, other: Pattern | float) -> Op:
        return op("Add", other, self)

    def __sub__(self, other: Pattern | float) -> Op:
        return op("Sub", self, other)

    def __rsub__(self, other: Pattern | float) -> Op:
        return op("Sub", other, self)

    def __mul__(self, other: Pattern | float) -> Op:
        return op("Mul", self, other)

    def __rmul__(self, other: Pattern | float) -> Op:
        return op("Mul", other, self)

    def __truediv__(self, other: Pattern | float) -> Op:
        return op("Div", self, other)

    def __rtruediv__(self, other: Pattern | float) -> Op:
        return op("Div", other, self)

    def __or__(self, other: Pattern) -> Or:
        return Or((self, other))

    def roots(self) -> frozenset[Key] | None:
        """The (domain, op) pairs that the root can have; None where any value can match."""
        return None

    def children(self) -> Iterable[Pattern]:
        """Direct sub-patterns."""
        return ()

    def depth(self) -> int:
        """Number of operator levels from the root to the deepest leaf."""
        return max((c.depth() for c in self.children()), default=0)


class Var(Pattern):
    """Any value, optionally one that satisfies `where`. Two Vars of one name are one variable."""

    def __init__(self, name: str | None = None, where: Predicate | None = None) -> None:
        self.name = name
        self.where = where

    def __repr__(self) -> str:
        return self.name or "_"


class Const(Pattern):
    """A constant.

    Args:
        value: Matches a one-element constant of this value, within `tolerance` relative (1e-11 in float64); None
            matches every constant. It may have axes of size 1, in an elementwise operator no more of them than the
            other operand has, which it would give more axes. An initializer that the caller can override is not a
            constant.
        where: Further condition on the value.
    """

    def __init__(
        self,
        value: float | None = None,
        name: str | None = None,
        *,
        tolerance: float = 1e-6,
        where: Predicate | None = None,
    ) -> None:
        self.value = value
        self.name = name
        self.tolerance = tolerance
        self.where = where

    def __repr__(self) -> str:
        return self.name or ("constant" if self.value is None else str(self.value))


class Op(Pattern):
    """A node of one of `op_types`; as an operand it stands for the node's first output.

    Args:
        inputs: One pattern per input; None demands that the input is omitted; `Maybe(p)` accepts both. Trailing
            inputs beyond the listed ones are refused unless `more_inputs`.
        attributes: Name to a value, or to a predicate on the value. An absent attribute has its schema default.
        output: Which output of the node this pattern stands for.
    """

    def __init__(
        self,
        op_types: Sequence[str],
        inputs: Sequence[Pattern | None],
        attributes: Mapping[str, Any],
        *,
        domain: str = "",
        name: str | None = None,
        more_inputs: bool = False,
        where: Callable[[ir.Node], bool] | None = None,
    ) -> None:
        self.op_types = tuple(op_types)
        self.inputs = tuple(inputs)
        self.attributes = dict(attributes)
        self.domain = domain
        self.name = name
        self.more_inputs = more_inputs
        self.where = where

    def output(self, index: int) -> Out:
        """Another output of the same node."""
        return Out(self, index)

    def roots(self) -> frozenset[Key] | None:
        return frozenset((self.domain, t) for t in self.op_types)

    def children(self) -> Iterable[Pattern]:
        return (p for p in self.inputs if p is not None)

    def depth(self) -> int:
        return 1 + max((c.depth() for c in self.children()), default=0)

    def __repr__(self) -> str:
        return f"{'|'.join(self.op_types)}({', '.join(map(repr, self.inputs))})"


class Out(Pattern):
    """Output `index` of the node that `node` matches."""

    def __init__(self, node: Op, index: int) -> None:
        self.node = node
        self.index = index

    def roots(self) -> frozenset[Key] | None:
        return self.node.roots()

    def children(self) -> Iterable[Pattern]:
        return (self.node,)

    def __repr__(self) -> str:
        return f"{self.node!r}#{self.index}"


class Maybe(Pattern):
    """An input that may be omitted; the sub-pattern stays unbound then."""

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner

    def children(self) -> Iterable[Pattern]:
        return (self.inner,)


class Or(Pattern):
    """Any of several patterns, tried in order; every alternative that matches is a binding of its own."""

    def __init__(self, alternatives: Sequence[Pattern], name: str | None = None) -> None:
        flat: list[Pattern] = []
        for a in alternatives:
            flat.extend(a.alternatives if isinstance(a, Or) and a.name is None else (a,))
        self.alternatives: tuple[Pattern, ...] = tuple(flat)
        self.name = name

    def roots(self) -> frozenset[Key] | None:
        keys: set[Key] = set()
        for alternative in self.alternatives:
            found = alternative.roots()
            if found is None:
                return None
            keys |= found
        return frozenset(keys)

    def children(self) -> Iterable[Pattern]:
        return self.alternatives

    def __repr__(self) -> str:
        return "(" + " | ".join(map(repr, self.alternatives)) + ")"


class Flat(Pattern):
    """A product or a sum of exactly these terms, however the operators associate and whatever their order.

    A product runs through Mul, Neg and Div by a constant; a sum through Add and Sub of a constant. All constants of
    one element in it are gathered into one coefficient (float64): their product, or their sum. A constant that has more
    axes than what it is applied to ends the product or sum.

    Args:
        kind: "product" or "sum".
        coefficient: Required coefficient within `tolerance` relative; None accepts any and binds it to `name`
            in `Match.numbers`.
    """

    def __init__(
        self,
        kind: str,
        coefficient: float | None,
        terms: Sequence[Pattern],
        *,
        tolerance: float = 1e-6,
        name: str | None = None,
    ) -> None:
        self.kind = kind
        self.coefficient = coefficient
        self.terms = tuple(terms)
        self.tolerance = tolerance
        self.name = name

    def roots(self) -> frozenset[Key] | None:
        if len(self.terms) == 1 and self.is_neutral_allowed():
            inner = self.terms[0].roots()
            return None if inner is None else inner | self._operators()
        return self._operators()

    def is_neutral_allowed(self) -> bool:
        """Whether the bare term alone (coefficient 1, or 0 for a sum) is a match."""
        neutral = 1.0 if self.kind == "product" else 0.0
        return self.coefficient is None or self.coefficient == neutral

    def _operators(self) -> frozenset[Key]:
        names = ("Mul", "Div", "Neg") if self.kind == "product" else ("Add", "Sub")
        return frozenset(("", n) for n in names)

    def children(self) -> Iterable[Pattern]:
        return self.terms

    def depth(self) -> int:
        return len(self.terms) + 1 + max((t.depth() for t in self.terms), default=0)

    def __repr__(self) -> str:
        sign = " * " if self.kind == "product" else " + "
        first = "" if self.coefficient is None else f"{self.coefficient:g}{sign}"
        return "(" + first + sign.join(map(repr, self.terms)) + ")"


class Outputs:
    """Several values that one rule replaces together; the first is the anchor of the search.

    Each must be bound to a node of its own. The others are found by walking from sub-patterns that the anchor has
    bound up through their readers, so the search is linear in the size of the graph.
    """

    def __init__(self, *patterns: Pattern) -> None:
        self.patterns = patterns

    def roots(self) -> frozenset[Key] | None:
        return self.patterns[0].roots()

    def depth(self) -> int:
        return max(p.depth() for p in self.patterns)


def var(name: str | None = None, where: Predicate | None = None) -> Var:
    """Any value."""
    return Var(name, where)


def const(value: float | None = None, name: str | None = None, **options: Any) -> Const:
    """A constant; see `Const`."""
    return Const(value, name, **options)


def any_of(*alternatives: Pattern, name: str | None = None) -> Or:
    """Any of several patterns."""
    return Or(alternatives, name)


def maybe(inner: Pattern) -> Maybe:
    """An input that may be omitted."""
    return Maybe(inner)


def product(coefficient: float | None, *terms: Pattern, name: str | None = None, tolerance: float = 1e-6) -> Flat:
    """`coefficient * terms[0] * terms[1] ...` in any association and order."""
    return Flat("product", coefficient, terms, name=name, tolerance=tolerance)


def total(constant: float | None, *terms: Pattern, name: str | None = None, tolerance: float = 1e-6) -> Flat:
    """`constant + terms[0] + terms[1] ...` in any association and order."""
    return Flat("sum", constant, terms, name=name, tolerance=tolerance)


def op(
    op_types: str | Sequence[str],
    *inputs: Pattern | float | None,
    domain: str = "",
    name: str | None = None,
    more_inputs: bool = False,
    where: Callable[[ir.Node], bool] | None = None,
    **attributes: Any,
) -> Op:
    """A node; numbers among the inputs become constants. See `Op`."""
    names = (op_types,) if isinstance(op_types, str) else tuple(op_types)
    wrapped = [Const(float(i)) if isinstance(i, int | float) else i for i in inputs]
    return Op(names, wrapped, attributes, domain=domain, name=name, more_inputs=more_inputs, where=where)
