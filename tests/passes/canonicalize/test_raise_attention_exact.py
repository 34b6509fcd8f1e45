"""raise_attention against the spelled-out form: every fill, spelling and mask, rows without keys included.

Reference is the model as it is in ONNX Runtime; the result is lowered, and nothing verifies it on the way.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import xform

B, H, S, D = 3, 2, 4, 8
MASKS = {
    "full": [[1] * 4] * 3,
    "left": [[0, 0, 1, 1], [0, 1, 1, 1], [1] * 4],
    "right": [[1, 1, 0, 0], [1, 1, 1, 0], [1] * 4],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 1]],
    "empty row": [[0] * 4, [1, 1, 0, 0], [1] * 4],
    "all empty": [[0] * 4] * 3,
    "one token": [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]],
}
TYPES = {
    np.float32: (TensorProto.FLOAT, 1e-3, 1e-4),
    np.float64: (TensorProto.DOUBLE, 1e-8, 1e-8),
    np.float16: (TensorProto.FLOAT16, 2e-2, 2e-2),
}
FORMS = {
    "where": [("Where", ("open", "{x}", "fill"))],
    "where and causal": [("And", ("open", "causal")), ("Where", ("{-1}", "{x}", "fill"))],
    "causal": [("Where", ("causal", "{x}", "fill"))],
    "add": [("Where", ("open", "zero", "fill")), ("Add", ("{x}", "{-1}"))],
    "product": [("Sub", ("one", "flags")), ("Mul", ("{-1}", "fill")), ("Add", ("{x}", "{-1}"))],
}
SECOND = {
    "none": [],
    "bias": [("Add", ("{x}", "bias"))],
    "same fill": [("Where", ("causal", "{x}", "fill"))],
    "other fill": [("Where", ("causal", "{x}", "other"))],
    "padding": [("Sub", ("one", "flags")), ("Mul", ("{-1}", "fill")), ("Add", ("{x}", "{-1}"))],
}


def attention(fill: float, form: str, scale: str, second: str, dtype: type) -> onnx.ModelProto:
    kind = TYPES[dtype][0]
    rng = np.random.default_rng(0)
    constants = {
        "axes": np.array([1, 2]), "fill": np.array(fill, dtype), "one": np.array(1, dtype), "zero": np.array(0, dtype),
        "factor": np.array({"tiny": 1e-4, "up": 2.5}.get(scale, 0.35), dtype),
        "other": np.array(-3e4 if dtype is np.float16 else -1e9, dtype),
        "bias": rng.standard_normal((1, H, S, S)).astype(dtype), "causal": np.tril(np.ones((1, 1, S, S), bool)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Unsqueeze", ["mask", "axes"], ["mask4"]),
        helper.make_node("Cast", ["mask4"], ["open"], to=TensorProto.BOOL),
        helper.make_node("Cast", ["mask4"], ["flags"], to=kind),
        helper.make_node("MatMul", ["q", "k"], ["l"]),
    ]
    by_factor = [("Mul", ("{x}", "factor"))]
    steps = (by_factor if scale == "before" else []) + FORMS[form] + SECOND[second]
    logits = "l"
    for op_type, operands in steps + (by_factor if scale in ("after", "tiny", "up") else []):
        given = [o.replace("{x}", logits).replace("{-1}", nodes[-1].output[0]) for o in operands]
        nodes.append(helper.make_node(op_type, given, [f"n{len(nodes)}"]))
        if "{x}" in operands:
            logits = nodes[-1].output[0]
    nodes += [
        helper.make_node("Softmax", [logits], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    read = {name for node in nodes for name in node.input}
    inputs = [
        helper.make_tensor_value_info(name, type_, ["N", *dims])
        for name, type_, dims in (("q", kind, (H, S, D)), ("k", kind, (H, D, S)), ("v", kind, (H, S, D)))
    ] + [helper.make_tensor_value_info("mask", TensorProto.INT64, ["N", S])]
    outputs = [helper.make_tensor_value_info("y", kind, ["N", H, S, D])]
    weights = [numpy_helper.from_array(a, n) for n, a in constants.items() if n in read]
    graph = helper.make_graph(
        [n for n in nodes if set(n.output) & read or "y" in n.output], "g", inputs, outputs, weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(data: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def is_raised(fill: float, form: str, scale: str, second: str, dtype: type) -> bool:
    """Compares on every mask, with small and large logits, and an empty batch; says whether attention was raised."""
    model = attention(fill, form, scale, second, dtype)
    fast = xform.optimize(model, verify="off")
    before, after = model.SerializeToString(), fast.artifact.to_bytes()
    rng, (_, rtol, atol) = np.random.default_rng(1), TYPES[dtype]
    for name, size in product(MASKS, (1, 30)):
        feeds = {
            "q": (size * rng.standard_normal((B, H, S, D))).astype(dtype),
            "k": rng.standard_normal((B, H, D, S)).astype(dtype),
            "v": rng.standard_normal((B, H, S, D)).astype(dtype),
            "mask": np.array(MASKS[name], np.int64),
        }
        np.testing.assert_allclose(run(after, feeds), run(before, feeds), rtol=rtol, atol=atol, err_msg=name)
    nobody = {name: array[:0] for name, array in feeds.items()}
    assert run(after, nobody).shape == run(before, nobody).shape
    return any(r.rule == "product" and r.verdict == "applied" for r in fast.report.remarks)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", [float("-inf"), float(np.finfo(np.float32).min), -1e9, -1e4, -100.0])
def test_every_fill_in_every_spelling_is_the_same(fill: float, form: str, second: str) -> None:
    if np.isinf(fill) and (form == "product" or second == "padding"):
        pytest.skip("0 * inf is NaN in the model itself")
    is_raised(fill, form, "after", second, np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("form", FORMS)
def test_other_precisions_are_the_same(form: str, dtype: type) -> None:
    lowest = float(np.finfo(dtype).min)
    for fill, second in (
        (lowest, "none"),
        (lowest, "bias"),
        (-1e4, "same fill"),
        (-1e4, "none"),
        (lowest / 2, "padding"),
    ):
        is_raised(fill, form, "before", second, dtype)


@pytest.mark.parametrize("scale", ["tiny", "up"])
def test_factors_after_a_fill_that_shrink_or_enlarge_it(scale: str) -> None:
    for fill in (float("-inf"), float(np.finfo(np.float32).min), -1e9, -1e4):
        is_raised(fill, "where", scale, "none", np.float32)


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    ("fill", "form", "second", "raised"),
    [
        (LOWEST, "causal", "padding", True),  # GPT-J, GPT-Neo: the padding is added after the causal fill
        (LOWEST, "product", "none", True),  # BERT
        (LOWEST, "product", "bias", True),  # Swin, MPNet
        (-1e4, "product", "none", True),  # BERT before 2022
        (LOWEST, "where", "same fill", True),
        (float("-inf"), "add", "none", True),  # TorchScript's scaled_dot_product_attention
        (-1e9, "where and causal", "none", True),
        (-1e4, "causal", "padding", False),  # GPT-2 before 2022: a row of pads tells the two masks apart
        (-1e4, "where", "none", False),  # logits may be as low
        (-1e9, "where", "other fill", True),
        (-1e4, "where", "other fill", False),
    ],
)
def test_what_exporters_write_is_raised_where_that_is_exact(fill: float, form: str, second: str, raised: bool) -> None:
    assert is_raised(fill, form, "before", second, np.float32) == raised


def test_an_einsum_of_one_operand_does_not_stop_anything() -> None:
    model = attention(LOWEST, "where", "before", "none", np.float32)
    model.graph.node.append(helper.make_node("Einsum", ["d"], ["z"], equation="bii->bi"))
    model.graph.input.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, [2, 3, 3]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3]))
    fast = xform.optimize(model, verify="off")
    assert fast.report.concepts["attention"] == 1
    assert not fast.report.warnings
