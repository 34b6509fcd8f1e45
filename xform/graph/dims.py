"""Arithmetic of symbolic dimensions: polynomials with integer coefficients over dim names.

`batch*seq`, `past + seq` and `2*s0 + 1` are understood when read back, whoever wrote them; anything else (`s0//2`,
`max(a, b)`) counts as one opaque symbol. Two dims are equal exactly when their normal forms are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LONGEST = 1000  # characters of a name that are read as an expression; a file may hold one of any length
_DIGITS = 18  # of a number in it
Monomial = tuple[str, ...]  # sorted symbols, repeated for powers; () for the constant term
_AT_MOST = re.compile(r"min\((\d{1,18}), (.+)\)")
_TOKEN = re.compile(r"\s\+\s|\s-\s|\s*\*\s*|[^\s*]+")


@dataclass(frozen=True)
class Poly:
    """A polynomial: nonzero terms (symbols, coefficient), sorted."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        text = ""
        for symbols, coefficient in sorted(self.terms, key=lambda t: (t[0] == (), t[0])):
            sign = " - " if coefficient < 0 else " + "
            size = abs(coefficient)
            factors = [str(size)] if size != 1 or not symbols else []
            text += (sign if text else sign.strip().replace("+", "")) + "*".join([*factors, *symbols])
        return text


Expr = int | Poly


def symbol(name: str) -> Poly:
    """One dim name as it stands."""
    return Poly((((name,), 1),))


def parse(name: str) -> Expr:
    """The expression that a dim name spells: sums (with spaces around the sign) of products of names and integers."""
    if name.isidentifier():
        return symbol(name)
    if len(name) > LONGEST or any(c in name for c in "()/%,^") or "**" in name:
        return symbol(name)
    tokens = _TOKEN.findall(name.strip())
    if "".join(tokens) != name.strip() or len(tokens) % 2 == 0:
        return symbol(name)
    terms: list[Expr] = [_atom(tokens[0])]
    for sign, atom in zip(tokens[1::2], tokens[2::2], strict=True):
        match sign.strip():
            case "*":
                terms[-1] = mul(terms[-1], _atom(atom))
            case "+":
                terms.append(_atom(atom))
            case "-":
                terms.append(mul(-1, _atom(atom)))
            case _:
                return symbol(name)
    total: Expr = 0
    for term in terms:
        total = add(total, term)
    return total


def _atom(text: str) -> Expr:
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else symbol(text)


def _terms(value: Expr) -> dict[Monomial, int]:
    if isinstance(value, int):
        return {(): value} if value else {}
    return dict(value.terms)


def _make(terms: Mapping[Monomial, int]) -> Expr:
    kept = {symbols: c for symbols, c in terms.items() if c}
    if not kept:
        return 0
    if set(kept) == {()}:
        return kept[()]
    return Poly(tuple(sorted(kept.items())))


def add(a: Expr, b: Expr) -> Expr:
    """a + b."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    terms = _terms(a)
    for symbols, coefficient in _terms(b).items():
        terms[symbols] = terms.get(symbols, 0) + coefficient
    return _make(terms)


def sub(a: Expr, b: Expr) -> Expr:
    """a - b."""
    return add(a, mul(-1, b))


def mul(a: Expr, b: Expr) -> Expr:
    """a * b."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 1 or b == 1:
        return b if a == 1 else a
    terms: dict[Monomial, int] = {}
    for left, x in _terms(a).items():
        for right, y in _terms(b).items():
            symbols = tuple(sorted(left + right))
            terms[symbols] = terms.get(symbols, 0) + x * y
    return _make(terms)


def product(values: list[Expr]) -> Expr:
    """The product of all values; 1 for none."""
    total: Expr = 1
    for value in values:
        total = mul(total, value)
    return total


def product_of_sizes(sizes: Sequence[int | str | None]) -> Expr | None:
    """The number of elements of dims as `xform.graph.values.shape_of` gives them; None if one is unknown."""
    if any(size is None for size in sizes):
        return None
    return product([size if isinstance(size, int) else parse(size) for size in sizes if size is not None])


def exact_div(a: Expr, b: Expr) -> Expr | None:
    """q with q * b == a as polynomials, or None. Symbols are taken to be nonzero."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    quotient: Expr = 0
    rest = a
    for _ in range(16):
        if rest == 0:
            return quotient
        term = _divide_leading(rest, b)
        if term is None:
            return None
        quotient = add(quotient, term)
        rest = sub(rest, mul(term, b))
    return None


def _leading(value: Expr) -> tuple[Monomial, int]:
    return max(_terms(value).items(), key=lambda term: (len(term[0]), term[0]))


def _divide_leading(a: Expr, b: Expr) -> Expr | None:
    symbols, coefficient = _leading(a)
    divisor, by = _leading(b)
    if coefficient % by:
        return None
    left = list(symbols)
    for name in divisor:
        if name not in left:
            return None
        left.remove(name)
    return _make({tuple(left): coefficient // by})


def evaluate(value: Expr, bindings: Mapping[str, int], default: int = 1) -> int:
    """The number that `value` is under `bindings`; unbound symbols count as `default`."""
    total = 0
    for symbols, coefficient in _terms(value).items():
        for name in symbols:
            coefficient *= _value_of(name, bindings, default)
        total += coefficient
    return total


def _value_of(name: str, bindings: Mapping[str, int], default: int) -> int:
    bounded = _bounded(name)
    if name in bindings or bounded is None:
        return bindings.get(name, default)
    return min(int(bounded[1]), evaluate(parse(bounded[2]), bindings, default))


def _bounded(name: str) -> re.Match[str] | None:
    """The parts of a name that `at_most` made."""
    return _AT_MOST.fullmatch(name) if len(name) <= LONGEST else None


def is_positive(value: Expr) -> bool:
    """Whether `value` is provably at least 1 when every symbol is: positive coefficients only."""
    terms = _terms(value)
    return bool(terms) and all(c > 0 for c in terms.values())


def at_most(limit: int, value: Poly) -> Poly:
    """min(limit, value), as an opaque symbol: the length of a slice of `limit` elements up to `value`."""
    return symbol(f"min({limit}, {value})")


def broadcast(a: Expr, b: Expr) -> Expr | None:
    """The dim that two dims broadcast to, or None where that depends on their values.

    A value broadcasts with its own minimum with a limit to itself: where they differ, the graph could not run.
    """
    if a == 1:
        return b
    if b == 1 or a == b:
        return a
    if isinstance(a, int) or isinstance(b, int):
        return a if isinstance(a, int) else b  # the other is 1 or the same
    for bounded, value in ((a, b), (b, a)):
        name = str(bounded)
        if name.startswith("min(") and name.endswith(f", {value})") and len(_terms(bounded)) == 1:
            return value
    return None


def symbols(value: Expr) -> set[str]:
    """The dim names that `value` depends on."""
    found: set[str] = set()
    for names, _ in _terms(value).items():
        for name in names:
            bounded = _bounded(name)
            found |= {name} if bounded is None else symbols(parse(bounded[2]))
    return found
