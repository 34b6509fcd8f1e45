"""The pass manager: runs passes, checks each one's work, and takes back what is wrong.

The captured model is never changed. Passes run on a copy that shares its weights. A first run takes no snapshots, so
that it costs one copy of the graph's structure whatever the number of passes. Only if a pass raises, breaks the
structure, or the numbers disagree in the end, everything runs again from the captured model, now with a snapshot before
every pass, so that the culprit is found, undone and named, and the others still count.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from xform.errors import LimitError, UsageError, VerificationError, XformError
from xform.graph.check import Interface, check
from xform.graph.clone import clone
from xform.pipeline.oracle import Oracle
from xform.pipeline.reference import Execute, run_anywhere
from xform.pipeline.result import PipelineResult, size_of
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.verdict import Coverage, Verification
from xform.pipeline.verify import UserInputs, Verifier
from xform.report.schema import PassReport, Size
from xform.rewrite.passes import Fidelity, Pass, PassContext
from xform.rewrite.remarks import Cost, Remark, RemarkLog
from xform.rewrite.rule import RuleStatistics
from xform.target import Target

VerifyMode = Literal["off", "final", "each"]
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all

_LOG = logging.getLogger("xform.pipeline")
_MAX_BLAMED = 16  # nodes named in a rolled-back remark
_LOOSENESS: dict[Fidelity, int] = {"exact": 0, "approximate": 1, "trained": 2}


def run_pipeline(
    model: ir.Model,
    passes: Sequence[Pass],
    *,
    target: Target | str = "cpu",
    verify: VerifyMode = "final",
    strict: bool = False,
    inputs: UserInputs | None = None,
    sizes: dict[str, int] | None = None,
    tolerance: UserTolerance | None = None,
    oracle: Oracle | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    execute: Execute = run_anywhere,
    verifier: Verifier | None = None,
) -> PipelineResult:
    """Run `passes` in order on a copy of `model`.

    Args:
        model: The captured model, left as it is.
        passes: See `xform.pipeline.presets.resolve`.
        target: What the result will run on.
        verify: Compare numbers after every pass that changed something ("each"), once ("final"), or never ("off").
            Structure is checked after every pass in any case.
        strict: Raise where a pass would be rolled back, and where nothing could be compared.
        inputs: Inputs to verify on instead of random ones.
        sizes: Numbers for dynamic dims of random inputs.
        tolerance: In place of the table of `xform.pipeline.tolerance`.
        oracle: Reference to compare with instead of the captured model run by ONNX Runtime.
        progress: Called before every step.
        seed: Of the random inputs.
        execute: Runs rewritten graphs; ONNX Runtime by default, see `xform.pipeline.reference`.
        verifier: Holds reference numbers of `model` already, from an earlier run with the same arguments.

    Raises:
        VerificationError: Only in strict mode, naming the pass; without it, see `PipelineResult.verification`.
        UsageError: Arguments that do not fit the model.
    """
    if verify not in ("off", "final", "each"):
        raise UsageError(f"verify must be 'off', 'final' or 'each', not {verify!r}")
    verifier = verifier or Verifier(model, oracle, inputs, sizes, tolerance, seed, execute)
    run = _Run(model, passes, Target.parse(target), verifier, strict, progress or (lambda *_: None))
    return run.run(verify)


class _PassFailedError(Exception):
    """A pass raised, or left an unsound graph."""

    def __init__(self, reason: str, where: Sequence[str], cause: Exception | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = tuple(where)
        self.cause = cause


@dataclass
class _Outcome:
    """What one pass did to the model it was given."""

    report: PassReport
    remarks: RemarkLog
    nodes: tuple[str, ...]  # original names of the nodes it rewrote


@dataclass
class _Run:
    """One call of `run_pipeline`."""

    captured: ir.Model
    passes: Sequence[Pass]
    target: Target
    verifier: Verifier
    strict: bool
    progress: Progress
    known_problems: frozenset[str] = frozenset()
    verify_seconds: float = 0.0
    last_seconds: float = 0.0
    statistics: dict[tuple[str, str], RuleStatistics] = field(default_factory=dict)

    def run(self, verify: VerifyMode) -> PipelineResult:
        start = time.perf_counter()
        self.known_problems = frozenset(check(self.captured))
        self.interface = Interface.of(self.captured)
        if verify != "off":
            self._prepare()  # before any pass: a pass that writes into shared weights must not change the reference
        result = self._run_each() if verify == "each" else self._run_fast()
        if verify == "final":
            result = self._verify_final(result)
        result.verifier = None if verify == "off" else self.verifier
        total = time.perf_counter() - start
        result.seconds = {"passes": total - self.verify_seconds, "verify": self.verify_seconds}
        if self.strict and result.verification.state in ("failed", "unverified"):
            what = "differs from" if result.verification.state == "failed" else "could not be compared with"
            raise VerificationError(
                f"the optimized model {what} the captured one: {result.verification.reason}",
                hint="run `xform bisect`" if result.verification.state == "failed" else "give inputs, or verify='off'",
            )
        return result

    def _prepare(self) -> None:
        start = time.perf_counter()
        self.progress("reference", 0, len(self.passes))
        self.verifier.prepare()
        self.verify_seconds += time.perf_counter() - start

    def _run_fast(self) -> PipelineResult:
        """All passes without snapshots; at the first trouble, again with them."""
        result = PipelineResult(clone(self.captured))
        for index, one in enumerate(self.passes):
            self.progress(one.name, index, len(self.passes))
            try:
                outcome = self._apply(one, result.model, result.passes)
            except _PassFailedError as failure:
                _LOG.debug("starting again with snapshots: pass %s failed, %s", one.name, failure.reason)
                break
            self._accept(result, outcome)
        else:
            if self._believable(result):
                return result
        return self._run_careful(None)

    def _believable(self, result: PipelineResult) -> bool:
        """Whether the last passes, where they said that they changed nothing, left a sound graph."""
        changed = not result.passes or result.passes[-1].status == "changed"
        return changed or self._problem(result.model) is None

    def _verify_final(self, result: PipelineResult) -> PipelineResult:
        """Compare once; on a mismatch find the pass to blame."""
        result.verification = self._compare(result.model, result.passes)
        if result.verification.state != "failed":
            return result
        return self._run_each()

    def _run_each(self) -> PipelineResult:
        """Snapshots and a comparison after every pass."""
        baseline = self._timed(lambda: self.verifier.compare(self.captured))
        if baseline.state != "failed":
            return self._run_careful(self.verifier)
        if self.verifier.oracle is None:
            raise XformError(
                f"the captured model no longer gives its own numbers: {baseline.reason}",
                hint="a pass wrote into a weight's memory; passes must make new tensors",
            )
        own = replace(self.verifier, oracle=None, cases=[], references=[], unverifiable="", notes=[], prepared=False)
        own.coverage = Coverage()
        result = self._run_careful(own)
        reason = f"the captured model, before any pass, differs from the reference: {baseline.reason}"
        result.verification = replace(baseline, reason=reason)
        return result

    def _run_careful(self, verifier: Verifier | None, trusting: bool = True) -> PipelineResult:
        """All passes, each undone if it raises, breaks the structure or (with a verifier) the numbers.

        A pass that says it changed no number is believed, until the end shows that one of them did.
        """
        self.statistics.clear()
        result = PipelineResult(clone(self.captured))
        snapshot: ir.Model | None = None  # of the model as it is now
        verified = False
        for index, one in enumerate(self.passes):
            self.progress(one.name, index, len(self.passes))
            snapshot = clone(result.model) if snapshot is None else snapshot
            try:
                outcome = self._apply(one, result.model, result.passes, check_always=True)
            except _PassFailedError as failure:
                result.model, snapshot = snapshot, None
                self._roll_back(result, one, failure)
                continue
            if outcome.report.status == "changed" or not trusting:
                if verifier is not None:
                    verdict = self._compare(result.model, [*result.passes, outcome.report], verifier)
                    if verdict.state == "failed":
                        result.model, snapshot = snapshot, None
                        wrong = _PassFailedError(verdict.reason, outcome.nodes)
                        self._roll_back(result, one, wrong, outcome, verdict)
                        continue
                    result.verification = verdict
                    outcome.report = self._with_errors(outcome.report, verdict)
                snapshot, verified = None, True
            else:
                verified = False
            self._accept(result, outcome)
        if verifier is not None and not verified:
            result.verification = self._compare(result.model, result.passes, verifier)
        if trusting and result.verification.state == "failed":
            return self._run_careful(verifier, trusting=False)
        return result

    def _apply(self, one: Pass, model: ir.Model, done: Sequence[PassReport], check_always: bool = False) -> _Outcome:
        """Run one pass on `model` and check the structure: always, or if it says that it changed something.

        Raises:
            _PassFailedError: The pass raised or broke the structure; `model` may be in any state.
            UsageError, LimitError: An option of the pass, or a file that it names, is wrong or too large: that is the
                user's to mend, and no fault of the pass.
        """
        stand = zip(self.passes, done, strict=False)  # one report for each pass that ran
        earlier = tuple(passed for passed, report in stand if report.status != "rolled_back")
        context = PassContext(self.target, RemarkLog(), self.statistics, before=earlier)
        before = done[-1].after if done and done[-1].after is not None else size_of(model)
        start = time.perf_counter()
        try:
            changed = one.run(model, context)
            seconds = time.perf_counter() - start
            problem = self._problem(model) if changed or check_always else None
        except (UsageError, LimitError):
            raise
        except Exception as error:
            _LOG.debug("pass %s raised", one.name, exc_info=True)
            where = error.where if isinstance(error, XformError) else ()
            text = error.what if isinstance(error, XformError) else str(error)
            raised = f"it raised {type(error).__name__}: {_line(text)}{_place(error)}"
            raise _PassFailedError(raised, where, error) from error
        nodes = tuple(dict.fromkeys(n for r in context.remarks if r.verdict == "applied" for n in r.nodes))
        if problem:
            raise _PassFailedError(f"it left an unsound graph: {problem}", nodes[:_MAX_BLAMED])
        after = size_of(model) if changed else before
        report = PassReport(
            one.name,
            one.fidelity,
            "changed" if changed else "unchanged",
            applied=context.remarks.count("applied"),
            missed=context.remarks.count("missed"),
            seconds=seconds,
            before=before,
            after=after,
        )
        return _Outcome(report, context.remarks, nodes)

    def _problem(self, model: ir.Model) -> str | None:
        """What is wrong with the structure that was not wrong at capture."""
        fresh = [problem for problem in check(model) if problem not in self.known_problems]
        if fresh:
            return fresh[0] if len(fresh) == 1 else f"{fresh[0]} (and {len(fresh) - 1} more)"
        return self.interface.difference(Interface.of(model))

    def _accept(self, result: PipelineResult, outcome: _Outcome) -> None:
        result.passes.append(outcome.report)
        # what a pass nearly matched in an earlier run, it has met again, or something else has taken its place
        again = {outcome.report.name, *(remark.pass_name for remark in outcome.remarks)}  # some passes run others
        told = [r for r in result.remarks if r.verdict != "missed" or r.pass_name not in again]
        result.remarks.remarks[:] = [*told, *outcome.remarks]
        result.statistics = self.statistics

    def _roll_back(
        self,
        result: PipelineResult,
        one: Pass,
        failure: _PassFailedError,
        outcome: _Outcome | None = None,
        verdict: Verification | None = None,
    ) -> None:
        """Record that `one` was undone; the model is restored already."""
        if self.strict:
            raise VerificationError(
                f"pass {one.name} is wrong: {failure.reason}",
                where=failure.where[:_MAX_BLAMED],
                hint="run `xform bisect` to find the rule and the node, or leave the pass out",
            ) from failure.cause
        size = result.passes[-1].after if result.passes else size_of(result.model)
        report = PassReport(one.name, one.fidelity, "rolled_back", before=size, after=size, reason=failure.reason)
        cost: Cost | None = None
        if outcome is not None:
            result.remarks.remarks.extend(r for r in outcome.remarks if r.verdict == "missed")
            done = outcome.report
            report = replace(report, missed=done.missed, rolled_back=done.applied, seconds=done.seconds)
            cost = _cost(done.after)
        result.passes.append(report if verdict is None else self._with_errors(report, verdict))
        result.remarks.add(
            Remark(
                one.name,
                "",
                "rolled_back",
                failure.where[:_MAX_BLAMED],
                failure.reason,
                cost_before=_cost(size),
                cost_after=cost,
            )
        )
        result.statistics = self.statistics

    def _compare(self, model: ir.Model, done: Sequence[PassReport], verifier: Verifier | None = None) -> Verification:
        self.progress("verify", len(done), len(self.passes))
        changed = {one.name for one in done if one.status == "changed"}
        fidelities: list[Fidelity] = [one.fidelity for one in self.passes if one.name in changed]
        loosest: Fidelity = max(fidelities, key=lambda fidelity: _LOOSENESS[fidelity], default="exact")
        return self._timed(lambda: (verifier or self.verifier).compare(model, loosest))

    def _timed(self, compare: Callable[[], Verification]) -> Verification:
        start = time.perf_counter()
        verdict = compare()
        self.last_seconds = time.perf_counter() - start
        self.verify_seconds += self.last_seconds
        return verdict

    def _with_errors(self, report: PassReport, verdict: Verification) -> PassReport:
        """The report with what its comparison, the last one made, found."""
        abs_error, rel_error = verdict.max_abs_error, verdict.max_rel_error
        return replace(report, max_abs_error=abs_error, max_rel_error=rel_error, verify_seconds=self.last_seconds)


def _cost(size: Size | None) -> Cost | None:
    return None if size is None else Cost(size.nodes, size.parameters, size.flops)


def _place(error: Exception) -> str:
    """` (raise_gelu.py:42)`, the innermost line of a rule or pass, not of what runs it or of an installed library."""
    root = Path(__file__).parents[1]
    machinery = (str(root / "pipeline"), str(root / "rewrite"))
    frames = traceback.extract_tb(error.__traceback__)
    known = [f for f in frames if f.filename.startswith(str(root)) or "site-packages" not in f.filename]
    rules = [frame for frame in known if not frame.filename.startswith(machinery)]
    own = rules or [frame for frame in known if frame.filename != __file__]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:400] if lines else "no message"
