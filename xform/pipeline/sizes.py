"""Numbers for the dynamic dimensions of a model's inputs.

Every symbol gets one number for all inputs. What a dimension means is guessed from its name ("batch", "sequence",
"height", ...), then from its place in an input's shape; several assignments are proposed, most plausible first, because
a model may accept only some (a multiple of 32, the image size it was trained at).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from xform.graph.dims import LONGEST
from xform.graph.values import Dim, shape_of

Meaning = Literal["batch", "sequence", "past", "channels", "space", "heads", "other"]
Sizes = dict[str, int]

# Proposed in turn until enough of them run. Distinct numbers, so that mixed-up dims show; odd ones, so that padding
# shows.
_PROPOSALS: tuple[dict[Meaning, int], ...] = (
    {"batch": 2, "sequence": 8, "past": 4, "channels": 3, "space": 64, "heads": 4, "other": 6},
    {"batch": 3, "sequence": 13, "past": 5, "channels": 3, "space": 96, "heads": 4, "other": 5},
    {"batch": 1, "sequence": 16, "past": 0, "channels": 3, "space": 32, "heads": 2, "other": 4},
    {"batch": 2, "sequence": 32, "past": 8, "channels": 1, "space": 128, "heads": 8, "other": 8},
    {"batch": 1, "sequence": 64, "past": 16, "channels": 3, "space": 224, "heads": 8, "other": 16},
    {"batch": 2, "sequence": 128, "past": 32, "channels": 4, "space": 256, "heads": 12, "other": 32},
    {"batch": 1, "sequence": 1, "past": 1, "channels": 1, "space": 28, "heads": 1, "other": 1},
    {"batch": 1, "sequence": 77, "past": 1, "channels": 3, "space": 512, "heads": 16, "other": 2},
    {"batch": 1, "sequence": 1024, "past": 1, "channels": 2, "space": 336, "heads": 6, "other": 12},
    {"batch": 1, "sequence": 3000, "past": 1, "channels": 80, "space": 384, "heads": 6, "other": 3},
)

_MEANINGS: tuple[tuple[str, Meaning], ...] = (
    (r"past|cache|history", "past"),
    (r"batch|^(n|b|bs|bsz)$|^batch", "batch"),
    (r"seq|len|time|token|^(t|s|l)$|frames|steps", "sequence"),
    (r"chan|^c$", "channels"),
    (r"height|width|image|^(h|w|d)$|pixel|spatial|space|size", "space"),
    (r"head", "heads"),
)
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


_ALLOWED = (ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.Load)
_ARITHMETIC = re.compile(r"[\w\s+*/%()-]+")
_BITS = 63
_LARGEST = 2**_BITS - 1  # what a dim can be


@dataclass(frozen=True)
class InputDims:
    """One input's shape with every dynamic dim named: static dims are ints, dynamic ones the name of a symbol.

    Attributes:
        name: The input.
        dims: Its dims, or None where even the rank is unknown.
    """

    name: str
    dims: tuple[int | str, ...] | None


def input_dims(inputs: Sequence[ir.Value]) -> list[InputDims]:
    """Name every dynamic dim; unnamed dims at the same axis of inputs of the same rank are taken to be equal."""
    found = []
    for value in inputs:
        shape = shape_of(value)
        dims = None if shape is None else tuple(_symbol(dim, axis, len(shape)) for axis, dim in enumerate(shape))
        found.append(InputDims(value.name or "", dims))
    return found


def _symbol(dim: Dim, axis: int, rank: int) -> int | str:
    return dim if isinstance(dim, int) or dim else _placed(axis, rank)


def _placed(axis: int, rank: int) -> str:
    """A name for an unnamed dim, from where it stands."""
    if axis == 0:
        return "?batch"
    if rank in (4, 5):
        return "?channels" if axis == 1 else f"?space{axis}"
    return "?sequence" if axis == 1 else f"?other{axis}"


def meaning_of(symbol: str) -> Meaning:
    """What a symbol stands for, from its name."""
    text = symbol.lower().lstrip("?")
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, text):
            return meaning
    return "other"


def symbols_of(dims: Sequence[InputDims]) -> list[str]:
    """The free symbols in order of appearance: of an expression like "past + sequence", its names."""
    found: dict[str, None] = {}
    for entry in dims:
        for dim in entry.dims or ():
            if isinstance(dim, str):
                found.update(dict.fromkeys(names_in(dim)))
    return list(found)


def meanings(dims: Sequence[InputDims]) -> dict[str, Meaning]:
    """What each symbol stands for: from its name, or from where it first stands in an input's shape."""
    found = {symbol: meaning_of(symbol) for symbol in symbols_of(dims)}
    for entry in dims:
        for axis, dim in enumerate(entry.dims or ()):
            if found.get(str(dim)) == "other" and not str(dim).startswith("?"):
                found[str(dim)] = meaning_of(_placed(axis, len(entry.dims or ())))
    return found


def names_in(symbol: str) -> list[str]:
    """The plain names that a symbol, which may be an arithmetic expression, is made of."""
    tree = _expression(symbol)
    if tree is None:
        return [symbol]
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def _expression(symbol: str) -> ast.expr | None:
    """The symbol as an arithmetic expression of other symbols, or None if it is a plain name."""
    if symbol.isidentifier() or symbol.startswith("?") or len(symbol) > LONGEST or not _ARITHMETIC.fullmatch(symbol):
        return None
    try:
        tree = ast.parse(symbol, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # as the parser says that it is none, or too deep
        return None
    return tree if all(isinstance(node, _ALLOWED) and _is_plain(node) for node in ast.walk(tree)) else None


def _is_plain(node: ast.AST) -> bool:
    """Whether a number is one that a dim can have; True for all that is no number."""
    return not isinstance(node, ast.Constant) or (type(node.value) is int and node.value <= _LARGEST)


def evaluate(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dim as a number.

    Raises:
        KeyError: A symbol has no size.
        ArithmeticError: The expression has no value (a division by zero), or one that no dim can have.
    """
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    tree = _expression(dim)
    if tree is None:
        raise KeyError(dim)
    return _evaluate(tree, sizes)


def _evaluate(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant):
        return int(tree.value)  # type: ignore[arg-type]
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        left, right = _evaluate(tree.left, sizes), _evaluate(tree.right, sizes)
        if isinstance(tree.op, ast.Pow) and not 0 <= right < _BITS:
            raise OverflowError(ast.unparse(tree))
        number = _OPERATORS[type(tree.op)](left, right)
        if abs(number) > _LARGEST:
            raise OverflowError(ast.unparse(tree))
        return number
    raise KeyError(ast.unparse(tree))


def proposals(dims: Sequence[InputDims], fixed: Mapping[str, int] | None = None) -> Iterator[Sizes]:
    """Assignments of a number to every symbol, most plausible first, without repetition.

    Args:
        dims: The inputs' dims.
        fixed: Sizes that the user decided.
    """
    means = meanings(dims)
    symbols = list(means)
    fixed = fixed or {}
    seen: set[tuple[int, ...]] = set()
    totals = {s for s in symbols if re.search("total", s.lower())}
    for proposal in _PROPOSALS:
        sizes = {symbol: fixed.get(symbol, proposal[meaning]) for symbol, meaning in means.items()}
        for symbol in totals - fixed.keys():  # a total length is what is cached plus what is new
            sizes[symbol] = proposal["sequence"] + (proposal["past"] if "past" in means.values() else 0)
        key = tuple(sizes.values())
        if key not in seen:
            seen.add(key)
            yield sizes
