"""xform on the CPU beside every runtime and optimizer that a user could pick instead.

    python benchmarks/peers.py --json [--only REGEX] [--contenders REGEX] [--batch 1,8] [--rounds 3] [--seconds 2]
                                      [--work build/peers] [--resume FILE] [--without-evidence]

Contenders: xform (`exact`, `int8`; on sentences of mixed lengths with padding="packed", and beside it "xform-padded");
ONNX Runtime as exported, its transformer optimizer, onnxscript's optimize_for_ort,
onnxslim; torch.compile with freezing; OpenVINO; and in int8 ONNX Runtime's dynamic quantization and OpenVINO with NNCF.
Each is prepared and runs in a process of its own; they are measured in turn, and a figure is the median over rounds of
the medians of a round. A contender that fails, or whose outputs are wrong, has its reason in "failed".

The last line is a JSON object: table {model: {contender: ms}}, fp32, int8, padding_free, attention, errors, failed,
machine. Peers that are not installed are left out with a note: pip install -e ".[dev,openvino]".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FP32_PEERS = ("ort", "ort-transformers", "onnxscript", "onnxslim", "inductor", "openvino")
INT8_PEERS = ("ort-int8", "openvino-int8")
CONTENDERS = ("xform", "xform-padded", *FP32_PEERS, "xform-int8", *INT8_PEERS)
FP32_TOLERANCE = 1e-3  # relative to the largest output; a contender further off computes something else
PAUSE = 0.1  # seconds for the threads of the one before to stop spinning
PREPARE_SECONDS = 1800.0

Case = tuple[str, int]


def log(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """Of the child processes: the benchmark's own modules on the path, no network."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def prepare(contender: str, case: Case, folder: Path) -> dict[str, Any]:
    """Run peers_prepare.py; its answer, remembered in the folder unless it failed."""
    memory = folder / f"{contender}.json"
    if memory.exists():
        return dict(json.loads(memory.read_text()))
    command = [sys.executable, "-P", str(HERE / "peers_prepare.py"), contender, case[0], str(case[1]), str(folder)]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=PREPARE_SECONDS, check=False
        )
        lines = done.stdout.strip().splitlines()
        words = (done.stderr.strip().splitlines() or [""])[-1][:200]
        answer = json.loads(lines[-1]) if lines else {"error": f"its process ended with {done.returncode}: {words}"}
    except subprocess.TimeoutExpired:
        answer = {"error": f"not ready after {PREPARE_SECONDS:.0f} s"}
    answer["prepare_seconds"] = round(time.perf_counter() - start, 1)
    if "error" not in answer:
        memory.write_text(json.dumps(answer))
    return dict(answer)


class Contender:
    """A worker process."""

    def __init__(self, name: str, request: dict[str, Any], folder: Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-P", str(HERE / "peers_worker.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment(),
        )  # fmt: skip
        try:
            self.ask({**request, "feeds": str(folder / "feeds.npz"), "threads": threads})
        except RuntimeError:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One question. Raises RuntimeError with the reason of a failure."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it died with {self._process.wait()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def measure_case(case: Case, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one model at one batch size."""
    folder = options.work / f"{case[0]}-{case[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    exported = prepare("export", case, folder)
    if "error" in exported:
        return {"failed": {"export": exported["error"]}, "ms": {}, "rounds": {}, "errors": {}, "notes": {}}
    workers, notes, errors = [], {}, {}
    for name in names:
        request = prepare(name, case, folder)
        try:
            if "error" in request:
                raise RuntimeError(request["error"])
            worker = Contender(name, request, folder, options.threads)
        except RuntimeError as error:
            failed[name] = str(error)
            log(f"  {name}: failed: {error}")
            continue
        worker.ask({"output": str(folder / "output.npz")})
        errors[name] = _error(folder)
        notes[name] = {k: request[k] for k in ("attention", "tuning", "fused", "prepare_seconds") if k in request}
        if name in ("xform", "xform-padded", *FP32_PEERS) and not errors[name] <= FP32_TOLERANCE:
            failed[name] = f"wrong outputs: relative error {errors[name]:.1e}"
        workers.append(worker)
    rounds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    try:
        for number in range(options.rounds):
            for worker in workers if number % 2 == 0 else reversed(workers):
                time.sleep(PAUSE)
                times = worker.ask({"seconds": options.seconds})["ms"]
                rounds[worker.name].append(statistics.median(times))
    finally:
        for worker in workers:
            worker.close()
    medians = {name: round(statistics.median(ms), 3) for name, ms in rounds.items() if name not in failed}
    return {"ms": medians, "rounds": rounds, "failed": failed, "errors": errors, "notes": notes}


def _error(folder: Path) -> float:
    """Largest difference to PyTorch's output, relative to the largest number in it; rows of pads do not count."""
    with np.load(folder / "reference.npz") as reference, np.load(folder / "output.npz") as found:
        expected, got = reference[reference.files[0]], found[found.files[0]]
    if expected.shape != got.shape:
        return math.inf
    with np.load(folder / "feeds.npz") as feeds:
        mask = feeds["attention_mask"] if "attention_mask" in feeds.files else None
    if mask is not None and expected.shape[:2] == mask.shape:
        expected, got = expected[mask != 0], got[mask != 0]
    return float(np.abs(expected - got).max() / np.abs(expected).max())


def ratios(result: dict[str, Any], ours: str, peers: tuple[str, ...]) -> tuple[float, str] | None:
    """How many times as fast as the best peer, by the median over rounds of the ratio within a round; and which."""
    present = [p for p in peers if p in result["ms"]]
    if ours not in result["ms"] or not present:
        return None
    best = min(present, key=lambda p: result["ms"][p])
    pairs = zip(result["rounds"][best], result["rounds"][ours], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs), best


def geomean(numbers: list[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return round(math.exp(statistics.fmean(map(math.log, numbers))), 4) if numbers else None


def summary(results: dict[str, dict[str, Any]], layers: dict[str, int]) -> dict[str, Any]:
    """The last line, without the evidence on accuracy and padding."""
    fp32 = {label: r for label, result in results.items() if (r := ratios(result, "xform", FP32_PEERS))}
    int8_fp32 = {label: r for label, result in results.items() if (r := ratios(result, "xform-int8", FP32_PEERS))}
    padded = {label: r for label, result in results.items() if (r := ratios(result, "xform-padded", FP32_PEERS))}
    int8_int8 = {label: r for label, result in results.items() if (r := ratios(result, "xform-int8", INT8_PEERS))}
    return {
        "table": {label: result["ms"] for label, result in results.items()},
        "fp32": {
            "geomean_vs_best_peer": geomean([r for r, _ in fp32.values()]),
            "min_vs_best_peer": round(min((r for r, _ in fp32.values()), default=math.nan), 4) if fp32 else None,
            "ratios": {label: [round(r, 3), best] for label, (r, best) in fp32.items()},
            "ratios_padded": {label: [round(r, 3), best] for label, (r, best) in padded.items()},
        },
        "int8": {
            "geomean_vs_best_fp32_peer": geomean([r for r, _ in int8_fp32.values()]),
            "geomean_vs_best_int8_peer": geomean([r for r, _ in int8_int8.values()]),
            "ratios": {label: [round(r, 3), best] for label, (r, best) in int8_fp32.items()},
            "ratios_int8": {label: [round(r, 3), best] for label, (r, best) in int8_int8.items()},
        },
        "attention": {
            label: {"layers": layers[label], "fused": result["notes"]["xform"]["attention"]}
            for label, result in results.items()
            if layers[label] and "xform" in result["notes"]
        },
        "errors": {label: {n: float(f"{e:.2g}") for n, e in r["errors"].items()} for label, r in results.items()},
        "failed": {label: result["failed"] for label, result in results.items() if result["failed"]},
        "tuning": {label: result["notes"].get("xform", {}).get("tuning", {}) for label, result in results.items()},
    }


def machine(threads: int) -> dict[str, Any]:
    """What it ran on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("onnxruntime", "openvino", "nncf", "torch", "onnx", "onnxscript", "onnxslim", "xform"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    simd = [f for f in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8") if f in flags]
    return {"cpu": model, "simd": simd, "threads": threads, "python": platform.python_version(), "versions": versions}


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def print_table(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    """The table in milliseconds, on stderr."""
    log(f"{'ms':20s}" + "".join(f"{n:>17s}" for n in names))
    for label, result in results.items():
        cells = (f"{result['ms'][n]:17.2f}" if n in result["ms"] else f"{'-':>17s}" for n in names)
        log(f"{label:20s}" + "".join(cells))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="models whose name matches this regular expression")
    parser.add_argument("--contenders", default="", help="contenders whose name matches it")
    parser.add_argument("--batch", default="", help="batch sizes, comma separated; default: those of each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one contender in one round")
    parser.add_argument("--threads", type=int, default=0, help="default: one per physical core")
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="exports and results; reused")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="JSON lines: add cases, skip those it has")
    parser.add_argument("--without-evidence", action="store_true", help="only the table: no accuracy, no padding")
    options = parser.parse_args()
    from xform.backends.onnxruntime.session import physical_cores

    options.threads = options.threads or physical_cores()
    return options


def recorded(file: Path | None, models: Any) -> dict[str, dict[str, Any]]:
    """Results of earlier runs by label, in the order of the models."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    found = {entry.pop("case"): entry for entry in map(json.loads, lines)}
    labels = [f"{m.name} x{batch}" for m in models.values() for batch in m.batches]
    return {label: found[label] for label in labels if label in found}


def main() -> int:
    """Measure, print, end with JSON."""
    options = parse()
    sys.path.insert(0, str(HERE))
    from peers_models import MODELS

    names = [n for n in CONTENDERS if re.search(options.contenders, n)]
    wanted = [int(b) for b in options.batch.split(",") if b]
    cases = [(m.name, b) for m in MODELS.values() if re.search(options.only, m.name) for b in m.batches]
    cases = [case for case in cases if not wanted or case[1] in wanted]
    results = recorded(options.resume, MODELS)
    for case in cases:
        label = f"{case[0]} x{case[1]}"
        if label in results:
            continue
        log(label)
        padded = MODELS[case[0]].padding == "padded"
        results[label] = measure_case(case, [n for n in names if not (padded and n == "xform-padded")], options)
        if options.resume:
            with options.resume.open("a") as file:
                file.write(json.dumps({"case": label, **results[label]}) + "\n")
        log("  " + "  ".join(f"{n} {ms:.2f}" for n, ms in results[label]["ms"].items()))
    print_table(results, names)
    answer = summary(results, {label: MODELS[label.rsplit(" x", 1)[0]].layers for label in results})
    answer["machine"] = machine(options.threads)
    if not options.without_evidence:
        from peers_evidence import evidence

        for key, found in evidence(options.work, options.threads).items():
            answer.setdefault(key, {}).update(found)
    if options.json:
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
