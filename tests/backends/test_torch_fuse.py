"""Kernels take the place of what they compute in lowered modules, and only of that."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled for the GPU here, and these tests run on the CPU", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
from support import floats, parse, run

from xform.backends.torch_triton.fuse import counts, fuse
from xform.backends.torch_triton.lower import to_torch


def fused(text: str, constants: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> dict[str, int]:
    """What was fused; the fused module gives ONNX Runtime's numbers."""
    model = parse(text, constants)
    module = to_torch(model)
    found = counts(fuse(module))
    got = module(*(torch.from_numpy(feeds[v.name]) for v in model.graph.inputs))
    for one, want in zip(got, run(model, feeds), strict=True):
        np.testing.assert_allclose(one.numpy(), want, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("norm", ["LayerNormalization(s, w, b)", "RMSNormalization(s, w)"])
def test_residual_norm_gives_the_stream_too(norm: str) -> None:
    text = f"""g (float[2,3,8] x, float[2,3,8] r, float[8] w, float[8] b) => (float[2,3,8] z) {{ s = Add(x, r) n =
    {norm} z = Mul(n, s) }}"""
    feeds = {"x": floats(2, 3, 8), "r": floats(2, 3, 8)}
    assert fused(text, {"w": floats(8), "b": floats(8)}, feeds) == {"residual_norm": 1}


@pytest.mark.parametrize(
    ("shape", "sizes"), [("float[1,3,8] r", (1, 3, 8)), ("float[8] r", (8,)), ("float[q,3,8] r", (2, 3, 8))]
)
def test_a_sum_that_broadcasts_is_left_alone(shape: str, sizes: tuple[int, ...]) -> None:
    text = f"g (float[b,3,8] x, {shape}, float[8] w) => (float[b,3,8] z) {{ s = Add(x, r) z = RMSNormalization(s, w) }}"
    assert fused(text, {"w": floats(8)}, {"x": floats(2, 3, 8), "r": floats(*sizes)}) == {}


def test_bias_and_gelu() -> None:
    text = """g (float[2,3,4] x, float[4,8] w, float[8] b) => (float[2,3,8] z) { m = MatMul(x, w) s = Add(m, b) z =
    Gelu(s) }"""
    assert fused(text, {"w": floats(4, 8), "b": floats(8)}, {"x": floats(2, 3, 4)}) == {"bias_activation": 1}


def test_a_sum_that_is_read_again_keeps_its_activation() -> None:
    text = "g (float[3,8] x, float[8] b) => (float[3,8] z) { s = Add(x, b) a = Gelu(s) z = Add(a, s) }"
    assert fused(text, {"b": floats(8)}, {"x": floats(3, 8)}) == {}


@pytest.mark.parametrize("product", ["Mul(act, u)", "Mul(u, act)"])
def test_gated_unit(product: str) -> None:
    text = f"g (float[3,8] x, float[3,8] u) => (float[3,8] z) {{ s = Sigmoid(x) act = Mul(x, s) z = {product} }}"
    assert fused(text, {}, {"x": floats(3, 8), "u": floats(3, 8)}) == {"gated_unit": 1}


def test_a_gate_that_broadcasts_is_left_alone() -> None:
    text = "g (float[3,1] x, float[3,8] u) => (float[3,8] z) { s = Sigmoid(x) act = Mul(x, s) z = Mul(act, u) }"
    assert fused(text, {}, {"x": floats(3, 1), "u": floats(3, 8)}) == {}


ROTARY = """g (float[2,4,5,8] q, float[2,2,5,8] k, float[1,5,4] c, float[1,5,4] s) => (float[2,4,5,8] a,
float[2,2,5,8] b) {
    shape = Constant<value_ints=[2,5,4]>()  c1 = Expand(c, shape)  s1 = Expand(s, shape)  c2 = Expand(c, shape)  s2 =
    Expand(s, shape)
    a = RotaryEmbedding(q, c1, s1)  b = RotaryEmbedding(@, c2, s2) }"""


def rotary_feeds() -> dict[str, np.ndarray]:
    return {"q": floats(2, 4, 5, 8), "k": floats(2, 2, 5, 8), "c": floats(1, 5, 4), "s": floats(1, 5, 4)}


def test_queries_and_keys_turn_together() -> None:
    assert fused(ROTARY.replace("@", "k"), {}, rotary_feeds()) == {"rotary_qk": 1}


def test_a_key_made_of_the_turned_query_turns_by_itself() -> None:
    text = ROTARY.replace("@", "a").replace("float[2,2,5,8] b", "float[2,4,5,8] b")
    assert fused(text, {}, rotary_feeds()) == {}


@pytest.mark.parametrize("total", ["Add(m, b)", "Add(b, m)"])
def test_the_product_adds_the_bias(total: str) -> None:
    text = f"g (float[2,3,4] x, float[4,8] w, float[8] b) => (float[2,3,8] z) {{ m = MatMul(x, w) z = {total} }}"
    assert fused(text, {"w": floats(4, 8), "b": floats(8)}, {"x": floats(2, 3, 4)}) == {"linear": 1}


@pytest.mark.parametrize("shape", ["1", "3,8", "2,1,8"])
def test_what_is_no_bias_is_added_afterwards(shape: str) -> None:
    sizes = tuple(int(size) for size in shape.split(","))
    text = (
        f"g (float[2,3,4] x, float[4,8] w, float[{shape}] b) => (float[2,3,8] z) {{ m = MatMul(x, w) z = Add(m, b) }}"
    )
    assert fused(text, {"w": floats(4, 8), "b": floats(*sizes)}, {"x": floats(2, 3, 4)}) == {}


@pytest.mark.parametrize(
    ("text", "kernel", "reason"),
    [
        ("(float[2,8] x, float[8] r, float[8] w) => (float[2,8] z) { s = Add(x, r) z = RMSNormalization(s, w) }",
         "residual_norm", "shapes (2, 8) and (8,)"),
        ("(float[1,40000] x, float[40000] w) => (float[1,40000] z) { s = Add(x, x) z = RMSNormalization(s, w) }",
         "residual_norm", "40000 elements does not fit"),
        ("(float[2,8] x, float[2,1] u) => (float[2,8] z) { a = Gelu(x) z = Mul(a, u) }",
         "gated_unit", "shapes (2, 8) and (2, 1)"),
        ("(float[2,8] x, float[2,8] u) => (float[2,8] z, float[2,8] y) { a = Gelu(x) y = Neg(a) z = Mul(a, u) }",
         "gated_unit", "read elsewhere"),
        ("(float[2,8] x, float[2,8] r) => (float[2,8] z) { s = Add(x, r) z = Gelu(s) }",
         "bias_activation", "no summand is a vector"),
        ("(float[1,2,3,4] x, float[1,3,2] c, float[1,3,2] s) => (float[1,2,3,4] z) { z = RotaryEmbedding(x, c, s) }",
         "rotary_qk", "no other tensor"),
    ],
)  # fmt: skip
def test_what_is_nearly_a_kernel_is_said(text: str, kernel: str, reason: str) -> None:
    module = to_torch(parse(f"g {text}"))
    before = module.code.replace("xform_backends_torch_triton_functions_activations_gelu", "torch._C._nn.gelu")
    (finding,) = fuse(module)
    assert finding.kernel == kernel and reason in finding.missed and finding.nodes and finding.concept
    assert module.code == before
