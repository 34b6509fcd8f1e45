"""The form in which a graph is quantized: which pass, what it keeps in float, and what is moved into weights before.

Runtimes differ in what they run fast. ONNX Runtime has products that find the range of their input at run time
(`quantize_products`, "dynamic") and no fast convolution of the kind; OpenVINO runs convolutions and, with dot-product
instructions, products with calibrated ranges (`quantize_static`, "static"). So each backend gets the form that suits
it, from the same calibration batches and under the same bound, and where several compete, the clock decides. The
dynamic form has GELU by tanh and the static one by a polynomial (`approximate_gelu`), as that is what either runs fast,
and patch embeddings are products in the dynamic form, which has no convolutions (`patches_to_products`).

Where the bound does not hold with everything in int8, outliers of activations are moved into the weights that read
them: by the norm in front, which is free (SmoothQuant with either of two strengths, or RepQuant's layer-wise scales),
then by factors per channel of their own (`xform.pipeline.channel_factors`). Products whose error falls enough get a
scale per row of their input, with factors chosen for that, and keep outlier channels in float
(`xform.pipeline.row_scales`); rows of one-sided inputs are scaled by their largest value, and weights are rounded with
compensation (`xform.pipeline.rounding`). Products of the static form get scales by groups of channels of one row
instead, found at run time, ever finer ones (`passes.integer.grouped_products`), before and after factors, compensation
and channels moved around zero (`xform.pipeline.channel_shifts`), from the cheapest to the dearest. Each is tried only
while the bound does not hold (finer groups: while the error is a twentieth beyond it), and stays if it lowers the error
by a twentieth; then the search for what has to stay in float begins (`xform.pipeline.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import onnx_ir as ir

from xform.errors import UsageError
from xform.graph.clone import clone
from xform.graph.count import bindings_of, count
from xform.passes.cleanup import SimplifyLayout
from xform.passes.fuse import PatchesToProducts
from xform.passes.integer import (
    ApproximateGelu,
    QuantizeProducts,
    Quantizer,
    QuantizeStatic,
    ScaleChannels,
    ShiftChannels,
)
from xform.passes.integer.grouped_products import finer_groups, widest_group
from xform.passes.integer.quantize_products import outliers
from xform.passes.integer.scale_channels import Factors
from xform.passes.integer.weight_codes import dot_product_instructions
from xform.passes.normalize import LayerWiseScales, MigrateScales
from xform.passes.normalize.ranges import Ranges, load_ranges
from xform.pipeline.calibration import activation_ranges, channel_ranges, norm_ranges
from xform.pipeline.channel_factors import channel_factors
from xform.pipeline.channel_shifts import channel_shifts
from xform.pipeline.oracle import CouldNotRunError, Inputs
from xform.pipeline.rounding import compensated_grouped_weights, compensated_weights
from xform.pipeline.row_scales import Variant, products_by_input, where_it_pays
from xform.pipeline.sensitivity import Progress, Trial, search
from xform.report.schema import PassReport
from xform.rewrite.passes import Pass, PassContext
from xform.rewrite.remarks import Remark, Verdict

_STATIC = frozenset({"openvino"})  # backends that run the static form fast
_BEFORE: dict[str, tuple[Pass, ...]] = {  # what either form runs fast
    "dynamic": (ApproximateGelu("tanh"), PatchesToProducts(), SimplifyLayout()),
    "static": (ApproximateGelu("polynomial"),),
}
_OPERATIONS = 2e11  # of one measurement of the error, a few seconds: a search needs a hundred
_FEWEST = 2  # batches, however large
_NEARLY = 1.05  # times the bound: a few products in float cost less then than finer groups in all of them
_WORTH = 0.95  # of the error before: what a migration must reach, as it makes the graph no simpler

Change = tuple[str, Callable[["_Tried"], "_Tried | None"]]  # what is tried, and how; None where there is nothing to do
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


def told(remarks: Sequence[Remark], passes: Sequence[PassReport], undone: Sequence[str] = ()) -> list[Remark]:
    """What a search decided, as it is in the result: rolled back where the pass that it was for is.

    Args:
        remarks: Of a form.
        passes: What became of its passes.
        undone: Names of passes that were left out since.
    """
    gone = {report.name for report in passes if report.status == "rolled_back"} | set(undone)
    return [
        replace(one, verdict="rolled_back", reason=f"{one.pass_name} was rolled back, so this is not in the result; "
                f"found before: {one.reason}")
        if one.pass_name in gone and one.verdict == "applied"
        else one
        for one in remarks
    ]  # fmt: skip


class Quantization:
    """Forms of one graph, each found when it is first asked for.

    Args:
        passes: As requested, one of which quantizes.
        prepare: Runs passes on the captured graph.
        batches: Calibration batches: all of them for ranges, factors and rounding, the first ones for errors.
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
        self._measured = _affordable(self.exact, batches)
        try:
            self._plain = Trial(self.exact, self._measured)
        except CouldNotRunError as error:
            raise UsageError(
                f"the model does not run on the calibration data: {error.what}",
                hint="check that the sizes of its inputs agree with each other",
            ) from error
        self._forms: dict[str, Form] = {}
        asked = self._passes[self._place]
        self._ranges_given = isinstance(asked, Quantizer) and bool(asked.ranges)  # of this graph, unchanged

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
        candidate = self._candidate(name, self._plain.model)
        tried = _Tried((), self._plain, candidate)
        if not isinstance(self._passes[self._place], QuantizeStatic):  # which can be meant for any backend
            for one in _BEFORE[name]:
                tried = self._after(name, tried, one) or tried
        remarks: list[Remark] = []
        if tried.error > candidate.max_error and not self._ranges_given:
            tried = self._migrated(name, tried, remarks)
        found = search(tried.trial, tried.candidate, self._progress)
        told = f"{name}: {found.describe()}"
        done: Verdict = "applied" if any(found.quantized.values()) else "missed"
        remarks.append(Remark(candidate.name, "sensitivity", done, found.chosen.keep, told, "int8"))
        passes = (*self._passes[: self._place], *tried.moved, found.chosen, *self._passes[self._place + 1 :])
        return Form(name, passes, tuple(remarks))

    def _candidate(self, name: str, model: ir.Model) -> Quantizer:
        """The pass for one form of `model`, with everything in int8 that pays."""
        asked = self._passes[self._place]
        assert isinstance(asked, Quantizer)
        if name == "dynamic":
            return asked
        if isinstance(asked, QuantizeProducts):
            asked = QuantizeStatic(keep=asked.keep, weight_bits=asked.weight_bits, max_error=asked.max_error)
        if asked.products == "auto":  # the fastest form, from which `_refinements` go on
            asked = replace(asked, products="static" if dot_product_instructions() else "float")
        return asked if asked.ranges else replace(asked, ranges=activation_ranges(model, self._batches))

    def _migrated(self, name: str, plain: _Tried, remarks: list[Remark]) -> _Tried:
        """What lowers the error most, or nothing: first by norms, which is free, then by operators of its own."""
        ranges = norm_ranges(plain.trial.model, self._batches)
        best, errors = plain, [f"as it is {plain.error:.3g}"]

        def try_(label: str, start: _Tried, found: _Tried | None) -> None:
            nonlocal best
            if found is None:
                return
            errors.append(f"{label} {found.error:.3g}")
            if found.error <= _WORTH * start.error and found.error < best.error:
                best = found

        for label, one in (
            ("SmoothQuant with alpha 0.5", MigrateScales(ranges, 0.5)),
            ("SmoothQuant with alpha 0.75", MigrateScales(ranges, 0.75)),
            ("RepQuant", LayerWiseScales(ranges)),
        ):
            try_(label, plain, self._after(name, plain, one))

        def refine(changes: Sequence[Change]) -> list[str]:
            applied = []
            for label, change in changes:
                before = best
                if best.error > best.candidate.max_error:
                    try_(label, best, change(best))
                applied += [label] if best is not before else []
            return applied

        cheap, dear = self._refinements(name, best)
        refined = refine(cheap)
        start = best
        if best.error > best.candidate.max_error:
            factors = self._factors(start, start.candidate)
            if factors:
                label = f"factors for {len(factors)} activations"
                try_(label, start, self._after(name, start, ScaleChannels(factors)))
            if best.error > best.candidate.max_error:
                label, found = self._with_rows(name, start, best, factors)
                try_(label, best, found)
        told = [one.name for one in best.moved[len(plain.moved) :]]
        rows = best.candidate.row_scaled if isinstance(best.candidate, QuantizeProducts) else ()
        told += [f"scales per row in {len(rows)} products"] if rows else []
        told += refined + refine(dear)
        reason = (
            f"{name}, before int8: {', '.join(told) or 'nothing'}; error with everything in int8: {', '.join(errors)}"
        )
        remarks.append(Remark(best.candidate.name, "migration", "applied" if told else "missed", (), reason, "int8"))
        return best

    def _factors(self, start: _Tried, candidate: Quantizer) -> Factors:
        """Of channels, for the scales that `candidate` gives to inputs."""
        per_row = candidate.per_row if isinstance(candidate, QuantizeProducts) else _grouped(candidate)
        return channel_factors(start.trial.model, self._batches, candidate.weight_bits, per_row=per_row)

    def _with_rows(self, name: str, start: _Tried, single: _Tried, factors: Factors) -> tuple[str, _Tried | None]:
        """`single` with scales per row where they pay, and what was done.

        Args:
            start: Before factors per channel.
            single: `start` with `factors`, or as it is where they do not pay.
        """
        label = "scales per row"
        if not isinstance(start.candidate, QuantizeProducts) or start.candidate.per_row:
            return label, None
        factors = factors if single is not start else {}
        candidate = replace(start.candidate, per_row=True)
        of_rows = self._factors(start, candidate)
        everywhere = self._scaled(name, replace(start, candidate=candidate), of_rows)
        inputs = products_by_input(start.trial, candidate)
        paying = where_it_pays(single.variant, everywhere.variant, inputs, self._progress)
        if not paying:
            return label, None
        names = tuple(product for products in paying.values() for product in products)
        chosen = {value: found for value, found in factors.items() if value not in paying}
        chosen |= {value: found for value, found in of_rows.items() if value in paying}
        label = f"scales per row in {len(names)} products, factors for {len(chosen)} activations"
        candidate = replace(start.candidate, row_scaled=names)
        return label, self._scaled(name, replace(start, candidate=candidate), chosen)

    def _scaled(self, name: str, start: _Tried, factors: Factors) -> _Tried:
        """`start` with factors per channel, where there are any."""
        found = self._after(name, start, ScaleChannels(factors)) if factors else None
        return found or start

    def _refinements(self, name: str, start: _Tried) -> tuple[list[Change], list[Change]]:
        """Options of products that lower their error: those before factors per channel, and those after them.

        From the cheapest at run time to the dearest.
        """
        if isinstance(start.candidate, QuantizeProducts):
            return [], [
                ("outlier channels in float, one-sided rows", lambda at: at.but(ranges=self._ranges_that_pay(at))),
                ("rounding with compensation", lambda at: at.but(
                    codes=compensated_weights(
                        at.trial.model, self._batches, at.candidate.weight_bits, self._ranges_of(at.candidate)
                    )
                )),
            ]  # fmt: skip
        free: list[Change] = [
            ("rounding with compensation", self._rounded),
            ("channels moved around zero", lambda at: self._shifted(name, at)),
        ]
        asked = self._passes[self._place]
        if isinstance(asked, QuantizeStatic) and asked.products != "auto":
            return [], free if _grouped(start.candidate) else []
        if start.candidate.products == "float":
            return [], []
        widest = widest_group(start.trial.model)
        groups = [self._groups(size) for size in (widest, *finer_groups(widest)) if size]
        coarse = max(len(groups) - 2, 1)
        return groups[:coarse], [*free, *groups[coarse:]]

    def _groups(self, size: int) -> Change:
        """Groups of `size` channels; weights that are rounded with compensation are so again, in such blocks."""

        def change(at: _Tried) -> _Tried | None:
            if _grouped(at.candidate) and at.error <= _NEARLY * at.candidate.max_error:
                return None
            assert isinstance(at.candidate, QuantizeStatic)
            finer = at.but(products="grouped", group=size)
            return self._rounded(finer) if at.candidate.codes else finer

        return f"groups of {size} channels", change

    def _rounded(self, at: _Tried) -> _Tried | None:
        """Weights of grouped products rounded with compensation."""
        if not isinstance(at.candidate, QuantizeStatic) or not _grouped(at.candidate):
            return None
        return at.but(codes=compensated_grouped_weights(at.trial.model, self._batches, at.candidate.group))

    def _shifted(self, name: str, at: _Tried) -> _Tried | None:
        """Channels moved around zero; weights are rounded for that, as they multiply a constant now, too."""
        if not isinstance(at.candidate, QuantizeStatic) or not _grouped(at.candidate):
            return None
        shifts = channel_shifts(at.trial.model, self._batches, at.candidate.group)
        moved = self._after(name, at, ShiftChannels(shifts)) if shifts else None
        return None if moved is None else self._rounded(moved)

    def _ranges_that_pay(self, at: _Tried) -> Ranges:
        """Ranges of inputs of products, without those whose outlier channels cost more than they spare."""
        ranges = channel_ranges(at.trial.model, self._batches)
        plain = {value: span for value, span in ranges.items() if not len(outliers(span))}
        with_plain, with_all = (replace(at.candidate, ranges=found) for found in (plain, ranges))
        inputs = products_by_input(at.trial, at.candidate)
        apart = {value: products for value, products in inputs.items() if value not in plain}
        paying = where_it_pays((at.trial, with_plain), (at.trial, with_all), apart, self._progress)
        return plain | {value: ranges[value] for value in paying if value in ranges}

    @staticmethod
    def _ranges_of(candidate: Quantizer) -> Ranges:
        return load_ranges(candidate.ranges) if candidate.ranges else {}

    def _after(self, name: str, start: _Tried, one: Pass) -> _Tried | None:
        """`start` with one more pass; None where that does nothing."""
        model = clone(start.trial.model)
        if not one.run(model, PassContext()):
            return None
        candidate = start.candidate
        if isinstance(candidate, QuantizeStatic):  # whose ranges are measured again
            measured = self._candidate(name, model)
            assert isinstance(measured, QuantizeStatic)
            candidate = replace(measured, products=candidate.products, group=candidate.group)
        trial = Trial(model, self._measured, self._plain.expected)
        return _Tried((*start.moved, one), trial, candidate)


@dataclass(frozen=True)
class _Tried:
    """A graph, what was moved in it, and the pass that quantizes it."""

    moved: tuple[Pass, ...]
    trial: Trial
    candidate: Quantizer

    @cached_property
    def error(self) -> float:
        """With everything in int8; measured when it is first asked for."""
        return self.trial.error(self.candidate)

    @property
    def variant(self) -> Variant:
        return self.trial, self.candidate

    def but(self, **options: Any) -> _Tried:
        """With other options of the pass."""
        return replace(self, candidate=replace(self.candidate, **options))


def _grouped(candidate: Quantizer) -> bool:
    return isinstance(candidate, QuantizeStatic) and candidate.form_of_products == "grouped"


def _affordable(model: ir.Model, batches: Sequence[Inputs]) -> Sequence[Inputs]:
    """As many of the first batches as one measurement can afford."""
    total = 0
    for index, batch in enumerate(batches):
        total += count(model, bindings_of(model, batch)).flops
        if total > _OPERATIONS and index >= _FEWEST:
            return batches[:index]
    return batches


__all__ = ["Form", "Quantization"]
