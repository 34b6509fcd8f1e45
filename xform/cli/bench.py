"""`xform bench`: latency of models, each in a process of its own, measured in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xform.cli.common import Debug, InputsPath, Json, Seed, Sizes, describe, parse_sizes, read_inputs, session_of
from xform.cli.progress import progress_bar
from xform.errors import UsageError
from xform.report.terminal import plain_table


def bench(
    context: typer.Context,
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="ONNX files; the first is the baseline.")],
    inputs: InputsPath = None,
    size: Sizes = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each model is measured.")] = 7,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="How long one measurement runs.")] = 0.3,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Intra-op threads; the runtime's default if absent.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the latency of models side by side on the same inputs."""
    from xform.capture.onnx_file import capture_onnx
    from xform.pipeline.random_inputs import random_inputs
    from xform.report.latency import measure

    session = session_of(context)
    feeds = random_inputs(capture_onnx(models[0]), seed, parse_sizes(size), read_inputs(inputs))
    for model in models:
        if not model.is_file():
            raise UsageError("no such file", where=str(model))
    with progress_bar(session, "measuring") as advance:
        timings = measure(models, feeds, rounds=rounds, seconds=seconds, threads=threads, progress=advance)
    baseline = timings[0]
    table = plain_table()
    table.add_column("model", overflow="fold")
    for name in ("median ms", "fastest ms", "times as fast"):
        table.add_column(name, justify="right")
    rows = []
    for timing in timings:
        speedup = timing.speedup_over(baseline)
        rows.append(
            {
                "model": str(timing.model),
                "median_ms": timing.median_ms,
                "fastest_ms": timing.fastest_ms,
                "rounds_ms": list(timing.rounds_ms),
                "runs": timing.runs,
                "speedup": speedup,
            }
        )
        table.add_row(str(timing.model), f"{timing.median_ms:.3f}", f"{timing.fastest_ms:.3f}", f"{speedup:.3f}")
    session.document.update(
        {
            "inputs": {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in feeds.items()},
            "threads": threads,
            "models": rows,
        }
    )
    session.say(table)
    session.say(f"on {describe(feeds)}", style="dim", soft_wrap=True)
