"""Rounding noise is told from wrong rewrites: a discontinuous output is not blamed on a pass, an error is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

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
    assert [(e.output, e.agrees, e.noisy) for e in found.outputs] == [("y", True, False), ("best", False, True)]
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
    inputs = [{"x": np.ones((2, 64), np.float32)}]
    before = model.graph.initializers["w0"].const_value.numpy().copy()
    still, once, again = run_model(model, inputs), nudged_outputs(model, inputs, 1), nudged_outputs(model, inputs, 1)
    assert np.array_equal(once[0]["y"], again[0]["y"])
    assert 0 < np.abs(once[0]["y"] - still[0]["y"]).max() < 1e-3
    assert np.array_equal(model.graph.initializers["w0"].const_value.numpy(), before)


def test_within():
    noise = Difference(1.0, 0.1, False, 10, "noise", 2)
    assert is_within(Difference(1.0, 0.1, False, 10, "x", 2), noise)
    assert not is_within(Difference(1.0, 5.0, False, 10, "x", 2), noise)
    assert not is_within(Difference(1.0, 0.1, False, 10, "x", 100), noise)
    assert not is_within(Difference(1.0, 0.1, False, 10, "x", 2), Difference(0.0, 0.0, True, 10))
