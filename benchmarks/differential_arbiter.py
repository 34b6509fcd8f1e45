"""What may explain that two runs of a random graph differ: rounding, or a place where ONNX defines nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from differential_compare import TOLERANCES, Difference, Feed, Outputs, differences, nodes_of, retyped, session, spread
from differential_graphs import Case
from differential_sketch import F16, F32, F64
from onnx import TensorProto

INTEGERS = tuple(getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64))


def undefined(case: Case) -> bool:
    """Whether two runtimes may make different integers of a NaN, as casts of floats and quantizing may."""
    inferred = onnx.shape_inference.infer_shapes(case.model).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
    known.update((tensor.name, tensor.data_type) for tensor in inferred.initializer)

    def makes_integers(node: onnx.NodeProto) -> bool:
        if node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear"):
            return True
        to_integer = node.op_type == "Cast" and any(a.name == "to" and a.i in INTEGERS for a in node.attribute)
        return to_integer and known.get(node.input[0], F32) not in (*INTEGERS, TensorProto.BOOL)

    return any(map(makes_integers, nodes_of(case.model)))


def finite(feed: Feed) -> bool:
    return all(np.isfinite(v).all() for v in feed.values() if v.dtype.kind == "f")


def arbitrated(
    case: Case, i: int, want: Outputs, got: Outputs, compare: Callable[..., list[Difference]], rounding: str
) -> list[Difference]:
    """What is left of the differences when rounding has had its say."""
    moved = spread(case.model, case.feeds[i], want, rounding)
    found = compare(spread=moved)
    if found and moved is not None and any(np.asarray(x).dtype == np.float16 for x in want):
        found = _nearer(case, i, want, got, found)
    elif found and case.config == "torch":  # two runtimes round differently everywhere, not in a rewritten place only
        found = _nearer(case, i, want, got, found, F32, F64)
    return _defined(case, i, want, got, found) if found and case.config == "torch" else found


def _defined(case: Case, i: int, want: Outputs, got: Outputs, found: list[Difference]) -> list[Difference]:
    """What is left where two runtimes differ: what is not as ONNX defines it, by its reference evaluator, either.

    ONNX Runtime keeps a reduced axis of an empty tensor where the axis is negative, and finds no maximum beside a NaN.
    """
    if finite(case.feeds[i]) and all(v.size for v in case.feeds[i].values()):
        return found
    from onnx.reference import ReferenceEvaluator

    try:
        with np.errstate(all="ignore"):
            defined = ReferenceEvaluator(case.model).run(None, dict(case.feeds[i]))
    except Exception:  # it does not evaluate this graph: only the ranks that the graph declares are known
        ranks = [len(output.type.tensor_type.shape.dim) for output in case.model.graph.output]
        return [
            d
            for d in found
            if np.ndim(got[d.output]) != ranks[d.output] or np.ndim(want[d.output]) == np.ndim(got[d.output])
        ]
    wrong = {one.output for one in differences(defined, got)}
    return [one for one in found if one.output in wrong]


def _nearer(
    case: Case, i: int, want: Outputs, got: Outputs, found: list[Difference], narrow: int = F16, wide: int = F32
) -> list[Difference]:
    """What differs, but is as near to the same graph in a wider type as the original is, is no mistake.

    In float16 each number is held against the original's own; in float32, where another runtime rounds in other places,
    against the original's largest error.
    """
    kinds = {F16: np.float16, F32: np.float32, F64: np.float64}
    feed = {k: v.astype(kinds[wide]) if v.dtype == kinds[narrow] else v for k, v in case.feeds[i].items()}
    truth = _evaluated(retyped(case.model, narrow, wide), feed)
    if truth is None:
        return found
    left = []
    for one in found:
        t, a, b = (np.asarray(x[one.output]).astype(np.float64) for x in (truth, want, got))
        if t.shape != a.shape or t.shape != b.shape:
            left.append(one)
            continue
        scale = np.nanmedian(np.abs(t)) if t.size else 0.0
        with np.errstate(invalid="ignore"):
            own = np.abs(a - t)
            if narrow == F32:
                own, slack = np.max(own, initial=0.0, where=np.isfinite(own)), TOLERANCES["float32"][0]
            else:
                slack = 2e-2
            allowed = 4 * own + slack * np.maximum(np.abs(t), scale)
            off = np.abs(b - t) > np.where(np.isfinite(allowed), allowed, np.inf)
        if (off & np.isfinite(t) & np.isfinite(b)).any() or (np.isfinite(a) & np.isfinite(t) & ~np.isfinite(b)).any():
            left.append(one)
    return left


def _evaluated(model: onnx.ModelProto, feed: Feed) -> Outputs | None:
    """By ONNX Runtime, or by the reference evaluator where that has no kernel for a type; None where neither can."""
    from onnx.reference import ReferenceEvaluator

    for run in (lambda: session(model).run(None, feed), lambda: ReferenceEvaluator(model).run(None, dict(feed))):
        try:
            return list(run())
        except Exception:  # the next one may; where none does, the differences stand
            continue
    return None


def runtime_differs(case: Case, i: int, want: Outputs) -> bool:
    """Whether the runtime's own optimizations change the original just as well."""
    try:
        got = session(case.model, optimized=True).run(None, case.feeds[i])
    except Exception:  # the runtime's optimizations break the original: nothing is asked of the result
        return True
    return bool(differences(want, got, spread(case.model, case.feeds[i], want)))
