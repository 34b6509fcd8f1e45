"""`xform bench`: latency of models, each in a process of its own, measured in turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xform.cli.common import (
    RUN,
    Debug,
    InputsPath,
    Json,
    LimitTexts,
    Quiet,
    Seed,
    Sizes,
    Threads,
    describe,
    examples,
    in_limits,
    no_standard,
    parse_sizes,
    read_inputs,
    session_of,
)
from xform.cli.progress import progress_bar
from xform.errors import ModelError
from xform.report.terminal import plain_table

if TYPE_CHECKING:
    from xform.report.latency import Figures, Timing

EXAMPLES = examples("xform bench model.onnx fast.onnx --size batch=8 --threads 4")


def bench(
    context: typer.Context,
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="ONNX files; the first is the baseline.")],
    inputs: InputsPath = None,
    size: Sizes = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="How often each model is measured.", rich_help_panel=RUN)
    ] = 7,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="How long one measurement runs.", rich_help_panel=RUN)
    ] = 0.3,
    threads: Threads = None,
    seed: Seed = 0,
    limit: LimitTexts = None,
    quiet: Quiet = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the latency of models side by side on the same inputs.

    p50 and p90 are the milliseconds that 50% and 90% of the runs stay below; items are rows of the first input.
    """
    from xform.capture.onnx_file import capture_onnx
    from xform.pipeline.random_inputs import random_inputs
    from xform.report.latency import figures, measure

    session = session_of(context)
    for model in models:
        no_standard(model, "bench", "each model runs in a process of its own, which reads its file")
        if not model.is_file():
            raise ModelError("there is no such model file", where=str(model), hint="check the path")
    sizes = parse_sizes(size)
    with in_limits(limit):
        feeds = random_inputs(capture_onnx(models[0]), seed, sizes, read_inputs(inputs))
    with progress_bar(session, "measuring") as advance:
        timings = measure(models, feeds, rounds=rounds, seconds=seconds, threads=threads, progress=advance)
    items = items_of(feeds)
    rows = [_row(timing, found, items) for timing, found in zip(timings, figures(timings), strict=True)]
    session.document.update(
        {
            "inputs": {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in feeds.items()},
            "items": items,
            "threads": threads,
            "models": rows,
        }
    )
    table = plain_table()
    table.add_column("model", overflow="fold")
    for heading in ("p50 ms", "p90 ms", "fastest ms", "items/s", "times as fast"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "fastest_ms")]
        table.add_row(row["model"], *cells, f"{row['items_per_second']:,.1f}", f"{row['speedup']:.3f}")
    session.show(table)
    session.say(f"on {describe(feeds)}", style="dim", soft_wrap=True)


def items_of(feeds: Mapping[str, Any]) -> int:
    """How many items one run takes: the size of the first axis of the first input that has one, else 1."""
    return next((int(array.shape[0]) for array in feeds.values() if getattr(array, "shape", ())), 1)


def _row(timing: Timing, found: Figures, items: int) -> dict[str, Any]:
    return {
        "model": str(timing.model),
        "p50_ms": found.p50_ms,
        "p90_ms": found.p90_ms,
        "median_ms": found.p50_ms,
        "fastest_ms": timing.fastest_ms,
        "items_per_second": items * 1e3 / found.p50_ms,
        "rounds_ms": list(timing.rounds_ms),
        "runs": timing.runs,
        "speedup": found.times_as_fast,
    }
