"""Generate text with an optimized Hugging Face model: its own `generate`, the same tokens, the cache included.

    python examples/generate.py

The weights are random, so the text means nothing; what counts is that it is the same.
"""

from __future__ import annotations

import time
import warnings

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import xform


def main() -> None:
    """Compare greedy and beam search with the original model."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=500, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 500, (2, 8))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}

    fast = xform.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", xform.XformWarning)  # it is captured twice: without a cache, and with one
        fast.generate(**prompt, max_new_tokens=3)
    for name, options in (("greedy", {}), ("beams", {"num_beams": 3})):
        start = time.perf_counter()
        with torch.no_grad():
            expected = model.generate(**prompt, **options, max_new_tokens=16, do_sample=False)
        before, start = time.perf_counter() - start, time.perf_counter()
        actual = fast.generate(**prompt, **options, max_new_tokens=16, do_sample=False)
        after = time.perf_counter() - start
        assert torch.equal(actual, expected)
        print(
            f"{name}: the same {actual.shape[1] - 8} tokens; {before * 1e3:.0f} ms before, {after * 1e3:.0f} ms after"
        )
    print(fast)


if __name__ == "__main__":
    main()
