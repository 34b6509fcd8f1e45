"""Does `xform optimize` survive damaged models? Mutated model files, each in a process of its own.

    python benchmarks/fuzz.py --json --count 2000 --seed 0

Every mutant must end within 20 s of processor time (and not wait for ever) with a documented exit code other than 1,
leave its input as it was, and leave no half-written file: either no output at all, or a model that loads. The process
has 8 GB of memory: a mutant that asks for more must get an error, not the system's out-of-memory killer.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIME_LIMIT = 20  # seconds of processor time: other work on the machine must not look like a hang
WALL_LIMIT = 200.0  # seconds, for a process that waits for ever
MEMORY_LIMIT = 8 << 30
EXIT_CODES = {0, 2, 3, 4, 5, 6, 7}


@dataclass
class Running:
    """A mutant being optimized."""

    number: int
    what: str
    folder: Path
    data: bytes
    started: float


@dataclass(frozen=True)
class Outcome:
    """How a mutant ended: "ok" with its exit code, or what is wrong."""

    number: int
    what: str
    verdict: str
    code: int
    seconds: float
    message: str


def start(number: int, what: str, data: bytes, folder: Path, arguments: list[str]) -> tuple[int, Running]:
    """Fork a process that optimizes one mutant; its process id."""
    folder.mkdir()
    (folder / "in.onnx").write_bytes(data)
    running = Running(number, what, folder, data, time.monotonic())
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _child(folder, arguments)
        finally:
            os._exit(code)
    return child, running


def _child(folder: Path, arguments: list[str]) -> int:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + TIME_LIMIT, used + TIME_LIMIT + 1))
    from xform.cli import main

    code = main(["optimize", str(folder / "in.onnx"), "-o", str(folder / "out.onnx"), *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def finish(running: Running, status: int, seconds: float) -> Outcome:
    """Judge what a process did in so many seconds of processor time."""
    waited = time.monotonic() - running.started
    code = os.waitstatus_to_exitcode(status)
    log = (running.folder / "log").read_text(errors="replace") if (running.folder / "log").exists() else ""
    said = re.findall(r'"what": "(.*)"', log)
    message = said[-1] if said else " | ".join(line.strip() for line in log.strip().splitlines()[-4:])[-400:]
    left = {path.name for path in running.folder.iterdir()} - {"in.onnx", "log"}
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and (seconds >= TIME_LIMIT or waited >= WALL_LIMIT)):
        verdict = "hang"
    elif code < 0:
        verdict = "crash"
    elif code not in EXIT_CODES:
        verdict = "internal error"
    elif (running.folder / "in.onnx").read_bytes() != running.data:
        verdict = "input changed"
    elif code != 0 and left:
        verdict = "half file"
    elif code == 0 and not _loads(running.folder / "out.onnx"):
        verdict = "invalid output"
    elif "Traceback" in log:
        verdict = "traceback"
    else:
        verdict = "ok"
    return Outcome(running.number, running.what, verdict, code, seconds, message)


def _loads(path: Path) -> bool:
    import onnx

    try:
        return bool(onnx.load(path).HasField("graph"))
    except Exception:
        return False


def fuzz(
    seeds: list[bytes], numbers: list[int], seed: int, *, jobs: int = 2, keep: Path | None = None
) -> list[Outcome]:
    """Optimize the mutants of these numbers; outcomes in the order in which they ended.

    Args:
        keep: A folder for the mutants that did not end well.
    """
    from mutate import mutate

    _warm_up()
    outcomes: list[Outcome] = []
    waiting, running = list(reversed(numbers)), {}
    with tempfile.TemporaryDirectory(prefix="xform-fuzz-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                number = waiting.pop()
                data, what = mutate(seeds, number, seed)
                child, entry = start(number, what, data, Path(folder, str(number)), ["--json"])
                running[child] = entry
            child, status, usage = os.wait4(-1, os.WNOHANG)
            if child:
                entry = running.pop(child)
                outcome = finish(entry, status, usage.ru_utime + usage.ru_stime)
                outcomes.append(outcome)
                _tell(outcome, len(outcomes), len(numbers))
                if keep is not None and outcome.verdict != "ok":
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{entry.number}-{outcome.verdict.replace(' ', '-')}.onnx").write_bytes(entry.data)
                for path in entry.folder.iterdir():
                    path.unlink()
                continue
            for child, entry in running.items():
                if time.monotonic() - entry.started > WALL_LIMIT:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
    return outcomes


def _warm_up() -> None:
    """Import here, once, what every forked process would import; no session of the runtime, whose threads would not
    survive a fork."""
    import xform.api
    import xform.cli

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        xform.cli.main(["optimize", "no-such-file.onnx", "--json"])
    gc.collect()
    gc.freeze()


def _tell(outcome: Outcome, done: int, total: int) -> None:
    if outcome.verdict != "ok":
        print(f"{outcome.verdict}: mutant {outcome.number} ({outcome.what}): {outcome.message}", file=sys.stderr)
    elif done % 100 == 0:
        print(f"{done} of {total}", file=sys.stderr, flush=True)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """The report: counts per verdict and exit code, and the slowest mutant."""
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    bad = [o for o in outcomes if o.verdict != "ok"]
    return {
        "files": len(outcomes),
        "ok": verdicts["ok"],
        "hangs": verdicts["hang"],
        "crashes": verdicts["crash"],
        "internal_errors": verdicts["internal error"],
        "half_files": verdicts["half file"] + verdicts["invalid output"],
        "inputs_changed": verdicts["input changed"],
        "tracebacks": verdicts["traceback"],
        "exit_codes": dict(sorted(Counter(str(o.code) for o in outcomes).items())),
        "slowest_s": round(max((o.seconds for o in outcomes), default=0.0), 2),
        "failed": [{"number": o.number, "verdict": o.verdict, "what": o.what, "message": o.message} for o in bad[:50]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line on stdout")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", type=int, default=60, help="seeds from ONNX's backend suite")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of single mutants")
    parser.add_argument("--keep", type=Path, help="folder for the mutants that did not end well")
    arguments = parser.parse_args()
    from fuzz_seeds import seeds

    numbers = arguments.only if arguments.only else list(range(arguments.count))
    outcomes = fuzz(
        list(seeds(arguments.suite).values()), numbers, arguments.seed, jobs=arguments.jobs, keep=arguments.keep
    )
    document = summary(outcomes)
    print(json.dumps(document) if arguments.json else json.dumps(document, indent=2))
    return 0 if document["ok"] == document["files"] else 1


if __name__ == "__main__":
    sys.exit(main())
