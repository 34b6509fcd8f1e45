"""Norms, activations, rotary embeddings, linear layers, residual sums: numbers, forms, and what is fused at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.errors import TargetError, UsageError
from xform.graph.clone import SOURCE_OPSET
from xform.graph.shapes import infer_shapes
from xform.target import Target

CPU = Target("cpu")
RNG = np.random.default_rng(0)


def parse(text: str, source_opset: int, opset: int = 23, **constants: Any) -> ir.Model:
    """A model of the graph's opset that remembers another source opset."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    for name, data in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(data), name))
    model = ir.from_proto(proto)
    infer_shapes(model)
    model.meta[SOURCE_OPSET] = source_opset
    return model


def run(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    """Outputs in ONNX Runtime without its graph optimizations: the reference."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return list(ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds))


def lower_and_compare(model: ir.Model, feeds: dict[str, Any], tolerance: float = 1e-5, **options: Any) -> ir.Model:
    """The lowered model, after comparing its numbers, loaded as users load it, with the reference's."""
    expected = run(model, feeds)
    backend = get_backend(None, CPU)
    before = ir.to_onnx_text(model)
    artifact = backend.lower(model, CPU, LowerOptions(**options))
    assert ir.to_onnx_text(model) == before
    runner = backend.load(artifact, LoadOptions(threads=1))
    for actual, wanted in zip(runner.run(feeds), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)
    runner.close()
    result: ir.Model = artifact.model  # type: ignore[attr-defined]
    onnx.checker.check_model(ir.to_proto(result))
    return result


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def fused(model: ir.Model, folder: Path) -> list[str]:
    """Operators of the graph that ONNX Runtime executes after its own fusions."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


GELU = "g (float[b,8] x) => (float[b,8] z) { r = Relu(x) y = Gelu<approximate = %s>(r) z = Neg(y) }"


@pytest.mark.parametrize(("approximate", "kernel"), [('"none"', "Gelu"), ('"tanh"', "FastGelu")])
def test_gelu_below_opset_20_is_spelled_so_that_it_is_fused(approximate: str, kernel: str, tmp_path: Path) -> None:
    model = parse(GELU % approximate, source_opset=17)
    feeds = {"x": 3 * RNG.standard_normal((4, 8)).astype(np.float32)}
    result = lower_and_compare(model, feeds)
    assert "Gelu" not in operators(result) and result.opset_imports[""] == 17
    assert fused(result, tmp_path) == ["Relu", kernel, "Neg"]


def test_gelu_stays_where_the_source_has_it() -> None:
    model = parse(GELU % '"none"', source_opset=20)
    result = lower_and_compare(model, {"x": RNG.standard_normal((4, 8)).astype(np.float32)})
    assert operators(result) == ["Relu", "Gelu", "Neg"] and result.opset_imports[""] == 20


RMS = """g (float[b,s,8] x) => (float[b,s,8] z) {
    r = Neg(x)
    y = RMSNormalization<axis = %d, epsilon = 1e-3>(r, w)
    z = Neg(y)
}"""


@pytest.mark.parametrize(("axis", "shape"), [(-1, (8,)), (2, (8,))])
def test_rms_normalization_below_opset_23_is_spelled_so_that_it_is_fused(
    axis: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = parse(RMS % axis, source_opset=17, w=1 + RNG.standard_normal(shape).astype(np.float32))
    result = lower_and_compare(model, {"x": RNG.standard_normal((2, 5, 8)).astype(np.float32)})
    assert "RMSNormalization" not in operators(result) and result.opset_imports[""] == 17
    assert "SimplifiedLayerNormalization" in fused(result, tmp_path)


def test_rms_normalization_over_two_axes_of_a_half_precision_input() -> None:
    text = """g (float16[b,5,8] x) => (float16[b,5,8] y) { y = RMSNormalization<axis = 1>(x, w) }"""
    weights = (1 + RNG.standard_normal((5, 8))).astype(np.float16)
    model = parse(text, source_opset=18, w=weights)
    x = (100 * RNG.standard_normal((2, 5, 8))).astype(np.float16)  # squares overflow half precision
    result = lower_and_compare(model, {"x": x}, tolerance=2e-2)
    assert "RMSNormalization" not in operators(result)


LAYER = """g (float[b,s,8] x) => (float[b,s,8] y, float[b,s,1] m, float[b,s,1] d) {
    y, m, d = LayerNormalization<axis = -1, epsilon = 1e-3>(x, w, c)
}"""


def layer_norm() -> tuple[ir.Model, dict[str, Any]]:
    w, c = (RNG.standard_normal(8).astype(np.float32) for _ in range(2))
    feeds = {"x": (2 + RNG.standard_normal((2, 5, 8))).astype(np.float32)}
    return parse(LAYER, source_opset=13, w=w, c=c), feeds


def test_layer_normalization_is_worth_opset_17() -> None:
    model, feeds = layer_norm()
    result = lower_and_compare(model, feeds)
    assert operators(result) == ["LayerNormalization"] and result.opset_imports[""] == 17


@pytest.mark.parametrize("options", [{"opset": 13}, {"portable": True}])
def test_layer_normalization_is_written_out_where_the_opset_is_asked_for(options: dict[str, Any]) -> None:
    model, feeds = layer_norm()
    result = lower_and_compare(model, feeds, **options)
    assert "LayerNormalization" not in operators(result) and result.opset_imports[""] == 13


ROTARY = """g (float[b,4,s,16] x, float[b,s,%d] c, float[b,s,%d] d) => (float[b,4,s,16] y) {
    y = RotaryEmbedding<interleaved = %d, rotary_embedding_dim = %d>(x, c, d)
}"""


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("size", [0, 8])
def test_rotary_embedding_written_out_agrees(interleaved: int, size: int) -> None:
    half = (size or 16) // 2
    model = parse(ROTARY % (half, half, interleaved, size), source_opset=17)
    angles = RNG.standard_normal((2, 5, half)).astype(np.float32)
    feeds = {"x": RNG.standard_normal((2, 4, 5, 16)).astype(np.float32), "c": np.cos(angles), "d": np.sin(angles)}
    result = lower_and_compare(model, feeds, opset=17)
    assert "RotaryEmbedding" not in operators(result) and result.opset_imports[""] == 17
    assert operators(lower_and_compare(model, feeds)) == ["RotaryEmbedding"]  # its kernel is worth opset 23


def test_rotary_embedding_with_position_ids_written_out_agrees() -> None:
    text = """g (float[b,4,s,16] x, float[9,8] c, float[9,8] d, int64[b,s] p) => (float[b,4,s,16] y) {
        y = RotaryEmbedding(x, c, d, p)
    }"""
    angles = RNG.standard_normal((9, 8)).astype(np.float32)
    feeds: dict[str, Any] = {"x": RNG.standard_normal((2, 4, 5, 16)).astype(np.float32)}
    feeds |= {"c": np.cos(angles), "d": np.sin(angles), "p": RNG.integers(0, 9, (2, 5))}
    result = lower_and_compare(parse(text, source_opset=17), feeds, opset=17)
    assert "RotaryEmbedding" not in operators(result)


@pytest.mark.parametrize("alpha", [1.0, 1.7])
def test_swish_becomes_a_gated_product(alpha: float, tmp_path: Path) -> None:
    text = f"g (float[b,8] x) => (float[b,8] z) {{ r = Neg(x) y = Swish<alpha = {alpha}>(r) z = Neg(y) }}"
    model = parse(text, source_opset=24, opset=24)
    result = lower_and_compare(model, {"x": RNG.standard_normal((4, 8)).astype(np.float32)})
    assert "Swish" not in operators(result)
    assert fused(result, tmp_path) == ["Neg", "QuickGelu", "Neg"]


LINEAR = "g (float[%s] x) => (float[%s] y) { m = MatMul(x, w) y = Add(%s) }"


@pytest.mark.parametrize("order", ["m, c", "c, m"])
@pytest.mark.parametrize("bias_shape", [(6,), (1, 6)])
def test_linear_of_a_matrix_becomes_one_gemm(order: str, bias_shape: tuple[int, ...]) -> None:
    w, c = (RNG.standard_normal(s).astype(np.float32) for s in ((8, 6), bias_shape))
    model = parse(LINEAR % ("b,8", "b,6", order), source_opset=13, w=w, c=c)
    assert operators(lower_and_compare(model, {"x": RNG.standard_normal((4, 8)).astype(np.float32)})) == ["Gemm"]


@pytest.mark.parametrize(
    ("x", "y", "bias", "dtype"),
    [
        ("b,s,8", "b,s,6", (6,), np.float32),  # rank 3: MatMul and Add take the time of one Gemm
        ("4,8", "4,6", (4, 1), np.float32),  # broadcasts along rows, as Gemm allows but for no gain
        ("4,8", "2,4,6", (2, 1, 6), np.float32),  # the sum has a rank that Gemm cannot give
    ],
)
def test_other_products_and_sums_stay(x: str, y: str, bias: tuple[int, ...], dtype: Any) -> None:
    w, c = (RNG.standard_normal(s).astype(dtype) for s in ((8, 6), bias))
    model = parse(LINEAR % (x, y, "m, c"), source_opset=13, w=w, c=c)
    shape = (2, 4, 8) if "s" in x else (4, 8)
    result = lower_and_compare(model, {"x": RNG.standard_normal(shape).astype(np.float32)})
    assert operators(result) == ["MatMul", "Add"]


def test_a_product_that_others_read_stays() -> None:
    text = "g (float[b,8] x) => (float[b,6] y, float[b,6] m) { m = MatMul(x, w) y = Add(m, c) }"
    w, c = (RNG.standard_normal(s).astype(np.float32) for s in ((8, 6), (6,)))
    result = lower_and_compare(parse(text, 13, w=w, c=c), {"x": RNG.standard_normal((4, 8)).astype(np.float32)})
    assert operators(result) == ["MatMul", "Add"]


RESIDUAL = """g (float[2,5,8] x, float[2,5,8] skip) => (float[2,5,8] y) {
    sum = Add(x, skip)
    y = LayerNormalization(sum, w, c)
}"""


def test_a_residual_sum_escapes_the_slow_fusion(tmp_path: Path) -> None:
    w, c = (RNG.standard_normal(8).astype(np.float32) for _ in range(2))
    model = parse(RESIDUAL, source_opset=17, w=w, c=c)
    feeds = {name: RNG.standard_normal((2, 5, 8)).astype(np.float32) for name in ("x", "skip")}
    assert fused(model, tmp_path) == ["SkipLayerNormalization"]
    assert fused(lower_and_compare(model, feeds), tmp_path) == ["Sum", "LayerNormalization"]
    assert operators(lower_and_compare(model, feeds, portable=True)) == ["Add", "LayerNormalization"]


def test_names_of_the_interface_and_dynamic_dims_are_kept() -> None:
    model, _ = layer_norm()
    artifact = get_backend(None, CPU).lower(model, CPU, LowerOptions(opset=13))
    graph = artifact.model.graph  # type: ignore[attr-defined]
    assert [str(v.shape) for v in graph.inputs] == ["[b,s,8]"]
    assert [v.name for v in graph.outputs] == ["y", "m", "d"]


def test_weights_are_shared_not_copied() -> None:
    weights = RNG.standard_normal((64, 64)).astype(np.float32)
    text = "g (float[b,64] x) => (float[b,64] y) { m = MatMul(x, w) y = Add(m, c) }"
    model = parse(text, 17, w=weights, c=np.ones(64, np.float32))
    artifact = get_backend(None, CPU).lower(model, CPU, LowerOptions())
    lowered = artifact.model.graph.initializers["w"].const_value  # type: ignore[attr-defined]
    assert lowered is model.graph.initializers["w"].const_value


def test_torch_operators_are_refused_by_name() -> None:
    text = "g (float[b,8] x) => (float[b,8] y) { [solve] y = torch.linalg_solve(x, x) }"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "torch" : 1]> {text}')
    with pytest.raises(TargetError, match=r"linalg_solve[\s\S]*solve") as error:
        get_backend(None, CPU).lower(ir.from_proto(proto), CPU, LowerOptions())
    assert error.value.exit_code == 7 and error.value.where == ("solve",)


@pytest.mark.parametrize("opset", [3, 99])
def test_an_opset_that_cannot_be_written_is_refused(opset: int) -> None:
    model, _ = layer_norm()
    with pytest.raises(UsageError, match=str(opset)):
        get_backend(None, CPU).lower(model, CPU, LowerOptions(opset=opset))


def test_rms_normalization_in_float64_keeps_its_epsilon() -> None:
    """ONNX Runtime's own fusion of the usual spelling takes another epsilon in float64."""
    text = """g (double[2,8] x) => (double[2,8] y) { y = RMSNormalization<epsilon = 1e-3, stash_type = 11>(x, w) }"""
    rng = np.random.default_rng(3)
    model = parse(text, source_opset=18, w=1 + rng.standard_normal(8))
    result = lower_and_compare(model, {"x": 0.1 * rng.standard_normal((2, 8))}, tolerance=1e-12)
    assert "RMSNormalization" not in operators(result)
