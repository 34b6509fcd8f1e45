"""`xform explain`: what fired, what nearly did, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xform.cli.common import (
    Debug,
    InputsPath,
    Json,
    ModelPath,
    PassNames,
    Preset,
    Session,
    Settings,
    TargetText,
    VerifyMode,
    closest,
    read_inputs,
    session_of,
    verify_mode,
)
from xform.cli.pass_options import requested_passes
from xform.cli.progress import progress_bar
from xform.errors import UsageError
from xform.report.terminal import findings, findings_table

if TYPE_CHECKING:
    import onnx_ir as ir

    from xform.rewrite.remarks import Remark


def explain(
    context: typer.Context,
    model: ModelPath,
    concept: Annotated[
        str | None, typer.Argument(metavar="[CONCEPT]", help="attention, layer_norm, ..., or a pass or rule.")
    ] = None,
    target: TargetText = "cpu",
    preset: Preset = "exact",
    passes: PassNames = None,
    set_: Settings = None,
    inputs: InputsPath = None,
    verify: VerifyMode = "final",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the passes and tell every decision about CONCEPT (about everything without one), with all nodes."""
    from xform.backends import LowerOptions
    from xform.capture.onnx_file import capture_onnx
    from xform.compilation import Request
    from xform.passes import PASSES
    from xform.pipeline.reference import OriginalModel
    from xform.planning import Plan
    from xform.report.concepts import CONCEPTS, count_concepts

    session = session_of(context)
    wanted = requested_passes(preset, passes, set_)
    feeds = read_inputs(inputs)
    with progress_bar(session, "reading") as advance:
        request = Request.of(
            target, preset, wanted, None, None, None, verify_mode(verify), False,
            LowerOptions(compile_only=True), advance,
        )  # fmt: skip
        plan = Plan.of(capture_onnx(model), request, inputs=feeds, oracle=OriginalModel(model))
        result = plan.run(plan.passes)
    for remark in plan.remarks:
        result.remarks.add(remark)
    for remark in _of_backend(result.model, target):
        result.remarks.add(remark)
    remarks = list(result.remarks) if concept is None else result.remarks.about(concept)
    if concept is not None and not remarks and concept not in {*CONCEPTS, *PASSES}:
        known = {*CONCEPTS, *PASSES, *(r.concept for r in result.remarks), *(r.rule for r in result.remarks)} - {""}
        raise UsageError(f"nothing is known about {concept!r}", hint=closest(concept, known))
    counts = count_concepts(result.model)
    session.document.update(
        {
            "model": str(model),
            "concept": concept,
            "found": counts if concept is None else {concept: counts.get(concept, 0)},
            "remarks": [remark.as_dict() for remark in remarks],
        }
    )
    if concept in CONCEPTS:
        session.say(f"{counts.get(concept, 0)} {concept} in the result", style="bold")
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
    if not remarks:
        session.say("no pass did, or nearly did, anything about it")
    for verdict, heading in (
        ("applied", "done"),
        ("missed", "nearly, and why not"),
        ("rolled_back", "undone, and why"),
    ):
        found = findings(remark for remark in remarks if remark.verdict == verdict)
        if found:
            session.say(f"\n{heading}", style="bold")
            session.say(findings_table(found))
