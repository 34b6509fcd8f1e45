"""Motifs that hold other motifs: branches, loops, scans, functions of the model, residuals, and how one is drawn."""

from __future__ import annotations

import numpy as np
import onnx
from differential_registry import MOTIFS, any_float, axes_float, motif
from differential_sketch import BOOL, F32, I64, Sketch, Value, info
from onnx import helper

_TRIES = 12


def draw(s: Sketch, x: Value, *, flow: bool = True, only: str = "") -> Value | None:
    """Draw one motif behind x; None where none of a few fits.

    Args:
        flow: Whether it may hold other motifs.
        only: Name of the motif to draw.
    """
    fits = [
        m
        for m in MOTIFS.values()
        if m.takes(x) and s.opset >= m.opset and (flow or not m.flow) and (not m.dtypes or s.dtype in m.dtypes)
    ]
    if only:
        fits = [m for m in fits if m.name == only]
    weights = np.array([m.weight for m in fits])
    for _ in range(_TRIES if fits else 0):
        chosen = fits[int(s.rng.choice(len(fits), p=weights / weights.sum()))]
        y = chosen.draw(s, x)
        if y is not None:
            s.used.append(chosen.name)
            return y
    return None


def _body(s: Sketch, x: Value, kind: str, steps: int = 1) -> tuple[list[onnx.NodeProto], Value]:
    """Nodes that compute something of x in a scope of their own."""
    live = list(s.live)
    with s.inside(kind) as nodes:
        y = x
        for _ in range(steps):
            y = draw(s, y, flow=False) or y
        y = s.op("Identity", y, dims=y.dims)
    s.live[:] = live
    return nodes, y


def _condition(s: Sketch, x: Value) -> Value:
    form = s.pick("data", "input", "shape", "constant")
    if form == "input":
        return s.input(BOOL, (), lambda rng, shape: np.asarray(rng.random() < 0.5), "flag")
    if form == "constant":
        return s.const(np.asarray(s.chance(0.5)))
    if form == "shape" and x.rank:
        shape = s.op("Shape", x, dims=(x.rank,), dtype=I64)
        first = s.op("Gather", shape, s.const(np.asarray(0, np.int64)), dims=(), dtype=I64, axis=0)
        return s.op("Less", first, s.const(np.asarray(2, np.int64)), dims=(), dtype=BOOL)
    total = s.reduce("ReduceSum", x, None, 0)
    return s.op("Greater", total, s.const(np.zeros((), _kind(total))), dims=(), dtype=BOOL)


def _kind(x: Value) -> np.dtype:
    return np.dtype(helper.tensor_dtype_to_np_dtype(x.dtype))


@motif(any_float, weight=1.2, flow=True)
def branch(s: Sketch, x: Value) -> Value | None:
    """An If whose branches read values from outside."""
    condition = _condition(s, x)
    branches = []
    for _ in range(2):
        nodes, y = _body(s, x, "branch", s.pick(1, 2))
        if y.rank != x.rank or y.dtype != x.dtype:
            with s.inside("branch") as nodes:
                y = s.op(s.pick("Identity", "Relu", "Neg"), x, dims=x.dims)
        branches.append((nodes, y))
    (yes, a), (no, b) = branches
    dims = [p if p == q else None for p, q in zip(a.dims, b.dims, strict=True)]
    graphs = {
        "then_branch": helper.make_graph(yes, s.fresh("then"), [], [info(a)]),
        "else_branch": helper.make_graph(no, s.fresh("else"), [], [info(b)]),
    }
    return s.op("If", condition, dims=dims, dtype=x.dtype, **graphs)


@motif(any_float, weight=0.7, flow=True)
def loop(s: Sketch, x: Value) -> Value | None:
    """A Loop of a few rounds over a state, with a stacked output now and then."""
    state = Value(s.fresh("state"), x.dtype, x.dims)
    number, going = Value(s.fresh("round"), I64, ()), Value(s.fresh("going"), BOOL, ())
    nodes, y = _body(s, state, "branch")
    if y.dims != x.dims or y.dtype != x.dtype:
        with s.inside("branch") as nodes:
            y = s.add(s.op("Tanh", state, dims=state.dims), x)
    with s.inside("branch") as more:
        still = s.op("Identity", going, dims=(), dtype=BOOL)
        stacked = s.op("Identity", state, dims=state.dims)
    outputs = [still, y] + ([stacked] if s.chance(0.3) else [])
    body = helper.make_graph(nodes + more, s.fresh("body"), [info(v) for v in (number, going, state)], [
        info(v) for v in outputs
    ])  # fmt: skip
    rounds = s.const(np.asarray(s.pick(0, 1, 2, 3), np.int64))
    start = s.const(np.asarray(True))
    shapes = [x.dims, (None, *x.dims)][: len(outputs) - 1]
    return s.ops("Loop", [rounds, start, x], shapes, [x.dtype] * len(shapes), body=body)[-1 if s.chance(0.5) else 0]


@motif(lambda x: axes_float(x) and isinstance(x.dims[0], int) and x.dims[0] >= 1, weight=0.5, flow=True)
def scan(s: Sketch, x: Value) -> Value | None:
    """A Scan over the first axis with a running sum."""
    row = Value(s.fresh("row"), x.dtype, x.dims[1:])
    state = Value(s.fresh("state"), x.dtype, x.dims[1:])
    with s.inside("branch") as nodes:
        total = s.op("Add", state, row)
        out = s.op("Tanh", total, dims=total.dims)
    body = helper.make_graph(nodes, s.fresh("scan"), [info(state), info(row)], [info(total), info(out)])
    zeros = s.reduce("ReduceSum", s.op("Sub", x, x), [0], 0)
    return s.ops("Scan", [zeros, x], [x.dims[1:], x.dims], [None, None], body=body, num_scan_inputs=1)[1]


@motif(any_float, weight=1.2, flow=True)
def function(s: Sketch, x: Value) -> Value | None:
    """A function of the model, called once or twice."""
    argument = Value(s.fresh("arg"), x.dtype, x.dims)
    before = len(s.functions)
    known = set(s.inputs)
    nodes, y = _body(s, argument, "function", s.pick(1, 2))
    if len(s.functions) != before or set(s.inputs) != known:
        return None
    made = {name for node in nodes for name in node.output} | {argument.name}
    free = dict.fromkeys(n for node in nodes for n in node.input if n and n not in made)
    if any(a.type in (onnx.AttributeProto.GRAPH,) for node in nodes for a in node.attribute):
        return None
    name = s.pick("Block", "Relu", f"F{s.counter}")
    if any(f.name == name for f in s.functions):
        name = f"F{s.counter}"
    imports = [helper.make_opsetid("", s.opset)]
    s.functions.append(helper.make_function("local.test", name, [argument.name, *free], [y.name], nodes, imports))
    captured = [Value(n, F32, ()) for n in free]
    z = s.op(name, x, *captured, dims=y.dims, dtype=y.dtype, domain="local.test")
    if s.chance(0.3) and y.dims == x.dims and y.dtype == x.dtype:
        z = s.op(name, z, *captured, dims=y.dims, dtype=y.dtype, domain="local.test")
    return z


@motif(any_float, weight=1.5, flow=True)
def residual(s: Sketch, x: Value) -> Value | None:
    """x + f(x)."""
    y = draw(s, x, flow=False)
    if y is None or y.dims != x.dims or y.dtype != x.dtype:
        return y
    return s.add(x, y)
