"""Nodes for the terms of a region: every weight cast once from float64 to the type of what it is applied to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from xform.graph.rounding import rounding_loss
from xform.graph.values import Array, attribute, is_op, rank_of, shape_of
from xform.passes.reparameterize.affine_map import AffineMap
from xform.passes.reparameterize.affine_region import Region, Term, as_product, factor_and_shift
from xform.passes.reparameterize.channel_path import rebuild
from xform.passes.reparameterize.linear_map import FLOATS
from xform.rewrite.builder import Builder


@dataclass(frozen=True)
class Problem:
    """Why the terms cannot be built."""

    reason: str


def buildable(region: Region) -> bool:
    """Whether there are operators for every term."""
    return all(_has_operator(term) for terms in region.terms for term in terms)


def _has_operator(term: Term) -> bool:
    rank = rank_of(term.source)
    if rank is None or term.source.dtype not in FLOATS:
        return False
    part = term.map
    if part.diagonal:
        return True
    if as_product(term):
        return term.axis == rank - 1 and part.window.rank == 0 and part.group == 1
    if part.window.rank == 0 and not _is_never_empty(term.source):
        return False
    return part.window.rank in (0, rank - 2) and (not part.transposed or _output_padding(part) is not None)


def _is_never_empty(source: ir.Value) -> bool:
    """Whether a convolution takes the axes behind the channels: products take sizes of 0, its kernels do not."""
    return all(isinstance(size, int) and size > 0 for size in (shape_of(source) or (None, None, None))[2:])


def build(region: Region, build: Builder) -> list[ir.Value] | Problem:
    """The value of each root."""
    results: list[ir.Value] = []
    for terms in region.terms:
        row = _gathered(terms)
        problem = next((p for t in row if (p := _checked(t)) is not None), None)
        if problem is not None:
            return problem
        values = [_with_views(term, _applied(term, build), build) for term in row]
        total = values[0]
        for value in values[1:]:
            total = build.op("Add", total, value)
        results.append(total)
    return results


def _gathered(terms: Sequence[Term]) -> list[Term]:
    """Dense maps first, and all shifts of maps without views in the first of them, where a bias costs least."""
    row = sorted(terms, key=lambda t: (t.map.diagonal, bool(t.views)))
    plain = [t for t in row if not t.views]
    shifted = [t for t in plain if not t.map.unbiased]
    if len(plain) < 2 or not shifted or (len(shifted) == 1 and shifted[0] is plain[0]):
        return row
    total = np.sum([t.map.arrays[1] for t in shifted], axis=0)
    result = []
    for term in row:
        if not term.views:
            bias = total if term is plain[0] else np.zeros(term.map.outputs)
            term = Term(term.source, term.axis, _with_bias(term.map, bias), ())
        result.append(term)
    return result


def _with_bias(part: AffineMap, bias: Array) -> AffineMap:
    kernel = part.arrays[0]
    return AffineMap(
        part.inputs,
        part.outputs,
        part.group,
        part.window,
        not np.any(bias),
        lambda: (kernel, bias),
        part.transposed,
        part.name,
    )


def _checked(term: Term) -> Problem | None:
    dtype = term.source.dtype or ir.DataType.FLOAT
    for array in term.map.arrays:
        loss = rounding_loss(array, dtype, summand=array is term.map.arrays[1])
        if loss is not None:
            return Problem(f"the merged weight {term.map.name} {loss}")
    return None


def _with_views(term: Term, value: ir.Value, build: Builder) -> ir.Value:
    for view in term.views:
        if is_op(view, "Transpose"):
            value = build.op("Transpose", value, perm=list(attribute(view, "perm")))
        else:
            value = rebuild(build, view, value)
    return value


def _applied(term: Term, build: Builder) -> ir.Value:
    part, source, rank = term.map, term.source, rank_of(term.source) or 0
    dtype = source.dtype or ir.DataType.FLOAT
    name = part.name or "weight"
    if part.diagonal:
        value = source
        for op_type, vector in zip(("Mul", "Add"), factor_and_shift(part), strict=True):
            if vector is not None:
                shaped = vector.reshape(-1, *[1] * (rank - 1 - term.axis))
                base = name if op_type == "Mul" else f"{name}_bias"
                value = build.op(op_type, value, build.folded(shaped, dtype, base, summand=op_type == "Add"))
        return value
    kernel, bias = part.arrays
    shift = build.folded(bias, dtype, f"{name}_bias", summand=True) if np.any(bias) else None
    if as_product(term):
        product = build.op("MatMul", source, build.folded(kernel.T, dtype, name))
        return product if shift is None else build.op("Add", product, shift)
    if part.transposed:
        return _transposed_convolution(part, source, kernel, shift, build)
    kernel = kernel if kernel.ndim == rank else kernel.reshape(*kernel.shape[:2], *[1] * (rank - 2))
    window = part.window
    pads = [*window.begins, *(max(0, e) for e in window.ends())] if window.rank else None
    return build.op(
        "Conv",
        source,
        build.folded(kernel, dtype, name),
        shift,
        kernel_shape=list(kernel.shape[2:]),
        strides=list(window.strides) or None,
        dilations=list(window.dilations) or None,
        pads=pads,
        group=part.group,
    )


def _transposed_convolution(
    part: AffineMap, source: ir.Value, kernel: Array, shift: ir.Value | None, build: Builder
) -> ir.Value:
    dtype, window, group = source.dtype or ir.DataType.FLOAT, part.window, part.group
    blocks = kernel.reshape(group, part.outputs // group, part.inputs // group, *window.kernel)
    weight = np.swapaxes(blocks, 1, 2).reshape(part.inputs, part.outputs // group, *window.kernel)
    extra = _output_padding(part)
    return build.op(
        "ConvTranspose",
        source,
        build.folded(weight, dtype, part.name or "weight"),
        shift,
        kernel_shape=list(window.kernel),
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.begins, *(max(0, e) for e in window.ends(transposed=True))],
        output_padding=list(extra) if extra and any(extra) else None,
        group=group,
    )


def _output_padding(part: AffineMap) -> tuple[int, ...] | None:
    """Output padding of a transposed convolution; None if ONNX does not allow what is needed."""
    extra = tuple(max(0, -e) for e in part.window.ends(transposed=True))
    window = part.window
    fits = all(x < max(s, d) for x, s, d in zip(extra, window.strides, window.dilations, strict=True))
    return extra if fits else None
