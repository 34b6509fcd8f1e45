"""Which products have to stay in float: those whose int8 form hurts the outputs most.

All products that pay are made int8. If the outputs on the calibration batches are further off than the bound, each
product is tried alone, and the worst ones return to float, one after the other, until the bound holds. The measure is
the relative error ||a - b|| / ||b|| over each float output (Euclidean norm over all batches, without rows of pads where
the model has a key-padding mask); the largest counts. A cosine similarity of 0.995 between outputs corresponds to 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.values import display_name
from xform.passes.attention.padding import find_padding
from xform.passes.integer import QuantizeProducts
from xform.pipeline.oracle import Inputs, Session
from xform.rewrite.passes import PassContext

_STEPS = 18  # comparisons at most, about, to return products to float
_FEW = 2  # batches that the products are ranked on: only their order matters

Progress = Callable[[str, int, int], None]


@dataclass
class Sensitivity:
    """What was found.

    Attributes:
        chosen: The pass, with `keep` filled.
        quantized: How many products are in int8.
        error: Relative error of the result on the calibration batches.
        error_before: With every product in int8.
        alone: Relative error by product, each alone in int8; empty where the bound held at once.
    """

    chosen: QuantizeProducts
    quantized: int
    error: float
    error_before: float
    alone: dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """For a remark."""
        kept = f", {len(self.chosen.keep)} kept in float" if self.chosen.keep else ""
        before = f" ({self.error_before:.2g} with all of them)" if self.chosen.keep else ""
        return f"{self.quantized} products in int8{kept}; relative error on calibration {self.error:.2g}{before}"


def search(
    model: ir.Model,
    batches: Sequence[Inputs],
    candidate: QuantizeProducts,
    progress: Progress | None = None,
) -> Sensitivity:
    """Choose `keep` so that the error is at most the pass's `max_error`.

    Args:
        model: The graph as `candidate` will get it; left as it is.
        batches: Inputs by name.
        candidate: The pass; names that it keeps already stay kept.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """
    max_error = candidate.max_error
    told = progress or (lambda *_: None)
    told("sensitivity", 0, 1)
    expected = _outputs(model, batches)
    names = _quantized(model, candidate)
    before = error = _error(model, batches, candidate, expected)
    if error <= max_error or not names:
        return Sensitivity(candidate, len(names), error, before)
    alone = {}
    for index, name in enumerate(names):
        told("sensitivity", index + 1, len(names) + 1)
        others = tuple(other for other in names if other != name)
        one = replace(candidate, keep=(*candidate.keep, *others))
        alone[name] = _error(model, batches[:_FEW], one, expected[:_FEW])
    worst = sorted(names, key=lambda name: alone[name], reverse=True)
    kept = 0
    while error > max_error and kept < len(worst):
        # errors of layers add up like noise at best, and amplify one another at worst: return as many at once as
        # make up for the excess if they add up, but never more than a few, as each comparison may already hold
        excess, freed, step = error**2 - max_error**2, 0.0, 0
        while kept < len(worst) and step < max(1, len(worst) // _STEPS) and (step == 0 or freed < excess):
            freed += alone[worst[kept]] ** 2
            kept, step = kept + 1, step + 1
        error = _error(model, batches, replace(candidate, keep=(*candidate.keep, *worst[:kept])), expected)
    chosen = replace(candidate, keep=(*candidate.keep, *worst[:kept]))
    return Sensitivity(chosen, len(names) - kept, error, before, alone)


def _quantized(model: ir.Model, candidate: QuantizeProducts) -> list[str]:
    """Original names of the products that the pass would rewrite."""
    context = PassContext()
    candidate.run(clone(model), context)
    done = {name for remark in context.remarks if remark.verdict == "applied" for name in remark.nodes}
    products = [display_name(node) for node in model.graph.all_nodes() if node.op_type == "MatMul"]
    return list(dict.fromkeys(name for name in products if any(part in done for part in (name, *name.split(", ")))))


def _error(
    model: ir.Model, batches: Sequence[Inputs], candidate: QuantizeProducts, expected: Sequence[dict[str, Any]]
) -> float:
    rewritten = clone(model)
    candidate.run(rewritten, PassContext())
    return relative_error(_outputs(rewritten, batches), expected)


def _outputs(model: ir.Model, batches: Sequence[Inputs]) -> list[dict[str, Any]]:
    """Outputs by name, batch by batch; rows of pads, which mean nothing, are zero."""
    padding = find_padding(model)
    mask = None if isinstance(padding, str) else padding.mask.name
    with Session(model) as session:
        return [_without_pads(session.run(batch), None if mask is None else batch[mask]) for batch in batches]


def _without_pads(outputs: Mapping[str, Any], mask: Any | None) -> dict[str, Any]:
    if mask is None:
        return dict(outputs)
    found = {}
    for name, array in outputs.items():
        rows = array.ndim > 2 and array.shape[:2] == mask.shape
        found[name] = array * (mask != 0).reshape(*mask.shape, *[1] * (array.ndim - 2)) if rows else array
    return found


def relative_error(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> float:
    """The largest over outputs of ||a - b|| / ||b||; infinite where a result is not finite and the expected one is."""
    worst = 0.0
    for name in expected[0]:
        difference = size = 0.0
        for a, b in zip((f[name] for f in found), (e[name] for e in expected), strict=True):
            if np.asarray(b).dtype.kind != "f":
                continue
            finite = np.isfinite(b)
            if not np.isfinite(a[finite]).all():
                return float("inf")
            difference += float(np.square(a[finite].astype(np.float64) - b[finite]).sum())
            size += float(np.square(b[finite].astype(np.float64)).sum())
        worst = max(worst, (difference / size) ** 0.5 if size else float(difference > 0))
    return worst
