"""What a set of inputs and of reference outputs is worth: on what a verdict rests, and whether it can rest on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from xform.pipeline.oracle import Outputs
from xform.pipeline.random_inputs import InputCase
from xform.pipeline.tolerance import is_float
from xform.pipeline.verdict import Coverage


def with_sets(coverage: Coverage, cases: Sequence[InputCase]) -> Coverage:
    """The coverage, with these input sets as what was compared on."""
    sources = [case.source.partition(" ")[0] for case in cases]
    numbers: dict[str, set[int]] = {}
    for case in cases:
        for symbol, size in case.sizes.items():
            numbers.setdefault(symbol.lstrip("?"), set()).add(size)
    return replace(
        coverage,
        given=sources.count("given"),
        derived=sources.count("derived"),
        random=sources.count("random"),
        cases=tuple(str(case) for case in cases),
        sizes=tuple(f"{symbol}: {', '.join(map(str, sorted(found)))}" for symbol, found in numbers.items()),
        masks=tuple(dict.fromkeys(style for case in cases for style in case.masks)),
    )


def informative(model: ir.Model, references: Sequence[Outputs]) -> bool:
    """Whether some output can tell right from wrong: a float output with a finite element, or any other output."""
    floats = {v.name for v in model.graph.outputs if v.dtype is not None and is_float(v.dtype)}
    for reference in references:
        for name, array in reference.items():
            if name not in floats or not isinstance(array, np.ndarray):
                return True
            if np.isfinite(array).any():
                return True
    return not model.graph.outputs or all(array.size == 0 for reference in references for array in reference.values())


def has_numbers(outputs: Outputs) -> bool:
    """Whether there is anything to compare: a number, or what is no array."""
    return any(not isinstance(value, np.ndarray) or value.size for value in outputs.values())
