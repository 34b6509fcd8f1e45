"""Two sets of outputs compared number by number, and how far apart rounding alone may bring them.

A number may differ from the reference by a small part of itself or, where it is small beside its neighbours, of their
typical size. Where it differs by more, the reference itself is the arbiter: the original graph is run again with every
weight, input and intermediate value moved by about a rounding error, and by a few of them. What moves a number of the
original that far may move it in the result too (a comparison at its threshold, a difference of nearly equal numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from differential_sketch import BF16, F16, F32, F64
from onnx import AttributeProto, helper, numpy_helper

# dtype: (relative tolerance, size of a nudge)
TOLERANCES = {"float64": (1e-10, 1e-15), "float32": (4e-5, 3e-7), "float16": (8e-3, 1.5e-3), "bfloat16": (3e-2, 8e-3)}
ARBITER = 24.0  # times what a nudge of one rounding error does
NUDGES = (1.0, 8.0)  # times a rounding error: what lies a few of them off a threshold is crossed by the large one alone
NUDGED_RUNS = 24
_BOUNDED = ("Div", "Reciprocal", "Sigmoid", "Tanh", "Erf", "Softmax", "HardSigmoid")
_TIMES_BOUNDED = ("Div", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Swish", "Mish")  # a bounded part times input 0

_state = ort.capi.onnxruntime_pybind11_state
_NO_KERNEL = (_state.NotImplemented, _state.InvalidGraph, _state.Fail, _state.InvalidArgument)

Outputs = list[Any]
Feed = Mapping[str, Any]


def session(model: onnx.ModelProto | bytes, *, optimized: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session on one thread, by default without the runtime's graph optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Difference:
    """One output that differs.

    Attributes:
        output: Its position.
        what: In words.
        error: Largest difference relative to the allowed one.
    """

    output: int
    what: str
    error: float


def differences(
    want: Outputs,
    got: Outputs,
    spread: Sequence[Any] | None = None,
    keep: Any = None,
    *,
    lenient: bool = False,
    loose: bool = False,
    factor: float = 1.0,
) -> list[Difference]:
    """Outputs that differ by more than rounding.

    Args:
        factor: Times what rounding alone may do; for kernels that are not ours.
        spread: Per output, how far nudging moves each number of the reference.
        keep: A mask over the leading axes of what is compared; None for all.
        lenient: Whether a NaN of the reference may be anything in the result (documented for masked attention).
        loose: Whether an infinity and a NaN are the same (for infinite inputs: sums of products in another order).
    """
    found = []
    for i, (x, y) in enumerate(zip(want, got, strict=True)):
        x, y = np.asarray(x), np.asarray(y)
        if x.shape != y.shape or x.dtype != y.dtype:
            found.append(Difference(i, f"{x.dtype}{list(x.shape)} became {y.dtype}{list(y.shape)}", np.inf))
            continue
        moved = None if spread is None else np.asarray(spread[i])
        if keep is not None and x.shape[: keep.ndim] == keep.shape:
            x, y = x[keep], y[keep]
            moved = None if moved is None else moved[keep]
        wrong = _numbers(x, y, moved, lenient, loose, factor)
        if wrong is not None:
            found.append(Difference(i, *wrong))
    return found


def _numbers(x: Any, y: Any, spread: Any, lenient: bool, loose: bool, factor: float) -> tuple[str, float] | None:
    if not x.size:
        return None
    if x.dtype.kind in "biuSUO":
        apart = x != y
        if spread is not None and x.dtype.kind in "biu":  # nudging has to reach as far as the result went
            apart = apart & (np.abs(x.astype(np.float64) - y.astype(np.float64)) > spread)
        return (f"{int(apart.sum())} of {x.size} values differ", np.inf) if apart.any() else None
    tolerance = TOLERANCES[str(x.dtype)][0]
    a, b = x.astype(np.float64), y.astype(np.float64)
    live = np.ones(a.shape, bool)
    if spread is not None:
        live &= np.isfinite(spread)  # where nudging makes or unmakes an infinity, anything may come out
    if lenient:
        live &= ~np.isnan(a)
    finite = np.isfinite(a)
    odd = live & (finite != np.isfinite(b))
    if not loose:
        odd |= live & ~finite & (np.isnan(a) != np.isnan(b)) | live & np.isinf(a) & (a != b)
    if odd.any():
        return f"{int(odd.sum())} of {x.size} are finite on one side only", np.inf
    live &= finite
    if not live.any():
        return None
    sizes = np.abs(a[live])
    scale = max(float(np.median(sizes)), 1e-3 * float(sizes.max()))
    allowed = tolerance * np.maximum(sizes, scale) + float(np.finfo(np.float64).tiny)
    if spread is not None:
        allowed = allowed + ARBITER * spread[live]
    allowed = factor * allowed
    error = np.abs(a[live] - b[live])
    bad = error > allowed
    if not bad.any():
        return None
    worst = int(np.argmax(error / allowed))
    text = f"{int(bad.sum())} of {x.size} differ, {a[live][worst]:.7g} became {b[live][worst]:.7g}"
    return text, float((error / allowed)[worst])


def spread(model: onnx.ModelProto, feed: Feed, want: Outputs, rounding: str = "") -> list[Any] | None:
    """How far nudging by one rounding error moves each number; None where nudged graphs do not run.

    What larger nudges do to floats is divided by their size, so that only what jumps comes out larger for them. float16
    and bfloat16 are nudged by one rounding error alone: more of them are no rounding any more.

    Args:
        rounding: The dtype whose rounding errors to nudge by, where it is not that of each value.
    """
    moved: list[Any] = [np.zeros(np.asarray(x).shape) for x in want]
    narrow = {rounding, *(str(np.asarray(x).dtype) for x in (*want, *feed.values()))} & {"float16", "bfloat16"}
    sizes = NUDGES[:1] if narrow else NUDGES
    ran = False
    for seed, size in ((seed, size) for size in sizes for seed in range(NUDGED_RUNS)):
        rng = np.random.default_rng(seed)
        try:
            moved_feed = {k: _nudge(v, rng, rounding, size) for k, v in feed.items()}
            outputs = session(nudged(model, rng, rounding, size)).run(None, moved_feed)
        except _NO_KERNEL:  # for one of the products that nudge; the others may do
            continue
        ran = True
        for i, (x, y) in enumerate(zip(want, outputs, strict=True)):
            x, y = np.asarray(x), np.asarray(y)
            if x.shape != y.shape:
                moved[i] = np.full(x.shape, np.inf)
            elif x.dtype.kind in "fV":
                a, b = x.astype(np.float64), y.astype(np.float64)
                apart = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), np.inf)
                same = (a == b) | (np.isnan(a) & np.isnan(b))
                moved[i] = np.maximum(moved[i], np.where(same, 0.0, apart) / size)
            elif x.dtype.kind in "biu":
                moved[i] = np.maximum(moved[i], np.abs(x.astype(np.float64) - y.astype(np.float64)))
    return moved if ran else None


def _step(dtype: Any, rounding: str) -> float:
    return TOLERANCES[rounding or str(np.dtype(dtype))][1]


def _nudge(array: Any, rng: np.random.Generator, rounding: str, size: float) -> Any:
    array = np.asarray(array)
    if str(array.dtype) not in TOLERANCES:
        return array
    step = size * _step(array.dtype, rounding) * rng.uniform(-1, 1, array.shape)
    with np.errstate(all="ignore"):
        return np.asarray((array.astype(np.float64) * (1 + step)).astype(array.dtype))


def nudged(model: onnx.ModelProto, rng: np.random.Generator, rounding: str = "", size: float = 1.0) -> onnx.ModelProto:
    """The model with every number of its weights and float values multiplied by nearly one.

    Quotients and bounded functions, and numbers times a bounded function, are moved by a part of their largest value
    too: runtimes compute these functions, which quotients may be spellings of, to an absolute error. Exponentials are
    moved by about the smallest number, since some kernels round it to zero. Exponents stay as they are: a negative
    number to nearly the first power is none.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    exponents = {node.input[1] for node in nodes_of(model) if node.op_type == "Pow"}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.size and tensor.name not in exponents:
            tensor.CopyFrom(numpy_helper.from_array(_nudge(array, rng, rounding, size), tensor.name))
    types = _float_values(model)
    nodes = list(graph.node)
    kept = {o.name for o in graph.output} | _captured(nodes)  # what others know by its name
    del graph.node[:]
    renamed: dict[str, str] = {}
    for node in nodes:
        node.input[:] = [renamed.get(n, n) for n in node.input]
        place = len(graph.node)
        graph.node.append(node)
        for name in node.output if all(a.type != AttributeProto.GRAPH for a in node.attribute) else ():
            if types.get(name) is not None and name not in exponents:
                step = size * _step(helper.tensor_dtype_to_np_dtype(types[name]), rounding)
                made = _moved(graph, place, name, types[name], rng, step, final=name in kept)
                if made != name:
                    renamed[name] = made
    return out


def _moved(graph: Any, place: int, name: str, dtype: int, rng: np.random.Generator, step: float, *, final: bool) -> str:
    """Nodes that move a value; its new name, which is the old one for an output of the graph."""
    node = graph.node[place]
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    source, target = name, f"nudged:{name}"
    if final:
        source, target = f"plain:{name}", name
        node.output[:] = [source if n == name else n for n in node.output]

    def number(label: str, value: float, of: int = dtype) -> str:
        array = np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(of))
        graph.initializer.append(numpy_helper.from_array(array, f"{label}:{name}"))
        return f"{label}:{name}"

    def put(kind: str, inputs: list[str], label: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, inputs, [label], **attributes))
        return label

    # each number by its own: a norm does not see a factor that all have (no kernel of RandomUniformLike from opset 22)
    noise = put("Cast", [source], f"float:{name}", to=F32)
    noise = put("Clip", [noise, number("least", -1e3, F32), number("most", 1e3, F32)], f"finite:{name}")
    noise = put("Mul", [noise, number("hash", rng.uniform(1e6, 2e6), F32)], f"angle:{name}")
    noise = put("Cast", [put("Sin", [noise], f"noise:{name}")], f"cast:{name}", to=dtype)
    noise = put("Mul", [noise, number("step", step)], f"part:{name}")
    factor = put("Add", [noise, number("one", 1.0)], f"factor:{name}")
    if node.op_type not in (*_BOUNDED, *_TIMES_BOUNDED, "Exp"):
        return put("Mul", [source, factor], target)
    near = put("Mul", [source, factor], f"near:{name}")
    least = 8 * float(np.finfo(kind).smallest_subnormal if kind == np.float16 else np.finfo(kind).tiny)
    shift = number("shift", (least if node.op_type == "Exp" else step / 4) * rng.uniform(-1, 1))
    if node.op_type in _TIMES_BOUNDED:
        shift = put("Mul", [node.input[0], shift], f"shift of:{name}")
    return put("Add", [near, shift], target)


def _captured(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                names |= {n for inner in attribute.g.node for n in inner.input} | _captured(attribute.g.node)
                names |= {v.name for v in attribute.g.output}
    return names


def _float_values(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model)
    found = {}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in (F16, F32, F64):
            found[value.name] = kind
    return found


def retyped(model: onnx.ModelProto, source: int, target: int) -> onnx.ModelProto:
    """The model with one float type in place of another, everywhere."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for tensor in _tensors(out):
        if tensor.data_type == source:
            tensor.CopyFrom(_converted(tensor, target))
    for kind in _types(out):
        if kind.elem_type == source:
            kind.elem_type = target
    for node in nodes_of(out):
        for attribute in node.attribute:
            to_type = (node.op_type, attribute.name) in {
                ("Cast", "to"),
                ("EyeLike", "dtype"),
                ("Attention", "softmax_precision"),
            }
            if to_type and attribute.i == source:
                attribute.i = target
    return out


def _converted(tensor: onnx.TensorProto, target: int) -> onnx.TensorProto:
    array = numpy_helper.to_array(tensor)
    kind = ml_dtypes.bfloat16 if target == BF16 else helper.tensor_dtype_to_np_dtype(target)
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(array.astype(kind), tensor.name)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of branches, loops and functions too."""
    for graph in _graphs(model):
        yield from graph.node
    waiting: list[Any] = [node for function in model.functions for node in function.node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [n for a in node.attribute if a.type == AttributeProto.GRAPH for n in a.g.node]


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model):
        yield from graph.initializer
    for node in nodes_of(model):
        yield from (a.t for a in node.attribute if a.type == AttributeProto.TENSOR)


def _types(model: onnx.ModelProto) -> Iterator[Any]:
    for graph in _graphs(model):
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.type.tensor_type


Run = Callable[[Feed], Outputs]
