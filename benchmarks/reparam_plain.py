"""Adapters and structured layers as plain modules, in a transformer block with slots for them.

Sources: ZeroI2V (arXiv 2310.01324): x + s W2(W1 x + b1) + s b2 beside or behind frozen layers. PAT (2408.14721):
mask * ((I + BA) x) behind attention and feed-forward. Structured feed-forward layers (2406.16450): LowRank,
BlockShuffle, BlockDense. AdapterTune (2603.14706): x + a U gelu(D x), which no matrix can be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, INNER, RANK, HEADS = 48, 96, 6, 4


class Block(nn.Module):
    """A pre-norm transformer block; `slots` replace the identities and linear layers of these names."""

    def __init__(self, **slots: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.before_qkv, self.after_qkv = nn.Identity(), nn.Identity()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.after_proj, self.after_mlp = nn.Identity(), nn.Identity()
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        for name, module in slots.items():
            setattr(self, name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.after_qkv(self.qkv(self.before_qkv(self.norm1(x))))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.after_proj(self.proj(mixed))
        return x + self.after_mlp(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class LinearAdapter(nn.Module):
    """ZeroI2V: a residual pair of linear layers with nothing in between."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.up(self.down(x))


class Beside(nn.Module):
    """A linear layer with a linear adapter that reads the same operand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, RANK), nn.Linear(RANK, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + 0.5 * self.up(self.down(x))


class HybridSparsification(nn.Module):
    """PAT: a mask over channels after a residual low-rank product."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
        self.register_buffer("mask", (torch.arange(WIDTH) % 5 != 0).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mask * (x + self.up(self.down(x)))


class LowRank(nn.Module):
    """U (V x) + b."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.u(self.v(x))


class BlockShuffle(nn.Module):
    """Two block-diagonal products with a shuffle of the channels in between and after, and a bias."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.first = nn.Parameter(torch.randn(blocks, inputs // blocks, inputs // blocks) * (blocks / inputs) ** 0.5)
        self.second = nn.Parameter(torch.randn(blocks, inputs // blocks, outputs // blocks) * (blocks / inputs) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[:-1]
        blocks = x.reshape(-1, self.blocks, x.shape[-1] // self.blocks).transpose(0, 1)
        mixed = torch.bmm(blocks, self.first).transpose(0, 1)
        shuffled = mixed.reshape(-1, mixed.shape[-1], self.blocks).permute(2, 0, 1)
        return torch.bmm(shuffled, self.second).permute(1, 2, 0).reshape(*batch, -1) + self.bias


class BlockDense(nn.Module):
    """A block-diagonal product, then a dense one."""

    def __init__(self, inputs: int, outputs: int, rank: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.block = nn.Parameter(torch.randn(blocks, inputs // blocks, rank // blocks) * (blocks / inputs) ** 0.5)
        self.dense = nn.Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(-1, self.blocks, x.shape[-1] // self.blocks).transpose(0, 1)
        mixed = torch.bmm(blocks, self.block).transpose(0, 1).reshape(*x.shape[:-1], -1)
        return self.dense(mixed)


class BlockEinsum(nn.Module):
    """A block-diagonal product in one einsum, then a dense one."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.block = nn.Parameter(torch.randn(blocks, inputs // blocks, inputs // blocks) * (blocks / inputs) ** 0.5)
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("btni,nio->btno", x.unflatten(-1, (self.blocks, -1)), self.block)
        return self.dense(mixed.flatten(-2))


class NonlinearAdapter(nn.Module):
    """AdapterTune: a residual bottleneck with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, RANK), nn.Linear(RANK, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.7 * self.up(F.gelu(self.down(x)))


class ZeroNonlinearAdapter(nn.Module):
    """AdapterTune as initialized: its up-projection is zero (as a buffer, which nothing randomizes)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, RANK)
        self.register_buffer("up", torch.zeros(WIDTH, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.7 * F.linear(F.gelu(self.down(x)), self.up)


_Built = tuple[nn.Module, nn.Module | None, torch.Tensor]


def _case(left: bool = False, **slots: Callable[[], nn.Module]) -> Callable[[], _Built]:
    def make() -> _Built:
        base = Block()
        adapted = copy.deepcopy(base)
        for name, module in slots.items():
            setattr(adapted, name, module())
        return adapted, None if left else base, torch.randn(2, 9, WIDTH)

    return make


PLAIN: dict[str, Callable[[], _Built]] = {
    "zeroi2v_serial": _case(before_qkv=LinearAdapter, after_proj=LinearAdapter, after_mlp=LinearAdapter),
    "zeroi2v_parallel": _case(qkv=lambda: Beside(WIDTH, 3 * WIDTH), fc1=lambda: Beside(WIDTH, INNER)),
    "pat": _case(after_proj=HybridSparsification, after_mlp=HybridSparsification),
    "low_rank": _case(fc1=lambda: LowRank(WIDTH, INNER, 40), fc2=lambda: LowRank(INNER, WIDTH, 32)),
    "low_rank_narrow": _case(left=True, fc1=lambda: LowRank(WIDTH, INNER, 8)),
    "block_shuffle": _case(fc2=lambda: BlockShuffle(INNER, WIDTH, 2)),
    "block_shuffle_narrow": _case(left=True, fc1=lambda: BlockShuffle(WIDTH, INNER, 4)),
    "block_dense": _case(fc1=lambda: BlockDense(WIDTH, INNER, WIDTH, 4)),
    "block_dense_narrow": _case(left=True, fc1=lambda: BlockDense(WIDTH, INNER, 12, 4)),
    "block_einsum": _case(fc2=lambda: BlockEinsum(INNER, WIDTH, 4)),
    "adapter_tune": _case(left=True, after_proj=NonlinearAdapter),
    "adapter_tune_zero": _case(after_proj=ZeroNonlinearAdapter, after_mlp=ZeroNonlinearAdapter),
}
