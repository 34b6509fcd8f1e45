"""Configurations of Triton kernels: declared beside each kernel, chosen by measurement on the GPU at hand.

On a GPU `triton.autotune` times all configurations at the first call for a key (sizes and dtypes) and keeps its choice
in Triton's cache on disk, which later processes read. Where there is nothing to measure on, in the interpreter and
without a GPU, the first configuration is the one: the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

_MANY_ROWS = 2048  # some fifteen for each multiprocessor of a large GPU


def tuned(configurations: Sequence[triton.Config], *, key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorates a `triton.jit` function.

    Args:
        configurations: The first is the default.
        key: Arguments of the kernel on which the choice depends, beside the dtypes of its tensors. Of the number of
            rows only whether they are `many`, so that a dynamic batch is measured twice at most.
    """
    measured = torch.cuda.is_available() and not triton.knobs.runtime.interpret
    chosen = list(configurations) if measured else list(configurations[:1])
    return triton.autotune(configs=chosen, key=list(key), cache_results=measured)


def many(rows: Any) -> bool:
    """Whether so many rows fill a GPU, where throughput counts and not latency; a size that is not known does not."""
    return isinstance(rows, int) and rows >= _MANY_ROWS


def by_element() -> tuple[triton.Config, ...]:
    """For kernels that compute each element of a row by itself, a part of the row in each program."""
    sizes = ((1024, 4), (512, 4), (2048, 4), (2048, 8), (4096, 8))
    return tuple(triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in sizes)


def choices(tuner: Any) -> dict[str, str]:
    """What a tuned kernel runs with, by key; empty before the first call."""
    return {", ".join(map(str, key)): str(config) for key, config in getattr(tuner, "cache", {}).items()}
