"""Calibration batches from what the user gives: a file, a folder, an iterable, or nothing.

Every sample is held against the inputs of the graph before anything runs on it: names, dtypes, ranks, fixed sizes, and
numbers that are finite. What passes and yet cannot tell much (zeros, one number everywhere) is told as a warning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError, XformError
from xform.limits import Unpacked
from xform.npz import read_npz
from xform.pipeline.oracle import to_numpy
from xform.pipeline.random_inputs import random_inputs, required_inputs
from xform.pipeline.sizes import input_dims, meanings, names_in
from xform.tell import tell
from xform.text import shown

_ROWS = 8  # of a batch that a result is compared on
MAX_BATCHES = 16  # read of an iterable or a folder; more costs time and changes little
RANDOM_BATCHES = 4
WARNING = (
    "CALIBRATED ON RANDOM DATA: no calibration was given, so which layers tolerate int8 was judged on random inputs; "
    "give calibration= with real inputs before relying on the accuracy"
)
_FILE = "the calibration file"
_FORMS = "give an .npz file, a folder of them, or an iterable of inputs"

Batch = dict[str, Any]
Flatten = Callable[[Any], Mapping[str, Any]]  # one sample in the caller's form to graph inputs by name


def calibration_batches(model: ir.Model, given: Any, flatten: Flatten | None = None) -> tuple[list[Batch], str]:
    """Batches by input name, and what the user should know about them, which is told; empty if there is nothing.

    Args:
        model: The captured graph.
        given: An `.npz` file with one array per input; a folder of such files; a dict of arrays; an iterable of dicts,
            or of what `flatten` takes; None for seeded random inputs.
        flatten: For a module, turns the arguments of a call into graph inputs.

    Raises:
        UsageError: Nothing usable was given: an input is missing, empty, not finite, or of another dtype, rank or size.
        LimitError: The files hold more than the limit "memory".
    """
    if given is None:
        tell(WARNING)
        return [random_inputs(model, seed) for seed in range(1, RANDOM_BATCHES + 1)], WARNING
    batches, unread = [], dict[str, None]()
    for place, sample in _samples(given, flatten):
        batches.append(_checked(model, sample, place))
        unread.update(dict.fromkeys(shown(name) for name in sample if name not in batches[-1]))
    if not batches:
        raise UsageError("the calibration data is empty", hint=_FORMS)
    warnings = list(_says_little(model, batches))
    if unread and flatten is None:  # a module's arguments that its graph does not read are no inputs of a graph
        names = ", ".join(map(repr, list(unread)[:8]))
        warnings.append(f"the calibration data holds {names}, which is no input of the model, and was left out")
    for warning in warnings:
        tell(warning)
    return batches, "; ".join(warnings)


def first_rows(model: ir.Model, batch: Batch) -> Batch:
    """A few samples of a batch: it is cut where every input leads with the dynamic batch dim, and else stays whole.

    An input of whole numbers without that dim may hold places in the batch, and a dim that is computed from it (2*N)
    would have to be cut along with it.
    """
    values = [value for value in model.graph.inputs if value.name in batch]
    entries = input_dims(values)
    batched = {dim for dim, meaning in meanings(entries).items() if meaning == "batch"}
    leading = {str(entry.dims[0]) for entry in entries if entry.dims and str(entry.dims[0]) in batched}
    if len(leading) != 1:
        return batch
    (dim,) = leading
    settings = []  # numbers that hold for all samples
    for value, entry in zip(values, entries, strict=True):
        if not isinstance(batch[entry.name], np.ndarray) or entry.dims is None:
            return batch
        mentions = [axis for axis, one in enumerate(entry.dims) if isinstance(one, str) and dim in names_in(one)]
        if not mentions and (value.dtype is None or value.dtype.is_floating_point()):
            settings.append(entry.name)
        elif mentions != [0] or str(entry.dims[0]) != dim:
            return batch
    return {name: array if name in settings else array[:_ROWS] for name, array in batch.items()}


def _samples(given: Any, flatten: Flatten | None) -> Iterator[tuple[str, Batch]]:
    """Each sample, with the place where it comes from for errors."""
    if isinstance(given, str | os.PathLike):
        kept: list[Unpacked] = []
        for path in _files(Path(given)):
            kept.append(read_npz(path, _FILE, kept))
            yield str(path), kept[-1]
    elif isinstance(given, Mapping):
        yield "calibration", dict(given)
    elif isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | np.ndarray):
        for index, one in enumerate(_iterated(given)):
            place = f"calibration sample {index}"
            yield place, _named(one, flatten, place)
    else:
        raise UsageError(f"calibration is a {type(given).__name__}", hint=_FORMS)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.npz"))[:MAX_BATCHES]
        if not found:
            raise UsageError("the calibration folder holds no .npz file", where=str(path))
        return found
    return [path]


def _iterated(given: Iterable[Any]) -> Iterator[Any]:
    """The first samples; an error that the user's iterable raises is told as one of the calibration data."""
    count = 0
    try:
        for one in islice(given, MAX_BATCHES):
            yield one
            count += 1
    except XformError:
        raise
    except Exception as error:
        raise UsageError(
            f"the calibration iterable raised {type(error).__name__} after {count} samples: {error}",
            hint="iterate over it without xform to see the error in full",
        ) from error


def _named(one: Any, flatten: Flatten | None, place: str) -> Batch:
    if flatten is None:
        if isinstance(one, Mapping):
            return dict(one)
        raise UsageError(
            f"{place} is a {type(one).__name__}",
            hint="give dicts of input name to array for an ONNX model; "
            "of pairs with labels: calibration=({'x': x} for x, _ in loader)",
        )
    try:
        return dict(flatten(one))
    except (XformError, TypeError, ValueError, AttributeError) as error:
        reason = error.what if isinstance(error, XformError) else str(error)
        raise UsageError(
            f"{place} does not fit the call of the model: {reason}",
            hint="a sample is the arguments of one call; of a loader that gives labels too: "
            "calibration=(x for x, _ in loader)",
        ) from error


def _checked(model: ir.Model, batch: Batch, place: str) -> Batch:
    """The inputs that the graph has, as arrays; what it does not read (a tokenizer gives more) is left out."""
    required = [value.name or "" for value in required_inputs(model)]
    missing = [name for name in required if name not in batch]
    if missing:
        close = get_close_matches(missing[0], [str(name) for name in batch], n=1)
        like = f"; did you mean it by {close[0]!r}?" if close else ""
        raise UsageError(
            f"the calibration data has no input {missing[0]!r}",
            where=place,
            hint=f"the inputs are: {', '.join(map(shown, required))}{like}",
        )
    given = {value.name or "": value for value in model.graph.inputs if value.name in batch}
    return {name: _array(value, batch[name], place) for name, value in given.items()}


def _array(value: ir.Value, given: Any, place: str) -> Any:
    """One input as an array of its declared dtype. Raises UsageError where it does not fit."""
    what = f"calibration input {value.name!r}"
    if not isinstance(value.type, ir.TensorType):
        return to_numpy(given)  # a sequence or an optional: the runtime checks it
    plain = isinstance(given, list | tuple | int | float | bool)  # whose numbers have no dtype of their own
    try:
        array = np.asarray(given) if plain else to_numpy(given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} is not an array: {error}", where=place) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{what} is a {type(given).__name__}, not an array", where=place)
    array = _as_declared(array, value.dtype, plain, what, place)
    _check_shape(array, value.shape, what, place)
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        count, what_of = int((~np.isfinite(array)).sum()), "NaN" if np.isnan(array).any() else "infinite numbers"
        raise UsageError(
            f"{what} holds {what_of}: {count:,} of {array.size:,} numbers are not finite",
            where=place,
            hint="leave such samples out: ranges and errors measured on them mean nothing",
        )
    return array


def _as_declared(array: Any, dtype: ir.DataType | None, plain: bool, what: str, place: str) -> Any:
    if dtype is None:
        return array
    if dtype is ir.DataType.STRING:
        if array.dtype.kind in "OSU":
            return array
        raise UsageError(f"{what} is {array.dtype}, the model takes strings", where=place)
    declared = dtype.numpy()
    if array.dtype.kind == "V" and array.dtype.itemsize == declared.itemsize and not array.dtype.fields:
        return array.view(declared).astype(np.float32)  # how numpy stores bfloat16 and float8
    if array.dtype == declared or (declared.kind == "V" and array.dtype == np.float32):
        return array
    if plain and array.dtype.kind in "biuf" and (array.dtype.kind in "biu" or declared.kind == "f"):
        return array.astype(declared)
    raise UsageError(
        f"{what} is {array.dtype}, the model takes {dtype.name.lower()}",
        where=place,
        hint=f"convert it, for example with .astype({declared})",
    )


def _check_shape(array: Any, shape: ir.Shape | None, what: str, place: str) -> None:
    if shape is not None:
        fits = len(shape) == array.ndim and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise UsageError(f"{what} has shape {list(array.shape)}, the model takes {shape}", where=place)
    if not array.size:
        raise UsageError(
            f"{what} is empty: its shape is {list(array.shape)}", where=place, hint="leave out samples without rows"
        )


def _says_little(model: ir.Model, batches: Sequence[Batch]) -> Iterator[str]:
    """Warnings about inputs that are one number in all samples."""
    constant: dict[str, Any] = {}
    names = dict.fromkeys(name for batch in batches for name in batch)
    for name in names:
        arrays = [batch[name] for batch in batches if name in batch]
        if all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in arrays):
            first = arrays[0].reshape(-1)[0]
            if sum(array.size for array in arrays) > 1 and all((array == first).all() for array in arrays):
                constant[name] = first
    floats = {value.name for value in model.graph.inputs if value.dtype is not None and value.dtype.is_floating_point()}
    for name, number in constant.items():
        if name in floats or len(constant) == len(names):
            yield (
                f"calibration input {shown(name)!r} is {number} everywhere in all samples: what int8 does to the model "
                "cannot be judged on that; give inputs like those that the model will see"
            )


__all__ = ["MAX_BATCHES", "RANDOM_BATCHES", "WARNING", "Batch", "Flatten", "calibration_batches", "first_rows"]
