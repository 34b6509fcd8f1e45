"""Finding what broke a model: the first bad pass, its first bad rule application, and the node.

Passes are run one by one and compared with the captured model. Inside the bad pass, rule applications are counted by
`PassContext.limit`; a binary search over the limit finds the first application after which the numbers are wrong, in
about log2(n) runs. A pass that is not made of rules is searched by its numbers: the first value, in order of
computation, that has the same name before and after but not the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from xform.errors import XformError
from xform.graph.check import Interface, check
from xform.graph.clone import clone
from xform.pipeline.divergence import Divergence, first_divergence
from xform.pipeline.oracle import CouldNotRunError, Oracle
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.verify import UserInputs, Verification, Verifier
from xform.rewrite.passes import Pass, PassContext
from xform.rewrite.remarks import Remark
from xform.target import Target

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BisectResult:
    """The culprit.

    Attributes:
        bad_pass: Name of the first pass after which the model is wrong; None if there is none.
        index: Its place in the list of passes, from 0.
        rule: The rule whose application broke it; empty for a pass that is not made of rules.
        application: Which rule application of the pass it was, from 1; None if unknown.
        nodes: Original names of the nodes it rewrote, or of the first node that computes something else.
        reason: What is wrong.
        before: The verdict just before the bad application or pass.
        after: The verdict just after it; None where it raised or left an unsound graph.
        divergence: The first intermediate value that differs, where both graphs run and share value names.
        runs: Number of times the bad pass was run.
    """

    bad_pass: str | None = None
    index: int | None = None
    rule: str = ""
    application: int | None = None
    nodes: tuple[str, ...] = ()
    reason: str = ""
    before: Verification | None = None
    after: Verification | None = None
    divergence: Divergence | None = None
    runs: int = 0

    @property
    def found(self) -> bool:
        """Whether some pass is to blame."""
        return self.bad_pass is not None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data = {k: getattr(self, k) for k in ("bad_pass", "index", "rule", "application", "reason", "runs")}
        data["nodes"] = list(self.nodes)
        for key, verdict in (("before", self.before), ("after", self.after)):
            data[key] = None if verdict is None else verdict.as_dict()
        data["divergence"] = None if self.divergence is None else vars(self.divergence)
        return data


def bisect(
    model: ir.Model,
    passes: Sequence[Pass],
    *,
    target: Target | str = "cpu",
    inputs: UserInputs | None = None,
    sizes: Mapping[str, int] | None = None,
    tolerance: UserTolerance | None = None,
    oracle: Oracle | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> BisectResult:
    """Find the first pass that makes `model` wrong, and what in it. The arguments are those of `run_pipeline`.

    Raises:
        CouldNotRunError: The captured model gives no reference numbers, or differs from the oracle before any pass.
        UsageError: Arguments that do not fit the model.
    """
    verifier = Verifier(model, oracle, inputs, sizes, tolerance, seed)
    verdict = verifier.compare(model)
    if verdict.state != "ok":
        raise CouldNotRunError(f"there is nothing to bisect against: {verdict.reason}")
    search = _Search(model, Target.parse(target), verifier)
    current, good = clone(model), verdict
    for index, one in enumerate(passes):
        if progress is not None:
            progress(one.name, index, len(passes))
        snapshot = clone(current)
        search.before = tuple(passes[:index])
        trial = search.run(one, current, None)
        if trial.bad:
            result = search.inside(one, snapshot, good, trial)
            return replace(result, bad_pass=one.name, index=index)
        good = trial.verdict or good
    return BisectResult(before=verdict, after=good)


@dataclass
class _Trial:
    """One run of a pass up to a number of rule applications."""

    model: ir.Model
    bad: bool
    reason: str
    verdict: Verification | None
    applied: list[Remark]
    applications: int
    where: tuple[str, ...] = ()


@dataclass
class _Search:
    captured: ir.Model
    target: Target
    verifier: Verifier
    runs: int = 0
    before: tuple[Pass, ...] = ()

    def run(self, one: Pass, model: ir.Model, limit: int | None) -> _Trial:
        """Run a pass on `model` in place, check the structure and compare the numbers."""
        self.runs += 1
        context = PassContext(self.target, limit=limit, before=self.before)
        problem, changed = "", True
        where: tuple[str, ...] = ()
        try:
            changed = one.run(model, context)
        except Exception as error:
            where = error.where if isinstance(error, XformError) else ()
            problem = f"it raises {type(error).__name__}: {error.what if isinstance(error, XformError) else error}"
        applied = [remark for remark in context.remarks if remark.verdict == "applied"]
        problem = problem or self._unsound(model)
        if problem:
            return _Trial(model, True, problem, None, applied, context.applications, where)
        if not changed:
            return _Trial(model, False, "", None, applied, context.applications)
        verdict = self.verifier.compare(model, one.fidelity)
        bad = verdict.state == "failed"
        return _Trial(model, bad, verdict.reason, verdict, applied, context.applications)

    def _unsound(self, model: ir.Model) -> str:
        known = check(self.captured)
        fresh = [problem for problem in check(model) if problem not in known]
        return fresh[0] if fresh else Interface.of(self.captured).difference(Interface.of(model)) or ""

    def inside(self, one: Pass, before: ir.Model, good: Verification, whole: _Trial) -> BisectResult:
        """What in the bad pass is to blame; `before` is the graph it was given."""
        self.runs = 1
        none = self.run(one, clone(before), 0)
        if none.bad or none.applications > 0:  # it does not count applications, so the limit says nothing
            return self._by_numbers(before, good, whole)
        # a pass that raised may have raised in the application after the last one counted
        low, high = 0, whole.applications + (whole.verdict is None)
        last_good, first_bad = none, whole
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.run(one, clone(before), middle)
            if trial.bad:
                high, first_bad = middle, trial
            else:
                low, last_good = middle, trial
        return self._by_application(before, good, last_good, first_bad, high)

    def _by_application(
        self, before: ir.Model, good: Verification, last_good: _Trial, first_bad: _Trial, number: int
    ) -> BisectResult:
        blamed = first_bad.applied[number - 1] if number <= len(first_bad.applied) else None
        return BisectResult(
            rule=blamed.rule if blamed else "",
            application=number,
            nodes=blamed.nodes if blamed else first_bad.where,
            reason=first_bad.reason,
            before=last_good.verdict or good,
            after=first_bad.verdict,
            divergence=self._divergence(last_good.model, first_bad),
            runs=self.runs,
        )

    def _by_numbers(self, before: ir.Model, good: Verification, whole: _Trial) -> BisectResult:
        divergence = self._divergence(before, whole)
        nodes = (divergence.node,) if divergence is not None else whole.where
        return BisectResult(
            nodes=nodes, reason=whole.reason, before=good, after=whole.verdict, divergence=divergence, runs=self.runs
        )

    def _divergence(self, good: ir.Model, bad: _Trial) -> Divergence | None:
        if bad.verdict is None:
            return None
        for case in self.verifier.cases:
            try:
                found = first_divergence(good, bad.model, case.arrays)
            except CouldNotRunError:  # an intermediate value that the runtime cannot hand out; the verdict still stands
                continue
            if found is not None:
                return found
        return None
