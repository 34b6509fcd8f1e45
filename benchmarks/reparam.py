"""Reparameterization on trained-form networks: what is collapsed, what is left and why, errors, time, and speed.

    python benchmarks/reparam.py --json [--only REGEX] [--jobs N] [--skip-latency] [--captures FOLDER]

Models are timm's in training form, adapters are PEFT's on small transformers and plain modules, captured unmerged. All
weights are random, with random BatchNorm statistics, non-zero biases and layer scales. Per model:

    batch_norms_left, batch_norms_unfoldable    BatchNormalization nodes, and those that a remark explains
    linear_ops, linear_ops_reference            convolutions and constant products; in the model after timm's own
                                                `reparameterize_model`, captured and counted the same way
    linear_ops_training                         before any merge
    rel_err_fp32        max|a - b| / max|b|: the artifact in ONNX Runtime against the torch module in float64;
                        rel_err_fp32_training is the same for the captured graph, no pass applied
    rel_err_fp64        optimized against captured graph, both evaluated in float64 (`zoo/float64.py`);
                        rel_err_fp64_capture is captured graph against torch module: torch's exporter rounds Python
                        numbers and attributes to float32
    rewrite_seconds     time of the reparameterization passes
    rerun_changes       passes that would change the result again
    speedup             latency of the captured over that of the optimized model, processes of their own in turn

An adapter must vanish: `nodes` (optimized) is at most `nodes_base` (the base model, optimized; GPT-2's own Conv1D keeps
views around its products that are gone where an adapter was merged into them). Adapters with `left` cannot
be merged; they need a remark. Numerical verification is off, so that nothing is rolled back in its mercy.
Exit code 0 if every figure is within its limit (`failed` says which are not), else 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

FP32, FP64, CAPTURE = 1e-5, 1e-10, 1e-6
SECONDS = {"mobileone_s1": 5.0}
PARTS = ("models", "adapters")

Figures = dict[str, Any]


def measure(part: str, name: str, folder: str, captures: str | None) -> Figures:
    """Child process: the figures of one model or adapter, or {"error": reason}."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        if part == "models":
            import reparam_models

            own = Path(folder, name)
            own.mkdir()
            return reparam_models.measure(name, own, None if captures is None else Path(captures))
        import reparam_adapters

        return reparam_adapters.measure(name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:600]}"}


def model_failures(name: str, f: Figures) -> list[str]:
    """What is wrong with a model's figures."""
    failures = common_failures(f)
    if "error" in f:
        return failures
    if f["batch_norms_left"] != f["batch_norms_unfoldable"]:
        failures.append(
            f"{f['batch_norms_left']} BatchNorms are left, {f['batch_norms_unfoldable']} with a true remark"
        )
    if f["linear_ops"] > f["linear_ops_reference"]:
        failures.append(f"{f['linear_ops']} linear operators, timm reaches {f['linear_ops_reference']}")
    if f["rewrite_seconds"] > SECONDS.get(name, float("inf")):
        failures.append(f"rewriting took {f['rewrite_seconds']:.1f} s")
    return failures


def adapter_failures(f: Figures) -> list[str]:
    """What is wrong with an adapter's figures."""
    failures = common_failures(f)
    if "error" in f:
        return failures
    if f["nodes"] > f["nodes_base"]:
        failures.append(f"{f['nodes']} nodes, the base model has {f['nodes_base']}")
    if f["left"] and not f["remarks"]:
        failures.append("left without a remark")
    return failures


def common_failures(f: Figures) -> list[str]:
    """What is wrong with figures that models and adapters share."""
    if "error" in f:
        return [f["error"]]
    limits = (("rel_err_fp32", FP32), ("rel_err_fp64", FP64), ("rel_err_fp64_capture", CAPTURE))
    failures = [f"{key} is {f[key]:.1e}" for key, limit in limits if not f[key] <= limit]
    failures += [f"{one} was rolled back" for one in f["rolled_back"]]
    failures += [f"{one} changes its own result" for one in f["rerun_changes"]]
    return failures


def run_all(
    names: list[tuple[str, str]], jobs: int, folder: str, captures: str | None
) -> dict[str, dict[str, Figures]]:
    """Figures by part and name."""
    # The fork server looks for modules in PYTHONPATH only.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.preload"])
    results: dict[str, dict[str, Figures]] = {part: {} for part in PARTS}
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(measure, part, name, folder, captures): (part, name) for part, name in names}
        for number, future in enumerate(as_completed(futures), 1):
            part, name = futures[future]
            figures = future.result()
            failures = model_failures(name, figures) if part == "models" else adapter_failures(figures)
            results[part][name] = figures
            say(f"[{number}/{len(names)}] {name}: {'; '.join(failures) or 'ok'}")
    return {part: {name: results[part][name] for p, name in names if p == part} for part in PARTS}


def add_latency(models: dict[str, Figures], folder: str, rounds: int) -> None:
    """Measure before and after, one model at a time, on one thread."""
    import numpy as np

    from xform.report.latency import measure as measure_latency

    for name, figures in models.items():
        if "error" in figures:
            continue
        own = Path(folder, name)
        rng = np.random.default_rng(0)
        feeds = {key: rng.standard_normal(shape).astype("float32") for key, shape in figures["inputs"].items()}
        before, after = measure_latency([own / "before.onnx", own / "after.onnx"], feeds, rounds=rounds, threads=1)
        figures["speedup"] = round(after.speedup_over(before), 3)
        figures["before_ms"], figures["after_ms"] = round(before.median_ms, 3), round(after.median_ms, 3)
        say(f"{name}: {figures['before_ms']} ms -> {figures['after_ms']} ms, {figures['speedup']} times as fast")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def document(results: dict[str, dict[str, Figures]], seconds: float) -> dict[str, Any]:
    """The last line."""
    failed = {name: why for name, f in results["models"].items() if (why := model_failures(name, f))}
    failed |= {name: why for name, f in results["adapters"].items() if (why := adapter_failures(f))}
    rewrite = {n: f["rewrite_seconds"] for part in results.values() for n, f in part.items() if "error" not in f}
    return {
        **results,
        "rewrite_seconds": {name: round(value, 3) for name, value in rewrite.items()},
        "limits": {"rel_err_fp32": FP32, "rel_err_fp64": FP64, "rewrite_seconds": SECONDS},
        "failed": failed,
        "seconds": round(seconds, 1),
        "ok": not failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line on stdout")
    parser.add_argument("--only", metavar="REGEX", help="models and adapters whose name matches")
    parser.add_argument("--part", choices=PARTS, help="models or adapters alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--skip-latency", action="store_true", help="no latencies")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of latency")
    parser.add_argument("--captures", metavar="FOLDER", help="keep captured graphs there, and use those that are there")
    options = parser.parse_args()
    start = time.monotonic()
    import reparam_adapters
    import reparam_models

    names = [("models", n) for n in reparam_models.MODELS] + [("adapters", n) for n in reparam_adapters.names()]
    names = [(part, n) for part, n in names if options.part in (None, part) and re.search(options.only or "", n)]
    if not names:
        parser.error("nothing matches")
    with tempfile.TemporaryDirectory(prefix="xform-reparam-") as folder:
        results = run_all(names, options.jobs, folder, options.captures)
        if not options.skip_latency:
            add_latency(results["models"], folder, options.rounds)
    line = document(results, time.monotonic() - start)
    print(json.dumps(line) if options.json else json.dumps(line, indent=2))
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
