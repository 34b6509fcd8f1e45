"""The int8 preset: what stays in float, and where calibration data comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import parse

import xform
from xform.errors import UsageError, XformWarning
from xform.passes.integer import QuantizeProducts
from xform.pipeline.calibration_data import MAX_BATCHES, RANDOM_BATCHES, calibration_batches
from xform.pipeline.sensitivity import Trial, _without_pads, relative_error, search

RNG = np.random.default_rng(0)
W = {f"w{i}": (RNG.standard_normal((96, 96)) / 10).astype(np.float32) for i in range(3)}
GRAPH = """g (float[b,96] x, float[96,96] w0, float[96,96] w1, float[96,96] w2) => (float[b,96] y) {
    a = MatMul(x, w0) r = Tanh(a) s = MatMul(r, w1) t = Mul(s, gain) y = MatMul(t, w2)
}"""


def chain() -> ir.Model:
    """Three products; the second reads rows of very different sizes, which one scale for the tensor serves badly."""
    gain = np.ones(96, np.float32)
    gain[7] = 3000.0
    weights = {k: v.copy() for k, v in W.items()}
    weights["w2"][7] /= 3000.0
    model = parse(GRAPH.replace("w2)", "w2, float[96] gain)", 1), {**weights, "gain": gain})
    for node, name in zip((n for n in model.graph if n.op_type == "MatMul"), ("first", "second", "third"), strict=True):
        node.name = name
    return model


def batches(count: int = 2) -> list[dict[str, Any]]:
    return [{"x": np.random.default_rng(i).standard_normal((8, 96)).astype(np.float32)} for i in range(count)]


def found_for(**options: Any) -> Any:
    return search(Trial(chain(), batches()), QuantizeProducts(**options))


def test_the_product_that_hurts_returns_to_float() -> None:
    found = found_for(weight_bits=7, max_error=0.05)
    assert found.chosen.keep == ("third",) and found.quantized == {"Conv": 0, "MatMul": 2}
    assert found.error <= 0.05 < found.error_before
    assert found.parts["third",] > found.parts["second",] and "first" not in [part[0] for part in found.parts][2:]
    assert "2 products in int8, 1 kept in float" in found.describe()


def test_nothing_is_tried_alone_where_the_bound_holds_at_once() -> None:
    found = found_for(weight_bits=7, max_error=1e6)
    assert (found.chosen.keep, found.quantized["MatMul"], found.parts) == ((), 3, {})


class Invented(Trial):
    """Errors by what is in int8, in place of runs."""

    def __init__(
        self,
        errors: dict[str, float],
        amplified: float = 1.0,
        sizes: dict[str, int] | None = None,
        units: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        self.errors = errors
        self.sizes = sizes or {}
        self.amplified = amplified
        self.units = units
        self.measured = 0

    def error(self, candidate: Any, count: int | None = None) -> float:
        self.measured += 1
        inside = [error for name, error in self.errors.items() if name not in candidate.keep]
        return float(sum(e**2 for e in inside) ** 0.5) * (self.amplified if len(inside) > 1 else 1.0)

    def quantized(self, candidate: Any) -> dict[str, str]:
        return dict.fromkeys(self.errors, "MatMul")

    def operations(self, names: Any) -> dict[str, int]:
        return {name: self.sizes.get(name, 1) for name in names}

    def together(self) -> list[tuple[str, ...]]:
        return list(self.units)


def test_a_few_bad_ones_among_many_are_found_in_few_measurements() -> None:
    trial = Invented({f"n{i}": 1.0 if i in (17, 70) else 0.001 for i in range(100)})
    found = search(trial, QuantizeProducts(max_error=0.1))
    assert set(found.chosen.keep) == {"n17", "n70"} and found.error < 0.1
    assert trial.measured < 35  # not one for each


@pytest.mark.parametrize("amplified", [1.0, 1.7, 4.0])
def test_the_bound_holds_and_no_more_than_needed_returns_to_float(amplified: float) -> None:
    trial = Invented({f"n{i}": 0.01 * (i + 1) for i in range(20)}, amplified)
    found = search(trial, QuantizeProducts(max_error=0.3))
    assert found.error <= 0.3 < found.error_before
    worst = [f"n{i}" for i in range(19, 19 - len(found.chosen.keep), -1)]
    assert set(found.chosen.keep) == set(worst)
    assert trial.error(QuantizeProducts(keep=tuple(worst[:-1]))) > 0.3


def test_of_products_that_hurt_alike_the_smaller_ones_return_to_float() -> None:
    trial = Invented({f"n{i}": 1.0 for i in range(12)}, sizes={f"n{i}": 400 for i in range(12) if i not in (3, 8)})
    found = search(trial, QuantizeProducts(max_error=10**0.5))
    assert set(found.chosen.keep) == {"n3", "n8"}


def test_projections_of_an_attention_return_together() -> None:
    units = tuple((f"q{i}", f"k{i}", f"v{i}") for i in range(3))
    errors = {name: 1.0 for i, unit in enumerate(units) for name in (*unit, f"o{i}")}
    trial = Invented(errors | {"k1": 3.0}, units=units)
    found = search(trial, QuantizeProducts(max_error=3.0))
    assert found.chosen.keep == units[1] and found.error == 3.0


def test_operations_are_counted_at_the_sizes_of_the_data() -> None:
    model = parse(
        """g (float[b,96] x, float[96,96] w0, float[96,96] w1, int64[1] axes) => (float[b,96] y, float[1,96] z) {
        y = MatMul(x, w0) m = ReduceMax(x, axes) z = MatMul(m, w1) }""",
        {"w0": W["w0"], "w1": W["w1"], "axes": np.array([0])},
    )
    for node, name in zip((n for n in model.graph if n.op_type == "MatMul"), ("all", "one"), strict=True):
        node.name = name
    assert Trial(model, batches()).operations({"all", "one"}) == {"all": 2 * 8 * 96 * 96, "one": 2 * 96 * 96}


def test_what_was_kept_before_stays_kept() -> None:
    found = found_for(weight_bits=7, max_error=0.05, keep=("first",))
    assert found.chosen.keep == ("first", "third") and found.quantized["MatMul"] == 1


def test_rows_of_pads_do_not_count() -> None:
    outputs, mask = {"y": np.ones((2, 3, 4)), "pooled": np.ones((2, 4))}, np.array([[1, 1, 0], [1, 0, 0]])
    found = _without_pads(outputs, mask)
    assert found["y"].sum() == 3 * 4 and found["pooled"].sum() == 8
    assert _without_pads(outputs, None)["y"].sum() == 24


def test_an_impossible_bound_keeps_everything_in_float() -> None:
    found = found_for(max_error=0.0)
    assert found.quantized["MatMul"] == 0 and found.error == 0.0
    assert "nothing in int8, 3 kept in float" in found.describe()


def test_relative_error_is_over_all_batches_and_sees_what_is_not_finite() -> None:
    one, off = {"y": np.array([3.0, 4.0])}, {"y": np.array([3.0, 4.5])}
    assert relative_error([one, off], [one, one]) == pytest.approx(0.5 / np.sqrt(50))
    assert relative_error([{"y": np.array([np.nan, 4.0])}], [one]) == float("inf")


def test_the_preset_reports_what_it_did() -> None:
    result = xform.optimize(chain(), preset="int8", calibration=batches(), backend="onnxruntime")
    operators = result.artifact.metadata["operators"]
    assert operators["MatMulInteger"] == 2
    assert "2 products in int8; relative error" in result.explain("int8")
    assert not any("RANDOM" in warning for warning in result.report.warnings)
    x = batches(5)[4]["x"]
    exact = xform.optimize(chain())({"x": x})["y"]
    assert 0 < np.linalg.norm(result({"x": x})["y"] - exact) / np.linalg.norm(exact) < 0.2


@pytest.mark.filterwarnings("ignore:CALIBRATED ON RANDOM DATA")
def test_without_data_it_says_loudly_that_it_calibrated_on_random_numbers() -> None:
    result = xform.optimize(chain(), preset="int8")
    assert any(warning.startswith("CALIBRATED ON RANDOM DATA") for warning in result.report.warnings)


def test_a_module_takes_samples_in_its_own_form() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.GELU(), torch.nn.Linear(128, 96)).eval()
    samples = [torch.randn(4, 96) for _ in range(3)]
    fast = xform.optimize(module, preset="int8", inputs=samples[0], calibration=samples)
    assert fast.artifact.metadata["operators"]["MatMulInteger"] == 2
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(fast(samples[1]), module(samples[1])).min() > 0.99


SMALL = """g (float[b,40] x, float[40,50] w0, float[50,4] w1) => (float[b,4] y) {
    a = MatMul(x, w0) r = Tanh(a) y = MatMul(r, w1)
}"""


def small_products() -> ir.Model:
    rng = np.random.default_rng(3)
    return parse(SMALL, {n: rng.standard_normal(s).astype(np.float32) for n, s in (("w0", (40, 50)), ("w1", (50, 4)))})


def test_where_nothing_is_in_int8_a_warning_says_so_with_every_reason_and_the_option() -> None:
    samples = [{"x": np.random.default_rng(4).standard_normal((8, 40)).astype(np.float32)}]
    with pytest.warns(xform.XformWarning, match="nothing in the result is in int8") as caught:
        result = xform.optimize(small_products(), preset="int8", calibration=samples)
    (told,) = (str(one.message) for one in caught)
    assert "40 x 50 is too small to pay: fewer than 8,192 numbers (quantize_products.smallest)" in told
    assert "50 x 4 is too small to pay: it has fewer than 32 rows or columns" in told
    assert told in result.report.warnings and "int8" not in result.report.concepts
    (search_told,) = (r for r in result.report.remarks if r.rule == "sensitivity")
    assert search_told.verdict == "missed" and search_told.reason == "dynamic: nothing in int8"
    forced = xform.optimize(small_products(), passes=[QuantizeProducts(smallest=1)], calibration=samples)
    assert forced.report.concepts["int8"] == 1 and not forced.report.warnings


def test_convolutions_that_the_form_leaves_in_float_are_told() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(xform.XformWarning, match="convolutions have no int8 form .* backend openvino"):
        xform.optimize(net, preset="int8", calibration=[x], inputs=x)


def test_what_int8_is_told_about_is_told_once() -> None:
    with pytest.warns(xform.XformWarning) as caught:
        xform.optimize(chain(), preset="int8")
    assert len([one for one in caught if "RANDOM" in str(one.message)]) == 1


def test_ranges_are_compared_on_calibration_data_where_no_inputs_are_given() -> None:
    """Random numbers lie outside of ranges that were measured on [0, 0.1], so static int8 would be rolled back."""
    rng = np.random.default_rng(5)
    weights = {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "k": rng.standard_normal((8, 8, 3, 3)).astype(np.float32),
    }
    graph = """g (float[batch,3,32,32] x, float[8,3,3,3] w, float[8,8,3,3] k) => (float[batch,8,28,28] y) {
        a = Conv(x, w) r = Relu(a) y = Conv(r, k)
    }"""
    samples = [{"x": rng.random((20, 3, 32, 32)).astype(np.float32) / 10}]
    fast = xform.optimize(parse(graph, weights), preset="int8", calibration=samples, backend="openvino")
    assert fast.report.concepts["int8"] >= 1 and not fast.report.warnings
    assert fast.report.verification.given == 1 and fast.report.verification.random == 0
    assert "batch: 8" in str(fast.report.verification.sizes) or ", 8" in str(fast.report.verification.sizes)


def test_products_of_one_input_share_its_quantized_form() -> None:
    model = parse(
        """g (float[b,96] x, float[96,96] w0, float[96,96] w1) => (float[b,96] y, float[b,96] z) {
        y = MatMul(x, w0) z = MatMul(x, w1) }""",
        {k: W[k] for k in ("w0", "w1")},
    )
    result = xform.optimize(model, preset="int8", calibration=batches())
    assert result.artifact.metadata["operators"]["DynamicQuantizeLinear"] == 1


# Calibration data


def test_a_file_a_folder_a_dict_and_an_iterable_give_batches(tmp_path: Path) -> None:
    model, (one, two) = chain(), batches(2)
    np.savez(tmp_path / "b.npz", **two)
    np.savez(tmp_path / "a.npz", **one, more=np.ones(3))  # what the graph does not read is left out
    from_file, warning = calibration_batches(model, tmp_path / "b.npz")
    assert warning == "" and [set(b) for b in from_file] == [{"x"}]
    with pytest.warns(XformWarning, match="'more'"):
        folder, _ = calibration_batches(model, str(tmp_path))
    iterated, _ = calibration_batches(model, iter([one, two]))
    for found in (folder, iterated):
        for got, wanted in zip(found, (one, two), strict=True):
            np.testing.assert_array_equal(got["x"], wanted["x"])
    assert len(calibration_batches(model, one)[0]) == 1


def test_an_endless_iterable_is_cut() -> None:
    def endless() -> Any:
        while True:
            yield batches(1)[0]

    assert len(calibration_batches(chain(), endless())[0]) == MAX_BATCHES


@pytest.mark.filterwarnings("ignore:CALIBRATED ON RANDOM DATA")
def test_random_batches_are_seeded() -> None:
    (first, warning), (again, _) = calibration_batches(chain(), None), calibration_batches(chain(), None)
    assert len(first) == RANDOM_BATCHES and "RANDOM" in warning
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])


@pytest.mark.parametrize("given", [[], 3, [np.ones(3)], [{"z": np.ones(3)}]])
def test_what_cannot_calibrate_is_refused(given: Any) -> None:
    with pytest.raises(UsageError):
        calibration_batches(chain(), given)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    for path in (tmp_path / "empty", tmp_path / "bad.npz", tmp_path / "absent.npz"):
        with pytest.raises(UsageError):
            calibration_batches(chain(), path)
