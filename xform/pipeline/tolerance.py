"""Tolerances of verification, explicit per dtype and fidelity, and the error measure they apply to.

Error measure. For a reference output `b` and a candidate output `a`:

- The scale of `b` is `s = min(max|b|, 1000 * median of the nonzero |b|)`, over finite elements. A plain `max|b|` would
  let one mask value such as -3.4e38 excuse every other element, so what lies above `s` is measured against itself.
- Absolute error: `e_i = |a_i - b_i|`. Relative error: `e_i / max(s, |b_i|)`. Both are reported as their maximum.
- An element agrees where `e_i <= atol + rtol * max(s, |b_i|)`. NaN must meet NaN, an infinity the same infinity.

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
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.values import Array
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
_FLOAT8: dict[Fidelity, Tolerance] = {"exact": Tolerance(2.5e-1, 6e-2), "approximate": Tolerance(5e-1, 1e-1)}
_COMPLEX = {ir.DataType.COMPLEX64: ir.DataType.FLOAT, ir.DataType.COMPLEX128: ir.DataType.DOUBLE}


def _roundoff(dtype: ir.DataType) -> float:
    """Unit roundoff of a float type; float8 and narrower count alike."""
    known = {ir.DataType.DOUBLE: 1.1e-16, ir.DataType.FLOAT: 6e-8, ir.DataType.FLOAT16: 4.9e-4}
    known[ir.DataType.BFLOAT16] = 3.9e-3
    return known.get(dtype, 6.3e-2)


def is_float(dtype: ir.DataType) -> bool:
    """Whether values of this dtype are rounded (complex included)."""
    return dtype in _COMPLEX or dtype.is_floating_point()


def coarsest_float(model: ir.Model) -> ir.DataType:
    """The float dtype with the largest roundoff that any value of the model is computed in (double if there is none).

    A model that computes in float16 and casts its output to float32 has float16's accuracy.
    """
    coarsest = ir.DataType.DOUBLE
    for node in model.graph.all_nodes():
        for value in node.outputs:
            dtype = value.dtype
            if dtype is not None and dtype.is_floating_point() and _roundoff(dtype) > _roundoff(coarsest):
                coarsest = dtype
    return coarsest


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
        raise UsageError(f"tolerance must be a number >= 0, got {user!r}", where=output)
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
    """

    max_abs: float
    max_rel: float
    agrees: bool
    finite: int
    reason: str = ""
    outside: int = 0


def difference(candidate: Any, reference: Any, tolerance: Tolerance) -> Difference:
    """Compare one output; sequences are compared element by element, None (an absent optional) only to None."""
    if reference is None or candidate is None:
        same = reference is None and candidate is None
        return Difference(0.0, 0.0, same, 0, "" if same else "one of the two optional outputs is absent")
    if isinstance(reference, list | tuple) or isinstance(candidate, list | tuple):
        return _sequence_difference(candidate, reference, tolerance)
    return _array_difference(np.asarray(candidate), np.asarray(reference), tolerance)


def _sequence_difference(candidate: Any, reference: Any, tolerance: Tolerance) -> Difference:
    if not (isinstance(reference, list | tuple) and isinstance(candidate, list | tuple)):
        return Difference(np.inf, np.inf, False, 0, "one is a sequence and the other is not")
    if len(reference) != len(candidate):
        reason = f"sequence of {len(candidate)} elements instead of {len(reference)}"
        return Difference(np.inf, np.inf, False, 0, reason)
    parts = [difference(a, b, tolerance) for a, b in zip(candidate, reference, strict=True)]
    reason = next((p.reason for p in parts if not p.agrees), "")
    return Difference(
        max((p.max_abs for p in parts), default=0.0),
        max((p.max_rel for p in parts), default=0.0),
        all(p.agrees for p in parts),
        sum(p.finite for p in parts),
        reason,
        sum(p.outside for p in parts),
    )


def _array_difference(candidate: Array, reference: Array, tolerance: Tolerance) -> Difference:
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
    return _float_difference(candidate.astype(wide), reference.astype(wide), tolerance)


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


def _float_difference(candidate: Array, reference: Array, tolerance: Tolerance) -> Difference:
    finite = np.isfinite(reference)
    count = int(np.count_nonzero(finite))
    reason, wrong = _nonfinite_mismatch(candidate, reference, finite)
    both = finite & np.isfinite(candidate)
    magnitude = np.abs(reference[both])
    if magnitude.size == 0:
        return Difference(0.0, 0.0, not reason, count, reason, wrong)
    error = np.abs(candidate[both] - reference[both])
    scale = np.maximum(_scale(magnitude), magnitude)
    max_abs = float(error.max())
    relative = np.divide(error, scale, out=np.zeros_like(error), where=scale > 0)
    relative[(scale == 0) & (error > 0)] = np.inf
    max_rel = float(relative.max())
    outside = int(np.count_nonzero(error > tolerance.atol + tolerance.rtol * scale))
    if not reason and outside:
        reason = (
            f"{outside} of {reference.size} elements differ by more than "
            f"{tolerance.rtol:g} relative + {tolerance.atol:g}: at most {max_rel:.3g} relative, {max_abs:.3g} absolute"
        )
    return Difference(max_abs, max_rel, not reason, count, reason, outside + wrong)


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


def _scale(magnitude: Array) -> float:
    """`min(max, 1000 * median of the nonzero)` of finite magnitudes."""
    nonzero = magnitude[magnitude > 0]
    if nonzero.size == 0:
        return 0.0
    return float(min(magnitude.max(), 1000.0 * np.median(nonzero)))
