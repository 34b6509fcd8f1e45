"""From a verified graph to an artifact: by measurement where asked for, and never to one that does not load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from xform.backends import Artifact, Backend, LoadOptions, Runner
from xform.errors import TargetError, XformError
from xform.pipeline.manager import run_pipeline
from xform.pipeline.oracle import Outputs
from xform.pipeline.quantization import told
from xform.pipeline.random_inputs import random_inputs
from xform.pipeline.result import PipelineResult
from xform.pipeline.tune import Candidate, candidates, choose, competitors
from xform.pipeline.verdict import Verification
from xform.pipeline.verify import Verifier
from xform.planning import Plan, refuse_failed, run_cases
from xform.report.schema import PassReport
from xform.rewrite.passes import Fidelity, Pass
from xform.rewrite.remarks import Remark

if TYPE_CHECKING:
    from xform.compilation import Request

_PRECISIONS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_EXTREME = 100.0  # times the relative tolerance
LOOSENESS: tuple[Fidelity, ...] = ("exact", "approximate", "trained")


@dataclass(frozen=True)
class Lowered:
    """What was lowered.

    Attributes:
        graph: The graph.
        backend: By what.
        artifact: To what.
        result: How the graph came about.
    """

    graph: ir.Model
    backend: Backend
    artifact: Artifact
    result: PipelineResult


def lower(plan: Plan, result: PipelineResult) -> Lowered:
    """Lower a verified graph; where asked for, by timing what competes, of which nothing wrong is chosen."""
    request = plan.request
    backend, target = request.backend, request.target
    if request.tune == "off":
        return Lowered(result.model, backend, backend.lower(result.model, target, request.lowering), result)
    results = {backend.name: result}
    others = [] if request.only_this_backend else competitors(backend, target, request.lowering)
    quantization = plan.quantization
    for other in others if quantization is not None else []:
        assert quantization is not None
        form = quantization.form_for(other.name)
        found = plan.run(form.passes)
        for remark in told(form.remarks, found.passes):
            found.remarks.add(remark)
        if found.verification.state != "failed":
            results[other.name] = found
    competing = candidates(
        plan.captured, result.model, backend, request.lowering, mode=request.tune,
        others=[other for other in others if quantization is None or other.name in results],
        forms={name: found.model for name, found in results.items()},
        exact=None if quantization is None else quantization.exact,
    )  # fmt: skip
    cases = result.verifier.cases if result.verifier is not None else []
    feeds = dict(cases[0].arrays) if cases else random_inputs(plan.captured)
    chosen, artifact, decision = choose(
        competing, target, feeds, request.tune, request.progress, lambda *made: _why_not(plan, *made)
    )
    artifact.metadata["tuning"] = {"mode": request.tune, **asdict(decision)}
    concept = "attention" if "attention" in chosen.label else "tuning"
    chosen_from = next((found for found in results.values() if found.model is chosen.graph), result)
    chosen_from.remarks.add(Remark("tune", request.tune, "applied", (), decision.describe(), concept))
    for label, reason in decision.failed.items():
        chosen_from.remarks.add(Remark("tune", label, "missed", (), f"{label} was left out: {reason}", "tuning"))
    chosen_from.verifier, chosen_from.verification = result.verifier, result.verification
    return Lowered(chosen.graph, chosen.backend, artifact, chosen_from)


def _why_not(plan: Plan, candidate: Candidate, artifact: Artifact) -> str:
    """Why a lowering cannot be chosen, however fast it is; empty if it can."""
    try:
        runner = candidate.backend.load(artifact, LoadOptions())
        try:
            if plan.request.verify == "off":
                return ""
            verdict = judge_artifact(runner, candidate.graph, plan.verifier, plan.request)
        finally:
            runner.close()
    except XformError as error:
        return error.what
    return verdict.reason if verdict.state == "failed" else ""


def judge_artifact(runner: Runner, graph: ir.Model, verifier: Verifier, request: Request) -> Verification:
    """Compare a loaded artifact, runtime optimizations included, with the reference."""
    verifier.prepare()
    if verifier.unverifiable:
        return Verification("unverified", verifier.unverifiable)
    precision = None if request.lowering.precision is None else _PRECISIONS[request.lowering.precision]
    narrower = precision not in (None, ir.DataType.FLOAT)
    fidelity: Fidelity = "approximate" if narrower and request.fidelity == "exact" else request.fidelity
    results: list[Outputs | None] = []
    refused = ""
    for case in verifier.cases_for(fidelity):
        try:
            results += run_cases(runner, graph, [case.arrays])
        except Exception as error:
            if not case.is_empty:
                raise
            refused = f"the result does not take {case}, which the model as it came does: {error}"
            results.append(None)
    verdict = _without_extremes(verifier.judge(results, fidelity, precision), verifier)
    return replace(verdict, notes=(*verdict.notes, refused)) if refused else verdict


def _without_extremes(verdict: Verification, verifier: Verifier) -> Verification:
    """A verdict in which what a runtime's kernels do on extreme values is a warning.

    The graph itself has been compared on them. Fused kernels round in another order, which near-ties of a softmax over
    logits of thousands enlarge beyond what nudging the captured model shows. Up to `_EXTREME` times the tolerance, and
    on extreme values alone, that is told and not refused.
    """
    extreme = {str(case) for case in verifier.cases if case.extreme}
    wrong = [error for error in verdict.outputs if not error.agrees and not error.noisy]
    if verdict.state != "failed" or not wrong:
        return verdict
    if any(error.inputs not in extreme or error.max_rel_error > _EXTREME * error.rtol for error in wrong):
        return verdict
    told = f"on extreme values the runtime's kernels differ from the original: {verdict.reason}"
    return replace(verdict, state="ok", reason="", notes=(*verdict.notes, told))


def without_what_does_not_load(plan: Plan, error: TargetError) -> Lowered:
    """The result without the passes after which the runtime refuses the graph: for want of a kernel, say.

    Raises:
        TargetError: `error` itself, where the graph is refused before any pass, or the request is strict.
    """
    kept = list(plan.passes)
    undone: list[tuple[Pass, str]] = []
    last = error
    while not plan.request.strict:
        culprit = _first_that_does_not_load(plan, kept)
        if culprit is None:
            raise error
        undone.append((kept.pop(culprit), f"what it makes does not load: {last.what}"))
        found = plan.run(kept)
        refuse_failed(found.verification, "the optimized graph differs from the original")
        try:
            artifact = _loadable(plan, found.model)
        except TargetError as again:
            last = again
            continue
        for remark in told(plan.remarks, found.passes, [one.name for one, _ in undone]):
            found.remarks.add(remark)
        for one, reason in undone:
            found.remarks.add(Remark(one.name, "", "rolled_back", error.where, reason))
            found.passes.append(PassReport(one.name, one.fidelity, "rolled_back", reason=reason))
        return Lowered(found.model, plan.request.backend, artifact, found)
    raise error


def _first_that_does_not_load(plan: Plan, passes: Sequence[Pass]) -> int | None:
    """Index of the first pass after which the graph does not load; None if it does not load before any."""

    def loads(number: int) -> bool:
        model = run_pipeline(plan.captured, passes[:number], target=plan.request.target, verify="off").model
        try:
            _loadable(plan, model)
        except TargetError:
            return False
        return True

    good, bad = 0, len(passes)
    if not bad or not loads(good):
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if loads(middle) else (good, middle)
    return bad - 1


def _loadable(plan: Plan, model: ir.Model) -> Artifact:
    """The graph lowered; TargetError where the runtime does not load that."""
    backend = plan.request.backend
    artifact = backend.lower(model, plan.request.target, plan.request.lowering)
    backend.load(artifact, LoadOptions()).close()
    return artifact
