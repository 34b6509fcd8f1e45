"""A crash or a hang of the runtime in a child process is one more reason why a model could not be run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from xform.pipeline.isolated import isolated_runtime
from xform.pipeline.oracle import CouldNotRunError, Session, run_model
from xform.pipeline.reference import OriginalModel
from xform.pipeline.verify import verify


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}'))


def test_same_numbers_as_in_this_process(planted):
    model = planted.chain(width=64, dims=("batch", 64))
    x = {"x": np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)}
    expected = run_model(model, [x])[0]["y"]
    with isolated_runtime():
        found = run_model(model, [x, x])
    assert np.array_equal(found[0]["y"], expected)
    assert np.array_equal(found[1]["y"], expected)


def test_verify_inside(planted):
    model = planted.chain()
    with isolated_runtime():
        assert verify(model, model).ok


def test_crash_is_told(planted):
    with isolated_runtime(), Session(planted.chain()) as session:
        os.kill(session._child._process.pid, signal.SIGSEGV)
        with pytest.raises(CouldNotRunError, match="SIGSEGV"):
            session.run({"x": np.ones((2, 8), np.float32)})


def test_hang_is_told(planted):
    with isolated_runtime(timeout_s=20), Session(planted.chain()) as session:
        os.kill(session._child._process.pid, signal.SIGSTOP)
        session._child._timeout_s = 0.2
        start = time.monotonic()
        with pytest.raises(CouldNotRunError, match=r"no answer within 0\.2 s"):
            session.run({"x": np.ones((2, 8), np.float32)})
        assert time.monotonic() - start < 5
    assert session._child is None


def test_refusals_are_told(planted):
    model = planted.chain()
    model.graph[0].op_type = "NoSuchOperator"
    with isolated_runtime(), pytest.raises(CouldNotRunError, match="NoSuchOperator"):
        Session(model)
    with isolated_runtime(), Session(planted.chain()) as session, pytest.raises(CouldNotRunError, match="failed"):
        session.run({"x": np.ones((2, 9), np.float32)})


def test_strings_and_sequences_and_bfloat16():
    words = parse("g (string[2] x) => (string[2] y) { y = Identity(x) }")
    sequence = parse("g (seq(float[N]) x) => (seq(float[N]) y) { y = Identity(x) }")
    narrow = parse("g (bfloat16[2] x) => (bfloat16[2] y) { y = Identity(x) }")
    parts = [np.ones(2, np.float32), np.zeros(3, np.float32)]
    with isolated_runtime():
        assert run_model(words, [{"x": np.array(["a", "bc"], object)}])[0]["y"].tolist() == ["a", "bc"]
        found = run_model(sequence, [{"x": parts}])[0]["y"]
        assert [part.shape for part in found] == [(2,), (3,)]
        assert run_model(narrow, [{"x": np.array([1.5, 2], np.float32)}])[0]["y"].tolist() == [1.5, 2]


@pytest.mark.parametrize("isolated", [True, False])
def test_a_file_with_external_data_runs_in_another_process(tmp_path: Path, isolated: bool):
    """Everything does inside `isolated_runtime`, and Einsum on nothing, on which it may end its process, always."""
    weight = np.random.default_rng(3).normal(size=(40, 40)).astype(np.float32)
    text = 'g (float[n,40] x) => (float[n,40] y) { y = Einsum<equation = "ni,ij->nj">(x, w) }'
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="model.data", size_threshold=0)
    original = OriginalModel(path)
    with isolated_runtime() if isolated else contextlib.nullcontext():
        full = original({"x": weight[:3]})["y"]
        np.testing.assert_allclose(full, weight[:3] @ weight, rtol=1e-4, atol=1e-4)
        assert isolated == (original._session._child is not None)
        try:
            assert original({"x": weight[:0]})["y"].shape == (0, 40)
        except CouldNotRunError as error:  # this runtime's kernel divides by the size
            assert "crashed" in error.what
        assert original._session is not None  # this process is still there
    original.close()
