"""Reading by index, as ONNX counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def from_the_front(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places with negative ones counted from the end."""
    return torch.where(places < 0, places + size, places)


def gather(x: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """numpy's take: the dims of `places` stand where `axis` was."""
    axis = axis + x.ndim if axis < 0 else axis
    flat = from_the_front(places, x.shape[axis]).reshape(-1)
    taken = x.index_select(axis, flat)
    return taken.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def gather_elements(x: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """GatherElements."""
    return torch.gather(x, axis, from_the_front(places.to(torch.int64), x.shape[axis]))


def gather_nd(x: torch.Tensor, places: torch.Tensor, batch_dims: int) -> torch.Tensor:
    """GatherND: the last dim of `places` [batch..., ..., K] indexes K dims behind the batch dims."""
    depth = places.shape[-1]
    batch = x.shape[:batch_dims]
    flat_x = x.reshape(math.prod(batch), *x.shape[batch_dims:])
    inner = places.shape[batch_dims:-1]
    flat = places.reshape(math.prod(batch), math.prod(inner), depth)
    rows = torch.arange(flat_x.shape[0], device=x.device)[:, None].expand(-1, flat.shape[1])
    columns = [from_the_front(flat[..., k], flat_x.shape[1 + k]) for k in range(depth)]
    taken = flat_x[(rows, *columns)]
    return taken.reshape(*batch, *inner, *x.shape[batch_dims + depth :])


def slice_axis(x: torch.Tensor, axis: int, start: int, end: int | None = None) -> torch.Tensor:
    """x[start:end] along one axis."""
    places = [slice(None)] * x.ndim
    places[axis] = slice(start, end)
    return x[tuple(places)]


def slice_with_step(x: torch.Tensor, axis: int, start: int, end: int, step: int) -> torch.Tensor:
    """x[start:end:step] along one axis, backwards too, with bounds beyond the ends cut."""
    size = x.shape[axis]
    start, end = (place + size if place < 0 else place for place in (start, end))
    if step > 0:
        start, end = min(max(start, 0), size), min(max(end, 0), size)
    else:
        start, end = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
    places = torch.arange(start, end, step, device=x.device) if (end - start) * step > 0 else None
    return x.narrow(axis, 0, 0) if places is None else x.index_select(axis, places)


def one_hot(places: torch.Tensor, depth: int, values: torch.Tensor, axis: int) -> torch.Tensor:
    """OneHot: values[1] at the place (negative ones from the end), values[0] elsewhere."""
    axis = axis + places.ndim + 1 if axis < 0 else axis
    wanted = places.to(torch.int64).unsqueeze(axis)
    wanted = torch.where(wanted < 0, wanted + depth, wanted)
    shape = [1] * wanted.ndim
    shape[axis] = depth
    grid = torch.arange(depth, device=places.device).reshape(shape)
    return torch.where(wanted == grid, values[1], values[0])


def non_zero(x: torch.Tensor) -> torch.Tensor:
    """Places of the nonzero elements, one column each."""
    return torch.nonzero(x).T if x.ndim else torch.nonzero(x.reshape(1)).T[:0].reshape(0, int(x != 0))


def compress(x: torch.Tensor, keep: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Slices (elements of the flat tensor without an axis) where `keep` is true."""
    flat = x.reshape(-1) if axis is None else x
    return flat.index_select(0 if axis is None else axis, torch.nonzero(keep).reshape(-1))


def reverse_sequence(x: torch.Tensor, lengths: torch.Tensor, batch_axis: int, time_axis: int) -> torch.Tensor:
    """The first `lengths[b]` steps of each batch element backwards."""
    time = torch.arange(x.shape[time_axis], device=x.device)
    ends = lengths.reshape(-1, 1)
    places = torch.where(time < ends, ends - 1 - time, time)  # [batch, time]
    if batch_axis > time_axis:
        places = places.T
    shape = [1] * x.ndim
    shape[batch_axis], shape[time_axis] = x.shape[batch_axis], x.shape[time_axis]
    return torch.gather(x, time_axis, places.reshape(shape).expand(x.shape))


def unique(x: torch.Tensor, axis: int | None, is_sorted: bool) -> tuple[torch.Tensor, ...]:
    """Unique: values, where each comes first, which value each element has, and counts."""
    flat = x.reshape(-1) if axis is None else x
    dim = 0 if axis is None else axis
    values, inverse, counts = torch.unique(flat, sorted=True, return_inverse=True, return_counts=True, dim=dim)
    places = torch.arange(flat.shape[dim], device=x.device)
    first = torch.full((values.shape[dim],), flat.shape[dim], device=x.device).scatter_reduce(
        0, inverse.reshape(-1), places, "amin"
    )
    if not is_sorted:
        order = torch.argsort(first)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
        values, first, counts, inverse = values.index_select(dim, order), first[order], counts[order], rank[inverse]
    return values, first, inverse.reshape(-1), counts


def extract_features(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """ArrayFeatureExtractor: columns of the last axis, as a matrix."""
    return x.index_select(-1, columns.reshape(-1)).reshape(-1, columns.numel())


def slice_computed(
    x: torch.Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> torch.Tensor:
    """Slice of axes or steps that only the run tells."""
    places = range(len(starts)) if axes is None else axes
    for axis, start, end, step in zip(places, starts, ends, steps or [1] * len(starts), strict=True):
        x = slice_with_step(x, axis, start, end, step)
    return x
