"""Does the exact preset scale? A 1.3-billion-parameter model with external data, and graphs of 5,000 and 20,000 nodes.

    python benchmarks/scale.py --json

The large model is written layer by layer to a temporary folder (about 5.4 GB, and as much again for the result), and
deleted afterwards. Every contender runs in a process of its own, without numerical verification. `seconds` is from the
file to the optimized model; writing the result (5.4 GB for the large model, the disk's business) is `save_seconds`.
Memory is the peak of anonymous pages (RssAnon of /proc/self/status, sampled every 5 ms), saving included, beyond what
the process held after its imports; pages of memory-mapped weight files are the kernel's cache, not memory that the
process needs, and are reported apart (`peak_file_bytes`). For xform, `extra_bytes` leaves out weights that a pass
changed.
`growth` is the processor time of the 20,000-node graph over four times that of the 5,000-node graph (1 is linear);
processor time, because other work on the machine slows a longer run more often. Peers that fail are reported with the
reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = ("xform", "onnxslim", "onnxscript")
NEEDED = 13_000_000_000  # bytes of free disk: the model, one result at a time, and some air
TIMEOUT = 900
MEMORY_LIMIT = 14_000_000_000  # bytes of data a contender may hold, so that one that loads everything fails by itself
ROUNDS = 2
LIMITS = {"seconds": 60.0, "extra_bytes": 1_500_000_000, "growth": 1.2}


class Peak(threading.Thread):
    """Samples the resident memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.mapped = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            anonymous, mapped = resident()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)

    def stop(self) -> None:
        self._done.set()
        self.join()


def resident() -> tuple[int, int]:
    """Bytes of anonymous and of file-backed resident pages of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


def optimize_with(contender: str, source: Path, result: Path) -> tuple[int, Callable[[], object]]:
    """Optimize a file: bytes of large weights that the optimizer changed (xform only, else 0), and how to save it."""
    external = source.with_suffix(".data").exists()
    if contender == "xform":
        import onnx_ir as ir

        import xform

        optimized = xform.optimize(source, target="cpu", preset="exact", verify="off")
        tensors = [v.const_value for v in optimized.graph.graph.initializers.values() if v.const_value is not None]
        changed = sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor) and t.nbytes >= 1 << 20)
        return changed, lambda: optimized.save(result)
    if contender == "onnxslim":
        import onnx
        import onnxslim

        slim = onnxslim.slim(str(source))
        return 0, lambda: onnx.save(slim, result, save_as_external_data=external)
    import onnx_ir as ir
    import onnxscript.optimizer

    model = ir.load(source)
    onnxscript.optimizer.optimize(model)
    return 0, lambda: ir.save(model, result, external_data=f"{result.name}.data" if external else None)


def import_contender(contender: str) -> None:
    """What a process needs in any case is not counted."""
    import onnx  # noqa: F401

    if contender == "xform":
        pass

    elif contender == "onnxslim":
        import onnxslim  # noqa: F401
    else:
        import onnx_ir  # noqa: F401
        import onnxscript.optimizer  # noqa: F401


def child(contender: str, source: Path, result: Path) -> None:
    """Run one contender on one file and print one JSON line."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    import_contender(contender)
    before, _ = resident()
    peak = Peak()
    peak.start()
    start, busy = time.perf_counter(), time.process_time()
    changed, save = optimize_with(contender, source, result)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    start = time.perf_counter()
    save()
    save_seconds = time.perf_counter() - start
    peak.stop()
    import onnx

    after = onnx.load(result, load_external_data=False)
    figures = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "save_seconds": round(save_seconds, 3),
        "extra_bytes": max(0, peak.anonymous - before - changed),
        "changed_bytes": changed,
        "peak_file_bytes": peak.mapped,
        "nodes_after": len(after.graph.node),
    }
    print(json.dumps(figures))


def run(contender: str, source: Path, folder: Path) -> dict[str, Any]:
    """One contender in a process of its own; its figures, or {"error": ...}. The result is deleted."""
    out = folder / "out"
    out.mkdir()
    command = [sys.executable, __file__, "--child", contender, str(source), str(out / "result.onnx")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {TIMEOUT} s"}
    finally:
        shutil.rmtree(out)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        figures: dict[str, Any] = json.loads(lines[-1])
        return figures
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}


def best(contender: str, source: Path, folder: Path) -> dict[str, Any]:
    """The fastest of some runs, or the first failure."""
    results = []
    for _ in range(ROUNDS):
        results.append(run(contender, source, folder))
        if "error" in results[-1]:
            return results[-1]
    return min(results, key=lambda figures: float(figures["seconds"]))


def measure(folder: Path, contenders: tuple[str, ...], layers: int | None) -> dict[str, Any]:
    """All figures of all contenders, as one document."""
    from scale_models import LlamaShape, synthetic, write_llama

    figures: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for nodes in (5_000, 20_000):
        path = folder / f"graph{nodes}.onnx"
        path.write_bytes(synthetic(nodes).SerializeToString())
        for name in contenders:
            figures[name][f"nodes_{nodes}"] = say(name, f"{nodes} nodes", best(name, path, folder))
        path.unlink()
    llama, parameters = write_llama(folder, LlamaShape() if layers is None else LlamaShape(layers=layers))
    print(f"wrote {parameters:,} parameters", file=sys.stderr)
    for name in contenders:
        figures[name]["large"] = say(name, "large model", run(name, llama, folder))
    rows = {name: flat(entry) for name, entry in figures.items()}
    own = rows.pop("xform", {})
    document = {"params": parameters, **own, "peers": rows, "limits": LIMITS}
    document["passed"] = passed(own)
    return document


def say(name: str, what: str, figures: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}, {what}: {figures}", file=sys.stderr, flush=True)
    return figures


def flat(entry: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of one contender under the keys of the report; a failure is a text where the number would be."""
    large, small, big = entry["large"], entry["nodes_5000"], entry["nodes_20000"]
    row: dict[str, Any] = dict(large) if "error" not in large else {"seconds": None, "error": large["error"]}
    row["nodes_5000_s"] = small.get("seconds", small.get("error"))
    row["nodes_20000_s"] = big.get("seconds", big.get("error"))
    if "seconds" in small and "seconds" in big:
        row["growth"] = round(big["cpu_seconds"] / (4 * small["cpu_seconds"]), 3)
    return row


def passed(own: dict[str, Any]) -> bool:
    """Whether xform's figures are within the limits."""
    return (
        (own.get("seconds") or 1e9) <= LIMITS["seconds"]
        and own.get("extra_bytes", 1e12) <= LIMITS["extra_bytes"]
        and own.get("growth", 1e9) <= LIMITS["growth"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line on stdout")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write the models (default: a temporary one)"
    )
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "SOURCE", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), Path(arguments.child[2]))
        return 0
    with tempfile.TemporaryDirectory(prefix="xform-scale-", dir=arguments.folder) as name:
        free = shutil.disk_usage(name).free
        if free < NEEDED and arguments.layers is None:
            print(f"{free} bytes are free; {NEEDED} are needed", file=sys.stderr)
            return 2
        document = measure(Path(name), (arguments.only,) if arguments.only else CONTENDERS, arguments.layers)
    print(json.dumps(document) if arguments.json else json.dumps(document, indent=2))
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
