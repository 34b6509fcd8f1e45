"""How near the machine's peak the exact preset runs: time by kind of operator, and GFLOP/s of the products.

    python benchmarks/roofline.py --json [--only REGEX] [--batch 1] [--work build/peers] [--seconds 3]

Every model of benchmarks/peers.py, as ONNX Runtime runs xform's graph on one thread, by the runtime's own profile: an
operator counts with the fastest of its runs, as other work on the machine only adds. Products are matrix products,
convolutions and attention (with its softmax); their operations are counted on the graph (xform.graph.count), with two
for a multiply-add. The peak is the fastest of square matrix products of 512, 1024 and 2048, measured beside each model.

The last line is a JSON object: peak_gflops, and models {name: {ms, product_ms, product_share, gflop, gflops, of_peak,
floor_ms, others}}. `floor_ms` is what the products would take at the peak, with everything else free.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

HERE = Path(__file__).parent
PRODUCTS = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul", "FusedGemm", "FusedConv", "NhwcFusedConv", "Attention",
     "MultiHeadAttention"}
)  # fmt: skip
COUNTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"})  # in the canonical graph
SQUARES = (512, 1024, 2048)
LEAST_RUNS = 6


def log(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def settings() -> ort.SessionOptions:
    """One thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def peak() -> float:
    """GFLOP/s of the fastest square product."""
    found = 0.0
    for size in SQUARES:
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [size, size]) for n in ("x", "y"))
        weight = onnx.numpy_helper.from_array(np.ones((size, size), np.float32), "w")
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        session = ort.InferenceSession(model.SerializeToString(), settings(), providers=["CPUExecutionProvider"])
        feeds = {"x": np.ones((size, size), np.float32)}
        times = []
        for _ in range(12 if size < SQUARES[-1] else 4):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - start)
        found = max(found, 2 * size**3 / min(times) / 1e9)
    return found


def profile(model: Path, feeds: dict[str, Any], seconds: float) -> dict[str, float]:
    """Milliseconds by operator: over nodes, the sum of the fastest run of each."""
    options = settings()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="xform-roofline-") as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
        start, runs = time.perf_counter(), 0
        while runs < LEAST_RUNS or time.perf_counter() - start < seconds:
            session.run(None, feeds)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["args"]["op_name"], event["name"])
            fastest[key] = min(fastest.get(key, float("inf")), event["dur"] / 1e3)
    found: dict[str, float] = collections.defaultdict(float)
    for (operator, _), ms in fastest.items():
        found[operator] += ms
    return dict(found)


def figures(name: str, batch: int, work: Path, seconds: float) -> dict[str, Any]:
    """One model."""
    from peers import prepare
    from peers_models import MODELS, example
    from peers_prepare import for_export

    import xform
    from xform.graph.count import bindings_of, count

    folder = work / f"{name}-{batch}"
    folder.mkdir(parents=True, exist_ok=True)
    exported = prepare("export", (name, batch), folder)
    if "error" in exported:
        raise RuntimeError(exported["error"])
    source = folder / "export.onnx"
    feeds = for_export(example(MODELS[name], batch), source)
    result = xform.optimize(source, "cpu", inputs=feeds, backend="onnxruntime")
    sizes = bindings_of(result.graph, feeds)
    gflop = sum(node.flops or 0 for node in count(result.graph, sizes).nodes if node.op_type in COUNTED) / 1e9
    top = peak()
    with tempfile.TemporaryDirectory(prefix="xform-roofline-") as temporary:
        times = profile(result.save(Path(temporary, "model.onnx"))[0], feeds, seconds)
    total, products = sum(times.values()), sum(ms for op, ms in times.items() if op in PRODUCTS)
    others = sorted(((ms, op) for op, ms in times.items() if op not in PRODUCTS), reverse=True)[:3]
    return {
        "ms": round(total, 2),
        "product_ms": round(products, 2),
        "product_share": round(products / total, 3),
        "gflop": round(gflop, 3),
        "gflops": round(gflop / products * 1e3, 1),
        "others": {op: round(ms, 2) for ms, op in others},
        "peak": max(top, peak()),
    }


def main() -> int:
    """Every model in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="models whose name matches this regular expression")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="exports; reused")
    parser.add_argument("--seconds", type=float, default=3.0, help="of profiling, per model")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.child:
        print(json.dumps(figures(options.child, options.batch, options.work, options.seconds)))
        return 0
    from peers import environment
    from peers_models import MODELS

    found, failed = {}, {}
    for name in (m.name for m in MODELS.values() if re.search(options.only, m.name) and options.batch in m.batches):
        command = [sys.executable, __file__, "--child", name, "--batch", str(options.batch)]
        command += ["--work", str(options.work), "--seconds", str(options.seconds)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            failed[name] = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            log(f"{name}: {failed[name]}")
            continue
        found[name] = json.loads(lines[-1])
        log(f"{name}: {found[name]}")
    top = max((figure.pop("peak") for figure in found.values()), default=0.0)
    for figure in found.values():
        figure["of_peak"] = round(figure["gflops"] / top, 3)
        figure["floor_ms"] = round(figure["gflop"] / top * 1e3, 2)
    if options.json:
        print(json.dumps({"batch": options.batch, "peak_gflops": round(top, 1), "models": found, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
