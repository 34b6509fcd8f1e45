"""The form in which a graph is quantized: which pass, what it keeps in float, and what is moved into weights before.

Runtimes differ in what they run fast. ONNX Runtime has products that find the range of their input at run time
(`quantize_products`, "dynamic") and no fast convolution of the kind; OpenVINO runs convolutions and, with dot-product
instructions, products with calibrated ranges (`quantize_static`, "static"). So each backend gets the form that suits
it, from the same calibration batches and under the same bound, and where several compete, the clock decides.

Where the bound does not hold with everything in int8, outliers of what norms give are moved into the weights that read
them: by SmoothQuant with either of two strengths, or by RepQuant's layer-wise scales. What lowers the error most stays,
if it lowers it by a tenth; then the search for what has to stay in float begins (`xform.pipeline.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from xform.graph.clone import clone
from xform.passes.integer import QuantizeProducts, Quantizer, QuantizeStatic
from xform.passes.normalize import LayerWiseScales, MigrateScales
from xform.pipeline.calibration import activation_ranges, norm_ranges
from xform.pipeline.oracle import Inputs
from xform.pipeline.sensitivity import Progress, Trial, search
from xform.rewrite.passes import Pass, PassContext
from xform.rewrite.remarks import Remark

_STATIC = frozenset({"openvino"})  # backends that run the static form fast
_WORTH = 0.9  # of the error before: what a migration must reach, as it makes the graph no simpler

Prepare = Callable[[Sequence[Pass]], ir.Model]  # runs passes on the captured graph


@dataclass(frozen=True)
class Form:
    """One quantization of the graph.

    Attributes:
        name: "dynamic" or "static".
        passes: All passes, with migrations, ranges and what stays in float filled in.
        remarks: What was decided.
    """

    name: str
    passes: tuple[Pass, ...]
    remarks: tuple[Remark, ...]


class Quantization:
    """Forms of one graph, each found when it is first asked for.

    Args:
        passes: As requested, one of which quantizes.
        prepare: Runs passes on the captured graph.
        batches: Calibration batches.
        progress: Called before every step.
    """

    def __init__(
        self, passes: Sequence[Pass], prepare: Prepare, batches: Sequence[Inputs], progress: Progress | None = None
    ) -> None:
        self._place = next(index for index, one in enumerate(passes) if isinstance(one, Quantizer))
        self._passes = tuple(passes)
        self._batches = batches
        self._progress = progress
        self.exact = prepare(passes[: self._place])
        self._plain = Trial(self.exact, batches)
        self._forms: dict[str, Form] = {}
        asked = self._passes[self._place]
        self._ranges_given = isinstance(asked, QuantizeStatic) and bool(asked.ranges)  # of this graph, unchanged

    def form_for(self, backend: str) -> Form:
        """The form that suits a backend.

        Raises:
            CouldNotRunError: The graph does not run on the calibration batches.
        """
        asked = self._passes[self._place]
        static = isinstance(asked, QuantizeStatic) or backend in _STATIC
        name = "static" if static else "dynamic"
        if name not in self._forms:
            self._forms[name] = self._find(name)
        return self._forms[name]

    def _find(self, name: str) -> Form:
        trial, candidate = self._plain, self._candidate(name, self._plain.model)
        before = trial.error(candidate)
        moved: Pass | None = None
        remarks = []
        if before > candidate.max_error and not self._ranges_given:
            moved, trial, candidate, remark = self._migrated(name, candidate, before)
            remarks.append(remark)
        found = search(trial, candidate, self._progress)
        told = f"{name}: {found.describe()}"
        remarks.append(Remark(candidate.name, "sensitivity", "applied", found.chosen.keep, told, "int8"))
        inside = () if moved is None else (moved,)
        passes = (*self._passes[: self._place], *inside, found.chosen, *self._passes[self._place + 1 :])
        return Form(name, passes, tuple(remarks))

    def _candidate(self, name: str, model: ir.Model) -> Quantizer:
        """The pass for one form of `model`, with everything in int8 that pays."""
        asked = self._passes[self._place]
        assert isinstance(asked, Quantizer)
        if name == "dynamic":
            return asked
        if isinstance(asked, QuantizeProducts):
            asked = QuantizeStatic(keep=asked.keep, weight_bits=asked.weight_bits, max_error=asked.max_error)
        return asked if asked.ranges else replace(asked, ranges=activation_ranges(model, self._batches))

    def _migrated(self, name: str, plain: Quantizer, before: float) -> tuple[Pass | None, Trial, Quantizer, Remark]:
        """The migration that lowers the error most, or none; the graph after it, and the pass for that graph."""
        ranges = norm_ranges(self.exact, self._batches)
        tried: list[tuple[float, str, Pass | None, Trial, Quantizer]] = [(before, "none", None, self._plain, plain)]
        for label, one in (
            ("SmoothQuant, alpha 0.5", MigrateScales(ranges, 0.5)),
            ("SmoothQuant, alpha 0.75", MigrateScales(ranges, 0.75)),
            ("RepQuant", LayerWiseScales(ranges)),
        ):
            moved = clone(self.exact)
            if not one.run(moved, PassContext()):
                continue
            candidate = self._candidate(name, moved)
            trial = Trial(moved, self._batches, self._plain.expected)
            tried.append((trial.error(candidate), label, one, trial, candidate))
        best = min(tried, key=lambda entry: entry[0])
        chosen = best if best[0] <= _WORTH * before else tried[0]
        errors = ", ".join(f"{label} {error:.3g}" for error, label, *_ in tried)
        verdict = f"{chosen[1]} before int8 ({name}); relative error with everything in int8: {errors}"
        remark = Remark("quantization", "migration", "missed" if chosen[2] is None else "applied", (), verdict, "int8")
        return chosen[2], chosen[3], chosen[4], remark


__all__ = ["Form", "Quantization"]
