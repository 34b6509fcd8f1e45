"""ONNX's Resize, axis by axis.

Output place i of an axis reads the input around a real place p(i), which the coordinate transformation gives. Every
mode is a matrix [out, in] of weights for one axis, and the result is the input times one such matrix for each axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def listed(tensor: torch.Tensor) -> list[float]:
    """A small tensor as Python floats."""
    return [float(v) for v in tensor.tolist()]


def resize(
    x: torch.Tensor,
    sizes: Sequence[int] | None,
    scales: Sequence[float] | None,
    axes: Sequence[int],
    roi: Sequence[float] | None,
    *,
    mode: str,
    transformation: str,
    rounding: str,
    cubic: float,
    exclude_outside: bool,
    antialias: bool,
    policy: str,
    outside: float,
) -> torch.Tensor:
    """Resize along `axes`; see the operator for the options."""
    sizes_now = [x.shape[axis] for axis in axes]
    if sizes is not None:
        wanted, factors = _from_sizes(sizes_now, [int(s) for s in sizes], policy)
    else:
        assert scales is not None
        factors = list(scales)
        wanted = [math.floor(n * f) for n, f in zip(sizes_now, factors, strict=True)]
    dtype = x.dtype
    result = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    covered: torch.Tensor | None = None
    for i, axis in enumerate(axes):
        size, want, factor = sizes_now[i], wanted[i], factors[i]
        if size == want and factor == 1 and transformation != "tf_crop_and_resize":
            continue
        bounds = (0.0, 1.0) if roi is None else (roi[i], roi[i + len(axes)])
        places = _places(size, want, factor, transformation, bounds, x.device)
        weights = _weights(places, size, mode, rounding, cubic, exclude_outside, factor if antialias else 1.0)
        matrix = weights.to(result.dtype)
        result = torch.movedim(torch.matmul(torch.movedim(result, axis, -1), matrix.T), -1, axis)
        if transformation == "tf_crop_and_resize":
            inside = (places >= 0) & (places <= size - 1)
            shape = [1] * x.ndim
            shape[axis] = want
            covered = inside.reshape(shape) if covered is None else covered & inside.reshape(shape)
    if covered is not None:
        result = torch.where(covered, result, torch.full_like(result, outside))
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        result = torch.round(result).clamp(limits.min, limits.max) if mode != "nearest" else result
    return result.to(dtype)


def _from_sizes(now: Sequence[int], wanted: Sequence[int], policy: str) -> tuple[list[int], list[float]]:
    """Sizes and scales for the sizes asked for; keeping the aspect ratio there is one scale for all axes."""
    factors = [want / size for want, size in zip(wanted, now, strict=True)]
    if policy == "stretch":
        return list(wanted), factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [math.floor(size * factor + 0.5) for size in now], [factor] * len(factors)


def _places(
    size: int, want: int, factor: float, transformation: str, roi: tuple[float, float], device: torch.device
) -> torch.Tensor:
    """Where in the input each output place reads, float64 [want].

    Computed on the device: a copy from the CPU would wait for it, and keep the module from being a CUDA graph.
    """
    out = torch.arange(want, dtype=torch.float64, device=device)
    match transformation:
        case "half_pixel":
            return (out + 0.5) / factor - 0.5
        case "half_pixel_symmetric":
            adjustment = want / (factor * size)
            centre = size / 2
            return centre * (1 - adjustment) + (out + 0.5) / factor - 0.5
        case "pytorch_half_pixel":
            return (out + 0.5) / factor - 0.5 if want > 1 else torch.zeros_like(out)
        case "align_corners":
            length = size * factor
            return out * (size - 1) / (length - 1) if length > 1 and want > 1 else torch.zeros_like(out)
        case "asymmetric":
            return out / factor
        case _:  # tf_crop_and_resize
            start, end = roi
            if want == 1:
                return 0.5 * (start + end) * (size - 1) + out
            return start * (size - 1) + out * (end - start) * (size - 1) / (want - 1)


def _weights(
    places: torch.Tensor, size: int, mode: str, rounding: str, cubic: float, exclude_outside: bool, shrink: float
) -> torch.Tensor:
    """[out, in]: how much each input element counts. Elements beyond the border stand for the one at it."""
    if mode == "nearest":
        chosen = _nearest(places, rounding).clamp(0, size - 1)
        return torch.nn.functional.one_hot(chosen, size).to(torch.float64)
    stretch = min(shrink, 1.0)
    radius = (1.0 if mode == "linear" else 2.0) / stretch
    first = torch.floor(places - radius).to(torch.int64)
    taps = first[:, None] + torch.arange(math.ceil(2 * radius) + 2, device=places.device)
    distance = (taps - places[:, None]) * stretch
    weights = _triangle(distance) if mode == "linear" else _cubic(distance, cubic)
    if exclude_outside:
        weights = torch.where((taps >= 0) & (taps < size), weights, 0.0)
    if exclude_outside or stretch < 1:
        weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(len(places), size, dtype=torch.float64, device=places.device)
    return matrix.scatter_add(1, taps.clamp(0, size - 1), weights)


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance.abs()).clamp(min=0)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel."""
    d = distance.abs()
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def _nearest(places: torch.Tensor, rounding: str) -> torch.Tensor:
    match rounding:
        case "floor":
            rounded = torch.floor(places)
        case "ceil":
            rounded = torch.ceil(places)
        case "round_prefer_ceil":
            rounded = torch.floor(places + 0.5)
        case _:
            rounded = torch.ceil(places - 0.5)
    return rounded.to(torch.int64)
