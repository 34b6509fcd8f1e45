"""Seeded random inputs that a model can take: right dtypes, consistent dynamic dims, values in range."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.values import Array
from xform.pipeline.input_roles import Role, role_of
from xform.pipeline.masks import TYPICAL, mask
from xform.pipeline.oracle import to_numpy
from xform.pipeline.sizes import InputDims, Sizes, evaluate, input_dims, proposals, symbols_of

Style = Literal["typical", "binary", "unit", "zeros", "ones"]

_STYLES: tuple[Style, ...] = ("binary", "unit", "zeros", "ones")  # for models that take no typical values
_STYLED_SIZES = 2
_UNKNOWN_INDEX_BOUND = 16
_UNKNOWN_RANKS = (2, 4, 3, 1, 0)
MAX_ELEMENTS = 1 << 25  # drawn for one set of inputs; beyond that sizes are a mistake, or nothing for this machine
VERY_NEGATIVE = -10000.0  # finite in float16, and e^-10000 is 0 in every dtype


@dataclass(frozen=True)
class InputCase:
    """One set of inputs.

    Attributes:
        arrays: Value of every required input by name.
        sizes: Number of every dynamic dim, empty for static models and for the user's inputs.
        source: "given" by the user, "derived" from what the user gave, "random", or "random" and the style of its
            values.
        masks: Styles of the rows of masks, where the model has masks.
        values: What is special about the other values, in words.
        extreme: Whether it has values that an approximation need not serve: very large, tiny, or none at all.
    """

    arrays: Mapping[str, Any]
    sizes: Mapping[str, int] = field(default_factory=dict)
    source: str = "random"
    masks: tuple[str, ...] = ()
    values: str = ""
    extreme: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether some dynamic dim is 0."""
        return 0 in self.sizes.values()

    @property
    def numel(self) -> int:
        """Elements of all arrays."""
        return sum(array.size for array in self.arrays.values() if isinstance(array, np.ndarray))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name.lstrip('?')}={size}" for name, size in self.sizes.items())
        masks = f"masks {', '.join(self.masks)}" if self.masks else ""
        about = "; ".join(filter(None, [sizes, masks, self.values]))
        return f"{self.source} inputs" + (f" with {about}" if about else "")


def required_inputs(model: ir.Model) -> list[ir.Value]:
    """Graph inputs that the caller must give: those without a default among the initializers."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def is_dynamic(model: ir.Model) -> bool:
    """Whether some input dim is not a number."""
    dims = input_dims(required_inputs(model))
    return bool(symbols_of(dims)) or any(entry.dims is None for entry in dims)


def random_inputs(
    model: ir.Model, seed: int = 0, sizes: Mapping[str, int] | None = None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The most plausible random inputs of a model.

    Args:
        model: The model; its graph tells the value ranges.
        seed: The same seed and model give the same numbers.
        sizes: Numbers for dynamic dims by name.
        overrides: Values for some inputs, used as they are.

    Raises:
        UsageError: `sizes` or `overrides` names what the model does not have, or contradicts its shapes.
    """
    case = next(candidate_cases(model, seed, sizes, overrides), None)
    if case is None:
        raise UsageError(
            f"no random inputs of at most {MAX_ELEMENTS} elements fit the declared shapes",
            hint="give inputs, or sizes of dynamic dims",
        )
    return dict(case.arrays)


def candidate_cases(
    model: ir.Model,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[InputCase]:
    """Input sets in order of plausibility; the model may refuse some, so take them until enough have run."""
    inputs = required_inputs(model)
    given = check_named(model, overrides or {})
    dims = input_dims(inputs)
    fixed = {**sizes_from(given, dims), **_check_sizes(sizes or {}, dims)}
    roles = {value.name or "": role_of(value) for value in inputs}
    if all(value.name in given for value in inputs):
        yield InputCase(given, sizes_from(given, dims), "given")
        return
    ranks: Sequence[int] = _UNKNOWN_RANKS if any(entry.dims is None for entry in dims) else (0,)
    for rank in ranks:
        known = [_with_rank(entry, rank) for entry in dims]
        for number, assignment in enumerate(proposals(known, fixed)):
            if not fits(known, assignment):
                continue
            yield InputCase({**given, **draw(inputs, known, assignment, roles, [seed, number], given)}, assignment)
        for style in _STYLES:
            for number, assignment in enumerate(islice(proposals(known, fixed), _STYLED_SIZES)):
                if not fits(known, assignment):
                    continue
                arrays = draw(inputs, known, assignment, roles, [seed, number], given, style)
                yield InputCase({**given, **arrays}, assignment, f"random {style}")


def fits(dims: Sequence[InputDims], sizes: Sizes) -> bool:
    """Whether inputs of these sizes exist, and can be drawn in reasonable memory."""
    try:
        counts = [math.prod(max(evaluate(dim, sizes), 0) for dim in entry.dims or ()) for entry in dims]
    except (KeyError, ArithmeticError):
        return False
    return sum(counts) <= MAX_ELEMENTS


def draw(
    inputs: Sequence[ir.Value],
    dims: Sequence[InputDims],
    sizes: Sizes,
    roles: Mapping[str, Role],
    seed: Sequence[int],
    given: Mapping[str, Any],
    style: Style = "typical",
) -> dict[str, Any]:
    """Values of the inputs that are not given."""
    arrays = {}
    for value, entry in zip(inputs, dims, strict=True):
        if value.name is None or value.name in given:
            continue
        shape = tuple(max(evaluate(dim, sizes), 0) for dim in entry.dims or ())
        rng = np.random.default_rng([*seed, zlib.crc32(value.name.encode())])
        drawn = _random_value(rng, value, shape, roles[value.name])
        arrays[value.name] = drawn if style == "typical" else _restyle(rng, drawn, style)
    return arrays


def _restyle(rng: np.random.Generator, drawn: Any, style: Style) -> Any:
    """Values of the same dtype and shape from a narrower range: integers of 0 and 1, floats in (0, 1), zeros, ones."""
    if isinstance(drawn, list):
        return [_restyle(rng, element, style) for element in drawn]
    if not isinstance(drawn, np.ndarray) or drawn.dtype.kind not in "iuf":
        return drawn
    if style in ("zeros", "ones"):
        return np.full_like(drawn, int(style == "ones")) if drawn.dtype.kind in "iu" else drawn
    if style == "binary":
        return rng.integers(0, 2, drawn.shape).astype(drawn.dtype) if drawn.dtype.kind in "iu" else drawn
    return np.asarray(rng.uniform(0.01, 1.0, drawn.shape)).astype(drawn.dtype) if drawn.dtype.kind == "f" else drawn


def check_named(model: ir.Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """The user's inputs as arrays, which must have the declared dtypes.

    Raises:
        UsageError: For a name that is no input, a rank or static dim that contradicts the model, or another dtype.
    """
    values = {value.name or "": value for value in model.graph.inputs}
    arrays = {}
    for name, array in given.items():
        if name not in values:
            close = get_close_matches(name, values, n=1)
            raise UsageError(
                f"the model has no input named {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"its inputs are: {', '.join(values) or 'none'}",
            )
        arrays[name] = _conform(to_numpy(array), values[name])
    return arrays


def _conform(array: Any, value: ir.Value) -> Any:
    if not isinstance(array, np.ndarray) or value.dtype is None or not isinstance(value.type, ir.TensorType):
        return array
    shape = value.shape
    if shape is not None:
        static = [dim if isinstance(dim, int) else None for dim in shape.dims]
        wrong = len(static) != array.ndim or any(
            dim is not None and dim != size for dim, size in zip(static, array.shape, strict=False)
        )
        if wrong:
            raise UsageError(f"input {value.name!r} has shape {shape}, but an array of shape {array.shape} was given")
    if (value.dtype == ir.DataType.STRING) != (array.dtype.kind in "OSU"):
        declared = "text" if value.dtype == ir.DataType.STRING else value.dtype.name.lower()
        raise UsageError(f"input {value.name!r} is {declared}, but an array of {array.dtype} was given")
    if value.dtype == ir.DataType.STRING or not _has_numpy_type(value.dtype):
        return array
    wanted = value.dtype.numpy()
    if array.dtype != wanted:  # a runtime refuses it, too; and bytes given for floats are often not scaled yet
        raise UsageError(
            f"input {value.name!r} is {wanted}, but an array of {array.dtype} was given",
            hint=f"convert it, for example with .astype({wanted.name!r})",
        )
    return array


def sizes_from(given: Mapping[str, Any], dims: Sequence[InputDims]) -> Sizes:
    """Sizes of symbols that the user's arrays decide."""
    sizes: Sizes = {}
    for entry in dims:
        array = given.get(entry.name)
        if isinstance(array, np.ndarray) and entry.dims is not None:
            sizes.update({d: n for d, n in zip(entry.dims, array.shape, strict=False) if isinstance(d, str)})
    return sizes


def check_sizes(model: ir.Model, sizes: Mapping[str, int] | None) -> None:
    """Refuse sizes of dims that no input has, with a UsageError that names those that there are."""
    _check_sizes(sizes or {}, input_dims(required_inputs(model)))


def _check_sizes(sizes: Mapping[str, int], dims: Sequence[InputDims]) -> Sizes:
    symbols = symbols_of(dims)
    for name in sizes:
        if name not in symbols:
            known = ", ".join(s for s in symbols if not s.startswith("?")) or "none"
            raise UsageError(f"the model has no dynamic dimension named {name!r}", hint=f"it has: {known}")
    return dict(sizes)


def _with_rank(entry: InputDims, rank: int) -> InputDims:
    if entry.dims is not None:
        return entry
    names = ("?batch", "?channels", "?space2", "?space3") if rank == 4 else ("?batch", "?sequence", "?other2")
    return InputDims(entry.name, names[:rank])


def _has_numpy_type(dtype: ir.DataType) -> bool:
    return dtype.bitwidth >= 8 and dtype.numpy().isbuiltin == 1


def _random_value(rng: np.random.Generator, value: ir.Value, shape: tuple[int, ...], role: Role) -> Any:
    kind = value.type
    if isinstance(kind, ir.SequenceType):
        return [_random_array(rng, kind.dtype, shape, role) for _ in range(2)]
    return _random_array(rng, value.dtype or ir.DataType.FLOAT, shape, role)


def _random_array(rng: np.random.Generator, dtype: ir.DataType, shape: tuple[int, ...], role: Role) -> Any:
    if dtype == ir.DataType.STRING:
        words = np.array(["the", "quick", "brown", "fox", ""], dtype=object)
        return rng.choice(words, size=shape)
    if role.kind == "mask" or dtype == ir.DataType.BOOL:
        return mask(rng, shape, TYPICAL).astype(numpy_type(dtype))
    if dtype.is_integer():
        return _integers(rng, dtype, shape, role)
    return _floats(rng, dtype, shape, role)


def numpy_type(dtype: ir.DataType) -> np.dtype[Any]:
    """The dtype to feed: the declared one, or float32 where NumPy has no such type (cast in the graph)."""
    return dtype.numpy() if _has_numpy_type(dtype) else np.dtype(np.float32)


def _integers(rng: np.random.Generator, dtype: ir.DataType, shape: tuple[int, ...], role: Role) -> Array:
    if role.kind == "index":
        high = role.high if role.high is not None else _UNKNOWN_INDEX_BOUND
        return rng.integers(0, max(high, 1), size=shape).astype(dtype.numpy())
    if role.kind == "size":
        return rng.integers(1, 4, size=shape).astype(dtype.numpy())
    if dtype.bitwidth == 8:
        info = np.iinfo(dtype.numpy())
        return rng.integers(info.min, info.max + 1, size=shape).astype(dtype.numpy())
    low, high = ((0, 8) if dtype.bitwidth < 8 else (0, 10)) if role.kind == "plain" else (1, 10)
    return rng.integers(low, high, size=shape).astype(dtype.numpy())


def _floats(rng: np.random.Generator, dtype: ir.DataType, shape: tuple[int, ...], role: Role) -> Array:
    target = numpy_type(dtype)
    if role.kind == "additive_mask":
        return np.where(mask(rng, shape, TYPICAL), 0.0, VERY_NEGATIVE).astype(target)
    if target.kind == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(target)
    normal = np.asarray(rng.standard_normal(shape))
    return (np.abs(normal) + 1e-3 if role.kind == "positive" else normal).astype(target)
