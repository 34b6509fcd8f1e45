"""xform.optimize(module) with no inputs on transformers models: the first calls capture, the next ones only run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import xform
from xform.optimized import OptimizedModule

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VOCABULARY = 97


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Non-trivial biases, norms and embeddings: identity-initialized models hide wrong rewrites."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids, the last sequence padded at its end."""
    torch.manual_seed(batch * length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 + 1 :] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (batch, length)), "attention_mask": mask}


def images(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch * length)
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def bert() -> torch.nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=VOCABULARY))


def vit() -> torch.nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY)
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config)


def llama() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=VOCABULARY)
    )


Inputs = Callable[[int, int], dict[str, torch.Tensor]]
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Inputs, dict[str, int]]] = {
    "bert": (bert, tokens, {"attention": 2, "layer_norm": 5, "gelu": 2}),
    "vit": (vit, images, {"attention": 2, "layer_norm": 5, "gelu": 2}),
    "gpt2": (gpt2, tokens, {"attention": 2, "layer_norm": 5, "gelu": 2}),
    "llama": (llama, tokens, {"attention": 2, "rms_norm": 5, "silu": 2, "rotary": 4}),
}


def tensors(result: Any) -> list[torch.Tensor]:
    """Every tensor of an output, caches included, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "layers"):
        return [tensor for layer in result.layers for tensor in (layer.keys, layer.values)]
    if hasattr(result, "values"):
        return [tensor for value in result.values() for tensor in tensors(value)]
    return [tensor for value in result for tensor in tensors(value)] if isinstance(result, tuple | list) else []


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_same_calls_same_outputs_captured_once(name: str) -> None:
    make, inputs, concepts = MODELS[name]
    module = randomized(make())
    optimized = xform.optimize(module, target="cpu")
    assert isinstance(optimized, OptimizedModule)
    for batch, length in ((2, 7), (3, 12)):
        given = inputs(batch, length)
        actual = optimized(**given)
        with torch.no_grad():
            expected = module(**given)
        assert type(actual) is type(expected)
        assert list(actual.keys()) == list(expected.keys())
        pairs = list(zip(tensors(actual), tensors(expected), strict=True))
        assert pairs
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert relative_error(ours, theirs) < 1e-5
    assert optimized.captures == 1
    assert {concept: optimized.report.concepts.get(concept) for concept in concepts} == concepts
    assert optimized.report.verification.passed is True
