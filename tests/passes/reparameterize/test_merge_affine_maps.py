"""merge_affine_maps on graphs: what collapses, what must stay, and the reasons given."""

from __future__ import annotations

import re

import numpy as np
import pytest
from affine_support import PASS, RNG, applied, bn, check, declared, graph, missed, norm, normal
from support import ops, parse, rewritten

from xform.rewrite.passes import PassContext

# Parallel sums


def test_repvgg_block_becomes_one_convolution():
    constants = {"w3": normal(6, 6, 3, 3), "w1": normal(6, 6, 1, 1), **norm(6, "p"), **norm(6, "q"), **norm(6, "r")}
    body = f"""a = Conv <pads=[1,1,1,1]> (x, w3) {bn("an", "a", "p")} b = Conv (x, w1) {bn("b2", "b", "q")}
               {bn("c", "x", "r")} s = Add (an, b2) t = Add (s, c) y = Relu (t)"""
    model, remarks = check(body, constants)
    assert ops(model) == ["Conv", "Relu"]
    assert model.graph[0].inputs[1].shape == [6, 6, 3, 3]
    assert remarks.count("missed") == 0


def test_residual_joins_as_identity_kernel_for_groups_too():
    constants = {"w": normal(6, 2, 3, 3), "b": normal(6)}
    model, _ = check("a = Conv <group=3, pads=[1,1,1,1]> (x, w, b) y = Add (x, a)", constants)
    assert ops(model) == ["Conv"]
    assert model.graph[0].attributes["group"].value == 3


def test_asymmetric_kernels_and_average_pooling_join():
    """ACNet's 3x3 + 1x3 + 3x1, and DBB's average-pooling branch over the same padding."""
    constants = {"w": normal(6, 6, 3, 3), "h": normal(6, 6, 1, 3), "v": normal(6, 6, 3, 1)}
    body = """a = Conv <pads=[1,1,1,1]> (x, w) b = Conv <pads=[0,1,0,1]> (x, h) c = Conv <pads=[1,0,1,0]> (x, v)
              d = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (x)
              s = Sum (a, b, c) y = Add (s, d)"""
    model, _ = check(body, constants)
    assert ops(model) == ["Conv"]
    assert model.graph[0].inputs[1].shape == [6, 6, 3, 3]


def test_strided_branches_align_at_their_first_tap():
    constants = {"w": normal(8, 6, 3, 3), "p": normal(8, 6, 1, 1), "b": normal(8)}
    body = """a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w, b) c = Conv <strides=[2,2]> (x, p) y = Add (a, c)"""
    model, _ = check(body, constants)
    assert ops(model) == ["Conv"]
    assert list(model.graph[0].attributes["strides"].value) == [2, 2]


def test_depthwise_with_scale_and_identity_norm_as_in_mobileone():
    constants = {
        **{f"w{i}": normal(6, 1, 3, 3) for i in range(3)},
        "s": normal(6, 1, 1, 1),
        **norm(6, "a"),
        **norm(6, "i"),
    }
    body = f"""k0 = Conv <group=6, pads=[1,1,1,1]> (x, w0) {bn("n0", "k0", "a")}
               k1 = Conv <group=6, pads=[1,1,1,1]> (x, w1) k2 = Conv <group=6, pads=[1,1,1,1]> (x, w2)
               c = Conv <group=6> (x, s) {bn("n", "x", "i")}
               t0 = Add (c, n) t1 = Add (t0, n0) t2 = Add (t1, k1) t3 = Add (t2, k2) y = Relu (t3)"""
    model, _ = check(body, constants)
    assert ops(model) == ["Conv", "Relu"]
    assert model.graph[0].attributes["group"].value == 6


def test_repmixer_difference_of_branches_with_layer_scale():
    """FastViT: x + scale * (mixer(x) - norm(x))."""
    constants = {"w": normal(6, 1, 3, 3), "g": normal(6, 1, 1), **norm(6, "m"), **norm(6, "n")}
    body = f"""k = Conv <group=6, pads=[1,1,1,1]> (x, w) {bn("km", "k", "m")} {bn("i", "x", "n")}
               d = Sub (km, i) s = Mul (g, d) y = Add (x, s)"""
    model, _ = check(body, constants)
    assert ops(model) == ["Conv"]


def test_a_shift_behind_a_sum_counts_once():
    constants = {"w": normal(6, 6, 1, 1), "v": normal(6, 6, 1, 1), "u": normal(4, 6, 1, 1), "b": normal(4)}
    text = graph(
        "s = Conv (x, w) t = Conv (z, v) q = Add (s, t) r = Conv (q, u, b) y = Add (r, b2)",
        constants | {"b2": normal(4, 1, 1)},
        y="[2,4,9,8]",
        extra=", float[2,6,9,8] z",
    )
    constants["b2"] = normal(4, 1, 1)
    feeds = {"x": normal(2, 6, 9, 8), "z": normal(2, 6, 9, 8)}
    model, _ = rewritten(text, constants, feeds, PASS, rtol=2e-5, atol=2e-5)
    assert sorted(ops(model)) == ["Add", "Conv", "Conv"]


def test_nested_blocks_collapse_from_the_inside():
    constants = {f"w{i}": normal(6, 6, 1, 1) for i in range(4)} | {"k": normal(6, 6, 3, 3)}
    body = """a = Conv (x, w0) b = Conv (x, w1) s = Add (a, b) c = Conv (s, w2) d = Conv (x, w3) t = Add (c, d)
              e = Conv <pads=[1,1,1,1]> (x, k) u = Add (t, e) y = Relu (u)"""
    model, _ = check(body, constants)
    assert ops(model) == ["Conv", "Relu"]


def test_branches_with_another_summand_between_them():
    constants = {"w0": normal(6, 6, 3, 3), "w1": normal(6, 6, 1, 1)}
    body = "a = Conv <pads=[1,1,1,1]> (x, w0) r = Relu (z) s = Add (a, r) b = Conv (x, w1) y = Add (s, b)"
    text = graph(body, constants, y="[2,6,9,8]", extra=", float[2,6,9,8] z")
    feeds = {"x": normal(2, 6, 9, 8), "z": normal(2, 6, 9, 8)}
    model, _ = rewritten(text, constants, feeds, PASS, rtol=2e-5, atol=2e-5)
    assert sorted(ops(model)) == ["Add", "Conv", "Relu"]


def test_one_and_three_spatial_axes():
    for rank, dims in ((1, (11,)), (3, (5, 6, 4))):
        constants = {"w": normal(4, 4, *[3] * rank), "p": normal(4, 4, *[1] * rank), "b": normal(4), **norm(4, "n")}
        pads = ",".join(["1"] * 2 * rank)
        body = f"a = Conv <pads=[{pads}]> (x, w) c = Conv (x, p, b) s = Add (a, c) {bn('y', 's', 'n')}"
        y = "[" + ",".join(["2", "M", *"DHW"[:rank]]) + "]"
        model, _ = check(body, constants, (2, 4, *dims), y)
        assert ops(model) == ["Conv"], rank


def test_transposed_convolutions_with_scale_and_parallel_branch():
    constants = {"w": normal(6, 4, 4, 4), "u": normal(6, 4, 2, 2), "g": normal(4, 1, 1), "b": normal(4)}
    body = """a = ConvTranspose <strides=[2,2], pads=[1,1,1,1]> (x, w, b) c = ConvTranspose <strides=[2,2]> (x, u)
              s = Add (a, c) y = Mul (s, g)"""
    model, _ = check(body, constants)
    assert ops(model) == ["ConvTranspose"]


# Composition


def test_linear_pair_collapses_only_where_that_is_no_costlier():
    wide = {"a": normal(12, 64), "b": normal(64, 10), "c": normal(64), "d": normal(10)}
    body = "h = MatMul (x, a) i = Add (h, c) j = MatMul (i, b) y = Add (j, d)"
    model, _ = check(body, wide, (5, 12), "[5,N]", atol=1e-4)
    assert ops(model) == ["MatMul", "Add"]
    narrow = {"a": normal(64, 4), "b": normal(4, 64), "c": normal(4), "d": normal(64)}
    model, remarks = check(body, narrow, (5, 64), "[5,N]")
    assert ops(model) == ["MatMul", "MatMul", "Add"], "the shift moves into the last one all the same"
    assert any("would cost" in r.reason for r in remarks if r.verdict == "missed")


def test_pointwise_around_a_convolution():
    constants = {"p": normal(12, 6, 1, 1), "w": normal(6, 12, 3, 3), "q": normal(4, 6, 1, 1), "b": normal(4)}
    model, _ = check("a = Conv (x, p) c = Conv (a, w) y = Conv (c, q, b)", constants)
    assert ops(model) == ["Conv"]
    assert model.graph[0].inputs[1].shape == [4, 6, 3, 3]


def test_factors_and_shifts_anywhere_in_the_chain():
    constants = {
        "g": normal(6, 1, 1), "s": normal(6, 1, 1), "w": normal(5, 6, 3, 3), "b": normal(5), "h": normal(5, 1, 1),
        "o": normal(1), **norm(5, "n"),
    }  # fmt: skip
    body = f"""a = Mul (x, g) c = Add (a, s) d = Conv (c, w, b) e = Div (d, o) f = Sub (e, h) {bn("y", "f", "n")}"""
    model, _ = check(body, constants, rtol=1e-3, atol=1e-3)
    assert ops(model) == ["Conv"]


def test_layer_scale_folds_into_the_product_before_it():
    constants = {"w": normal(12, 16), "b": normal(16), "g": normal(16)}
    model, _ = check("h = MatMul (x, w) i = Add (h, b) y = Mul (i, g)", constants, (3, 5, 12), "[3,5,N]")
    assert ops(model) == ["MatMul", "Add"]


def test_the_border_rule_names_the_convolution():
    constants = {"p": normal(12, 6, 1, 1), "b": normal(12), "w": normal(6, 12, 3, 3)}
    model, remarks = check("a = Conv (x, p, b) y = Conv <pads=[1,1,1,1]> (a, w)", constants)
    assert ops(model) == ["Conv", "Conv"]
    assert "pads its operand with zeros" in missed(remarks)[0].reason
    constants.pop("b")
    model, _ = check("a = Conv (x, p) y = Conv <pads=[1,1,1,1]> (a, w)", constants)
    assert ops(model) == ["Conv"], "without a bias the border is zero on both sides"


def test_a_border_padded_with_the_bias_can_merge():
    """DBB's 1x1-BN, border filled with the bias, k x k without padding."""
    bias = normal(12)
    row = np.broadcast_to(bias[None, :, None, None], (1, 12, 2, 10)).copy()
    column = np.broadcast_to(bias[None, :, None, None], (1, 12, 11, 2)).copy()
    constants = {
        "p": normal(12, 6, 1, 1), "b": bias, "w": normal(6, 12, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "first": np.array([[0]]), "rl": np.array([[10]]), "cl": np.array([[9]]),
        "row": row.transpose(1, 0, 2, 3)[:, 0, 0][None, :, None], "col": column[0, :, :, 0][None, :, None],
    }  # fmt: skip
    body = """a = Conv (x, p, b) q = Pad (a, pads) t = Transpose <perm=[2,1,0,3]> (q)
              s1 = ScatterND (t, first, row) s2 = ScatterND (s1, rl, row) u = Transpose <perm=[3,1,2,0]> (s2)
              s3 = ScatterND (u, first, col) s4 = ScatterND (s3, cl, col) v = Transpose <perm=[2,1,3,0]> (s4)
              y = Conv (v, w)"""
    model, _ = check(body, constants, (1, 6, 9, 8), "[1,M,H,W]", atol=1e-4)
    assert ops(model) == ["Conv"]
    constants["b"] = bias + 0.5
    model, remarks = check(body, constants, (1, 6, 9, 8), "[1,M,H,W]", atol=1e-4)
    assert "ScatterND" in ops(model)
    assert any("other values than the bias" in r.reason for r in remarks)


# Left alone, with a reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "a = Conv <pads=[1,1,1,1]> (x, w) c = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (x) y = Add (a, c)",
            "count_include_pad=0",
        ),
        (
            "p = Pad <mode=\"reflect\"> (x, pads) a = Conv (p, w) c = Conv (x, q) y = Add (a, c)",
            "reflect mode",
        ),
        (
            "p = Pad (x, pads, one) a = Conv (p, w) c = Conv (x, q) y = Add (a, c)",
            "another value than zero",
        ),
        (
            "dw = DequantizeLinear (qw, sc) a = Conv <pads=[1,1,1,1]> (x, w) c = Conv <pads=[1,1,1,1]> (x, dw) "
            "y = Add (a, c)",
            "quantized",
        ),
    ],
)  # fmt: skip
def test_inexact_neighbours_are_left(body, reason):
    constants = {
        "w": normal(6, 6, 3, 3),
        "q": normal(6, 6, 1, 1),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "one": np.array(1, np.float32),
        "qw": RNG.integers(-99, 99, (6, 6, 3, 3)).astype(np.int8),
        "sc": np.array(0.01, np.float32),
    }
    used = {name: array for name, array in constants.items() if re.search(rf"\b{name}\b", body)}
    model, remarks = check(body, used)
    assert "Add" in ops(model)
    assert any(reason in r.reason for r in missed(remarks)), [r.reason for r in missed(remarks)]
    assert not applied(remarks)


def test_a_nonlinearity_between_is_no_linear_map():
    constants = {"w": normal(6, 6, 3, 3), "q": normal(6, 6, 1, 1)}
    model, _ = check("a = Conv (x, q) r = Relu (a) y = Conv (r, w)", constants)
    assert ops(model) == ["Conv", "Relu", "Conv"]


def test_different_strides_are_told():
    constants = {"w": normal(6, 6, 3, 3), "q": normal(6, 6, 1, 1)}
    body = """a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w)
              b = Conv <pads=[1,1,1,1], strides=[1,1]> (x, w) c = MaxPool <kernel_shape=[1,1], strides=[2,2]> (b)
              y = Add (a, c)"""
    model, _ = check(body, constants, (2, 6, 8, 8))
    assert ops(model).count("Conv") == 2


def test_values_read_elsewhere_stay():
    constants = {"w": normal(12, 16), "v": normal(16, 12), "g": normal(16)}
    text = f"""g (float[3,12] x, {declared(constants)}) => (float[3,16] h, float[3,12] y)
               {{ h = MatMul (x, w) m = Mul (h, g) y = MatMul (m, v) }}"""
    model, _ = rewritten(text, constants, {"x": normal(3, 12)}, PASS, rtol=2e-5, atol=2e-5)
    assert ops(model) == ["MatMul", "MatMul"], "the factor goes into the second product; the first is an output"


# Shared weights, types, branches


def test_a_shared_weight_is_copied_only_where_that_pays_and_told():
    constants = {"w": normal(12, 8), "g": normal(8)}
    text = """g (float[{n},12] x, float[{n},12] z, float[12,8] w, float[8] g) => (float[{n},8] y, float[{n},8] u)
              {{ a = MatMul (x, w) y = Mul (a, g) u = MatMul (z, w) }}"""
    for rows, merged in ((64, True), (4, False)):
        feeds = {"x": normal(rows, 12), "z": normal(rows, 12)}
        model, remarks = rewritten(text.format(n=rows), constants, feeds, PASS, rtol=2e-5, atol=2e-5)
        assert ("Mul" not in ops(model)) == merged, rows
        assert any("copy of its own of w" in r.reason for r in applied(remarks)) == merged


def test_half_precision_weights_are_merged_in_double_and_cast_once():
    constants = {"w": normal(24, 32).astype(np.float16), "a": normal(24, 4).astype(np.float16),
                 "b": normal(4, 32).astype(np.float16)}  # fmt: skip
    text = """g (float16[3,24] x, float16[24,32] w, float16[24,4] a, float16[4,32] b) => (float16[3,32] y)
              { p = MatMul (x, w) h = MatMul (x, a) i = MatMul (h, b) y = Add (p, i) }"""
    model, _ = rewritten(text, constants, {"x": normal(3, 24).astype(np.float16)}, PASS, rtol=2e-2, atol=5e-2)
    assert ops(model) == ["MatMul"]
    wide = [constants[n].astype(np.float64) for n in "wab"]
    expected = (wide[0] + wide[1] @ wide[2]).astype(np.float16)
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), expected)


def test_a_merge_that_overflows_half_precision_is_refused():
    constants = {"w": np.full((4, 4), 60000, np.float16), "v": np.full((4, 4), 60000, np.float16)}
    text = """g (float16[3,4] x, float16[4,4] w, float16[4,4] v) => (float16[3,4] y)
              { p = MatMul (x, w) q = MatMul (x, v) y = Add (p, q) }"""
    model, remarks = rewritten(text, constants, {"x": np.full((3, 4), 1e-3, np.float16)}, PASS, rtol=1e-2)
    assert ops(model) == ["MatMul", "MatMul", "Add"]
    assert "overflows" in missed(remarks)[0].reason


def test_parallel_feed_forward_branches_widen():
    constants = {
        "a": normal(12, 20),
        "b": normal(20),
        "c": normal(20, 12),
        "d": normal(12),
        "e": normal(12, 28),
        "f": normal(28, 12),
    }
    body = """h = MatMul (x, a) i = Add (h, b) j = Gelu (i) k = MatMul (j, c) l = Add (k, d)
              m = MatMul (x, e) n = Gelu (m) o = MatMul (n, f) y = Add (l, o)"""
    model, _ = check(body, constants, (2, 5, 12), "[2,5,N]", atol=1e-4)
    assert ops(model) == ["MatMul", "Add", "Gelu", "MatMul", "Add"]
    different = body.replace("n = Gelu (m)", "n = Tanh (m)")
    model, remarks = check(different, constants, (2, 5, 12), "[2,5,N]", atol=1e-4)
    assert ops(model).count("MatMul") == 4
    assert any("different nonlinearities" in r.reason for r in missed(remarks))


def test_branches_joined_before_the_nonlinearity_merge_on_both_sides():
    constants = {n: normal(12, 20) for n in "ab"} | {n: normal(20, 12) for n in "cd"}
    body = """h = MatMul (x, a) i = MatMul (x, b) s = Add (h, i) g = Gelu (s)
              j = MatMul (g, c) k = MatMul (g, d) y = Add (j, k)"""
    model, _ = check(body, constants, (2, 5, 12), "[2,5,N]", atol=1e-4)
    assert ops(model) == ["MatMul", "Gelu", "MatMul"]


def test_batch_norm_goes_through_pooling_into_the_head():
    constants = {"w": normal(6, 10), "b": normal(10), "axes": np.array([2, 3]), **norm(6, "n")}
    body = (
        f"""r = Relu (x) {bn("n", "r", "n")} p = ReduceMean <keepdims=0> (n, axes) h = MatMul (p, w) y = Add (h, b)"""
    )
    model, remarks = check(body, constants, y="[2,M]")
    assert ops(model) == ["Relu", "ReduceMean", "MatMul", "Add"]
    assert not missed(remarks)


def test_two_heads_that_are_averaged_become_one():
    constants = {"w": normal(6, 10), "b": normal(10), "v": normal(6, 10), "c": normal(10)}
    constants |= {"two": np.array(2, np.float32), **norm(6, "p"), **norm(6, "q")}
    body = f"""{bn("m", "x", "p")} {bn("n", "x", "q")} h = MatMul (m, w) i = Add (h, b) j = MatMul (n, v) k = Add (j, c)
               s = Add (i, k) y = Div (s, two)"""
    model, _ = check(body, constants, (4, 6), "[4,M]")
    assert ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("side", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_left_to_the_runtime_is_computed_where_shapes_are_static(side):
    """TensorFlow's exports; an even kernel and a stride, so that the sides differ."""
    constants = {"w": normal(6, 6, 4, 4), "v": normal(6, 6, 4, 4)}
    body = f"""a = Conv <auto_pad="{side}", strides=[2,2]> (x, w) b = Conv <auto_pad="{side}", strides=[2,2]> (x, v)
               y = Add (a, b)"""
    model, _ = check(body, constants, (1, 6, 9, 8))
    assert ops(model) == ["Conv"]


def test_bfloat16_weights_are_cast_once():
    import ml_dtypes
    import onnx_ir as ir

    text = """g (bfloat16[3,24] x, bfloat16[24,32] w, bfloat16[24,4] a, bfloat16[4,32] b) => (bfloat16[3,32] y)
              { p = MatMul (x, w) h = MatMul (x, a) i = MatMul (h, b) y = Add (p, i) }"""
    constants = {n: normal(*s).astype(ml_dtypes.bfloat16) for n, s in (("w", (24, 32)), ("a", (24, 4)), ("b", (4, 32)))}
    model = parse(text)
    for value in list(model.graph.inputs):
        if value.name in constants:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(constants[value.name], name=value.name)
            model.graph.register_initializer(value)
    PASS.run(model, PassContext())
    assert ops(model) == ["MatMul"]
    w, a, b = (constants[n].astype(np.float64) for n in "wab")
    merged = model.graph[0].inputs[1].const_value
    assert merged.dtype == ir.DataType.BFLOAT16
    np.testing.assert_array_equal(merged.numpy(), (w + a @ b).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("height", "merges"), [("2", False), ("3", True), ("H", False)])
def test_a_pool_whose_window_may_be_larger_than_what_it_reads_stays(height: str, merges: bool) -> None:
    """A pool gives nothing where no window fits; a convolution of the same window fails."""
    rng = np.random.default_rng(11)
    constants = {"w": rng.standard_normal((2, 6, 1, 1)).astype("float32")}
    text = f"""g (float[1,6,{height},5] x, float[2,6,1,1] w) => (float[1,2,A,B] y)
               {{ a = Conv <strides=[2,2]> (x, w)  b = AveragePool <kernel_shape=[2,1]> (a)  y = Relu (b) }}"""
    size = 2 if height == "H" else int(height)
    feeds = {"x": rng.standard_normal((1, 6, size, 5)).astype("float32")}
    model, _ = rewritten(text, constants, feeds, PASS)
    assert ("AveragePool" not in ops(model)) == merges
