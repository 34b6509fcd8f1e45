"""One captured graph through the pipeline and a backend, verified, with its report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.backends import Artifact, Backend, LoadOptions, LowerOptions, Runner, get_backend
from xform.errors import TargetError, UsageError, VerificationError
from xform.forks import PerProcess
from xform.graph.clone import SOURCE_OPSET
from xform.limits import Limits, limits_of
from xform.passes.attention import PackTokens
from xform.passes.integer import Quantizer
from xform.pipeline.calibration_data import Flatten, calibration_batches
from xform.pipeline.manager import Progress, VerifyMode, run_pipeline
from xform.pipeline.oracle import Inputs, Oracle, Outputs, run_model
from xform.pipeline.padding import zero_pads
from xform.pipeline.presets import PRESETS, resolve
from xform.pipeline.quantization import Form, Quantization
from xform.pipeline.random_inputs import random_inputs
from xform.pipeline.result import PipelineResult, size_of
from xform.pipeline.tolerance import UserTolerance
from xform.pipeline.tune import INPUT, MODES, TuneMode, candidates, choose, competitors
from xform.pipeline.verify import Execute, UserInputs, Verification, Verifier
from xform.report.concepts import count_concepts, with_concepts
from xform.report.schema import Report, VerificationReport
from xform.rewrite.passes import Fidelity, Pass
from xform.rewrite.remarks import Remark, Verdict
from xform.target import Target

_PRECISIONS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# Element-wise, relative to the largest: catches a wrong scale or sign. How good int8 is, the search decides.
_QUANTIZED = 0.3
_LOOSENESS: tuple[Fidelity, ...] = ("exact", "approximate", "trained")


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
            raise UsageError(f"padding must be 'padded' or 'packed', not {padding!r}")
        if padding == "packed" and not any(isinstance(p, PackTokens) for p in chosen):
            place = next((i for i, p in enumerate(chosen) if isinstance(p, Quantizer)), len(chosen))
            chosen = (*chosen[:place], PackTokens(), *chosen[place:])
        if tolerance is None and any(isinstance(p, Quantizer) for p in chosen):
            tolerance = _QUANTIZED
        if calibration is not None and all(p.fidelity == "exact" for p in chosen):
            raise UsageError(
                "calibration was given, but every pass is exact and uses none",
                hint=f"leave it out, or choose passes that calibrate instead of preset {preset!r}",
            )
        if verify not in ("off", "final", "each"):
            raise UsageError(f"verify must be 'off', 'final' or 'each', not {verify!r}")
        if tune not in MODES:
            raise UsageError(f"tune must be one of {', '.join(MODES)}, not {tune!r}")
        parsed = Target.parse(target)
        name = preset if passes is None else "custom"
        where = get_backend(backend, parsed, compile_only=lowering.compile_only)
        if where.name != "torch_triton" and (lowering.precision is not None or lowering.compile != "off"):
            raise UsageError(
                f"backend {where.name!r} takes no `precision` and no `compile`",
                hint="leave them out, or choose backend='torch_triton'",
            )
        one = backend is not None
        return Request(
            parsed, name, chosen, where, verify, strict, tolerance, lowering, progress, tune, one, calibration, padding,
            limits_of(limits),
        )  # fmt: skip

    @property
    def fidelity(self) -> Fidelity:
        """The loosest fidelity of the passes."""
        return max((p.fidelity for p in self.passes), key=_LOOSENESS.index, default="exact")


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
    if request.padding == "packed":  # from here on zeros in pads are what the model means
        captured, oracle = zero_pads(captured, _canonical(captured, request)), None
    quantization, warning = _quantization(captured, request, flatten)
    form = None if quantization is None else quantization.form_for(request.backend.name)
    result = run_pipeline(
        captured,
        request.passes if form is None else form.passes,
        target=request.target,
        verify=request.verify,
        strict=request.strict,
        inputs=inputs,
        tolerance=request.tolerance,
        oracle=oracle,
        progress=request.progress,
        execute=_executor(captured, request),
    )
    _refuse_failed(result.verification, "the optimized graph differs from the original")
    start = time.perf_counter()
    _tell(result, form)
    graph, backend, artifact, result = _lower(captured, result, request, quantization)
    seconds = {"capture": capture_seconds, **result.seconds, "lower": time.perf_counter() - start}
    report = Report(source, str(request.target), request.preset, backend.name)
    compiled = Compiled(graph, artifact, report, backend)
    verification = result.verification
    if request.lowering.compile_only:
        report.warnings.append("what the backend made was not run and not compared: compile_only was asked for")
    elif result.verifier is not None and verification.ok:
        start = time.perf_counter()
        verification = _judge_artifact(compiled, result.verifier, request)
        seconds["verify"] = seconds.get("verify", 0.0) + time.perf_counter() - start
        _refuse_failed(verification, f"what backend {backend.name!r} runs differs from the original")
    _fill(report, captured, compiled, result, verification, request)
    report.warnings.extend(filter(None, [warning]))
    report.seconds = seconds
    return compiled


def _canonical(captured: ir.Model, request: Request) -> ir.Model:
    """The graph before anything is packed or quantized."""
    plain = [one for one in request.passes if not isinstance(one, PackTokens | Quantizer)]
    return run_pipeline(captured, plain, target=request.target, verify="off").model


def _quantization(captured: ir.Model, request: Request, flatten: Flatten | None) -> tuple[Quantization | None, str]:
    """What quantizes, if some pass does, and a warning about what it calibrates on, empty if there is none."""
    if not any(isinstance(one, Quantizer) for one in request.passes):
        return None, ""
    batches, warning = calibration_batches(captured, request.calibration, flatten)

    def prepare(passes: Sequence[Pass]) -> ir.Model:
        return run_pipeline(captured, passes, target=request.target, verify="off").model

    return Quantization(request.passes, prepare, batches, request.progress), warning


def _tell(result: PipelineResult, form: Form | None) -> None:
    for remark in () if form is None else form.remarks:
        result.remarks.add(remark)


def _lower(
    captured: ir.Model, result: PipelineResult, request: Request, quantization: Quantization | None
) -> tuple[ir.Model, Backend, Artifact, PipelineResult]:
    """The graph that was lowered, by which backend, to what, and how it came about: by measurement where asked for."""
    backend, target = request.backend, request.target
    if request.tune == "off":
        return result.model, backend, backend.lower(result.model, target, request.lowering), result
    results = {backend.name: result}
    others = [] if request.only_this_backend else competitors(backend, target, request.lowering)
    for other in others if quantization is not None else []:
        assert quantization is not None
        form = quantization.form_for(other.name)
        found = run_pipeline(captured, form.passes, target=target, verify="off")
        _tell(found, form)
        results[other.name] = found
    competing = candidates(
        captured, result.model, backend, request.lowering, mode=request.tune, others=others,
        forms={name: found.model for name, found in results.items()},
        exact=None if quantization is None else quantization.exact,
    )  # fmt: skip
    cases = result.verifier.cases if result.verifier is not None else []
    feeds = dict(cases[0].arrays) if cases else random_inputs(captured)
    chosen, artifact, decision = choose(competing, target, feeds, request.tune, request.progress)
    artifact.metadata["tuning"] = {"mode": request.tune, **asdict(decision)}
    concept = "attention" if "attention" in chosen.label else "tuning"
    told = next((found for found in results.values() if found.model is chosen.graph), result)
    told.remarks.add(Remark("tune", request.tune, "applied", (), decision.describe(), concept))
    told.verifier, told.verification = result.verifier, result.verification
    return chosen.graph, chosen.backend, artifact, told


def remarks_of(artifact: Artifact) -> list[Remark]:
    """What a backend has decided since the last time, as remarks."""
    pending, artifact.choices = artifact.choices, []
    remarks = []
    for choice in pending:
        verdict: Verdict = "applied" if choice.applied else "missed"
        remarks.append(Remark(artifact.backend, choice.rule, verdict, choice.nodes, choice.reason, choice.concept))
    return remarks


def _refuse_failed(verification: Verification, what: str) -> None:
    if verification.state == "failed" and not verification.outputs:
        raise TargetError(
            f"ONNX Runtime cannot run the graph: {verification.reason}",
            hint="give verify='off' to write the graph all the same",
        )
    if verification.state == "failed":
        raise VerificationError(
            f"{what}: {verification.reason}",
            hint="run `xform bisect` to find the pass and the node, or widen `tolerance` if the error is acceptable",
        )


def _judge_artifact(compiled: Compiled, verifier: Verifier, request: Request) -> Verification:
    """Compare the loaded artifact, runtime optimizations included, with the reference."""
    results = _run(compiled.runner, compiled.graph, [case.arrays for case in verifier.cases])
    precision = request.lowering.precision
    return verifier.judge(results, request.fidelity, None if precision is None else _PRECISIONS[precision])


def _run(runner: Runner, graph: ir.Model, cases: Sequence[Inputs]) -> list[Outputs]:
    dtypes = {value.name: value.dtype for value in graph.graph.inputs}
    results = []
    for case in cases:
        feeds = {name: _as_declared(array, dtypes.get(name)) for name, array in case.items()}
        outputs = [_as_compared(output) for output in runner.run(feeds)]
        results.append(dict(zip(runner.output_names, outputs, strict=True)))
    return results


def _executor(captured: ir.Model, request: Request) -> Execute:
    """What runs graphs between passes: ONNX Runtime, or torch if there are operators that only torch has."""
    if request.backend.name != "torch_triton" or all(node.domain != "torch" for node in captured.graph.all_nodes()):
        return run_model

    def execute(graph: ir.Model, cases: Sequence[Inputs]) -> list[Outputs]:
        here = Target("cpu")
        runner = request.backend.load(request.backend.lower(graph, here, LowerOptions()), LoadOptions())
        return _run(runner, graph, cases)

    return execute


def _as_declared(array: Any, dtype: ir.DataType | None) -> Any:
    """The verifier holds values of dtypes that NumPy lacks as float32."""
    if dtype is None or not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        return array
    return array.astype(dtype.numpy()) if dtype.numpy().isbuiltin != 1 else array


def _as_compared(output: Any) -> Any:
    is_extension = isinstance(output, np.ndarray) and output.dtype.isbuiltin != 1 and output.dtype.kind == "V"
    return output.astype(np.float32) if is_extension else output


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
    report.verification = _verification_report(verification, request, result.verifier)
    report.warnings.extend(f"pass {p.name} was rolled back: {p.reason}" for p in result.rolled_back)
    report.warnings.extend(captured.meta.get("xform.notes", ()))
    report.warnings.extend(verification.notes)
    if report.artifact.get("tuning", {}).get("chosen") == INPUT:
        report.warnings.append(
            "nothing ran faster here than the model as it came, so the result is the model as it came"
        )
    if verification.state == "unverified":
        report.warnings.append(f"the result is not verified: {verification.reason}")


def _verification_report(verification: Verification, request: Request, verifier: Verifier | None) -> VerificationReport:
    floats = [output.rtol for output in verification.outputs]
    return VerificationReport(
        mode=request.verify,
        passed={"ok": True, "failed": False}.get(verification.state),
        max_abs_error=verification.max_abs_error,
        max_rel_error=verification.max_rel_error,
        tolerance=max(floats, default=None),
        cases=len(verifier.cases) if verifier is not None and verification.outputs else 0,
        inputs="given" if any(case.startswith("user") for case in verification.cases) else "random",
        given=sum(case.startswith("user") for case in verification.cases),
        reason=verification.reason,
    )


__all__ = ["Compiled", "Request", "compile_graph", "remarks_of"]
