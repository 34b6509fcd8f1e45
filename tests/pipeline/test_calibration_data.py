"""Calibration data that cannot serve is refused by name, and what says little is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import parse

import xform
from xform import limits
from xform.errors import LimitError, UsageError, XformWarning
from xform.pipeline.calibration_data import calibration_batches, first_rows

RNG = np.random.default_rng(21)
W = RNG.normal(size=(96, 96)).astype(np.float32)


def graph() -> ir.Model:
    return parse(
        """g (float[n,96] x, int64[n] ids, float[96,96] w) => (float[n,96] y, int64[n] z) {
        y = MatMul(x, w) z = Identity(ids) }""",
        {"w": W},
    )


def sample(**changed: Any) -> dict[str, Any]:
    rng = np.random.default_rng(22)
    return {"x": rng.normal(size=(4, 96)).astype(np.float32), "ids": np.arange(4), **changed}


def with_one(number: float) -> np.ndarray:
    x = sample()["x"]
    x[1, 5] = number
    return x


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": with_one(np.nan)}, "'x' holds NaN: 1 of 384 numbers are not finite"),
        ({"x": with_one(np.inf)}, "'x' holds infinite numbers"),
        ({"x": with_one(-np.inf)}, "'x' holds infinite numbers"),
        ({"x": np.zeros((0, 96), np.float32)}, "'x' is empty"),
        ({"x": np.zeros((4, 96))}, "'x' is float64, the model takes float"),
        ({"x": np.zeros((4, 96), np.int32)}, "'x' is int32, the model takes float"),
        ({"x": np.zeros((4, 95), np.float32)}, "'x' has shape [4, 95], the model takes [n,96]"),
        ({"x": np.zeros((4, 96, 1), np.float32)}, "'x' has shape [4, 96, 1]"),
        ({"x": np.float32(3)}, "'x' has shape []"),
        ({"x": "words"}, "'x' is <U5, the model takes float"),
        ({"x": np.full((4, 96), "a")}, "'x' is <U1"),
        ({"x": np.full((4, 96), None)}, "'x' is object"),
        ({"x": [[1.0], [1.0, 2.0]]}, "'x' is not an array"),
        ({"ids": np.zeros(4, np.int32)}, "'ids' is int32, the model takes int64"),
        ({"ids": [0.5, 1.5, 2.0, 3.0]}, "'ids' is float64, the model takes int64"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_with_its_place(changed, told):
    with pytest.raises(UsageError, match=re.escape(told)) as error:
        calibration_batches(graph(), [sample(), sample(**changed)])
    assert error.value.where == ("calibration sample 1",)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **sample())
    np.savez(tmp_path / "b.npz", **sample(x=with_one(np.nan)))
    with pytest.raises(UsageError, match="holds NaN") as error:
        calibration_batches(graph(), tmp_path)
    assert error.value.where == (str(tmp_path / "b.npz"),)


def test_numbers_without_a_dtype_take_the_one_of_the_model():
    (batch,), _ = calibration_batches(graph(), [sample(x=sample()["x"].tolist(), ids=[1, 2, 3, 4])])
    assert batch["x"].dtype == np.float32 and batch["ids"].dtype == np.int64


def test_a_missing_input_is_told_with_what_may_be_meant():
    with pytest.raises(UsageError, match="no input 'ids'") as error:
        calibration_batches(graph(), [{"x": sample()["x"], "idx": np.arange(4)}])
    assert "did you mean it by 'idx'?" in str(error.value)


def raising() -> Iterator[dict[str, Any]]:
    yield sample()
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (raising(), "raised RuntimeError after 1 samples: the disk is gone"),
        (iter(()), "is empty"),
        ([(sample()["x"], np.arange(4))], "sample 0 is a tuple"),
        (["x.npz"], "sample 0 is a str"),
        (b"x.npz", "calibration is a bytes"),
        (sample()["x"], "calibration is a ndarray"),
        (5, "calibration is a int"),
    ],
)
def test_what_is_no_calibration_data_is_refused(given, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        calibration_batches(graph(), given)


def test_zeros_and_constants_are_told():
    with pytest.warns(XformWarning, match="'x' is 0.0 everywhere") as told:
        _, warning = calibration_batches(graph(), [sample(x=np.zeros((4, 96), np.float32))] * 2)
    assert len(told) == 1 and warning == str(told[0].message)
    with pytest.warns(XformWarning) as told:
        calibration_batches(graph(), [{"x": np.zeros((4, 96), np.float32), "ids": np.zeros(4, np.int64)}])
    assert len(told) == 2
    _, warning = calibration_batches(graph(), [sample(ids=np.ones(4, np.int64))])  # a mask without pads is no fault
    assert warning == ""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(96, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_pairs_with_labels_are_told_apart_from_the_arguments_of_a_module():
    module = Net().eval()
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    loader = [(x, torch.zeros(4, dtype=torch.long))]
    with pytest.raises(UsageError, match="sample 0 does not fit the call") as error:
        xform.optimize(module, inputs=x, preset="int8", calibration=loader)
    assert "for x, _ in loader" in str(error.value)
    fast = xform.optimize(module, inputs=x, preset="int8", calibration=(one for one, _ in loader))
    assert fast.report.concepts["int8"] == 1


def test_random_calibration_warns():
    with pytest.warns(XformWarning, match="CALIBRATED ON RANDOM DATA"):
        result = xform.optimize(graph(), preset="int8")
    assert any("RANDOM" in warning for warning in result.report.warnings)


def test_a_result_on_zeros_is_told_in_python_and_in_the_report():
    with pytest.warns(XformWarning, match="'x' is 0.0 everywhere"):
        result = xform.optimize(graph(), preset="int8", calibration=[sample(x=np.zeros((4, 96), np.float32))])
    assert any("everywhere" in warning for warning in result.report.warnings)


def test_all_files_of_a_folder_count_together(tmp_path: Path) -> None:
    zeros = np.zeros((4000, 96), np.float32)
    for number in range(3):
        np.savez_compressed(tmp_path / f"{number}.npz", x=zeros, ids=np.arange(4000))
    with limits.limited(limits.limits_of({"memory": 20 * zeros.nbytes})), pytest.raises(LimitError):
        calibration_batches(graph(), tmp_path)


def test_what_the_model_does_not_take_is_left_out_and_told() -> None:
    with pytest.warns(XformWarning, match="'mask', which is no input of the model, and was left out"):
        batches, told = calibration_batches(graph(), [sample(mask=np.ones(4)), sample()])
    assert [set(batch) for batch in batches] == [{"x", "ids"}] * 2 and "'mask'" in told


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [
        ({"x": ("float", "n,96"), "ids": ("int64", "n")}, {"x": 8, "ids": 8}),
        ({"x": ("float", "n,96"), "scale": ("float", "96")}, {"x": 8, "scale": 96}),
        ({"x": ("float", "n,96"), "places": ("int64", "k")}, {"x": 20, "places": 3}),  # of rows of x, perhaps
        ({"x": ("float", "n,96"), "pairs": ("float", "2*n,96")}, {"x": 20, "pairs": 40}),
        ({"x": ("float", "n,96"), "between": ("float", "n,n")}, {"x": 20, "between": 20}),
        ({"x": ("float", "n,96"), "other": ("float", "m,96")}, {"x": 20, "other": 5}),
    ],
)
def test_a_batch_is_cut_only_where_its_samples_stand_alone(inputs: dict[str, Any], sizes: dict[str, int]) -> None:
    values = []
    numbers = {"n": 20, "k": 3, "m": 5}
    batch = {}
    for name, (kind, dims) in inputs.items():
        shape = [eval(dim, {}, numbers) for dim in dims.split(",")]
        batch[name] = RNG.normal(size=shape).astype(np.float32) if kind == "float" else np.zeros(shape, np.int64)
        dtype = ir.DataType.FLOAT if kind == "float" else ir.DataType.INT64
        declared = [int(dim) if dim.isdigit() else dim for dim in dims.split(",")]
        values.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(declared)))
    model = ir.Model(ir.Graph(values, [values[0]], nodes=[]), ir_version=10)
    assert {name: len(array) for name, array in first_rows(model, batch).items()} == sizes
