"""Writing by index."""

from __future__ import annotations

import math

import torch

from xform.backends.torch_triton.functions.indexing import from_the_front

_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    x: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, axis: int, reduction: str
) -> torch.Tensor:
    """ScatterElements."""
    where = from_the_front(places.to(torch.int64), x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, where, updates)
    return x.scatter_reduce(axis, where, updates, _REDUCE[reduction], include_self=True)


def scatter_nd(x: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, reduction: str) -> torch.Tensor:
    """ScatterND: the last dim of `places` [..., K] indexes the first K dims."""
    depth = places.shape[-1]
    columns = [from_the_front(places[..., k], x.shape[k]) for k in range(depth)]
    if reduction == "none":
        return x.index_put(tuple(columns), updates)
    flat_place = torch.zeros_like(columns[0])
    for column, size in zip(columns, x.shape[:depth], strict=True):
        flat_place = flat_place * size + column
    rest = math.prod(x.shape[depth:])
    flat = x.reshape(-1, rest)
    where = flat_place.reshape(-1, 1).expand(-1, rest)
    return flat.scatter_reduce(0, where, updates.reshape(-1, rest), _REDUCE[reduction]).reshape(x.shape)


def tensor_scatter(
    cache: torch.Tensor, update: torch.Tensor, starts: torch.Tensor | None, axis: int, circular: bool
) -> torch.Tensor:
    """TensorScatter: `update` written into `cache` along `axis` from `starts[b]` on, for each batch element b."""
    axis = axis + cache.ndim if axis < 0 else axis
    length = cache.shape[axis]
    steps = torch.arange(update.shape[axis], device=cache.device)
    begin = torch.zeros(cache.shape[0], dtype=torch.int64, device=cache.device) if starts is None else starts
    places = begin.reshape(-1, 1) + steps
    places = places % length if circular else places
    shape = [1] * cache.ndim
    shape[0], shape[axis] = cache.shape[0], update.shape[axis]
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)
