"""`xform doctor`: what is installed here, what the machine can do, what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from xform.cli.common import Debug, Json, Quiet, examples, session_of

if TYPE_CHECKING:
    from xform.backends import Missing

EXAMPLES = examples("xform doctor")


def doctor(context: typer.Context, quiet: Quiet = False, json: Json = False, debug: Debug = False) -> None:
    """Show versions, the processor's features, and which backends are available for which targets.

    A missing backend is information here, not an error: the exit code is 0.
    """
    from xform.backends import BACKENDS
    from xform.report.environment import Environment
    from xform.report.terminal import facts_table
    from xform.target import KINDS, Target

    session = session_of(context)
    here = Environment.here()
    backends = {
        name: {kind: backend().available(Target(kind)) for kind in KINDS if kind in backend.kinds}
        for name, backend in BACKENDS.items()
    }
    session.document.update(
        {
            "environment": {
                "versions": here.versions,
                "python": here.python,
                "system": here.system,
                "processor": here.processor,
                "cores": here.cores,
                "cpu_features": list(here.cpu_features),
            },
            "backends": {
                name: [
                    {
                        "target": kind,
                        "available": missing is None,
                        "missing": missing and missing.what,
                        "hint": missing and missing.hint,
                    }
                    for kind, missing in kinds.items()
                ]
                for name, kinds in backends.items()
            },
        }
    )
    rows = [
        ("python", here.python),
        *here.versions.items(),
        ("system", here.system),
        ("processor", f"{here.processor}, {here.cores} cores"),
        ("features", " ".join(here.cpu_features) or "unknown"),
    ]
    for name, kinds in backends.items():
        rows += [(name, f"{kind}: {_said(missing)}") for kind, missing in kinds.items()]
    session.show(facts_table(rows))


def _said(missing: Missing | None) -> str:
    return "available" if missing is None else f"{missing.what}\n  what to do: {missing.hint}"
