"""A failing graph made smaller: cut off behind the first value that fails, then values in front turned into inputs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
from differential_compare import session
from differential_graphs import Case
from onnx import AttributeProto

Fails = Callable[[Case], bool]


def minimized(case: Case, fails: Fails) -> Case:
    """The smallest case found that still fails in the same way.

    Args:
        fails: Whether a case does; cases that do not even run do not.
    """
    case = _shorter(case, fails)
    while True:
        smaller = _with_fewer_nodes(case, fails)
        if smaller is None:
            return _with_fewer_feeds(case, fails)
        case = smaller


def _shorter(case: Case, fails: Fails) -> Case:
    """Only one output, as early as possible."""
    values = _typed(case.model)
    for name in [*_made(case.model), *[o.name for o in case.model.graph.output]]:
        if name in values:
            tried = _pruned(case, [values[name]])
            if fails(tried):
                return tried
    return case


def _with_fewer_nodes(case: Case, fails: Fails) -> Case | None:
    values, outputs = _typed(case.model), {o.name for o in case.model.graph.output}
    names = [n for n in _made(case.model) if n in values and n not in outputs]
    for name in reversed(names):
        tried = _cut(case, values[name])
        if tried is not None and len(tried.model.graph.node) < len(case.model.graph.node) and fails(tried):
            return tried
    return None


def _with_fewer_feeds(case: Case, fails: Fails) -> Case:
    for feed in case.feeds:
        tried = replace(case, feeds=(feed,))
        if fails(tried):
            return tried
    return case


def _made(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in node.output if name]


def _typed(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {v.name: v for v in (*graph.value_info, *graph.output) if v.type.tensor_type.elem_type}


def _cut(case: Case, value: onnx.ValueInfoProto) -> Case | None:
    """The value as an input, with the numbers that the original gives it."""
    probe = _copy(case.model)
    del probe.graph.output[:]
    probe.graph.output.append(value)
    feeds = []
    for feed in case.feeds:
        try:
            array = session(probe).run(None, feed)[0]
        except Exception:  # a feed that the original does not take is left out
            continue
        feeds.append({**feed, value.name: array})
    if not feeds:
        return None
    model = _copy(case.model)
    for node in model.graph.node:
        node.output[:] = [f"{n}_old" if n == value.name else n for n in node.output]
    model.graph.input.append(value)
    return _pruned(replace(case, model=model, feeds=tuple(feeds)), list(model.graph.output))


def _pruned(case: Case, outputs: list[onnx.ValueInfoProto]) -> Case:
    """The case with these outputs and what they need."""
    model = _copy(case.model)
    graph = model.graph
    wanted = {o.name for o in outputs}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= _read(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    inputs = [v for v in graph.input if v.name in wanted]
    initializers = [t for t in graph.initializer if t.name in wanted]
    for field, entries in ((graph.input, inputs), (graph.initializer, initializers), (graph.output, outputs)):
        copies = [type(e).FromString(e.SerializeToString()) for e in entries]
        del field[:]
        field.extend(copies)
    used = {(n.domain, n.op_type) for n in graph.node}
    functions = [f for f in model.functions if (f.domain, f.name) in used]
    del model.functions[:]
    model.functions.extend(functions)
    names = {v.name for v in inputs}
    return replace(case, model=model, feeds=tuple({k: v for k, v in f.items() if k in names} for f in case.feeds))


def _read(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            names |= {o.name for o in attribute.g.output}
            for inner in attribute.g.node:
                names |= _read(inner)
    return names


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    return out


def script(case: Case, options: dict[str, Any]) -> str:
    """A Python program that shows the failure by itself."""
    feeds = [{k: (v.ravel().tolist(), v.shape, str(v.dtype)) for k, v in feed.items()} for feed in case.feeds]
    graph = textwrap.indent(onnx.printer.to_text(case.model), "# ")
    return f"""{graph}
import numpy as np, onnx, onnxruntime as ort, xform

nan, inf = float("nan"), float("inf")
ort.set_default_logger_severity(4)
off = ort.SessionOptions()
off.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
data = {case.model.SerializeToString()!r}
feeds = {feeds!r}
feeds = [{{k: np.array(v, t).reshape(s) for k, (v, s, t) in feed.items()}} for feed in feeds]
result = xform.optimize(data, verify="off"{"".join(f", {k}={v!r}" for k, v in options.items())})
print("applied:", [(r.pass_name, r.rule) for r in result.report.remarks if r.verdict == "applied"])
print("rolled back:", [(r.pass_name, r.reason) for r in result.report.remarks if r.verdict == "rolled_back"])
for feed in feeds:
    for one in (data, result.artifact.to_bytes()):
        print(ort.InferenceSession(one, off).run(None, feed))
"""
