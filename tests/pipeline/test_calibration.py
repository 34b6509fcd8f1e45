"""What calibration sees of a graph: every kind of value, found by what it is and not by its name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support import parse

from xform.pipeline.calibration import activation_ranges, channel_ranges, observe
from xform.pipeline.channel_factors import sampled_products
from xform.pipeline.rounding import compensated_weights

RNG = np.random.default_rng(11)
TEXT = """g (float[n,96] x, float[96,96] w, float[5,96] table) => (float[n,96] y, float[5,96] z) {
    a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) z = MatMul(table, w) }"""
ARRAYS = {
    "w": RNG.normal(size=(96, 96)).astype(np.float32),
    "table": RNG.normal(size=(5, 96)).astype(np.float32),
}
X = RNG.normal(size=(4, 96)).astype(np.float32)


def graph() -> ir.Model:
    return parse(TEXT, ARRAYS)


def test_inputs_constants_results_and_outputs_are_observed():
    model = graph()
    table, x = model.graph.initializers["table"], model.graph.inputs[0]
    y, r = model.graph.outputs[0], model.graph[1].outputs[0]
    ((constant, given, output, inner, again),) = observe(model, [{"x": X}], [table, x, y, r, r])
    np.testing.assert_array_equal(constant, ARRAYS["table"])
    np.testing.assert_array_equal(given, X)
    expected = np.maximum(X @ ARRAYS["w"], 0)
    np.testing.assert_allclose(inner, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(output, expected @ ARRAYS["w"], rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(inner, again)


def test_values_without_a_name_are_observed():
    model = graph()
    model.graph[1].outputs[0].name = None
    ((inner,),) = observe(model, [{"x": X}], [model.graph[1].outputs[0]])
    np.testing.assert_allclose(inner, np.maximum(X @ ARRAYS["w"], 0), rtol=1e-4, atol=1e-4)
    assert model.graph[1].outputs[0].name is None, "the graph is left as it is"


def test_a_constant_that_a_product_reads_has_a_range():
    ranges = activation_ranges(graph(), [{"x": X}])
    assert float(ranges["table"].low[0]) == float(ARRAYS["table"].min())
    assert float(ranges["x"].high[0]) == float(X.max())
    assert channel_ranges(graph(), [{"x": X}])["table"].low.shape == (96,)


def test_batches_without_rows_are_left_out():
    empty = {"x": X[:0]}
    assert set(activation_ranges(graph(), [empty])) == {"table"}
    assert float(activation_ranges(graph(), [empty, {"x": X}])["x"].high[0]) == float(X.max())
    found = {value.name for value, *_ in sampled_products(graph(), [empty], 8)}
    assert found == set()
    assert {value.name for value, *_ in sampled_products(graph(), [empty, {"x": X}], 8)} == {"r"}
    assert compensated_weights(graph(), [empty]) == {}
