"""Attention of packed tokens sequence by sequence: the numbers of the padded form on every token, whatever the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from packed_support import BLOCK, PADDING, TOGETHER, B, C, H, S
from support import parse

from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.backends.onnxruntime import attention_per_sequence
from xform.passes.attention import PackTokens
from xform.rewrite.passes import PassContext
from xform.target import Target

CPU = Target("cpu")
FORM = "attention: by sequence"
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((C, C)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
CONSTANTS = {
    **WEIGHTS, "wqkv": np.concatenate([WEIGHTS[name] for name in ("wq", "wk", "wv")], 1),
    "b": RNG.standard_normal(C).astype(np.float32), "axes": np.array([1, 2]), "last": np.array([2]),
    "narrow": RNG.standard_normal((C, C // H)).astype(np.float32),
    "heads": np.array([0, 0, H, C // H]), "one_head": np.array([0, 0, 1, C // H]), "merged": np.array([0, 0, C]),
    "mixed": np.array([0, 0, C // H, H]),
    "zero": np.array(0.0, np.float32), "lowest": np.array(np.finfo(np.float32).min),
    "infinite": np.array(-np.inf, np.float32),
    "future": np.tril(np.ones((S, S), bool))[None, None],
    "window": (np.abs(np.arange(S)[:, None] - np.arange(S)) < 2)[None, None],
    "no_first": (np.arange(S)[:, None] > 0)[None, None],
    "others": ~np.eye(S, dtype=bool)[None, None],
    "key_axes": np.array([1, 3]),
    "wide": RNG.standard_normal((C, 2 * C)).astype(np.float32), "wide_out": RNG.standard_normal((2 * C, C)).astype("f"),
    "wide_heads": np.array([0, 0, H, C]), "wide_merged": np.array([0, 0, 2 * C]),
    "slope": -0.1 * np.abs(np.arange(S)[:, None] - np.arange(S)).astype(np.float32)[None] * np.ones((H, 1, 1), "f"),
}  # fmt: skip
MASKS = {
    "boolean": "bias = Identity(keys)",
    "lowest": "bias = Where(keys, zero, lowest)",
    "infinite": "bias = Where(keys, zero, infinite)",
    "causal": "bias = And(keys, future)",
    "window": "bias = And(keys, window)",
    "queries without keys": "bias = And(keys, no_first)",
    # a position without token that counts as one, the first, may see pads alone
    "others of a kind": "rows = Unsqueeze(valid, key_axes) alike = Equal(rows, keys) bias = And(alike, others)",
    "by head": "open = Where(keys, zero, lowest) bias = Add(open, slope)",
}
SEPARATE = "q0 = MatMul(x, wq) q = Add(q0, b) k = MatMul(x, wk) v = MatMul(x, wv)"


def model_of(body: str, batch: object = B, length: object = S, more: str = "") -> ir.Model:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    kinds = {"float32": "float", "int64": "int64", "bool": "bool"}
    given = "".join(f", {kinds[a.dtype.name]}{list(a.shape) if a.ndim else ''} {n}" for n, a in used.items())
    inputs, outputs = f"float[{batch},{length},{C}] x, int64[{batch},{length}] mask", f"float[{batch},{length},{C}] y"
    return parse(f"g ({inputs}{given}) => ({outputs}{more}) {{ {body} }}", used)


def block(mask: str = "boolean", projections: str = SEPARATE) -> str:
    body = BLOCK.replace("@mask", MASKS[mask]).replace("@projections", projections)
    return body.replace("Attention(", "Attention <scale = 0.4> (")


def feeds(pads: str) -> dict[str, np.ndarray]:
    return {
        "x": np.random.default_rng(1).standard_normal((B, S, C)).astype(np.float32),
        "mask": np.array(PADDING[pads]),
    }


def run(model: ir.Model, given: dict[str, np.ndarray], **options: Any) -> tuple[list[Any], dict[str, int]]:
    backend = get_backend("onnxruntime", CPU)
    artifact = backend.lower(model, CPU, LowerOptions(**options))
    return backend.load(artifact, LoadOptions(threads=1)).run(given), artifact.metadata["lowered"]


def packed(model: ir.Model) -> ir.Model:
    assert PackTokens().run(model, PassContext())
    return model


def same(body: str, pads: str, forms: int = 1, *, sizes: Any = (B, S), more: str = "", **options: Any) -> None:
    """The packed form is lowered so, and its numbers are those of the padded one."""
    expected, before = run(model_of(body, *sizes, more), feeds(pads))
    found, after = run(packed(model_of(body, *sizes, more)), feeds(pads), **options)
    assert FORM not in before and after.get(FORM, 0) == forms
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.fixture(autouse=True)
def _short_sequences_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_per_sequence, "_SHORTEST", 0)


def test_known_short_sequences_stay_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_per_sequence, "_SHORTEST", S + 1)
    same(block(), "right", 0)
    monkeypatch.setattr(attention_per_sequence, "_SHORTEST", S)
    same(block(), "right", 1)


@pytest.mark.parametrize("pads", PADDING)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_attention_with_padding(mask: str, pads: str) -> None:
    same(block(mask), pads)


@pytest.mark.parametrize("pads", PADDING)
def test_projections_that_were_multiplied_together(pads: str) -> None:
    same(block("lowest", TOGETHER), pads)


@pytest.mark.parametrize("mask", ["boolean", "lowest"])
def test_sizes_that_are_known_only_when_it_runs(mask: str) -> None:
    model = packed(model_of(block(mask), "b", "s"))
    for count, length in ((B, S), (1, S), (2, 3)):
        given = {"x": feeds("left")["x"][:count, :length], "mask": feeds("left")["mask"][:count, -length:]}
        found, forms = run(model, given)
        expected, _ = run(model_of(block(mask), "b", "s"), given)
        assert forms[FORM] == 1
        np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=2e-6)


def test_layers_share_what_is_taken_of_the_mask() -> None:
    again = block().replace("valid = Cast <to = 9> (mask) keys = Unsqueeze(valid, axes) bias = Identity(keys)", "")
    second = again.split("there =")[0]
    for name in ("q0", "q", "k", "v", "qr", "qh", "kr", "kh", "vr", "vh", "a", "at", "ar", "o", "z"):
        second = second.replace(f" {name} =", f" {name}2 =").replace(f"({name})", f"({name}2)")
        second = (
            second.replace(f"({name},", f"({name}2,")
            .replace(f" {name},", f" {name}2,")
            .replace(f" {name})", f" {name}2)")
        )
    second = second.replace("(x,", "(z,")
    first, end = block().split("there =")
    body = f"{first} {second} there ={end.replace('z, zero', 'z2, zero')}"
    same(body, "right", 2)
    lowered = get_backend("onnxruntime", CPU).lower(packed(model_of(body)), CPU, LowerOptions()).model  # type: ignore[attr-defined]
    loops = [node for node in lowered.graph if node.op_type == "Loop"]
    assert len(loops) == 4  # attentions, and once for both: biases, and queries that may see nothing


def test_the_form_is_there_from_the_opset_on_that_knows_it() -> None:
    same(block("lowest"), "holes", opset=13)
    same(block("lowest"), "holes", 0, opset=12)


def test_heads_that_attention_splits_itself() -> None:
    start, rest = block("lowest").split("qr =")
    end = rest.split("ar = Reshape(at, merged)")[1]
    attention = f"ar = Attention <q_num_heads = {H}, kv_num_heads = {H}> (q, k, v, bias)"
    same(f"{start} {attention} {end}", "left")


def test_values_of_another_size() -> None:
    body = block(projections=SEPARATE.replace("v = MatMul(x, wv)", "v = MatMul(x, wide)"))
    body = body.replace("(v, heads)", "(v, wide_heads)").replace("(at, merged)", "(at, wide_merged)")
    same(body.replace("MatMul(ar, wo)", "MatMul(ar, wide_out)"), "holes")


@pytest.mark.parametrize("pads", ["right", "empty"])
def test_what_is_not_said_by_sequence_stays_padded(pads: str) -> None:
    same(block().replace("<scale = 0.4>", "<scale = 0.4, is_causal = 1>"), pads, 0)
    same(block().replace("<scale = 0.4>", "<scale = 0.4, softcap = 3.0>"), pads, 0)
    grouped = block(projections="q = MatMul(x, wq) k = MatMul(x, narrow) v = MatMul(x, narrow)")
    same(grouped.replace("(k, heads)", "(k, one_head)").replace("(v, heads)", "(v, one_head)"), pads, 0)
    # heads that are no consecutive columns
    strided = "qr = Reshape(q, mixed) qh = Transpose <perm = [0, 3, 1, 2]> (qr)"
    same(block().replace("qr = Reshape(q, heads) qh = Transpose <perm = [0, 2, 1, 3]> (qr)", strided), pads, 0)


def test_portable_models_have_no_loop() -> None:
    same(block("lowest"), "holes", 0, portable=True)


def test_a_result_that_is_read_elsewhere_stays_padded() -> None:
    body = block().replace("y = Where", "u = Where(there, ar, zero) y = Where")
    same(body, "right", 0, more=f", float[{B},{S},{C}] u")
