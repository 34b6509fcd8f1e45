"""Attention and what surrounds it."""

from xform.passes.attention.pack_tokens import PackTokens

__all__ = ["PackTokens"]
