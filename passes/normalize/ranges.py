"""Ranges of activations per channel, from calibration, as data that passes take.

`xform.pipeline.calibration.norm_ranges` measures them. They are kept by the name of the norm's result, so they fit the
graph that they were measured on (names are kept by passes that do not touch the norm).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xform.errors import UsageError
from xform.graph.values import Array
from xform.npz import read_npz
from xform.text import shown


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
    with Path(path).open("wb") as file, zipfile.ZipFile(file, "w") as archive:  # numpy.savez keeps names for itself
        for name, found in ranges.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.stack([found.low, found.high]), allow_pickle=False)


def load_ranges(source: str | Path | Ranges) -> Ranges:
    """Ranges from a file of `save_ranges`, or as they are.

    Raises:
        UsageError: No such file, or not of this form; see `xform.npz.read_npz`.
        LimitError: `memory`.
    """
    if isinstance(source, Mapping):
        return source
    if not str(source):
        raise UsageError(
            "this pass needs the ranges of activations",
            hint="measure them with xform.pipeline.calibration.norm_ranges and give them, or their file, as `ranges`",
        )
    arrays = read_npz(source, "the file of ranges")
    bad = [name for name, a in arrays.items() if a.ndim != 2 or a.shape[0] != 2 or a.dtype.kind not in "fiu"]
    if bad:
        what = f"the file of ranges holds {shown(bad[0])!r}, which is not numbers of shape [2, C]"
        raise UsageError(what, where=str(source), hint="write the file with save_ranges")
    return {name: ChannelRange(*array.astype(np.float64)) for name, array in arrays.items()}
