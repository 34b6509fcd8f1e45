"""Which products take a costly refinement: those where it spares more of the error than their share of the bound.

A scale per row of an input and outlier channels in float cost passes over activations, and what they spare differs by
product: in MiniLM-L6 they halve the error behind GELU and do nothing, or harm, in the projections of attention. So each
input of products is tried alone in int8, with and without. The share of a product in the squared bound is that of its
operations in those of all products, since time in float, the other way to spare error, goes by operations as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from xform.graph.values import display_name, is_op
from xform.passes.integer import Quantizer
from xform.pipeline.sensitivity import Progress, Trial

Variant = tuple[Trial, Quantizer]  # a graph, and the pass for it


def products_by_input(trial: Trial, candidate: Quantizer) -> dict[str, tuple[str, ...]]:
    """Original names of the products that `candidate` makes int8, by the name of what they read."""
    names = trial.quantized(candidate)
    groups: dict[str, tuple[str, ...]] = {}
    for node in trial.model.graph.all_nodes():
        if is_op(node, "MatMul") and display_name(node) in names and node.inputs[0] is not None:
            value = node.inputs[0].name or ""
            groups[value] = (*groups.get(value, ()), display_name(node))
    return groups


def where_it_pays(
    without: Variant, refined: Variant, inputs: Mapping[str, tuple[str, ...]], progress: Progress | None = None
) -> dict[str, tuple[str, ...]]:
    """Those of `inputs` whose products' squared error falls by more than their share of the bound's square.

    Args:
        without: Before.
        refined: With the refinement everywhere; the same products under the same original names.
        inputs: Names of products, by what they read; these are in int8 alone.
    """
    names = tuple(without[0].quantized(without[1]))
    operations = without[0].operations(names)
    share = without[1].max_error ** 2 / sum(operations.values()) if operations else 0.0
    paying = {}
    for index, (value, products) in enumerate(inputs.items()):
        if progress is not None:
            progress("scales per row and outliers", index, len(inputs))
        before, after = (trial.alone(candidate, names, products) for trial, candidate in (without, refined))
        if before**2 - after**2 > share * sum(operations[name] for name in products):
            paying[value] = products
    return paying
