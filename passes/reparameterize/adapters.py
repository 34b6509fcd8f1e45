"""What cannot be merged although it looks like an adapter: told, never changed."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from xform.patterns import adapter
from xform.rewrite.builder import Builder
from xform.rewrite.matcher import Match, Search
from xform.rewrite.pattern import Key
from xform.rewrite.rule import QUIET, Failure, Rule


class NonlinearAdapter(Rule):
    """x + up(act(down(x))): the activation stands between the products, so that they are no linear map."""

    name = "nonlinear_adapter"
    concept = "reparameterization"

    def anchors(self) -> frozenset[Key] | None:
        return frozenset({("", "Add")})

    def reach(self) -> int:
        return 6

    def matches(self, node: ir.Node, search: Search) -> Iterator[Match | Failure]:
        found = adapter.read(node)
        if found is not None:
            reason = (
                f"an adapter of {found.hidden} channels beside {found.width} has {found.activation.op_type} between "
                "its products: it is not affine and cannot be merged"
            )
            yield Failure(reason, (node, found.activation))

    def rewrite(self, match: Match, build: Builder) -> Failure:
        return QUIET
