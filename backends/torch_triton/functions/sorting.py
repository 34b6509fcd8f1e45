"""Selection by order."""

from __future__ import annotations

import torch


def top_k(x: torch.Tensor, k: int, axis: int, largest: bool, is_sorted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest (or smallest) along `axis`; among equals the one with the lower place comes first."""
    kind = x.dtype
    wide = x.to(torch.int64) if kind in (torch.uint16, torch.uint32) else x
    if kind is torch.uint64:
        wide = x.view(torch.int64) ^ (-(2**63))
    order = torch.argsort(wide, dim=axis, descending=largest, stable=True).narrow(axis, 0, k)
    picked = torch.gather(wide, axis, order)
    if kind is torch.uint64:
        return (picked ^ (-(2**63))).view(torch.uint64), order
    return picked.to(kind), order


def non_max_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    most: torch.Tensor | None,
    iou_threshold: torch.Tensor | None,
    score_threshold: torch.Tensor | None,
    is_centred: bool,
) -> torch.Tensor:
    """NonMaxSuppression: [selected, 3] of batch, class and box, best first in each class.

    Args:
        boxes: [batch, boxes, 4]: opposite corners (y1, x1, y2, x2), or centre and size (x, y, w, h) if `is_centred`.
        scores: [batch, classes, boxes].
    """
    limit = 0 if most is None else int(most.item())
    threshold = 0.0 if iou_threshold is None else float(iou_threshold.item())
    least = None if score_threshold is None else float(score_threshold.item())
    found: list[tuple[int, int, int]] = []
    if limit > 0:
        for batch in range(boxes.shape[0]):
            corners = _corners(boxes[batch], is_centred)
            for label in range(scores.shape[1]):
                kept = _suppress(corners, scores[batch, label], limit, threshold, least)
                found.extend((batch, label, box) for box in kept)
    return torch.tensor(found, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _corners(boxes: torch.Tensor, is_centred: bool) -> torch.Tensor:
    """Lower and upper corner of each box."""
    if is_centred:
        half = boxes[:, 2:] / 2
        return torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), 1)
    return torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)


def _suppress(
    corners: torch.Tensor, scores: torch.Tensor, limit: int, threshold: float, least: float | None
) -> list[int]:
    order = torch.argsort(scores, descending=True, stable=True)
    if least is not None:
        order = order[scores[order] > least]
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    kept: list[int] = []
    while len(order) and len(kept) < limit:
        best, order = order[0], order[1:]
        kept.append(int(best))
        sides = torch.minimum(corners[order, 2:], corners[best, 2:]) - torch.maximum(
            corners[order, :2], corners[best, :2]
        )
        shared = sides.clamp(min=0).prod(1)
        union = areas[order] + areas[best] - shared
        order = order[shared <= threshold * union]
    return kept
