"""raise_attention, rule `product` and its scales: one case per spelling, and the ones that must be left alone."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, floats, missed, ops, parse, rewritten, run

from xform.graph.values import attribute
from xform.passes.canonicalize.raise_attention import RaiseAttention
from xform.rewrite.passes import PassContext

B, H, S, T, D = 2, 4, 3, 5, 8
NUMBERS = {
    "c": np.float32(0.3),
    "root": np.float32(0.3) ** np.float32(0.5),
    "inverse": np.float32(1 / 0.3),
    "cap": np.float32(2),
    "zero": np.float32(0),
    "negative": np.float32(-0.3),
    "vector": floats(D),
}
TYPES = ", ".join(f"float{list(v.shape) if v.shape else ''} {name}" for name, v in NUMBERS.items())
FOUR = f"float[B,{H},S,{D}] q, float[B,{H},T,{D}] k, float[B,{H},T,{D}] v"
FEEDS = {"q": floats(B, H, S, D), "k": floats(B, H, T, D), "v": floats(B, H, T, D)}
P_V = "p = Softmax <axis = -1> (l)  out = MatMul(p, v)"
KT = "kt = Transpose <perm = [0, 1, 3, 2]> (k) "


def graph(body: str, inputs: str = FOUR, output: str = f"float[B,{H},S,{D}] out", extra: str = "") -> str:
    return f"g ({inputs}, {TYPES}{extra}) => ({output}) {{ {body} }}"


SCALES = {
    "none": (f"{KT} l = MatMul(q, kt)", 1.0),
    "logits": (f"{KT} m = MatMul(q, kt)  l = Mul(m, c)", 0.3),
    "logits_first": (f"{KT} m = MatMul(q, kt)  l = Mul(c, m)", 0.3),
    "division": (f"{KT} m = MatMul(q, kt)  l = Div(m, inverse)", 0.3),
    "queries": (f"{KT} s = Mul(q, c)  l = MatMul(s, kt)", 0.3),
    "keys": ("s = Mul(k, c)  kt = Transpose <perm = [0, 1, 3, 2]> (s)  l = MatMul(q, kt)", 0.3),
    "transposed_keys": (f"{KT} s = Mul(kt, c)  l = MatMul(q, s)", 0.3),
    "both": (f"{KT} a = Mul(q, root)  b = Mul(root, kt)  l = MatMul(a, b)", 0.3),
    "queries_divided": (f"{KT} s = Div(q, inverse)  l = MatMul(s, kt)", 0.3),
    "twice": (f"{KT} s = Mul(q, c)  m = MatMul(s, kt)  l = Div(m, inverse)", 0.09),
}


@pytest.mark.parametrize("spelling", SCALES)
def test_scales(spelling: str) -> None:
    text, scale = SCALES[spelling]
    model, remarks = rewritten(graph(f"{text} {P_V}"), NUMBERS, FEEDS, RaiseAttention())
    assert ops(model) == ["Attention"]
    assert applied(remarks, "product") == 1
    assert attribute(model.graph[0], "scale") == pytest.approx(scale, rel=1e-6)
    assert [v.name if v is not None else None for v in model.graph[0].inputs] == ["q", "k", "v"]


@pytest.mark.parametrize("axis", [-1, 3])
def test_softmax_over_the_keys_by_either_axis(axis: int) -> None:
    body = f"{KT} l = MatMul(q, kt)  p = Softmax <axis = {axis}> (l)  out = MatMul(p, v)"
    model, _ = rewritten(graph(body), NUMBERS, FEEDS, RaiseAttention())
    assert ops(model) == ["Attention"]


def test_head_split_transpose_fused_with_that_of_the_keys() -> None:
    inputs = f"float[B,{H},S,{D}] q, float[B,T,{H},{D}] k, float[B,{H},T,{D}] v"
    body = f"kt = Transpose <perm = [0, 2, 3, 1]> (k)  l = MatMul(q, kt) {P_V}"
    model, _ = rewritten(graph(body, inputs), NUMBERS, FEEDS | {"k": floats(B, T, H, D)}, RaiseAttention())
    assert ops(model) == ["Transpose", "Attention"]
    assert list(attribute(model.graph[0], "perm")) == [0, 2, 1, 3]


def test_keys_transposed_through_three_axes() -> None:
    """The spelling of scaled_dot_product_attention by the dynamo exporter."""
    body = f"""flat = Constant <value_ints = [-1, {T}, {D}]> ()  wide = Constant <value_ints = [{B}, {H}, {D}, {T}]> ()
        a = Reshape(k, flat)  t = Transpose <perm = [0, 2, 1]> (a)  r = Reshape(t, wide)  kt = Mul(r, root)
        s = Mul(q, root)  l = MatMul(s, kt) {P_V}"""
    inputs = f"float[{B},{H},S,{D}] q, float[{B},{H},{T},{D}] k, float[{B},{H},{T},{D}] v"
    model, _ = rewritten(graph(body, inputs, f"float[{B},{H},S,{D}] out"), NUMBERS, FEEDS, RaiseAttention())
    attention = next(n for n in model.graph if n.op_type == "Attention")
    assert attention.inputs[1] is model.graph.inputs[1]
    assert attribute(attention, "scale") == pytest.approx(0.3)


def test_keys_that_are_kept_transposed() -> None:
    inputs = f"float[B,{H},S,{D}] q, float[B,{H},{D},T] k, float[B,{H},T,{D}] v"
    feeds = FEEDS | {"k": floats(B, H, D, T)}
    model, _ = rewritten(graph(f"l = MatMul(q, k) {P_V}", inputs), NUMBERS, feeds, RaiseAttention())
    assert ops(model) == ["Transpose", "Attention"]


def test_logits_as_keys_times_queries() -> None:
    body = f"qt = Transpose <perm = [0, 1, 3, 2]> (q)  m = MatMul(k, qt)  l = Transpose <perm = [0, 1, 3, 2]> (m) {P_V}"
    model, _ = rewritten(graph(body), NUMBERS, FEEDS, RaiseAttention())
    attention = model.graph[-1]
    assert attention.op_type == "Attention"
    assert attention.inputs[1] is model.graph.inputs[1]


def test_values_times_transposed_weights() -> None:
    body = f"""{KT} l = MatMul(q, kt)  p = Softmax <axis = -1> (l)  pt = Transpose <perm = [0, 1, 3, 2]> (p)
        vt = Transpose <perm = [0, 1, 3, 2]> (v)  out = MatMul(vt, pt)"""
    model, _ = rewritten(graph(body, output=f"float[B,{H},{D},S] out"), NUMBERS, FEEDS, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


EINSUMS = {
    "heads_second": ("bhid,bhjd->bhij", "bhij,bhjd->bhid", (B, H, S, D), (B, H, T, D), f"float[B,{H},S,{D}] out"),
    "heads_third": ("bihd,bjhd->bhij", "bhij,bjhd->bihd", (B, S, H, D), (B, T, H, D), f"float[B,S,{H},{D}] out"),
}


@pytest.mark.parametrize("spelling", EINSUMS)
def test_einsum(spelling: str) -> None:
    first, second, query, key, output = EINSUMS[spelling]
    inputs = ", ".join(f"float{list(shape)} {name}" for name, shape in (("q", query), ("k", key), ("v", key)))
    body = f'm = Einsum <equation = "{first}"> (q, k)  l = Mul(m, c)  p = Softmax <axis = -1> (l)  '
    body += f'out = Einsum <equation = "{second}"> (p, v)'
    feeds = {"q": floats(*query), "k": floats(*key), "v": floats(*key)}
    model, _ = rewritten(graph(body, inputs, output), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "Einsum" not in ops(model)


def test_temperature_after_a_scale() -> None:
    body = f"{KT} m = MatMul(q, kt) s = Mul(m, c) l = Mul(s, heat) {P_V}"
    text = graph(body, extra=f", float[{H},1,1] heat")
    model, _ = rewritten(text, NUMBERS, FEEDS | {"heat": floats(H, 1, 1)}, RaiseAttention())
    assert ops(model) == ["Mul", "Attention"]


@pytest.mark.parametrize("first", [True, False])
def test_temperature_per_head(first: bool) -> None:
    """A tensor factor that is the same for all keys goes to the queries."""
    body = f"{KT} m = MatMul(q, kt) t = Mul({'heat, m' if first else 'm, heat'}) l = Mul(t, c) {P_V}"
    feeds = FEEDS | {"heat": floats(H, 1, 1)}
    model, _ = rewritten(graph(body, extra=f", float[{H},1,1] heat"), NUMBERS, feeds, RaiseAttention())
    assert ops(model) == ["Mul", "Attention"]
    assert attribute(model.graph[-1], "scale") == pytest.approx(0.3)


def test_temperature_per_key_stays() -> None:
    body = f"{KT} m = MatMul(q, kt) l = Mul(m, heat) {P_V}"
    feeds = FEEDS | {"heat": floats(T)}
    model, remarks = rewritten(
        graph(body, extra=f", float[{T}] heat").replace("T,", f"{T},"), NUMBERS, feeds, RaiseAttention()
    )
    assert "Attention" not in ops(model)
    assert "not one constant number" in missed(remarks)[0]


def test_mixed_heads_are_a_near_miss() -> None:
    """Talking heads: a linear layer over the heads between the softmax and the second product."""
    body = f"""{KT} l = MatMul(q, kt) p = Softmax <axis = -1> (l) a = Transpose <perm = [0, 2, 3, 1]> (p)
        b = MatMul(a, mix) d = Transpose <perm = [0, 3, 1, 2]> (b) out = MatMul(d, v)"""
    numbers = NUMBERS | {"mix": floats(H, H)}
    model, remarks = rewritten(graph(body, extra=f", float[{H},{H}] mix"), numbers, FEEDS, RaiseAttention())
    assert "Attention" not in ops(model)
    assert "mixes the weights after the softmax" in missed(remarks)[0]


def test_soft_cap() -> None:
    body = f"{KT} m = MatMul(q, kt)  s = Mul(m, c)  d = Div(s, cap)  t = Tanh(d)  l = Mul(t, cap) {P_V}"
    model, _ = rewritten(graph(body), NUMBERS, FEEDS, RaiseAttention())
    assert ops(model) == ["Attention"]
    assert attribute(model.graph[0], "softcap") == pytest.approx(2)
    assert attribute(model.graph[0], "scale") == pytest.approx(0.3)


def test_nan_guard() -> None:
    body = (
        f"{KT} l = MatMul(q, kt)  p = Softmax <axis = -1> (l)  i = IsNaN(p)  g = Where(i, zero, p)  out = MatMul(g, v)"
    )
    model, _ = rewritten(graph(body), NUMBERS, FEEDS, RaiseAttention())
    assert ops(model) == ["Attention"]


def test_softmax_in_float32_of_float16_operands() -> None:
    inputs = FOUR.replace("float[", "float16[")
    body = f"""{KT} m = MatMul(q, kt)  l = Cast <to = 1> (m)  p = Softmax <axis = -1> (l)
        h = Cast <to = 10> (p)  out = MatMul(h, v)"""
    feeds = {name: array.astype(np.float16) for name, array in FEEDS.items()}
    text = graph(body, inputs, f"float16[B,{H},S,{D}] out")
    model, _ = rewritten(text, NUMBERS, feeds, RaiseAttention(), rtol=4e-3, atol=4e-3)
    assert ops(model) == ["Attention"]
    assert attribute(model.graph[0], "softmax_precision") == 1


def test_two_axes() -> None:
    body = f"kt = Transpose <perm = [1, 0]> (k)  m = MatMul(q, kt)  l = Mul(m, c) {P_V}"
    inputs = f"float[S,{D}] q, float[T,{D}] k, float[T,{D}] v"
    feeds = {"q": floats(S, D), "k": floats(T, D), "v": floats(T, D)}
    model, _ = rewritten(graph(body, inputs, f"float[S,{D}] out"), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


def test_three_axes_are_one_head() -> None:
    body = f"kt = Transpose <perm = [0, 2, 1]> (k)  m = MatMul(q, kt)  l = Mul(m, c) {P_V}"
    inputs = f"float[B,S,{D}] q, float[B,T,{D}] k, float[B,T,{D}] v"
    feeds = {"q": floats(B, S, D), "k": floats(B, T, D), "v": floats(B, T, D)}
    model, _ = rewritten(graph(body, inputs, f"float[B,S,{D}] out"), NUMBERS, feeds, RaiseAttention())
    assert [n.op_type for n in model.graph if n.op_type != "Unsqueeze"] == ["Attention", "Squeeze"]


def test_heads_folded_into_the_batch() -> None:
    """The spelling of torch.bmm: operands are reshaped to [B * H, S, D] before."""
    body = f"""fq = Constant <value_ints = [-1, {S}, {D}]> ()  fk = Constant <value_ints = [-1, {T}, {D}]> ()
        a = Reshape(q, fq)  b = Reshape(k, fk)  x = Reshape(v, fk)  kt = Transpose <perm = [0, 2, 1]> (b)
        m = MatMul(a, kt)  l = Mul(m, c)  p = Softmax <axis = -1> (l)  out = MatMul(p, x)"""
    inputs = f"float[B,{H},{S},{D}] q, float[B,{H},{T},{D}] k, float[B,{H},{T},{D}] v"
    model, _ = rewritten(graph(body, inputs, f"float[N,{S},{D}] out"), NUMBERS, FEEDS, RaiseAttention())
    attention = next(n for n in model.graph if n.op_type == "Attention")
    assert [v.name if v is not None else None for v in attention.inputs] == ["q", "k", "v"]


def test_five_axes() -> None:
    shape = f"[A,2,{H},S,{D}]"
    inputs = f"float{shape} q, float[A,2,{H},T,{D}] k, float[A,2,{H},T,{D}] v"
    body = f"kt = Transpose <perm = [0, 1, 2, 4, 3]> (k)  l = MatMul(q, kt) {P_V}"
    feeds = {"q": floats(3, 2, H, S, D), "k": floats(3, 2, H, T, D), "v": floats(3, 2, H, T, D)}
    model, _ = rewritten(graph(body, inputs, f"float{shape} out"), NUMBERS, feeds, RaiseAttention())
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


def test_batch_of_one_beside_a_batch() -> None:
    """Learned queries, the same for the whole batch."""
    inputs = FOUR.replace("float[B", "float[1", 1)
    model, _ = rewritten(
        graph(f"{KT} l = MatMul(q, kt) {P_V}", inputs), NUMBERS, FEEDS | {"q": floats(1, H, S, D)}, RaiseAttention()
    )
    assert ops(model).count("Attention") == 1
    assert "MatMul" not in ops(model)


def test_many_layers_in_one_graph() -> None:
    first, second = (
        "l = MatMul(q, kt) p = Softmax(l) o = MatMul(p, v)",
        "x = MatMul(o, kt) y = Softmax(x) out = MatMul(y, v)",
    )
    body = f"{KT} {first} {second}"
    model, remarks = rewritten(graph(body), NUMBERS, FEEDS, RaiseAttention())
    assert ops(model) == ["Attention", "Attention"]
    assert applied(remarks, "product") == 2


LEFT_ALONE = {
    "over_queries": (f"{KT} l = MatMul(q, kt) p = Softmax <axis = 2> (l) out = MatMul(p, v)", "not over the keys"),
    "negative_scale": (f"{KT} m = MatMul(q, kt)  l = Mul(m, negative) {P_V}", "not by a positive number"),
    "tensor_scale": (f"{KT} m = MatMul(q, kt)  l = Mul(m, logits) {P_V}", "not one constant"),
    "no_product": (f"l = Relu(logits) {P_V}", "stands between"),
    "operator_between": (f"{KT} m = MatMul(q, kt)  l = Relu(m) {P_V}", "Relu"),
    "weights_read_elsewhere": (f"{KT} l = MatMul(q, kt) {P_V}  other = ReduceMax(p)", "output"),
    "cap_after_mask": (f"{KT} m = MatMul(q, kt)  a = Add(m, logits)  l = Tanh(a) {P_V}", "soft cap"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    body, reason = LEFT_ALONE[case]
    output = f"float[B,{H},S,{D}] out" + (", float[B,4,S,T] p" if case == "weights_read_elsewhere" else "")
    body = body.replace("  other = ReduceMax(p)", "")
    text = graph(body, output=output, extra=f", float[B,{H},S,T] logits")
    feeds = FEEDS | {"logits": floats(B, H, S, T)}
    model, remarks = rewritten(text, NUMBERS, feeds, RaiseAttention())
    assert "Attention" not in ops(model)
    assert len(missed(remarks)) == 1
    assert reason in missed(remarks)[0]
    assert all(r.concept == "attention" and r.nodes for r in remarks)


def test_softmax_that_feeds_no_second_product_is_no_near_miss() -> None:
    text = graph(f"{KT} l = MatMul(q, kt)  out = Softmax <axis = -1> (l)", output=f"float[B,{H},S,T] out")
    _, remarks = rewritten(text, NUMBERS, FEEDS, RaiseAttention())
    assert missed(remarks) == []


def test_a_gate_is_no_near_miss() -> None:
    """A linear layer, a softmax and a mix of values: constant weights are no keys."""
    text = graph(f"l = MatMul(q, w) {P_V}", f"float[S,{D}] q, float[{D},{T}] w, float[{T},{D}] v", f"float[S,{D}] out")
    feeds = {"q": floats(S, D), "v": floats(T, D)}
    model, remarks = rewritten(text, NUMBERS | {"w": floats(D, T)}, feeds, RaiseAttention())
    assert ops(model) == ["MatMul", "Softmax", "MatMul"]
    assert missed(remarks) == []


def test_softmax_in_a_narrower_type() -> None:
    body = f"""{KT} m = MatMul(q, kt)  l = Cast <to = 10> (m)  p = Softmax <axis = -1> (l)
        h = Cast <to = 1> (p)  out = MatMul(h, v)"""
    model, remarks = rewritten(graph(body), NUMBERS, FEEDS, RaiseAttention())
    assert "Attention" not in ops(model)
    assert "no wider type" in missed(remarks)[0]


def test_a_long_residual_stream_above_a_softmax_costs_little() -> None:
    """Both operands of every addition are tried; the search must not double at each."""
    chain = "".join(f"x{i + 1} = Add(x{i}, x{i}) " for i in range(60))
    text = graph(
        f"x0 = Relu(q) {chain} p = Softmax(x60) out = MatMul(p, v)",
        "float[B,4,8,8] q, float[B,4,8,8] v",
        "float[B,4,8,8] out",
    )
    model = parse(text, NUMBERS)
    context = PassContext()
    assert not RaiseAttention().run(model, context)
    assert context.statistics["raise_attention", "product"].seconds < 0.5
    assert run(model, {"q": floats(1, 4, 8, 8) * 0, "v": floats(1, 4, 8, 8)})[0].shape == (1, 4, 8, 8)
