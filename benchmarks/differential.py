"""Random graphs, optimized without verification, against themselves.

    python benchmarks/differential.py --json --graphs 20000
    python benchmarks/differential.py --only 4711              # one seed again, with what was done
    python benchmarks/differential.py --only 4711 --minimize small.py

Each seed makes a graph (`differential_graphs.build`): random motifs over more than 90 operators, opsets 11 to 23, three
float types, dynamic and empty dims, branches and loops, the spelling that each rule looks for and what only looks like
it. ONNX Runtime runs it with its optimizations off; `xform.optimize(..., verify="off")` optimizes it; the result is run
on the same inputs. A seed says also how: exact (by far the most), portable, opset 13, 17 or 21, float64, bfloat16,
int8, packed, and the torch backend.

Figures of the last line:

    graphs          that ONNX Runtime runs and that were judged; `invalid` were refused by it and drawn again
    operators       how many operators of ONNX stood in them (`operator_names`)
    fired           graphs in which a rule was applied; `by_rule` how often each was, `never_fired` the others
    refused         graphs that xform refuses with a documented error, by reason
    wrong           numbers, shapes, dtypes or names differ; see `differential_compare` for how that is judged
    crashed         an error that is no documented one, a changed input, a result that does not load or run
    not_idempotent  a second run of the preset changes its own result
    planted, detected   wrong rules planted with verification on, and how many of them it found (benchmarks/planted.py)
    configs         the same per way of optimizing
    excused         why inputs of a graph were not compared, and in how many graphs
    failing         {seed: [verdict, config, reason]} of the first 200

Exit code 0 if wrong, crashed and not_idempotent are 0 and every planted rule was detected.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

LIMIT = 120.0  # seconds for one graph
RECYCLE = 1000  # graphs after which a worker is replaced: runtimes keep memory
ATTEMPTS = 8  # drawings for one seed until the runtime takes one
BAD = ("wrong", "crashed", "not_idempotent")
_TURN = ("exact",) * 9 + ("motif",) * 2 + ("portable", "opset", "float64") * 2 + ("bfloat16", "int8", "packed", "torch")

Result = dict[str, Any]


def plan(seed: int, configs: tuple[str, ...] = ()) -> tuple[str, str]:
    """How a seed is optimized, and the motif that its graph must hold (empty for any)."""
    from differential_graphs import MOTIFS

    if configs:
        return configs[seed % len(configs)], ""
    round_, place = divmod(seed, len(_TURN))
    config = _TURN[place]
    if config != "motif":
        return config, ""
    names = sorted(MOTIFS)
    return "exact", names[(_TURN.count("motif") * round_ + _TURN[:place].count("motif")) % len(names)]


def examine(seed: int, configs: tuple[str, ...], attempt: int, skip: frozenset[int], pipe: Connection) -> Result:
    """Judge a seed; what is about to be done goes through the pipe first."""
    from differential_graphs import build
    from differential_judge import Outcome, judge

    config, only = plan(seed, configs)
    invalid = attempt
    while True:
        pipe.send(("phase", attempt, "build"))
        case = build(seed, config, attempt=attempt, only=only)
        outcome: Outcome = judge(case, lambda phase, at=attempt: pipe.send(("phase", at, phase)), skip)
        if outcome.verdict != "invalid" or attempt + 1 == ATTEMPTS:
            return {**asdict(outcome), "invalid": invalid}
        attempt, skip, invalid = attempt + 1, frozenset(), invalid + 1


def work(pipe: Connection, configs: tuple[str, ...]) -> None:
    """Judge seeds as they come, until the pipe closes."""
    import onnxruntime as ort
    import torch

    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)
    torch.set_num_threads(1)
    while True:
        try:
            seed, attempt, skip = pipe.recv()
        except EOFError:
            return
        pipe.send(("done", seed, examine(seed, configs, attempt, skip, pipe)))


class Worker:
    """A process that judges seeds, and what it is doing."""

    def __init__(self, configs: tuple[str, ...]) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=work, args=(theirs, configs), daemon=True)
        self.process.start()
        theirs.close()
        self.seed: int | None = None
        self.skip: frozenset[int] = frozenset()
        self.done = 0

    def start(self, seed: int, attempt: int = 0, skip: frozenset[int] = frozenset()) -> None:
        """Hand it a seed."""
        self.seed, self.attempt, self.skip, self.phase = seed, attempt, skip, "start"
        self.since = time.monotonic()
        self.pipe.send((seed, attempt, skip))

    def close(self) -> None:
        """End it."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def results(seeds: Iterable[int], configs: tuple[str, ...], jobs: int) -> Iterator[Result]:
    """Outcomes in the order in which they come; a seed that kills its process is one of them."""
    waiting = iter(seeds)
    workers = [Worker(configs) for _ in range(jobs)]
    try:
        while True:
            for i, worker in enumerate(workers):
                if worker.seed is not None:
                    continue
                seed = next(waiting, None)
                if seed is None:
                    continue
                if worker.done >= RECYCLE:
                    worker.close()
                    workers[i] = worker = Worker(configs)
                worker.start(seed)
            busy = [w for w in workers if w.seed is not None]
            if not busy:
                return
            ready = wait([w.pipe for w in busy], timeout=1.0)
            for worker in busy:
                result = _heard(worker) if worker.pipe in ready else _overdue(worker)
                if result == "dead":
                    index = workers.index(worker)
                    worker.close()
                    workers[index] = Worker(configs)
                    result = _after_crash(worker, workers[index], configs)
                if isinstance(result, dict):
                    yield result
    finally:
        for worker in workers:
            worker.close()


def _heard(worker: Worker) -> Result | str | None:
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return "dead"
    if message[0] == "phase":
        worker.attempt, worker.phase = message[1], message[2]
        return None
    worker.seed, worker.done = None, worker.done + 1
    result: Result = message[2]
    return result


def _overdue(worker: Worker) -> str | None:
    return "dead" if time.monotonic() - worker.since > LIMIT else None


def _after_crash(dead: Worker, new: Worker, configs: tuple[str, ...]) -> Result | None:
    """The outcome of a crash, or None where the original itself crashed and the seed goes on without what did it."""
    assert dead.seed is not None
    late = time.monotonic() - dead.since > LIMIT
    if dead.phase.startswith("original: feed ") and not dead.phase.endswith(" 0"):
        new.start(dead.seed, dead.attempt, dead.skip | {int(dead.phase.rsplit(" ", 1)[1])})
        return None
    if dead.phase.startswith(("original", "build")) and dead.attempt + 1 < ATTEMPTS:
        new.start(dead.seed, dead.attempt + 1)
        return None
    what = f"did not end within {LIMIT:.0f} s" if late else f"the process died (exit {dead.process.exitcode})"
    config = plan(dead.seed, configs)[0]
    empty: Result = {"fired": {}, "operators": [], "motifs": [], "invalid": dead.attempt}
    return {"seed": dead.seed, "attempt": dead.attempt, "config": config, "verdict": "crashed",
            "reason": f"{what}: {dead.phase}", **empty}  # fmt: skip


def summary(found: list[Result]) -> dict[str, Any]:
    """The figures of the last line, without the planted ones."""
    judged = [r for r in found if r["verdict"] != "invalid"]
    fired: Counter[str] = Counter()
    names: set[str] = set()
    for r in judged:
        fired.update(r["fired"])
        names.update(r["operators"])
    bad = [r for r in judged if r["verdict"] in BAD]
    return {
        **_counts(judged),
        "operators": len(names),
        "invalid": sum(r["invalid"] for r in found),
        "configs": {c: _counts([r for r in judged if r["config"] == c]) for c in sorted({r["config"] for r in judged})},
        "refused_by_reason": dict(
            Counter(_short(r["reason"]) for r in judged if r["verdict"] == "refused").most_common(20)
        ),
        "excused": dict(Counter(why for r in judged for why in dict.fromkeys(r.get("excused", ()))).most_common()),
        "by_rule": dict(sorted(fired.items())),
        "never_fired": sorted(rules() - fired.keys()),
        "operator_names": sorted(names),
        "failing": {str(r["seed"]): [r["verdict"], r["config"], r["reason"]] for r in bad[:200]},
    }


def _counts(judged: list[Result]) -> dict[str, int]:
    verdicts = Counter(r["verdict"] for r in judged)
    keys = ("wrong", "crashed", "not_idempotent", "refused")
    return {
        "graphs": len(judged),
        "fired": sum(bool(r["fired"]) for r in judged),
        **{key: verdicts[key] for key in keys},
    }


def _short(reason: str) -> str:
    return "".join("#" if c.isdigit() else c for c in reason.split("\n")[0])[:100]


def rules() -> set[str]:
    """Every rule of the preset `exact`, as pass/rule."""
    from xform.pipeline.presets import resolve
    from xform.rewrite.passes import RewritePass

    return {f"{p.name}/{r.name}" for p in resolve("exact") if isinstance(p, RewritePass) for r in p.rules()}


def planted() -> dict[str, Any]:
    """Wrong rules planted, and how many of them verification detected; told as absent where there is no such list."""
    if importlib.util.find_spec("planted") is None:
        return {"planted": 0, "detected": 0, "planted_absent": "benchmarks/planted.py is not there"}
    from planted import run_planted

    found = run_planted()
    return found if isinstance(found, dict) else {"planted": found[0], "detected": found[1]}


def again(seed: int, configs: tuple[str, ...], write: Path | None) -> int:
    """Judge one seed and print everything about it."""
    import onnx
    from differential_graphs import build

    outcome = next(results([seed], configs, 1))
    config, only = plan(seed, configs)
    case = build(seed, config, attempt=outcome["attempt"], only=only)
    print(onnx.printer.to_text(case.model))
    for feed in case.feeds:
        print({name: (str(array.dtype), array.shape) for name, array in feed.items()})
    print(json.dumps(outcome, indent=1))
    if write is not None:
        write.write_bytes(case.model.SerializeToString())
    return int(outcome["verdict"] in BAD)


def minimize(seed: int, configs: tuple[str, ...], write: Path) -> None:
    """Write a program that shows the smallest failure found behind a seed."""
    from differential_graphs import build
    from differential_judge import judge, options
    from differential_minimize import minimized, script

    first = next(results([seed], configs, 1))
    if first["verdict"] not in BAD or "the process died" in first["reason"]:
        raise SystemExit(f"seed {seed} is {first['verdict']}: {first['reason']}: there is nothing to make smaller")
    config, only = plan(seed, configs)
    warnings.simplefilter("ignore")

    def fails(case: Any) -> bool:
        outcome = judge(case, lambda phase: None)
        return outcome.verdict == first["verdict"] and _kind(outcome.reason) == _kind(first["reason"])

    case = minimized(build(seed, config, attempt=first["attempt"], only=only), fails)
    write.write_text(script(case, options(case)))


def _kind(reason: str) -> str:
    return "".join(c for c in reason.split(" with name")[0].split("output")[-1] if c.isalpha())[:60]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON line on stdout")
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--configs", default="", help="only these, with commas: exact,portable,opset,float64,...")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="SEED", help="one seed, in this process, with its graph")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --only: write its graph")
    parser.add_argument("--minimize", type=Path, metavar="FILE", help="with --only: write a small failing program")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="JSON lines: add outcomes, skip seeds it has")
    parser.add_argument("--no-planted", action="store_true", help="leave the planted rules out")
    arguments = parser.parse_args()
    configs = tuple(filter(None, arguments.configs.split(",")))
    if arguments.only is not None and arguments.minimize is not None:
        minimize(arguments.only, configs, arguments.minimize)
        return 0
    if arguments.only is not None:
        return again(arguments.only, configs, arguments.write)
    resume: Path | None = arguments.resume
    found: list[Result] = []
    if resume is not None and resume.exists():
        found = [json.loads(line) for line in resume.read_text().splitlines() if line.strip()]
    have = {r["seed"] for r in found}
    seeds = [s for s in range(arguments.seed, arguments.seed + arguments.graphs) if s not in have]
    started = time.monotonic()
    for result in results(seeds, configs, arguments.jobs):
        found.append(result)
        if result["verdict"] in BAD:
            print(
                f"{result['verdict']}: seed {result['seed']} ({result['config']}): {result['reason']}", file=sys.stderr
            )
        if len(found) % 500 == 0:
            print(f"{len(found)} of {len(seeds) + len(have)}", file=sys.stderr, flush=True)
        if resume is not None:
            with resume.open("a") as log:
                log.write(json.dumps(result) + "\n")
    document = {**summary(found), "seconds": round(time.monotonic() - started, 1)}
    document |= {"planted": 0, "detected": 0} if arguments.no_planted else planted()
    print(json.dumps(document) if arguments.json else json.dumps(document, indent=2))
    failed = any(document[key] for key in BAD) or document["detected"] < document["planted"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
