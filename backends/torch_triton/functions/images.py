"""Sampling of images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def affine_grid(theta: torch.Tensor, size: Sequence[int], align_corners: bool) -> torch.Tensor:
    """AffineGrid, of an empty batch too (where torch refuses)."""
    if theta.shape[0]:
        return F.affine_grid(theta, list(size), align_corners)
    return theta.new_zeros([0, *size[2:], len(size) - 2])


def grid_sample(x: torch.Tensor, grid: torch.Tensor, mode: str, padding: str, align: bool) -> torch.Tensor:
    """GridSample, linear or nearest, over any number of axes.

    Args:
        x: [N, C, *sizes]; grid: [N, *out, axes], places in [-1, 1], last axis first.
    """
    sizes = x.shape[2:]
    places = []
    for i, size in enumerate(sizes):
        at = grid[..., len(sizes) - 1 - i]
        place = (at + 1) / 2 * (size - 1) if align else ((at + 1) * size - 1) / 2
        if mode == "nearest":
            place = torch.round(place)
        places.append(_inside(place, size, padding, align))
    if mode == "nearest":
        return _read(x, places, padding)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    lows = [torch.floor(place) for place in places]
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        weight = torch.ones_like(places[0])
        for place, low, up in zip(places, lows, corner, strict=True):
            weight = weight * (place - low if up else 1 - (place - low))
        total = total + _read(x, [low + up for low, up in zip(lows, corner, strict=True)], padding) * weight[:, None]
    return total


def _inside(place: torch.Tensor, size: int, padding: str, align: bool) -> torch.Tensor:
    if padding == "border":
        return place.clamp(0, size - 1)
    if padding != "reflection":
        return place
    low, span = (0.0, float(size - 1)) if align else (-0.5, float(size))
    if span == 0:
        return torch.zeros_like(place)
    distance = (place - low).abs() % (2 * span)
    return (torch.where(distance > span, 2 * span - distance, distance) + low).clamp(0, size - 1)


def _read(x: torch.Tensor, places: Sequence[torch.Tensor], padding: str) -> torch.Tensor:
    """[N, C, *out] at whole places; beyond the border 0."""
    sizes = x.shape[2:]
    flat = torch.zeros_like(places[0], dtype=torch.int64)
    valid = torch.ones_like(places[0], dtype=torch.bool)
    for place, size in zip(places, sizes, strict=True):
        whole = place.to(torch.int64)
        valid = valid & (whole >= 0) & (whole < size)
        flat = flat * size + whole.clamp(0, size - 1)
    n, c = x.shape[:2]
    read = x.flatten(2).gather(2, flat.reshape(n, 1, -1).expand(n, c, -1)).reshape(n, c, *places[0].shape[1:])
    return torch.where(valid[:, None], read, torch.zeros_like(read))


def roi_align(
    x: torch.Tensor,
    boxes: torch.Tensor,
    batches: torch.Tensor,
    height: int,
    width: int,
    ratio: int,
    scale: float,
    by_maximum: bool,
    half_pixel: bool,
) -> torch.Tensor:
    """RoiAlign: each box (x1, y1, x2, y2) is cut in height x width cells, each read at ratio x ratio places.

    Returns:
        [boxes, C, height, width], the mean or the maximum of the weighted corners of each cell.
    """
    offset = 0.5 if half_pixel else 0.0
    results = []
    for box, batch in zip(boxes, batches.tolist(), strict=True):
        x1, y1, x2, y2 = (box * scale - offset).unbind()
        rows, columns = y2 - y1, x2 - x1
        if not half_pixel:
            rows, columns = rows.clamp(min=1.0), columns.clamp(min=1.0)
        per_row = ratio or math.ceil(float(rows) / height)
        per_column = ratio or math.ceil(float(columns) / width)
        y = _sample_places(y1, rows, height, per_row)
        at = _sample_places(x1, columns, width, per_column)
        corners = _corner_values(x[batch], y, at)  # [4, C, height * per_row, width * per_column]
        cells = corners.unflatten(-1, (width, per_column)).unflatten(-3, (height, per_row))
        if by_maximum:
            results.append(cells.amax((0, 3, 5)))
        else:
            results.append(cells.sum(0).mean((2, 4)))
    shape = (0, x.shape[1], height, width)
    return torch.stack(results) if results else x.new_empty(shape)


def _sample_places(start: torch.Tensor, length: torch.Tensor, cells: int, per_cell: int) -> torch.Tensor:
    inside = (torch.arange(cells * per_cell, device=start.device, dtype=start.dtype) + 0.5) / per_cell
    return start + inside * (length / cells)


def _corner_values(image: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The four weighted corners around each place of the grid y * x; 0 for places beyond the image."""
    parts = []
    for place, size in ((y, image.shape[1]), (x, image.shape[2])):
        valid = (place >= -1) & (place <= size)
        place = place.clamp(min=0)
        low = place.floor().to(torch.int64).clamp(max=size - 1)
        place = torch.where(low >= size - 1, low.to(place.dtype), place)
        high = (low + 1).clamp(max=size - 1)
        weight = place - low
        parts.append([(low, (1 - weight) * valid), (high, weight * valid)])
    corners = [image[:, yi][:, :, xi] * wy[:, None] * wx for yi, wy in parts[0] for xi, wx in parts[1]]
    return torch.stack(corners)


def center_crop_pad(x: torch.Tensor, sizes: Sequence[int], axes: Sequence[int] | None) -> torch.Tensor:
    """CenterCropPad: cut or padded with zeros around the centre."""
    for axis, size in zip(range(x.ndim) if axes is None else axes, sizes, strict=True):
        have, want = x.shape[axis], size
        if have > want:
            x = x.narrow(axis, (have - want) // 2, want)
        elif have < want:
            amounts = [0] * (2 * x.ndim)
            last = x.ndim - 1 - axis % x.ndim
            amounts[2 * last : 2 * last + 2] = [(want - have) // 2, want - have - (want - have) // 2]
            x = F.pad(x, amounts)
    return x
