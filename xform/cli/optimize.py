"""`xform optimize`: rewrite a model, verify it, write it, and hold it to what the user demands."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xform.cli.common import (
    CHECK,
    DEMAND,
    IN,
    OUT,
    RUN,
    STANDARD,
    WHERE,
    BackendName,
    CalibrationPath,
    Debug,
    Dynamic,
    InputsPath,
    Json,
    LimitTexts,
    ModelPath,
    PassNames,
    Preset,
    Quiet,
    Session,
    Settings,
    Sizes,
    TargetText,
    Threads,
    ToleranceOption,
    VerifyMode,
    examples,
    human_bytes,
    in_limits,
    model_source,
    parse_dynamic,
    parse_input_shapes,
    parse_limits,
    parse_size,
    parse_sizes,
    read_inputs,
    session_of,
    tune_mode,
    verify_mode,
)
from xform.cli.demands import Budgets, Requirement, check_requirements, parse_requirement, requirements_found
from xform.cli.outputs import check_measurable, check_outputs
from xform.cli.pass_options import requested_passes
from xform.cli.progress import progress_bar
from xform.errors import UsageError
from xform.report.terminal import report_view

if TYPE_CHECKING:
    from xform.api import Optimized
    from xform.report.schema import LatencyReport

Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="Compute in float32, float16 or bfloat16; the model's own if absent. Which of them, depends on the "
        "backend.",
        rich_help_panel=RUN,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Where to write the result, - for stdout; without it nothing is written. The suffix says the format.",
        rich_help_panel=OUT,
    ),
]

EXAMPLES = examples(
    "xform optimize model.onnx -o fast.onnx",
    "xform optimize model.onnx -o fast.onnx --inputs real.npz --report report.html",
    "xform optimize model.onnx -o int8.onnx --preset int8 --calibration samples/",
    'xform optimize model.onnx -o fast.onnx --strict --require "attention>=12" --max-latency-ratio 1.0',
)


def optimize(
    context: typer.Context,
    model: ModelPath,
    output: Output = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write the report here: .json or .html.", rich_help_panel=OUT)
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="Opset of the result; the input's if absent.", rich_help_panel=OUT)
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Write standard ONNX operators only.", rich_help_panel=OUT)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", help="Show every pass and every missed remark.", rich_help_panel=OUT),
    ] = False,
    inputs: InputsPath = None,
    calibration: CalibrationPath = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape",
            metavar="NAME:DIM,...",
            help="Shape of an input: x:1,3,224,224; a name keeps a dimension dynamic. May be repeated.",
            rich_help_panel=IN,
        ),
    ] = None,
    dynamic: Dynamic = None,
    size: Sizes = None,
    limit: LimitTexts = None,
    preset: Preset = "exact",
    passes: PassNames = None,
    set_: Settings = None,
    precision: Precision = None,
    padding: Annotated[
        str,
        typer.Option(
            "--padding",
            help="packed: compute only what is a token; zeros elsewhere. Default: padded.",
            rich_help_panel=RUN,
        ),
    ] = "padded",
    tune: Annotated[
        str,
        typer.Option(
            "--tune",
            help="Time lowerings on this machine and keep the fastest: off, quick or full.",
            rich_help_panel=RUN,
        ),
    ] = "off",
    compile: Annotated[
        str,
        typer.Option("--compile", help="off, inductor or max-autotune (backend torch_triton).", rich_help_panel=RUN),
    ] = "off",
    verify: VerifyMode = "final",
    tolerance: ToleranceOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a pass would be rolled back.", rich_help_panel=CHECK)
    ] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="NAME>=N",
            help="What the result must contain (exit 4); may be repeated.",
            rich_help_panel=DEMAND,
        ),
    ] = None,
    max_latency_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-latency-ratio", min=0, help="Latency after / before allowed (exit 6).", rich_help_panel=DEMAND
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size", metavar="SIZE", help="Size of the files allowed, as 50MB (exit 6).", rich_help_panel=DEMAND
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", min=0, help="Relative error allowed in the end (exit 6).", rich_help_panel=DEMAND),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure latency before and after.", rich_help_panel=DEMAND)
    ] = False,
    target: TargetText = "cpu",
    backend: BackendName = None,
    threads: Threads = None,
    compile_only: Annotated[
        bool,
        typer.Option(
            "--compile-only",
            help="Lower for a target that is not here, without running it.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Optimize an ONNX model, verify that it computes the same, and write it.

    The report is printed on stderr. The model is written only if every demand is met; the report is written in any
    case. Latency is measured on --inputs, or on random ones with the dimensions of --size.
    """
    session = session_of(context)
    demands = [parse_requirement(text) for text in require or ()]
    sizes = parse_sizes(size)
    budgets = Budgets(max_latency_ratio, None if max_size is None else parse_size(max_size), max_error)
    measured = measure or max_latency_ratio is not None
    if model == STANDARD and measured:
        raise UsageError("--measure and --max-latency-ratio take a file, not -", hint="give the model's file")
    if measured:
        check_measurable(backend, target)
    check_outputs(session, model, output, report, backend, target, inputs, calibration, set_)
    limits = parse_limits(limit)
    shapes = parse_input_shapes(input_shape)
    with in_limits(limit):
        feeds = read_inputs(inputs)
    from xform.api import optimize as run
    from xform.pipeline.random_inputs import check_sizes

    with progress_bar(session, "reading") as advance:
        result = run(
            model_source(model),
            target=target,
            inputs=feeds,
            dynamic=parse_dynamic(dynamic),
            input_shapes=shapes,
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
            threads=threads,
            limits=limits,
            progress=advance,
        )
    try:
        check_sizes(result.graph, sizes)
        _require(session, result, demands)
        if measured:
            result.report.latency = _measure_latency(session, result, model, feeds, sizes, threads)
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
    session: Session,
    result: Optimized,
    model: Path,
    feeds: Mapping[str, Any] | None,
    sizes: Mapping[str, int] | None,
    threads: int | None,
) -> LatencyReport:
    """Latency of the model as it came and of the result, in turn."""
    from xform.pipeline.random_inputs import random_inputs
    from xform.report.latency import Deployed, compare

    complete = random_inputs(result.graph, 0, sizes, feeds)  # whose inputs are the model's, with --input-shape
    with tempfile.TemporaryDirectory(prefix="xform-") as folder, progress_bar(session, "measuring") as advance:
        after = result.save(Path(folder, "model.onnx"))[0]
        settings = result.artifact.metadata.get("session", {})
        deployed = Deployed(after, result.report.backend, settings if result.report.backend == "openvino" else {})
        return compare(model, deployed, complete, threads=threads, progress=advance)


def _save(session: Session, result: Optimized, output: Path) -> None:
    if output == STANDARD:
        _save_to_stdout(session, result)
        return
    files = result.save(output)
    size = sum(file.stat().st_size for file in files)
    session.document["files"] = [str(file) for file in files]
    session.document["size"] = size
    session.say(f"wrote {', '.join(map(str, files))} ({human_bytes(size)})", soft_wrap=True)


def _save_to_stdout(session: Session, result: Optimized) -> None:
    with tempfile.TemporaryDirectory(prefix="xform-") as folder:
        files = result.save(Path(folder, "model.onnx"))
        if len(files) > 1:
            raise UsageError("the model is larger than one file can be", hint="give -o a file name")
        data = files[0].read_bytes()
    session.document["size"] = len(data)
    session.write_bytes(data)
    session.say(f"wrote the model to stdout ({human_bytes(len(data))})")


def _tell(session: Session, result: Optimized, path: Path | None, verbose: bool) -> None:
    """The report on the terminal, in the document, and in its file."""
    from xform.report.files import write_report

    session.document["report"] = result.report.as_dict()
    if path is not None:
        write_report(result.report, path)
    session.say(report_view(result.report, verbose=verbose, warnings=False))
    for warning in result.report.warnings:
        session.warn(warning)
    if path is not None:
        session.say(f"report in {path}", soft_wrap=True)
