"""Weights as int8 codes with one scale per output channel.

Saturation. Where there are no dot-product instructions (VNNI and its like), x86 adds the products of two neighbouring
input channels in 16 bits: u0 * w0 + u1 * w1 with u up to 255. That holds if no two such weights of one sign exceed 128
in sum, as 255 * 128 < 2^15, so the scale of a column is chosen such that they do not. It costs far less than the bit
that |w| <= 63 would, since two large weights of one sign are seldom neighbours. Seen in ONNX Runtime 1.31 on AVX2: the
pairs are channels 2j and 2j + 1; sums of 128 are exact, of 129 are not (2026-11-22).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from xform.graph.values import Array

_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_CODES = 255  # largest uint8
_DAMPING = 0.01  # of the mean of the diagonal, so that the inverse exists
_BLOCK = 128  # rows whose updates to the rows after them are made at once
_LOOSE, _STRICT = 0.025, 0.021  # relative errors of outputs: cosines of 0.9997 and 0.9998
_PAIR = 128  # largest sum of two weights whose products with 255 can be added in 16 bits

AsymmetricCodes = tuple[Array, Array, Array]  # uint8 [K, N], float32 scales and uint8 zero points [K / block, N]


def dot_product_instructions() -> bool:
    """Whether this machine sums products of bytes in 32 bits."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    words = set(text.split())
    return any(name in words for name in _DOT_PRODUCTS)


def default_error_bound() -> float:
    """The relative error of outputs that int8 may have where nobody asked for one: 0.021 or 0.025.

    The stricter one where there are dot-product instructions: int8 products are three times as fast as float ones there
    instead of not twice, so that the few that return to float for it cost little of what the others gain.
    """
    return _STRICT if dot_product_instructions() else _LOOSE


def weight_codes(weight: Array, output_axis: int, input_axis: int, bits: int) -> tuple[Array, Array]:
    """int8 codes in the shape of the weight, and float32 scales [M], one per output channel.

    Args:
        weight: Of a convolution [M, C / group, ...] or a product [K, N].
        output_axis, input_axis: Where its output and input channels are.
        bits: 8 or 7; or 0 for 8 with no two neighbouring input channels summing to more than 128.
    """
    limit = 2 ** ((bits or 8) - 1) - 1
    wide = np.ascontiguousarray(np.moveaxis(weight, (output_axis, input_axis), (0, 1)), np.float32)
    flat = wide.reshape(*wide.shape[:2], -1)
    needed = np.maximum(flat.max(axis=(1, 2), initial=0.0), -flat.min(axis=(1, 2), initial=0.0)) / limit
    if bits == 0:
        # one less than 128, since rounding adds up to a half twice
        needed = np.maximum(needed, _pair_peaks(flat) / (_PAIR - 1))
    scale = np.where(needed > 0, needed, 1.0).astype(np.float32)
    codes = wide / scale.reshape(-1, *[1] * (wide.ndim - 1))
    codes = np.clip(np.rint(codes, out=codes), -limit, limit, out=codes).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(codes, (0, 1), (output_axis, input_axis))), scale


def asymmetric_codes(weight: Array, block: int) -> AsymmetricCodes:
    """uint8 codes of a product's weight [K, N], with a scale and a zero point for each `block` rows of a column.

    The range of these is widened to contain zero, which is exact.

    Args:
        block: Divides K.
    """
    blocks = weight.reshape(-1, block, weight.shape[1])
    low, high = np.minimum(blocks.min(axis=1), 0.0), np.maximum(blocks.max(axis=1), 0.0)
    needed = (high.astype(np.float64) - low) / _CODES
    scale = np.where(needed > 0, needed, 1.0).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, _CODES).astype(np.uint8)
    codes = np.clip(np.rint(blocks / scale[:, None]) + zero[:, None], 0, _CODES)
    return codes.astype(np.uint8).reshape(weight.shape), scale, zero


def _pair_peaks(flat: Array) -> Array:
    """Largest sum in magnitude of two neighbours along axis 1 of [M, C, taps] that can be added with one sign, [M]."""
    paired = flat.shape[1] // 2 * 2
    even, odd = flat[:, 0:paired:2], flat[:, 1:paired:2]
    # of two with unlike signs the larger one counts, which is a peak of its own
    sums = np.where((even > 0) == (odd > 0), even + odd, 0)
    peaks: Array = np.maximum(np.abs(flat).max(axis=(1, 2), initial=0.0), np.abs(sums).max(axis=(1, 2), initial=0.0))
    return peaks


def compensated_codes(weight: Array, gram: Array, bits: int) -> tuple[Array, Array]:
    """Codes and scales of a product as `weight_codes` gives them, rounded so that the errors of a column cancel.

    See `_compensated`.

    Args:
        weight: [K, N].
        gram: X^T X / M [K, K], X [M, K] what the product reads.
        bits: See `weight_codes`.
    """
    _, scale = weight_codes(weight, 1, 0, bits)
    limit = 2 ** ((bits or 8) - 1) - 1

    def rounded(row: int, wanted: Array, before: Array) -> Array:
        code = np.clip(np.rint(wanted), -limit, limit)
        if bits == 0 and row % 2:  # the second of a pair: see the module's docstring
            low, high = np.where(before <= 0, -_PAIR - before, -limit), np.where(before >= 0, _PAIR - before, limit)
            code = np.clip(code, low, high)
        return code

    return _compensated(weight, gram, scale[None], rounded).astype(np.int8), scale


def compensated_asymmetric_codes(weight: Array, gram: Array, block: int) -> AsymmetricCodes:
    """Codes, scales and zero points as `asymmetric_codes` gives them, rounded so that the errors of a column cancel."""
    _, scale, zero = asymmetric_codes(weight, block)
    low, high = -zero.astype(np.float64), _CODES - zero.astype(np.float64)

    def rounded(row: int, wanted: Array, before: Array) -> Array:
        return np.clip(np.rint(wanted), low[row // block], high[row // block])

    codes = _compensated(weight, gram, scale, rounded) + np.repeat(zero, block, axis=0)
    return codes.astype(np.uint8), scale, zero


def _compensated(weight: Array, gram: Array, scale: Array, rounded: Callable[[int, Array, Array], Array]) -> Array:
    """Whole numbers q [K, N] with q * scale close to the weight in what the product gives, not in the weight itself.

    Row after row of W [K, N] is rounded, and what that changes in X W is made up for, as far as X allows, in the rows
    not rounded yet. The error of X W on the calibration rows falls, though that of W grows.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    sections 3.1 to 3.3 (its Cholesky form, with lazy updates of blocks).

    Args:
        gram: X^T X / M [K, K], X [M, K] what the product reads.
        scale: [1, N], or [K / block, N] for rows in blocks.
        rounded: From the index of a row, what it should be [N], and the codes of the row before, its codes.
    """
    left, steps, block = weight.astype(np.float64), scale.astype(np.float64), len(weight) // len(scale)
    hessian = gram.astype(np.float64)
    diagonal = np.diag_indices(len(hessian))
    hessian[diagonal] += max(_DAMPING * float(np.mean(hessian[diagonal])), np.finfo(np.float64).tiny)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes = np.zeros_like(left)
    for start in range(0, len(left), _BLOCK):
        end = min(start + _BLOCK, len(left))
        errors = np.zeros((end - start, left.shape[1]))
        for row in range(start, end):
            step = steps[row // block]
            codes[row] = rounded(row, left[row] / step, codes[row - 1])
            error = (left[row] - codes[row] * step) / upper[row, row]
            left[row + 1 : end] -= np.outer(upper[row, row + 1 : end], error)
            errors[row - start] = error
        left[end:] -= upper[start:end, end:].T @ errors
    return codes


__all__ = [
    "AsymmetricCodes",
    "asymmetric_codes",
    "compensated_asymmetric_codes",
    "compensated_codes",
    "default_error_bound",
    "dot_product_instructions",
    "weight_codes",
]
