"""raise_attention, rules on the operator itself: head counts, scales, shared heads, caches."""

from __future__ import annotations

import numpy as np
import pytest
from support import applied, floats, missed, ops, rewritten

from xform.graph.values import attribute
from xform.passes.canonicalize.raise_attention import RaiseAttention

B, HQ, HKV, S, T, D, P = 2, 6, 2, 3, 5, 8, 4
G = HQ // HKV
NUMBERS = {"c": np.float32(0.3)}
Q = f"float[B,{HQ},S,{D}] q"
ATTENTION = "out = Attention <scale = 0.3> (q, keys, values)"


def graph(body: str, inputs: str, output: str = f"float[B,{HQ},S,{D}] out") -> str:
    return f"g ({inputs}, float c) => ({output}) {{ {body} }}"


def repeated(text: str) -> str:
    """The text once for k and once for v; X stands for the operand, Y for the result."""
    return text.replace("X", "k").replace("Y", "keys") + text.replace("X", "v").replace("Y", "values")


SHARED = f"{Q}, float[B,{HKV},{T},{D}] k, float[B,{HKV},{T},{D}] v"
FEEDS = {"q": floats(B, HQ, S, D), "k": floats(B, HKV, T, D), "v": floats(B, HKV, T, D)}
WIDE = "Xs = Constant <value_ints = [0, 0, -1, 0, 0]> ()"
BACK = f"Xb = Constant <value_ints = [0, {HQ}, {T}, {D}]> () Y = Reshape(Xw, Xb) "
AXIS = "Xa = Constant <value_ints = [2]> () Xu = Unsqueeze(X, Xa) "
REPEATS = {
    "expand": f"{AXIS} Xe = Constant <value_ints = [1, 1, {G}, 1, 1]> () Xw = Expand(Xu, Xe) {BACK}",
    "tile": f"{AXIS} Xe = Constant <value_ints = [1, 1, {G}, 1, 1]> () Xw = Tile(Xu, Xe) {BACK}",
    "concat": f"{AXIS} Xw = Concat <axis = 2> ({', '.join(['Xu'] * G)}) {BACK}",
    "gather": f"Xi = Constant <value_ints = {np.repeat(range(HKV), G).tolist()}> () Y = Gather <axis = 1> (X, Xi) ",
    "reshape": f"""Xa = Constant <value_ints = [-1, {HKV}, 1, {T}, {D}]> () Xu = Reshape(X, Xa)
        Xe = Constant <value_ints = [1, 1, {G}, 1, 1]> () Xw = Expand(Xu, Xe) {BACK}""",
}


@pytest.mark.parametrize("spelling", REPEATS)
def test_shared_heads(spelling: str) -> None:
    model, remarks = rewritten(graph(repeated(REPEATS[spelling]) + ATTENTION, SHARED), NUMBERS, FEEDS, RaiseAttention())
    assert applied(remarks, "shared_heads") == 1
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["Attention"]
    assert [v.name if v is not None else None for v in model.graph[-1].inputs] == ["q", "k", "v"]


def test_shared_heads_under_a_spelled_out_attention() -> None:
    body = (
        repeated(REPEATS["expand"])
        + """kt = Transpose <perm = [0, 1, 3, 2]> (keys) m = MatMul(q, kt) l = Mul(m, c)
        p = Softmax <axis = -1> (l) out = MatMul(p, values)"""
    )
    model, remarks = rewritten(graph(body, SHARED), NUMBERS, FEEDS, RaiseAttention())
    assert applied(remarks, "product") == applied(remarks, "shared_heads") == 1
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["Attention"]


def test_shared_heads_repeated_before_the_head_transpose() -> None:
    text = f"""Xa = Constant <value_ints = [3]> () Xu = Unsqueeze(X, Xa)
        Xe = Constant <value_ints = [1, 1, 1, {G}, 1]> () Xw = Expand(Xu, Xe)
        Xb = Constant <value_ints = [0, {T}, {HQ}, {D}]> () Xr = Reshape(Xw, Xb)
        Y = Transpose <perm = [0, 2, 1, 3]> (Xr) """
    inputs = f"{Q}, float[B,{T},{HKV},{D}] k, float[B,{T},{HKV},{D}] v"
    feeds = FEEDS | {"k": floats(B, T, HKV, D), "v": floats(B, T, HKV, D)}
    model, remarks = rewritten(graph(repeated(text) + ATTENTION, inputs), NUMBERS, feeds, RaiseAttention())
    assert applied(remarks, "shared_heads") == 1
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["Transpose", "Transpose", "Attention"]


def test_heads_repeated_in_another_order_stay() -> None:
    """h0 h1 h0 h1 .. is not how the operator shares heads."""
    indices = [h for _ in range(G) for h in range(HKV)]
    text = f"Xi = Constant <value_ints = {indices}> () Y = Gather <axis = 1> (X, Xi) "
    model, remarks = rewritten(graph(repeated(text) + ATTENTION, SHARED), NUMBERS, FEEDS, RaiseAttention())
    assert applied(remarks, "shared_heads") == 0
    assert ops(model).count("Gather") == 2


def test_keys_repeated_and_values_not() -> None:
    keys = REPEATS["gather"].replace("X", "k").replace("Y", "keys")
    body = f"{keys} out = Attention <scale = 0.3> (q, keys, v)"
    inputs = f"{Q}, float[B,{HKV},{T},{D}] k, float[B,{HQ},{T},{D}] v"
    _, remarks = rewritten(graph(body, inputs), NUMBERS, FEEDS | {"v": floats(B, HQ, T, D)}, RaiseAttention())
    assert applied(remarks, "shared_heads") == 0
    assert missed(remarks) == ["keys and values are not repeated alike"]


def test_one_key_head_for_all_queries() -> None:
    body = """kt = Transpose <perm = [0, 1, 3, 2]> (k) m = MatMul(q, kt) l = Mul(m, c)
        p = Softmax <axis = -1> (l) out = MatMul(p, v)"""
    inputs = f"{Q}, float[B,1,{T},{D}] k, float[B,1,{T},{D}] v"
    feeds = FEEDS | {"k": floats(B, 1, T, D), "v": floats(B, 1, T, D)}
    model, _ = rewritten(graph(body, inputs), NUMBERS, feeds, RaiseAttention())
    assert ops(model) == ["Attention"]


CACHE = f"float[B,{HQ},P,{D}] pk, float[B,{HQ},P,{D}] pv, "
NEW = f"{Q}, float[B,{HQ},T,{D}] k, float[B,{HQ},T,{D}] v, {CACHE} float[B,1,S,N] mask"
CACHED = {
    "q": floats(B, HQ, S, D),
    "k": floats(B, HQ, T, D),
    "v": floats(B, HQ, T, D),
    "pk": floats(B, HQ, P, D),
    "pv": floats(B, HQ, P, D),
    "mask": floats(B, 1, S, P + T),
}
JOIN = "keys = Concat <axis = 2> (pk, k) values = Concat <axis = -2> (pv, v) "
OUTPUTS = f"float[B,{HQ},S,{D}] out, float[B,{HQ},N,{D}] keys, float[B,{HQ},N,{D}] values"


@pytest.mark.parametrize("outputs", [OUTPUTS, f"float[B,{HQ},S,{D}] out"])
def test_cache(outputs: str) -> None:
    body = f"{JOIN} out = Attention <scale = 0.3> (q, keys, values, mask)"
    model, remarks = rewritten(graph(body, NEW, outputs), NUMBERS, CACHED, RaiseAttention())
    assert applied(remarks, "cache") == 1
    assert [op for op in ops(model) if op not in ("ReduceMax", "Equal", "Where")] == ["Attention"]
    names = [v.name if v is not None else None for v in model.graph[0].inputs]
    assert names == ["q", "k", "v", "mask", "pk", "pv"]


def test_cache_under_a_spelled_out_attention() -> None:
    body = f"""{JOIN} kt = Transpose <perm = [0, 1, 3, 2]> (keys) m = MatMul(q, kt) x = Mul(m, c)
        l = Add(x, mask) p = Softmax <axis = -1> (l) out = MatMul(p, values)"""
    inputs = NEW.replace(",T,", f",{T},").replace(",P,", f",{P},").replace("N]", f"{P + T}]").replace("S,", f"{S},")
    outputs = OUTPUTS.replace("N,", f"{P + T},").replace("S,", f"{S},")
    model, remarks = rewritten(graph(body, inputs, outputs), NUMBERS, CACHED, RaiseAttention())
    assert applied(remarks, "cache") == 1
    assert [op for op in ops(model) if op not in ("ReduceMax", "Equal", "Where")] == ["Attention"]


def test_shared_heads_of_a_cache() -> None:
    join = "k = Concat <axis = 2> (pk, nk) v = Concat <axis = 2> (pv, nv) "
    body = join + repeated(REPEATS["expand"]) + ATTENTION
    new = T - P
    inputs = f"{Q}, float[B,{HKV},{new},{D}] nk, float[B,{HKV},{new},{D}] nv, "
    inputs += f"float[B,{HKV},{P},{D}] pk, float[B,{HKV},{P},{D}] pv"
    feeds = {"q": CACHED["q"], "nk": floats(B, HKV, new, D), "nv": floats(B, HKV, new, D)}
    feeds |= {"pk": floats(B, HKV, P, D), "pv": floats(B, HKV, P, D)}
    outputs = f"float[B,{HQ},S,{D}] out, float[B,{HKV},{T},{D}] k, float[B,{HKV},{T},{D}] v"
    model, remarks = rewritten(graph(body, inputs, outputs), NUMBERS, feeds, RaiseAttention())
    assert applied(remarks, "shared_heads") == applied(remarks, "cache") == 1
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["Attention"]


def test_a_cache_that_is_read_elsewhere_stays() -> None:
    """The mask may depend on the joined keys, and an operator that makes both would depend on itself."""
    body = f"{JOIN} n = Shape(keys) s = Cast <to = 1> (n) r = ReduceMax <keepdims = 0> (s) a = Mul(mask, r) "
    body += "out = Attention <scale = 0.3> (q, keys, values, a)"
    model, remarks = rewritten(graph(body, NEW), NUMBERS, CACHED, RaiseAttention())
    assert ops(model).count("Concat") == 2
    assert "also reads the joined cache" in missed(remarks)[0]


def test_three_axes() -> None:
    inputs = f"float[B,S,{HQ * D}] q, float[B,T,{HKV * D}] k, float[B,T,{HKV * D}] v"
    feeds = {"q": floats(B, S, HQ * D), "k": floats(B, T, HKV * D), "v": floats(B, T, HKV * D)}
    body = f"out = Attention <q_num_heads = {HQ}, kv_num_heads = {HKV}, scale = 0.3> (q, k, v)"
    model, remarks = rewritten(graph(body, inputs, f"float[B,S,{HQ * D}] out"), NUMBERS, feeds, RaiseAttention())
    assert applied(remarks, "three_axes") == 1
    attention = next(n for n in model.graph if n.op_type == "Attention")
    assert attribute(attention, "q_num_heads") is None
    assert len(attention.inputs[0].shape) == 4


def test_default_scale_is_written_down() -> None:
    inputs = f"{Q}, float[B,{HQ},T,{D}] k, float[B,{HQ},T,{D}] v"
    feeds = {"q": floats(B, HQ, S, D), "k": floats(B, HQ, T, D), "v": floats(B, HQ, T, D)}
    model, remarks = rewritten(graph("out = Attention(q, k, v)", inputs), NUMBERS, feeds, RaiseAttention())
    assert applied(remarks, "explicit_scale") == 1
    assert attribute(model.graph[0], "scale") == pytest.approx(D**-0.5)


def test_scaled_operands_of_the_operator() -> None:
    inputs = f"{Q}, float[B,{HQ},T,{D}] k, float[B,{HQ},T,{D}] v"
    feeds = {"q": floats(B, HQ, S, D), "k": floats(B, HQ, T, D), "v": floats(B, HQ, T, D)}
    body = "a = Mul(q, c) b = Div(k, c) d = Mul(b, c) out = Attention <scale = 0.5> (a, d, v)"
    model, remarks = rewritten(graph(body, inputs), NUMBERS, feeds, RaiseAttention())
    assert applied(remarks, "scale") == 1
    assert ops(model) == ["Attention"]
    assert attribute(model.graph[0], "scale") == pytest.approx(0.15)
