"""Hostile files and arguments against the command line: what is read, overwritten, used up, and shown.

    python benchmarks/hostile.py --json [--only PART] [--every N] [--jobs 2]

Every case is a folder with a model (or something that is none) and one command, run in a process of its own. Beside the
model's folder lie canaries. Figures of the last line, each a count of cases: `read_outside` a canary or a system file
was opened, or its bytes came out; `overwritten` a file that was there before has changed; `over_memory` more than 2 GB;
`over_time` more than 20 s; `wrong_exit` another exit code than docs/errors-and-exit-codes.md says; `control_characters`
the output holds characters that a terminal obeys. `failing` lists the cases by name. The exit code is 0 if all are 0.

The packages are imported once and each case is a fork of that process, so a case costs what it does, not the import.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hostile_arguments
import hostile_bombs
import hostile_commands
import hostile_damaged
import hostile_external
import hostile_names
import hostile_protobuf
from hostile_case import Case

MEMORY_BYTES = 2 * 10**9
SECONDS = 20.0
KILL_AFTER = 40.0
CANARY = b"CANARY-7f3a91-this-must-never-come-out"
FORBIDDEN = ("/etc/passwd", "/etc/shadow", "/dev/zero", "/dev/stdin", "/proc/self/environ")
FAULTS = ("read_outside", "overwritten", "over_memory", "over_time", "wrong_exit", "control_characters")
PREPARED = (
    "xform.api", "xform.backends.onnxruntime", "xform.cli", "xform.pipeline.bisect", "xform.report.html",
    "xform.report.latency", "xform.report.terminal", "torch",
)  # fmt: skip


@dataclass
class Result:
    """What became of one case."""

    name: str
    exit_code: int = -1
    seconds: float = 0.0
    megabytes: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    output: str = ""


def cases() -> list[Case]:
    """All cases, by classes."""
    files = (
        hostile_external, hostile_damaged, hostile_bombs, hostile_names, hostile_protobuf, hostile_arguments,
        hostile_commands,
    )  # fmt: skip
    return [case for file in files for case in file.all_cases()]


def prepare() -> None:
    """Import what the cases need, before any fork; xform before the runtime, as it decides what that may report."""
    for name in PREPARED:
        importlib.import_module(name)
    importlib.import_module("onnxruntime").set_default_logger_severity(4)


def run_case(case: Case, root: Path) -> Result:
    """Build the case's folder below `root`, run it, and look at what it did."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=root))
    try:
        for name in ("models", "work", "outside", "cache", "tmp"):
            (folder / name).mkdir()
        (folder / "outside" / "secret.bin").write_bytes(CANARY * 8)
        (folder / "outside" / "link.onnx").write_bytes(CANARY)
        arguments = case.build(folder)
        result = Result(case.name)
        before = _fingerprints(folder)
        if case.poison is not None:
            _run(arguments, folder, result)
            if result.exit_code != 0:  # there is nothing to poison, and this run is what is at fault
                _judge(case, folder, before, result)
                return result
            case.poison(folder)
        _run(arguments, folder, result)
        _judge(case, folder, before, result)
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprints(folder: Path) -> dict[str, str]:
    """Every regular file there by its real path. What lies in the work folder may be replaced, unless it is a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside_work = (folder / "work") in path.parents or (folder / "tmp") in path.parents
        if path.is_file() and not path.is_symlink() and not inside_work and (folder / "cache") not in path.parents:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _run(arguments: list[str], folder: Path, result: Result) -> None:
    """Fork, run the command in the child, and wait for it; kills it when it takes far too long or far too much."""
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        _child(arguments, folder)
    done = threading.Event()
    guard = threading.Thread(target=_guard, args=(process, done), daemon=True)
    guard.start()
    _, status, usage = os.wait4(process, 0)
    done.set()
    guard.join()
    result.seconds = time.monotonic() - start
    result.megabytes = usage.ru_maxrss * 1024 // 10**6
    result.exit_code = os.waitstatus_to_exitcode(status)


def _guard(process: int, done: threading.Event) -> None:
    start = time.monotonic()
    while not done.wait(0.1):
        try:
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        if time.monotonic() - start > KILL_AFTER or pages * resource.getpagesize() > 2 * MEMORY_BYTES:
            os.kill(process, 9)
            return


def _child(arguments: list[str], folder: Path) -> None:
    code = 99
    try:
        os.chdir(folder / "work")
        _redirect(folder)
        os.environ.update(
            XFORM_CACHE=str(folder / "cache"), COLUMNS="200", TMPDIR=str(folder / "tmp"), HOME=str(folder)
        )
        tempfile.tempdir = None
        opened = os.open(folder / "opened", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        outside = str(folder / "outside")

        def audit(event: str, values: tuple[Any, ...]) -> None:
            if event in ("open", "os.listdir", "os.scandir") and values and isinstance(values[0], str | bytes):
                given = os.fsdecode(values[0])
                if event == "open" and values[2] & os.O_NOFOLLOW and os.path.islink(given):
                    return  # the system refuses that
                place = os.path.realpath(given)
                if place.startswith(outside) or place in FORBIDDEN:
                    os.write(opened, os.fsencode(place) + b"\n")

        sys.addaudithook(audit)
        from xform.cli import main

        warnings.resetwarnings()
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(folder: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _judge(case: Case, folder: Path, before: dict[str, str], result: Result) -> None:
    stdout, stderr = ((folder / name).read_bytes() for name in ("stdout", "stderr"))
    result.output = stderr.decode(errors="replace")[-1500:]
    opened = (folder / "opened").read_text().splitlines() if (folder / "opened").exists() else []
    written = [p for p in (folder / "work").rglob("*") if p.is_file() and not p.is_symlink()]
    leaked = [p.name for p in written if CANARY in p.read_bytes()]
    if opened or leaked or CANARY in stdout or CANARY in stderr:
        result.faults["read_outside"] = ", ".join([*sorted(set(opened)), *leaked]) or "shown"
    after = _fingerprints(folder)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    if changed:
        result.faults["overwritten"] = ", ".join(changed)
    if result.megabytes * 10**6 > MEMORY_BYTES:
        result.faults["over_memory"] = f"{result.megabytes} MB"
    if result.seconds > SECONDS:
        result.faults["over_time"] = f"{result.seconds:.1f} s"
    if result.exit_code not in case.expect:
        result.faults["wrong_exit"] = f"{result.exit_code} instead of {sorted(case.expect)}"
    bad = {c for c in (stdout + stderr).decode(errors="replace") if c not in "\n\t" and obeyed(c)}
    if bad:
        result.faults["control_characters"] = ", ".join(sorted(f"U+{ord(c):04X}" for c in bad))


def obeyed(character: str) -> bool:
    """Whether a terminal acts on the character instead of showing it."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")


def run_all(chosen: list[Case], jobs: int, *, verbose: bool = False) -> list[Result]:
    """Results in the order of the cases; `jobs` of them at a time."""
    prepare()
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        place = Path(root).resolve()

        done = itertools.count(1)

        def one(case: Case) -> Result:
            result = run_case(case, place)
            if (number := next(done)) % 50 == 0 and verbose:
                print(f"{number} of {len(chosen)} cases", file=sys.stderr, flush=True)
            if verbose and result.faults:
                last = result.output.strip().splitlines()[-1:] or [""]
                print(f"{result.name}: {result.faults} | {last[0][:200]!r}", file=sys.stderr, flush=True)
            return result

        if jobs == 1:
            return [one(case) for case in chosen]
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, chosen))


def summary(results: list[Result]) -> dict[str, Any]:
    """The last line: counts of every fault, and the failing cases."""
    counts: dict[str, Any] = {"cases": len(results)}
    counts.update({fault: sum(fault in result.faults for result in results) for fault in FAULTS})
    counts["failing"] = [{"case": r.name, **r.faults} for r in results if r.faults]
    counts["slowest_s"] = round(max((r.seconds for r in results), default=0.0), 1)
    counts["largest_mb"] = max((r.megabytes for r in results), default=0)
    return counts


def main() -> int:
    """Run the benchmark; the exit code is 0 if no case has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="every N-th case only")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name][:: options.every]
    results = run_all(chosen, options.jobs, verbose=True)
    found = summary(results)
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{key}: {value}" for key, value in found.items()))
    return int(any(found[fault] for fault in FAULTS))


if __name__ == "__main__":
    raise SystemExit(main())
