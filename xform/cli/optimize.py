"""`xform optimize`: rewrite a model, verify it, write it, and hold it to what the user demands."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    TargetText,
    ToleranceOption,
    VerifyMode,
    human_bytes,
    parse_dynamic,
    parse_size,
    read_inputs,
    session_of,
)
from xform.cli.demands import Budgets, Requirement, check_requirements, parse_requirement, requirements_found
from xform.cli.pass_options import requested_passes
from xform.cli.progress import progress_bar
from xform.errors import UsageError, VerificationError
from xform.report.concepts import count_concepts, count_op_types
from xform.report.files import write_report
from xform.report.terminal import report_view

if TYPE_CHECKING:
    from xform.api import Optimized


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
        Path | None, typer.Option("--calibration", help="Inputs for presets that calibrate, as --inputs.")
    ] = None,
    dynamic: Dynamic = None,
    verify: VerifyMode = "final",
    tolerance: ToleranceOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a pass would be undone.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", help="Opset of the result; the input's if absent.")] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Write standard ONNX operators only.")] = False,
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
    measure: Annotated[bool, typer.Option("--measure", help="Measure latency before and after.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report here: .json or .html.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show every pass and every missed remark.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Optimize an ONNX model, verify it, and write it.

    Nothing is written to the output unless every demand (verification, --require, budgets) is met. The report is
    written in any case.
    """
    session = session_of(context)
    demands = [parse_requirement(text) for text in require or ()]
    budgets = Budgets(max_latency_ratio, None if max_size is None else parse_size(max_size), max_error)
    _check_output(model, output, report)
    from xform.api import optimize as run

    with progress_bar(session, "reading") as advance:
        result = run(
            model,
            target=target,
            inputs=read_inputs(inputs),
            dynamic=parse_dynamic(dynamic),
            preset=preset,
            passes=requested_passes(preset, passes, set_),
            backend=backend,
            calibration=read_inputs(calibration),
            tolerance=tolerance,
            verify=verify,
            strict=strict,
            opset=opset,
            portable=portable,
            progress=advance,
        )
    try:
        _hold(session, result, model, demands, budgets, measure or max_latency_ratio is not None)
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


def _hold(
    session: Session,
    result: Optimized,
    model: Path,
    demands: list[Requirement],
    budgets: Budgets,
    measure: bool,
) -> None:
    """Compare the result with every demand; the first that is not met raises, in the order of exit codes."""
    report = result.report
    counts = {**count_op_types(result.graph), **count_concepts(result.graph)}
    session.document["requirements"] = requirements_found(demands, counts)
    check_requirements(demands, counts, report.remarks)
    if report.verification.passed is False:
        raise VerificationError(f"the result differs from the model: {report.verification.reason}")
    size = None
    if measure or budgets.max_size is not None:
        size = _try_out(session, result, model, measure)
    budgets.check(size=size, latency=report.latency, error=report.verification.max_rel_error)


def _try_out(session: Session, result: Optimized, model: Path, measure: bool) -> int:
    """Write the result to a temporary folder; its size in bytes, and its latency into the report if asked."""
    from xform.capture.onnx_file import capture_onnx
    from xform.pipeline.random_inputs import random_inputs
    from xform.report.latency import compare

    with tempfile.TemporaryDirectory(prefix="xform-") as folder:
        files = result.save(Path(folder, model.stem + ".onnx"))
        if measure:
            feeds = random_inputs(capture_onnx(model))
            with progress_bar(session, "measuring") as advance:
                result.report.latency = compare(model, files[0], feeds, progress=advance)
        return sum(file.stat().st_size for file in files)


def _save(session: Session, result: Optimized, output: Path) -> None:
    files = result.save(output)
    size = sum(file.stat().st_size for file in files)
    session.document["files"] = [str(file) for file in files]
    session.document["size"] = size
    session.say(f"wrote {', '.join(map(str, files))} ({human_bytes(size)})", soft_wrap=True)


def _tell(session: Session, result: Optimized, path: Path | None, verbose: bool) -> None:
    """The report on the terminal, in the document, and in its file."""
    session.document["report"] = result.report.as_dict()
    session.say(report_view(result.report, verbose=verbose))
    if path is not None:
        write_report(result.report, path)
        session.say(f"report in {path}", soft_wrap=True)
