"""raise_attention, masks: every kind becomes one additive mask, rows without keys included."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, floats, missed, ops, rewritten, run

from xform.graph.values import scalar
from xform.passes.canonicalize.raise_attention import RaiseAttention

B, H, S, T, D = 2, 4, 3, 5, 8
LOWEST = float(np.finfo(np.float32).min)
NUMBERS = {
    "c": np.float32(0.3),
    "two": np.float32(2),
    "zero": np.float32(0),
    "lowest": np.float32(LOWEST),
    "infinite": np.float32(-np.inf),
    "billion": np.float32(-1e9),
    "thousands": np.float32(-1e4),
    "hundred": np.float32(-100),
    "half_lowest": np.float16(np.finfo(np.float16).min),
}
TYPES = ", ".join(f"{'float16' if v.dtype == np.float16 else 'float'} {name}" for name, v in NUMBERS.items())
FOUR = f"float[B,{H},S,{D}] q, float[B,{H},T,{D}] k, float[B,{H},T,{D}] v"
FEEDS = {"q": floats(B, H, S, D), "k": floats(B, H, T, D), "v": floats(B, H, T, D)}
QK = "kt = Transpose <perm = [0, 1, 3, 2]> (k) m = MatMul(q, kt) x = Mul(m, c) "
P_V = "p = Softmax <axis = -1> (l)  out = MatMul(p, v)"


def graph(body: str, masks: str, inputs: str = FOUR, output: str = f"float[B,{H},S,{D}] out") -> str:
    return f"g ({inputs}, {masks}, {TYPES}) => ({output}) {{ {body} }}"


def open_mask(*shape: int) -> np.ndarray:
    """Random, with at least one key for every query."""
    mask = np.random.default_rng(1).random(shape) > 0.5
    mask[..., 0] = True
    return mask


def closed_mask(*shape: int) -> np.ndarray:
    """As `open_mask`, with one query that has no key."""
    mask = open_mask(*shape)
    mask.reshape(-1, shape[-1])[1] = False
    return mask


SHAPES = {
    "full": (B, H, S, T),
    "per_batch": (B, 1, S, T),
    "per_head": (1, H, S, T),
    "two_axes": (S, T),
    "three_axes": (H, S, T),
    "keys": (B, 1, 1, T),
    "keys_only": (T,),
    "queries": (B, 1, S, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_additive_masks_of_every_shape(shape: str, dynamic: bool) -> None:
    dims = SHAPES[shape]
    names = {B: "B", S: "S", T: "T"} if dynamic else {}
    mask = f"float[{','.join(str(names.get(d, d)) for d in dims)}] mask"
    inputs = FOUR if dynamic else f"float[{B},{H},{S},{D}] q, float[{B},{H},{T},{D}] k, float[{B},{H},{T},{D}] v"
    body = f"{QK} l = Add(x, mask) {P_V}"
    output = f"float[{'B' if dynamic else B},{H},{'S' if dynamic else S},{D}] out"
    model, remarks = rewritten(
        graph(body, mask, inputs, output), NUMBERS, FEEDS | {"mask": floats(*dims)}, RaiseAttention()
    )
    assert applied(remarks, "product") == 1
    assert ops(model).count("Attention") == 1
    assert ("Expand" in ops(model)) == (dims[-2:] != (S, T))


ADDITIVE = {
    "mask_first": "l = Add(mask, x)",
    "subtracted": "l = Sub(x, mask)",
    "twice": "a = Add(x, mask) l = Add(a, mask)",
    "scaled_after": "a = Add(m, mask) l = Mul(a, c)",
}


@pytest.mark.parametrize("spelling", ADDITIVE)
def test_additive_spellings(spelling: str) -> None:
    text = ADDITIVE[spelling]
    feeds = FEEDS | {"mask": floats(B, 1, S, T)}
    body = f"{QK} {text} {P_V}".replace("x = Mul(m, c)" if "(m," in text else "none", "")
    model, _ = rewritten(graph(body, "float[B,1,S,T] mask"), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


def test_a_mask_that_is_a_product_itself() -> None:
    """Relative positions as a second product: one of the two becomes the mask."""
    body = f"{QK} r = MatMul(q, positions) l = Add(x, r) {P_V}"
    feeds = FEEDS | {"positions": floats(B, H, D, T)}
    model, _ = rewritten(graph(body, f"float[B,{H},{D},T] positions"), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert ops(model).count("MatMul") == 1


WHERES = {
    "keep": ("l = Where(mask, x, {fill})", False),
    "drop": ("l = Where(mask, {fill}, x)", True),
    "added": ("a = Where(mask, zero, {fill}) l = Add(x, a)", False),
    "with_bias": ("a = Add(x, bias) l = Where(mask, a, {fill})", False),
}
BIAS = {"bias": floats(1, H, S, T)}
LEARNED = f"float[1,{H},{S},{T}] bias"
FIXED = f"float[B,{H},{S},{D}] q, float[B,{H},{T},{D}] k, float[B,{H},{T},{D}] v"


@pytest.mark.parametrize("spelling", WHERES)
@pytest.mark.parametrize("fill", ["lowest", "infinite", "billion"])
def test_boolean_masks(spelling: str, fill: str) -> None:
    text, inverted = WHERES[spelling]
    mask = open_mask(B, 1, S, T)
    feeds = FEEDS | {"mask": ~mask if inverted else mask}
    text = graph(f"{QK} {text.format(fill=fill)} {P_V}", f"bool[B,1,{S},{T}] mask, {LEARNED}", FIXED)
    model, _ = rewritten(text, NUMBERS | BIAS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


@pytest.mark.parametrize("spelling", ["keep", "drop", "with_bias"])
@pytest.mark.parametrize("fill", ["lowest", "billion"])
def test_a_query_without_keys_gets_equal_weights_where_a_finite_fill_gave_them(spelling: str, fill: str) -> None:
    text, inverted = WHERES[spelling]
    mask = closed_mask(B, 1, S, T)
    feeds = FEEDS | {"mask": ~mask if inverted else mask}
    text = graph(f"{QK} {text.format(fill=fill)} {P_V}", f"bool[B,1,{S},{T}] mask, {LEARNED}", FIXED)
    model, _ = rewritten(text, NUMBERS | BIAS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    np.testing.assert_allclose(run(model, feeds)[0][0, :, 1], FEEDS["v"][0].mean(axis=1), rtol=1e-4, atol=1e-5)


def test_a_query_without_keys_gets_zeros_where_a_guard_gave_them() -> None:
    body = f"{QK} l = Where(mask, x, infinite) p = Softmax <axis = -1> (l) i = IsNaN(p) g = Where(i, zero, p) "
    feeds = FEEDS | {"mask": closed_mask(B, 1, S, T)}
    model, _ = rewritten(graph(f"{body} out = MatMul(g, v)", "bool[B,1,S,T] mask"), NUMBERS, feeds, RaiseAttention())
    assert "IsNaN" not in ops(model)
    assert not run(model, feeds)[0][0, :, 1].any()


def test_a_query_without_keys_stays_nan_where_nothing_guards_it() -> None:
    text = graph(f"{QK} l = Where(mask, x, infinite) {P_V}", "bool[B,1,S,T] mask")
    feeds = FEEDS | {"mask": closed_mask(B, 1, S, T)}
    model, _ = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert np.isnan(run(model, feeds)[0][0, :, 1]).all()


def test_two_fills_on_one_row() -> None:
    """Both masks close the same keys: -max - max would be -inf, and equal weights would turn to zeros."""
    body = f"{QK} a = Where(mask, x, lowest) l = Where(other, a, lowest) {P_V}"
    mask = closed_mask(B, 1, S, T)
    feeds = FEEDS | {"mask": mask, "other": mask}
    model, _ = rewritten(graph(body, "bool[B,1,S,T] mask, bool[B,1,S,T] other"), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1


def test_the_fill_keeps_clear_of_the_lowest_number() -> None:
    """ONNX Runtime's kernel takes the lowest number for -inf."""
    feeds = FEEDS | {"mask": open_mask(B, 1, S, T)}
    text = graph(f"{QK} l = Where(mask, x, lowest) {P_V}", "bool[B,1,S,T] mask")
    model, _ = rewritten(text, NUMBERS, feeds, RaiseAttention())
    where = next(n for n in model.graph if n.op_type == "Where")
    assert LOWEST < scalar(where.inputs[2]) < LOWEST / 2


FILLS = {
    "where": ("f = Where(mask, zero, lowest)", "bool[B,1,S,T] mask", lambda m: m),
    "where_added": ("w = Where(mask, zero, lowest) f = Add(w, bias)", f"bool[B,1,{S},{T}] mask", lambda m: m),
    "product": ("i = Sub(one, mask) f = Mul(i, lowest)", "float[B,1,S,T] mask", lambda m: m.astype(np.float32)),
}


@pytest.mark.parametrize("spelling", FILLS)
def test_written_masks_keep_clear_of_the_lowest_number(spelling: str) -> None:
    text, mask, convert = FILLS[spelling]
    first = "a = Add(x, f) s = Softmax(a) o = MatMul(s, v)"
    body = f"{QK} {text} {first} y = MatMul(o, kt) l = Add(y, f) {P_V}"
    feeds = FEEDS | {"mask": convert(closed_mask(B, 1, S, T))}
    numbers = NUMBERS | BIAS | {"one": np.float32(1)}
    text = graph(body, f"{mask}, {LEARNED}, float one", FIXED)
    _, remarks = rewritten(text, numbers, feeds, RaiseAttention())
    assert applied(remarks, "product") == 2
    assert applied(remarks, "fill") == 1


def test_a_mask_that_is_read_elsewhere_keeps_its_fill() -> None:
    body = f"{QK} f = Where(mask, zero, lowest) l = Add(x, f) {P_V}"
    feeds = FEEDS | {"mask": open_mask(B, 1, S, T)}
    text = graph(body, "bool[B,1,S,T] mask", output=f"float[B,{H},S,{D}] out, float[B,1,S,T] f")
    _, remarks = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert applied(remarks, "product") == 1
    assert applied(remarks, "fill") == 0


def test_causal_mask_from_ranges() -> None:
    body = f"""n = Shape <start = 2, end = 3> (q) end = Squeeze(n) start = Constant <value_int = 0> ()
        step = Constant <value_int = 1> () i = Range(start, end, step) row = Unsqueeze(i, one) later = Greater(i, row)
        {QK} a = Where(later, infinite, zero) l = Add(x, a) {P_V}"""
    inputs = f"float[B,{H},S,{D}] q, float[B,{H},S,{D}] k, float[B,{H},S,{D}] v"
    feeds = FEEDS | {"k": floats(B, H, S, D), "v": floats(B, H, S, D)}
    numbers = NUMBERS | {"one": np.array([1], np.int64)}
    model, _ = rewritten(graph(body, "int64[1] one", inputs), numbers, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1


def test_window_mask_added_in_a_view() -> None:
    """Shifted windows: [batch * windows, H, N, N] viewed as [batch, windows, H, N, N] for the mask."""
    windows, n = 3, 4
    inputs = f"float[N,{H},{n},{D}] q, float[N,{H},{n},{D}] k, float[N,{H},{n},{D}] v"
    body = f"""wide = Constant <value_ints = [-1, {windows}, {H}, {n}, {n}]> ()
        flat = Constant <value_ints = [-1, {H}, {n}, {n}]> ()
        {QK} y = Add(x, bias) a = Reshape(y, wide) b = Add(a, mask) l = Reshape(b, flat) {P_V}"""
    feeds = {name: floats(2 * windows, H, n, D) for name in ("q", "k", "v")}
    feeds |= {"mask": floats(1, windows, 1, n, n), "bias": floats(1, H, n, n)}
    masks = f"float[1,{windows},1,{n},{n}] mask, float[1,{H},{n},{n}] bias"
    static = inputs.replace("[N,", f"[{2 * windows},")
    for text, output in ((inputs, f"float[N,{H},{n},{D}] out"), (static, f"float[{2 * windows},{H},{n},{D}] out")):
        model, _ = rewritten(graph(body, masks, text, output), NUMBERS, feeds, RaiseAttention())
        assert ops(model).count("Attention") == 1
        assert "MatMul" not in ops(model)


def test_heads_in_the_batch_and_a_mask_in_a_view() -> None:
    """[B * H, S, T] logits viewed as [B, H, S, T] for the mask, and back for the softmax and the second product."""
    inputs = f"float[N,{S},{D}] q, float[N,{T},{D}] k, float[N,{T},{D}] v"
    body = f"""wide = Constant <value_ints = [-1, {H}, {S}, {T}]> () flat = Constant <value_ints = [-1, {S}, {T}]> ()
        kt = Transpose <perm = [0, 2, 1]> (k) m = MatMul(q, kt) x = Mul(m, c)
        a = Reshape(x, wide) b = Add(a, mask) l = Reshape(b, flat) {P_V}"""
    feeds = {"q": floats(B * H, S, D), "k": floats(B * H, T, D), "v": floats(B * H, T, D)}
    feeds |= {"mask": floats(B, 1, S, T)}
    static = inputs.replace("[N,", f"[{B * H},")
    masks = f"float[{B},1,{S},{T}] mask"
    output = f"float[{B * H},{S},{D}] out"
    model, _ = rewritten(graph(body, masks, static, output), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


@pytest.mark.parametrize("step", ["a = Add(w, mask)", "a = Where(open, w, lowest)"])
def test_softmax_in_a_view(step: str) -> None:
    """[B * H, S, T] logits viewed as [B, H, S, T] for mask and softmax; the second product has three axes again."""
    body = f"""wide = Constant <value_ints = [-1, {H}, {S}, {T}]> () flat = Constant <value_ints = [-1, {S}, {T}]> ()
        kt = Transpose <perm = [0, 2, 1]> (k) m = MatMul(q, kt) x = Mul(m, c) w = Reshape(x, wide) {step}
        p = Softmax <axis = -1> (a) f = Reshape(p, flat) out = MatMul(f, v)"""
    inputs = f"float[{B * H},{S},{D}] q, float[{B * H},{T},{D}] k, float[{B * H},{T},{D}] v"
    feeds = {"q": floats(B * H, S, D), "k": floats(B * H, T, D), "v": floats(B * H, T, D)}
    feeds |= {"mask": floats(B, 1, S, T), "open": closed_mask(B, 1, S, T)}
    masks = f"float[{B},1,{S},{T}] mask, bool[{B},1,{S},{T}] open"
    text = graph(body, masks, inputs, f"float[{B * H},{S},{D}] out")
    model, _ = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


def test_a_view_whose_shape_is_read_off_the_weights() -> None:
    body = f"""wide = Constant <value_ints = [-1, {H}, {S}, {T}]> () kt = Transpose <perm = [0, 2, 1]> (k)
        m = MatMul(q, kt) x = Reshape(m, wide) a = Add(x, mask) p = Softmax <axis = -1> (a)
        tail = Shape <start = 2> (p) all = Constant <value_ints = [-1]> () shape = Concat <axis = 0> (all, tail)
        f = Reshape(p, shape) out = MatMul(f, v)"""
    inputs = f"float[{B * H},{S},{D}] q, float[{B * H},{T},{D}] k, float[{B * H},{T},{D}] v"
    feeds = {"q": floats(B * H, S, D), "k": floats(B * H, T, D), "v": floats(B * H, T, D), "mask": floats(B, 1, S, T)}
    text = graph(body, f"float[{B},1,{S},{T}] mask", inputs, f"float[{B * H},{S},{D}] out")
    model, _ = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert not {"MatMul", "Shape", "Softmax"} & set(ops(model))


def test_five_axes_with_a_window_mask() -> None:
    shape = f"[A,2,{H},{S},{D}]"
    inputs = f"float{shape} q, float{shape} k, float{shape} v"
    body = f"""kt = Transpose <perm = [0, 1, 2, 4, 3]> (k) m = MatMul(q, kt) x = Mul(m, c) l = Add(x, mask) {P_V}"""
    feeds = {name: floats(3, 2, H, S, D) for name in ("q", "k", "v")} | {"mask": floats(2, 1, S, S)}
    text = graph(body, f"float[2,1,{S},{S}] mask", inputs, f"float{shape} out")
    model, _ = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


LEFT_ALONE = {
    "weak_fill": ("l = Where(mask, x, hundred)", "masked keys may keep a weight"),
    "positive_fill": ("l = Where(mask, x, two)", "closes no keys"),
    "weak_fill_under_a_bias": ("a = Where(mask, x, billion) l = Add(a, bias)", "a row without keys would change"),
    "weak_fill_of_a_masked_row": ("a = Add(x, bias) l = Where(mask, a, billion)", "masked keys would change"),
    "two_fills": ("a = Where(mask, x, billion) l = Where(other, a, lowest)", "a row without keys tells them apart"),
    "tensor_fill": ("l = Where(mask, x, bias)", "not one constant number"),
    "scaled_after_a_coarse_mask": ("f = Where(mask, zero, thousands) a = Add(x, f) l = Mul(a, c)", "rounds the logits"),
    "coarse_mask_and_bias": ("f = Where(mask, zero, thousands) a = Add(x, bias) l = Add(a, f)", "rounds the logits"),
    "larger_than_the_logits": ("l = Add(x, wide)", "broadcasts the logits"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    text, reason = LEFT_ALONE[case]
    masks = f"bool[1,1,S,T] mask, bool[1,1,S,T] other, float[1,{H},S,T] bias, float[N,{H},S,T] wide"
    inputs = FOUR.replace("[B,", "[1,")
    feeds = {"q": floats(1, H, S, D), "k": floats(1, H, T, D), "v": floats(1, H, T, D)}
    feeds |= {"mask": open_mask(1, 1, S, T), "other": closed_mask(1, 1, S, T)}
    feeds |= {"bias": floats(1, H, S, T), "wide": floats(B, H, S, T)}
    text = graph(f"{QK} {text} {P_V}", masks, inputs, f"float[M,{H},S,{D}] out")
    model, remarks = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert "Attention" not in ops(model)
    assert len(missed(remarks)) == 1
    assert reason in missed(remarks)[0]


@pytest.mark.parametrize("constant", [True, False])
def test_float16_with_a_finite_fill_needs_a_condition_that_leaves_every_query_a_key(constant: bool) -> None:
    inputs = FOUR.replace("float[", "float16[")
    body = """kt = Transpose <perm = [0, 1, 3, 2]> (k) m = MatMul(q, kt) l = Where(mask, m, half_lowest)
        p = Softmax <axis = -1> (l) out = MatMul(p, v)"""
    feeds = {name: array.astype(np.float16) for name, array in FEEDS.items()}
    mask = {"mask": np.tril(np.ones((S, T), bool), 1)}
    inputs = inputs.replace("S", str(S)).replace("T", str(T))
    text = graph(body, f"bool[{S},{T}] mask", inputs, f"float16[B,{H},{S},{D}] out")
    numbers, feeds = (NUMBERS | mask, feeds) if constant else (NUMBERS, feeds | mask)
    model, remarks = rewritten(text, numbers, feeds, RaiseAttention(), rtol=4e-3, atol=4e-3)
    assert ("Attention" in ops(model)) == constant
    assert bool(missed(remarks)) != constant
