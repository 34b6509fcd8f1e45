"""`xform optimize`: rewrite a model, verify it, write it, and hold it to what the user demands."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xform.cli.common import (
    Debug,
    Dynamic,
    InputsPath,
    Json,
    ModelPath,
    PassNames,
    Preset,
    Session,
    Settings,
    Sizes,
    TargetText,
    ToleranceOption,
    VerifyMode,
    human_bytes,
    parse_dynamic,
    parse_size,
    parse_sizes,
    read_inputs,
    session_of,
    tune_mode,
    verify_mode,
)
from xform.cli.demands import Budgets, Requirement, check_requirements, parse_requirement, requirements_found
from xform.cli.pass_options import requested_passes
from xform.cli.progress import progress_bar
from xform.errors import UsageError
from xform.report.terminal import report_view

if TYPE_CHECKING:
    from xform.api import Optimized
    from xform.report.schema import LatencyReport


def optimize(
    context: typer.Context,
    model: ModelPath,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the result; without it nothing is written.")
    ] = None,
    target: TargetText = "cpu",
    preset: Preset = "exact",
    passes: PassNames = None,
    set_: Settings = None,
    backend: Annotated[str | None, typer.Option("--backend", help="Instead of the target's default backend.")] = None,
    inputs: InputsPath = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Inputs that calibrate: .npz as --inputs, or a folder.")
    ] = None,
    dynamic: Dynamic = None,
    verify: VerifyMode = "final",
    tolerance: ToleranceOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a pass would be undone.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", help="Opset of the result; the input's if absent.")] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Write standard ONNX operators only.")] = False,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Compute in float32, float16 or bfloat16 (backend torch_triton).")
    ] = None,
    compile: Annotated[
        str, typer.Option("--compile", help="off, inductor or max-autotune (backend torch_triton).")
    ] = "off",
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Lower for a target that is not here, without running it.")
    ] = False,
    require: Annotated[
        list[str] | None, typer.Option("--require", metavar="NAME>=N", help="What the result must contain (exit 4).")
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option("--max-latency-ratio", min=0, help="Latency after / before allowed (exit 6).")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="Size of the files allowed, as 50MB (exit 6).")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", min=0, help="Relative error allowed in the end (exit 6).")
    ] = None,
    tune: Annotated[
        str, typer.Option("--tune", help="Time lowerings on this machine and keep the fastest: off, quick or full.")
    ] = "off",
    padding: Annotated[
        str, typer.Option("--padding", help="packed: compute only what is a token; zeros elsewhere. Default: padded.")
    ] = "padded",
    measure: Annotated[bool, typer.Option("--measure", help="Measure latency before and after.")] = False,
    size: Sizes = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report here: .json or .html.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every pass and every missed remark.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Optimize an ONNX model, verify it, and write it.

    Nothing is written to the output unless every demand (verification, --require, budgets) is met. The report is
    written in any case. Latency is measured on --inputs, or on random ones with the dimensions of --size.
    """
    session = session_of(context)
    demands = [parse_requirement(text) for text in require or ()]
    feeds, sizes = read_inputs(inputs), parse_sizes(size)
    budgets = Budgets(max_latency_ratio, None if max_size is None else parse_size(max_size), max_error)
    _check_output(model, output, report)
    from xform.api import optimize as run

    with progress_bar(session, "reading") as advance:
        result = run(
            model,
            target=target,
            inputs=feeds,
            dynamic=parse_dynamic(dynamic),
            preset=preset,
            passes=requested_passes(preset, passes, set_) if passes is not None or set_ else None,
            backend=backend,
            calibration=calibration,
            tolerance=tolerance,
            verify=verify_mode(verify),
            strict=strict,
            opset=opset,
            portable=portable,
            precision=precision,
            compile=compile,
            compile_only=compile_only,
            tune=tune_mode(tune),
            padding=padding,
            progress=advance,
        )
    try:
        _require(session, result, demands)
        if measure or max_latency_ratio is not None:
            result.report.latency = _measure_latency(session, result, model, feeds, sizes)
        budgets.check(
            size=None if max_size is None else _measure_size(result),
            latency=result.report.latency,
            error=result.report.verification.max_rel_error,
        )
        if output is not None:
            _save(session, result, output)
    finally:
        _tell(session, result, report, verbose)
    if output is None:
        session.say("nothing was written: give -o to write the model", style="dim")


def _check_output(model: Path, output: Path | None, report: Path | None) -> None:
    """Refuse, before any work, to write over the input or to a path where nothing can be written."""
    from xform.graph.atomic import resolve

    for path in (output, report):
        if path is None:
            continue
        resolve(path)
        if path.exists() and model.exists() and path.samefile(model):
            raise UsageError("the output would overwrite the input", where=str(path), hint="give another name")
    if output is not None and report is not None and output.resolve() == report.resolve():
        raise UsageError("the model and the report have one name", where=str(output))


def _require(session: Session, result: Optimized, demands: list[Requirement]) -> None:
    """Compare the result with the requirements. Raises RequirementError."""
    from xform.report.concepts import count_concepts, count_op_types

    counts = {**count_op_types(result.graph), **count_concepts(result.graph)}
    session.document["requirements"] = requirements_found(demands, counts)
    check_requirements(demands, counts, result.report.remarks)


def _measure_size(result: Optimized) -> int:
    """Bytes of all files of the result, written to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="xform-") as folder:
        return sum(file.stat().st_size for file in result.save(Path(folder, "model.onnx")))


def _measure_latency(
    session: Session, result: Optimized, model: Path, feeds: Mapping[str, Any] | None, sizes: Mapping[str, int] | None
) -> LatencyReport:
    """Latency of the model as it came and of the result, in turn."""
    from xform.capture.onnx_file import capture_onnx
    from xform.pipeline.random_inputs import random_inputs
    from xform.report.latency import Deployed, compare

    complete = random_inputs(capture_onnx(model), 0, sizes, feeds)
    with tempfile.TemporaryDirectory(prefix="xform-") as folder, progress_bar(session, "measuring") as advance:
        after = result.save(Path(folder, "model.onnx"))[0]
        settings = result.artifact.metadata.get("session", {})
        deployed = Deployed(after, result.report.backend, settings if result.report.backend == "openvino" else {})
        return compare(model, deployed, complete, progress=advance)


def _save(session: Session, result: Optimized, output: Path) -> None:
    files = result.save(output)
    size = sum(file.stat().st_size for file in files)
    session.document["files"] = [str(file) for file in files]
    session.document["size"] = size
    session.say(f"wrote {', '.join(map(str, files))} ({human_bytes(size)})", soft_wrap=True)


def _tell(session: Session, result: Optimized, path: Path | None, verbose: bool) -> None:
    """The report on the terminal, in the document, and in its file."""
    from xform.report.files import write_report

    session.document["report"] = result.report.as_dict()
    session.say(report_view(result.report, verbose=verbose))
    if path is not None:
        write_report(result.report, path)
        session.say(f"report in {path}", soft_wrap=True)
