"""ONNX element types as torch dtypes."""

from __future__ import annotations

import onnx_ir as ir
import torch

TORCH_DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}
_WIDTHS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
_COMPUTED = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE}


class Precision:
    """Which torch dtype stands for an ONNX element type.

    Args:
        dtype: What the model's floats are computed in; None leaves each as it is. `torch.float64` widens every float;
            a 16-bit dtype narrows float32 (and maps one 16-bit dtype to the other) and leaves float64 alone.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def of(self, dtype: ir.DataType) -> torch.dtype | None:
        """The torch dtype, or None if torch has none."""
        own = TORCH_DTYPES.get(dtype)
        if self.dtype is None or dtype not in _COMPUTED or own is None:
            return own
        if dtype is ir.DataType.DOUBLE and _WIDTHS[self.dtype] < 64:
            return own
        return self.dtype
