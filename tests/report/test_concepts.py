"""Counting concepts and operators in a graph."""

from __future__ import annotations

from support import parse

from xform.report.concepts import CONCEPTS, count_concepts, count_op_types


def test_concepts_of_standard_and_runtime_operators() -> None:
    model = parse(
        """g (float[1,2,8,4] q, float[8] s) => (float[1,2,8,4] y) {
        a = Attention(q, q, q)
        b = com.microsoft.FastGelu(a)
        c = com.microsoft.QuickGelu(b)
        y = Softmax(c)
        }"""
    )
    assert count_concepts(model) == {"attention": 1, "gelu": 1, "silu": 1, "softmax": 1}
    assert count_op_types(model)["com.microsoft.FastGelu"] == 1


def test_products_in_int8_count_in_either_form() -> None:
    model = parse(
        """g (float[4,8] x, int8[8,8] w, float[8] t, uint8[4,8] q) => (float[4,8] y, int32[4,8] z) {
        z = MatMulInteger(q, w)
        d = DequantizeLinear<axis=1>(w, t)
        a = MatMul(x, d)
        e = MatMul(a, d)
        f = Identity(t)
        y = Mul(e, f)
        }"""
    )
    assert count_concepts(model) == {"int8": 3, "linear": 2}


def test_a_decoded_activation_alone_is_not_int8() -> None:
    model = parse(
        """g (uint8[4,8] q, float s, float[8,8] w) => (float[4,8] y) {
        x = DequantizeLinear(q, s)
        y = MatMul(x, w)
        }"""
    )
    assert count_concepts(model) == {"linear": 1}


def test_silu_is_a_product_with_its_own_sigmoid_in_either_order() -> None:
    model = parse(
        """g (float[4] x, float[4] z) => (float[4] y) {
        s = Sigmoid(x)
        a = Mul(s, x)
        t = Sigmoid(a)
        b = Mul(a, t)
        u = Sigmoid(z)
        y = Mul(b, u)
        }"""
    )
    assert count_concepts(model) == {"silu": 2, "sigmoid": 1}


def test_subgraphs_count() -> None:
    model = parse(
        """g (bool c, float[4] x) => (float[4] y) {
        y = If(c) <then_branch = t () => (float[4] a) { a = Relu(x) },
            else_branch = e () => (float[4] b) { b = Relu(x) }>
        }"""
    )
    assert count_concepts(model) == {"relu": 2}
    assert count_op_types(model) == {"If": 1, "Relu": 2}


def test_no_operator_belongs_to_two_concepts() -> None:
    keys = [key for keys in CONCEPTS.values() for key in keys]
    assert len(keys) == len(set(keys))
