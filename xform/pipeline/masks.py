"""Masks in every style that users feed and rewrites get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from xform.graph.values import Array

MaskStyle = Literal["full", "right-padded", "left-padded", "holes", "one token", "last token", "empty"]

# In this order, so that two rows see a full and a padded one, and three the padding that most rewrites forget.
STYLES: tuple[MaskStyle, ...] = ("right-padded", "full", "left-padded", "holes", "empty", "one token", "last token")
TYPICAL: tuple[MaskStyle, ...] = ("full", "right-padded")


def mask(rng: np.random.Generator, shape: tuple[int, ...], styles: Sequence[MaskStyle]) -> Array:
    """Booleans, True where something is to be seen; row i of the first axis has style i, round and round.

    Args:
        shape: [batch, keys], [batch, 1, 1, keys], [batch, queries, keys], ...; one axis is one row, none is True.

    Returns:
        Array of dtype bool. Every query of a row sees the same keys, except with "holes", where each has its own.
    """
    if not shape:
        return np.ones(shape, bool)
    if len(shape) == 1:
        return _keys(rng, shape[0], styles[0])
    found = np.zeros(shape, bool)
    for row in range(shape[0]):
        style = styles[row % len(styles)]
        if style == "holes":
            found[row] = rng.random(shape[1:]) < 0.6
            if not found[row].any():
                found[row, ..., -1:] = True
        else:
            found[row] = _keys(rng, shape[-1], style)
    return found


def _keys(rng: np.random.Generator, length: int, style: MaskStyle) -> Array:
    """One row of a mask: which of `length` keys are seen."""
    place = np.arange(length)
    kept = int(rng.integers(1, length)) if length > 1 else length
    match style:
        case "full":
            return np.ones(length, bool)
        case "right-padded":
            return np.asarray(place < kept)
        case "left-padded":
            return np.asarray(place >= length - kept)
        case "holes":
            found = rng.random(length) < 0.6
            if length:
                found[rng.integers(length)] = True
            return found
        case "one token":
            return np.asarray(place == 0)
        case "last token":
            return np.asarray(place == length - 1)
    return np.zeros(length, bool)
