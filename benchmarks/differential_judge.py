"""One random graph tried: run as it is, optimized without verification, run again, compared, optimized twice."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from differential_arbiter import arbitrated, finite, runtime_differs, undefined
from differential_compare import Outputs, differences, retyped, session
from differential_graphs import Case, operators
from differential_sketch import BF16, F32

OPSET_TARGETS = (13, 17, 21)
INT8_BOUND = 0.5  # of the root mean square, over and above what noise of int8's size does
_OPTIMIZED_SHARE = 3  # every so many graphs the result is run with the runtime's own optimizations too
_KERNELS = 10.0  # times what rounding does: the fusions of the runtime sum in another order

Tell = Callable[[str], None]


@dataclass
class Outcome:
    """How one graph fared.

    Attributes:
        verdict: "ok", "invalid" (the runtime refuses the original), "refused" (by a documented error), "wrong",
            "crashed", or "not_idempotent".
        reason: In words.
        fired: Rules that were applied, "pass/rule" to how often.
        operators: Operators of the standard domain in the original.
        excused: Why something was not compared.
    """

    seed: int
    attempt: int
    config: str
    verdict: str = "ok"
    reason: str = ""
    fired: dict[str, int] = field(default_factory=dict)
    operators: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)
    motifs: list[str] = field(default_factory=list)


def options(case: Case) -> dict[str, Any]:
    """Arguments of `optimize` for a case."""
    match case.config:
        case "portable":
            return {"portable": True}
        case "opset":
            return {"opset": OPSET_TARGETS[case.seed % len(OPSET_TARGETS)]}
        case "int8":
            return {"preset": "int8", "calibration": [f for f in case.feeds if all(v.size for v in f.values())]}
        case "packed":
            return {"padding": "packed"}
        case "torch":
            return {"backend": "torch_triton"}
        case _:
            return {}


class Original:
    """The graph as it came, by ONNX Runtime without optimizations, and what it gives for each feed."""

    def __init__(self, case: Case, tell: Tell, skip: frozenset[int]) -> None:
        self.model = case.model
        tell("original: load")
        self.session = session(case.model)
        self.outputs: list[Outputs | None] = []
        for i, feed in enumerate(case.feeds):
            tell(f"original: feed {i}")
            try:
                outputs = None if i in skip else self.session.run(None, feed)
                self.outputs.append(outputs if outputs is not None and self._as_declared(outputs) else None)
            except Exception:  # the original does not take these sizes, so nothing is asked of the result
                if i == 0:
                    raise
                self.outputs.append(None)

    def _as_declared(self, outputs: Outputs) -> bool:
        """Whether each output has the sizes that its model declares: some kernels keep a reduced axis of nothing."""
        declared = (v.type.tensor_type for v in self.model.graph.output)
        return all(
            not kind.HasField("shape") or _has(kind.shape.dim, np.shape(x))
            for kind, x in zip(declared, outputs, strict=True)
        )


def _has(dims: Sequence[Any], shape: tuple[int, ...]) -> bool:
    fixed = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return len(fixed) == len(shape) and all(want in (None, got) for want, got in zip(fixed, shape, strict=True))


def judge(case: Case, tell: Tell, skip: frozenset[int] = frozenset(), optimize: Any = None) -> Outcome:
    """Try one case.

    Args:
        tell: Called with what is about to be done, so that a crash of the process can be laid to it.
        skip: Feeds that the original is known to crash on.
        optimize: In place of `xform.optimize`.
    """
    import xform
    from xform.backends.onnxruntime.session import ITS_OWN
    from xform.errors import XformError

    outcome = Outcome(case.seed, case.attempt, case.config, motifs=list(case.motifs))
    outcome.operators = sorted(operators(case.model))
    try:
        original = Original(case, tell, skip)
    except Exception as error:
        outcome.verdict, outcome.reason = "invalid", str(error)[:300]
        return outcome
    tell("optimize")
    model = retyped(case.model, F32, BF16) if case.config == "bfloat16" else case.model
    before = model.SerializeToString(deterministic=True)
    try:
        result = (optimize or xform.optimize)(model, verify="off", **options(case))
    except XformError as error:
        outcome.verdict, outcome.reason = "refused", f"{type(error).__name__}: {error.what}"[:300]
        return outcome
    except Exception as error:
        outcome.verdict, outcome.reason = "crashed", _where(error)
        return outcome
    if model.SerializeToString(deterministic=True) != before:
        outcome.verdict, outcome.reason = "crashed", "the input was changed"
        return outcome
    done = [r for r in result.report.remarks if r.verdict == "applied"]
    outcome.fired = dict(Counter(f"{r.pass_name}/{r.rule}" for r in done))
    rolled_back = [r for r in result.report.remarks if r.verdict == "rolled_back"]
    undone = [r for r in rolled_back if ITS_OWN not in r.reason]
    outcome.excused += ["rolled back, as the runtime's optimizations break the result"] * (
        not undone and bool(rolled_back)
    )
    if undone:
        outcome.verdict = "crashed"
        outcome.reason = f"rolled back without verification: {undone[0].pass_name}: {undone[0].reason}"[:300]
        return outcome
    try:
        _comparenumbers(case, original, result, outcome, tell)
        if (
            outcome.verdict == "ok"
            and not rolled_back
            and case.config in ("exact", "portable", "opset", "float64", "bfloat16")
        ):
            tell("second run")
            _comparesecond_run(result, outcome)
    except Exception as error:
        outcome.verdict, outcome.reason = "crashed", _where(error)
    return outcome


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inner = next((f for f in reversed(frames) if "/benchmarks/" not in f.filename), frames[-1])
    return f"{type(error).__name__}: {str(error)[:260]} ({inner.filename.rsplit('/', 1)[-1]}:{inner.lineno})"


def _comparesecond_run(result: Any, outcome: Outcome) -> None:
    from xform.pipeline.manager import run_pipeline
    from xform.pipeline.presets import resolve

    again = run_pipeline(result.graph, resolve("exact"), verify="off")
    done = sorted({f"{r.pass_name}/{r.rule}" for r in again.remarks if r.verdict == "applied"})
    before, after = (Counter(n.op_type for n in m.graph.all_nodes()) for m in (result.graph, again.model))
    if done or before != after:
        outcome.verdict = "not_idempotent"
        outcome.reason = f"a second run applied {', '.join(done) or 'nothing it tells of'}"


def _comparenumbers(case: Case, original: Original, result: Any, outcome: Outcome, tell: Tell) -> None:
    if case.config == "torch":
        _comparecall(case, original, result, outcome, tell)
        return
    if case.config == "bfloat16":
        _compareupcast(case, original, result, outcome, tell)
        return
    data = result.artifact.to_bytes()
    for optimized in (False, True) if case.seed % _OPTIMIZED_SHARE == 0 else (False,):
        tell(f"result: load, optimizations {'on' if optimized else 'off'}")
        outputs = _run_result(case, original, data, optimized, outcome, tell)
        if outcome.verdict != "ok":
            return
        _compare(case, original, outputs, outcome, optimized)
        if outcome.verdict != "ok":
            return


def _run_result(
    case: Case, original: Original, data: bytes, optimized: bool, outcome: Outcome, tell: Tell
) -> list[Outputs | None]:
    try:
        made = session(data, optimized=optimized)
    except Exception:
        if not optimized or _loads_optimized(case, tell):
            raise
        outcome.excused.append("the runtime's optimizations break the original at load")
        return [None] * len(case.feeds)
    wrong = _interface(original.session, made)
    if wrong:
        outcome.verdict, outcome.reason = "wrong", wrong
        return []
    outputs: list[Outputs | None] = []
    for i, (feed, want) in enumerate(zip(case.feeds, original.outputs, strict=True)):
        tell(f"result: feed {i}")
        try:
            outputs.append(None if want is None else made.run(None, feed))
        except Exception as error:
            excuse = _runtime_fails(case, i, error, optimized, tell)
            if not excuse:
                raise
            outcome.excused.append(excuse)
            outputs.append(None)
    return outputs


def _loads_optimized(case: Case, tell: Tell) -> bool:
    tell("original: load, optimizations on")
    try:
        session(case.model, optimized=True)
    except Exception:  # that it does not is the answer
        return False
    return True


def _runtime_fails(case: Case, i: int, error: Exception, optimized: bool, tell: Tell) -> str:
    """What the runtime does wrong with these inputs, if no result can be asked to make it good.

    The original, run as users run it (the runtime's own optimizations on), fails too: anywhere if the result was run
    so as well, else in an operator of the same kind. Or it makes a value of another rank than its operator declares, as
    ArgMax and the reductions do of nothing, and the result stumbles over a rank.
    """
    tell(f"original: feed {i}")
    try:
        session(case.model, optimized=True).run(None, case.feeds[i])
    except Exception as original:
        if optimized or _kind_of(original) == _kind_of(error) != "":
            return f"the runtime fails on the original too, in {_kind_of(original) or 'an operator'}"
    if all(v.size for v in case.feeds[i].values()):
        return ""
    inferred = onnx.shape_inference.infer_shapes(case.model)
    known = [v for v in inferred.graph.value_info if v.type.tensor_type.HasField("shape")]
    outputs = {output.name for output in inferred.graph.output}
    inferred.graph.output.extend(value for value in known if value.name not in outputs)
    try:
        got = session(inferred).run([value.name for value in known], case.feeds[i])
    except Exception:  # the runtime does not give these values out, so nothing is known of them
        return ""
    wrong = any(np.ndim(x) != len(v.type.tensor_type.shape.dim) for v, x in zip(known, got, strict=True))
    return f"a value of nothing has another rank than declared, before {_kind_of(error)}" if wrong else ""


def _kind_of(error: Exception) -> str:
    """The operator that the runtime names as failing; empty if it names none."""
    found = re.search(r"while running (\w+) node", str(error))
    return found[1] if found else ""


def _interface(want: Any, got: Any) -> str:
    for kind in ("inputs", "outputs"):
        a, b = ([(v.name, v.type) for v in getattr(s, f"get_{kind}")()] for s in (want, got))
        if a != b:
            return f"{kind} {a} became {b}"[:300]
    return ""


def _comparecall(case: Case, original: Original, result: Any, outcome: Outcome, tell: Tell) -> None:
    outputs = []
    for i, (feed, want) in enumerate(zip(case.feeds, original.outputs, strict=True)):
        tell(f"result: feed {i}")
        outputs.append(None if want is None else [np.asarray(v) for v in result(feed).values()])
    _compare(case, original, outputs, outcome, False)


def _compareupcast(case: Case, original: Original, result: Any, outcome: Outcome, tell: Tell) -> None:
    """bfloat16: original and result are both run in float32 on the same rounded weights."""
    from xform.backends.base import LowerOptions
    from xform.backends.onnxruntime import OnnxRuntimeBackend
    from xform.target import Target

    want = session(retyped(retyped(case.model, F32, BF16), BF16, F32))
    # ONNX Runtime has few kernels in bfloat16, so torch may have been taken; judged is what ONNX Runtime would get
    written = OnnxRuntimeBackend().lower(result.graph, Target.parse("cpu"), LowerOptions())
    made = session(retyped(onnx.load_model_from_string(written.to_bytes()), BF16, F32))
    outputs: list[Outputs | None] = []
    references: list[Outputs | None] = []
    for i, feed in enumerate(case.feeds):
        skipped = original.outputs[i] is None
        tell(f"original: feed {i}")
        references.append(None if skipped else want.run(None, feed))
        tell(f"result: feed {i}")
        outputs.append(None if skipped else made.run(None, feed))
    original.outputs = references
    _compare(case, original, outputs, outcome, False, rounding="bfloat16")


def _compare(
    case: Case, original: Original, outputs: list[Outputs | None], outcome: Outcome, optimized: bool, rounding: str = ""
) -> None:
    if case.config == "int8":
        _compare_int8(case, original, outputs, outcome)
        return
    lenient = any(name.startswith("raise_attention/") for name in outcome.fired)  # rows without a key, documented
    # NaN through a guard, and an infinity beside a weight of zero that merging pads with: both are documented
    finite_alone = lenient or "merge_affine_maps/merge" in outcome.fired
    if case.config != "bfloat16" and "GroupNormalization" in outcome.operators:
        rounding = "float32"  # its definition computes float64 in float32
    for i, (want, got) in enumerate(zip(original.outputs, outputs, strict=True)):
        if want is None or got is None:
            continue
        if finite_alone and not finite(case.feeds[i]):
            continue
        if case.config == "torch" and not finite(case.feeds[i]) and undefined(case):
            outcome.excused.append("integers of what is not finite")
            continue
        keep = np.asarray(case.feeds[i][case.tokens]).astype(bool) if case.tokens else None
        compare = partial(
            differences,
            want,
            got,
            keep=keep,
            lenient=lenient,
            loose=not finite(case.feeds[i]),
            factor=_KERNELS if optimized else 1.0,
        )
        found = compare()
        if found:
            found = arbitrated(case, i, want, got, compare, rounding)
        if found and optimized and runtime_differs(case, i, want):
            return
        if found:
            level = ", the runtime's optimizations on" if optimized else ""
            outcome.verdict = "wrong"
            outcome.reason = f"feed {i}, output {found[0].output}: {found[0].what}{level}"
            return


def _compare_int8(case: Case, original: Original, outputs: list[Outputs | None], outcome: Outcome) -> None:
    """The root mean square of the error over the calibration data, against that of the outputs."""
    pairs = [
        (want, got)
        for want, got, feed in zip(original.outputs, outputs, case.feeds, strict=True)
        if want is not None and got is not None and all(v.size for v in feed.values())
    ]
    for want, got in pairs:
        for a, b in zip(want, got, strict=True):
            if np.asarray(a).shape != np.asarray(b).shape or np.asarray(a).dtype != np.asarray(b).dtype:
                outcome.verdict, outcome.reason = "wrong", "another shape or dtype"
                return
    for k in range(len(pairs[0][0]) if pairs else 0):
        a = [np.asarray(want[k]).astype(np.float64).reshape(-1) for want, _ in pairs]
        b = [np.asarray(got[k]).astype(np.float64).reshape(-1) for _, got in pairs]
        x, y = np.concatenate(a), np.concatenate(b)
        live = np.isfinite(x)
        if (live & ~np.isfinite(y)).any():
            outcome.verdict, outcome.reason = "wrong", f"output {k} is not finite any more"
            return
        rms = float(np.sqrt(np.mean(x[live] ** 2))) if live.any() else 0.0
        error = float(np.sqrt(np.mean((x[live] - y[live]) ** 2))) if live.any() else 0.0
        if rms and error > INT8_BOUND * rms:
            outcome.verdict, outcome.reason = "wrong", f"output {k}: error {error / rms:.2f} of the root mean square"
            return
