"""Which form of int8 a backend gets, and what is moved into weights before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import declared, parse

import xform
from xform.errors import UsageError, XformWarning
from xform.passes.integer import ApproximateGelu, QuantizeProducts, QuantizeStatic, ScaleChannels
from xform.passes.normalize import LayerWiseScales, MigrateScales
from xform.pipeline.calibration import activation_ranges
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import INT8
from xform.pipeline.quantization import Quantization, told
from xform.report.schema import PassReport
from xform.rewrite.remarks import Remark

RNG = np.random.default_rng(0)
CONVS = {
    "stem": (RNG.standard_normal((16, 3, 3, 3)) / 4).astype(np.float32),
    "depthwise": (RNG.standard_normal((16, 1, 3, 3)) / 2).astype(np.float32),
    "point": (RNG.standard_normal((64, 16, 1, 1)) / 4).astype(np.float32),
    "last": (RNG.standard_normal((16, 64, 1, 1)) / 8).astype(np.float32),
    "bias": RNG.standard_normal(64).astype(np.float32),
}
NET = """g (float[1,3,32,32] x) => (float[1,16,32,32] y) {
    a = Conv<pads=[1,1,1,1]>(x, stem) r = Relu(a)
    d = Conv<pads=[1,1,1,1], group=16>(r, depthwise) s = HardSwish(d)
    p = Conv(s, point, bias) t = Gelu(p) q = Conv(t, last) y = Add(q, d) }"""


def images(count: int = 3) -> list[dict[str, Any]]:
    return [{"x": np.random.default_rng(i).standard_normal((1, 3, 32, 32)).astype(np.float32)} for i in range(count)]


def net() -> ir.Model:
    """A block as mobile networks have it; its two pointwise convolutions pay, the others do not."""
    return parse(declared(NET, CONVS), CONVS)


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def quantization(model: ir.Model, batches: list[dict[str, Any]], quantizer: Any) -> Quantization:
    return Quantization([quantizer], lambda passes: run_pipeline(model, passes, verify="off").model, batches)


def test_each_backend_gets_its_form_with_what_was_asked_for() -> None:
    asked = QuantizeProducts(keep=("none",), weight_bits=8, max_error=0.5)
    found = quantization(net(), images(), asked)
    dynamic, static = found.form_for("onnxruntime"), found.form_for("openvino")
    assert (dynamic.name, static.name) == ("dynamic", "static")
    assert dynamic.passes == (ApproximateGelu("tanh"), asked)
    gelu, one = static.passes
    assert gelu == ApproximateGelu("polynomial")
    assert isinstance(one, QuantizeStatic) and one.ranges
    assert (one.keep, one.weight_bits, one.max_error) == (("none",), 8, 0.5)
    assert "static: 2 convolutions in int8" in static.remarks[-1].reason
    assert found.form_for("openvino") is static  # not searched for again


def test_a_static_pass_that_is_asked_for_by_name_is_calibrated_for_any_backend() -> None:
    names = [name if name != "quantize_products" else "quantize_static" for name in INT8]
    result = xform.optimize(net(), passes=names, calibration=images(), backend="onnxruntime")
    assert result.artifact.metadata["operators"]["QuantizeLinear"] == 2
    x = images(9)[8]
    assert 0 < relative(result(x)["y"], xform.optimize(net())(x)["y"]) < 0.05


def test_patch_embeddings_are_products_in_the_dynamic_form_alone() -> None:
    pytest.importorskip("openvino")
    used = {
        "w": (RNG.standard_normal((64, 3, 16, 16)) / 16).astype(np.float32),
        "b": RNG.standard_normal(64).astype(np.float32),
        "s": np.array([0, 64, -1]),
    }
    text = """g (float[1,3,32,32] x) => (float[1,4,64] t) {
        c = Conv<strides=[16,16]>(x, w, b) y = Reshape(c, s) t = Transpose<perm=[0,2,1]>(y) }"""
    x = images(9)[8]
    exact = xform.optimize(parse(declared(text, used), used))(x)["t"]
    for backend, integer in (("onnxruntime", "MatMulInteger"), ("openvino", "Conv")):
        model = parse(declared(text, used), used)
        result = xform.optimize(model, preset="int8", calibration=images(), backend=backend)
        operators = result.artifact.metadata["operators"]
        assert operators[integer] == operators["Transpose"] == 1, operators
        assert ("Conv" in operators) == (backend == "openvino")
        assert 0 < relative(result(x)["t"], exact) < 0.025


def test_openvino_runs_the_static_form_within_the_bound() -> None:
    pytest.importorskip("openvino")
    result = xform.optimize(net(), preset="int8", calibration=images(), backend="openvino")
    operators = result.artifact.metadata["operators"]
    assert operators["QuantizeLinear"] == 2 and operators["Conv"] == 4
    x = images(9)[8]
    assert 0 < relative(result(x)["y"], xform.optimize(net())(x)["y"]) < 0.04
    assert "groups of 1 input channels do not pay" in result.explain("int8")
    kernels = compiled_kernels(result)
    assert sum("i8" in kernel.lower() for kernel in kernels) == 2, kernels


def compiled_kernels(result: Any) -> list[str]:
    """Names of the kernels that OpenVINO chose for the convolutions."""
    from xform.backends.openvino.compile import compile_model

    compiled = compile_model(result.artifact.model, {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return [info["primitiveType"].astype(str) for info in nodes if info["layerType"].astype(str) == "Convolution"]


def test_the_measured_choice_reports_the_form_that_won(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pytest.importorskip("openvino")
    from xform.pipeline import tune
    from xform.report.latency import Timing

    def clock(subjects: Any, feeds: Any, **options: Any) -> list[Timing]:
        fast = {"openvino": 1.0, "onnxruntime": 2.0}
        return [Timing(s.model, (fast[s.backend],) * 3, 3, 1.0) for s in subjects]

    monkeypatch.setenv("XFORM_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "measure", clock)
    result = xform.optimize(net(), preset="int8", calibration=images(), tune="quick")
    assert result.report.backend == "openvino"
    assert set(result.report.artifact["tuning"]["milliseconds"]) == {
        "onnxruntime", "openvino", "onnxruntime, float", "openvino, float", "input",
    }  # fmt: skip
    assert "static: 2 convolutions" in result.explain("int8") and "dynamic" not in result.explain("int8")
    assert result.report.verification.passed


WIDTH = 96
OUTLIERS = np.where(np.arange(WIDTH) % 48 == 5, 80.0, 1.0).astype(np.float32)


def normed(residual: bool) -> tuple[ir.Model, list[dict[str, Any]]]:
    """A norm with two channels that stand out, and a product that reads it; the sum reads the norm too, or does not."""
    weight = (RNG.standard_normal((WIDTH, WIDTH)) / 10 / OUTLIERS[:, None]).astype(np.float32)
    constants = {"w": weight, "g": OUTLIERS, "c": np.zeros(WIDTH, np.float32), "h": (1 / OUTLIERS).astype(np.float32)}
    after = "k = Mul(n, h) y = Add(m, k)" if residual else "y = Tanh(m)"
    text = f"""g (float[4,8,{WIDTH}] x) => (float[4,8,{WIDTH}] y) {{
        n = LayerNormalization(x, g, c) m = MatMul(n, w) {after} }}"""
    model = parse(declared(text, constants), constants)
    return model, [{"x": RNG.standard_normal((4, 8, WIDTH)).astype(np.float32)} for _ in range(2)]


@pytest.mark.parametrize(("residual", "kind"), [(False, MigrateScales | LayerWiseScales), (True, ScaleChannels)])
def test_outliers_move_into_weights_by_the_norm_where_it_can_else_by_factors(residual: bool, kind: Any) -> None:
    model, batches = normed(residual)
    found = quantization(model, batches, QuantizeProducts(max_error=0.02)).form_for("onnxruntime")
    moved, quantizer = found.passes
    assert isinstance(moved, kind)
    assert isinstance(quantizer, QuantizeProducts) and quantizer.keep == ()
    told = found.remarks[0]
    assert told.verdict == "applied" and "as it is" in told.reason


def test_nothing_is_moved_where_the_bound_holds() -> None:
    model, batches = normed(True)
    found = quantization(model, batches, QuantizeProducts(max_error=1.0)).form_for("onnxruntime")
    assert len(found.passes) == 1 and len(found.remarks) == 1


def test_scales_per_row_are_where_they_spare_more_than_a_share_of_the_bound() -> None:
    """Of two products side by side, the second reads rows of different sizes, and its result is divided again."""
    constants = {name: (RNG.standard_normal((WIDTH, WIDTH)) / 10).astype(np.float32) for name in ("v", "w")}
    text = f"""g (float[1,16,{WIDTH}] x, float[1,16,1] size) => (float[1,16,{WIDTH}] y) {{
        a = Tanh(x) p = MatMul(a, v) b = Mul(a, size) q = MatMul(b, w) r = Div(q, size) y = Add(p, r) }}"""
    model = parse(declared(text, constants), constants)
    for node, name in zip((n for n in model.graph if n.op_type == "MatMul"), ("even", "uneven"), strict=True):
        node.name = name
    sizes = np.where(np.arange(16) % 5 == 2, 200.0, 1.0).astype(np.float32).reshape(1, 16, 1)
    batches = [{"x": RNG.standard_normal((1, 16, WIDTH)).astype(np.float32), "size": sizes} for _ in range(2)]
    found = quantization(model, batches, QuantizeProducts(max_error=0.03)).form_for("onnxruntime")
    quantizer = found.passes[-1]
    assert isinstance(quantizer, QuantizeProducts)
    assert (quantizer.row_scaled, quantizer.keep) == (("uneven",), ())
    assert "scales per row in 1 products" in found.remarks[0].reason


def uneven(width: int = 256) -> tuple[ir.Model, list[dict[str, Any]]]:
    """Tokens of very different sizes, a product, and tokens of one size again."""
    constants = {"w": (RNG.standard_normal((width, width)) / 16).astype(np.float32)}
    text = f"""g (float[1,64,{width}] x, float[1,64,1] size) => (float[1,64,{width}] y) {{
        b = Mul(x, size) m = MatMul(b, w) y = Div(m, size) }}"""
    sizes = np.where(np.arange(64) % 5 == 2, 200.0, 1.0).astype(np.float32).reshape(1, 64, 1)
    batches = [{"x": RNG.standard_normal((1, 64, width)).astype(np.float32), "size": sizes} for _ in range(2)]
    return parse(declared(text, constants), constants), batches


@pytest.mark.parametrize(
    ("instructions", "max_error", "products"),
    [(True, 0.025, "grouped"), (True, 10.0, "static"), (False, 0.025, "float")],
)
def test_products_on_openvino_have_groups_where_static_scales_are_too_far_off(
    instructions: bool, max_error: float, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xform.pipeline import quantization as module

    monkeypatch.setattr(module, "dot_product_instructions", lambda: instructions)
    model, batches = uneven()
    found = quantization(model, batches, QuantizeProducts(max_error=max_error)).form_for("openvino")
    quantizer = found.passes[-1]
    assert isinstance(quantizer, QuantizeStatic)
    assert (quantizer.products, quantizer.keep) == (products, ())
    if products == "grouped":
        assert quantizer.group == 256  # rows alone differ here, so the widest group does
        assert "groups of 256 channels" in found.remarks[0].reason
        assert "1 products in int8" in found.remarks[-1].reason


def test_finer_groups_and_compensated_weights_come_before_products_return_to_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xform.pipeline import quantization as module

    monkeypatch.setattr(module, "dot_product_instructions", lambda: True)
    model, batches = uneven()
    for batch in batches:
        batch["x"][..., 17] *= 300  # a channel that takes the resolution of its group
    found = quantization(model, batches, QuantizeProducts(max_error=1e-4)).form_for("openvino")
    quantizer = found.passes[-1]
    assert isinstance(quantizer, QuantizeStatic) and quantizer.products == "grouped" and quantizer.group < 256
    told = found.remarks[0].reason
    assert "groups of 128 channels" in told and "rounding with compensation" in told
    assert len(quantizer.keep) == 1  # no form of int8 is as close as that


@pytest.mark.parametrize(("operations", "measured"), [(1e18, 5), (0, 2), (3.5, 3)])
def test_errors_are_measured_on_as_many_batches_as_one_can_afford(
    operations: float, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xform.graph.count import count
    from xform.pipeline import quantization as module

    monkeypatch.setattr(module, "_OPERATIONS", operations * count(net()).flops if operations < 10 else operations)
    found = quantization(net(), images(5), QuantizeStatic())
    assert len(found._plain.batches) == measured
    (one,) = found.form_for("openvino").passes
    seen = activation_ranges(found.exact, images(5))
    assert isinstance(one, QuantizeStatic) and one.ranges == seen  # ranges are of all batches


def test_what_was_found_for_a_pass_that_is_rolled_back_is_not_told_as_done() -> None:
    found = Remark("quantize_static", "sensitivity", "applied", (), "static: 13 products in int8", "int8")
    other = Remark("raise_gelu", "erf", "applied", (), "", "gelu")
    undone = PassReport("quantize_static", "approximate", "rolled_back", reason="output y differs")
    told_of, untouched = told([found, other], [undone])
    assert (told_of.verdict, untouched) == ("rolled_back", other)
    assert "not in the result" in told_of.reason and "13 products" in told_of.reason
    assert told([found], [PassReport("quantize_static", "approximate", "changed")]) == [found]
    assert told([found], [], ["quantize_static"])[0].verdict == "rolled_back"


def test_explain_says_what_the_result_has_where_int8_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    w = {f"w{i}": (rng.normal(size=(64, 64)) / 8).astype(np.float32) for i in range(2)}
    model = parse(
        "g (float[n,64] x, float[64,64] w0, float[64,64] w1) => (float[n,64] y) { a = MatMul(x, w0) r = Gelu(a) "
        "y = MatMul(r, w1) }",
        w,
    )
    given = [{"x": rng.normal(size=(8, 64)).astype(np.float32)}]
    with pytest.warns(XformWarning, match="rolled back"):
        result = xform.optimize(
            model, preset="int8", calibration=given, inputs=given, passes=[QuantizeProducts(smallest=0)], tolerance=1e-6
        )
    text = result.explain("int8")
    assert "int8: 0 in the result" in text and "done" not in text and "2 products in int8" in text


def test_calibration_data_that_the_model_does_not_run_on_is_a_usage_error() -> None:
    text = "g (float[n,64] x, float[m,64] z, float[64,64] w) => (float[n,64] y) { s = Add(x, z) y = MatMul(s, w) }"
    rng = np.random.default_rng(9)
    model = parse(text, {"w": rng.normal(size=(64, 64)).astype(np.float32)})
    sizes = {name: rng.normal(size=(rows, 64)).astype(np.float32) for name, rows in (("x", 3), ("z", 5))}
    with pytest.raises(UsageError, match="does not run on the calibration data"):
        Quantization([QuantizeProducts()], lambda passes: model, [sizes])
