"""Convolutions of patches that do not overlap, as matrix products.

A convolution whose stride is its kernel, without padding, sees every pixel once: output (i, j) reads patch (i, j)
alone. With the patches as rows, and the kernel W [M, C, p, q] as a matrix,

    Conv(x, W, b)[n, m, i, j]  =  (X Wm + b)[n, (i, j), m],    X  [N, H/p W/q, p q C] = the patches of x [N, C, H, W],
                                                                Wm [p q C, M]          = W, transposed alike

in which channels come last, as the tokens of a vision transformer want them: the transpose that follows such a patch
embedding cancels the one that this rule leaves. Any number of axes in space.

Rules
1. `patches`: as above, for a constant weight.
Left alone, with a remark: a weight that is computed, sizes in space that are unknown or no multiple of the patch,
patches too narrow to pay.

Runtimes have int8 products where they have no int8 convolution (ONNX Runtime on the CPU), so this is part of the int8
form for those. In float it gains little. Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
section 3.1, which defines the patch embedding as this product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from xform.graph.values import attribute, constant, is_constant, shape_of
from xform.passes.cleanup.local import NodeRule, given
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match
from xform.rewrite.passes import PassContext, RewritePass
from xform.rewrite.rule import QUIET, Failure, Rule


@dataclass(frozen=True)
class Patches(NodeRule):
    """Rule 1."""

    name = "patches"
    op_types = ("Conv",)
    concept = "convolution"
    levels = 1

    narrowest: int

    def check(self, match: Match, context: PassContext) -> Failure | None:
        node = match.node("node")
        weight, bias = given(node, 1), given(node, 2)
        kernel, image = shape_of(weight), shape_of(node.inputs[0])
        if kernel is None or not _apart(node, kernel[2:]):
            return QUIET
        if not is_constant(weight):
            return Failure("its weight is computed, so that it cannot be transposed offline", (node,))
        if image is None or len(image) != len(kernel) or not all(isinstance(size, int) for size in image[1:]):
            return Failure("sizes of its input are unknown", (node,))
        if 0 in kernel:
            return QUIET
        patch = [int(size) for size in kernel[2:] if isinstance(size, int)]
        space = [int(size) for size in image[2:] if isinstance(size, int)]
        if any(size == 0 or size % step for size, step in zip(space, patch, strict=True)):
            return Failure(f"an input of {space} is not made of whole patches of {patch}", (node,))
        match.data.update(weight=weight, bias=bias, patch=patch, space=space)
        return None

    def profit(self, match: Match, context: PassContext) -> Failure | None:
        """Patches at least `narrowest` wide: the pixels that lie side by side are what the transpose copies at once.

        Measured in docs/onnxruntime-notes.md: in int8 1.5 to 2 times as fast from 14 pixels on, slower at 2 and 4.
        """
        node, width = match.node("node"), match.data["patch"][-1]
        if context.target.kind != "cpu":
            return Failure(f"measured to pay on the CPU only, the target is {context.target}", (node,))
        if width < self.narrowest:
            return Failure(
                f"patches {width} wide: below {self.narrowest}, bringing them into rows costs more than it saves",
                (node,),
            )
        return None

    def rewrite(self, match: Match, build: Builder) -> ir.Value:
        node, patch, space = match.node("node"), match.data["patch"], match.data["space"]
        value, bias = match.data["weight"], match.data["bias"]
        weight = constant(value)
        assert weight is not None
        axes, (outputs, channels) = len(patch), weight.shape[:2]
        counts = [size // step for size, step in zip(space, patch, strict=True)]
        # [N, C, H/p, p, W/q, q] to [N, H/p, W/q, C, p, q]
        halves = [size for pair in zip(counts, patch, strict=True) for size in pair]
        split = build.op("Reshape", node.inputs[0], [0, channels, *halves])
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        rows = build.op("Reshape", build.op("Transpose", split, perm=order), [0, prod(counts), channels * prod(patch)])
        matrix = np.ascontiguousarray(weight.reshape(outputs, -1).T)
        result = build.op("MatMul", rows, build.constant(matrix, f"{value.name or 'weight'}_matrix"))
        if bias is not None:
            result = build.op("Add", result, bias)
        return build.op("Reshape", build.op("Transpose", result, perm=[0, 2, 1]), [0, outputs, *counts])


def _apart(node: ir.Node, kernel: Sequence[int | str | None]) -> bool:
    """Whether a convolution's windows lie side by side, without gaps, overlaps or padding."""
    ones = [1] * len(kernel)
    return (
        bool(kernel)
        and attribute(node, "group", 1) == 1
        and list(attribute(node, "strides", ones)) == list(kernel)
        and list(attribute(node, "dilations", ones)) == ones
        and not any(attribute(node, "pads", []))
        and attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and prod(size for size in kernel if isinstance(size, int)) > 1
    )


@dataclass(frozen=True)
class PatchesToProducts(RewritePass):
    """Convolutions of patches that do not overlap, as matrix products.

    Attributes:
        narrowest: Least width of a patch, in pixels.
    """

    name: ClassVar[str] = "patches_to_products"
    narrowest: int = 8

    def rules(self) -> Sequence[Rule]:
        return (Patches(self.narrowest),)
