"""Ranges of activations, measured on a calibration batch by running the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import constant, is_op
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
        values: Values of `model`, of any kind: inputs, constants, results of nodes, outputs.
        run: How to run a graph; by default ONNX Runtime with its optimizations off.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    observed = clone(model)
    twins = counterparts(model, observed)
    shown = [twins[value] for value in values if value.producer() is not None]
    extra = [value for value in dict.fromkeys(shown) if not value.is_graph_output()]
    observed.graph.outputs.extend(extra)
    places = {value: index for index, value in enumerate(observed.graph.outputs)}
    for index, value in enumerate(extra):
        value.name = value.name or f"observed_{index}"

    def found(batch: Inputs, arrays: Sequence[Any]) -> list[Any]:
        return [
            arrays[places[twins[value]]] if value.producer() is not None else _given(value, batch) for value in values
        ]

    if run is not None:
        for batch in batches:
            yield found(batch, run(observed, batch))
        return
    with Session(observed) as session:
        for batch in batches:
            results = session.run(batch)
            yield found(batch, [results[value.name or ""] for value in observed.graph.outputs])


def counterparts(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    """What each result of a node of the main graph is in a clone: by its place, as names may be missing or taken."""
    pairs = zip(model.graph, copy.graph, strict=True)
    return {v: twin for node, other in pairs for v, twin in zip(node.outputs, other.outputs, strict=True)}


def _given(value: ir.Value, batch: Inputs) -> Any:
    """The array of a value that no node makes: an input, or a constant, which is the default of an input as well."""
    given = batch.get(value.name or "") if value.is_graph_input() else None
    return constant(value) if given is None else given


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
    return _ranges_of_channels(model, batches, products)


def activation_ranges(model: ir.Model, batches: Iterable[Inputs]) -> dict[str, ChannelRange]:
    """Smallest and largest value, over the whole tensor ([1]), of what `quantize_static` may quantize.

    Args:
        model: The graph as the pass will get it.
        batches: Inputs by name.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    values = quantizable_inputs(model)
    ranges: dict[str, ChannelRange] = {}
    for arrays in observe(model, batches, values):
        for value, array in zip(values, arrays, strict=True):
            if np.size(array):
                here = ChannelRange(np.asarray([np.min(array)], np.float64), np.asarray([np.max(array)], np.float64))
                _widen(ranges, value.name or "", here)
    return ranges


def _ranges_of_channels(
    model: ir.Model, batches: Iterable[Inputs], values: Sequence[ir.Value], run: Run | None = None
) -> dict[str, ChannelRange]:
    ranges: dict[str, ChannelRange] = {}
    for arrays in observe(model, batches, values, run):
        for value, array in zip(values, arrays, strict=True):
            if np.size(array):
                rows = np.asarray(array, np.float64).reshape(-1, np.shape(array)[-1])
                _widen(ranges, value.name or "", ChannelRange(rows.min(axis=0), rows.max(axis=0)))
    return ranges


def _widen(ranges: dict[str, ChannelRange], name: str, here: ChannelRange) -> None:
    """Join what one batch has to what the ones before it had."""
    ranges[name] = ranges[name].joined(here) if name in ranges else here
