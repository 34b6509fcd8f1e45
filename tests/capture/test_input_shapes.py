"""Input shapes that the user fixes reach every value, and what does not fit the model is a usage error."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import xform
from xform.capture.onnx_file import capture_onnx
from xform.graph.values import shape_of

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[batch,seq,8] x, float[batch,1,8] y, int64[n] ids) => (float[batch,seq,8] z, float[flat,8] rows)
   <int64[2] shape = {-1, 8}> { z = Add (x, y) rows = Reshape (z, shape) }"""


def model() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT)


def test_a_dim_gets_its_number_wherever_its_name_stands() -> None:
    captured = capture_onnx(model(), input_shapes={"x": (2, 5, 8)})
    shapes = {v.name: shape_of(v) for v in (*captured.graph.inputs, *captured.graph.outputs)}
    assert shapes == {"x": (2, 5, 8), "y": (2, 1, 8), "ids": ("n",), "z": (2, 5, 8), "rows": (10, 8)}


def test_minus_one_and_none_leave_a_dim_and_a_name_renames_it() -> None:
    captured = capture_onnx(model(), input_shapes={"x": (-1, "tokens", None)})
    shapes = {v.name: shape_of(v) for v in captured.graph.inputs}
    assert shapes["x"] == ("batch", "tokens", 8) and shapes["y"] == ("batch", 1, 8)
    assert shape_of(captured.graph.outputs[0]) == ("batch", "tokens", 8)


def test_the_result_runs_at_that_shape_and_says_so() -> None:
    fast = xform.optimize(model(), input_shapes={"x": (2, 5, 8), "ids": (3,)})
    rng = np.random.default_rng(4)
    x, y = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 8), (2, 1, 8)))
    result = fast(x=x, y=y, ids=np.zeros(3, np.int64))
    np.testing.assert_allclose(result["z"], x + y, rtol=1e-6)
    with pytest.raises(xform.UsageError, match=r"\b3\b"):
        fast(x=np.zeros((3, 5, 8), np.float32), y=y, ids=np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("shapes", "word"),
    [
        ({"idz": (1, 2, 8)}, "did you mean 'ids'"),
        ({"x": (1, 2)}, "has 3 dims"),
        ({"x": (1, 2, 9)}, "is 8 in the model"),
        ({"x": (1, 2, 8), "y": (2, 1, 8)}, "two sizes, 1 and 2"),
        ({"x": "1,2,8"}, "not a list of dims"),
        ({"x": (1.5, 2, 8)}, "a dim 1.5"),
        ({"x": (-2, 2, 8)}, "a dim -2"),
        ({"x": (True, 2, 8)}, "a dim True"),
        ({"x": ("a b", 2, 8)}, "a dim 'a b'"),
    ],
)
def test_shapes_that_do_not_fit_are_usage_errors(shapes: dict, word: str) -> None:
    with pytest.raises(xform.UsageError, match=word):
        xform.optimize(model(), input_shapes=shapes)
