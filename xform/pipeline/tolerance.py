"""Tolerances of verification, explicit per dtype and fidelity, and the error measure they apply to.

Error measure. For a reference output `b` and a candidate output `a`, with a scale `s_i` for every element:

- What `s_i` is depends on who is judged (`scope_of`). Exact rewrites: the largest magnitude within four values of `b_i`
  (`xform.pipeline.neighbourhood`). Approximate ones, and exact ones under a tolerance of the user: the largest of the
  slice along the last axis. Approximate ones under a tolerance of the user (int8): the scale of the whole output.
- Absolute error: `e_i = |a_i - b_i|`. Relative error: `e_i / (max(s_i, |b_i|) + atol / rtol)`. Both are reported as
  their maximum.
- An element agrees where `e_i <= atol + rtol * max(s_i, |b_i|)`, that is, where the relative error is at most rtol. NaN
  must meet NaN, an infinity the same infinity.
- `atol` is what the table says for outputs of magnitude 1 and more; for smaller outputs it shrinks in proportion.

Why these numbers. An exact pass reorders float operations; reordering a reduction of n terms changes a result by
about sqrt(n) units of roundoff u, and the networks we meet chain some 10^2 of them: 1e-4 is about 800 u of float32.

| dtype of the computation | unit roundoff u | exact: rtol, atol | approximate: rtol, atol |
|---|---|---|---|
| float64  | 1.1e-16 | 1e-9, 1e-12   | 1e-3, 1e-6 |
| float32  | 6.0e-8  | 1e-4, 1e-6    | 1e-2, 1e-5 |
| float16  | 4.9e-4  | 2e-2, 1e-3    | 5e-2, 5e-3 |
| bfloat16 | 3.9e-3  | 6e-2, 1e-2    | 1e-1, 2e-2 |
| float8   | 6.3e-2  | 2.5e-1, 6e-2  | 5e-1, 1e-1 |
| integers, bool, strings | 0 | equal | equal |

Trained passes change what the network computes by intent, so their numbers are judged by a metric of the task and
never by this table: asking for their tolerance is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.values import Array
from xform.pipeline.neighbourhood import Scope, scales
from xform.rewrite.passes import Fidelity


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference: `|a - b| <= atol + rtol * max(scale, |b|)`.

    Attributes:
        rtol: Relative part, dimensionless.
        atol: Absolute part, in units of the output.
    """

    rtol: float
    atol: float


UserTolerance = float | Tolerance | Mapping[str, float | Tolerance]

EXACTLY_EQUAL = Tolerance(0.0, 0.0)
_TABLE: dict[Fidelity, dict[ir.DataType, Tolerance]] = {
    "exact": {
        ir.DataType.DOUBLE: Tolerance(1e-9, 1e-12),
        ir.DataType.FLOAT: Tolerance(1e-4, 1e-6),
        ir.DataType.FLOAT16: Tolerance(2e-2, 1e-3),
        ir.DataType.BFLOAT16: Tolerance(6e-2, 1e-2),
    },
    "approximate": {
        ir.DataType.DOUBLE: Tolerance(1e-3, 1e-6),
        ir.DataType.FLOAT: Tolerance(1e-2, 1e-5),
        ir.DataType.FLOAT16: Tolerance(5e-2, 5e-3),
        ir.DataType.BFLOAT16: Tolerance(1e-1, 2e-2),
    },
}
_VALUE_FREE = frozenset({"Shape", "Size"})  # depend on the shape of their input alone
_FLOAT8: dict[Fidelity, Tolerance] = {"exact": Tolerance(2.5e-1, 6e-2), "approximate": Tolerance(5e-1, 1e-1)}
_COMPLEX = {ir.DataType.COMPLEX64: ir.DataType.FLOAT, ir.DataType.COMPLEX128: ir.DataType.DOUBLE}


def _roundoff(dtype: ir.DataType) -> float:
    """Unit roundoff of a float type; float8 and narrower count alike."""
    known = {ir.DataType.DOUBLE: 1.1e-16, ir.DataType.FLOAT: 6e-8, ir.DataType.FLOAT16: 4.9e-4}
    known[ir.DataType.BFLOAT16] = 3.9e-3
    return known.get(dtype, 6.3e-2)


def scope_of(user: UserTolerance | None, fidelity: Fidelity) -> Scope:
    """What the error of a value is held against, see the module's docstring."""
    if user is None:
        return "neighbourhood" if fidelity == "exact" else "slice"
    return "slice" if fidelity == "exact" else "output"


def is_float(dtype: ir.DataType) -> bool:
    """Whether values of this dtype are rounded (complex included)."""
    return dtype in _COMPLEX or dtype.is_floating_point()


def coarser(first: ir.DataType, second: ir.DataType) -> ir.DataType:
    """The float dtype of the larger roundoff; the first where they are equal."""
    return second if _roundoff(second) > _roundoff(first) else first


def computed_in(model: ir.Model) -> dict[str, ir.DataType]:
    """For every output the float dtype with the largest roundoff among the values that it depends on.

    A model that computes in float16 and casts its output to float32 has float16's accuracy; a cast to float16 on a way
    that does not lead to the output says nothing about it. Double for an output that no float leads to.
    """
    found: dict[ir.Value, ir.DataType] = {}
    for value in model.graph.inputs:
        found[value] = _own(value)
    _walk(model.graph, found)
    return {value.name or "": found.get(value, _own(value)) for value in model.graph.outputs}


def _own(value: ir.Value) -> ir.DataType:
    dtype = value.dtype
    return dtype if dtype is not None and dtype.is_floating_point() else ir.DataType.DOUBLE


def _walk(graph: ir.Graph | ir.Function, found: dict[ir.Value, ir.DataType]) -> ir.DataType:
    """Fill in `found` for the values of a graph; gives the coarsest of all of them."""
    everything = ir.DataType.DOUBLE
    for node in graph:
        coarsest = ir.DataType.DOUBLE
        for value in node.inputs if node.op_type not in _VALUE_FREE else ():
            if value is not None:
                coarsest = coarser(coarsest, found.get(value, _own(value)))
        for attribute in node.attributes.values():
            for inner in _graphs_of(attribute):
                coarsest = coarser(coarsest, _walk(inner, found))
        for output in node.outputs:
            found[output] = coarser(coarsest, _own(output))
            everything = coarser(everything, found[output])
    return everything


def _graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def default_tolerance(dtype: ir.DataType, fidelity: Fidelity, computed_in: ir.DataType | None = None) -> Tolerance:
    """Tolerance of an output from the table above.

    Args:
        dtype: The output's dtype.
        fidelity: The loosest fidelity among the passes that ran.
        computed_in: Coarsest float dtype inside the model, if that is coarser than the output's.

    Raises:
        UsageError: For `trained` passes, which have no numeric tolerance.
    """
    if not is_float(dtype):
        return EXACTLY_EQUAL
    if fidelity not in _TABLE:
        raise UsageError(
            f"passes of fidelity {fidelity!r} have no numeric tolerance",
            hint="give tolerance= or verify such a model by a metric of its task (verify='off')",
        )
    dtype = _COMPLEX.get(dtype, dtype)
    if computed_in is not None and _roundoff(computed_in) > _roundoff(dtype):
        dtype = computed_in
    return _TABLE[fidelity].get(dtype, _FLOAT8[fidelity])


def resolve_tolerance(
    user: UserTolerance | None, output: str, dtype: ir.DataType, fidelity: Fidelity, computed_in: ir.DataType | None
) -> Tolerance:
    """Tolerance of one output: the user's where given, else the table's.

    Args:
        user: A number (relative, for every float output; the table's atol is kept but never above the number), a
            Tolerance, or either per output name.

    Raises:
        UsageError: For a negative or non-finite number.
    """
    if isinstance(user, Mapping):
        user = user.get(output)
    if isinstance(user, Tolerance):
        return user
    if user is None:
        return default_tolerance(dtype, fidelity, computed_in)
    if not np.isfinite(user) or user < 0:
        raise UsageError(f"`tolerance` must be a number >= 0, got {user!r}", where=output)
    if not is_float(dtype):
        return EXACTLY_EQUAL
    known = fidelity if fidelity in _TABLE else "approximate"
    return Tolerance(float(user), min(default_tolerance(dtype, known, computed_in).atol, float(user)))


@dataclass(frozen=True)
class Difference:
    """How one output differs from its reference.

    Attributes:
        max_abs: Largest absolute error over the elements that are finite in both.
        max_rel: Largest relative error (see the module's docstring).
        agrees: Whether every element is within the tolerance.
        finite: Number of reference elements that are neither NaN nor infinite.
        reason: Why it does not agree; empty if it does.
        outside: Number of elements beyond the tolerance; all of them where shapes or dtypes differ.
        beyond: Absolute errors of the elements beyond the tolerance, zero elsewhere, where nothing but finite floats
            disagrees; None otherwise.
    """

    max_abs: float
    max_rel: float
    agrees: bool
    finite: int
    reason: str = ""
    outside: int = 0
    beyond: Array | None = field(default=None, repr=False, compare=False)


def difference(candidate: Any, reference: Any, tolerance: Tolerance, scope: Scope = "neighbourhood") -> Difference:
    """Compare one output; sequences are compared element by element, None (an absent optional) only to None."""
    if reference is None or candidate is None:
        same = reference is None and candidate is None
        return Difference(0.0, 0.0, same, 0, "" if same else "one of the two optional outputs is absent")
    if isinstance(reference, list | tuple) or isinstance(candidate, list | tuple):
        return _sequence_difference(candidate, reference, tolerance, scope)
    return _array_difference(np.asarray(candidate), np.asarray(reference), tolerance, scope)


def _sequence_difference(candidate: Any, reference: Any, tolerance: Tolerance, scope: Scope) -> Difference:
    if not (isinstance(reference, list | tuple) and isinstance(candidate, list | tuple)):
        return Difference(np.inf, np.inf, False, 0, "one is a sequence and the other is not")
    if len(reference) != len(candidate):
        reason = f"sequence of {len(candidate)} elements instead of {len(reference)}"
        return Difference(np.inf, np.inf, False, 0, reason)
    parts = [difference(a, b, tolerance, scope) for a, b in zip(candidate, reference, strict=True)]
    reason = next((p.reason for p in parts if not p.agrees), "")
    return Difference(
        max((p.max_abs for p in parts), default=0.0),
        max((p.max_rel for p in parts), default=0.0),
        all(p.agrees for p in parts),
        sum(p.finite for p in parts),
        reason,
        sum(p.outside for p in parts),
    )


def _array_difference(candidate: Array, reference: Array, tolerance: Tolerance, scope: Scope) -> Difference:
    if candidate.shape != reference.shape:
        reason = f"shape {candidate.shape} instead of {reference.shape}"
        return Difference(np.inf, np.inf, False, 0, reason, max(reference.size, 1))
    if candidate.dtype != reference.dtype:
        reason = f"dtype {candidate.dtype} instead of {reference.dtype}"
        return Difference(np.inf, np.inf, False, 0, reason, reference.size + 1)
    if reference.dtype.kind in "OSU":
        differing = int(np.count_nonzero(candidate != reference))
        reason = f"{differing} of {reference.size} strings differ" if differing else ""
        gap = float(differing > 0)
        return Difference(gap, gap, not differing, reference.size, reason, differing)
    wide = np.complex128 if reference.dtype.kind == "c" else np.float64
    if reference.dtype.kind in "iub":
        return _integer_difference(candidate, reference, tolerance)
    return _float_difference(candidate.astype(wide), reference.astype(wide), tolerance, scope)


def _integer_difference(candidate: Array, reference: Array, tolerance: Tolerance) -> Difference:
    differing = int(np.count_nonzero(candidate != reference))
    if not differing:
        return Difference(0.0, 0.0, True, reference.size)
    error = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    scale = max(float(np.abs(reference.astype(np.float64)).max()), 1.0)
    largest = float(error.max())
    agrees = tolerance != EXACTLY_EQUAL and largest <= tolerance.atol + tolerance.rtol * scale
    reason = "" if agrees else f"{differing} of {reference.size} elements differ, by up to {largest:g}"
    return Difference(largest, largest / scale, agrees, reference.size, reason, 0 if agrees else differing)


def _float_difference(candidate: Array, reference: Array, tolerance: Tolerance, scope: Scope) -> Difference:
    finite = np.isfinite(reference)
    count = int(np.count_nonzero(finite))
    reason, wrong = _nonfinite_mismatch(candidate, reference, finite)
    both = finite & np.isfinite(candidate)
    if not both.any():
        return Difference(0.0, 0.0, not reason, count, reason, wrong)
    magnitude = np.where(both, np.abs(np.where(both, reference, 0)), 0.0)
    error = np.abs(np.where(both, candidate, 0) - np.where(both, reference, 0))
    scale = np.maximum(scales(magnitude, scope), magnitude)
    atol = tolerance.atol * (min(1.0, float(scales(magnitude, "output"))) or 1.0)
    allowed = atol + tolerance.rtol * scale
    outside = error > allowed
    held_against = scale + (atol / tolerance.rtol if tolerance.rtol > 0 else 0.0)
    relative = np.divide(error, held_against, out=np.where(error > 0, np.inf, 0.0), where=held_against > 0)
    number = int(np.count_nonzero(outside))
    max_abs, max_rel = float(error.max()), float(relative.max())
    beyond = np.where(outside, error, 0.0) if number and not reason else None
    if not reason and number:
        reason = (
            f"{number} of {reference.size} elements differ by more than "
            f"{tolerance.rtol:g} relative + {atol:g}: at most {max_rel:.3g} relative, {max_abs:.3g} absolute"
        )
    return Difference(max_abs, max_rel, not reason, count, reason, number + wrong, beyond)


def _nonfinite_mismatch(candidate: Array, reference: Array, finite: Array) -> tuple[str, int]:
    """Why the NaNs and infinities of two arrays do not agree, and how many; empty and 0 if they do."""
    if finite.all() and np.isfinite(candidate).all():
        return "", 0
    nan = int(np.count_nonzero(np.isnan(candidate) != np.isnan(reference)))
    if nan:
        return f"NaN in one of the two only, at {nan} of {reference.size} elements", nan
    settled = np.isnan(reference) | (finite & np.isfinite(candidate)) | (candidate == reference)
    wrong = int(np.count_nonzero(~settled))
    return (f"infinite in one of the two only, at {wrong} of {reference.size} elements" if wrong else ""), wrong
