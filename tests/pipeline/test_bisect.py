"""Bisection: the pass, the rule application and the node of a planted error are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from xform.pipeline.bisect import bisect
from xform.pipeline.oracle import CouldNotRunError
from xform.rewrite.passes import RewritePass
from xform.rewrite.pattern import op, var
from xform.rewrite.rule import Rule


def test_rule_application_and_node_are_found(planted):
    result = bisect(planted.chain(length=10), [planted.Plain(node="none"), planted.Rule(), planted.AddToSum()])
    assert (result.bad_pass, result.index, result.rule) == ("planted_rule", 1, "wrong_add")
    assert result.nodes == ("block3/add",)
    assert result.application == 4
    assert result.before.ok and not result.after.ok
    assert result.after.max_rel_error > 10 * result.before.max_rel_error
    assert result.runs <= 8  # log2(10), and one with no application


def test_plain_pass_is_found_with_the_first_wrong_node(planted):
    result = bisect(planted.chain(), [planted.AddToSum(), planted.Plain()])
    assert (result.bad_pass, result.index) == ("planted_plain", 1)
    assert result.rule == "" and result.application is None
    assert result.nodes == ("block2/tanh",)
    assert result.divergence.operator == "Sigmoid"
    assert result.divergence.value == "block2/tanh_out"


def test_raising_rule_is_found_at_its_application(planted):
    class Raise(Rule):
        name = "raise_at_third"
        a, b = var("a"), var("b")
        pattern = op("Add", a, b)

        def rewrite(self, match, build):
            if match.roots[0].producer().name == "block2/add":
                raise RuntimeError("planted")
            return build.op("Sum", match[self.a], match[self.b])

    @dataclass(frozen=True)
    class RaisingRule(RewritePass):
        name: ClassVar[str] = "raising_rule"

        def rules(self):
            return [Raise()]

    result = bisect(planted.chain(), [RaisingRule()])
    assert result.bad_pass == "raising_rule"
    assert "RuntimeError" in result.reason
    assert result.application == 3


def test_broken_structure_is_found(planted):
    result = bisect(planted.chain(), [planted.AddToSum(), planted.Unsorted()])
    assert result.bad_pass == "unsorted"
    assert "not defined before" in result.reason
    assert result.after is None


def test_nothing_wrong(planted):
    result = bisect(planted.chain(), [planted.AddToSum()])
    assert not result.found
    assert result.after.ok


def test_model_without_reference_numbers_is_an_error(planted):
    model = planted.chain()
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(CouldNotRunError, match="nothing to bisect"):
        bisect(model, [planted.AddToSum()])


def test_result_is_json_ready(planted):
    import json

    text = json.dumps(bisect(planted.chain(), [planted.Plain()]).as_dict())
    assert "planted_plain" in text
