"""Attention reads heads where the projection left them, and takes no mask where a constant one says little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import floats, parse, run
from torch.utils._python_dispatch import TorchDispatchMode

from xform.backends.torch_triton.functions.attention import grouped_attention
from xform.backends.torch_triton.lower import to_torch

B, S, H, D = 2, 5, 3, 4
C = H * D
COPIES = ("clone", "copy_", "contiguous", "_reshape_copy", "masked_fill", "index_select")


class Operators(TorchDispatchMode):
    """Names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def copies_around_attention(module: torch.fx.GraphModule, *inputs: torch.Tensor) -> tuple[list[str], list[str]]:
    """What copies between the product before attention and it, and between it and the product behind."""
    with torch.no_grad(), Operators() as found:
        module(*inputs)
    names = found.names
    at = next(i for i, name in enumerate(names) if "scaled_dot_product" in name)
    products = [i for i, name in enumerate(names) if name in ("mm", "bmm", "addmm")]
    start, end = max(i for i in products if i < at), min(i for i in products if i > at)
    before, behind = ([name for name in part if name in COPIES] for part in (names[start:at], names[at:end]))
    return before, behind


CONSTANTS = {
    "wqkv": floats(C, 3 * C), "wo": floats(C, C), "split": np.array([B, S, H, D]), "five": np.array([B, S, 3, H, D]),
    "merged": np.array([B, S, C]), "axes": np.array([1, 2]), "first": np.array(0), "second": np.array(1),
    "third": np.array(2),
}  # fmt: skip
SPLIT = """qkv = MatMul(x, wqkv) q, k, v = Split <axis = 2, num_outputs = 3> (qkv)
    qr = Reshape(q, split) kr = Reshape(k, split) vr = Reshape(v, split)
    qh = Transpose <perm = [0, 2, 1, 3]> (qr) kh = Transpose <perm = [0, 2, 1, 3]> (kr)
    vh = Transpose <perm = [0, 2, 1, 3]> (vr)"""
STACKED = """qkv = MatMul(x, wqkv) r = Reshape(qkv, five) t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    qh = Gather(t, first) kh = Gather(t, second) vh = Gather(t, third)"""
END = "at = Transpose <perm = [0, 2, 1, 3]> (a) ar = Reshape(at, merged) y = MatMul(ar, wo)"


def packed_projection(heads: str, attention: str) -> Any:
    body = f"{heads} {attention} {END}"
    used = {n: a for n, a in CONSTANTS.items() if f"{n})" in body or f"{n}," in body}
    kinds = {"float32": "float", "int64": "int64"}
    declared = "".join(f", {kinds[a.dtype.name]}{list(a.shape) if a.ndim else ''} {n}" for n, a in used.items())
    shape = f"float[{B},{S},{C}]"
    return parse(f"g ({shape} x, bool[{B},{S}] mask{declared}) => ({shape} y) {{ {body} }}", used)


@pytest.mark.parametrize("heads", [SPLIT, STACKED])
@pytest.mark.parametrize(
    "attention",
    ["a = Attention(qh, kh, vh)", "a = Attention <is_causal = 1> (qh, kh, vh)",
     "keys = Unsqueeze(mask, axes) a = Attention(qh, kh, vh, keys)"],
)  # fmt: skip
def test_no_copy_between_a_packed_projection_and_the_product_behind_attention(heads: str, attention: str) -> None:
    """Not even where a mask could leave a query without any key."""
    module = to_torch(packed_projection(heads, attention))
    inputs = torch.randn(B, S, C), torch.tensor([[True] * S, [False, True, True, False, False]])
    assert copies_around_attention(module, *inputs) == ([], [])


def masked(mask: np.ndarray, attributes: str = "") -> tuple[str, list[np.ndarray]]:
    """The call of a lowered attention with a constant mask, and its numbers beside those of ONNX Runtime."""
    kind = {"float32": "float", "bool": "bool"}[mask.dtype.name]
    q = f"float[{B},{H},{S},{D}]"
    model = parse(
        f"g ({q} q, {q} k, {q} v, {kind}{list(mask.shape)} m) => ({q} y) {{ y = Attention {attributes} (q, k, v, m) }}",
        {"m": mask},
    )
    feeds = {name: floats(B, H, S, D) for name in "qkv"}
    module = to_torch(model)
    got = module(*map(torch.from_numpy, feeds.values()))[0].numpy()
    return module.code, [got, run(model, feeds)[0]]


PAST = np.tri(S, dtype=bool)
LOWEST = float(np.finfo(np.float32).min)
BAND = PAST & ~np.tri(S, k=-2, dtype=bool)
EMPTY = np.where(np.arange(S)[:, None] == 2, False, PAST)


@pytest.mark.parametrize(
    ("mask", "attributes", "has_mask", "is_causal"),
    [
        (np.ones((B, 1, S, S), bool), "", False, False),
        (np.zeros((S, S), np.float32), "", False, False),
        (np.ones((S, S), bool), "<is_causal = 1>", False, True),
        (np.broadcast_to(PAST, (B, 1, S, S)).copy(), "", False, True),
        (np.where(PAST, 0, LOWEST).astype(np.float32)[None, None], "", False, True),
        (np.where(PAST, 0, -1.0).astype(np.float32), "", True, False),
        (BAND, "", True, False),
        (EMPTY, "", True, False),
        (PAST.T.copy(), "<is_causal = 1>", True, False),
    ],
)
def test_constant_masks(mask: np.ndarray, attributes: str, has_mask: bool, is_causal: bool) -> None:
    code, (got, want) = masked(mask, attributes)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert ("attn_mask" in code, "is_causal = True" in code) == (has_mask, is_causal)


def test_rows_are_looked_after_only_where_they_can_be_empty() -> None:
    assert "empty_rows" not in masked(BAND)[0]
    assert "empty_rows" in masked(EMPTY)[0] and "empty_rows" in masked(~PAST, "<is_causal = 1>")[0]


@pytest.mark.parametrize(
    ("dtype", "size", "masked", "device", "shared"),
    [
        (torch.bfloat16, 64, False, "cuda", True),
        (torch.bfloat16, 64, True, "cuda", False),
        (torch.float32, 64, False, "cuda", False),
        (torch.float16, 320, False, "cuda", False),
        (torch.float32, 64, True, "cpu", True),
    ],
)
def test_shared_key_heads_are_repeated_for_kernels_that_do_not_take_them(
    dtype: torch.dtype, size: int, masked: bool, device: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `enable_gqa` torch falls back to all scores in memory, on a GPU, where flash attention does not apply."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls: list[tuple[int, bool]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        assert k.shape == v.shape
        calls.append((k.shape[1], options["enable_gqa"]))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with FakeTensorMode():  # as on a GPU, but for the numbers
        query, key = (torch.empty(1, heads, 8, size, dtype=dtype, device=device) for heads in (6, 2))
        mask = torch.empty(8, 8, dtype=torch.bool, device=device) if masked else None
        grouped_attention(query, key, key, mask)
    assert calls == [(2, True) if shared else (6, False)]


def test_repeated_heads_are_those_of_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.from_numpy(floats(2, heads, 5, 8)) for heads in (6, 2, 2))
    want = grouped_attention(query, key, value, is_causal=True, scale=0.3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    torch.testing.assert_close(grouped_attention(query, key, value, is_causal=True, scale=0.3), want)
