"""How much rounding alone moves a model's outputs: the noise that no rewrite can be blamed for.

Some outputs are discontinuous (ArgMax, TopK, a threshold) or chaotic: the last bit of an intermediate value can move
them by more than any tolerance. To tell that from a wrong rewrite, the captured model is run once more with every input
and weight nudged by a few units of roundoff, seeded. An output that moves beyond its tolerance then is noisy, and a
candidate is within the noise if it is off by at most `NOISE_FACTOR` times as much, in size and in number of elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.pipeline.oracle import Outputs, Session
from xform.pipeline.tolerance import Difference

NOISE_FACTOR = 8.0
_NUDGE = 4.0  # units of roundoff
_MAX_NUDGED_BYTES = 1 << 28  # of weights, which are copied for it; the first ones of the graph

_EPSILON = {"f2": 2.0**-11, "f4": 2.0**-24, "f8": 2.0**-53}  # unit roundoff; other dtypes are left alone


def nudged_outputs(model: ir.Model, inputs: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Outputs]:
    """Outputs of `model` on `inputs`, all nudged.

    Raises:
        CouldNotRunError: The model does not run on nudged inputs.
    """
    rng = np.random.default_rng([seed, 0x6E6F6973])
    with Session(model, adjust=lambda weights: _nudge_weights(rng, weights)) as session:
        return [session.run({name: _nudged(rng, value) for name, value in case.items()}) for case in inputs]


def is_within(found: Difference, noise: Difference) -> bool:
    """Whether a disagreement is explained by the noise."""
    if noise.agrees:
        return False
    return found.max_rel <= NOISE_FACTOR * noise.max_rel and found.outside <= NOISE_FACTOR * noise.outside


def _nudge_weights(rng: np.random.Generator, weights: dict[str, Any]) -> dict[str, Any]:
    room = _MAX_NUDGED_BYTES
    changed = {}
    for name, array in weights.items():
        room -= array.nbytes
        if room < 0:
            break
        changed[name] = _nudged(rng, array)
    return {**weights, **changed}


def _nudged(rng: np.random.Generator, value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.str[1:] not in _EPSILON:
        return value
    size = _NUDGE * _EPSILON[value.dtype.str[1:]]
    factor = 1 + size * rng.uniform(-1, 1, value.shape)
    return np.asarray(value.astype(np.float64) * factor).astype(value.dtype)
