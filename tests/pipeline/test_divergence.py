"""The first value that differs between two graphs, in order of computation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from xform.graph.clone import clone
from xform.pipeline import divergence
from xform.pipeline.divergence import first_divergence
from xform.pipeline.oracle import CouldNotRunError

X = {"x": np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)}


def with_weight(model: ir.Model, name: str) -> ir.Model:
    copy = clone(model)
    value = copy.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.5), name=name)
    return copy


def test_equal_graphs(planted):
    model = planted.chain()
    assert first_divergence(model, clone(model), X) is None


@pytest.mark.parametrize("room", [1 << 30, 1])
def test_first_of_several(planted, monkeypatch, room):
    monkeypatch.setattr(divergence, "_MAX_EXPOSED_BYTES", room)
    model = planted.chain()
    found = first_divergence(model, with_weight(with_weight(model, "w4"), "b2"), X)
    assert (found.value, found.node, found.operator) == ("block2/add_out", "block2/add", "Add")
    assert found.compared == 8  # two whole blocks, and the product before the sum
    assert found.max_rel_error > 1e-2 and "elements differ" in found.reason


def test_only_shared_names_are_compared(planted):
    model = planted.chain()
    other = with_weight(model, "w0")
    for node in other.graph:
        for output in node.outputs:
            if output.name != "block3/tanh_out":
                output.name += "_renamed"
    found = first_divergence(model, other, X)
    assert (found.value, found.compared) == ("block3/tanh_out", 1)


def test_graphs_are_left_as_they_are(planted):
    model = planted.chain()
    first_divergence(model, clone(model), X)
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_graph_that_does_not_run(planted):
    model = planted.chain()
    other = clone(model)
    other.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(CouldNotRunError, match="NoSuchOperator"):
        first_divergence(model, other, X)
