"""`generate()` of Hugging Face models: the model's own loop, with the optimized model in the place of its forward.

Sampling, beams, stopping and caches are the library's. It gets a shallow copy of the model: another object with the
same attributes, whose `forward` is the optimized one. The user's model is not touched. Where the model has an encoder,
which `generate` calls by itself once, that is optimized too.

How often it captures does not depend on how many tokens come out: once for the prompt, which has no cache, once for a
step with a cache, and once for the encoder. As that is as it should be, it is no warning (`driving`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from xform.optimized.module import OptimizedModule


driving: ContextVar[bool] = ContextVar("driving", default=False)  # whether `generate` calls


def generate_with(optimized: OptimizedModule) -> Callable[..., Any]:
    """The module's own `generate`, on a shallow copy that runs the optimized model where it would run itself."""
    generate = _driver(optimized).generate

    @functools.wraps(generate)
    def driven(*args: Any, **kwargs: Any) -> Any:
        token = driving.set(True)
        try:
            return generate(*args, **kwargs)
        finally:
            driving.reset(token)

    return driven


def _driver(optimized: OptimizedModule) -> Any:
    model: Any = optimized.original
    stand_in = _with_forward(model, optimized)
    encoder = _encoder(model)
    if encoder is not None:
        substitute = _with_forward(encoder, optimized.part("encoder", encoder))
        vars(stand_in)["get_encoder"] = lambda *_, **__: substitute
    return stand_in


def _with_forward(model: torch.nn.Module, optimized: OptimizedModule) -> Any:
    """A shallow copy with another forward. `generate` reads the signature of forward, so it keeps that."""
    stand_in = copy.copy(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return optimized(*args, **kwargs)

    forward.__signature__ = optimized.signature  # type: ignore[attr-defined]
    vars(stand_in)["forward"] = forward
    return stand_in


def _encoder(model: Any) -> torch.nn.Module | None:
    """The encoder of an encoder-decoder model that `generate` calls."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = model.get_encoder()
    return found if isinstance(found, torch.nn.Module) else None
