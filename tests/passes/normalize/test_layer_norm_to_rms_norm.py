from __future__ import annotations

import importlib

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import applied, declared, floats, missed, ops, parse, rewritten, run

import xform
from xform.graph.values import ORIGIN, constant
from xform.passes import PASSES
from xform.passes.normalize import LayerNormToRMSNorm
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve
from xform.rewrite.passes import PassContext
from xform.target import Target

D = 8
IDS = {"ids": np.array([[1, 4, 2, 0, 7], [3, 3, 9, 10, 5]])}
WEIGHTS = {
    "table": floats(11, D) + 0.5, "pos": floats(1, 5, D) - 0.3, "g0": 1 + 0.3 * floats(D), "h0": floats(D),
    "w0": floats(D, 6) + 0.1, "b0": floats(6), "u0": floats(6, D) + 0.2, "c0": floats(D) + 1,
    "g1": 1 + 0.3 * floats(D), "h1": floats(D), "w1": floats(D, 6), "u1": floats(6, D) - 0.4, "c1": floats(D),
    "g2": 1 + 0.3 * floats(D), "h2": floats(D), "head": floats(D, 7),
}  # fmt: skip
STREAM = """
    g (int64[2,5] ids) => (float[2,5,7] y) {
        e = Gather(table, ids)
        x0 = Add(e, pos)
        n0 = LayerNormalization<axis=-1, epsilon=0.001>(x0, g0, h0)
        m0 = MatMul(n0, w0)
        a0 = Add(m0, b0)
        r0 = Relu(a0)
        d0 = MatMul(r0, u0)
        l0 = Add(d0, c0)
        x1 = Add(x0, l0)
        n1 = LayerNormalization<axis=-1, epsilon=0.001>(x1, g1, h1)
        m1 = MatMul(n1, w1)
        r1 = Relu(m1)
        d1 = MatMul(r1, u1)
        l1 = Add(d1, c1)
        x2 = Add(x1, l1)
        n2 = LayerNormalization<axis=-1, epsilon=0.001>(x2, g2, h2)
        y = MatMul(n2, head)
    }"""


def convert(text: str, feeds: dict[str, np.ndarray] = IDS, **more: np.ndarray):
    """`rewritten` with the constants that `text` mentions, and a check that RMSNorm reads values without a mean."""
    used = {k: np.asarray(v) for k, v in {**WEIGHTS, **more}.items() if k in text}
    model, remarks = rewritten(declared(text, used), used, feeds, LayerNormToRMSNorm(), rtol=1e-4, atol=1e-5)
    converted = applied(remarks, "stream") > 0
    watched = [n.inputs[0] for n in model.graph if n.op_type == "RMSNormalization"] if converted else []
    copy = model.clone()
    by_name = {v.name: v for n in copy.graph for v in n.outputs}
    copy.graph.outputs.extend([by_name[v.name] for v in dict.fromkeys(watched)])
    for array in run(copy, feeds)[len(model.graph.outputs) :]:
        assert np.abs(array.mean(axis=-1)).max() < 1e-6 * np.abs(array).max()
    return model, remarks


def test_every_norm_of_a_recentred_stream_becomes_an_rms_norm() -> None:
    model, remarks = convert(STREAM)
    assert ops(model).count("RMSNormalization") == 3
    assert "LayerNormalization" not in ops(model)
    assert applied(remarks, "stream") == 1
    assert ops(model).count("ReduceMean") == 0, "linear writers and constants are recentred in their weights"
    assert [n.attributes["epsilon"].value for n in model.graph if n.op_type == "RMSNormalization"] == [
        pytest.approx(0.001)
    ] * 3


def test_a_bias_becomes_an_add_and_one_of_zeros_nothing() -> None:
    with_bias, _ = convert(STREAM)
    without, _ = convert(STREAM, h0=np.zeros(D, np.float32), h1=np.zeros(D, np.float32), h2=np.zeros(D, np.float32))
    assert ops(with_bias).count("Add") - ops(without).count("Add") == 3


def test_new_nodes_carry_the_name_of_what_they_stand_for() -> None:
    used = {k: v for k, v in WEIGHTS.items() if k in STREAM}
    model = parse(declared(STREAM, used), used)
    for node in model.graph:
        node.name = f"layer/{node.outputs[0].name}"
    LayerNormToRMSNorm().run(model, PassContext())
    norms = [n for n in model.graph if n.op_type == "RMSNormalization"]
    assert [n.metadata_props[ORIGIN] for n in norms] == ["layer/n0", "layer/n1", "layer/n2"]


def test_a_tied_embedding_keeps_its_other_reader() -> None:
    text = STREAM.replace("y = MatMul(n2, head)", "t = Transpose<perm=[1,0]>(table)\n y = MatMul(n2, t)").replace(
        "float[2,5,7] y", "float[2,5,11] y"
    )
    model, remarks = convert(text)
    transpose = next(n for n in model.graph if n.op_type == "Transpose")
    np.testing.assert_array_equal(constant(transpose.inputs[0]), WEIGHTS["table"])
    assert any("copy of table" in r.reason and "keeps the original" in r.reason for r in remarks)


def test_layer_scale_is_folded_into_its_linear_map() -> None:
    model, _ = convert(STREAM.replace("x1 = Add(x0, l0)", "q0 = Mul(l0, ls)\n x1 = Add(x0, q0)"), ls=floats(D) + 0.1)
    assert ops(model).count("RMSNormalization") == 3
    assert "Mul" not in ops(model)


def test_one_writer_that_is_not_linear_is_recentred_explicitly() -> None:
    text = STREAM.replace("x0 = Add(e, pos)", "z = Tanh(e)\n x0 = Add(z, pos)")
    model, _ = convert(text)
    assert ops(model).count("RMSNormalization") == 3
    assert (ops(model).count("ReduceMean"), ops(model).count("Sub")) == (1, 1)


def test_a_linear_writer_that_is_read_elsewhere_is_recentred_explicitly() -> None:
    text = STREAM.replace("=> (float[2,5,7] y)", "=> (float[2,5,7] y, float[2,5,8] k)").replace(
        "x1 = Add(x0, l0)", "x1 = Add(x0, l0)\n k = Relu(l0)"
    )
    model, _ = convert(text)
    assert (ops(model).count("RMSNormalization"), ops(model).count("ReduceMean")) == (3, 1)


def test_gates_in_every_block_cost_more_than_they_save() -> None:
    text = STREAM
    for block in "01":
        text = text.replace(f"l{block} = Add", f"s{block} = Sigmoid(n{block})\n k{block} = Add")
        text = text.replace(f"Add(x{block}, l{block})", f"Add(x{block}, l{block})", 1)
        text = text.replace(f"x{int(block) + 1} = Add", f"l{block} = Mul(k{block}, s{block})\n x{int(block) + 1} = Add")
    model, remarks = convert(text)
    assert "RMSNormalization" not in ops(model)
    (reason,) = missed(remarks)
    assert reason.startswith("2 writers would be recentred") and "Mul scales" in reason


@pytest.mark.parametrize(
    ("line", "output", "why"),
    [
        ("z = MatMul(x2, head)", "float[2,5,7] z", "MatMul does not treat all channels alike"),
        ("p = ReduceMean<keepdims=0>(x2, one)\n z = MatMul(p, head)", "float[2,7] z", "sees its mean"),
        ("z = Identity(x2)", "float[2,5,8] z", "output of the graph"),
        ("z = RMSNormalization<axis=-1>(x2, g0)", "float[2,5,8] z", "RMSNormalization does not remove it"),
        ("z = Concat<axis=2>(x2, x2)", "float[2,5,16] z", "Concat joins or splits the channels"),
    ],
)
def test_readers_that_see_the_mean_are_refused_by_name(line: str, output: str, why: str) -> None:
    text = STREAM.replace("=> (float[2,5,7] y)", f"=> (float[2,5,7] y, {output})").replace(
        "y = MatMul(n2, head)", f"y = MatMul(n2, head)\n {line}"
    )
    model, remarks = convert(text, one=np.array([1]))
    assert ops(model).count("LayerNormalization") == 3
    told = [r for r in remarks if r.verdict == "missed"]
    assert any(why in r.reason for r in told)
    assert all(r.nodes for r in told)


def test_post_norm_networks_are_refused() -> None:
    text = """
        g (int64[2,5] ids) => (float[2,5,8] y) {
            e = Gather(table, ids)
            n0 = LayerNormalization<axis=-1>(e, g0, h0)
            m0 = MatMul(n0, w0)
            d0 = MatMul(m0, u0)
            x1 = Add(n0, d0)
            n1 = LayerNormalization<axis=-1>(x1, g1, h1)
            m1 = MatMul(n1, w1)
            d1 = MatMul(m1, u1)
            x2 = Add(n1, d1)
            y = LayerNormalization<axis=-1>(x2, g2, h2)
        }"""
    model, remarks = convert(text)
    assert ops(model).count("LayerNormalization") == 2
    assert ops(model).count("RMSNormalization") == 1, "the norm of the embeddings alone reads constants"
    assert all("post-norm" in reason for reason in missed(remarks))


def test_means_over_tokens_and_masks_pass_the_recentring_on() -> None:
    text = STREAM.replace(
        "n2 = Layer", "k2 = Mul(x2, mask)\n p2 = ReduceMean<keepdims=1>(k2, one)\n n2 = Layer"
    ).replace("(x2, g2, h2)", "(p2, g2, h2)")
    text = text.replace("float[2,5,7] y", "float[2,1,7] y")
    model, _ = convert(text, one=np.array([1]), mask=np.array([1, 1, 0, 1, 0], np.float32).reshape(1, 5, 1))
    assert ops(model).count("RMSNormalization") == 3


def test_maximum_over_tokens_does_not() -> None:
    text = STREAM.replace("n2 = Layer", "p2 = ReduceMax<keepdims=1>(x2, one)\n n2 = Layer").replace(
        "(x2, g2, h2)", "(p2, g2, h2)"
    )
    model, remarks = convert(text.replace("float[2,5,7] y", "float[2,1,7] y"), one=np.array([1]))
    assert "RMSNormalization" not in ops(model)
    assert any("ReduceMax" in reason for reason in missed(remarks))


def test_a_convolution_in_front_of_a_channel_last_norm() -> None:
    text = """
        g (float[2,3,8,8] x) => (float[2,4,4,8] y) {
            c = Conv<strides=[2,2]>(x, w, b)
            t = Transpose<perm=[0,2,3,1]>(c)
            y = LayerNormalization<axis=-1>(t, g0, h0)
        }"""
    model, _ = convert(text, {"x": floats(2, 3, 8, 8)}, w=floats(8, 3, 2, 2) + 0.3, b=floats(8) + 1)
    assert ops(model) == ["Conv", "Transpose", "RMSNormalization", "Add"]
    weight = constant(model.graph[0].inputs[1])
    np.testing.assert_allclose(weight.mean(axis=0), 0, atol=1e-7)


def test_gemm_in_both_orientations() -> None:
    text = """
        g (float[2,6] x) => (float[2,8] y) {
            a = Gemm<transB=1, beta=0.5>(x, wt, b)
            c = Gemm(x, w)
            s = Add(a, c)
            y = LayerNormalization<axis=-1>(s, g0, h0)
        }"""
    more = {"wt": floats(8, 6) + 0.3, "b": floats(8) + 1, "w": floats(6, 8) - 0.2}
    model, _ = convert(text, {"x": floats(2, 6)}, **more)
    assert ops(model).count("RMSNormalization") == 1


def test_depthwise_convolutions_stay() -> None:
    text = """
        g (float[2,8,4,4] x) => (float[2,4,4,8] y) {
            c = Conv<group=8>(x, w)
            t = Transpose<perm=[0,2,3,1]>(c)
            y = LayerNormalization<axis=-1>(t, g0, h0)
        }"""
    model, remarks = convert(text, {"x": floats(2, 8, 4, 4)}, w=floats(8, 1, 1, 1))
    assert "LayerNormalization" in ops(model)
    assert "in groups" in missed(remarks)[0]


def test_norms_over_two_axes_or_with_a_read_mean_stay() -> None:
    text = "g (float[2,4,8] x) => (float[2,4,8] y) { y = LayerNormalization<axis=1>(x, s) }"
    model, remarks = convert(text, {"x": floats(2, 4, 8)}, s=floats(4, 8))
    assert ops(model) == ["LayerNormalization"]
    assert "last axis" in missed(remarks)[0]


def test_float16_weights_that_would_overflow_stay() -> None:
    text = """
        g (float16[2,2] x) => (float16[2,8] y) {
            m = MatMul(x, w)
            y = LayerNormalization<axis=-1>(m, s)
        }"""
    w = np.array([[65000.0] + [-65000.0] * 7, [1.0] * 8], np.float16)
    constants = {"w": w, "s": np.ones(8, np.float16)}
    model = parse(declared(text, constants), constants)
    context = PassContext()
    assert not LayerNormToRMSNorm().run(model, context)
    assert "overflows FLOAT16" in next(iter(context.remarks)).reason


def test_two_streams_become_two() -> None:
    text = """
        g (int64[2,5] ids) => (float[2,5,8] y) {
            e = Gather(table, ids)
            n0 = LayerNormalization<axis=-1>(e, g0, h0)
            m0 = MatMul(n0, w0)
            d0 = MatMul(m0, u0)
            y = LayerNormalization<axis=-1>(d0, g1, h1)
        }"""
    _, remarks = convert(text)
    assert applied(remarks, "stream") == 2


def test_verification_accepts_it_and_it_is_registered() -> None:
    used = {k: v for k, v in WEIGHTS.items() if k in STREAM}
    result = run_pipeline(parse(declared(STREAM, used), used), [PASSES["layer_norm_to_rms_norm"]()], verify="each")
    assert result.verification.state == "ok"
    assert [p.status for p in result.passes] == ["changed"]
    assert isinstance(result.model, ir.Model)


@pytest.mark.parametrize(("kind", "converted"), [("cuda", True), ("cpu", False)])
def test_it_can_be_left_to_the_targets_that_gain(kind: str, converted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("xform.passes.normalize.layer_norm_to_rms_norm")
    monkeypatch.setattr(module, "FASTER_ON", frozenset({"cuda"}))
    used = {k: v for k, v in WEIGHTS.items() if k in STREAM}
    context = PassContext(Target(kind))
    assert LayerNormToRMSNorm(only_where_faster=True).run(parse(declared(STREAM, used), used), context) == converted
    assert any("not measured to gain" in r.reason for r in context.remarks) != converted


def test_a_float64_model_is_rewritten_as_a_float32_model_is() -> None:
    """Its epsilon is held by an attribute before and after, so that nothing is lost."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = torch.nn.Linear(4, D), torch.nn.Linear(D, D), torch.nn.Linear(D, 3)
            self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(D) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            return self.head(self.norms[1](x + self.inner(self.norms[0](x))))

    generator = torch.Generator().manual_seed(2)
    module = Block().to(torch.float64).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    result = xform.optimize(module, inputs=x, passes=[*resolve("exact"), LayerNormToRMSNorm()])
    assert result.report.concepts["rms_norm"] == 2 and "layer_norm" not in result.report.concepts
    assert result.report.verification.passed and result.report.verification.tolerance <= 1e-9
    with torch.no_grad():
        torch.testing.assert_close(result(x), module(x), rtol=1e-11, atol=1e-11)
