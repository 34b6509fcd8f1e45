"""Models of transformers: captured once with dynamic dims, called like the original, results in its own classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch_support import assert_same, call

from xform.capture import capture_torch

hf = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SIZES}


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 50, (batch, length))


def padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bert() -> torch.nn.Module:
    return hf.BertModel(hf.BertConfig(**TEXT))


def gpt2() -> torch.nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**TEXT, n_embd=16, n_layer=1, n_head=2))


def llama() -> torch.nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=1))


def vit() -> torch.nn.Module:
    return hf.ViTModel(hf.ViTConfig(**SIZES, image_size=16, patch_size=4))


CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "bert": (bert, [padded(1, 7), padded(2, 5), padded(3, 11)]),
    "gpt2": (gpt2, [padded(1, 7), padded(2, 5), padded(3, 11)]),
    "llama": (llama, [{"input_ids": ids(1, 7)}, padded(2, 5) | {"attention_mask": None}, {"input_ids": ids(3, 1)}]),
    "vit": (vit, [{"pixel_values": torch.randn(batch, 3, 16, 16)} for batch in (1, 2, 5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_capture_takes_every_batch_and_length(name: str) -> None:
    torch.manual_seed(0)
    make, calls = CASES[name]
    model = randomized(make())
    captured = capture_torch(model, (), calls[0], dynamic="auto")
    first = captured.dynamic_dims[captured.input_names[0]]
    assert first == ({0: "batch"} if name == "vit" else {0: "batch", 1: "sequence"})
    assert set(captured.dim_ranges) <= {"batch", "sequence"}
    for kwargs in calls:
        assert captured.accepts((), kwargs), captured.refuses((), kwargs)
        with torch.no_grad():
            assert_same(call(captured, (), kwargs), model(**kwargs))


def test_a_decoder_goes_on_from_its_cache() -> None:
    torch.manual_seed(0)
    model = randomized(gpt2())
    with torch.no_grad():
        past = {length: model(input_ids=ids(2, length)).past_key_values for length in (4, 9)}
    step = {"input_ids": ids(2, 1), "past_key_values": copy.deepcopy(past[4])}
    captured = capture_torch(model, (), step, dynamic="auto")
    assert captured.input_names[1:] == ("past_key_values.layers_0.keys", "past_key_values.layers_0.values")
    for cache in past.values():
        kwargs = {"input_ids": ids(2, 1), "past_key_values": copy.deepcopy(cache)}
        given = copy.deepcopy(kwargs)
        actual = call(captured, (), given)
        with torch.no_grad():
            assert_same(actual, model(**kwargs))
        assert actual.past_key_values is given["past_key_values"], "the cache that was given is the one that grows"
