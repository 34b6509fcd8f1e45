"""Arrays that somebody gave to run a model on: whether anything can be learned from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xform.errors import UsageError
from xform.text import shown

_STEP = 1 << 22  # elements looked at in one go; a mask of them is made


def check_useful(arrays: Mapping[str, np.ndarray[Any, Any]], what: str, where: str = "") -> None:
    """Refuse arrays that no comparison can use.

    Minus infinity is allowed beside finite values: an additive attention mask is made of it.

    Args:
        arrays: By input name.
        what: Subject of the message: "the inputs file".
        where: The file.

    Raises:
        UsageError: There is no array; all are empty; one holds NaN or plus infinity, or nothing but minus infinity.
    """
    if not arrays:
        raise UsageError(f"{what} holds no array", where=where, hint="write one array for each input of the model")
    if all(array.size == 0 for array in arrays.values()):
        names = ", ".join(f"{shown(name)} {list(array.shape)}" for name, array in list(arrays.items())[:8])
        raise UsageError(f"every array of {what} is empty: {names}", where=where, hint="give at least one sample")
    for name, array in arrays.items():
        found = _not_finite(array)
        if found:
            raise UsageError(
                f"array {shown(name)!r} of {what} holds {found}: results on it say nothing",
                where=where,
                hint="leave out the samples with such values, or leave the file out to run on random inputs",
            )


def _not_finite(array: np.ndarray[Any, Any]) -> str:
    """What makes an array useless, in words; empty if nothing does."""
    if array.dtype.kind not in "fc" or array.size == 0:
        return ""
    any_finite = False
    flat = array.reshape(-1)
    for start in range(0, flat.size, _STEP):
        part = flat[start : start + _STEP]
        finite = np.isfinite(part)
        any_finite = any_finite or bool(finite.any())
        odd = part[~finite]
        if np.isnan(odd).any():
            return "NaN"
        if odd.size and (odd.dtype.kind == "c" or (odd > 0).any()):
            return "infinity"
    return "" if any_finite else "infinity only"
