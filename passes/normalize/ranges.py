"""Ranges of activations per channel, from calibration, as data that passes take.

`xform.pipeline.calibration.norm_ranges` measures them. They are kept by the name of the norm's result, so they fit the
graph that they were measured on (names are kept by passes that do not touch the norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xform.errors import UsageError
from xform.graph.values import Array


@dataclass(frozen=True)
class ChannelRange:
    """Smallest and largest value per channel, float64 [C]."""

    low: Array
    high: Array

    @property
    def peak(self) -> Array:
        """Largest magnitude per channel."""
        peak: Array = np.maximum(np.abs(self.low), np.abs(self.high))
        return peak

    def joined(self, other: ChannelRange) -> ChannelRange:
        """The range over both batches."""
        return ChannelRange(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


Ranges = Mapping[str, ChannelRange]  # name of the norm's result -> range


def save_ranges(path: str | Path, ranges: Ranges) -> None:
    """Write ranges to an .npz file: one array [2, C] per name."""
    arrays: dict[str, Array] = {name: np.stack([r.low, r.high]) for name, r in ranges.items()}
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_ranges(source: str | Path | Ranges) -> Ranges:
    """Ranges from a file of `save_ranges`, or as they are.

    Raises:
        UsageError: No such file, or not of this form.
    """
    if isinstance(source, Mapping):
        return source
    if not str(source):
        raise UsageError(
            "this pass needs the ranges of activations",
            hint="measure them with xform.pipeline.calibration.norm_ranges and give them, or their file, as `ranges`",
        )
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float64) for name in file.files}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read ranges from {source}: {error}", hint="write them with save_ranges") from error
    bad = [name for name, array in arrays.items() if array.ndim != 2 or array.shape[0] != 2]
    if bad:
        raise UsageError(f"{source} does not hold ranges: {', '.join(bad[:3])} is not of shape [2, C]")
    return {name: ChannelRange(array[0], array[1]) for name, array in arrays.items()}
