"""Constant Reshape targets that also hold where a named dim is 0, and folded constants that are only rounded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from xform.graph.reshape import constant_target
from xform.graph.rounding import folding_loss, narrowed, rounding_loss


@pytest.mark.parametrize(
    ("wanted", "source", "target"),
    [
        ((2, 12), (2, 3, 4), [2, 12]),
        (("N", 12), ("N", 3, 4), [0, 12]),
        (("N", "M", 12), ("N", "M", 3, 4), [0, 0, 12]),
        (("N*M", 12), ("N", "M", 12), [-1, 12]),
        ((4, "N"), ("N", 4), [4, -1]),
        ((0, 4), (4, 0), [-1, 4]),
        ((None, 12), ("N", 3, 4), [-1, 12]),
        (("N", "6*S"), ("N", "S", 6), None),  # [0, -1] fails where N is 0
        (("N", None, 4), ("N", "S", 4), None),
        (("M", "N"), ("N", "M"), None),
    ],
)
def test_targets(wanted: tuple[object, ...], source: tuple[object, ...], target: list[int] | None) -> None:
    assert constant_target(wanted, source) == target


@pytest.mark.parametrize(
    ("numbers", "dtype", "summand", "loss"),
    [
        ([1.0, 1e5], ir.DataType.FLOAT16, False, "overflows FLOAT16"),
        ([1.0, -1e5], ir.DataType.FLOAT16, True, "overflows FLOAT16"),
        ([65504.0], ir.DataType.FLOAT16, False, None),
        ([1.0, 1e-8], ir.DataType.FLOAT16, False, None),
        ([1e-6, 1e-8], ir.DataType.FLOAT16, False, "is too small for FLOAT16"),
        ([1e-6], ir.DataType.FLOAT16, True, None),
        ([0.0], ir.DataType.FLOAT16, False, None),
        ([], ir.DataType.FLOAT16, False, None),
        ([1e5], ir.DataType.BFLOAT16, False, None),
        ([1e39], ir.DataType.FLOAT, False, "overflows FLOAT"),
        ([1e-39], ir.DataType.FLOAT, False, "is too small for FLOAT"),
        ([np.nan, 1.0], ir.DataType.DOUBLE, False, "is not finite"),
    ],
)
def test_losses(numbers: list[float], dtype: ir.DataType, summand: bool, loss: str | None) -> None:
    assert rounding_loss(np.array(numbers), dtype, summand=summand) == loss


def test_a_bias_may_be_small_beside_a_weight() -> None:
    weight, bias = np.ones((2, 2)), np.full(2, 1e-7)
    assert folding_loss(weight, bias, ir.DataType.FLOAT16) is None
    assert folding_loss(bias, weight, ir.DataType.FLOAT16) == "is too small for FLOAT16"
    assert narrowed(bias, ir.DataType.FLOAT16).dtype is ir.DataType.FLOAT16
