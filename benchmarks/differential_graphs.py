"""Random ONNX graphs by seed, with inputs to run them on.

`build(seed)` gives the same case each time. A case is a chain of motifs behind a few inputs, whose values may be read
again later; dims may be dynamic, and the feeds have several sizes of them: the usual ones, ones, none, larger ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import differential_attention  # noqa: F401  (the motifs enter themselves into the table)
import differential_elementwise  # noqa: F401
import differential_images  # noqa: F401
import differential_layers  # noqa: F401
import differential_layout  # noqa: F401
import numpy as np
import onnx
from differential_attention import mask_array
from differential_flow import draw
from differential_registry import MOTIFS
from differential_sketch import BOOL, F16, F32, F64, I32, I64, Dim, Sketch, Value, info
from onnx import helper, numpy_helper

OPSETS = tuple(range(11, 24))
FAMILIES = (
    "tokens",
    "tokens",
    "matrix",
    "heads",
    "image",
    "image",
    "signal",
    "volume",
    "vector",
    "scalar",
    "ids",
    "integers",
)
CONFIGS = ("exact", "portable", "opset", "float64", "bfloat16", "int8", "packed", "torch")
_SIZES = {"N": 2, "S": 5, "T": 4, "P": 3, "H": 6}
_OTHERS = (
    {"N": 1, "S": 1, "T": 1, "P": 1, "H": 4},
    {"N": 0, "P": 0},
    {"N": 3, "S": 7, "T": 6, "P": 0, "H": 7},
    {"S": 0, "T": 0},
)

Feed = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A graph to try.

    Attributes:
        seed, attempt: What it is made from.
        config: How it is to be optimized.
        model: The graph.
        feeds: Inputs for it, by name; the first has the usual sizes.
        motifs: What was drawn, in order.
        tokens: For `packed`: the mask input.
    """

    seed: int
    attempt: int
    config: str
    model: onnx.ModelProto
    feeds: tuple[Feed, ...]
    motifs: tuple[str, ...]
    tokens: str = ""


def build(seed: int, config: str = "exact", *, attempt: int = 0, only: str = "") -> Case:
    """The case of a seed.

    Args:
        attempt: Another one for the same seed, where the runtime refuses the first.
        only: Name of a motif that must be in it.
    """
    rng = np.random.default_rng([seed, attempt, CONFIGS.index(config)])
    dtype = {"float64": F64}.get(config, F32 if config in ("int8", "packed", "bfloat16", "torch") else _dtype(rng))
    s = Sketch(rng, int(rng.choice(OPSETS)), dtype)
    tokens = ""
    if config == "packed":
        s.opset = max(s.opset, 13)
        tokens = _encoder(s)
    else:
        if only:
            s.opset = max(s.opset, MOTIFS[only].opset)
        _chain(s, only)
    return Case(seed, attempt, config, _model(s), tuple(_feeds(s, config)), tuple(s.used), tokens)


def _dtype(rng: np.random.Generator) -> int:
    return int(rng.choice([F32, F16, F64], p=[0.74, 0.14, 0.12]))


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape)


def _start(s: Sketch, family: str) -> Value:
    dynamic = s.chance(0.55)
    n: Dim = "N" if dynamic else s.pick(1, 2, 2, 3)
    length: Dim = "S" if dynamic and s.chance(0.5) else s.pick(1, 4, 6)
    width = s.pick(4, 8, 8, 12)
    c = s.pick(2, 3, 4, 6)
    space = s.pick(4, 5, 6)
    high: Dim = "H" if dynamic and s.chance(0.15) else space
    if family == "ids":
        ids = s.input(I64, (n, length), lambda rng, shape: rng.integers(0, 10, shape), "ids")
        table = s.weight(10, width, scale=1.0)
        return s.op("Gather", table, ids, dims=(n, length, width), axis=0)
    if family == "integers":
        kind = s.pick(I32, I64)
        return s.input(kind, (n, width), lambda rng, shape: rng.integers(-9, 10, shape))
    dims: tuple[Dim, ...] = {
        "tokens": (n, length, width), "matrix": (n, width), "heads": (n, s.pick(1, 2, 4), length, s.pick(4, 8)),
        "image": (n, c, high, space), "signal": (n, c, space), "volume": (n, c, 3, 4, 4), "vector": (width,),
        "scalar": (),
    }[family]  # fmt: skip
    return s.input(s.dtype, dims, _normal)


def _chain(s: Sketch, only: str) -> None:
    families = [str(s.pick(*FAMILIES))]
    if not only and s.chance(0.25):
        families.append(str(s.pick(*FAMILIES)))
    s.live += [_start(s, family) for family in families]
    while only and not MOTIFS[only].takes(s.live[-1]):
        s.inputs.clear()
        s.live[:] = [_start(s, str(s.pick(*FAMILIES)))]
    if only:
        y = draw(s, s.live[-1], only=only)
        s.live += [y] if y is not None else []
    for _ in range(int(s.rng.integers(1, 7)) if not only else int(s.rng.integers(0, 2))):
        x = s.live[-1] if s.chance(0.75) else s.pick(*s.live)
        y = draw(s, x)
        if y is not None:
            s.live.append(y)
    ends = [s.live[-1]] + [v for v in s.live[:-1] if v.name not in s.inputs and s.chance(0.15)]
    s.outputs = list({v.name: v for v in (*ends, *s.outputs)}.values())


def _encoder(s: Sketch) -> str:
    """A transformer over padded tokens, some of them left or right out of what is read in the end."""
    n: Dim = s.pick("N", 3)
    length: Dim = s.pick("S", 6)
    ids = s.input(I64, (n, length), lambda rng, shape: rng.integers(0, 10, shape), "ids")
    mask = s.input(s.pick(I64, BOOL), (n, length), mask_array, "mask")
    width, heads, size = 8, 2, 4
    x = s.op("Gather", s.weight(10, width, scale=1.0), ids, dims=(n, length, width), axis=0)
    wide = s.unsqueeze(mask, [1, 2])
    number = s.cast(wide, F32)
    bias = s.mul(s.op("Sub", s.const(np.ones((), np.float32)), number, dims=number.dims), s.pick(-1e4, -1e9, -3.4e38))
    for _ in range(s.pick(1, 2)):
        q, k, v = (
            s.transpose(s.reshape(s.add(s.matmul(x, s.weight(width, width)), s.vector(width)),
                                  [0, 0, heads, size], (n, length, heads, size)), [0, 2, 1, 3])
            for _ in range(3)
        )  # fmt: skip
        logits = s.mul(s.matmul(q, s.transpose(k, [0, 1, 3, 2])), 0.5)
        w = s.softmax(s.either("Add", logits, bias), -1)
        y = s.reshape(s.transpose(s.matmul(w, v), [0, 2, 1, 3]), [0, 0, width], (n, length, width))
        x = s.add(x, s.matmul(y, s.weight(width, width)))
        x = draw(s, x, only=s.pick("layer_norm", "feed_forward", "linear", "gelu")) or x
        if x.dims != (n, length, width):
            break
    end = s.pick("all", "first", "mean", "slice")
    if end == "first" and x.rank == 3:
        x = s.op("Gather", x, s.const(np.asarray(0, np.int64)), dims=(n, x.last), axis=1)
    elif end == "mean" and x.rank == 3:
        x = s.reduce("ReduceMean", x, [1], 0)
    s.used.append("encoder")
    s.outputs = [x]
    return mask.name if x.dims[:2] == (n, length) else ""


def _model(s: Sketch) -> onnx.ModelProto:
    tensors = []
    for name, array in s.initializers.items():
        tensors.append(numpy_helper.from_array(array, name))
    inputs = [info(value) for value, _ in s.inputs.values()]
    graph = helper.make_graph(s.nodes, "random", inputs, [info(v) for v in s.outputs], tensors)
    imports = [helper.make_opsetid("", s.opset)]
    if s.functions:
        imports.append(helper.make_opsetid("local.test", 1))
    model = helper.make_model(graph, opset_imports=imports, functions=s.functions)
    model.ir_version = 10 if s.opset >= 21 else 8
    return model


def _feeds(s: Sketch, config: str) -> Iterator[Feed]:
    symbols = {d for value, _ in s.inputs.values() for d in value.dims if isinstance(d, str)}
    others = [o for o in _OTHERS if symbols & o.keys()] if symbols else [{}]
    order = [others[int(i)] for i in s.rng.permutation(len(others))]
    chosen = [{}, *order[:2], {}] if symbols else [{}, {}, {}]
    styles = s.rng.choice(["plain", "plain", "large", "small", "negative", "zeros", "rows"], len(chosen))
    odd = "nonfinite" if s.chance(0.04) else ""
    for number, (change, style) in enumerate(zip(chosen, styles, strict=True)):
        sizes = {**_SIZES, **change}
        feed = {}
        for name, (value, fill) in s.inputs.items():
            if name in s.defaults and number % 2 == 0:
                continue
            shape = tuple(sizes[d] if isinstance(d, str) else int(d or 0) for d in value.dims)
            array = np.asarray(fill(s.rng, shape))
            if fill is not mask_array and value.is_float:
                array = _styled(s.rng, array, "plain" if number == 0 else odd or str(style))
            feed[name] = array.astype(helper.tensor_dtype_to_np_dtype(value.dtype)).reshape(shape)
        yield feed


def _styled(rng: np.random.Generator, array: Any, style: str) -> Any:
    if style == "large":
        return array * 30
    if style == "small":
        return array * 1e-3
    if style == "negative":
        return -np.abs(array) * 3
    if style == "zeros":
        return array * (rng.random(array.shape) < 0.5)
    if style == "rows" and array.ndim:
        return array * 10.0 ** rng.integers(-3, 3, (*array.shape[:-1], 1))
    if style == "nonfinite":
        return np.where(rng.random(array.shape) < 0.05, rng.choice([np.nan, np.inf, -np.inf]), array)
    return array


def operators(model: onnx.ModelProto) -> Counter[str]:
    """Operators of the standard domain in a model, bodies and functions included."""
    found: Counter[str] = Counter()
    waiting = [list(model.graph.node), *[list(f.node) for f in model.functions]]
    while waiting:
        for node in waiting.pop():
            if node.domain in ("", "ai.onnx"):
                found[node.op_type] += 1
            waiting += [list(a.g.node) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found
