"""`explain` finds what was done about a thing by what rules took in, not by what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import parse

import xform
from xform.cli import main
from xform.passes import PASSES
from xform.report.concepts import ALIASES, CONCEPTS, TOPICS, count_concepts, with_concepts
from xform.rewrite.remarks import Remark
from xform.rewrite.rule import Rule


def _batch_norms(path: Path, count: int) -> Path:
    """Linear layers, each followed by a BatchNorm: no convolution, which a rule of its own would name."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index in range(count):
        weights.append(numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), f"w{index}"))
        for name in "sbmv":
            array = rng.uniform(0.5, 2.0, 8).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"{name}{index}"))
        out = "y" if index == count - 1 else f"h{index}"
        parameters = [f"{name}{index}" for name in "sbmv"]
        nodes += [
            helper.make_node("MatMul", [value, f"w{index}"], [f"p{index}"], name=f"/linear{index}"),
            helper.make_node("BatchNormalization", [f"p{index}", *parameters], [f"n{index}"], name=f"/norm{index}"),
            helper.make_node("Relu", [f"n{index}"], [out], name=f"/relu{index}"),
        ]
        value = out
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_merged_batch_norms_are_found_whatever_merged_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _batch_norms(tmp_path / "m.onnx", 3)
    text = xform.optimize(path).explain("batch_norm")
    assert text.startswith("batch_norm: 0 in the result\n")
    assert text.count("done") >= 3 and all(f"/norm{i}" in text for i in range(3))
    assert main(["explain", str(path), "batch_norm"]) == 0
    shown = capsys.readouterr().out
    assert all(f"/norm{i}" in shown for i in range(3)) and "no pass touched" not in shown


def test_what_no_pass_touched_says_so_and_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).eval()
    fast = xform.optimize(model, inputs=torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    text = fast.explain("gelu")
    assert text.startswith("gelu: 1 in the result, as the model came with it (at ")
    assert text.endswith("no pass touched it")
    assert fast.explain("mish") == "mish: 0 in the result; no pass touched it"
    assert "no pass touched it. Remarks are about: " in fast.explain("nonsense")
    path = _batch_norms(tmp_path / "m.onnx", 1)
    assert main(["explain", str(path), "relu"]) == 0
    assert capsys.readouterr().out == (
        "relu: 1 in the result, as the model came with it (at /relu0); no pass touched it\n"
    )


def test_a_remark_touches_what_its_nodes_were() -> None:
    model = parse(
        """g (float[1,2,4] x, float[2] s) => (float[1,2,4] y) {
        [norm] n = BatchNormalization(x, s, s, s, s)
        [gate] g = Sigmoid(n)
        [silu] y = Mul(n, g)
        }"""
    )
    remarks = with_concepts([Remark("p", "r", "applied", ("norm", "silu", "elsewhere"))], model)
    assert remarks[0].touches == ("batch_norm", "silu")
    assert remarks[0].is_about("batch_norm") and not remarks[0].is_about("relu")
    assert remarks[0].as_dict()["touches"] == ["batch_norm", "silu"]


def test_int8_counts_integer_products_however_they_are_written() -> None:
    model = parse(
        """g (uint8[4,8] a, int8[8,8] w, float s, uint8 z, int8 zw) => (int32[4,8] y, float[4,8] v) {
        y = MatMulInteger(a, w, z, zw)
        da = DequantizeLinear(a, s, z)
        dw = DequantizeLinear(w, s, zw)
        v = MatMul(da, dw)
        }"""
    )
    assert count_concepts(model) == {"int8": 2, "linear": 1}


def _rules(base: type[Rule] = Rule) -> Iterator[type[Rule]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _rules(kind)


def test_every_concept_of_a_rule_can_be_asked_for() -> None:
    assert PASSES  # all of them are loaded
    asked = {rule.concept for rule in _rules() if rule.__module__.startswith("xform.passes.")} - {""}
    assert len(asked) > 10 and asked <= {*CONCEPTS, *TOPICS, *ALIASES}
