"""Dynamic dims: what the user asked for, what torch is told, and what came out of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export import Dim, ExportedProgram

from xform.capture.torch_calling import unique_names
from xform.errors import UsageError

Requested = Mapping[str, Mapping[int, "str | tuple[str, int, int]"]]
Dynamic = str | Requested | None


@dataclasses.dataclass(frozen=True)
class DimRequest:
    """One dim that the user named: `("seq", 1, 512)`, or `"seq"` with the range left open."""

    name: str
    low: int | None = None
    high: int | None = None
    times: int = 1
    plus: int = 0
    found: bool = False  # torch finds the range, and which dims are equal

    @property
    def derived(self) -> bool:
        """Whether the size is not the named one itself but `times * size + plus`."""
        return (self.times, self.plus) != (1, 0)


def parse(dynamic: Dynamic, inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, DimRequest | None]]:
    """Per input, the dims to be dynamic, each with the request that names it (None: find out whether it can be).

    Args:
        dynamic: None; `"auto"`; or per graph input `{axis: "name"}` or `{axis: ("name", low, high)}`, where one name
            means one size, and negative axes count from the end.

    Raises:
        UsageError: An input or axis that does not exist, or a request that is not of this form.
    """
    if dynamic is None:
        return {}
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise UsageError(f"dynamic={dynamic!r} is not known", hint='use None, "auto", or a dict of named dims')
        found = {name: _candidates(name, tensor) for name, tensor in inputs.items()}
        return {name: dict.fromkeys(axes) for name, axes in found.items() if axes}
    if not isinstance(dynamic, Mapping):
        raise UsageError(f"dynamic={dynamic!r} is not known", hint='use None, "auto", or a dict of named dims')
    requests: dict[str, dict[int, DimRequest | None]] = {}
    for name, dims in dynamic.items():
        if name not in inputs:
            close = get_close_matches(str(name), inputs, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its inputs are: {', '.join(inputs) or 'none'}"
            raise UsageError(f"dynamic names the input {name!r}, which does not exist", hint=hint)
        if not isinstance(dims, Mapping):
            raise UsageError(
                f"dynamic[{name!r}] = {dims!r} is not a dict of axes", hint=f'write {{{name!r}: {{0: "batch"}}}}'
            )
        rank = inputs[name].ndim
        for axis, request in dims.items():
            if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
                raise UsageError(f"dynamic names axis {axis!r} of {name!r}, which has {rank} dims")
            requests.setdefault(name, {})[axis % rank] = _request(name, axis, request)
    return requests


def _request(name: str, axis: int, request: Any) -> DimRequest:
    if isinstance(request, str):
        return DimRequest(request)
    match request:
        case (str() as label, int() as low, int() as high) if 0 < low < high:
            return DimRequest(label, low, high)
    raise UsageError(
        f"dynamic[{name!r}][{axis}] = {request!r} is not a dim", hint='write "name" or ("name", smallest, largest)'
    )


def _candidates(name: str, tensor: torch.Tensor) -> list[int]:
    """Axes that may be batch or sequence dims.

    Those are the first axis of every tensor, and every axis of tensors that are not feature maps: token ids, masks,
    embeddings [batch, sequence, features], waveforms [batch, time]; of a cached key or value
    [batch, heads, sequence, head size] the third. Height and width of images stay as they are in the example: a
    network that is fixed to one size loses nothing, and any other would pay for shape arithmetic at run time.
    """
    if tensor.ndim <= 3 or not tensor.is_floating_point():
        return list(range(tensor.ndim))
    return [0, 2] if tensor.ndim == 4 and _is_cached(name) else [0]


def _is_cached(name: str) -> bool:
    """Whether an input is the keys or values [batch, heads, length, features] of a cache."""
    return name.endswith((".keys", ".values"))


def _widen(inputs: Mapping[str, torch.Tensor], axis: int, names: list[str]) -> dict[str, torch.Tensor]:
    """The inputs with one axis of these doubled by repetition, where it has size 1 in all of them."""
    widened = dict(inputs)
    if all(inputs[name].shape[axis] == 1 for name in names):
        widened.update({name: torch.cat([inputs[name], inputs[name]], dim=axis) for name in names})
    return widened


Attempt = tuple[dict[str, torch.Tensor], dict[str, dict[int, "DimRequest | None"]]]


def attempts(
    inputs: Mapping[str, torch.Tensor],
    requests: dict[str, dict[int, DimRequest | None]],
    dynamic: Dynamic,
    varied: Mapping[str, Collection[int]],
) -> list[Attempt]:
    """Example inputs and dynamic dims to export with, the most general first.

    Args:
        varied: Axes that had other sizes in earlier calls, by input: dynamic too, if they can be.
    """
    tried: list[Attempt] = []
    if varied:
        general = {name: dict(axes) for name, axes in requests.items()}
        for name, axes in varied.items():
            for axis in axes:
                general.setdefault(name, {}).setdefault(axis, None)
        tried += _examples(inputs, general)
    if dynamic == "auto":
        lengthened, batched, _ = _examples(inputs, requests)
        batch_only = {name: {0: axes[0]} for name, axes in requests.items() if 0 in axes}
        tried += [lengthened, batched, (batched[0], batch_only), (dict(inputs), {})]
    else:
        tried += _examples(inputs, requests)
        found = {
            name: {axis: _to_be_found(request) for axis, request in axes.items()} for name, axes in requests.items()
        }
        tried += _examples(inputs, found) if found != requests else []
    return _distinct(tried)


def _examples(inputs: Mapping[str, torch.Tensor], requests: dict[str, dict[int, DimRequest | None]]) -> list[Attempt]:
    """The example with its dims of size 1 doubled, with the batch alone doubled, and as it is.

    torch.export takes the sizes 0 and 1 of an example for constants, because broadcasting depends on them. So where a
    dim is to be dynamic, examples of size 1 are doubled: the batch, and the length of a sequence.
    """
    batched = _widen(inputs, 0, [name for name, axes in requests.items() if 0 in axes])
    lengthened = _widen(batched, 1, [name for name in requests if inputs[name].ndim in (2, 3) and 1 in requests[name]])
    short = [name for name, axes in requests.items() if 2 in axes and _is_cached(name) and inputs[name].shape[2] == 1]
    lengthened = _widen(lengthened, 2, short)
    return [(lengthened, requests), (batched, requests), (dict(inputs), requests)]


def _to_be_found(request: DimRequest | None) -> DimRequest | None:
    if request is None or request.derived or (request.low, request.high) != (None, None):
        return request
    return dataclasses.replace(request, found=True)


def _distinct(tried: Sequence[Attempt]) -> list[Attempt]:
    """The attempts without repetitions: one that failed would fail again."""
    distinct: dict[object, Attempt] = {}
    for tensors, requests in tried:
        shapes = tuple(tensor.shape for tensor in tensors.values())
        axes = tuple((name, axis, request) for name, dims in requests.items() for axis, request in dims.items())
        distinct.setdefault((shapes, axes), (tensors, requests))
    return list(distinct.values())


def export_shapes(
    inputs: Mapping[str, torch.Tensor], requests: Mapping[str, Mapping[int, DimRequest | None]]
) -> tuple[dict[int, Any], ...]:
    """torch.export's `dynamic_shapes`, one dict per input tensor."""
    dims: dict[str, Any] = {}
    shapes = []
    for name in inputs:
        shape: dict[int, Any] = {}
        for axis, request in requests.get(name, {}).items():
            if request is None or request.found:
                shape[axis] = Dim.AUTO
                continue
            if request.name not in dims:
                # torch.export reasons from size 2 on; smaller sizes stay allowed by leaving the lower end open.
                low = None if request.low is None or request.low < 2 else request.low
                dims[request.name] = Dim(request.name, min=low, max=request.high)
            shape[axis] = request.times * dims[request.name] + request.plus if request.derived else dims[request.name]
        shapes.append(shape)
    return tuple(shapes)


def sizes_of(
    program: ExportedProgram, names: Sequence[str], requests: Mapping[str, Mapping[int, DimRequest | None]]
) -> tuple[Sizes, dict[str, str]]:
    """The sizes that a program takes, with symbols renamed, and how they were renamed.

    A symbol is called as requested, or else `batch` as the first axis of an input, `sequence` as the second axis of
    ids, embeddings or waveforms, and otherwise after the first input axis that it is the size of.
    """
    tensors = input_values(program)
    symbols = _name_symbols(names, tensors, requests)
    renaming = {sympy.Symbol(old): sympy.Symbol(new, integer=True) for old, new in symbols.items()}
    shapes = {
        name: tuple(_renamed(size, renaming) for size in tensor.shape)
        for name, tensor in zip(names, tensors, strict=True)
    }
    return Sizes(shapes, _ranges(program, symbols, requests)), symbols


def _name_symbols(
    names: Sequence[str], tensors: Sequence[torch.Tensor], requests: Mapping[str, Mapping[int, DimRequest | None]]
) -> dict[str, str]:
    symbols: dict[str, str] = {}
    found: dict[tuple[str, int], str] = {}
    for name, tensor in zip(names, tensors, strict=True):
        for axis, size in enumerate(tensor.shape):
            symbol = size.node.expr if isinstance(size, torch.SymInt) else None
            if not isinstance(symbol, sympy.Symbol) or str(symbol) in symbols:
                continue
            request = requests.get(name, {}).get(axis)
            wanted = request.name if request is not None else _symbol_name(name, axis, tensor.ndim)
            # Where torch found no reason for two sizes (a mask's and its ids') to be equal, being equal in the example
            # is reason enough: a call where they differ is captured anew. So is having one name.
            key = (wanted, int(size.node.hint))  # type: ignore[attr-defined]
            if key not in found or (request is not None and not request.found):
                found[key] = unique_names([wanted], list(symbols.values()))[0]
            symbols[str(symbol)] = found[key]
    return symbols


def input_values(program: ExportedProgram) -> list[torch.Tensor]:
    """The fake tensors that stand for a program's tensor inputs, in order."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values[name] for name in program.graph_signature.user_inputs if isinstance(name, str) and name in values]
    return [value for value in inputs if isinstance(value, torch.Tensor)]


def dims_of(program: ExportedProgram, names: Sequence[str]) -> dict[str, dict[int, DimRequest | None]]:
    """The dynamic dims that an exported program has, as requests for its inputs of these names.

    torch does not keep what the user called them, so they are named as found ones are.
    """
    dims: list[tuple[str, int, int, sympy.Expr]] = [
        (name, axis, value.ndim, size.node.expr)  # type: ignore[attr-defined]
        for name, value in zip(names, input_values(program), strict=True)
        for axis, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt) and not size.node.expr.is_Integer
    ]
    known: dict[sympy.Symbol, DimRequest] = {}
    for name, axis, rank, size in dims:
        if isinstance(size, sympy.Symbol) and size not in known:
            label = unique_names([_symbol_name(name, axis, rank)], [request.name for request in known.values()])[0]
            known[size] = DimRequest(label, *_limits(program, size))
    requests: dict[str, dict[int, DimRequest | None]] = {}
    for name, axis, _, size in dims:
        requests.setdefault(name, {})[axis] = _multiple(size, known)
    return requests


def _limits(program: ExportedProgram, symbol: sympy.Symbol) -> tuple[int | None, int | None]:
    limits = program.range_constraints[symbol]
    low = int(limits.lower) if limits.lower > 2 else None
    return low, int(limits.upper) if limits.upper.is_Integer else None


def _multiple(size: sympy.Expr, known: Mapping[sympy.Symbol, DimRequest]) -> DimRequest | None:
    """The request for a size `a * symbol + b`; None, to be found, for any other expression."""
    for symbol, request in known.items():
        factor = sympy.diff(size, symbol)
        rest = sympy.expand(size - factor * symbol)
        if factor.is_Integer and factor > 0 and rest.is_Integer:
            return dataclasses.replace(request, times=int(factor), plus=int(rest))
    return None


def _symbol_name(name: str, axis: int, rank: int) -> str:
    if axis == 0:
        return "batch"
    if (axis == 1 and rank in (2, 3)) or (axis == 2 and _is_cached(name) and "cross" in name):
        return "sequence"  # what a decoder attends to across is what the encoder has read
    if axis == 2 and _is_cached(name):
        return "past"
    return re.sub(r"\W", "_", f"{name}_{axis}")


def _renamed(size: int | torch.SymInt, renaming: Mapping[sympy.Symbol, sympy.Symbol]) -> Size:
    if isinstance(size, int):
        return size
    by_name = {str(old): new for old, new in renaming.items()}
    expression = size.node.expr
    if expression.is_Integer:
        return int(expression)
    return expression.subs({symbol: by_name.get(str(symbol), symbol) for symbol in expression.free_symbols})


def _ranges(
    program: ExportedProgram,
    symbols: Mapping[str, str],
    requests: Mapping[str, Mapping[int, DimRequest | None]],
) -> dict[str, tuple[int, int | None]]:
    asked = {r.name: r for dims in requests.values() for r in dims.values() if r is not None and not r.derived}
    ranges: dict[str, tuple[int, int | None]] = {}
    for symbol, limits in program.range_constraints.items():
        name = symbols.get(str(symbol))
        if name is None:
            continue
        # What torch calls "at least 2" is its own reservation about the sizes 0 and 1, not the model's.
        low = 1 if limits.lower <= 2 else int(limits.lower)
        low = asked[name].low or low if name in asked else low
        ranges[name] = (low, int(limits.upper) if limits.upper.is_Integer else None)
    return ranges


_MAX_REMEMBERED = 1024  # combinations of shapes
Size = Any  # int, or a sympy expression of symbols


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that a captured graph takes: per input, each dim as a number or an expression of named symbols.

    Attributes:
        shapes: Per input, its dims.
        ranges: Per symbol, its smallest and largest size (None: no upper limit).
    """

    shapes: dict[str, tuple[Size, ...]]
    ranges: dict[str, tuple[int, int | None]]
    _fitting: set[tuple[torch.Size, ...]] = dataclasses.field(default_factory=set, compare=False, repr=False)

    def dims(self) -> dict[str, dict[int, str]]:
        """Per input, its dynamic axes with their names or expressions."""
        return {
            name: axes
            for name, shape in self.shapes.items()
            if (axes := {axis: str(size) for axis, size in enumerate(shape) if not isinstance(size, int)})
        }

    def varied(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, set[int]]:
        """Per input, the axes that are dynamic or of another size in `inputs`; empty if some rank differs."""
        if any(inputs[name].ndim != len(shape) for name, shape in self.shapes.items()):
            return {}
        axes = {
            name: {axis for axis, size in enumerate(shape) if size != inputs[name].shape[axis]}
            for name, shape in self.shapes.items()
        }
        return {name: found for name, found in axes.items() if found}

    def mismatch(self, inputs: Mapping[str, torch.Tensor]) -> str | None:
        """Why these inputs' shapes are not among those captured, or None if they are."""
        shapes = tuple([inputs[name].shape for name in self.shapes])
        if shapes in self._fitting:
            return None
        reason = self._mismatch(inputs)
        # solving expressions takes longer than a small model runs, and calls come in few shapes
        if reason is None and len(self._fitting) < _MAX_REMEMBERED:
            self._fitting.add(shapes)
        return reason

    def _mismatch(self, inputs: Mapping[str, torch.Tensor]) -> str | None:
        bound: dict[sympy.Symbol, int] = {}
        for name, shape in self.shapes.items():
            if inputs[name].ndim != len(shape):
                return f"{name} has {inputs[name].ndim} dims, captured with {len(shape)}"
            for size, actual in zip(shape, inputs[name].shape, strict=True):
                if isinstance(size, sympy.Symbol):
                    bound.setdefault(size, int(actual))
        for name, shape in self.shapes.items():
            for axis, (size, actual) in enumerate(zip(shape, inputs[name].shape, strict=True)):
                expected = size if isinstance(size, int) else _evaluate(size, int(actual), bound)
                if expected != int(actual):
                    return f"{name} has size {int(actual)} in axis {axis}, captured with {size}"
        for symbol, actual in bound.items():
            low, high = self.ranges.get(str(symbol), (0, None))
            if actual < low or (high is not None and actual > high):
                return f"{symbol} is {actual}, captured for {low} to {'any size' if high is None else high}"
        return None


def _evaluate(size: sympy.Expr, actual: int, bound: dict[sympy.Symbol, int]) -> int | None:
    """The value of a dim's expression, binding its one free symbol from the actual size where that is needed."""
    free = [symbol for symbol in size.free_symbols if symbol not in bound]
    if len(free) == 1:
        solutions = [s for s in sympy.solve(size.subs(bound) - actual, free[0]) if s.is_Integer]
        if not solutions:
            return None
        bound[free[0]] = int(solutions[0])
    value = size.subs(bound)
    return int(value) if value.is_Integer else None
