"""Calibration batches from what the user gives: a file, a folder, an iterable, or nothing."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.pipeline.oracle import to_numpy
from xform.pipeline.random_inputs import random_inputs, required_inputs

MAX_BATCHES = 16  # read of an iterable or a folder; more costs time and changes little
RANDOM_BATCHES = 4
WARNING = (
    "CALIBRATED ON RANDOM DATA: no calibration was given, so which layers tolerate int8 was judged on random inputs; "
    "give calibration= (an .npz, a folder of them, or an iterable of inputs) before relying on the accuracy"
)

Batch = dict[str, Any]
Flatten = Callable[[Any], Mapping[str, Any]]  # one sample in the caller's form to graph inputs by name


def calibration_batches(model: ir.Model, given: Any, flatten: Flatten | None = None) -> tuple[list[Batch], str]:
    """Batches by input name, and a warning, empty if there is none.

    Args:
        model: The captured graph.
        given: An `.npz` file with one array per input; a folder of such files; a dict of arrays; an iterable of dicts,
            or of what `flatten` takes; None for seeded random inputs.
        flatten: For a module, turns the arguments of a call into graph inputs.

    Raises:
        UsageError: Nothing usable was given, or an input is missing.
    """
    if given is None:
        return [random_inputs(model, seed) for seed in range(1, RANDOM_BATCHES + 1)], WARNING
    if isinstance(given, str | os.PathLike):
        batches = [_read(path) for path in _files(Path(given))]
    elif isinstance(given, Mapping):
        batches = [dict(given)]
    elif isinstance(given, Iterable):
        batches = [_named(one, flatten) for one in islice(given, MAX_BATCHES)]
    else:
        raise UsageError(
            f"calibration is a {type(given).__name__}",
            hint="give an .npz file, a folder of them, or an iterable of inputs",
        )
    if not batches:
        raise UsageError("the calibration data is empty")
    return [_complete(model, batch) for batch in batches], ""


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.npz"))[:MAX_BATCHES]
        if not found:
            raise UsageError("the calibration folder holds no .npz file", where=str(path))
        return found
    return [path]


def _read(path: Path) -> Batch:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UsageError("calibration data is no .npz archive", where=str(path))
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"calibration data could not be read: {error}", where=str(path)) from error


def _named(one: Any, flatten: Flatten | None) -> Batch:
    if flatten is not None:
        return dict(flatten(one))
    if isinstance(one, Mapping):
        return dict(one)
    raise UsageError(
        f"a calibration sample is a {type(one).__name__}", hint="give dicts of input name to array for an ONNX model"
    )


def _complete(model: ir.Model, batch: Batch) -> Batch:
    """The inputs that the graph has, as arrays; what it does not read (a tokenizer gives more) is left out."""
    missing = [value.name for value in required_inputs(model) if value.name not in batch]
    if missing:
        known = ", ".join(value.name or "" for value in required_inputs(model))
        raise UsageError(f"calibration data lacks input {missing[0]!r}", hint=f"the inputs are: {known}")
    return {value.name or "": to_numpy(batch[value.name]) for value in model.graph.inputs if value.name in batch}
