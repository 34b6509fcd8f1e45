"""Channels of an activation scaled to sizes alike before it is quantized, and the products that read it scaled back.

    X W = (X / s) (diag(s) W)        s [K], one factor per input channel

One scale for a tensor serves its largest channel; channels a tenth of its size keep three bits less. SmoothQuant (Xiao
et al., arXiv 2211.10438, section 4) divides by s in the norm in front, which is free but needs a norm whose readers are
all linear (`migrate_scales`). Here the division is a `Mul` of its own, so it fits every activation: of a norm that a
residual sum reads too (BERT), of an activation function, of an attention.

Rule `scale`: every activation with factors, and all products with constant weights that read it. Exact but for
rounding. The factors come from calibration (`xform.pipeline.channel_factors`), which gives them only where they pay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import ORIGIN, Array, constant, constant_tensor, display_name, is_op
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure, Rule

Factors = Mapping[str, Array]  # name of the activation -> s, float64 [K]


def product_readers(value: ir.Value) -> list[ir.Node]:
    """The float32 products with constant matrices that read `value`, beside whatever else does."""
    found = []
    for node, index in value.uses():
        weight = constant_tensor(node.inputs[1]) if is_op(node, "MatMul") and index == 0 else None
        if weight is not None and len(weight.shape) == 2 and weight.dtype is ir.DataType.FLOAT:
            found.append(node)
    return list(dict.fromkeys(found))


class PerChannel(Rule):
    """One activation that has numbers per channel, and the products that read it.

    Args:
        given: Numbers [K] by name of the activation.
    """

    concept = "int8"

    def __init__(self, given: Mapping[str, Array]) -> None:
        self.given = given

    @abstractmethod
    def fits(self, numbers: Array) -> bool:
        """Whether numbers of the right shape are such as the rule takes."""

    def root(self, reader: ir.Node) -> ir.Value:
        """What is replaced of a product."""
        return reader.outputs[0]

    def anchors(self) -> frozenset[Key] | None:
        return frozenset((("", "MatMul"),))

    def reach(self) -> int:
        return 1

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        x = node.inputs[0]
        if x is None or (x.name or "") not in self.given:
            yield QUIET
            return
        readers = [reader for reader in product_readers(x) if reader.graph is node.graph]
        if node not in readers:
            yield QUIET
            return
        rows = constant_tensor(node.inputs[1])
        numbers = self.given[x.name or ""]
        if rows is None or numbers.shape != (rows.shape.numpy()[0],) or not self.fits(numbers):
            yield Failure(f"the numbers per channel do not fit {x.name}", (node,))
            return
        nodes: dict[Hashable, ir.Node] = dict(enumerate(readers))
        yield Match(values={"x": x}, nodes=nodes, roots=tuple(self.root(reader) for reader in readers))


class Scale(PerChannel):
    """Channels divided by their factors."""

    name = "scale"

    def fits(self, numbers: Array) -> bool:
        return bool((numbers > 0).all() and np.isfinite(numbers).all())

    def rewrite(self, match: Match, build: Builder) -> Sequence[ir.Value]:
        x = match["x"]
        factors = self.given[x.name or ""]
        inverse = build.constant((1 / factors).astype(np.float32), f"{x.name}_factors")
        scaled = build.op("Mul", x, inverse)
        values = []
        for root in match.roots:
            node = root.producer()
            weight = None if node is None else constant(node.inputs[1])
            assert node is not None and weight is not None
            name = node.inputs[1].name if node.inputs[1] is not None else None
            larger = build.constant((weight * factors[:, None]).astype(np.float32), f"{name or 'weight'}_scaled")
            values.append(build.op("MatMul", scaled, larger))
            build.nodes[-1].metadata_props[ORIGIN] = display_name(node)
        return values


@dataclass(frozen=True)
class ScaleChannels(RewritePass):
    """Channels made alike in size, for quantization.

    Attributes:
        factors: By name of the activation.
    """

    name: ClassVar[str] = "scale_channels"
    factors: Factors = field(default_factory=dict, hash=False)

    def rules(self) -> Sequence[Rule]:
        return (Scale(self.factors),)
