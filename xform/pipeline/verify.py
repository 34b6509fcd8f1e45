"""Verification: does a rewritten graph compute what the captured one computes?

A `Verifier` holds the reference numbers of a model on input sets that are chosen to break rewrites
(`xform.pipeline.stress`, `xform.pipeline.branches`) and compares candidates against them. The verdict has three values
and a claim of equality is made only where numbers were compared:

- "ok": every output agreed on every input set.
- "failed": some output did not, or the candidate does not run where the reference does.
- "unverified": nothing could be compared, and `reason` says why (the runtime refuses the captured model, no input sizes
  work, the model is random, every output is NaN).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import onnx_ir as ir

from xform.errors import LimitError
from xform.graph.check import Interface
from xform.pipeline.branches import Branch, Watch, attempts, branches, in_words
from xform.pipeline.coverage import has_numbers, informative, with_sets
from xform.pipeline.forced_branches import ForcedBranches
from xform.pipeline.judge import Judge
from xform.pipeline.optional_sets import PAST_LIMIT, OptionalSets
from xform.pipeline.oracle import CouldNotRunError, Oracle, Outputs
from xform.pipeline.random_inputs import InputCase, candidate_cases, check_named, is_dynamic, required_inputs
from xform.pipeline.reference import Execute, Reference, run_anywhere
from xform.pipeline.stress import Stress
from xform.pipeline.tolerance import UserTolerance, computed_in
from xform.pipeline.verdict import Coverage, OutputError, State, Verification
from xform.rewrite.passes import Fidelity

UserInputs = Mapping[str, Any] | Sequence[Mapping[str, Any] | InputCase]

_CASES_STATIC = 1
_CASES_DYNAMIC = 2
_TOO_LARGE = "all that fit its sizes are too large to draw"
_MAX_TRIES = 24  # input sets proposed to a model that refuses some
_MAX_NEW_CASES = 8  # input sets kept for the branches that they reach


@dataclass
class Verifier:
    """Reference numbers of a captured model, and comparisons against them.

    Args:
        model: The captured model. It is never changed; it is the reference unless `oracle` is given.
        oracle: A callable from named inputs to outputs (in graph order, or by name) that is the reference instead.
        inputs: The user's inputs, one set or several; sets that lack some inputs are completed with random ones. Where
            some are an InputCase, the dynamic dims have no other sizes than there.
        sizes: Numbers for dynamic dims by name.
        tolerance: The user's tolerance, see `xform.pipeline.tolerance.resolve_tolerance`.
        seed: Of the random inputs.
        execute: Runs candidates.

    Attributes:
        cases: Input sets that the reference ran on.
        references: Its outputs.
        unverifiable: Why there are no reference numbers; empty if there are.
        notes: See Verification.
        coverage: On what a verdict rests.
    """

    model: ir.Model
    oracle: Oracle | None = None
    inputs: UserInputs | None = None
    sizes: Mapping[str, int] | None = None
    tolerance: UserTolerance | None = None
    seed: int = 0
    execute: Execute = run_anywhere
    cases: list[InputCase] = field(default_factory=list)
    references: list[Outputs] = field(default_factory=list)
    unverifiable: str = ""
    notes: list[str] = field(default_factory=list)
    prepared: bool = False
    coverage: Coverage = field(default_factory=Coverage)
    _random: bool | None = field(default=None, init=False, repr=False)
    _optional: OptionalSets = field(init=False, repr=False)
    _judge: Judge = field(init=False, repr=False)
    _forced: ForcedBranches = field(init=False, repr=False)

    def prepare(self) -> None:
        """Compute the reference numbers, once; on failure `unverifiable` says why.

        Raises:
            UsageError: The user's inputs or sizes do not fit the model.
        """
        if self.prepared:
            return
        self.prepared = True
        self._judge = Judge(self.model, self.tolerance, self.seed)
        self._optional = OptionalSets(self.model)
        self._forced = ForcedBranches(self.model, self.seed)
        try:
            with Reference(self.model, self.oracle) as reference:
                self.coverage = replace(self.coverage, oracle=reference.name)
                self._collect(reference)
        except CouldNotRunError as error:
            self.unverifiable = error.what
        self._cover()

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
            return self._verdict("unverified", self.unverifiable)
        cases = self.cases_for(fidelity)
        try:
            results = self._run(candidate, cases)
        except CouldNotRunError as error:
            return self._verdict("failed", f"the captured model runs and the rewritten one does not: {error.what}")
        results = [found for case, found in zip(cases, results, strict=True) if not self._optional.dropped(case)]
        narrower = computed_in(candidate) if fidelity != "exact" else None  # what it computes in is part of what it is
        verdict = self.judge(results, fidelity, narrower)
        return self._in_forced_branches(candidate, fidelity, verdict) if verdict.ok else verdict

    def under(self, tolerance: UserTolerance | None) -> Verifier:
        """The same reference numbers under another tolerance."""
        self.prepare()
        other = replace(self, tolerance=tolerance)
        other._judge = Judge(self.model, tolerance, self.seed)
        other._optional, other._forced = self._optional, self._forced
        return other

    def cases_for(self, fidelity: Fidelity) -> list[InputCase]:
        """The input sets on which rewrites of this fidelity are compared: approximations are spared extreme values."""
        return [case for case in self.cases if self._serves(case, fidelity)]

    def _serves(self, case: InputCase, fidelity: Fidelity) -> bool:
        return (fidelity == "exact" or not case.extreme) and not self._optional.dropped(case)

    def _run(self, candidate: ir.Model, cases: Sequence[InputCase]) -> list[Outputs | None]:
        """What a graph gives; None on what may be left out.

        That is an empty batch where it refuses that, as operators that stand in between may, and an optional set on
        which it is past a limit: the graph has sizes to look at beforehand, which the reference may not have. Such sets
        are left out of all that follows.
        """
        try:
            return list(self.execute(candidate, [case.arrays for case in cases]))
        except CouldNotRunError:
            if not any(case.is_empty for case in cases):
                raise
            if len(cases) == 1:
                return [None]  # what is made of the graph is asked again
        except LimitError as error:
            if not any(map(self._optional.holds, cases)):
                raise
            if len(cases) == 1:
                self._optional.past(cases[0], error)
                return [None]
            if error.limit == "seconds":
                return self._run_what_is_quick(candidate, cases)
        middle = len(cases) // 2  # halves, so that one load serves many sets
        return self._run(candidate, cases[:middle]) + self._run(candidate, cases[middle:])

    def _run_what_is_quick(self, candidate: ir.Model, cases: Sequence[InputCase]) -> list[Outputs | None]:
        """As `_run`, the sets that the user asked for first and then the others by size, up to the first slow one."""
        found: dict[int, Outputs | None] = {}
        slow = False
        for case in sorted(cases, key=lambda case: (self._optional.holds(case), case.numel)):
            if slow:
                self._optional.drop(case, "a set before it is past the limit 'seconds'")
                found[id(case)] = None
                continue
            (found[id(case)],) = self._run(candidate, [case])
            slow = self._optional.dropped(case)
        return [found[id(case)] for case in cases]

    def judge(
        self,
        results: Sequence[Outputs | None],
        fidelity: Fidelity = "exact",
        precision: ir.DataType | Mapping[str, ir.DataType] | None = None,
    ) -> Verification:
        """Compare outputs that a candidate gave, one set per entry of `cases_for(fidelity)`, however it was run.

        Args:
            results: The outputs; None for a set that is not compared.
            precision: The dtype that the candidate computes floats in, or one by output, where it is coarser than the
                model's.

        Raises:
            UsageError: The user's tolerance does not fit.
        """
        chosen = [pair for pair in zip(self.cases, self.references, strict=True) if self._serves(pair[0], fidelity)]
        errors: list[OutputError] = []
        for (case, reference), found in zip(chosen, results, strict=True):
            if found is not None:
                errors += self._judge.errors(case, reference, found, fidelity, precision)
        compared = [reference for (_, reference), found in zip(chosen, results, strict=True) if found is not None]
        if (
            self._optional.any_left_out
            and any(map(has_numbers, self.references))
            and not any(map(has_numbers, compared))
        ):
            return self._verdict("unverified", "all inputs but empty ones are past a limit", errors)
        if results and all(found is None for found in results):
            return self._verdict("unverified", "the result takes none of the inputs, which are all empty")
        if all(error.agrees for error in errors):
            return self._verdict("ok", "", errors)
        if self._is_random():
            return self._verdict("unverified", "the model gives other numbers at every run")
        wrong = next((error for error in errors if not error.agrees and not error.noisy), None)
        if wrong is not None:
            return self._verdict("failed", f"output {wrong.output!r} on {wrong.inputs}: {wrong.reason}", errors)
        names = dict.fromkeys(error.output for error in errors if error.noisy)
        noisy = f"rounding alone changes {', '.join(names)} of the captured model as much as the rewriting did"
        plain = {str(case) for case, _ in chosen if not case.extreme}
        if not any(error.agrees and error.inputs in plain for error in errors):
            return self._verdict("unverified", noisy, errors)
        return self._verdict("ok", "", errors, f"{noisy}; only what else there is was compared")

    def baseline(self) -> Verification:
        """Compare the captured model itself with a callable oracle; "ok" without one, as then it is the reference."""
        if self.oracle is None:
            self.prepare()
            return self._verdict("unverified", self.unverifiable) if self.unverifiable else self._verdict("ok", "")
        return self.compare(self.model)

    def _verdict(self, state: State, reason: str, errors: Sequence[OutputError] = (), *notes: str) -> Verification:
        self._cover()
        told = dict.fromkeys((*self.notes, *self._judge.notes, *self._optional.told(), *notes))
        return Verification(state, reason, tuple(errors), tuple(told), self.coverage)

    def _collect(self, reference: Reference) -> None:
        """Run the reference on proposed inputs until enough have worked, then on what is made from the first ones."""
        wanted, refused = 0, ""
        kept: dict[str, Any] = {}
        for proposed, number, given in self._proposals():
            wanted += number
            for case in islice(proposed, _MAX_TRIES):
                if len(self.cases) >= wanted:
                    break
                if self.cases and case.source not in ("random", "given"):
                    break  # other values are for models that took none of the typical ones
                if not self.cases or self.inputs or self.sizes:
                    self._optional.ask(case)
                take = partial(self._try, reference)
                why = self._optional.attempt(case, take) if self._optional.holds(case) else take(case)
                kept = given if not why and len(self.cases) == 1 else kept
                if why and why != PAST_LIMIT:
                    refused = refused or why
                    self.notes.append(f"the model does not take {case}: {why}")
        if not self.cases:
            self.unverifiable = f"the captured model ran on none of the inputs tried: {refused or _TOO_LARGE}"
            return
        if len(self.cases) < wanted:
            self.notes.append(f"only {len(self.cases)} of {wanted} input sets could be compared")
        self._stress(reference, kept)
        if not informative(self.model, self.references):
            self.unverifiable = "every float output is NaN or infinite on the inputs tried, so nothing can be compared"
        else:
            self._branch_out(reference)

    def _try(self, reference: Reference, case: InputCase) -> str:
        """Take a case, or say why the reference refuses it."""
        try:
            outputs = reference.run(case.arrays)
        except CouldNotRunError as error:
            return error.what
        self.cases.append(case)
        self.references.append(outputs)
        return ""

    def _proposals(self) -> Iterator[tuple[Iterator[InputCase], int, dict[str, Any]]]:
        """Streams of candidates, how many sets are wanted of each, and what in them the user gave."""
        if self.inputs is not None and not isinstance(self.inputs, Mapping):
            for one in self.inputs:
                if isinstance(one, InputCase):
                    yield iter([one]), 1, {}
                    continue
                yield candidate_cases(self.model, self.seed, self.sizes, one), 1, check_named(self.model, one)
            return
        given = check_named(self.model, self.inputs or {})
        complete = all(value.name in given for value in required_inputs(self.model))
        wanted = _CASES_DYNAMIC if is_dynamic(self.model) and not complete and not self.sizes else _CASES_STATIC
        yield candidate_cases(self.model, self.seed, self.sizes, given), wanted, given

    def _stress(self, reference: Reference, kept: Mapping[str, Any]) -> None:
        """Run the reference on what is made from the first set; what it does not take is left."""
        base = self.cases[0]
        if not base.arrays:
            return
        bounded = not isinstance(self.inputs, Mapping) and any(isinstance(one, InputCase) for one in self.inputs or ())
        stress = Stress(self.model, base, kept, batch_is_free=not self.sizes and not bounded, seed=self.seed)
        refused = []
        for forms in stress.cases():
            for case in forms:
                why = self._optional.attempt(case, partial(self._try, reference))
                if not why:
                    break
            if why and why != PAST_LIMIT:
                refused.append(str(case))
        if base.source == "given" and not self.sizes:
            for case in stress.resized():
                why = self._optional.attempt(case, partial(self._try, reference))
                if not why:
                    break
                refused += [str(case)] if why != PAST_LIMIT else []
        self.coverage = replace(self.coverage, refused=tuple(refused))

    def _branch_out(self, reference: Reference) -> None:
        """See which branches the sets go through, and look for sets that go through the others."""
        every = branches(self.model)
        if not every:
            return
        reached: set[Branch] = set()
        usual: set[Branch] = set()  # by sets of usual values: others may saturate what a branch computes
        watch = Watch(self.model)
        try:
            watched = Reference(watch.model, None)
        except CouldNotRunError:  # what is watched besides keeps the runtime from loading it: no way is seen
            watched = None

        def new(case: InputCase) -> set[Branch]:
            try:
                return set() if watched is None else watch.reached(watched.run(case.arrays)) - reached
            except CouldNotRunError:  # the model refuses this set, which is what a search meets
                return set()
            except LimitError as error:  # more is computed here than in the run that was within them
                self._optional.slow(error)
                self.notes.append(f"which branches {case} goes through could not be seen: {error.what}")
                return set()

        with watched or nullcontext():
            for case in self.cases:
                found = new(case)
                reached |= found
                usual |= set() if case.extreme else found
            base = self.cases[0]
            source = "derived" if base.source == "given" else base.source
            kept = 0
            for case in attempts(self.model, replace(base, source=source)):
                if len(reached) == len(every) or kept == _MAX_NEW_CASES:
                    break
                found = set() if self._optional.out_of_time else new(case)
                if found and not self._optional.attempt(case, partial(self._try, reference)):
                    reached |= found
                    kept += 1
        left = [branch for branch in every if branch not in reached]
        self.coverage = replace(self.coverage, branches=len(every), reached=len(every) - len(left))
        self._forced.left = frozenset(left)
        for branch in every:
            past = None if branch in usual or self._optional.out_of_time else self._forced.force(branch, self.cases)
            if past is not None:
                self._optional.slow(past)
                self.notes.append(f"{in_words(self.model, branch)} could not be tried by force: {past.what}")

    def _in_forced_branches(self, candidate: ir.Model, fidelity: Fidelity, verdict: Verification) -> Verification:
        """The verdict with what forcing found; see `ForcedBranches`."""
        narrower = computed_in(candidate) if fidelity != "exact" else None
        serves = partial(self._serves, fidelity=fidelity)
        found = self._forced.compare(candidate, self.execute, serves, self.tolerance, fidelity, narrower)
        if found.wrong:
            return replace(self._verdict("failed", found.wrong, found.errors), notes=verdict.notes)
        self.coverage = replace(self.coverage, forced=found.done, unreached=found.unreached)
        names = ", ".join(found.unreached)
        told = (f"no input reached {names}, so nothing there was compared",) if names else ()
        return replace(verdict, coverage=self.coverage, notes=(*verdict.notes, *told))

    def _cover(self) -> None:
        """Say on what verdicts rest."""
        cases = [case for case in self.cases if not self._optional.dropped(case)]
        self.coverage = with_sets(self.coverage, cases)

    def _is_random(self) -> bool:
        """Whether the reference, run twice, disagrees with itself."""
        if self._random is None:
            self._random = self._disagrees_with_itself()
        return self._random

    def _disagrees_with_itself(self) -> bool:
        case = self.cases[0]
        try:
            with Reference(self.model, self.oracle) as reference:
                first, second = (reference.run(case.arrays) for _ in range(2))
        except CouldNotRunError:
            return False
        errors = self._judge.errors(case, first, second, "exact", excusable=False)
        return any(not error.agrees for error in errors)


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


__all__ = ["Coverage", "Execute", "State", "UserInputs", "Verification", "Verifier", "verify"]
