"""Is what a candidate gave within its tolerance, or within what rounding alone does to the captured model?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.errors import LimitError
from xform.graph.values import Array
from xform.pipeline.noise import excuses, is_within, movement, nudged_outputs
from xform.pipeline.oracle import CouldNotRunError, Outputs
from xform.pipeline.random_inputs import InputCase
from xform.pipeline.reference import run_anywhere
from xform.pipeline.tolerance import (
    Difference,
    Tolerance,
    UserTolerance,
    coarser,
    computed_in,
    difference,
    resolve_tolerance,
    scope_of,
)
from xform.pipeline.verdict import OutputError
from xform.rewrite.passes import Fidelity

_ROUNDS = 3  # of nudging; the first is enough for most
_KNOWN = 100.0  # times the tolerance of the whole output: noise above it leaves nothing of the output to compare


@dataclass
class _Noise:
    """What nudging did to the captured model on one input set."""

    still: Outputs
    nudged: list[Outputs] = field(default_factory=list)


class Judge:
    """Compares outputs of one model.

    Args:
        model: The captured model, whose noise is measured where something disagrees.
        tolerance: The user's, which is applied as it is: no noise excuses anything then.
        seed: Of the nudging.

    Attributes:
        notes: Why noise could not be measured.
    """

    def __init__(self, model: ir.Model, tolerance: UserTolerance | None, seed: int) -> None:
        self._model = model
        self._tolerance = tolerance
        self._seed = seed
        self._dtypes = {value.name: value.dtype or ir.DataType.FLOAT for value in model.graph.outputs}
        self._computed_in = computed_in(model)
        self._noise: dict[int, _Noise | None] = {}
        self.notes: list[str] = []

    def errors(
        self,
        case: InputCase,
        reference: Outputs,
        found: Outputs,
        fidelity: Fidelity,
        precision: ir.DataType | Mapping[str, ir.DataType] | None = None,
        excusable: bool = True,
    ) -> list[OutputError]:
        """Every output on one input set.

        Args:
            precision: The dtype that the candidate computes floats in, or one by output, where it is coarser than the
                model's.
            excusable: Whether noise is measured where something disagrees.
        """
        errors = []
        for name, expected in reference.items():
            inside = self._computed_in.get(name, ir.DataType.DOUBLE)
            own = precision.get(name) if isinstance(precision, Mapping) else precision
            coarsest = inside if own is None else coarser(inside, own)
            limit = resolve_tolerance(self._tolerance, name, self._dtypes[name], fidelity, coarsest)
            scope = scope_of(self._tolerance, fidelity)
            gap = difference(found.get(name), expected, limit, scope)
            agrees, noisy = gap.agrees, False
            if not agrees and excusable and self._tolerance is None:
                agrees, noisy = self._excused(case, name, gap, found.get(name), expected, limit)
            rel = gap.max_rel if gap.agrees or not agrees else limit.rtol  # what noise excuses says nothing
            errors.append(
                OutputError(name, str(case), gap.max_abs, rel, limit.rtol, limit.atol, agrees, gap.reason, noisy)
            )
        return errors

    def _excused(
        self, case: InputCase, name: str, gap: Difference, found: Any, expected: Any, limit: Tolerance
    ) -> tuple[bool, bool]:
        """Whether noise explains a disagreement value by value, and whether only the whole output's does."""
        moved: Array | None = None
        noisy = False
        for number in range(_ROUNDS):
            still, nudged = self._round(case, number)
            if nudged is None:
                break
            now = movement(still[name], nudged[name])
            moved = now if moved is None or now is None else np.maximum(moved, now)
            if excuses(gap, moved):
                known = difference(found, expected, Tolerance(_KNOWN * limit.rtol, limit.atol), "output").agrees
                return known, not known
            noisy = noisy or is_within(gap, difference(nudged[name], still[name], limit, "output"))
        return False, noisy

    def _round(self, case: InputCase, number: int) -> tuple[Outputs, Outputs | None]:
        """The captured model's outputs as they are, and nudged for the n-th time; None where it does not run so."""
        key = id(case)
        try:
            if key not in self._noise:  # not the references: a pass may have changed the weights since
                self._noise[key] = _Noise(run_anywhere(self._model, [case.arrays])[0])
            measured = self._noise[key]
            if measured is None:
                return {}, None
            while len(measured.nudged) <= number:
                seed = self._seed + len(measured.nudged)
                measured.nudged.append(nudged_outputs(self._model, case.arrays, seed))
        except (CouldNotRunError, LimitError) as error:  # more is computed here than in the runs that were within them
            self._noise[key] = None
            self.notes.append(f"the noise of rounding could not be measured: {error.what}")
            return {}, None
        return measured.still, measured.nudged[number]
