"""One case per rule of the pass, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import applied, apply, floats, missed, ops, parse, rewritten, run

from xform.passes.cleanup import InferShapes
from xform.passes.reparameterize import RaiseBlockLinear

PASS = RaiseBlockLinear()


def block_dense(width: int, inner: int, outputs: int, blocks: int, tokens: str = "2, 5") -> str:
    """x [tokens, width] through a block-diagonal product to `inner` channels, then a dense one with a bias."""
    static = "," not in tokens or not tokens.split(",")[0].strip().isdigit()
    back = f"int64[3] back = {{0, 0, {inner}}}" if static else f"int64[3] back = {{2, 5, {inner}}}"
    split = f"int64[4] split = {{0, 0, {blocks}, {width // blocks}}}"
    return f"""m (float[{tokens}, {width}] x, float[{blocks}, {width // blocks}, {inner // blocks}] w,
          float[{inner}, {outputs}] u, float[{outputs}] b) => (float[{tokens}, {outputs}] y) <{split}, {back}> {{
        blocks = Reshape(x, split)
        moved = Transpose<perm = [0, 2, 1, 3]>(blocks)
        mixed = MatMul(moved, w)
        placed = Transpose<perm = [0, 2, 1, 3]>(mixed)
        joined = Reshape(placed, back)
        product = MatMul(joined, u)
        y = Add(product, b)
    }}"""


def block_dense_weights(width: int, inner: int, outputs: int, blocks: int) -> dict[str, np.ndarray]:
    return {
        "w": floats(blocks, width // blocks, inner // blocks),
        "u": floats(inner, outputs),
        "b": floats(outputs),
    }


def test_blocks_merge_into_the_dense_product_behind_them() -> None:
    weights = block_dense_weights(12, 12, 7, 3)
    model, remarks = rewritten(block_dense(12, 12, 7, 3), weights, {"x": floats(2, 5, 12)}, PASS, rtol=1e-4, atol=1e-5)
    assert ops(model) == ["MatMul", "Add"]
    assert applied(remarks, "densify") == 1
    remark = next(r for r in remarks if r.verdict == "applied")
    assert remark.cost_before is not None and remark.cost_after is not None
    # 10 tokens: 21 x (3 blocks of 4 x 4) + 21 x 12 x 7 + 11 x 7, against 21 x 12 x 7 + 11 x 7
    assert (remark.cost_before.flops, remark.cost_after.flops) == (21 * 48 + 21 * 84 + 77, 21 * 84 + 77)


def test_dynamic_tokens() -> None:
    weights = block_dense_weights(12, 12, 7, 3)
    feeds = {"x": floats(3, 4, 12)}
    text = block_dense(12, 12, 7, 3, "batch, seq")
    model, _ = rewritten(text, weights, feeds, PASS, rtol=1e-4, atol=1e-5)
    assert ops(model) == ["MatMul", "Add"]


def test_costlier_dense_matrix_is_left_with_both_figures() -> None:
    weights = block_dense_weights(12, 3, 12, 3)
    model, remarks = rewritten(block_dense(12, 3, 12, 3), weights, {"x": floats(2, 5, 12)}, PASS)
    assert "Transpose" in ops(model)
    assert missed(remarks) == ["one dense matrix would cost 756 FLOPs and parameters, the blocks cost 252"]


SHUFFLE = """m (float[batch, seq, 8] x, float[2, 4, 4] first, float[2, 4, 4] second) => (float[batch, seq, 8] y)
    <int64[3] split = {-1, 2, 4}, int64[3] shuffle = {-1, 4, 2}> {
        shape = Shape(x)
        view = Reshape(x, split)
        moved = Transpose<perm = [1, 0, 2]>(view)
        mixed = MatMul(moved, first)
        placed = Transpose<perm = [1, 0, 2]>(mixed)
        shuffled = Reshape(placed, shuffle)
        again = Transpose<perm = [2, 0, 1]>(shuffled)
        mixed2 = MatMul(again, second)
        placed2 = Transpose<perm = [1, 2, 0]>(mixed2)
        y = Reshape(placed2, shape)
    }"""


def test_block_shuffle_with_flattened_dynamic_tokens() -> None:
    """Two factors with a permutation of channels in between, over batch * seq tokens."""
    weights = {"first": floats(2, 4, 4), "second": floats(2, 4, 4)}
    model, _ = rewritten(SHUFFLE, weights, {"x": floats(3, 5, 8)}, PASS, rtol=1e-4, atol=1e-5)
    assert [op for op in ops(model) if op != "Shape"] == ["MatMul"]


def test_one_remark_for_a_chain_with_two_batched_products() -> None:
    narrow = SHUFFLE.replace("[batch, seq, 8]", "[batch, seq, 16]").replace("[2, 4, 4]", "[4, 4, 4]")
    narrow = narrow.replace("{-1, 2, 4}", "{-1, 4, 4}").replace("{-1, 4, 2}", "{-1, 4, 4}")
    weights = {"first": floats(4, 4, 4), "second": floats(4, 4, 4)}
    _, remarks = rewritten(narrow, weights, {"x": floats(3, 5, 16)}, PASS)
    assert missed(remarks) == ["one dense matrix would cost 768 FLOPs and parameters, the blocks cost 384"]


def test_einsum_with_a_matrix_per_block_and_a_dense_product_before_it() -> None:
    text = """m (float[2, 5, 6] x, float[6, 8] v, float[2, 4, 3] w) => (float[2, 5, 6] y)
        <int64[4] split = {2, 5, 2, 4}, int64[3] back = {2, 5, 6}> {
            wide = MatMul(x, v)
            view = Reshape(wide, split)
            mixed = Einsum<equation = "btni,nio->btno">(view, w)
            y = Reshape(mixed, back)
        }"""
    weights = {"v": floats(6, 8), "w": floats(2, 4, 3)}
    model, _ = rewritten(text, weights, {"x": floats(2, 5, 6)}, PASS, rtol=1e-4, atol=1e-5)
    assert ops(model) == ["MatMul"]


def test_weight_on_the_left_and_arithmetic_per_channel() -> None:
    """W x over the last axis but one; a factor and a shift per channel on the way, a constant minus a value."""
    text = """m (float[5, 12] x, float[2, 6, 6] w, float[2, 6, 1] s, float[2, 6, 1] b, float[12] c) => (float[5, 12] y)
        <int64[3] split = {5, 2, 6}, int64[2] back = {5, 12}> {
            view = Reshape(x, split)
            columns = Transpose<perm = [1, 2, 0]>(view)
            mixed = MatMul(w, columns)
            scaled = Mul(mixed, s)
            shifted = Add(b, scaled)
            tokens = Transpose<perm = [2, 0, 1]>(shifted)
            flat = Reshape(tokens, back)
            negative = Sub(c, flat)
            y = MatMul(negative, u)
        }"""
    text = text.replace("float[12] c)", "float[12] c, float[12, 3] u)").replace("(float[5, 12] y)", "(float[5, 3] y)")
    weights = {"w": floats(2, 6, 6), "s": floats(2, 6, 1), "b": floats(2, 6, 1), "c": floats(12), "u": floats(12, 3)}
    model, _ = rewritten(text, weights, {"x": floats(5, 12)}, PASS, rtol=1e-4, atol=1e-5)
    assert ops(model) == ["MatMul", "Add"]


def test_channels_on_two_axes_of_operand_and_result() -> None:
    text = """m (float[batch, 5, 2, 2] x, float[2, 2, 2] w, float[2, 2, 2] v) => (float[batch, 5, 2, 2] y) {
            moved = Transpose<perm = [0, 2, 1, 3]>(x)
            first = MatMul(moved, w)
            shuffled = Transpose<perm = [0, 3, 2, 1]>(first)
            second = MatMul(shuffled, v)
            y = Transpose<perm = [0, 2, 3, 1]>(second)
        }"""
    weights = {"w": floats(2, 2, 2), "v": floats(2, 2, 2)}
    model, _ = rewritten(text, weights, {"x": floats(4, 5, 2, 2)}, PASS, rtol=1e-4, atol=1e-5)
    assert ops(model) == ["Reshape", "MatMul", "Reshape"]


@pytest.mark.parametrize(
    "body",
    [
        "moved = Transpose<perm = [0, 2, 1]>(x) mixed = MatMul(w, moved) y = Transpose<perm = [0, 2, 1]>(mixed)",
        "mixed = MatMul(w, x) y = Identity(mixed)",
    ],
    ids=["per token", "over tokens"],
)
def test_matrix_per_token_or_over_tokens_is_left(body: str) -> None:
    """The leading axis of w goes with the batch: a matrix for each token; or the product runs over the tokens."""
    text = f"m (float[2, 4, 4] x, float[2, 4, 4] w) => (float[2, 4, 4] y) {{ {body} }}"
    model, remarks = rewritten(text, {"w": floats(2, 4, 4)}, {"x": floats(2, 4, 4)}, PASS)
    assert "MatMul" in ops(model) and applied(remarks, "densify") == 0 and missed(remarks) == []


def test_value_read_elsewhere_ends_the_chain() -> None:
    text = block_dense(12, 12, 7, 3).replace("(float[2, 5, 7] y)", "(float[2, 5, 7] y, float[2, 5, 12] joined)")
    weights = block_dense_weights(12, 12, 7, 3)
    model, remarks = rewritten(text, weights, {"x": floats(2, 5, 12)}, PASS)
    assert ops(model).count("MatMul") == 2 and "Transpose" in ops(model)
    assert missed(remarks) == ["one dense matrix would cost 3,024 FLOPs and parameters, the blocks cost 1,008"]


def test_a_weight_that_others_read_is_not_saved() -> None:
    """Equal cost only if the block weights went away; they stay, so the dense form costs more."""
    text = """m (float[3, 2] x, float[3, 2] z, float[2, 1, 1] w, float[2, 2] u) => (float[3, 2] y, float[2, 3, 1] other)
        <int64[3] split = {3, 2, 1}, int64[2] back = {3, 2}> {
            view = Reshape(x, split)
            moved = Transpose<perm = [1, 0, 2]>(view)
            mixed = MatMul(moved, w)
            placed = Transpose<perm = [1, 0, 2]>(mixed)
            y = Reshape(placed, back)
            view2 = Reshape(z, split)
            moved2 = Transpose<perm = [1, 0, 2]>(view2)
            other = Mul(moved2, w)
        }""".replace(", float[2, 2] u", "")
    model, remarks = rewritten(text, {"w": floats(2, 1, 1)}, {"x": floats(3, 2), "z": floats(3, 2)}, PASS)
    assert applied(remarks, "densify") == 0 and "MatMul" in ops(model)


def test_float16_is_rounded_once() -> None:
    text = block_dense(12, 12, 7, 3).replace("float[", "float16[")
    weights = {name: (array / 4).astype("float16") for name, array in block_dense_weights(12, 12, 7, 3).items()}
    model = parse(text, weights)
    apply(model, PASS, InferShapes())
    w, u = weights["w"].astype("float64"), weights["u"].astype("float64")
    blocks = np.zeros((12, 12))
    for n in range(3):
        blocks[4 * n : 4 * n + 4, 4 * n : 4 * n + 4] = w[n]
    product = next(node for node in model.graph if node.op_type == "MatMul")
    tensor = product.inputs[1].const_value
    assert tensor is not None and tensor.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(tensor.numpy(), (blocks @ u).astype("float16"))


def test_overflow_of_the_weight_type_is_refused() -> None:
    text = block_dense(12, 12, 7, 3).replace("float[", "float16[")
    weights = {name: (300 * np.ones_like(a)).astype("float16") for name, a in block_dense_weights(12, 12, 7, 3).items()}
    model = parse(text, weights)
    remarks = apply(model, PASS)
    assert missed(remarks) == ["the dense matrix overflows FLOAT16"]


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.integers(2, 4),
    width=st.integers(1, 4),
    inner=st.integers(1, 4),
    outputs=st.integers(1, 5),
    tokens=st.integers(1, 4),
    seed=st.integers(0, 1 << 16),
)
def test_property_in_float64(blocks: int, width: int, inner: int, outputs: int, tokens: int, seed: int) -> None:
    """Blocks, a shuffle, blocks again, then a dense product, over odd sizes: to 1e-12, whether or not it pays."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((blocks, width, inner))
    v = rng.standard_normal((blocks, inner, inner))
    u, b = rng.standard_normal((blocks * inner, outputs)), rng.standard_normal(outputs)
    text = f"""m (double[{tokens}, {blocks * width}] x, double[{blocks}, {width}, {inner}] w,
              double[{blocks}, {inner}, {inner}] v, double[{blocks * inner}, {outputs}] u, double[{outputs}] b)
              => (double[{tokens}, {outputs}] y)
        <int64[3] split = {{{tokens}, {blocks}, {width}}}, int64[3] shuffle = {{{tokens}, {inner}, {blocks}}},
         int64[2] back = {{{tokens}, {blocks * inner}}}> {{
            view = Reshape(x, split)
            moved = Transpose<perm = [1, 0, 2]>(view)
            mixed = MatMul(moved, w)
            placed = Transpose<perm = [1, 0, 2]>(mixed)
            shuffled = Reshape(placed, shuffle)
            again = Transpose<perm = [2, 0, 1]>(shuffled)
            mixed2 = MatMul(again, v)
            placed2 = Transpose<perm = [1, 2, 0]>(mixed2)
            flat = Reshape(placed2, back)
            product = MatMul(flat, u)
            y = Add(product, b)
        }}"""
    constants = {"w": w, "v": v, "u": u, "b": b}
    feeds = {"x": rng.standard_normal((tokens, blocks * width))}
    model = parse(text, constants)
    expected = run(model, feeds)[0]
    apply(model, PASS)
    np.testing.assert_allclose(run(model, feeds)[0], expected, rtol=1e-12, atol=1e-12)
