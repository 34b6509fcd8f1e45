"""One captured graph through the pipeline and a backend, verified, with its report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from xform.backends import Artifact, Backend, LoadOptions, LowerOptions, Runner, get_backend
from xform.errors import TargetError, UsageError
from xform.forks import PerProcess
from xform.graph.clone import SOURCE_OPSET
from xform.limits import Limits, limits_of
from xform.lowering import LOOSENESS, Lowered, judge_artifact, lower, without_what_does_not_load
from xform.passes.attention import PackTokens
from xform.passes.integer import Quantizer
from xform.passes.precision import ConvertPrecision
from xform.pipeline.calibration_data import Flatten
from xform.pipeline.manager import Progress, VerifyMode
from xform.pipeline.oracle import Oracle
from xform.pipeline.presets import PRESETS, resolve
from xform.pipeline.quantization import told
from xform.pipeline.result import PipelineResult, size_of
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.tune import INPUT, MODES, TuneMode
from xform.pipeline.verdict import Verification
from xform.pipeline.verify import UserInputs
from xform.planning import Plan, refuse_failed
from xform.report.concepts import count_concepts, with_concepts
from xform.report.schema import Report, VerificationReport
from xform.rewrite.passes import Fidelity, Pass
from xform.rewrite.remarks import Remark, Verdict
from xform.target import Target

# Element-wise, relative to the largest: catches a wrong scale or sign. How good int8 is, the search decides.
_QUANTIZED = 0.3
_REASONS = 3  # told where nothing is in int8


@dataclass(frozen=True)
class Request:
    """What the caller of `optimize` asked for, checked: see there for the fields."""

    target: Target
    preset: str
    passes: tuple[Pass, ...]
    backend: Backend
    verify: VerifyMode
    strict: bool
    tolerance: UserTolerance | None
    lowering: LowerOptions
    progress: Progress | None = None
    tune: TuneMode = "off"
    only_this_backend: bool = False
    calibration: Any = None
    padding: str = "padded"
    limits: Limits = field(default_factory=Limits)
    exact_tolerance: UserTolerance | None = None  # of exact passes, before anything is quantized

    @staticmethod
    def of(
        target: str | Target,
        preset: str,
        passes: Sequence[str | Pass] | None,
        backend: str | None,
        calibration: object,
        tolerance: UserTolerance | None,
        verify: VerifyMode,
        strict: bool,
        lowering: LowerOptions,
        progress: Progress | None,
        tune: TuneMode = "off",
        padding: str = "padded",
        limits: Mapping[str, float] | Limits | None = None,
    ) -> Request:
        """Check the arguments before any work is done.

        Raises:
            UsageError: An unknown target, preset, pass or backend, or options that do not go together.
            TargetError: No backend here for the target.
        """
        if passes is None and preset not in PRESETS:
            raise UsageError(f"there is no preset {preset!r}", hint=f"this version has: {', '.join(PRESETS)}")
        chosen = tuple(resolve(preset, passes))
        if padding not in ("padded", "packed"):
            raise UsageError(f"padding={padding!r} is unknown", hint="use 'padded' or 'packed'")
        if padding == "packed" and not any(isinstance(p, PackTokens) for p in chosen):
            place = next((i for i, p in enumerate(chosen) if isinstance(p, Quantizer)), len(chosen))
            chosen = (*chosen[:place], PackTokens(), *chosen[place:])
        exact_tolerance = tolerance
        if tolerance is None and any(isinstance(p, Quantizer) for p in chosen):
            tolerance = _QUANTIZED
        if calibration is not None and all(p.fidelity == "exact" for p in chosen):
            raise UsageError(
                "`calibration` was given, but every pass is exact and uses none",
                hint=f"leave it out, or choose passes that calibrate instead of preset={preset!r}",
            )
        if verify not in ("off", "final", "each"):
            raise UsageError(f"verify must be 'off', 'final' or 'each', not {verify!r}")
        if tune not in MODES:
            raise UsageError(f"tune must be one of {', '.join(MODES)}, not {tune!r}")
        parsed = Target.parse(target)
        name = preset if passes is None else "custom"
        where = get_backend(backend, parsed, compile_only=lowering.compile_only)
        where.check(parsed, lowering)
        if lowering.precision in where.graph_precisions:
            chosen = (*chosen, ConvertPrecision(lowering.precision))
        one = backend is not None
        return Request(
            parsed, name, chosen, where, verify, strict, tolerance, lowering, progress, tune, one, calibration, padding,
            limits_of(limits),
            exact_tolerance,
        )  # fmt: skip

    @property
    def fidelity(self) -> Fidelity:
        """The loosest fidelity of the passes."""
        return max((p.fidelity for p in self.passes), key=LOOSENESS.index, default="exact")


@dataclass
class Compiled:
    """The result of one compilation.

    Attributes:
        graph: The canonical graph after the passes.
        artifact: What the backend made of it.
        report: What happened.
    """

    graph: ir.Model
    artifact: Artifact
    report: Report
    backend: Backend
    _runner: PerProcess[Runner] = field(default_factory=PerProcess, repr=False)

    @property
    def runner(self) -> Runner:
        """The loaded artifact; loaded when first needed, once for all threads, and again in a forked process.

        Raises:
            TargetError: The runtime refuses it.
        """
        return self._runner.get(lambda: self.backend.load(self.artifact, LoadOptions()))

    def note_choices(self) -> None:
        """Take what the backend has decided since the last time into the report, as remarks."""
        self.report.remarks.extend(remarks_of(self.artifact))

    def close(self) -> None:
        """Release the runtime's memory and threads; the next use loads it again."""
        runner = self._runner.take()
        if runner is not None:
            runner.close()


def compile_graph(
    captured: ir.Model,
    request: Request,
    *,
    source: str,
    inputs: UserInputs | None = None,
    oracle: Oracle | None = None,
    capture_seconds: float = 0.0,
    flatten: Flatten | None = None,
) -> Compiled:
    """Run the passes, lower, and compare what the user will get with the captured model.

    Args:
        source: File or class name, for the report.
        inputs: Input sets to verify on; random ones where absent.
        oracle: The reference; the captured model run by ONNX Runtime where absent.
        flatten: Turns a calibration sample in the caller's form into graph inputs.

    Raises:
        VerificationError: The result differs from the reference, or (strict) could not be compared.
        TargetError: The backend cannot run the graph.
    """
    plan = Plan.of(captured, request, inputs=inputs, oracle=oracle, flatten=flatten)
    result = plan.run(plan.passes)
    refuse_failed(result.verification, "the optimized graph differs from the original")
    start = time.perf_counter()
    for remark in told(plan.remarks, result.passes):
        result.remarks.add(remark)
    report = Report(source, str(request.target), request.preset, request.backend.name)
    compiled, result = _loaded(plan, lower(plan, result), report)
    seconds = {"capture": capture_seconds, **result.seconds, "lower": time.perf_counter() - start}
    report.backend = compiled.backend.name
    verification = result.verification
    if request.lowering.compile_only:
        report.warnings.append("what the backend made was not run and not compared: `compile_only` was asked for")
    elif result.verifier is not None and verification.ok:
        start = time.perf_counter()
        verification = judge_artifact(compiled.runner, compiled.graph, result.verifier, request)
        seconds["verify"] = seconds.get("verify", 0.0) + time.perf_counter() - start
        refuse_failed(verification, f"what backend {report.backend!r} runs differs from the original")
        notes = tuple(dict.fromkeys((*result.verification.notes, *verification.notes)))
        verification = replace(verification, coverage=result.verification.coverage, notes=notes)
    _fill(report, plan.captured, compiled, result, verification, request)
    report.warnings.extend(filter(None, [plan.warning]))
    report.seconds = seconds
    return compiled


def _loaded(plan: Plan, lowered: Lowered, report: Report) -> tuple[Compiled, PipelineResult]:
    """The loaded artifact, and how its graph came about. Passes after which the runtime refuses it are undone."""
    compiled = Compiled(lowered.graph, lowered.artifact, report, lowered.backend)
    if plan.request.lowering.compile_only:
        return compiled, lowered.result
    try:
        compiled.runner  # noqa: B018  # loading is the question
    except TargetError as error:
        if plan.request.tune != "off":
            raise
        lowered = without_what_does_not_load(plan, error)
        compiled = Compiled(lowered.graph, lowered.artifact, report, lowered.backend)
    return compiled, lowered.result


def remarks_of(artifact: Artifact) -> list[Remark]:
    """What a backend has decided since the last time, as remarks."""
    pending, artifact.choices = artifact.choices, []
    remarks = []
    for choice in pending:
        verdict: Verdict = "applied" if choice.applied else "missed"
        remarks.append(Remark(artifact.backend, choice.rule, verdict, choice.nodes, choice.reason, choice.concept))
    return remarks


def _fill(
    report: Report,
    captured: ir.Model,
    compiled: Compiled,
    result: PipelineResult,
    verification: Verification,
    request: Request,
) -> None:
    report.opset_before = captured.meta.get(SOURCE_OPSET)
    report.artifact = compiled.artifact.metadata
    report.opset_after = report.artifact.get("opset")
    report.placement = report.artifact.get("placement", {})
    report.before = size_of(captured)
    report.after = size_of(compiled.graph)
    report.passes = result.passes
    report.remarks = with_concepts(result.remarks, captured)
    compiled.note_choices()
    report.concepts = count_concepts(compiled.graph)
    report.verification = _verification_report(verification, request)
    rolled_back = [f"pass {p.name} was rolled back: {p.reason}" for p in result.rolled_back]
    report.warnings.extend(dict.fromkeys([*rolled_back, *verification.notes, *captured.meta.get("xform.notes", ())]))
    report.warnings.extend(compiled.artifact.notes)
    if report.artifact.get("tuning", {}).get("chosen") == INPUT:
        report.warnings.append(
            "nothing ran faster here than the model as it came, so the result is the model as it came"
        )
    if any(isinstance(one, Quantizer) for one in request.passes) and not report.concepts.get("int8"):
        report.warnings.append(_nothing_in_int8(report))
    if verification.state == "unverified":
        report.warnings.append(f"the result is not verified: {verification.reason}")


def _nothing_in_int8(report: Report) -> str:
    """That int8 was asked for and is nowhere, and why: the reasons, the most frequent ones first."""
    reasons = Counter(r.reason for r in report.remarks if r.concept == "int8" and r.nodes and r.verdict != "applied")
    why = [f"{reason} ({number} of them)" if number > 1 else reason for reason, number in reasons.most_common(_REASONS)]
    more = len(reasons) - len(why)
    if report.artifact.get("tuning"):
        why.insert(0, "the fastest form found by tuning is in float")
    return "nothing in the result is in int8: " + (
        ("; ".join(why) + (f"; and {more} more reasons" if more else ""))
        or "there is no product or convolution in float32 with constant weights"
    )


def _verification_report(verification: Verification, request: Request) -> VerificationReport:
    coverage = verification.coverage
    compared = bool(verification.outputs)
    return VerificationReport(
        mode=request.verify,
        passed={"ok": True, "failed": False}.get(verification.state),
        max_abs_error=verification.max_abs_error,
        max_rel_error=verification.max_rel_error,
        tolerance=max((output.rtol for output in verification.outputs), default=None),
        cases=len(verification.cases),
        inputs=tuple(verification.cases),
        given=coverage.given if compared else 0,
        derived=coverage.derived if compared else 0,
        random=coverage.random if compared else 0,
        sizes=coverage.sizes,
        masks=coverage.masks,
        branches=coverage.branches,
        reached=coverage.reached,
        forced=coverage.forced,
        unreached=coverage.unreached,
        refused=coverage.refused,
        oracle=coverage.oracle if compared else "",
        reason=verification.reason,
    )


__all__ = ["Compiled", "Request", "compile_graph", "remarks_of"]
