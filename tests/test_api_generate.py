"""generate() of Hugging Face models: the same tokens, a bounded number of captures, a model that nobody touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xform
from xform.optimized import OptimizedModule

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::xform.XformWarning")

VOCABULARY = 97


def randomized(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return randomized(transformers.GPT2LMHeadModel(config))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return randomized(transformers.T5ForConditionalGeneration(config))


def prompt(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids, the last sequence padded on the left."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, : length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same_tokens(model: Any, fast: Any, inputs: dict[str, Any], **options: Any) -> None:
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    with torch.no_grad():
        expected = model.generate(**inputs, **options)
    assert torch.equal(fast.generate(**inputs, **options), expected)


def test_a_decoder_generates_the_same_tokens_with_two_captures() -> None:
    model = gpt2()
    before = {name: id(value) for name, value in vars(model).items()}
    fast = xform.optimize(model)
    assert isinstance(fast, OptimizedModule)
    same_tokens(model, fast, prompt(2, 7))
    same_tokens(model, fast, prompt(3, 5), max_new_tokens=12)
    same_tokens(model, fast, prompt(2, 6), num_beams=3)
    assert fast.captures <= 3
    assert {name: id(value) for name, value in vars(model).items()} == before and type(model).__name__ in repr(fast)


def test_an_encoder_and_a_decoder_generate_the_same_tokens_with_a_bounded_number_of_captures() -> None:
    model = t5()
    fast = xform.optimize(model)
    assert isinstance(fast, OptimizedModule)
    same_tokens(model, fast, prompt(2, 7))
    same_tokens(model, fast, prompt(3, 5), max_new_tokens=12)
    assert fast.captures <= 3 and fast.part("encoder", model.get_encoder()).captures <= 2


def test_caches_that_are_given_are_written_as_the_module_writes_them() -> None:
    model = gpt2()
    fast = xform.optimize(model)
    ours, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    ids = prompt(2, 4)["input_ids"]
    for start, stop in ((0, 3), (3, 4)):
        with torch.no_grad():
            model(input_ids=ids[:, start:stop], past_key_values=theirs, use_cache=True)
        result = fast(input_ids=ids[:, start:stop], past_key_values=ours, use_cache=True)
        assert result.past_key_values is ours
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, rtol=1e-4, atol=1e-4)


def test_a_module_without_generate_says_so() -> None:
    fast = xform.optimize(torch.nn.Linear(2, 2))
    assert not hasattr(fast, "generate")
    with pytest.raises(AttributeError, match="generate"):
        fast.generate(1)


@pytest.mark.filterwarnings("error::xform.XformWarning")
def test_the_captures_that_generate_needs_are_no_warnings() -> None:
    same_tokens(model := gpt2(), fast := xform.optimize(model), prompt(2, 7))
    assert fast.captures > 1 and not any("captured again" in warning for warning in fast.report.warnings)


@pytest.mark.filterwarnings("default::xform.XformWarning")
def test_a_warning_inside_of_generate_points_at_the_line_that_called_it() -> None:
    model = gpt2()
    fast = xform.optimize(model)
    fast.generate(**prompt(2, 7), do_sample=False, max_new_tokens=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.warns(xform.XformWarning, match="weights have changed") as caught:
        fast.generate(**prompt(2, 7), do_sample=False, max_new_tokens=2)
    assert {one.filename for one in caught if issubclass(one.category, xform.XformWarning)} == {__file__}


def test_what_keeps_generate_from_being_driven_is_told() -> None:
    class Broken(torch.nn.Linear):
        config = transformers.PretrainedConfig(is_encoder_decoder=True)

        def generate(self) -> None: ...

        def get_encoder(self) -> torch.nn.Module:
            raise AttributeError("no stack of encoders")

    fast = xform.optimize(Broken(4, 4).eval(), inputs=torch.randn(2, 4))
    assert hasattr(fast, "generate")
    with pytest.raises(xform.CaptureError, match=r"generate\(\) of Broken cannot be driven: no stack of encoders"):
        fast.generate()
