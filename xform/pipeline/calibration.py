"""Ranges of activations, measured on a calibration batch by running the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import is_op
from xform.passes.integer.quantize_static import quantizable_inputs
from xform.passes.normalize.ranges import ChannelRange
from xform.patterns import norm as norms
from xform.pipeline.oracle import Inputs, Session

Run = Callable[[ir.Model, Inputs], Sequence[Any]]  # the outputs of a model, in order


def norm_results(model: ir.Model) -> list[ir.Value]:
    """What the norms of the main graph give, their biases included, where scale and bias are constant."""
    found = [norms.read(node) for node in model.graph]
    return [norm.output for norm in found if not isinstance(norm, str)]


def observe(
    model: ir.Model, batches: Iterable[Inputs], values: Sequence[ir.Value], run: Run | None = None
) -> Iterable[list[Any]]:
    """The arrays of `values` of the main graph, batch by batch.

    Args:
        model: Left as it is.
        batches: Inputs by name.
        values: Values of `model`.
        run: How to run a graph; by default ONNX Runtime with its optimizations off.
    """
    observed = clone(model)
    by_name = {v.name: v for node in observed.graph for v in node.outputs}
    kept = len(observed.graph.outputs)
    names = [value.name or "" for value in values]
    extra = [by_name[name] for name in names if not by_name[name].is_graph_output()]
    observed.graph.outputs.extend(extra)
    order = {v.name: index for index, v in enumerate(observed.graph.outputs)}
    assert len(order) == kept + len(extra)
    if run is not None:
        for batch in batches:
            arrays = run(observed, batch)
            yield [arrays[order[name]] for name in names]
        return
    with Session(observed) as session:
        for batch in batches:
            results: Mapping[str, Any] = session.run(batch)
            yield [results[name] for name in names]


def norm_ranges(model: ir.Model, batches: Iterable[Inputs], run: Run | None = None) -> dict[str, ChannelRange]:
    """Smallest and largest value per channel of what every norm gives, over all batches.

    Args:
        model: A canonical graph; the passes that take the ranges must be given the same one.
        batches: Inputs by name.
        run: See `observe`.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    return _ranges_of_channels(model, batches, norm_results(model), run)


def channel_ranges(model: ir.Model, batches: Iterable[Inputs]) -> dict[str, ChannelRange]:
    """Smallest and largest value per input channel ([K], the last axis) of what `quantize_products` may quantize.

    Args:
        model: The graph as the pass will get it.
        batches: Inputs by name.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    products = [value for value in quantizable_inputs(model) if any(is_op(n, "MatMul") for n, _ in value.uses())]
    return _ranges_of_channels(model, batches, [value for value in products if not value.is_graph_input()])


def activation_ranges(model: ir.Model, batches: Iterable[Inputs]) -> dict[str, ChannelRange]:
    """Smallest and largest value, over the whole tensor ([1]), of what `quantize_static` may quantize.

    Args:
        model: The graph as the pass will get it.
        batches: Inputs by name.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    values = quantizable_inputs(model)
    inside = [value for value in values if not value.is_graph_input()]
    given = [value.name or "" for value in values if value.is_graph_input()]
    batches = list(batches)
    ranges: dict[str, ChannelRange] = {}
    for batch, arrays in zip(batches, observe(model, batches, inside), strict=True):
        found = {name: batch[name] for name in given if name in batch}
        found.update((value.name or "", array) for value, array in zip(inside, arrays, strict=True))
        for name, array in found.items():
            if np.size(array):
                here = ChannelRange(np.asarray([np.min(array)], np.float64), np.asarray([np.max(array)], np.float64))
                _widen(ranges, name, here)
    return ranges


def _ranges_of_channels(
    model: ir.Model, batches: Iterable[Inputs], values: Sequence[ir.Value], run: Run | None = None
) -> dict[str, ChannelRange]:
    ranges: dict[str, ChannelRange] = {}
    for arrays in observe(model, batches, values, run):
        for value, array in zip(values, arrays, strict=True):
            rows = np.asarray(array, np.float64).reshape(-1, np.shape(array)[-1])
            if len(rows):
                _widen(ranges, value.name or "", ChannelRange(rows.min(axis=0), rows.max(axis=0)))
    return ranges


def _widen(ranges: dict[str, ChannelRange], name: str, here: ChannelRange) -> None:
    """Join what one batch has to what the ones before it had."""
    ranges[name] = ranges[name].joined(here) if name in ranges else here
