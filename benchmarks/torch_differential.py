"""Two runtimes that share no code agree: the torch backend and ONNX Runtime on the same optimized graphs.

    python benchmarks/torch_differential.py --json [--only REGEX] [--sample N]

Each architecture of benchmarks/capture.py (the smallest variant of every timm family, and the transformers types) is
captured with random weights and taken through the `exact` preset; the graph is run on the same inputs by ONNX Runtime,
its graph optimizations off, and by the torch lowering, both in float32, and by the torch lowering in float64. Each runs
in a process of its own.

Figures of the last line: `compared` architectures, `agree` of them to 1e-5 relative (max|a - b| / max|b| over each
output) between both runtimes, `largest_error`; `explained` differ by more, but no more than ten times what ONNX Runtime
itself is away from float64, which is the rounding of that network;
`failed` {name: reason}. Exit code 0 if nothing failed.
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
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

TOLERANCE = 1e-5
ROUNDING = 10.0
TIME_LIMIT = 600.0

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
    """Errors of one architecture."""
    import torch
    from capture import build
    from zoo import vision_stub  # noqa: F401 - has to be imported before timm and transformers

    from xform.backends.torch_triton.lower import to_torch
    from xform.capture.torch_module import capture_torch
    from xform.pipeline.manager import run_pipeline
    from xform.pipeline.oracle import run_model
    from xform.pipeline.presets import resolve

    torch.set_num_threads(1)
    module, args, kwargs = build(name)
    captured = capture_torch(module, args, kwargs)
    feeds = {key: value.detach() for key, value in captured.flatten(args, kwargs).items()}
    graph = run_pipeline(captured.model, resolve("exact", None), verify="off").model
    if any(node.domain == "torch" for node in graph.graph.all_nodes()):
        return {"error": None, "reason": "has operators that only torch has"}
    want = list(run_model(graph, [{key: value.numpy() for key, value in feeds.items()}])[0].values())
    inputs = [feeds[value.name] for value in graph.graph.inputs]
    with torch.no_grad():
        single = [value.numpy() for value in to_torch(graph)(*inputs)]
        double = [value.numpy() for value in to_torch(graph, dtype=torch.float64)(*inputs)]
    return {
        "error": max(error(a, b) for a, b in zip(single, want, strict=True)),
        "rounding": max(error(a, b) for a, b in zip(want, double, strict=True)),
    }


def _work(name: str, pipe: Any) -> None:
    try:
        pipe.send(examine(name))
    except Exception as failure:
        pipe.send({"reason": f"{type(failure).__name__}: {str(failure)[:300]}"})


def run(name: str) -> Result:
    """One architecture in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv() if mine.poll(TIME_LIMIT) else {"reason": f"no answer within {TIME_LIMIT:.0f} s"}
    except EOFError:
        return {"reason": "the process crashed"}
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="only names that match this regular expression")
    parser.add_argument("--sample", type=int, help="a seeded sample of so many instead of all")
    arguments = parser.parse_args()
    from capture import architectures

    names = [name for name in architectures() if re.search(arguments.only, name)]
    if arguments.sample:
        names = sorted(random.Random(6).sample(names, arguments.sample))
    start, results = time.monotonic(), {}
    for name in names:
        results[name] = run(name)
        print(name, results[name], file=sys.stderr, flush=True)
    compared = {name: r for name, r in results.items() if r.get("error") is not None}
    agree = [name for name, r in compared.items() if r["error"] <= TOLERANCE]
    explained = [n for n, r in compared.items() if n not in agree and r["error"] <= ROUNDING * r["rounding"]]
    wrong = {n: f"error {r['error']:.1e}" for n, r in compared.items() if n not in agree and n not in explained}
    failed = {n: r["reason"] for n, r in results.items() if "error" not in r} | wrong
    figures = {
        "compared": len(compared),
        "agree": len(agree),
        "explained": {name: compared[name] for name in explained},
        "largest_error": max((r["error"] for r in compared.values()), default=None),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(figures) if arguments.json else figures)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
