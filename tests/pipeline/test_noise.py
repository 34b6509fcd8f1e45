"""Rounding noise is told from wrong rewrites: a discontinuous output is not blamed on a pass, an error is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xform.pipeline.noise import is_within, nudged_outputs
from xform.pipeline.oracle import run_model
from xform.pipeline.tolerance import Difference
from xform.pipeline.verify import verify

BODY = """<ir_version: 10, opset_import: ["" : 18]> g (float[1,64] x) => (float[1,64] y, int64[1,8] best)
    {{ p = MatMul(x, w) y = {last} values, best = TopK(y, k) }}"""


def ranking(last: str, ties: float) -> ir.Model:
    """y = x w and the indices of its largest elements; the columns of w differ by `ties` only."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 1)) + ties * rng.normal(size=(64, 64))
    proto = onnx.parser.parse_model(BODY.format(last=last))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([8]), "k"))
    for name, number in (("third", 1 / 3), ("three", 3), ("wrong", 1.01)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(number), name))
    return ir.from_proto(proto)


def rounded(ties: float) -> ir.Model:
    """The same up to rounding."""
    model = ranking("Identity(p)", ties)
    node = model.graph[1]
    third = ir.node("Mul", [node.inputs[0], model.graph.initializers["third"]])
    third.outputs[0].name = "a"
    model.graph.insert_before(node, third)
    node.op_type = "Mul"
    node.resize_inputs(2)
    node.replace_input_with(0, third.outputs[0])
    node.replace_input_with(1, model.graph.initializers["three"])
    return model


def test_ties_are_noise():
    found = verify(ranking("Identity(p)", 1e-7), rounded(1e-7))
    assert found.ok
    typical = [(e.output, e.agrees, e.noisy) for e in found.outputs if e.inputs == "random inputs"]
    assert typical == [("y", True, False), ("best", False, True)]
    assert any("rounding alone changes best" in note for note in found.notes)
    assert found.max_rel_error < 1e-6  # of what was compared


def test_clear_ranking_is_compared():
    found = verify(ranking("Identity(p)", 1.0), rounded(1.0))
    assert found.ok and not found.notes
    assert all(error.agrees for error in found.outputs)


def test_wrong_ranking_is_an_error():
    reference = ranking("Identity(p)", 1.0)
    assert verify(reference, ranking("Neg(p)", 1.0)).state == "failed"


def test_wrong_numbers_are_an_error_even_where_the_ranking_is_noise():
    found = verify(ranking("Identity(p)", 1e-7), ranking("Mul(p, wrong)", 1e-7))
    assert found.state == "failed" and "'y'" in found.reason


def test_only_noise_is_unverified():
    models = [ranking("Identity(p)", 1e-7), rounded(1e-7)]
    for model in models:
        del model.graph.outputs[0]
    found = verify(*models)
    assert found.state == "unverified" and "rounding alone" in found.reason


def test_tolerance_of_the_user_stands():
    assert verify(ranking("Identity(p)", 1e-7), rounded(1e-7), tolerance=1e-3).state == "failed"


def test_nudging_is_seeded_small_and_leaves_the_model_alone(planted):
    model = planted.chain(width=64, dims=("batch", 64))
    inputs = {"x": np.ones((2, 64), np.float32)}
    before = model.graph.initializers["w0"].const_value.numpy().copy()
    (still,) = run_model(model, [inputs])
    once, again = nudged_outputs(model, inputs, 1), nudged_outputs(model, inputs, 1)
    assert np.array_equal(once["y"], again["y"])
    assert 0 < np.abs(once["y"] - still["y"]).max() < 1e-3
    assert np.array_equal(model.graph.initializers["w0"].const_value.numpy(), before)


@pytest.mark.parametrize("seed", [2**20, 10**13, 2**70])
def test_nudging_takes_any_seed(planted, seed: int):
    model, x = planted.chain(), np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)
    feeds = {"x": x}
    plain, nudged = run_model(model, [feeds])[0]["y"], nudged_outputs(model, feeds, seed)["y"]
    assert 0 < np.abs(nudged - plain).max() < 1e-4 * np.abs(plain).max()
    assert (nudged != nudged_outputs(model, feeds, seed + 1)["y"]).any()


def test_within():
    noise = Difference(1.0, 0.1, False, 10, "noise", 2)
    assert is_within(Difference(1.0, 0.1, False, 10, "x", 2), noise)
    assert not is_within(Difference(1.0, 5.0, False, 10, "x", 2), noise)
    assert not is_within(Difference(1.0, 0.1, False, 10, "x", 100), noise)
    assert not is_within(Difference(1.0, 0.1, False, 10, "x", 2), Difference(0.0, 0.0, True, 10))


def cancelling(by: float = 0.0) -> ir.Model:
    """x w + x v, where some columns of v are -w but for a part that is smaller by 1e5, and `by` is added to one."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(64, 64))
    other = rng.normal(size=(64, 64))
    other[:, 4:7] = -weight[:, 4:7] + 1e-5 * rng.normal(size=(64, 3))
    other[:, 5] += by
    body = """<ir_version: 10, opset_import: ["" : 18]> g (float[4,64] x) => (float[4,64] y)
        { a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }"""
    proto = onnx.parser.parse_model(body)
    for name, array in (("w", weight), ("v", other)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(proto)


def summed_first() -> ir.Model:
    """The same with the weights added in float64, so that nothing cancels any more."""
    model = cancelling()
    w, v = (model.graph.initializers[name].const_value.numpy().astype(np.float64) for name in "wv")
    body = """<ir_version: 10, opset_import: ["" : 18]> g (float[4,64] x) => (float[4,64] y) { y = MatMul(x, w) }"""
    proto = onnx.parser.parse_model(body)
    proto.graph.initializer.append(onnx.numpy_helper.from_array((w + v).astype(np.float32), "w"))
    return ir.from_proto(proto)


def test_values_that_rounding_moves_as_much_are_excused_one_by_one():
    assert verify(cancelling(), summed_first()).ok


def test_one_wrong_value_among_noisy_ones_is_an_error():
    found = verify(cancelling(), cancelling(by=1e-4))
    assert found.state == "failed"
