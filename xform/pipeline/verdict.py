"""What verification says: errors per output, the verdict, and on what it rests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

State = Literal["ok", "failed", "unverified", "off"]


@dataclass(frozen=True)
class OutputError:
    """How one output agreed on one input set.

    Attributes:
        output: Name of the graph output.
        inputs: The input set, in words.
        max_abs_error: Largest absolute error, in units of the output.
        max_rel_error: Largest relative error (see `xform.pipeline.tolerance`).
        rtol: Relative tolerance it was held to.
        atol: Absolute tolerance it was held to.
        agrees: Whether it is within tolerance everywhere.
        reason: Why not.
        noisy: Not within tolerance, but within what rounding alone does to the captured model.
    """

    output: str
    inputs: str
    max_abs_error: float
    max_rel_error: float
    rtol: float
    atol: float
    agrees: bool
    reason: str = ""
    noisy: bool = False


@dataclass(frozen=True)
class Coverage:
    """On what a verdict rests.

    Attributes:
        given: Number of input sets of the user.
        derived: Number of input sets made from those of the user: other sizes, other masks.
        random: Number of input sets drawn.
        cases: Every input set in words.
        sizes: Numbers that each dynamic dim had, as "batch: 0, 1, 2".
        masks: Styles of masks.
        branches: Number of branches of the model that depend on data.
        reached: How many of them some input set went through.
        forced: How many of the rest were compared with their condition replaced by a constant.
        unreached: The branches that were not compared at all, in words.
        refused: Input sets that the model itself does not take, in words.
        oracle: What the reference is.
    """

    given: int = 0
    derived: int = 0
    random: int = 0
    cases: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    branches: int = 0
    reached: int = 0
    forced: int = 0
    unreached: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    oracle: str = ""


@dataclass(frozen=True)
class Verification:
    """The verdict on one candidate.

    Attributes:
        state: "ok", "failed", "unverified" or "off" (not asked for).
        reason: Why it is not "ok"; empty if it is.
        outputs: Every output on every input set.
        notes: What the user should know besides: input sizes that the model refused, and the like.
        coverage: On what it rests.
    """

    state: State
    reason: str = ""
    outputs: tuple[OutputError, ...] = ()
    notes: tuple[str, ...] = ()
    coverage: Coverage = Coverage()

    @property
    def ok(self) -> bool:
        """Whether numbers were compared and agreed."""
        return self.state == "ok"

    @property
    def max_abs_error(self) -> float | None:
        """Largest absolute error of any output that is not noisy; None where nothing was compared."""
        return max((o.max_abs_error for o in self.outputs if not o.noisy), default=None)

    @property
    def max_rel_error(self) -> float | None:
        """Largest relative error of any output that is not noisy; None where nothing was compared."""
        return max((o.max_rel_error for o in self.outputs if not o.noisy), default=None)

    @property
    def cases(self) -> tuple[str, ...]:
        """The input sets that were compared, in words."""
        return tuple(dict.fromkeys(o.inputs for o in self.outputs))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; infinite errors become None."""
        errors = {"max_abs_error": _finite(self.max_abs_error), "max_rel_error": _finite(self.max_rel_error)}
        outputs = [
            {k: _finite(v) if isinstance(v, float) else v for k, v in asdict(output).items()} for output in self.outputs
        ]
        said = {"state": self.state, "reason": self.reason, **errors, "outputs": outputs, "notes": list(self.notes)}
        return {**said, "coverage": {k: _listed(v) for k, v in asdict(self.coverage).items()}}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _finite(number: float | None) -> float | None:
    return None if number is None or not np.isfinite(number) else float(number)
