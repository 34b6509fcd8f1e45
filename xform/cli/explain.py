"""`xform explain`: what fired, what nearly did, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xform.cli.common import (
    BackendName,
    CalibrationPath,
    Debug,
    InputsPath,
    Json,
    LimitTexts,
    ModelPath,
    PassNames,
    Preset,
    Quiet,
    Session,
    Settings,
    TargetText,
    VerifyMode,
    closest,
    examples,
    given_inputs,
    in_limits,
    model_source,
    session_of,
    verify_mode,
)
from xform.cli.pass_options import requested_passes
from xform.cli.progress import progress_bar
from xform.errors import UsageError
from xform.report.terminal import findings, findings_table
from xform.text import shown

if TYPE_CHECKING:
    import onnx_ir as ir

    from xform.rewrite.remarks import Remark

EXAMPLES = examples(
    "xform explain model.onnx",
    "xform explain model.onnx attention | grep layers.3",
    "xform explain model.onnx int8 --preset int8 --calibration samples/",
)


def explain(
    context: typer.Context,
    model: ModelPath,
    concept: Annotated[
        str | None, typer.Argument(metavar="[CONCEPT]", help="attention, layer_norm, ..., or a pass or rule.")
    ] = None,
    target: TargetText = "cpu",
    backend: BackendName = None,
    preset: Preset = "exact",
    passes: PassNames = None,
    set_: Settings = None,
    inputs: InputsPath = None,
    calibration: CalibrationPath = None,
    verify: VerifyMode = "final",
    limit: LimitTexts = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the passes and tell every decision about CONCEPT (about everything without one), with all nodes."""
    from xform.backends import LowerOptions
    from xform.capture.onnx_file import capture_onnx
    from xform.compilation import Request
    from xform.passes import PASSES
    from xform.pipeline.quantization import told
    from xform.pipeline.reference import OriginalModel
    from xform.planning import Plan
    from xform.report.concepts import ALIASES, CONCEPTS, COUNTED, TOPICS, count_concepts, with_concepts
    from xform.report.explanation import heading, topics_of

    session = session_of(context)
    wanted = requested_passes(preset, passes, set_)
    name = ALIASES.get(concept, concept) if concept is not None else None
    if name is not None and not name.strip():
        raise UsageError("CONCEPT is empty", hint="leave it out to see everything")
    source = model_source(model)
    with in_limits(limit), given_inputs(inputs) as feeds:
        captured = capture_onnx(source)
        with progress_bar(session, "reading") as advance:
            request = Request.of(
                target, preset, wanted, backend, calibration, None, verify_mode(verify), False,
                LowerOptions(compile_only=True), advance,
            )  # fmt: skip
            plan = Plan.of(captured, request, inputs=feeds, oracle=OriginalModel(source))
            result = plan.run(plan.passes)
    for remark in told(plan.remarks, result.passes):
        result.remarks.add(remark)
    for remark in _of_backend(result.model, target):
        result.remarks.add(remark)
    every = with_concepts(result.remarks, captured)
    remarks = every if name is None else [remark for remark in every if remark.is_about(name) or name in remark.rule]
    if name is not None and not remarks and name not in {*CONCEPTS, *TOPICS, *PASSES}:
        known = {
            *CONCEPTS,
            *TOPICS,
            *PASSES,
            *(remark.rule for remark in every),
            *(t for r in every for t in topics_of(r)),
        }
        raise UsageError(f"nothing is known about {shown(name)!r}", hint=closest(name, known - {""}))
    counts = count_concepts(result.model)
    session.document.update(
        {
            "model": str(model),
            "concept": name,
            "found": counts if name is None else {name: counts.get(name, 0) if name in COUNTED else None},
            "remarks": [remark.as_dict() for remark in remarks],
        }
    )
    if name is not None:
        session.show(heading(result.model, name, bool(remarks)), style="bold", soft_wrap=True)
    elif not remarks:
        session.show("no pass did anything")
    show_remarks(session, remarks)


def _of_backend(graph: ir.Model, target: str) -> list[Remark]:
    """Which kernels a GPU would get, and where they nearly are; there need be no GPU."""
    from xform.backends import LowerOptions, get_backend
    from xform.compilation import remarks_of
    from xform.target import Target

    parsed = Target.parse(target)
    if parsed.kind != "cuda":
        return []
    options = LowerOptions(compile_only=True)
    return remarks_of(get_backend(None, parsed, compile_only=True).lower(graph, parsed, options))


def show_remarks(session: Session, remarks: list[Remark]) -> None:
    """All remarks by verdict."""
    for verdict, title in (
        ("applied", "done"),
        ("missed", "near misses, and why"),
        ("rolled_back", "rolled back, and why"),
    ):
        found = findings(remark for remark in remarks if remark.verdict == verdict)
        if found:
            session.show(f"\n{title}", style="bold")
            session.show(findings_table(found))
