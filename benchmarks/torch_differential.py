"""Two runtimes that share no code agree: the torch backend and ONNX Runtime on the same optimized graphs.

    python benchmarks/torch_differential.py --json [--only REGEX] [--sample N] [--resume FILE] [--limit SECONDS]

Every model of benchmarks/torch_models.py (those of the benchmarks of capture, raising, reparameterization, norms and
peers) is captured with random weights and taken through the `exact` preset. The graph is run on the same inputs by ONNX
Runtime, its graph optimizations off, and by the torch lowering, both in float32, and by the torch lowering in float64.
Each model has a process of its own.

The error of one result against another is max|a - b| / max|b| over each output. Figures of the last line:

    compared, agree     models, and those where both runtimes are within 1e-5 of each other
    rounding            {name: errors} of the others where both are as near to float64: where the torch backend is no
                        more than 1.5 times as far from it as ONNX Runtime is. Two correct runtimes differ by the sum
                        of their errors, so there a bound on the difference says nothing of either
    closer              models where the torch backend is nearer to float64 than ONNX Runtime
    largest_error, largest_from_float64     over all models
    refused             {name: reason}: no ONNX graph to compare (operators that only torch has, exporters that fail)
    failed              {name: reason}: everything else

Exit code 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

TOLERANCE = 1e-5
ROUNDING = 1.5

Result = dict[str, Any]


def error(got: Any, want: Any) -> float:
    """max|a - b| / max|b| over finite numbers; infinite where the places of others differ."""
    import numpy as np

    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    live = np.isfinite(b)
    scale = np.abs(b[live]).max(initial=0.0)
    return float(np.abs(a[live] - b[live]).max(initial=0.0) / scale) if scale else float(np.abs(a).max(initial=0.0))


def examine(name: str) -> Result:
    """Errors of one model; `refused` where there is nothing to compare."""
    import numpy as np
    import torch
    from torch_models import build

    from xform.backends.torch_triton.lower import to_torch
    from xform.pipeline.manager import run_pipeline
    from xform.pipeline.oracle import Session
    from xform.pipeline.presets import resolve

    torch.set_num_threads(1)
    try:
        subject = build(name)
    except RuntimeError as failure:
        if not name.startswith("raising/"):
            raise
        return {"refused": f"export: {str(failure)[:200]}"}
    graph = run_pipeline(subject.graph, resolve("exact", None), verify="off").model
    if any(node.domain == "torch" for node in graph.graph.all_nodes()):
        return {"refused": "has operators that only torch has"}
    modules = to_torch(graph), to_torch(graph, dtype=torch.float64)
    found = {"error": 0.0, "torch_from_float64": 0.0, "onnxruntime_from_float64": 0.0}
    with Session(graph, threads=1) as session:
        for feeds in subject.feeds:
            want = list(session.run(feeds).values())
            inputs = [torch.from_numpy(np.ascontiguousarray(feeds[v.name or ""])) for v in graph.graph.inputs]
            with torch.no_grad():
                single, double = ([value.numpy() for value in module(*inputs)] for module in modules)
            pairs = {
                "error": (single, want),
                "torch_from_float64": (single, double),
                "onnxruntime_from_float64": (want, double),
            }
            for key, (got, expected) in pairs.items():
                found[key] = max(found[key], *(error(a, b) for a, b in zip(got, expected, strict=True)))
    return found


def _work(name: str, pipe: Any) -> None:
    try:
        pipe.send(examine(name))
    except Exception as failure:
        pipe.send({"failed": f"{type(failure).__name__}: {str(failure)[:300]}"})


def run(name: str, context: Any, limit: float) -> Result:
    """One model in a process of its own, for `limit` seconds at most."""
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return mine.recv() if mine.poll(limit) else {"failed": f"no answer within {limit:.0f} s"}
    except EOFError:
        return {"failed": "the process crashed"}
    finally:
        process.kill()
        process.join()


def judged(results: dict[str, Result]) -> dict[str, Any]:
    """The figures of the last line."""
    compared = {name: r for name, r in results.items() if "error" in r}
    apart = {name: r for name, r in compared.items() if r["error"] > TOLERANCE}
    rounding = {n: r for n, r in apart.items() if r["torch_from_float64"] <= ROUNDING * r["onnxruntime_from_float64"]}
    wrong = {n: f"error {r['error']:.1e}" for n, r in apart.items() if n not in rounding}
    return {
        "compared": len(compared),
        "agree": len(compared) - len(apart),
        "rounding": {n: {key: float(f"{value:.2e}") for key, value in r.items()} for n, r in rounding.items()},
        "closer": sum(r["torch_from_float64"] < r["onnxruntime_from_float64"] for r in compared.values()),
        "largest_error": max((r["error"] for r in compared.values()), default=None),
        "largest_from_float64": max((r["torch_from_float64"] for r in compared.values()), default=None),
        "refused": {n: r["refused"] for n, r in results.items() if "refused" in r},
        "failed": {n: r["failed"] for n, r in results.items() if "failed" in r} | wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="only names that match this regular expression")
    parser.add_argument("--sample", type=int, help="a seeded sample of so many instead of all")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="JSON lines: add results, skip those it has")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for one model (600)")
    arguments = parser.parse_args()
    from torch_models import names as all_names

    names = [name for name in all_names() if re.search(arguments.only, name)]
    if arguments.sample:
        names = sorted(random.Random(6).sample(names, arguments.sample))
    results: dict[str, Result] = {}
    if arguments.resume is not None and arguments.resume.exists():
        kept = [json.loads(line) for line in arguments.resume.read_text().splitlines()]
        results = {line["name"]: line["result"] for line in kept if line["name"] in names}
    # the fork server looks for modules in PYTHONPATH only
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.preload"])
    start = time.monotonic()
    for name in names:
        if name in results:
            continue
        begin = time.monotonic()
        results[name] = run(name, context, arguments.limit)
        print(f"[{len(results)}/{len(names)}] {name} {time.monotonic() - begin:.0f} s {results[name]}", file=sys.stderr)
        if arguments.resume is not None:
            with arguments.resume.open("a") as file:
                file.write(json.dumps({"name": name, "result": results[name]}) + "\n")
    figures = judged(results) | {"seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(figures) if arguments.json else figures)
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
