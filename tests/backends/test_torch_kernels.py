"""Every kernel equals its naive twin: odd sizes, strides, dtypes, and results that start as NaN."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from xform.backends.torch_triton.kernels import common, kernels
from xform.backends.torch_triton.kernels.packed_attention.kernel import packed_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (1, 63, 197, 1000)
KINDS = ("gelu", "gelu_tanh", "silu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# every size with every kind, and every dtype with both
CASES = [(size, DTYPES[(i + j) % 4], kind) for i, size in enumerate(SIZES) for j, kind in enumerate(KINDS)]
# the interpreter cuts bfloat16 where a GPU rounds, which is up to two units in the last place after two steps
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3.2e-2}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results is full of NaN, so that an element that is not written shows."""
    monkeypatch.setattr(common, "empty", lambda shape, like: like.new_full(tuple(shape), float("nan")))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype is want.dtype and got.shape == want.shape
    limit = TOLERANCE[want.dtype]
    torch.testing.assert_close(got.double(), want.double(), rtol=limit, atol=limit)


def both(name: str, *arguments: object) -> None:
    kernel = kernels()[name]
    got, want = kernel.op(*arguments), kernel.naive(*arguments)
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        assert_equal(one, other)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as rows of a wider matrix."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_rms", [False, True])
def test_residual_norm(size: int, dtype: torch.dtype, is_rms: bool) -> None:
    x, residual = random(2, 3, size, dtype=dtype) + 3, random(3, 2, size, dtype=dtype).transpose(0, 1)
    weight, bias = random(size, dtype=dtype), None if is_rms else random(size, dtype=dtype)
    both("residual_norm", strided(x), residual, weight, bias, 1e-5, is_rms)


@pytest.mark.parametrize(("size", "dtype", "kind"), CASES)
def test_bias_activation(size: int, dtype: torch.dtype, kind: str) -> None:
    both("bias_activation", strided(random(2, 2, size, dtype=dtype)), random(size, dtype=dtype), kind)


@pytest.mark.parametrize(("size", "dtype", "kind"), CASES)
def test_gated_unit_reads_halves_of_a_packed_product(size: int, dtype: torch.dtype, kind: str) -> None:
    gate, up = random(3, 2 * size, dtype=dtype).split(size, -1)
    both("gated_unit", gate, up, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "size", "turned"), [(1, 2, 2), (3, 62, 62), (5, 80, 32)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_reads_heads_of_a_packed_projection(
    length: int, size: int, turned: int, interleaved: bool, dtype: torch.dtype
) -> None:
    packed = random(2, length, (3 + 1 + 1) * size, dtype=dtype).unflatten(-1, (5, size)).transpose(1, 2)
    cos, sin = (random(batch, length, turned // 2, dtype=dtype) for batch in (1, 2))
    both("rotary_qk", packed[:, :3], packed[:, 3:4], cos, sin, interleaved)


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (11, 9), (1, 17)])
def test_rotary_turns_any_number_of_heads_and_leaves_them_behind_steps(heads: int, key_heads: int) -> None:
    query, key = (random(2, 3, count, 10, dtype=torch.float32).transpose(1, 2) for count in (heads, key_heads))
    cos, sin = (random(1, 3, 5, dtype=torch.float32) for _ in range(2))
    both("rotary_qk", query, key, cos, sin, False)
    for turned in torch.ops.xform.rotary_qk(query, key, cos, sin, False):
        assert turned.transpose(1, 2).is_contiguous()  # so that merging the heads behind attention is a view


@pytest.mark.parametrize("size", SIZES)
def test_the_stream_is_the_sum(size: int) -> None:
    x, residual = random(2, size, dtype=torch.bfloat16), random(2, size, dtype=torch.bfloat16).flip(0)
    weight = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    _, stream = torch.ops.xform.residual_norm(x, residual, weight, None, 1e-5, True)
    assert_equal(stream, x + residual)


def pack(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Drop the padding.

    Args:
        x: [B, S, ...]; mask: [B, S], true for tokens.

    Returns:
        The tokens [T, ...], their places in the flat [B S], the starts of `packed_attention`, the longest length.
    """
    lengths = mask.sum(1, dtype=torch.int32)
    places = torch.nonzero(mask.reshape(-1)).reshape(-1)
    starts = torch.nn.functional.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1).index_select(0, places), places, starts, int(lengths.max())


def unpack(tokens: torch.Tensor, places: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Tokens [T, ...] back at their places in [B, S, ...], zeros elsewhere."""
    padded = tokens.new_zeros((batch * length, *tokens.shape[1:]))
    return padded.index_copy(0, places, tokens).unflatten(0, (batch, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_attention_equals_attention_with_padding(dtype: torch.dtype, is_causal: bool) -> None:
    batch, length, heads, size = 3, 9, 4, 16
    mask = torch.arange(length, device=DEVICE) < torch.tensor([[9], [1], [5]], device=DEVICE)
    q, k, v = (random(batch, length, h, size, dtype=dtype) for h in (heads, 2, 2))
    tokens, places, starts, longest = pack(torch.cat((q, k, v), 2), mask)
    got = unpack(
        packed_attention(*tokens.split((heads, 2, 2), 1), starts, longest, None, is_causal), places, batch, length
    )
    allowed = mask[:, None, None] & (torch.ones(length, length, device=DEVICE).tril().bool() if is_causal else True)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed, enable_gqa=True
    ).transpose(1, 2)
    assert_equal(got[mask], want[mask])
    assert not got[~mask].any()


PROGRAM = """
import torch
from xform.backends.torch_triton.kernels import kernels

class Block(torch.nn.Module):
    def forward(self, x, r, w):
        normed, stream = torch.ops.xform.residual_norm(x, r, w, None, 1e-6, True)
        return torch.ops.xform.gated_unit(normed, stream, "silu")

kernels()
x = torch.randn(2, 5, 8)
program = torch.export.export(Block(), (x, x, torch.ones(8)), strict=False)
print([(str(n.target), tuple(n.meta["val"].shape)) for n in program.graph.nodes if "gated" in str(n.target)])
"""


def test_operators_can_be_traced() -> None:
    """Without running a kernel. Those of the interpreter cannot be traced, hence the process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('xform.gated_unit.default', (2, 5, 8))]"
