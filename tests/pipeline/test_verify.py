"""Verification says "ok" only where numbers were compared."""

from __future__ import annotations

import json
import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import xform
from xform.errors import LimitError, UsageError, XformWarning
from xform.graph.clone import clone
from xform.limits import Limits, exceeded, limited
from xform.pipeline.oracle import LEND_FROM_BYTES, CouldNotRunError, Session, call_oracle, run_model, serialize
from xform.pipeline.reference import OriginalModel, Reference
from xform.pipeline.verify import Verifier, verify


def parse(text: str, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def changed(model: ir.Model, name: str = "w0", by: float = 1e-2) -> ir.Model:
    copy = clone(model)
    value = copy.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(by), name=name)
    return copy


def test_equal(planted):
    model = planted.chain()
    found = verify(model, clone(model))
    assert found.ok and found.max_abs_error == 0
    assert found.cases[:2] == ("random inputs with batch=2", "random inputs with batch=3")
    assert found.outputs[0].rtol == 1e-4


def test_different(planted):
    model = planted.chain()
    found = verify(model, changed(model))
    assert found.state == "failed"
    assert "'y'" in found.reason and "batch=2" in found.reason
    assert found.max_rel_error > 1e-4
    assert json.loads(json.dumps(found.as_dict()))["state"] == "failed"


def test_candidate_that_does_not_run_has_failed(planted):
    model = planted.chain()
    broken = clone(model)
    broken.graph[0].op_type = "NoSuchOperator"
    assert verify(model, broken).state == "failed"
    assert verify(broken, model).state == "unverified"


def test_other_interface_has_failed(planted):
    model = planted.chain()
    other = clone(model)
    other.graph.inputs[0].name = "z"
    assert "interfaces differ" in verify(model, other).reason


def test_newer_opset_than_the_runtime_knows_is_run_at_one_that_it_knows(planted):
    model = planted.chain()
    model.opset_imports[""] = 28
    assert verify(model, model).ok
    assert verify(model, changed(model)).state == "failed"
    assert model.opset_imports[""] == 28


def test_operator_of_no_opset_that_the_runtime_knows_is_unverified():
    model = parse("g (float[4] x) => (float[4] y) { y = NoSuchOperator(x) }", 28)
    found = verify(model, model)
    assert found.state == "unverified" and "NoSuchOperator" in found.reason


def test_size_constraint_is_found_by_trying_and_told():
    model = parse("g (float[batch,seq] x) => (float[a,32] y) { y = Reshape(x, s) }", s=np.array([-1, 32]))
    verifier = Verifier(model)
    found = verifier.compare(model)
    assert found.ok
    assert [case.sizes["seq"] % 32 for case in verifier.cases] == [0] * len(verifier.cases)
    assert any("seq=13" in note for note in found.notes)


def test_narrower_values_are_proposed_to_a_model_that_takes_no_typical_ones():
    model = parse("g (float[6] x, int64[1] which) => (float[1] y) { y = ReduceSum(x, which) }")
    verifier = Verifier(model)
    assert verifier.compare(model).ok
    assert verifier.cases[0].arrays["which"] == [0]
    assert "zeros" in verifier.cases[0].source or "binary" in verifier.cases[0].source


def test_no_size_works_is_unverified():
    model = parse("g (float[a,b] x) => (float[n,7919] y) { y = Reshape(x, s) }", s=np.array([-1, 7919]))
    found = verify(model, model)
    assert found.state == "unverified"
    assert "none of the inputs tried" in found.reason and "Reshape" in found.reason


def test_nothing_but_nan_is_unverified():
    model = parse("g (float[4] x) => (float[4] y) { y = Mul(x, w) }", w=np.full(4, np.nan, np.float32))
    found = verify(model, model)
    assert found.state == "unverified" and "NaN" in found.reason


def test_some_nan_is_compared():
    weight = np.array([1, np.nan, 2, np.inf], np.float32)
    model = parse("g (float[4] x) => (float[4] y) { y = Mul(x, w) }", w=weight)
    assert verify(model, model).ok
    assert verify(model, changed(model, "w")).state == "failed"


def test_random_model_is_unverified():
    model = parse("g (float[8] x) => (float[8] y) { y = Identity(x) }")
    rng = np.random.default_rng(0)
    found = verify(model, model, oracle=lambda inputs: [inputs["x"] + rng.normal(size=8).astype(np.float32)])
    assert found.state == "unverified" and "every run" in found.reason


def test_integers_must_be_equal():
    text = "g (int32[4] x) => (int32[4] y) { y = Add(x, w) }"
    model = parse(text, w=np.arange(4, dtype=np.int32))
    other = parse(text, w=np.arange(4, dtype=np.int32) + np.int32([0, 0, 0, 1]))
    assert verify(model, model).ok
    found = verify(model, other)
    assert found.state == "failed" and "1 of 4" in found.reason


def test_inputs_of_the_user(planted):
    model = planted.chain()
    arrays = [{"x": np.full((n, 8), 0.1, np.float32)} for n in (1, 4, 6)]
    verifier = Verifier(model, inputs=arrays)
    assert verifier.compare(model).ok
    assert [case.arrays["x"].shape[0] for case in verifier.cases][:3] == [1, 4, 6]
    assert [case.source for case in verifier.cases[3:]] == ["derived"] * (len(verifier.cases) - 3)
    with pytest.raises(UsageError, match="no input named"):
        verify(model, model, inputs={"nope": arrays[0]["x"]})


def test_no_outputs_differ_without_inputs():
    model = parse("g () => (float[2] y) { y = Identity(w) }", w=np.ones(2, np.float32))
    assert verify(model, model).ok
    assert verify(model, changed(model, "w")).state == "failed"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "double"])
def test_other_float_types(dtype):
    model = parse(f"g ({dtype}[N,4] x) => ({dtype}[N,4] y) {{ y = Identity(x) }}")
    found = verify(model, model)
    assert found.ok, found.reason


def test_control_flow_and_shadowed_weights():
    text = """g (bool c, float[N,64] x) => (float[N,64] y) {
        y = If (c) <then_branch = t () => (float[N,64] a) { p = MatMul(x, w) a = Tanh(p) },
                    else_branch = e () => (float[N,64] b) { b = Neg(x) }>
    }"""
    model = parse(text, w=np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    given = {"c": np.array(True)}
    assert verify(model, model, inputs=given).ok
    assert verify(model, changed(model, "w"), inputs=given).state == "failed"


def test_large_weights_are_lent_not_copied(planted):
    model = planted.chain(width=64, dims=("batch", 64))
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    proto, lent = serialize(model)
    assert set(lent) == {f"w{i}" for i in range(6)}
    assert np.shares_memory(lent["w0"], tensors["w0"].numpy())
    assert proto.ByteSize() < LEND_FROM_BYTES * 2
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT8E5M2])
def test_narrow_weights_are_lent_too(dtype):
    model = parse("g (float[2,64] x) => (float[2,64] y) { a = Cast<to=1>(w) y = MatMul(x, a) }", 21)
    array = np.random.default_rng(0).normal(size=(64, 64)).astype(dtype.numpy())
    weight = ir.Value(name="w", const_value=ir.tensor(array, name="w"))
    old = model.graph[0].inputs[0]
    old.replace_all_uses_with(weight)
    model.graph.register_initializer(weight)
    assert np.shares_memory(serialize(model)[1]["w"], weight.const_value.numpy())
    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    assert np.allclose(run_model(model, [{"x": x}])[0]["y"], x @ array.astype(np.float32), atol=1e-4)


def test_weights_that_nothing_reads(planted):
    model = planted.chain(width=64, dims=("batch", 64))
    other = clone(model)
    spare = ir.Value(name="spare", const_value=ir.tensor(np.ones((64, 64), np.float32), name="spare"))
    other.graph.register_initializer(spare)
    assert verify(model, other).ok
    assert verify(other, model).ok
    assert spare.const_value.numpy().sum() == 64 * 64


def test_external_weights_run_from_where_they_are(planted, tmp_path):
    model = planted.chain(width=64, dims=("batch", 64))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    assert isinstance(loaded.graph.initializers["w0"].const_value, ir.ExternalTensor)
    assert verify(model, loaded).ok
    assert isinstance(loaded.graph.initializers["b0"].const_value, ir.ExternalTensor)


def test_session_reports_what_the_runtime_says(planted):
    with Session(planted.chain()) as session, pytest.raises(CouldNotRunError, match="failed"):
        session.run({"x": np.ones((2, 9), np.float32)})


def test_oracle_forms(planted):
    model = planted.chain()
    x = np.ones((2, 8), np.float32)
    expected = run_model(model, [{"x": x}])[0]["y"]
    torch = pytest.importorskip("torch")
    for result in ([expected], {"y": expected}, (torch.from_numpy(expected),)):
        assert np.array_equal(call_oracle(lambda _, r=result: r, {"x": x}, ["y"])["y"], expected)
    with pytest.raises(CouldNotRunError, match="2 outputs"):
        call_oracle(lambda _: [expected, expected], {"x": x}, ["y"])
    with pytest.raises(CouldNotRunError, match="no output named"):
        call_oracle(lambda _: {"z": expected}, {"x": x}, ["y"])


def outer(size: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """x x^T, whose result is much larger than x, and a column of so many numbers."""
    model = parse("g (float[n,1] x) => (float[n,n] y) { t = Transpose<perm = [1, 0]>(x) p = MatMul(x, t) y = Relu(p) }")
    return model, {"x": np.random.default_rng(5).normal(size=(size, 1)).astype(np.float32)}


def test_an_optional_set_that_is_past_a_limit_is_left_out_and_told():
    model, inputs = outer(40)
    with limited(Limits(memory=3840)):  # 40 rows are within it, more are not
        found = Verifier(model, inputs=inputs).compare(model)
    assert found.ok and found.coverage.given == 1
    (note,) = found.notes
    assert "n=41 was left out, and 1 more" in note and "'memory'" in note
    assert not found.coverage.refused  # by the model


@pytest.mark.parametrize("form", ["file", "proto", "graph"])
def test_a_limit_that_only_the_candidate_is_held_to_is_told_too(tmp_path, form):
    """The file as it came has no sizes to look at; what is made of it has."""
    model, inputs = outer(100)
    proto = ir.to_proto(model)
    onnx.save(proto, tmp_path / "model.onnx")
    given = {"file": tmp_path / "model.onnx", "proto": proto, "graph": model}[form]
    with pytest.warns(XformWarning, match="n=101 was left out.*past a limit"):
        result = xform.optimize(given, inputs=inputs, limits={"memory": 27500})
    assert result.report.verification.passed and result.report.verification.given == 1


def test_sizes_that_the_user_asked_for_are_not_left_out():
    model, _ = outer(40)
    with pytest.raises(LimitError, match="'memory'"):
        xform.optimize(model, dynamic={"n": (1, 4000)}, limits={"memory": 1 << 20})


def test_inputs_of_the_user_past_a_limit_end_the_run():
    model, inputs = outer(40)
    with limited(Limits(memory=100)), pytest.raises(LimitError, match="'memory'"):
        Verifier(model, inputs=inputs).compare(model)


def test_after_a_run_without_end_no_optional_set_is_tried(monkeypatch):
    model, inputs = outer(40)
    tried: list[int] = []

    def run(self, arrays):
        tried.append(len(arrays["x"]))
        if len(arrays["x"]) == 7:
            raise exceeded("seconds", "a run of the model does not end")
        return {"y": np.maximum(arrays["x"] @ arrays["x"].T, 0)}

    monkeypatch.setattr(Reference, "run", run)
    verifier = Verifier(model, inputs=inputs)
    found = verifier.compare(model)
    assert tried == [40, 7] and found.ok
    (note,) = found.notes
    assert "n=7" in note and "and 5 more" in note and "does not end" in note


def past(limit: str, rows: int):
    """What runs candidates: sets of more rows are past a limit."""
    ran: list[int] = []

    def execute(model, cases):
        ran.append(len(cases))
        if any(len(case["x"]) > rows for case in cases):
            raise exceeded(limit, "the candidate")
        return run_model(model, cases)

    return execute, ran


@pytest.mark.parametrize("limit", ["memory", "seconds"])
def test_a_candidate_that_is_past_a_limit_on_the_first_set_ends_the_run(limit):
    model, _ = outer(4)
    execute, ran = past(limit, 0)
    with pytest.raises(LimitError, match=limit):
        Verifier(model, execute=execute).compare(model)
    assert len(ran) <= 4


def test_optional_sets_on_which_a_candidate_is_slow_are_left_out_after_one_try():
    model, inputs = outer(4)
    execute, ran = past("seconds", 4)
    verifier = Verifier(model, inputs=inputs, execute=execute)
    found = verifier.compare(model)
    assert found.ok and any("past a limit" in note for note in found.notes)
    assert found.cases == (
        "given inputs with n=4",
        "derived inputs with n=1",
        "derived inputs with n=0; an empty batch",
    )
    first = len(ran)
    assert verifier.compare(model).ok and len(ran) == first + 1  # what was slow is not asked again
    assert {case.sizes.get("n", 4) for case in verifier.cases_for("exact")} == {0, 1, 4}


def test_branches_that_do_not_end_cost_one_try():
    """Each of six conditions leads to a loop without end, and no input goes there."""
    nodes = []
    for i in range(6):
        loop = "t = Loop(big, yes, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] w) "
        loop += "{ d = Identity(c) w = Add(v, v) }>"
        then = f"then{i} () => (float[2] t) {{ {loop} }}"
        other = f"else{i} () => (float[2] e) {{ e = Neg(x) }}"
        nodes.append(f"y{i} = If(c) <then_branch = {then}, else_branch = {other}>")
    text = "g (float[2] x) => (float[2] y) { s = ReduceSum<keepdims = 0>(x) c = Greater(s, far) "
    text += " ".join(nodes) + " y = Sum(" + ", ".join(f"y{i}" for i in range(6)) + ") }"
    far, big = np.float32(3e38), np.array(1 << 60)
    model = parse(text, far=far, big=big, yes=np.array(True))
    start = time.monotonic()
    with limited(Limits(seconds=0.5)):
        found = Verifier(model).compare(model)
    assert found.ok and time.monotonic() - start < 6
    assert len(found.coverage.unreached) == 6


def test_optional_sets_share_the_time_of_half_a_run(monkeypatch):
    model, inputs = outer(40)
    tried: list[int] = []
    clock = iter(range(0, 1000, 4))  # each run takes four seconds, of ten that one may take

    def run(self, arrays):
        tried.append(len(arrays["x"]))
        return {"y": np.maximum(arrays["x"] @ arrays["x"].T, 0)}

    monkeypatch.setattr(Reference, "run", run)
    monkeypatch.setattr("xform.pipeline.optional_sets.time.monotonic", lambda: next(clock))
    verifier = Verifier(model, inputs=inputs)
    verifier.prepare()
    assert tried == [40, 7, 1] and len(verifier.cases) == 3
    assert "the optional sets before it took 8 s" in verifier._optional.told()[0]


def test_a_file_earns_limits_by_its_weights(tmp_path):
    weight = np.random.default_rng(6).normal(size=(300, 300)).astype(np.float32)
    model = parse("g (float[n,300] x) => (float[n,300] y) { y = MatMul(x, w) }", w=weight)
    for location in ("", "model.data"):
        path = tmp_path / f"model{location}.onnx"
        onnx.save(ir.to_proto(model), path, save_as_external_data=bool(location), location=location or None)
        original = OriginalModel(path)
        original.open()
        assert original._session._brought == weight.nbytes
        original.close()
