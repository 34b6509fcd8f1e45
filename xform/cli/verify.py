"""`xform verify`: do two models compute the same numbers?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xform.cli.common import (
    CHECK,
    Debug,
    InputsPath,
    Json,
    LimitTexts,
    Quiet,
    Seed,
    Session,
    Sizes,
    ToleranceOption,
    examples,
    given_inputs,
    in_limits,
    model_source,
    no_standard,
    parse_sizes,
    session_of,
)
from xform.errors import UsageError, VerificationError
from xform.report.terminal import plain_table
from xform.text import shown

if TYPE_CHECKING:
    from xform.pipeline.verify import Verification

EXAMPLES = examples(
    "xform verify model.onnx fast.onnx", "xform verify model.onnx fast.onnx --inputs real.npz --tolerance 1e-3"
)


def verify(
    context: typer.Context,
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="ONNX file that is right; - reads it from stdin.")
    ],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="ONNX file to compare with it.")],
    inputs: InputsPath = None,
    size: Sizes = None,
    tolerance: ToleranceOption = None,
    fidelity: Annotated[
        str,
        typer.Option(
            "--fidelity",
            help="Whose tolerances to apply without --tolerance: exact or approximate.",
            rich_help_panel=CHECK,
        ),
    ] = "exact",
    seed: Seed = 0,
    limit: LimitTexts = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two models numerically on the same inputs; exit code 5 if they differ."""
    from xform.capture.onnx_file import capture_onnx
    from xform.pipeline.verify import verify as compare

    session = session_of(context)
    if fidelity not in ("exact", "approximate"):
        raise UsageError(f"--fidelity {shown(fidelity)!r} is unknown", hint="use exact or approximate")
    no_standard(candidate, "CANDIDATE", "only REFERENCE can come from stdin")
    sizes = parse_sizes(size)
    with in_limits(limit), given_inputs(inputs) as feeds:
        outcome = compare(
            capture_onnx(model_source(reference)),
            capture_onnx(candidate),
            inputs=feeds,
            sizes=sizes,
            tolerance=tolerance,
            fidelity="exact" if fidelity == "exact" else "approximate",
            seed=seed,
        )
    session.document.update(outcome.as_dict())
    _show(session, outcome)
    if not outcome.ok:
        kind = "could not be compared" if outcome.state == "unverified" else "differ"
        raise VerificationError(f"the models {kind}: {outcome.reason}", where=[str(reference), str(candidate)])
    session.show("equal within tolerance", style="green")


def _show(session: Session, outcome: Verification) -> None:
    table = plain_table()
    for name in ("output", "inputs", "abs error", "rel error", "allowed", ""):
        table.add_column(name, overflow="fold")
    for row in outcome.outputs:
        allowed = f"{row.rtol:g} rel + {row.atol:g}"
        verdict = "ok" if row.agrees else "noise" if row.noisy else "differs"
        errors = (f"{row.max_abs_error:.2e}", f"{row.max_rel_error:.2e}")
        table.add_row(
            row.output, row.inputs, *errors, allowed, verdict, style=None if row.agrees or row.noisy else "red"
        )
    if outcome.outputs:
        session.show(table)
    for note in outcome.notes:
        session.show(f"note: {note}", style="yellow")
