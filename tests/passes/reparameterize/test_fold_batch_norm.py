"""fold_batch_norm: exact in float64, fires exactly where the docstring says, leaves the rest with a reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator
from support import applied, apply, floats, missed, ops, parse, run

from xform.graph.shapes import infer_shapes
from xform.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from xform.rewrite.remarks import RemarkLog

PASS = FoldBatchNorm()


def stats(channels: int, seed: int = 0, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Random parameters of a BatchNormalization named n_*."""
    rng = np.random.default_rng(seed)
    return {
        "s": (0.5 + rng.random(channels)).astype(dtype),
        "o": rng.standard_normal(channels).astype(dtype),
        "m": rng.standard_normal(channels).astype(dtype),
        "v": (0.5 + rng.random(channels)).astype(dtype),
    }


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    constants: dict[str, np.ndarray],
    outputs: tuple[str, ...] = ("y",),
    elem_type: int = onnx.TensorProto.DOUBLE,
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, elem_type, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, elem_type, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    found = ir.from_proto(proto)
    infer_shapes(found)
    return found


def norm(x: str, y: str, prefix: str = "", **attributes: object) -> onnx.NodeProto:
    names = [f"{prefix}{n}" for n in "somv"]
    return helper.make_node("BatchNormalization", [x, *names], [y], name=f"norm_{y}", epsilon=1e-3, **attributes)


def folded(m: ir.Model, feeds: dict[str, np.ndarray], count: int = 1, tolerance: float = 1e-10) -> RemarkLog:
    """Apply the pass; demand `count` applications, and the same numbers in float64."""
    expected = ReferenceEvaluator(ir.to_proto(m)).run(None, feeds)
    remarks = apply(m, PASS)
    assert applied(remarks, "fold") == count, missed(remarks)
    for got, want in zip(ReferenceEvaluator(ir.to_proto(m)).run(None, feeds), expected, strict=True):
        assert np.max(np.abs(got - want)) <= tolerance * max(1.0, np.max(np.abs(want)))
    return remarks


def rng_array(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


SPATIAL = {1: [9], 2: [7, 6], 3: [5, 4, 6]}


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    per_in=st.integers(1, 2),
    per_out=st.integers(1, 2),
    pad=st.integers(0, 1),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_conv_before(
    rank: int, group: int, per_in: int, per_out: int, pad: int, stride: int, bias: bool, seed: int
) -> None:
    """Rule 1 for Conv: groups, depthwise, one to three spatial dims, any padding."""
    cin, cout = group * per_in, group * per_out
    constants = {"w": rng_array(cout, per_in, *[2] * rank, seed=seed), **stats(cout, seed)}
    if bias:
        constants["b"] = rng_array(cout, seed=seed + 1)
    conv = helper.make_node(
        "Conv", ["x", "w"] + ["b"] * bias, ["c"], pads=[pad] * 2 * rank, strides=[stride] * rank, group=group
    )
    m = model([conv, norm("c", "y")], {"x": [2, cin, *SPATIAL[rank]]}, constants)
    folded(m, {"x": rng_array(2, cin, *SPATIAL[rank], seed=seed + 2)})
    assert ops(m) == ["Conv"]


@settings(max_examples=25, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3]),
    per_in=st.integers(1, 2),
    per_out=st.integers(1, 3),
    pad=st.integers(0, 1),
    stride=st.integers(1, 3),
    extra=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_conv_transpose_before_matches_torch(
    group: int, per_in: int, per_out: int, pad: int, stride: int, extra: int, seed: int
) -> None:
    """Rule 1 for ConvTranspose, with cropping and output padding, against torch in float64."""
    import torch

    extra = min(extra, stride - 1)
    cin, cout = group * per_in, group * per_out
    constants = {
        "w": rng_array(cin, per_out, 3, 3, seed=seed), "b": rng_array(cout, seed=seed + 1), **stats(cout, seed)
    }  # fmt: skip
    attributes = {"pads": [pad] * 4, "strides": [stride] * 2, "output_padding": [extra] * 2, "group": group}
    nodes = [helper.make_node("ConvTranspose", ["x", "w", "b"], ["c"], **attributes), norm("c", "y")]
    m = model(nodes, {"x": [1, cin, 4, 5]}, constants)
    remarks = apply(m, PASS)
    assert applied(remarks, "fold") == 1
    assert ops(m) == ["ConvTranspose"]
    x = torch.from_numpy(rng_array(1, cin, 4, 5, seed=seed + 2))
    new = {name: torch.from_numpy(np.array(v.const_value.numpy())) for name, v in m.graph.initializers.items()}
    node = m.graph[0]

    def transposed(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv_transpose2d(x, w, b, stride, pad, extra, group)

    t = {k: torch.from_numpy(v) for k, v in constants.items()}
    want = torch.nn.functional.batch_norm(transposed(t["w"], t["b"]), t["m"], t["v"], t["s"], t["o"], eps=1e-3)
    got = transposed(new[node.inputs[1].name], new[node.inputs[2].name])
    # the node stores epsilon as float32
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias_shape", [None, (5,), (1, 5), (1,), (3, 5)])
def test_gemm_before(transposed: int, bias_shape: tuple[int, ...] | None) -> None:
    constants = {"w": rng_array(5, 4) if transposed else rng_array(4, 5), **stats(5)}
    if bias_shape:
        constants["b"] = rng_array(*bias_shape, seed=3)
    gemm = helper.make_node(
        "Gemm", ["x", "w"] + ["b"] * (bias_shape is not None), ["c"], transB=transposed, alpha=0.7, beta=1.3
    )
    m = model([gemm, norm("c", "y")], {"x": [3, 4]}, constants)
    folded(m, {"x": rng_array(3, 4)})
    assert ops(m) == ["Gemm"]


@pytest.mark.parametrize("bias_first", [False, True])
def test_matmul_and_bias_before(bias_first: bool) -> None:
    """The canonical Linear: MatMul, then Add of a bias; the result is one of each."""
    add = helper.make_node("Add", ["b", "c"] if bias_first else ["c", "b"], ["d"])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["c"]), add, norm("d", "y")]
    m = model(nodes, {"x": ["n", 4]}, {"w": rng_array(4, 5), "b": rng_array(5, seed=3), **stats(5)})
    folded(m, {"x": rng_array(3, 4)})
    assert ops(m) == ["MatMul", "Add"]


def test_tokens_through_transposes() -> None:
    """BatchNorm1d over tokens: [B, S, C] transposed to [B, C, S] and back."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 1]),
        norm("d", "e"),
        helper.make_node("Transpose", ["e"], ["y"], perm=[0, 2, 1]),
    ]
    m = model(nodes, {"x": ["b", "s", 4]}, {"w": rng_array(4, 5), **stats(5)})
    folded(m, {"x": rng_array(2, 3, 4)})
    assert "BatchNormalization" not in ops(m)


def test_tokens_flattened_into_the_batch() -> None:
    """LeViT: [B, S, C] reshaped to [B*S, C], normalized, and reshaped back."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["c"]),
        helper.make_node("Reshape", ["c", "flat"], ["d"]),
        norm("d", "e"),
        helper.make_node("Reshape", ["e", "back"], ["y"]),
    ]
    constants = {"w": rng_array(4, 5), "flat": np.array([-1, 5]), "back": np.array([-1, 3, 5]), **stats(5)}
    m = model(nodes, {"x": ["b", 3, 4]}, constants)
    folded(m, {"x": rng_array(2, 3, 4)})
    assert ops(m) == ["MatMul", "Add", "Reshape", "Reshape"]


def test_channels_last_before_and_after() -> None:
    """The permutations between channels last and channels first are not their own inverses."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 3, 1, 2]),
        norm("d", "y"),
    ]
    m = model(nodes, {"x": [2, 3, 6, 4]}, {"w": rng_array(4, 5), **stats(5)})
    folded(m, {"x": rng_array(2, 3, 6, 4)})
    assert ops(m) == ["MatMul", "Add", "Transpose"]
    nodes = [
        norm("x", "n"),
        helper.make_node("Transpose", ["n"], ["d"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    m = model(nodes, {"x": [2, 4, 3, 6]}, {"w": rng_array(4, 5), **stats(4)})
    folded(m, {"x": rng_array(2, 4, 3, 6)})
    assert ops(m) == ["Transpose", "MatMul", "Add"]


@pytest.mark.parametrize("arithmetic", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("constant_first", [False, True])
def test_arithmetic_per_channel_is_folded_along(arithmetic: str, constant_first: bool) -> None:
    """On both sides of the map; a constant divided by x is no affine map and stays."""
    operands = ["k", "{}"] if constant_first else ["{}", "k"]
    linear = not (arithmetic == "Div" and constant_first)
    constants = {"w": rng_array(4, 4, 2, 2), "k": 0.5 + np.abs(rng_array(4, 1, 1, seed=9)), **stats(4)}
    before = helper.make_node(arithmetic, [o.format("c") for o in operands], ["d"])
    m = model([_conv("x", "c"), before, norm("d", "y")], IMAGE, constants)
    folded(m, {"x": rng_array(1, 4, 5, 5)}, count=int(linear))
    assert (ops(m) == ["Conv"]) == linear
    after = helper.make_node(arithmetic, [o.format("n") for o in operands], ["d"])
    m = model([norm("x", "n"), after, _conv("d", "y")], IMAGE, constants)
    folded(m, {"x": rng_array(1, 4, 5, 5)}, count=int(linear))
    assert (ops(m) == ["Conv"]) == linear


def test_two_norms_in_a_row_fold_both() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), norm("c", "d"), norm("d", "y", prefix="t")]
    constants = {"w": rng_array(4, 3, 3, 3), **stats(4), **{f"t{k}": v for k, v in stats(4, 7).items()}}
    m = model(nodes, {"x": [1, 3, 6, 6]}, constants)
    folded(m, {"x": rng_array(1, 3, 6, 6)}, count=2)
    assert ops(m) == ["Conv"]


def test_shared_weight_is_left_to_the_other_reader() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        norm("c", "y"),
        helper.make_node("Conv", ["x", "w"], ["z"]),
    ]
    m = model(nodes, {"x": [1, 3, 5, 5]}, {"w": rng_array(4, 3, 3, 3), **stats(4)}, outputs=("y", "z"))
    folded(m, {"x": rng_array(1, 3, 5, 5)})
    assert sorted(ops(m)) == ["Conv", "Conv"]
    np.testing.assert_array_equal(m.graph.initializers["w"].const_value.numpy(), rng_array(4, 3, 3, 3))


@settings(max_examples=20, deadline=None)
@given(group=st.sampled_from([1, 2]), kernel=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 1000))
def test_into_unpadded_conv_after(group: int, kernel: int, bias: bool, seed: int) -> None:
    """Rule 2 for Conv without padding."""
    constants = {"w": rng_array(6, 4 // group, kernel, kernel, seed=seed), **stats(4, seed)}
    if bias:
        constants["b"] = rng_array(6, seed=seed + 1)
    nodes = [norm("x", "n"), helper.make_node("Conv", ["n", "w"] + ["b"] * bias, ["y"], group=group)]
    m = model(nodes, {"x": [2, 4, 5, 5]}, constants)
    folded(m, {"x": rng_array(2, 4, 5, 5, seed=seed + 2)})
    assert ops(m) == ["Conv"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_into_gemm_after(transposed: int) -> None:
    constants = {"w": rng_array(5, 4) if transposed else rng_array(4, 5), "b": rng_array(5, seed=3), **stats(4)}
    gemm = helper.make_node("Gemm", ["n", "w", "b"], ["y"], transB=transposed, alpha=0.7, beta=1.3)
    m = model([norm("x", "n"), gemm], {"x": [3, 4]}, constants)
    folded(m, {"x": rng_array(3, 4)})
    assert ops(m) == ["Gemm"]


def test_into_matmul_after_keeps_one_bias() -> None:
    nodes = [norm("x", "n"), helper.make_node("MatMul", ["n", "w"], ["c"]), helper.make_node("Add", ["c", "b"], ["y"])]
    m = model(nodes, {"x": ["k", 4]}, {"w": rng_array(4, 5), "b": rng_array(5, seed=3), **stats(4)})
    folded(m, {"x": rng_array(3, 4)})
    assert ops(m) == ["MatMul", "Add"]


def test_into_all_readers_after() -> None:
    nodes = [
        norm("x", "n"),
        helper.make_node("Conv", ["n", "w"], ["y"]),
        helper.make_node("Conv", ["n", "u"], ["z"], strides=[2, 2]),
    ]
    constants = {"w": rng_array(6, 4, 3, 3), "u": rng_array(2, 4, 1, 1, seed=5), **stats(4)}
    m = model(nodes, {"x": [2, 4, 5, 5]}, constants, outputs=("y", "z"))
    folded(m, {"x": rng_array(2, 4, 5, 5)})
    assert ops(m) == ["Conv", "Conv"]


def test_pointwise_conv_transpose_after() -> None:
    """In ONNX Runtime: the reference evaluator cannot run grouped transposed convolutions."""
    text = """g (float[2,4,5,5] x, float[4,3,1,1] w, float[4] s, float[4] o, float[4] m, float[4] v)
        => (float[2,6,5,5] y)
        { n = BatchNormalization (x, s, o, m, v)
          y = ConvTranspose <group = 2> (n, w) }"""
    m = parse(text, {"w": floats(4, 3, 1, 1), **stats(4, dtype="float32")})
    feeds = {"x": floats(2, 4, 5, 5)}
    expected = run(m, feeds)[0]
    assert applied(apply(m, PASS), "fold") == 1
    assert ops(m) == ["ConvTranspose"]
    np.testing.assert_allclose(run(m, feeds)[0], expected, rtol=1e-5, atol=1e-5)


def test_zero_shift_goes_through_padding() -> None:
    constants = {"w": rng_array(6, 4, 3, 3), **stats(4), "o": np.zeros(4), "m": np.zeros(4)}
    nodes = [norm("x", "n"), helper.make_node("Conv", ["n", "w"], ["y"], pads=[1, 1, 1, 1])]
    m = model(nodes, {"x": [2, 4, 5, 5]}, constants)
    folded(m, {"x": rng_array(2, 4, 5, 5)})
    assert ops(m) == ["Conv"]


def _conv(x: str, y: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, "w"], [y], name=f"conv_{y}", **attributes)


IMAGE: dict[str, list[int | str]] = {"x": [1, 4, 5, 5]}
LEFT_ALONE = {
    "padded conv after": ([norm("x", "n"), _conv("n", "y", pads=[1, 1, 1, 1])], "pads its input with zeros"),
    "same padding": ([norm("x", "n"), _conv("n", "y", auto_pad="SAME_UPPER")], "pads its input with zeros"),
    "strided transpose": (
        [norm("x", "n"), helper.make_node("ConvTranspose", ["n", "w"], ["y"], strides=[2, 2])],
        "spreads a shift unevenly",
    ),
    "relu before": (
        [_conv("x", "c"), helper.make_node("Relu", ["c"], ["d"]), norm("d", "y")],
        "Relu is no linear map with a weight",
    ),
    "training": ([_conv("x", "c"), norm("c", "y", training_mode=1)], "training mode"),
    "read twice": (
        [_conv("x", "c"), norm("c", "d"), helper.make_node("Add", ["c", "d"], ["y"])],
        "conv_c is read elsewhere too",
    ),
    "one reader of two": (
        [norm("x", "n"), _conv("n", "c"), helper.make_node("Relu", ["n"], ["r"]),
         helper.make_node("ReduceSum", ["r"], ["q"]), helper.make_node("Add", ["c", "q"], ["y"])],
        "Relu is no linear map",
    ),
    "input": ([norm("x", "n"), helper.make_node("Relu", ["n"], ["y"])], "is no result of an operator"),
    "output": ([norm("x", "y")], "it is a graph output"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_a_reason(case: str) -> None:
    nodes, reason = LEFT_ALONE[case]
    if case == "training":
        nodes[1].output.extend(["rm", "rv"])
    m = model(nodes, IMAGE, {"w": rng_array(4, 4, 3, 3), **stats(4)})
    before = ops(m)
    remarks = apply(m, PASS)
    assert applied(remarks, "fold") == 0
    assert ops(m) == before
    assert len(missed(remarks)) == 1
    assert reason in missed(remarks)[0]
    assert all(r.concept == "batch_norm" for r in remarks)


def test_conv_that_is_a_graph_output_is_left() -> None:
    m = model([_conv("x", "c"), norm("c", "y")], IMAGE, {"w": rng_array(4, 4, 3, 3), **stats(4)}, outputs=("y", "c"))
    assert "graph output" in missed(apply(m, PASS))[0]
    assert ops(m) == ["Conv", "BatchNormalization"]


@pytest.mark.parametrize(("name", "reason"), [("w", "weight of Conv"), ("m", "mean")])
def test_overridable_initializer_is_no_constant(name: str, reason: str) -> None:
    constants = {"w": rng_array(4, 4, 3, 3), **stats(4)}
    m = model([_conv("x", "c"), norm("c", "y")], {**IMAGE, name: list(constants[name].shape)}, constants)
    assert f"{reason} is not constant" in missed(apply(m, PASS))[0]
    assert ops(m) == ["Conv", "BatchNormalization"]


def test_half_precision_overflow_is_refused() -> None:
    """A fold that would turn a weight into infinity in float16 is left."""
    constants = {k: v.astype(np.float16) for k, v in {"w": np.full((4, 4, 1, 1), 6e4), **stats(4)}.items()}
    constants["s"][:] = 100
    m = model([_conv("x", "c"), norm("c", "y")], IMAGE, constants, elem_type=onnx.TensorProto.FLOAT16)
    assert "overflows FLOAT16" in missed(apply(m, PASS))[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_in_onnxruntime(dtype: str) -> None:
    """Float32 and float16 weights keep their type."""
    kind = "float" if dtype == "float32" else "float16"
    text = f"""g ({kind}[1,3,8,8] x, {kind}[4,3,3,3] w, {kind}[4] s, {kind}[4] o, {kind}[4] m, {kind}[4] v)
        => ({kind}[1,4,8,8] y) {{
          c = Conv <pads = [1, 1, 1, 1]> (x, w)
          y = BatchNormalization (c, s, o, m, v) }}"""
    constants = {"w": floats(4, 3, 3, 3, dtype=dtype), **stats(4, dtype=dtype)}
    m = parse(text, constants)
    feeds = {"x": floats(1, 3, 8, 8, dtype=dtype)}
    expected = run(m, feeds)[0]
    assert applied(apply(m, PASS), "fold") == 1
    assert ops(m) == ["Conv"]
    assert m.graph[0].inputs[1].dtype == (ir.DataType.FLOAT if dtype == "float32" else ir.DataType.FLOAT16)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(run(m, feeds)[0], expected, rtol=tolerance, atol=tolerance)
