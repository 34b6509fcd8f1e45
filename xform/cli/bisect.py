"""`xform bisect`: the first pass that makes a model wrong, its first bad rewrite, and the node."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    Seed,
    Session,
    Settings,
    Sizes,
    TargetText,
    ToleranceOption,
    examples,
    given_inputs,
    in_limits,
    model_source,
    parse_sizes,
    session_of,
)
from xform.cli.pass_options import requested_passes
from xform.cli.progress import progress_bar
from xform.errors import VerificationError
from xform.report.terminal import facts_table
from xform.text import shown

if TYPE_CHECKING:
    from xform.pipeline.bisect import BisectResult

EXAMPLES = examples("xform bisect model.onnx --preset int8 --inputs real.npz")


def bisect(
    context: typer.Context,
    model: ModelPath,
    target: TargetText = "cpu",
    backend: BackendName = None,
    preset: Preset = "exact",
    passes: PassNames = None,
    set_: Settings = None,
    inputs: InputsPath = None,
    calibration: CalibrationPath = None,
    size: Sizes = None,
    tolerance: ToleranceOption = None,
    seed: Seed = 0,
    limit: LimitTexts = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Name the first pass that changes what the model computes, and where in it (exit code 5 if there is one)."""
    from xform.backends import LowerOptions
    from xform.capture.onnx_file import capture_onnx
    from xform.compilation import Request
    from xform.pipeline.bisect import bisect as search
    from xform.pipeline.reference import OriginalModel
    from xform.planning import Plan

    session = session_of(context)
    wanted = requested_passes(preset, passes, set_)
    source = model_source(model)
    with in_limits(limit), given_inputs(inputs) as feeds, progress_bar(session, "reading") as advance:
        captured, original = capture_onnx(source), OriginalModel(source)
        request = Request.of(
            target, preset, wanted, backend, calibration, tolerance, "off", False, LowerOptions(compile_only=True),
            advance,
        )  # fmt: skip
        plan = Plan.of(captured, request, inputs=feeds, oracle=original)  # what `optimize` runs, int8 searched too
        result = search(
            captured,
            plan.passes,
            target=target,
            inputs=plan.inputs,
            sizes=parse_sizes(size),
            tolerance=plan.tolerance,
            oracle=original,
            progress=advance,
            seed=seed,
        )
    session.document.update({"model": str(model), "passes": [p.name for p in plan.passes], **result.as_dict()})
    if not result.found:
        session.show(f"all {len(plan.passes)} passes keep the numbers", style="green")
        return
    _show(session, result)
    raise VerificationError(
        f"pass {result.bad_pass} is wrong: {result.reason}",
        where=result.nodes,
        hint="leave it out with --passes, and report it with the model if you can",
    )


def _show(session: Session, result: BisectResult) -> None:
    rows = [("first bad pass", f"{result.bad_pass} (number {(result.index or 0) + 1})")]
    if result.rule:
        rows.append(("first bad rewrite", f"{result.rule}, application {result.application}"))
    if result.nodes:
        rows.append(("at", ", ".join(map(shown, result.nodes))))
    if result.divergence is not None:
        rows += [(f"first difference: {name}", str(value)) for name, value in vars(result.divergence).items()]
    session.show(facts_table(rows))
