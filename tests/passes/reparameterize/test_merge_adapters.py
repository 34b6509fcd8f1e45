"""Adapters of every kind, as merge_affine_maps meets them: low-rank, multiplicative, serial, masked, nonlinear."""

from __future__ import annotations

import numpy as np
import pytest
from affine_support import PASS, RNG, applied, bn, check, declared, missed, norm, normal
from support import ops, rewritten


@pytest.mark.parametrize("bias", [False, True])
def test_lora(bias):
    constants = {
        "w": normal(24, 32),
        "a": normal(24, 4),
        "b": normal(4, 32),
        "s": np.array(0.7, np.float32),
        "c": normal(32),
    }
    base = "p = MatMul (x, w) q = Add (p, c)" if bias else "q = MatMul (x, w)"
    if not bias:
        constants.pop("c")
    body = f"{base} h = MatMul (x, a) i = MatMul (h, b) j = Mul (i, s) y = Add (q, j)"
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]", atol=1e-4)
    assert ops(model) == (["MatMul", "Add"] if bias else ["MatMul"])


def test_dora_with_its_norm_as_a_constant_expression():
    constants = {
        "w": normal(24, 32), "a": normal(24, 4), "b": normal(4, 32), "s": np.array(0.5, np.float32),
        "m": normal(1, 32), "axes": np.array([0]), "one": np.array(1, np.float32),
    }  # fmt: skip
    body = """ba = MatMul (a, b) u = Mul (ba, s) v = Add (w, u) n = ReduceL2 <keepdims=1> (v, axes) f = Div (m, n)
              g = Sub (f, one) p = MatMul (x, w) r = Mul (g, p) h = MatMul (x, a) i = MatMul (h, b) j = Mul (f, i)
              k = Mul (j, s) l = Add (r, k) y = Add (p, l)"""
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]", atol=1e-4)
    assert ops(model) == ["MatMul"]


def test_loha_and_lokr_deltas_are_constant_expressions():
    loha = {"w": normal(16, 16), **{n: normal(16, 3) for n in "ac"}, **{n: normal(3, 16) for n in "bd"}}
    body = """p = MatMul (a, b) q = MatMul (c, d) m = Mul (p, q) t = Transpose <perm=[1,0]> (m)
              z = MatMul (x, w) e = MatMul (x, t) y = Add (z, e)"""
    model, _ = check(body, loha, (2, 5, 16), "[2,5,N]", atol=1e-4)
    assert ops(model) == ["MatMul"]
    lokr = {"w": normal(16, 16), "a": normal(4, 1, 4, 1), "b": normal(1, 4, 1, 4), "shape": np.array([16, 16])}
    body = """k = Mul (a, b) m = Reshape (k, shape) z = MatMul (x, w) e = MatMul (x, m) y = Add (z, e)"""
    model, _ = check(body, lokr, (2, 5, 16), "[2,5,N]", atol=1e-4)
    assert ops(model) == ["MatMul"]


def test_a_serial_linear_adapter_goes_into_all_its_readers():
    """ZeroI2V before packed and separate projections: I + s W2 W1 into q, k and v."""
    constants = {
        "d": normal(24, 6), "e": normal(6), "u": normal(6, 24), "f": normal(24), "s": np.array(0.5, np.float32),
        **{n: normal(24, 24) for n in ("q", "k", "v")}, "c": normal(24),
    }  # fmt: skip
    text = f"""g (float[2,5,24] x, {declared(constants)}) => (float[2,5,24] oq, float[2,5,24] ok, float[2,5,24] ov)
      {{ l = Relu (x) h = MatMul (l, d) i = Add (h, e) j = MatMul (i, u) m = Add (j, f) n = Mul (m, s) z = Add (l, n)
         oq = MatMul (z, q) p = MatMul (z, k) ok = Add (p, c) ov = MatMul (z, v) }}"""
    model, remarks = rewritten(text, constants, {"x": normal(2, 5, 24)}, PASS, rtol=1e-4, atol=1e-3)
    assert ops(model).count("MatMul") == 3
    assert ops(model).count("Add") == 3
    assert any(r.rule == "merge_into_readers" for r in applied(remarks))


def test_an_adapter_read_by_something_nonlinear_stays_for_all():
    constants = {"d": normal(24, 6), "u": normal(6, 24), "q": normal(24, 24), "k": normal(24, 24)}
    text = f"""g (float[2,5,24] x, {declared(constants)}) => (float[2,5,24] oq, float[2,5,24] ok, float[2,5,24] r)
      {{ h = MatMul (x, d) j = MatMul (h, u) z = Add (x, j) oq = MatMul (z, q) ok = MatMul (z, k) r = Relu (z) }}"""
    model, _ = rewritten(text, constants, {"x": normal(2, 5, 24)}, PASS, rtol=1e-4, atol=1e-3)
    assert ops(model).count("MatMul") == 4


def test_masked_sparsification_module_goes_into_the_output_projection():
    """PAT: mask * ((I + B A) y)."""
    mask = (RNG.random(24) > 0.4).astype(np.float32)
    constants = {"w": normal(24, 24), "b": normal(24), "a": normal(24, 6), "u": normal(6, 24), "m": mask}
    body = """p = MatMul (x, w) q = Add (p, b) h = MatMul (q, a) i = MatMul (h, u) j = Add (q, i) y = Mul (m, j)"""
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]", atol=1e-3)
    assert ops(model) == ["MatMul", "Add"]


def test_repbn_over_tokens_becomes_a_factor_and_a_shift_in_the_next_product():
    """SLAB: BN(x) + alpha x between transposes, then q, k and v."""
    constants = {"al": np.array(0.8, np.float32), "w": normal(24, 24), "v": normal(24, 24), "b": normal(24)}
    constants |= norm(24, "n")
    text = f"""g (float[2,5,24] x, {declared(constants)}) => (float[2,5,24] a, float[2,5,24] c)
      {{ r = Relu (x) t = Transpose <perm=[0,2,1]> (r) {bn("n", "t", "n")} u = Transpose <perm=[0,2,1]> (n)
         s = Mul (al, r) z = Add (u, s) e = MatMul (z, w) a = Add (e, b) f = MatMul (z, v) c = Add (f, b) }}"""
    model, _ = rewritten(text, constants, {"x": normal(2, 5, 24)}, PASS, rtol=1e-4, atol=1e-4)
    assert sorted(ops(model)) == ["Add", "Add", "MatMul", "MatMul", "Relu"]


def test_an_adapter_with_a_zero_up_projection_is_removed():
    constants = {"d": normal(24, 6), "e": normal(6), "u": np.zeros((6, 24), np.float32), "f": normal(24)}
    body = (
        """h = MatMul (x, d) i = Add (h, e) a = Gelu (i) j = MatMul (a, u) m = Add (j, f) z = Add (x, m) y = Relu (z)"""
    )
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]")
    assert ops(model) == ["Add", "Relu"], "only its bias is left"


def test_an_adapter_with_a_nonlinearity_is_left_and_told():
    constants = {"d": normal(24, 6), "e": normal(6), "u": normal(6, 24), "s": np.array(0.5, np.float32)}
    body = "h = MatMul (x, d) i = Add (h, e) a = Gelu (i) j = MatMul (a, u) m = Mul (j, s) y = Add (x, m)"
    model, remarks = check(body, constants, (2, 5, 24), "[2,5,N]")
    assert "Gelu" in ops(model)
    assert any("Gelu between its products" in r.reason for r in missed(remarks))


ROWS = np.array([-1, 24])


def rows_beside_lora(outer: str, back: np.ndarray) -> tuple[str, dict[str, np.ndarray]]:
    """A product of rows (torch's addmm between two views) with low-rank factors beside it, [2,5,24] to [2,5,40]."""
    rng = np.random.default_rng(20)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    constants = {
        "w": draw(24, 40), "c": draw(40), "a": draw(24, 4), "b": draw(4, 40), "s": np.array(0.7, np.float32),
        "rows": ROWS, "back": back,
    }  # fmt: skip
    body = f"""r = Reshape (x, rows) p = MatMul (r, w) q = Add (p, c) t = Reshape (q, back) {outer}
               h = MatMul (x, a) i = MatMul (h, b) j = Mul (i, s) y = Add (u, j)"""
    return body, constants


def test_low_rank_factors_beside_a_product_of_rows_that_changes_the_number_of_channels():
    """GPT-2's Conv1D: peft's factors read the tokens, the base product reads them as rows."""
    body, constants = rows_beside_lora("u = Identity (t)", np.array([2, 5, 40]))
    body = body.replace("u = Identity (t)", "").replace("(u, j)", "(t, j)")
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]", atol=1e-4)
    assert ops(model) == ["MatMul", "Add"]


def test_rows_that_come_back_in_another_shape_stay_apart():
    """[2,5,24] to rows to [5,2,40]: the tokens are others, so that the sum with the factors is after a transpose."""
    body, constants = rows_beside_lora("u = Transpose <perm=[1,0,2]> (t)", np.array([5, 2, 40]))
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]", atol=1e-4)
    assert ops(model).count("MatMul") == 3 and ops(model).count("Reshape") == 2


def test_rows_of_halved_tokens_stay_apart():
    """[2,5,24] to rows of 12 to [2,10,20]: the reshape takes channels for tokens."""
    rng = np.random.default_rng(21)
    constants = {"w": rng.standard_normal((12, 20)).astype(np.float32), "rows": np.array([-1, 12])}
    constants |= {"back": np.array([2, 5, 40]), "v": rng.standard_normal((24, 40)).astype(np.float32)}
    body = "r = Reshape (x, rows) p = MatMul (r, w) t = Reshape (p, back) h = MatMul (x, v) y = Add (t, h)"
    model, _ = check(body, constants, (2, 5, 24), "[2,5,N]", atol=1e-4)
    assert ops(model).count("MatMul") == 2
