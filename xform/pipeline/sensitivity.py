"""Which products and convolutions have to stay in float: those whose int8 form hurts the outputs most.

All that pay are made int8. If the outputs on the calibration batches are further off than the bound, the worst ones
return to float until it holds. The measure is the relative error ||a - b|| / ||b|| over each float output (Euclidean
norm over all batches, without rows of pads where the model has a key-padding mask); the largest counts. A cosine
similarity of 0.995 between outputs corresponds to 0.1.

The worst ones are those with the largest squared error for their operations, as errors of parts add up in squares,
about, and time in float by operations: a small product goes before one of four times its size that hurts as much. The
projections of an attention return together, since the runtime's fused operators want all of them in float or all in
int8 (`xform.pipeline.attention_products`).

They are found by halving: the part in which such a unit may be (all its error in its smallest unit) is split and both
halves are measured alone, until it is one unit, which returns to float. Parts that do little are never split, so a few
bad ones among n cost a few times log n measurements. Whether the bound holds is then measured with everything else in
int8; where parts amplify one another and it does not, the halving goes on. In the end the units that were taken last
are tried in int8 again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from xform.graph.clone import clone
from xform.graph.count import bindings_of, count_node
from xform.graph.values import display_name
from xform.passes.attention.padding import find_padding
from xform.passes.integer import Quantizer
from xform.pipeline.attention_products import attention_products
from xform.pipeline.oracle import Inputs, Session
from xform.rewrite.passes import PassContext

_FEW = 2  # batches that parts are measured on: only their order matters
_TRIED_AGAIN = 6  # units in float that are tried in int8 once more

Unit = tuple[str, ...]  # original names of nodes that return to float together
Progress = Callable[[str, int, int], None]


@dataclass
class Sensitivity:
    """What was found.

    Attributes:
        chosen: The pass, with `keep` filled.
        quantized: How many nodes are in int8, by operator.
        error: Relative error of the result on the calibration batches.
        error_before: With everything in int8.
        parts: Relative error by part, each alone in int8; empty where the bound held at once.
    """

    chosen: Quantizer
    quantized: dict[str, int]
    error: float
    error_before: float
    parts: dict[tuple[str, ...], float] = field(default_factory=dict)

    def describe(self) -> str:
        """For a remark."""
        called = {"Conv": "convolutions", "MatMul": "products"}
        counts = " and ".join(f"{count} {called[kind]}" for kind, count in sorted(self.quantized.items()) if count)
        kept = f", {len(self.chosen.keep)} kept in float" if self.chosen.keep else ""
        before = f" ({self.error_before:.2g} with all of them)" if self.chosen.keep else ""
        if not counts:
            return f"nothing in int8{kept}{before}"
        return f"{counts} in int8{kept}; relative error on calibration {self.error:.2g}{before}"


class Trial:
    """One graph on calibration batches, to try quantizations of it.

    Args:
        model: The graph as the pass will get it; left as it is.
        batches: Inputs by name.
        expected: What it gives, where that is known.

    Raises:
        CouldNotRunError: The graph does not run on these inputs.
    """

    def __init__(
        self, model: ir.Model, batches: Sequence[Inputs], expected: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.model = model
        self.batches = batches
        self.expected = _outputs(model, batches) if expected is None else expected

    def error(self, candidate: Quantizer, count: int | None = None) -> float:
        """Relative error with `candidate` applied, on the first `count` batches."""
        rewritten = clone(self.model)
        candidate.run(rewritten, PassContext())
        return relative_error(_outputs(rewritten, self.batches[:count]), self.expected[:count])

    def alone(self, candidate: Quantizer, names: Collection[str], part: Collection[str]) -> float:
        """Relative error with only `part` of the products and convolutions `names` in int8, on a few batches."""
        others = (name for name in names if name not in part)
        return self.error(replace(candidate, keep=(*candidate.keep, *others)), _FEW)

    def quantized(self, candidate: Quantizer) -> dict[str, str]:
        """Operators of the nodes that the pass would rewrite, by original name."""
        context = PassContext()
        candidate.run(clone(self.model), context)
        done = {name for remark in context.remarks if remark.verdict == "applied" for name in remark.nodes}
        nodes = [(display_name(n), n.op_type) for n in self.model.graph.all_nodes() if n.op_type in ("Conv", "MatMul")]
        return {name: kind for name, kind in nodes if done.intersection((name, *name.split(", ")))}

    def operations(self, names: Collection[str]) -> dict[str, int]:
        """Operations of nodes at the sizes of the first batch, by original name; 1 where they are unknown."""
        sizes = bindings_of(self.model, self.batches[0])
        nodes = ((display_name(node), node) for node in self.model.graph.all_nodes())
        return {name: count_node(node, sizes).flops or 1 for name, node in nodes if name in names}

    def together(self) -> list[Unit]:
        """Original names of nodes that the runtime runs faster where all of them are in one kind of numbers."""
        return attention_products(self.model)


def search(trial: Trial, candidate: Quantizer, progress: Progress | None = None) -> Sensitivity:
    """Choose `keep` so that the error is at most the pass's `max_error`.

    Args:
        candidate: The pass; names that it keeps already stay kept.
    """
    told = progress or (lambda *_: None)
    told("sensitivity", 0, 1)
    kinds = trial.quantized(candidate)
    before = trial.error(candidate)
    if before <= candidate.max_error or not kinds:
        return Sensitivity(candidate, _count(kinds, ()), before, before)
    halving = _Halving(trial, candidate, tuple(kinds), told)
    worst, error = halving.run(before)
    units, error = _tried_again(trial, candidate, worst, error)
    kept = _names(units)
    chosen = replace(candidate, keep=(*candidate.keep, *kept))
    return Sensitivity(chosen, _count(kinds, kept), error, before, halving.measured)


class _Halving:
    """The search for the worst units."""

    def __init__(self, trial: Trial, candidate: Quantizer, names: tuple[str, ...], told: Progress) -> None:
        self.trial = trial
        self.candidate = candidate
        self.names = names
        self.told = told
        self.kept: list[Unit] = []
        self.measured: dict[tuple[str, ...], float] = {}
        units = _units(names, [unit for unit in trial.together() if set(unit) <= set(names)])
        self._open = {units: float("inf")}  # parts in int8, with their error alone
        operations = trial.operations(names)
        self._costs = {unit: sum(operations[name] for name in unit) for unit in units}

    def run(self, before: float) -> tuple[list[Unit], float]:
        """What returns to float, worst first, and the error that remains."""
        error = goal = before
        bound = self.candidate.max_error
        while error > bound and self._open:
            # parts that amplify one another leave more than the sum of their squares: aim lower by what is in excess
            goal = min(goal, bound if error == before else goal * bound / error)
            self._step()
            while self._open and self._estimate() > goal:
                self._step()
            if not self.kept:
                continue  # the halves alone are within the bound, both together are not: go on halving
            error = self.trial.error(replace(self.candidate, keep=(*self.candidate.keep, *_names(self.kept))))
        return self.kept, error

    def _estimate(self) -> float:
        """Error of all parts together."""
        return float(sum(error**2 for error in self._open.values()) ** 0.5)

    def _harm(self, part: tuple[Unit, ...]) -> float:
        """Squared error for operations of the worst unit that may be in a part."""
        return self._open[part] ** 2 / min(self._costs[unit] for unit in part)

    def _step(self) -> None:
        """The worst part split, or kept in float if it is one unit."""
        worst = max(self._open, key=self._harm)
        del self._open[worst]
        if len(worst) == 1:
            self.kept.append(worst[0])
            return
        for half in (worst[: len(worst) // 2], worst[len(worst) // 2 :]):
            self.told("sensitivity", min(len(self.measured) + 1, 2 * len(self._costs)), 2 * len(self._costs))
            inside = _names(half)
            self.measured[inside] = self._open[half] = self.trial.alone(self.candidate, self.names, inside)


def _units(names: Sequence[str], together: Sequence[Unit]) -> tuple[Unit, ...]:
    """`names` in their order, each alone or with those that it returns with."""
    unit_of = {name: unit for unit in together for name in unit}
    return tuple(dict.fromkeys(unit_of.get(name, (name,)) for name in names))


def _names(units: Sequence[Unit]) -> tuple[str, ...]:
    return tuple(name for unit in units for name in unit)


def _tried_again(
    trial: Trial, candidate: Quantizer, kept: Sequence[Unit], error: float
) -> tuple[tuple[Unit, ...], float]:
    """`kept` without those of the least harmful that the bound allows in int8 after all."""
    left = list(kept)
    for unit in kept[: -_TRIED_AGAIN - 1 : -1] if len(kept) > 1 else []:
        without = [other for other in left if other != unit]
        found = trial.error(replace(candidate, keep=(*candidate.keep, *_names(without))))
        if found <= candidate.max_error:
            left, error = without, found
    return tuple(left), error


def _count(kinds: Mapping[str, str], kept: Sequence[str]) -> dict[str, int]:
    found = {"Conv": 0, "MatMul": 0}
    for name, kind in kinds.items():
        found[kind] += name not in kept
    return found


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
