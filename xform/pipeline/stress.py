"""Inputs chosen to break rewrites, made from a set that the model is known to take.

A rewrite that forgets padding, an empty batch, a negative or tiny value or the number that the graph compares with is
right on typical inputs. Many styles go into the rows of one batch, so that they cost one run; where the batch is fixed
they go into as many runs as it takes. What the user gave stays: only sizes and masks are changed then.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from xform.graph.values import Array
from xform.pipeline.input_roles import Role, compared_with, role_of
from xform.pipeline.masks import STYLES, MaskStyle, mask
from xform.pipeline.random_inputs import VERY_NEGATIVE, InputCase, draw, fits, required_inputs, sizes_from
from xform.pipeline.sizes import InputDims, Meaning, Sizes, evaluate, input_dims, meanings

_LARGE = {2: 8.0, 4: 100.0, 8: 100.0}  # by bytes of the float: squares of it must not overflow
_TINY = {2: 1e-2, 4: 1e-4, 8: 1e-4}
_ROW_STYLES = ("large", "zero", "negative", "halves", "typical")
_MIXED = "large, zero, negative and half-integer rows"
_SHARE_AT_LIMITS = 0.3  # of the values that are put where the graph compares
_MAX_STATIC_RUNS = len(STYLES)
_SHORT = 16  # of sequences with one more style of masks, when all styles were tried at their own length


@dataclass(frozen=True)
class _Plan:
    """One set: what rows of masks look like, and what is done to other values."""

    masks: tuple[MaskStyle, ...]
    batch: int | None = None  # None leaves it
    rows: bool = False
    all_values: Literal["", "tiny", "zero"] = ""
    fill: float = VERY_NEGATIVE


class Stress:
    """The sets made from one set of inputs.

    Args:
        model: The captured model.
        base: A set that the model takes; its values stay where the user gave them.
        kept: Names of the inputs that the user gave.
        batch_is_free: Whether a dynamic batch may get another number.
        seed: The same seed gives the same sets.
    """

    def __init__(
        self, model: ir.Model, base: InputCase, kept: Mapping[str, Any], *, batch_is_free: bool, seed: int
    ) -> None:
        self._inputs = required_inputs(model)
        self._base = base
        self._kept = kept
        self._seed = seed
        self._dims = _with_ranks(input_dims(self._inputs), base)
        self._roles = {value.name or "": role_of(value) for value in self._inputs}
        self._limits = {value.name or "": compared_with(value) for value in self._inputs}
        self._known = {**sizes_from(base.arrays, self._dims), **base.sizes}
        means = meanings(self._dims)
        self._batch = [s for s in means if means[s] == "batch" and s in self._known] if batch_is_free else []
        self._means = means

    @property
    def has_masks(self) -> bool:
        """Whether some input is a mask, or tells by a number which of its elements count."""
        return any(self._is_mask(name) for name in self._roles)

    def cases(self) -> Iterator[tuple[InputCase, ...]]:
        """The sets, the most telling first, each in the forms to try until the model takes one, the fastest first."""
        resizable = self._batch and self.has_masks
        short = {s: min(n, _SHORT) for s, n in self._known.items() if resizable and self._means[s] == "sequence"}
        for number, plan in enumerate(self._plans()):
            lengths = ({**self._known, **short}, self._known) if number else (self._known,)
            forms = [self._case(plan, number, sizes) for sizes in lengths]
            found = tuple(form for form in forms if form is not None)
            if found:
                yield found[:1] if short.items() <= self._known.items() else found

    def resized(self) -> Iterator[InputCase]:
        """The base at other sizes of its dynamic dims: tiled or cut along them, the same for every input."""
        seen = [self._known]
        for grow in (_longer, _shorter, _double, _half):
            sizes = {symbol: grow(self._means.get(symbol, "other"), size) for symbol, size in self._known.items()}
            if sizes not in seen and fits(self._dims, sizes):
                seen.append(sizes)
                yield replace(self._base, arrays=self._at(sizes), sizes=sizes, source=self._source)

    @property
    def _source(self) -> str:
        return "derived" if self._kept else self._base.source

    def _plans(self) -> list[_Plan]:
        plans = []
        values = self._has_free_values()
        if self._batch:
            plans.append(_Plan(STYLES, len(STYLES), rows=True, fill=-np.inf))
            plans.append(_Plan(("right-padded",), 1))
        elif self.has_masks:
            rows = max(self._rows(), 1)
            for first in range(0, min(len(STYLES), rows * _MAX_STATIC_RUNS), rows):
                styles = (STYLES + STYLES)[first : first + rows]
                plans.append(_Plan(styles, rows=first == 0, fill=-np.inf if first else float(np.finfo("f").min)))
        elif values:
            plans.append(_Plan(("full",), rows=True))
        if values:
            plans.append(_Plan(("full", "right-padded"), all_values="tiny"))
            plans += [] if self._batch else [_Plan(("full",), all_values="zero")]
        if self.has_masks and (self._batch or self._rows() > 1):
            plans.append(_Plan(("empty",), fill=float(np.finfo("f").min)))
        if self._batch:
            plans.append(_Plan(("full",), 0))
        return plans

    def _case(self, plan: _Plan, number: int, known: Sizes) -> InputCase | None:
        sizes = {**known, **{s: plan.batch for s in self._batch if plan.batch is not None}}
        if not fits(self._dims, sizes):
            return None
        arrays = self._at(sizes)
        free = False
        for value, entry in zip(self._inputs, self._dims, strict=True):
            name = value.name or ""
            shape = tuple(max(evaluate(dim, sizes), 0) for dim in entry.dims or ())
            rng = np.random.default_rng([self._seed, 0x73747273, number, zlib.crc32(name.encode())])
            array = arrays[name]
            if not isinstance(array, np.ndarray) or array.shape != shape:
                continue
            if self._is_mask(name):
                arrays[name] = self._masked(rng, array, self._roles[name], self._limits[name], plan)
            elif name not in self._kept:
                arrays[name], changed = self._restyled(rng, array, self._roles[name], self._limits[name], plan)
                free = free or changed
        words = []
        if free:
            words.append(f"{plan.all_values} values" if plan.all_values else _MIXED)
        if plan.batch == 0:
            words.append("an empty batch")
        styles = _used(plan.masks, sizes[self._batch[0]] if self._batch else self._rows()) if self.has_masks else ()
        shown = {s: n for s, n in sizes.items() if s in self._known}
        return InputCase(arrays, shown, self._source, styles, ", ".join(words), free or plan.batch == 0)

    def _at(self, sizes: Sizes) -> dict[str, Any]:
        """The base at other sizes; drawn anew where nothing was given, so that rows differ."""
        arrays = dict(self._base.arrays)
        unknown = [entry for entry in self._dims if entry.dims is None]
        if not self._kept and not unknown:
            return draw(self._inputs, self._dims, sizes, {**self._roles}, [self._seed, 7], {})
        for entry in self._dims:
            array = arrays.get(entry.name)
            if not isinstance(array, np.ndarray) or entry.dims is None:
                continue
            for axis, dim in enumerate(entry.dims):
                length = max(evaluate(dim, sizes), 0)
                if array.shape[axis] != length and (array.shape[axis] or not length):
                    array = np.take(array, np.arange(length) % max(array.shape[axis], 1), axis=axis)
            arrays[entry.name] = array
        return arrays

    def _is_mask(self, name: str) -> bool:
        role = self._roles[name]
        return role.kind in ("mask", "additive_mask") or (role.kind == "index" and bool(self._limits[name]))

    def _rows(self) -> int:
        """Rows of the masks of a fixed batch."""
        masks = [self._base.arrays[name] for name in self._roles if self._is_mask(name)]
        return max((array.shape[0] for array in masks if getattr(array, "ndim", 0) > 1), default=1)

    def _has_free_values(self) -> bool:
        return any(
            self._roles[name].kind in ("plain", "positive")
            and name not in self._kept
            and isinstance(array, np.ndarray)
            and (array.dtype.kind == "f" or (array.dtype.kind == "i" and array.dtype.itemsize > 1))
            for name, array in self._base.arrays.items()
            if name in self._roles
        )

    def _masked(self, rng: np.random.Generator, array: Array, role: Role, limits: Sequence[float], plan: _Plan) -> Any:
        seen = mask(rng, array.shape, plan.masks)
        if role.kind == "additive_mask":
            lowest = float(np.finfo(array.dtype).min)
            return np.where(seen, 0.0, max(plan.fill, lowest) if np.isfinite(plan.fill) else plan.fill).astype(
                array.dtype
            )
        if role.kind == "index":
            return np.where(seen, array, np.asarray(limits[0]).astype(array.dtype))
        return seen.astype(array.dtype)

    def _restyled(
        self, rng: np.random.Generator, array: Array, role: Role, limits: Sequence[float], plan: _Plan
    ) -> tuple[Any, bool]:
        if role.kind not in ("plain", "positive") or array.dtype.kind not in "fi" or array.dtype.itemsize < 2:
            return array, False
        if not (plan.rows or plan.all_values):
            return array, False
        tiny = plan.all_values == "tiny"
        if array.dtype.kind == "i":
            return _with_limits(rng, array - 5 if tiny and role.kind == "plain" else array, limits), False
        size = array.dtype.itemsize
        if plan.all_values:
            return (array * (_TINY[size] if tiny else 0.0)).astype(array.dtype), True
        factor = np.ones(_styled_axis(array.shape))
        factors = {"large": _LARGE[size], "zero": 0.0, "negative": -1.0, "halves": 2.0}
        for row in range(factor.size):
            factor.reshape(-1)[row] = factors.get(_ROW_STYLES[row % len(_ROW_STYLES)], 1.0)
        found = np.where(factor < 0, -np.abs(array), array * np.abs(factor))
        found = np.where(factor == 2.0, np.round(found) / 2, found)  # ties of rounding and of comparisons
        if role.kind == "positive":
            found = np.abs(found) + 1e-6
        return _with_limits(rng, found.astype(array.dtype), limits), True


def _styled_axis(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the factors of rows: along the first axis with room for all styles, but for the last one; else that."""
    places = [axis for axis, size in enumerate(shape[:-1]) if size >= len(_ROW_STYLES)]
    chosen = places[0] if places else len(shape) - 1
    return tuple(size if axis == chosen else 1 for axis, size in enumerate(shape))


def _with_limits(rng: np.random.Generator, array: Array, limits: Sequence[float]) -> Array:
    """Some values put at the numbers that the graph compares with, and beside them."""
    if not limits or not array.size:
        return array
    near = [number + step for number in limits for step in (0, 1, -1)]
    if array.dtype.kind == "i":
        info = np.iinfo(array.dtype)
        near = [number for number in near if info.min < number < info.max]
    chosen = rng.choice(np.asarray(near or [0.0]), array.shape)
    return np.where(rng.random(array.shape) < _SHARE_AT_LIMITS, chosen, array).astype(array.dtype)


def _used(styles: Sequence[str], rows: int) -> tuple[str, ...]:
    return tuple(styles[: max(rows, 0)]) if rows < len(styles) else tuple(styles)


def _with_ranks(dims: Sequence[InputDims], base: InputCase) -> list[InputDims]:
    """Dims of the inputs; where even the rank is unknown, those of the base, fixed."""
    return [
        entry if entry.dims is not None else InputDims(entry.name, tuple(np.shape(base.arrays.get(entry.name, ()))))
        for entry in dims
    ]


def _longer(meaning: Meaning, size: int) -> int:
    return {"batch": size + 1, "channels": size, "heads": size, "space": 2 * size}.get(meaning, size + size // 2 + 1)


def _shorter(meaning: Meaning, size: int) -> int:
    short = max(size - size // 3 - 1, 1)
    return {"batch": size + 1, "channels": size, "heads": size, "space": max(size // 2, 1)}.get(meaning, short)


def _double(meaning: Meaning, size: int) -> int:
    return size if meaning in ("channels", "heads") else 2 * size


def _half(meaning: Meaning, size: int) -> int:
    return size if meaning in ("channels", "heads") else max(size // 2, 1)
