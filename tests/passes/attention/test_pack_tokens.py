"""Padding-free execution: exact on valid rows, zeros in pads, and what stands in pads does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import apply, missed, ops, parse

import xform
from xform.backends import LoadOptions, LowerOptions, get_backend
from xform.errors import UsageError
from xform.graph.values import shape_of
from xform.passes.attention import PackTokens
from xform.passes.cleanup import EliminateUnreadRows
from xform.rewrite.passes import PassContext
from xform.target import Target

B, S, C, H = 3, 6, 8, 2
RNG = np.random.default_rng(0)
LENGTHS = np.array([4, S, 1])


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "wq": floats(C, C), "wk": floats(C, C), "wv": floats(C, C), "wo": floats(C, C), "b": floats(C),
    "gain": floats(C), "wide": floats(1, 1, C), "w1": floats(C, 2 * C), "w2": floats(2 * C, C),
    "heads": np.array([0, 0, H, C // H]), "merged": np.array([0, 0, C]), "axes": np.array([1, 2]),
    "rows": floats(S, C), "last": np.array([2]), "sides": np.array([1, 3]),
    "zero": np.array(0.0, np.float32), "lowest": np.array(-1e30, np.float32),
    "infinite": np.array(-np.inf, np.float32), "first": np.array(0),
    "one": np.array([1]), "zeros": np.array([0]),
}  # fmt: skip
BLOCK = """
    valid = Cast <to = 9> (mask) keys = Unsqueeze(valid, axes) bias = Where(keys, zero, lowest)
    q0 = MatMul(x, wq) q = Add(q0, b) k = MatMul(x, wk) v = MatMul(x, wv)
    qr = Reshape(q, heads) qh = Transpose <perm = [0, 2, 1, 3]> (qr)
    kr = Reshape(k, heads) kh = Transpose <perm = [0, 2, 1, 3]> (kr)
    vr = Reshape(v, heads) vh = Transpose <perm = [0, 2, 1, 3]> (vr)
    a = Attention(qh, kh, vh, bias) at = Transpose <perm = [0, 2, 1, 3]> (a) ar = Reshape(at, merged)
    o = MatMul(ar, wo) r = Add(x, o) n = LayerNormalization(r, gain, b)
    h = MatMul(n, w1) g = Gelu(h) d = MatMul(g, w2) e = Mul(d, wide) z = Add(e, n)
"""
END = "there = Unsqueeze(valid, last) y = Where(there, z, zero)"


def block(end: str = END, inputs: str = f"float[{B},{S},{C}] x, int64[{B},{S}] mask", body: str = BLOCK,
          outputs: str = f"float[{B},{S},{C}] y") -> ir.Model:  # fmt: skip
    used = {name: array for name, array in CONSTANTS.items() if f"{name})" in body + end or f"{name}," in body + end}
    kinds = {"float32": "float", "int64": "int64"}
    declared = "".join(f", {kinds[a.dtype.name]}{list(a.shape) if a.ndim else ''} {n}" for n, a in used.items())
    return parse(f"g ({inputs}{declared}) => ({outputs}) {{ {body} {end} }}", used)


def feeds(lengths: Any = LENGTHS) -> dict[str, np.ndarray]:
    mask = (np.arange(S)[None] < np.asarray(lengths)[:, None]).astype(np.int64)
    return {"x": np.random.default_rng(1).standard_normal((B, S, C)).astype(np.float32), "mask": mask}


def run(model: ir.Model, given: dict[str, np.ndarray]) -> list[Any]:
    """Lowered first: ONNX Runtime's Attention wants masks that are written out for every query."""
    backend, target = get_backend("onnxruntime", Target("cpu", threads=1)), Target("cpu", threads=1)
    return backend.load(backend.lower(model, target, LowerOptions()), LoadOptions(threads=1)).run(given)


def packed(model: ir.Model) -> ir.Model:
    remarks = apply(model, PackTokens())
    assert missed(remarks) == []
    assert not PackTokens().run(model, PassContext()), "a second run changed the graph"
    return model


@pytest.mark.parametrize("lengths", [LENGTHS, [S, S, S], [1, 1, 1], [0, 3, S], [S, 0, 0], [0, 0, 0]])
def test_every_pattern_of_lengths_gives_the_same_rows(lengths: Any) -> None:
    expected = run(block(), feeds(lengths))[0]
    found = run(packed(block()), feeds(lengths))[0]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_masks_with_holes_and_padding_on_the_left_are_the_same() -> None:
    given = feeds()
    given["mask"] = np.array([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]])
    np.testing.assert_allclose(run(packed(block()), given)[0], run(block(), given)[0], rtol=2e-5, atol=2e-6)


def test_products_run_on_the_tokens_alone() -> None:
    model = packed(block())
    ranks = [
        len(n.outputs[0].shape or ()) for n in model.graph if n.op_type in ("MatMul", "LayerNormalization", "Gelu")
    ]
    assert ranks == [2] * len(ranks) and len(ranks) == 8
    assert ops(model).count("Attention") == 1 and ops(model).count("NonZero") == 1


@pytest.mark.parametrize("garbage", [1e30, np.nan, np.inf])
def test_garbage_in_pads_does_not_matter(garbage: float) -> None:
    model, clean = packed(block()), feeds()
    dirty = {**clean, "x": np.where(clean["mask"][..., None] == 0, np.float32(garbage), clean["x"]).astype(np.float32)}
    found = run(model, dirty)[0]
    np.testing.assert_array_equal(found, run(model, clean)[0])
    assert (found[clean["mask"] == 0] == 0).all()


def test_dynamic_sizes_are_packed() -> None:
    shapes = {"inputs": f"float[b,s,{C}] x, bool[b,s] mask", "outputs": f"float[b,s,{C}] y"}
    body = BLOCK.replace("valid = Cast <to = 9> (mask)", "valid = Identity(mask)")
    given = {**feeds(), "mask": feeds()["mask"].astype(bool)}
    expected = run(block(body=body, **shapes), given)[0]
    np.testing.assert_allclose(run(packed(block(body=body, **shapes)), given)[0], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("end", "shape"),
    [
        ("y = Gather <axis = 1> (z, first)", f"float[{B},{C}] y"),
        ("y = Slice(z, zeros, one, one)", f"float[{B},1,{C}] y"),
    ],
)
def test_the_first_token_may_be_read(end: str, shape: str) -> None:
    given = feeds()
    expected = run(block(end, outputs=shape), given)[0]
    np.testing.assert_allclose(run(packed(block(end, outputs=shape)), given)[0], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 3, S], [0, 0, 0]])
def test_the_first_token_alone_may_ask_of_few_sequences(lengths: Any) -> None:
    """A sequence without tokens attends to its pads, also where a fixed batch is too small for all kinds of masks."""
    body = "f = Gather <axis = 1> (x, zeros)" + BLOCK.replace("MatMul(x, wq)", "MatMul(f, wq)")
    text = {"body": body.replace("Add(x, o)", "Add(f, o)"), "outputs": f"float[{B},1,{C}] y"}
    given = feeds(lengths)
    expected = run(block("y = Identity(z)", **text), given)[0]
    np.testing.assert_allclose(run(packed(block("y = Identity(z)", **text)), given)[0], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fill", ["lowest", "infinite"])
def test_the_first_token_of_a_sequence_that_begins_with_a_pad_is_its_own(fill: str) -> None:
    body = BLOCK.replace("lowest", fill)
    end = "y = Gather <axis = 1> (z, first)"
    masks = [[[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]]]
    masks += [[[0] * S, [1] * S, [0, 1, 0, 0, 0, 0]], [[0] * S] * 3] if fill == "lowest" else []
    for mask in masks:
        given = {**feeds(), "mask": np.array(mask)}
        expected = run(block(end, body=body, outputs=f"float[{B},{C}] y"), given)[0]
        found = run(packed(block(end, body=body, outputs=f"float[{B},{C}] y")), given)[0]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("number", ["-1.0", "-100.0"])
def test_a_mask_that_leaves_pads_a_weight_stops_it(number: str) -> None:
    body = BLOCK.replace("Where(keys, zero, lowest)", "Where(keys, zero, weak)")
    body = f"weak = Constant <value_float = {number}> () {body}"
    assert any("rows of pads" in reason for reason in missed(apply(block(body=body), PackTokens())))


def test_a_mask_that_is_the_other_way_round_stops_it() -> None:
    """Nonzero where a pad is, as in PyTorch's key_padding_mask."""
    body = BLOCK.replace("Where(keys, zero, lowest)", "Where(keys, lowest, zero)")
    assert any("rows of pads" in reason for reason in missed(apply(block(body=body), PackTokens())))


def test_shapes_of_packed_rows_may_be_read() -> None:
    body = BLOCK.replace("bias = Where", "narrow = Where")
    body = body.replace(
        "a = Attention",
        """ones = Constant <value_ints = [1, 1]> ()
        length = Shape <start = 2, end = 3> (qh)
        to = Concat <axis = 0> (ones, length, length) bias = Expand(narrow, to) a = Attention""",
    )
    shapes = {"inputs": f"float[b,s,{C}] x, int64[b,s] mask", "outputs": f"float[b,s,{C}] y"}
    expected = run(block(body=body, **shapes), feeds())[0]
    np.testing.assert_allclose(run(packed(block(body=body, **shapes)), feeds())[0], expected, rtol=2e-5, atol=2e-6)


def test_an_empty_batch_is_packed() -> None:
    shapes = {"inputs": f"float[b,{S},{C}] x, int64[b,{S}] mask", "outputs": f"float[b,{S},{C}] y"}
    nobody = {name: array[:0] for name, array in feeds().items()}
    assert run(packed(block(**shapes)), nobody)[0].shape == (0, S, C)


@pytest.mark.parametrize("batch", [0, 2])
def test_sequences_of_no_tokens_are_packed(batch: int) -> None:
    shapes = {"inputs": f"float[b,s,{C}] x, int64[b,s] mask", "outputs": f"float[b,s,{C}] y"}
    nothing = {"x": np.zeros((batch, 0, C), np.float32), "mask": np.zeros((batch, 0), np.int64)}
    assert run(packed(block(**shapes)), nothing)[0].shape == (batch, 0, C)


@pytest.mark.parametrize("lengths", [LENGTHS, [S, S, S], [1, 1, 1]])
def test_the_first_token_may_be_all_that_the_last_block_computes(lengths: Any) -> None:
    model = block("y = Gather <axis = 1> (z, first)", outputs=f"float[{B},{C}] y")
    given = feeds(lengths)
    expected = run(model, given)[0]
    apply(model, EliminateUnreadRows())
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert shape_of(attention.inputs[0]) == (B, H, 1, C // H)
    remarks = apply(model, PackTokens())
    assert missed(remarks) == [] and any("2 operators run on packed tokens" in r.reason for r in remarks)  # k and v
    np.testing.assert_allclose(run(model, given)[0], expected, rtol=2e-5, atol=2e-6)
    dirty = np.where((given["mask"] == 0)[..., None] & (np.arange(S) > 0)[:, None], np.nan, given["x"])
    np.testing.assert_allclose(run(model, {**given, "x": dirty.astype(np.float32)})[0], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("end", "shape", "who"),
    [
        ("y = ReduceMean(z, one)", f"float[{B},1,{C}] y", "ReduceMean"),
        ("y = Add(z, b)", f"float[{B},{S},{C}] y", "Add"),
        ("t = Transpose <perm = [0, 2, 1]> (z) y = Softmax(t)", f"float[{B},{C},{S}] y", "Softmax"),
        ("y = Gather <axis = 1> (z, one)", f"float[{B},1,{C}] y", "Gather"),
    ],
)
def test_a_reader_that_sees_pads_keeps_everything_as_it_is(end: str, shape: str, who: str) -> None:
    model = block(end, outputs=shape)
    before = ops(model)
    remarks = apply(model, PackTokens())
    assert ops(model) == before
    assert any("rows of pads" in reason for reason in missed(remarks))


def test_a_norm_with_a_scale_per_position_is_not_packed() -> None:
    model = block(body=BLOCK.replace("LayerNormalization(r, gain, b)", "LayerNormalization(r, rows, b)"))
    given = feeds()
    expected = run(model, given)[0]
    remarks = apply(model, PackTokens())
    assert any("LayerNormalization reads rows of pads" in reason for reason in missed(remarks))
    np.testing.assert_array_equal(run(model, given)[0], expected)


def test_a_head_of_all_tokens_is_not_the_first_token() -> None:
    """With as many heads as tokens [B, S, H, D] has the shape of [B, H, S, D]."""
    few = {"inputs": f"float[{B},{H},{C}] x, int64[{B},{H}] mask", "outputs": f"float[{B},{H},{C // H}] y"}
    model = block("zr = Reshape(z, heads) y = Gather <axis = 2> (zr, first)", **few)
    assert any("rows of pads" in reason for reason in missed(apply(model, PackTokens())))
    few["outputs"] = f"float[{B},{H},{C // H}] y"
    model = block(
        "zr = Reshape(z, heads) zh = Transpose <perm = [0, 2, 1, 3]> (zr) y = Gather <axis = 2> (zh, first)", **few
    )
    assert missed(apply(model, PackTokens())) == []


OWN = "own = Unsqueeze(valid, sides) both = And(keys, own) bias = Where(both, zero, lowest)"


@pytest.mark.parametrize(
    ("change", "outputs", "who"),
    [
        (("a = Attention(qh, kh, vh, bias)", "a, pk, pv = Attention(qh, kh, vh, bias)"),
         f"float[{B},{S},{C}] y, float[{B},{H},{S},{C // H}] pk", "Attention"),
        # a mask by query and key: all keys of a pad query have one bias, so they have weights
        (("bias = Where(keys, zero, lowest)", OWN),
         f"float[{B},{S},{C}] y, float[{B},{H},{S},{C // H}] a", "Attention"),
    ],
)  # fmt: skip
def test_an_attention_that_gives_more_than_valid_rows_stops_it(change: tuple[str, str], outputs: str, who: str) -> None:
    body = BLOCK.replace(*change)
    body = body.replace("qh = Transpose <perm = [0, 2, 1, 3]> (qr)", "qh = Identity(given)")
    inputs = f"float[{B},{S},{C}] x, int64[{B},{S}] mask, float[{B},{H},{S},{C // H}] given"
    model = block(inputs=inputs, body=body, outputs=outputs)
    remarks = apply(model, PackTokens())
    assert [reason.split()[0] for reason in missed(remarks)] == [who]


NO_MASK = BLOCK.replace("a = Attention(qh, kh, vh, bias)", "a = Attention(qh, kh, vh)")
OTHER = BLOCK.replace("bias = Where(keys, zero, lowest)", "both = And(keys, more) bias = Where(both, zero, lowest)")


@pytest.mark.parametrize(
    ("body", "extra", "reason"), [(NO_MASK, "", "no mask"), (OTHER, f", bool[{B},{S}] more0", "not computed from one")]
)
def test_without_one_mask_nothing_is_packed(body: str, extra: str, reason: str) -> None:
    if extra:
        body = "more = Unsqueeze(more0, axes) " + body
    model = block(inputs=f"float[{B},{S},{C}] x, int64[{B},{S}] mask{extra}", body=body)
    assert any(reason in text for text in missed(apply(model, PackTokens())))


class Encoder(torch.nn.Module):
    """Two layers with a key-padding mask, and the outputs that such models have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 48), torch.nn.Linear(16, 48)])
        self.out = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)])
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = torch.where(mask[:, None, None, :] > 0, 0.0, -1e9)
        for layer, out in zip(self.layers, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = self.norm(x + out(a.transpose(1, 2).flatten(2)))
        return x


def test_a_module_is_packed_verified_and_gives_zeros_in_pads() -> None:
    torch.manual_seed(0)
    module = Encoder().eval()
    x, mask = torch.randn(3, 7, 16), (torch.arange(7)[None] < torch.tensor([[3], [7], [5]])).long()
    fast = xform.optimize(module, inputs=(x, mask), padding="packed", dynamic="auto")
    assert fast.report.verification.passed and not [r for r in fast.report.about("padding") if r.verdict == "missed"]
    with torch.no_grad():
        expected = module(x, mask) * mask[..., None]
    torch.testing.assert_close(fast(x, mask), expected, rtol=1e-4, atol=1e-5)
    more = (torch.arange(9)[None] < torch.tensor([[9], [2]])).long()
    y = torch.randn(2, 9, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(y, more), module(y, more) * more[..., None], rtol=1e-4, atol=1e-5)


class Classifier(Encoder):
    """The first token of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(super().forward(x, mask)[:, 0])
        return result


def test_a_classifier_computes_one_token_of_its_last_block_and_is_packed_before() -> None:
    torch.manual_seed(0)
    module = Classifier().eval()
    x, mask = torch.randn(3, 7, 16), (torch.arange(7)[None] < torch.tensor([[3], [7], [5]])).long()
    fast = xform.optimize(module, inputs=(x, mask), padding="packed", dynamic="auto")
    assert not [r for r in fast.report.about("padding") if r.verdict == "missed"]
    assert any("Attention" in r.reason and "1 of" in r.reason for r in fast.report.about("rows"))
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mask), module(x, mask), rtol=1e-4, atol=1e-5)


def test_a_model_without_mask_is_refused() -> None:
    with pytest.raises(UsageError, match="padding='packed' is not possible: there is no attention"):
        xform.optimize(torch.nn.Linear(4, 4), inputs=torch.ones(2, 4), padding="packed")
    with pytest.raises(UsageError, match="padding='none' is unknown"):
        xform.optimize(torch.nn.Linear(4, 4), padding="none")
