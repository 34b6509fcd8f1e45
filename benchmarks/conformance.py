"""ONNX's own test suite through xform: what ONNX Runtime got right before, it must get right after.

    python benchmarks/conformance.py --json

Every node, simple and converted model of `onnx.backend.test.loader` is run by ONNX Runtime as it is; then it goes
through xform and is run again, with the suite's inputs, expected outputs and tolerances. Workers are processes, so a
crash of a native library is a result, not the end.

Figures of the last line: `loaded` cases; `met_before` the runtime met the expected outputs as they came; `harmed` of
these are no longer met, or xform raised (also where the runtime ran the original but missed the expected outputs:
`not_met_before`); `unsupported_by_runtime` does not load or run as it came; `made_runnable` of these meet the expected
outputs after (models of opset 6, mostly); `cured` met after but not before.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
RUNTIME_IR_VERSION = 11  # the newest that ONNX Runtime 1.31 accepts
SECONDS_PER_CASE = 60.0


@dataclass
class Result:
    """What became of one case."""

    name: str
    kind: str
    before: str = "crashed"  # met | not_met | unsupported | crashed
    after: str = ""  # met | not_met | raised | failed (the runtime refuses the result) | crashed | "" (not tried)
    detail: str = ""
    seconds: float = 0.0

    @property
    def harmed(self) -> bool:
        """Worse than before; a case that ran but missed the expected outputs is harmed if it no longer runs."""
        if self.before == "met":
            return self.after != "met"
        return self.before == "not_met" and self.after not in ("met", "not_met")


# --- cases ----------------------------------------------------------------------------------------------------------


def load_cases(kinds: tuple[str, ...] = KINDS) -> list[tuple[str, Any]]:
    """All cases as (kind, case), in the suite's order."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [(kind, case) for kind in kinds for case in load_model_tests(kind=kind)]


def case_model(case: Any) -> onnx.ModelProto:
    """The case's model, with an IR version that the runtime accepts."""
    model = onnx.ModelProto()
    if case.model is not None:
        model.CopyFrom(case.model)
    else:
        model.CopyFrom(onnx.load(os.path.join(case.model_dir, "model.onnx")))
    model.ir_version = min(model.ir_version, RUNTIME_IR_VERSION)
    return model


def case_data(case: Any, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
    """Pairs of inputs and expected outputs; sequences are lists, an empty optional is None."""
    if case.data_sets is not None:
        yield from ((list(i), list(o)) for i, o in case.data_sets)
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set*")):
        yield _read(folder, "input", model.graph.input), _read(folder, "output", model.graph.output)


def _read(folder: Path, stem: str, infos: Any) -> list[Any]:
    count = len(list(folder.glob(f"{stem}_*.pb")))
    return [_parse((folder / f"{stem}_{i}.pb").read_bytes(), infos[i].type) for i in range(count)]


def _parse(data: bytes, type_: onnx.TypeProto) -> Any:
    kind = type_.WhichOneof("value")
    if kind == "sequence_type":
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind == "optional_type":
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data))


# --- running --------------------------------------------------------------------------------------------------------


def run_model(model: bytes, inputs: list[Any]) -> list[Any]:
    """Runs a serialized model; inputs go to the graph inputs that are no initializers, in order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feeds = {n: _feed(v) for n, v in zip(names, inputs, strict=False)}
    if any(isinstance(v, ort.OrtValue) for v in feeds.values()):
        results = session.run_with_ort_values(None, {n: _as_ort_value(v) for n, v in feeds.items()})
        return [r.numpy() for r in results]
    return session.run(None, feeds)


def _feed(value: Any) -> Any:
    """Types that NumPy does not have travel as their bits."""
    import onnxruntime as ort

    if isinstance(value, (list, tuple)) or value is None:
        return [np.asarray(v) for v in value] if value is not None else None
    value = np.asarray(value)
    if value.dtype.isbuiltin == 1:
        return value
    element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    bits = value.view({1: np.uint8, 2: np.uint16}[value.dtype.itemsize])
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(bits), element)


def _as_ort_value(value: Any) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value


def difference(expected: list[Any], got: list[Any], rtol: float, atol: float) -> str | None:
    """None if the outputs agree with the suite's tolerances, else what does not."""
    if len(expected) != len(got):
        return f"{len(got)} outputs instead of {len(expected)}"
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        if isinstance(want, (list, tuple)):
            found = difference(list(want), list(have), rtol, atol) if isinstance(have, (list, tuple)) else "no sequence"
        else:
            found = _array_difference(want, have, rtol, atol)
        if found:
            return f"output {index}: {found}"
    return None


def _array_difference(want: Any, have: Any, rtol: float, atol: float) -> str | None:
    if want is None or have is None:
        return None if want is have else "one is an empty optional"
    want, have = np.asarray(want), np.asarray(have)
    if want.shape != have.shape:
        return f"shape {have.shape} instead of {want.shape}"
    if want.dtype.kind in "OSU":
        return None if [_text(v) for v in want.flat] == [_text(v) for v in have.flat] else "strings differ"
    if want.dtype.itemsize == have.dtype.itemsize and want.dtype.isbuiltin != 1 and have.dtype.kind == "u":
        have = have.view(want.dtype)
    if want.dtype != have.dtype:
        return f"type {have.dtype} instead of {want.dtype}"
    if want.dtype.isbuiltin != 1:
        rtol = max(rtol, 2**-6) if want.dtype.name == "bfloat16" else rtol
        want, have = want.astype(np.float32), have.astype(np.float32)
    if np.allclose(have, want, rtol=rtol, atol=atol, equal_nan=True):
        return None
    with np.errstate(all="ignore"):
        return f"max difference {np.nanmax(np.abs(have.astype(np.complex128) - want)):.3g}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- through xform --------------------------------------------------------------------------------------------------


def through_optimize(model: onnx.ModelProto, **options: Any) -> bytes:
    """The default path: the `exact` preset, as a user's call would run it; `options` are those of `xform.optimize`."""
    import tempfile

    import xform

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        xform.optimize(model, target="cpu", preset="exact", verify="off", **options).save(path)
        return path.read_bytes()


def through_upgrade(model: onnx.ModelProto) -> bytes:
    """Only converted up, and written there."""
    return _converted(model, down=False)


def through_opset(model: onnx.ModelProto, opset: int) -> bytes:
    """Converted up, then written at a given opset, operators that are newer expanded. Refusing is counted as raised."""
    import onnx_ir as ir

    from xform.graph.downgrade import downgrade
    from xform.graph.opset import upgrade

    graph = ir.serde.deserialize_model(model)
    upgrade(graph)
    downgrade(graph, opset)
    return ir.serde.serialize_model(graph).SerializeToString()


def through_round_trip(model: onnx.ModelProto) -> bytes:
    """Converted up and back down to the oldest opset that holds it, from its own on."""
    return _converted(model, down=True)


def _converted(model: onnx.ModelProto, down: bool) -> bytes:
    import onnx_ir as ir

    from xform.graph.opset import opset_of, upgrade

    graph = ir.serde.deserialize_model(model)
    source = opset_of(graph)
    upgrade(graph)
    if down and source is not None:
        from xform.graph.downgrade import downgrade, lowest_opset

        downgrade(graph, lowest_opset(graph, at_least=source))
    return ir.serde.serialize_model(graph).SerializeToString()


THROUGH: dict[str, Callable[[onnx.ModelProto], bytes]] = {
    "optimize": through_optimize,
    "portable": functools.partial(through_optimize, portable=True),
    "portable-17": functools.partial(through_optimize, portable=True, opset=17),
    "upgrade": through_upgrade,
    "round-trip": through_round_trip,
    **{f"opset-{n}": functools.partial(through_opset, opset=n) for n in range(7, 26)},
}


# --- one case -------------------------------------------------------------------------------------------------------


def examine(
    kind: str, case: Any, transform: Callable[[onnx.ModelProto], bytes], said: Callable[[Result], None]
) -> Result:
    """Runs one case before and after; `said` hears about the state before anything that might crash the process."""
    result = Result(case.name, kind)
    start = time.perf_counter()
    said(result)
    model = case_model(case)
    data = list(case_data(case, model))
    result.before, result.detail = _judge(model.SerializeToString(), data, case)
    result.after = "crashed"
    said(result)
    try:
        after = transform(model)
    except Exception as error:  # every failure of xform is a finding here
        result.after, result.detail = "raised", f"{type(error).__name__}: {error}"
    else:
        result.after, result.detail = _judge(after, data, case)
        result.after = "failed" if result.after == "unsupported" else result.after
    result.seconds = time.perf_counter() - start
    return result


def _judge(model: bytes, data: list[tuple[list[Any], list[Any]]], case: Any) -> tuple[str, str]:
    """met, not_met or unsupported, and why."""
    for inputs, expected in data:
        try:
            got = run_model(model, inputs)
        except Exception as error:  # whatever the runtime raises means that it cannot run this
            return "unsupported", f"{type(error).__name__}: {error}"
        found = difference(expected, got, case.rtol, case.atol)
        if found:
            return "not_met", found
    return "met", ""


# --- workers --------------------------------------------------------------------------------------------------------


def _work(cases: list[tuple[str, Any]], through: str, pipe: Connection) -> None:
    transform = THROUGH[through]
    while True:
        index = pipe.recv()
        if index is None:
            return
        kind, case = cases[index]
        said = functools.partial(_say, pipe, index)
        pipe.send(("done", index, examine(kind, case, transform, said)))


def _say(pipe: Connection, index: int, result: Result) -> None:
    pipe.send(("said", index, result))


class Worker:
    """A forked process with one case under way; the fork shares the loaded cases."""

    def __init__(self, cases: list[tuple[str, Any]], through: str) -> None:
        context = get_context("fork")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_work, args=(cases, through, child), daemon=True)
        self.process.start()
        child.close()
        self.index: int | None = None
        self.since = time.monotonic()

    def give(self, index: int | None) -> None:
        self.index, self.since = index, time.monotonic()
        self.pipe.send(index)


def run(cases: list[tuple[str, Any]], through: str, jobs: int) -> list[Result]:
    """All cases, over `jobs` processes; a crashed or hanging worker is replaced."""
    results: dict[int, Result] = {}
    waiting = list(range(len(cases)))[::-1]
    workers = [Worker(cases, through) for _ in range(min(jobs, len(cases)))]
    for worker in workers:
        worker.give(waiting.pop())
    while any(w.index is not None for w in workers):
        ready = wait([w.pipe for w in workers if w.index is not None], timeout=1.0)
        for position, worker in enumerate(workers):
            if worker.index is None:
                continue
            index, ended = worker.index, False
            if worker.pipe in ready:
                try:
                    what, index, results[index] = worker.pipe.recv()
                    ended = what == "done"
                except (EOFError, ConnectionResetError):
                    results[index].detail = results[index].detail or "the process crashed"
                    workers[position] = worker = Worker(cases, through)
                    ended = True
            elif time.monotonic() - worker.since > SECONDS_PER_CASE:
                worker.process.kill()
                results[index].detail = f"no answer within {SECONDS_PER_CASE:.0f} s"
                workers[position] = worker = Worker(cases, through)
                ended = True
            if ended:
                worker.index = None
                if waiting:
                    worker.give(waiting.pop())
                if len(results) % 100 == 0:
                    print(f"\r{len(results)} of {len(cases)}", end="", file=sys.stderr, flush=True)
    for worker in workers:
        worker.give(None)
    print(file=sys.stderr)
    return [results[i] for i in range(len(cases))]


# --- figures --------------------------------------------------------------------------------------------------------


def summary(results: list[Result], seconds: float) -> dict[str, Any]:
    """The figures of the last line."""
    before = collections.Counter(r.before for r in results)
    return {
        "loaded": len(results),
        "met_before": before["met"],
        "not_met_before": before["not_met"],
        "unsupported_by_runtime": before["unsupported"],
        "crashed_before": before["crashed"],
        "harmed": sum(r.harmed for r in results),
        "cured": sum(r.before == "not_met" and r.after == "met" for r in results),
        "made_runnable": sum(r.before == "unsupported" and r.after == "met" for r in results),
        "seconds": round(seconds, 1),
    }


def table(results: list[Result]) -> str:
    """One line per class of failure, with examples."""
    classes: dict[tuple[str, str], list[Result]] = collections.defaultdict(list)
    for result in results:
        if result.harmed:
            classes[f"{result.before} -> {result.after}", " ".join(result.detail.split())[:100]].append(result)
    lines = [f"{'class':24} {'n':>4}  example and detail"]
    for (change, detail), members in sorted(classes.items(), key=lambda item: -len(item[1])):
        lines.append(f"{change:24} {len(members):4}  {members[0].name}: {detail}")
    return "\n".join(lines) if classes else "no case was harmed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--through", choices=sorted(THROUGH), default="optimize")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--sample", type=int, help="a seeded sample of so many cases instead of all")
    parser.add_argument("--details", type=Path, help="write every result to this file as JSON lines")
    arguments = parser.parse_args()
    cases = [(kind, case) for kind, case in load_cases() if arguments.only in case.name]
    if arguments.sample:
        cases = random.Random(20).sample(cases, arguments.sample)
    start = time.monotonic()
    results = run(cases, arguments.through, arguments.jobs)
    figures = summary(results, time.monotonic() - start)
    if arguments.details:
        arguments.details.write_text("".join(json.dumps(asdict(r)) + "\n" for r in results))
    print(table(results), file=sys.stderr)
    print(json.dumps(figures) if arguments.json else figures)
    return 0 if figures["harmed"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
