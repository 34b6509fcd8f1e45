"""The torch backend on an NVIDIA GPU, against eager torch and torch.compile.

    python benchmarks/gpu.py --json [--only REGEX] [--resume FILE] [--out FILE] [--limit SECONDS] [--rehearse]

Without a GPU it says so and ends with `"gpu": null`, exit code 0.

Models in bf16 with random weights, batch 1 and 32: ViT-B, DeiT-S, BERT-base, a Llama of 1B parameters; and, where
rewriting counts most, RepViT and MobileOne in training form and a Llama with unmerged LoRA adapters. Peers are the
module itself, torch.compile, and torch.compile with max-autotune; xform runs with `compile=` off, inductor and max-
autotune and the fastest counts, as it does for the peers. Contenders of a row take turns in one process and are timed
between CUDA events after warm-up (median of 50 calls). Their outputs are compared with the module's in float32.

Kernels: bytes that have to be moved over the time taken, as a share of what a copy of as many bytes reaches.

A GPU is often lent for minutes, so there are two sweeps over all rows, the contenders without autotuning first; a line
is added to --out after each contender; --resume skips what an earlier file has and tries again last what failed in it;
a contender that takes five minutes is stopped, and after --limit seconds whatever runs, and the figures of what there
is are printed. --rehearse needs no GPU: small models on the CPU take the same way, kernels in Triton's interpreter, and
each is lowered for `cuda` too.

Figures of the last line: `gpu`, `versions`, `geomean_vs_best_peer` (fastest peer / xform, over those of ViT to Llama
whose peers were all tried, `geomean_rows` of them), `table` {row: {contender: seconds.., "ratio": best peer / xform}}
(a "ratio_so_far" where a peer was not tried yet), `kernels` {name: share of copy bandwidth}, `missing` rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

PEERS = ("eager", "compile", "compile-max-autotune")
OURS = ("xform-off", "xform-inductor", "xform-max-autotune")
SWEEPS = (("eager", "xform-off", "compile", "xform-inductor"), ("compile-max-autotune", "xform-max-autotune"))
REHEARSED = (("eager", "xform-off", "lowered"),)
MAIN = ("vit_b", "deit_s", "bert_base", "llama_1b")
PATIENCE = 300.0  # seconds for one contender
PACKAGES = ("torch", "triton", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "networkx", "timm", "transformers")
WORKER = Path(__file__).with_name("gpu_worker.py")

Results = dict[str, dict[str, Any]]  # row -> contender -> what was measured


def load(path: Path | None) -> Results:
    """What an earlier run measured; failures are marked "earlier", and are tried again."""
    found: Results = {}
    if path is not None and path.exists():
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["row"], {})[line["kind"]] = line | ({"earlier": True} if "failed" in line else {})
    return found


def save(results: Results, path: Path | None) -> None:
    """Write everything there is, so that the file is whole whenever this is stopped."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) for row in results.values() for line in row.values()]
    path.with_suffix(".part").write_text("".join(f"{line}\n" for line in lines))
    path.with_suffix(".part").replace(path)


def worker_lines(row: str, kinds: list[str], small: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """What the worker prints, as it comes; a last line says what stopped it, if anything did."""
    command = [sys.executable, "-W", "ignore", str(WORKER), row, *kinds, *(["--small"] if small else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        told: list[str] = []
        stderr = process.stderr
        listener = threading.Thread(target=lambda: told.extend(stderr), daemon=True)
        listener.start()
        late: list[float] = []

        def waiting() -> threading.Timer:
            seconds = max(min(PATIENCE, deadline - time.monotonic()), 0.0)
            timer = threading.Timer(seconds, lambda: (late.append(seconds), process.kill()))
            timer.start()
            return timer

        timer = waiting()
        for line in process.stdout:
            if line.startswith("{"):
                timer.cancel()
                yield json.loads(line)
                timer = waiting()
        code = process.wait()
        timer.cancel()
        listener.join(1.0)
    if code != 0:
        yield {"stopped": f"after {late[0]:.0f} s" if late else (told or [f"exit code {code}"])[-1].strip()[:300]}


def measure(rows: list[str], sweeps: Any, results: Results, out: Path | None, deadline: float, small: bool) -> None:
    """Fill in what is missing, one row at a time; what failed in an earlier run comes last."""
    for again in (False, True):
        for sweep in sweeps:
            for row in rows:
                done = results.setdefault(row, {})
                kinds = ("bandwidth",) if row == "kernels" else sweep
                waiting = [k for k in kinds if (done.get(k, {}).get("earlier") if again else k not in done)]
                while waiting and time.monotonic() < deadline:
                    _measure_row(row, waiting, results, out, deadline, small)


def _measure_row(
    row: str, waiting: list[str], results: Results, out: Path | None, deadline: float, small: bool
) -> None:
    """Run one worker; what is done, or has failed, is taken out of `waiting`."""
    begun = False
    for line in worker_lines(row, list(waiting), small, deadline):
        if "begun" in line:
            begun = True
            continue
        if "stopped" in line and not waiting:
            break
        lines = [line]
        if "stopped" in line:  # one contender, or before the first of them all
            lines = [{"kind": kind, "failed": line["stopped"]} for kind in (waiting[:1] if begun else waiting)]
        for one in lines:
            results[row][one["kind"]] = {"row": row, **one}
            waiting.remove(one["kind"])
            print(json.dumps(results[row][one["kind"]]), file=sys.stderr, flush=True)
        save(results, out)


def best(row: dict[str, Any], kinds: tuple[str, ...]) -> float:
    """The shortest time of these contenders; infinite if there is none."""
    return min((row[kind]["seconds"] for kind in kinds if "seconds" in row.get(kind, {})), default=math.inf)


def figures(results: Results, rows: list[str], sweeps: Any) -> dict[str, Any]:
    """What the last line says of the measurements."""
    table: dict[str, Any] = {}
    for row in rows:
        found = results.get(row, {})
        if row == "kernels" or not found:
            continue
        table[row] = {kind: {k: v for k, v in line.items() if k not in ("row", "kind")} for kind, line in found.items()}
        peer, ours = best(found, PEERS), best(found, OURS)
        tried = all(kind in found for sweep in sweeps for kind in sweep if kind in PEERS)
        table[row]["ratio" if tried else "ratio_so_far"] = peer / ours if math.inf not in (peer, ours) else None
    ratios = [row["ratio"] for name, row in table.items() if name.split("/")[0] in MAIN and row.get("ratio")]
    wanted = {row: ("bandwidth",) if row == "kernels" else sum(sweeps, ()) for row in rows}
    missing = {
        row: [k for k in kinds if "failed" in results.get(row, {}).get(k, {"failed": 1})]
        for row, kinds in wanted.items()
    }
    return {
        "geomean_vs_best_peer": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        "geomean_rows": len(ratios),
        "table": table,
        "kernels": results.get("kernels", {}).get("bandwidth", {}).get("shares", {}),
        "missing": {row: kinds for row, kinds in missing.items() if kinds},
    }


def versions() -> dict[str, str | None]:
    """Of what was measured with; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found["driver"] = None
    return found


def main() -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="only rows that match this regular expression")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="skip what this file of an earlier run has")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines: everything so far, after each contender")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="stop after so long")
    parser.add_argument("--rehearse", action="store_true", help="small models without a GPU")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    import torch

    found: dict[str, Any] = {"gpu": None, "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("there is no NVIDIA GPU here, or torch cannot use it: nothing was measured", file=sys.stderr)
        found |= {"geomean_vs_best_peer": None, "table": {}, "kernels": {}}
        print(json.dumps(found) if arguments.json else found)
        return 0
    from gpu_models import ROWS

    rows = [row for row in ("kernels", *ROWS) if re.search(arguments.only, row)]
    results = load(arguments.resume)
    save(results, arguments.out)
    sweeps = REHEARSED if arguments.rehearse else SWEEPS
    measure(rows, sweeps, results, arguments.out, begin + arguments.limit, arguments.rehearse)
    if not arguments.rehearse:
        found["gpu"] = torch.cuda.get_device_name()
    found |= figures(results, rows, sweeps)
    if arguments.rehearse:  # the times say nothing
        found |= {"geomean_vs_best_peer": None, "kernels": {}}
    print(json.dumps(found) if arguments.json else found)
    return 1 if arguments.rehearse and found["missing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
