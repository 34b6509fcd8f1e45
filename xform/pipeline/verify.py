"""Verification: does a rewritten graph compute what the captured one computes?

A `Verifier` holds the reference numbers of the captured model on a few input sets and compares candidates against
them. The verdict has three values and a claim of equality is made only where numbers were compared:

- "ok": every output agreed on every input set.
- "failed": some output did not, or the candidate does not run where the reference does.
- "unverified": nothing could be compared, and `reason` says why (the runtime refuses the captured model, no input sizes
  work, the model is random, every output is NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from xform.graph.check import Interface
from xform.pipeline.noise import is_within, nudged_outputs
from xform.pipeline.oracle import CouldNotRunError, Inputs, Oracle, Outputs, Session, call_oracle, run_model
from xform.pipeline.random_inputs import InputCase, candidate_cases, check_named, is_dynamic, required_inputs
from xform.pipeline.tolerance import UserTolerance, coarsest_float, difference, is_float, resolve_tolerance
from xform.rewrite.passes import Fidelity

State = Literal["ok", "failed", "unverified", "off"]
UserInputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Execute = Callable[[ir.Model, Sequence[Inputs]], list[Outputs]]

_CASES_STATIC = 1
_CASES_DYNAMIC = 2
_TOO_LARGE = "all that fit its sizes are too large to draw"
_MAX_TRIES = 24  # input sets proposed to a model that refuses some


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
class Verification:
    """The verdict on one candidate.

    Attributes:
        state: "ok", "failed", "unverified" or "off" (not asked for).
        reason: Why it is not "ok"; empty if it is.
        outputs: Every output on every input set.
        notes: What the user should know besides: input sizes that the model refused, and the like.
    """

    state: State
    reason: str = ""
    outputs: tuple[OutputError, ...] = ()
    notes: tuple[str, ...] = ()

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
        notes = list(self.notes)
        return {"state": self.state, "reason": self.reason, **errors, "outputs": outputs, "notes": notes}


def _finite(number: float | None) -> float | None:
    return None if number is None or not np.isfinite(number) else float(number)


@dataclass
class Verifier:
    """Reference numbers of a captured model, and comparisons against them.

    Args:
        model: The captured model. It is never changed; the oracle runs it unless `oracle` is given.
        oracle: A callable from named inputs to outputs (in graph order, or by name) that is the reference instead.
        inputs: The user's inputs, one set or several; sets that lack some inputs are completed with random ones.
        sizes: Numbers for dynamic dims by name.
        tolerance: The user's tolerance, see `xform.pipeline.tolerance.resolve_tolerance`.
        seed: Of the random inputs.
        execute: Runs candidates; ONNX Runtime by default.

    Attributes:
        cases: Input sets that the reference ran on.
        references: Its outputs.
        unverifiable: Why there are no reference numbers; empty if there are.
        notes: See Verification.
    """

    model: ir.Model
    oracle: Oracle | None = None
    inputs: UserInputs | None = None
    sizes: Mapping[str, int] | None = None
    tolerance: UserTolerance | None = None
    seed: int = 0
    execute: Execute = run_model
    cases: list[InputCase] = field(default_factory=list)
    references: list[Outputs] = field(default_factory=list)
    unverifiable: str = ""
    notes: list[str] = field(default_factory=list)
    prepared: bool = False
    _random: bool | None = field(default=None, init=False, repr=False)
    _measured: list[tuple[Outputs, Outputs]] | None = field(default=None, init=False, repr=False)

    def prepare(self) -> None:
        """Compute the reference numbers, once; on failure `unverifiable` says why.

        Raises:
            UsageError: The user's inputs or sizes do not fit the model.
        """
        if self.prepared:
            return
        self.prepared = True
        self._computed_in = coarsest_float(self.model)
        if self.oracle is not None:
            self._collect(None)
            return
        try:
            with Session(self.model) as session:
                self._collect(session)
        except CouldNotRunError as error:
            self.unverifiable = error.what

    def compare(self, candidate: ir.Model, fidelity: Fidelity = "exact") -> Verification:
        """Run `candidate` on the same inputs and compare.

        Args:
            candidate: A model with the same inputs and outputs.
            fidelity: The loosest fidelity of what was done to it.

        Raises:
            UsageError: The user's inputs, sizes or tolerance do not fit the model.
        """
        self.prepare()
        if self.unverifiable:
            return Verification("unverified", self.unverifiable, notes=tuple(self.notes))
        try:
            results = self.execute(candidate, [case.arrays for case in self.cases])
        except CouldNotRunError as error:
            reason = f"the captured model runs and the rewritten one does not: {error.what}"
            return Verification("failed", reason, notes=tuple(self.notes))
        return self.judge(results, fidelity)

    def judge(
        self, results: Sequence[Outputs], fidelity: Fidelity = "exact", computed_in: ir.DataType | None = None
    ) -> Verification:
        """Compare outputs that a candidate gave, one set per entry of `cases`, however it was run.

        Args:
            computed_in: The dtype that the candidate computes floats in, where it is coarser than the model's.

        Raises:
            UsageError: The user's tolerance does not fit.
        """
        errors = list(self._output_errors(self.references, results, fidelity, computed_in=computed_in))
        if all(error.agrees for error in errors):
            return Verification("ok", "", tuple(errors), tuple(self.notes))
        if self._is_random():
            return Verification("unverified", "the model gives other numbers at every run", notes=tuple(self.notes))
        noise = self._noise()
        errors = list(self._output_errors(self.references, results, fidelity, noise, computed_in))
        wrong = next((error for error in errors if not error.agrees and not error.noisy), None)
        if wrong is not None:
            reason = f"output {wrong.output!r} on {wrong.inputs}: {wrong.reason}"
            return Verification("failed", reason, tuple(errors), tuple(self.notes))
        names = dict.fromkeys(error.output for error in errors if error.noisy)
        noisy = f"rounding alone changes {', '.join(names)} of the captured model as much as the rewriting did"
        if not any(error.agrees for error in errors):
            return Verification("unverified", noisy, tuple(errors), tuple(self.notes))
        return Verification("ok", "", tuple(errors), (*self.notes, f"{noisy}; only the other outputs were compared"))

    def baseline(self) -> Verification:
        """Compare the captured model itself with a callable oracle; "ok" without one, as then it is the reference."""
        if self.oracle is None:
            self.prepare()
            return Verification("unverified", self.unverifiable) if self.unverifiable else Verification("ok")
        return self.compare(self.model)

    def _output_errors(
        self,
        references: Sequence[Outputs],
        results: Sequence[Outputs],
        fidelity: Fidelity,
        noise: Sequence[tuple[Outputs, Outputs]] | None = None,
        computed_in: ir.DataType | None = None,
    ) -> Iterator[OutputError]:
        dtypes = {value.name: value.dtype for value in self.model.graph.outputs}
        for index, (case, reference, result) in enumerate(zip(self.cases, references, results, strict=True)):
            for name, expected in reference.items():
                dtype = dtypes.get(name) or ir.DataType.FLOAT
                limit = resolve_tolerance(self.tolerance, name, dtype, fidelity, computed_in or self._computed_in)
                found = difference(result.get(name), expected, limit)
                noisy = False
                if noise is not None and not found.agrees:
                    still, nudged = noise[index]
                    noisy = is_within(found, difference(nudged[name], still[name], limit))
                yield OutputError(
                    name,
                    str(case),
                    found.max_abs,
                    found.max_rel,
                    limit.rtol,
                    limit.atol,
                    found.agrees,
                    found.reason,
                    noisy,
                )

    def _collect(self, session: Session | None) -> None:
        """Run the reference on proposed inputs until enough have worked."""
        refused = ""
        wanted = 0
        for proposed, cases in self._proposals():
            wanted += cases
            for case in islice(proposed, _MAX_TRIES):
                if len(self.cases) >= wanted:
                    break
                if self.cases and case.source not in ("random", "user"):
                    break  # other values are for models that took none of the typical ones
                try:
                    outputs = self._reference(session, case)
                except CouldNotRunError as error:
                    refused = refused or error.what
                    self.notes.append(f"the model does not take {case}: {error.what}")
                    continue
                self.cases.append(case)
                self.references.append(outputs)
        if not self.cases:
            self.unverifiable = f"the captured model ran on none of the inputs tried: {refused or _TOO_LARGE}"
        elif not self._informative():
            self.unverifiable = "every float output is NaN or infinite on the inputs tried, so nothing can be compared"
        elif len(self.cases) < wanted:
            self.notes.append(f"only {len(self.cases)} of {wanted} input sets could be compared")

    def _proposals(self) -> Iterator[tuple[Iterator[InputCase], int]]:
        """Streams of candidates, each with the number of input sets wanted of it: one per input set of the user."""
        if self.inputs is not None and not isinstance(self.inputs, Mapping):
            for given in self.inputs:
                yield candidate_cases(self.model, self.seed, self.sizes, given), 1
            return
        given = check_named(self.model, self.inputs or {})
        complete = all(value.name in given for value in required_inputs(self.model))
        wanted = _CASES_DYNAMIC if is_dynamic(self.model) and not complete and not self.sizes else _CASES_STATIC
        yield candidate_cases(self.model, self.seed, self.sizes, given), wanted

    def _reference(self, session: Session | None, case: InputCase) -> Outputs:
        if session is not None:
            return session.run(case.arrays)
        assert self.oracle is not None
        names = [value.name or "" for value in self.model.graph.outputs]
        return call_oracle(self.oracle, case.arrays, names)

    def _informative(self) -> bool:
        """Whether some output can tell right from wrong: a float output with a finite element, or any other output."""
        floats = {v.name for v in self.model.graph.outputs if v.dtype is not None and is_float(v.dtype)}
        for reference in self.references:
            for name, array in reference.items():
                if name not in floats or not isinstance(array, np.ndarray):
                    return True
                if array.size == 0 or np.isfinite(array).any():
                    return True
        return not self.model.graph.outputs

    def _noise(self) -> list[tuple[Outputs, Outputs]] | None:
        """The captured model's outputs as they are and nudged, per case; None where the user set the tolerance."""
        if self.tolerance is not None:
            return None
        if self._measured is None:
            inputs = [case.arrays for case in self.cases]
            try:
                still = self.execute(
                    self.model, inputs
                )  # not the references: a pass may have changed the weights since
                self._measured = list(zip(still, nudged_outputs(self.model, inputs, self.seed), strict=True))
            except CouldNotRunError as error:
                self.notes.append(f"the noise of rounding could not be measured: {error.what}")
                self._measured = [(reference, reference) for reference in self.references]
        return self._measured

    def _is_random(self) -> bool:
        """Whether the reference, run twice, disagrees with itself."""
        if self._random is None:
            self._random = self._disagrees_with_itself()
        return self._random

    def _disagrees_with_itself(self) -> bool:
        inputs = [case.arrays for case in self.cases]
        try:
            if self.oracle is None:
                with Session(self.model) as session:
                    first, second = ([session.run(arrays) for arrays in inputs] for _ in range(2))
            else:
                first, second = ([self._reference(None, case) for case in self.cases] for _ in range(2))
        except CouldNotRunError:
            return False
        return any(not error.agrees for error in self._output_errors(first, second, "exact"))


def verify(
    reference: ir.Model,
    candidate: ir.Model,
    *,
    inputs: UserInputs | None = None,
    sizes: Mapping[str, int] | None = None,
    tolerance: UserTolerance | None = None,
    fidelity: Fidelity = "exact",
    oracle: Oracle | None = None,
    seed: int = 0,
) -> Verification:
    """Compare two models on the same inputs. See `Verifier` for the arguments.

    Raises:
        UsageError: Inputs, sizes or tolerance do not fit the reference.
    """
    gap = Interface.of(reference).difference(Interface.of(candidate))
    if gap is not None:
        return Verification("failed", f"the interfaces differ: {gap}")
    return Verifier(reference, oracle, inputs, sizes, tolerance, seed).compare(candidate, fidelity)
