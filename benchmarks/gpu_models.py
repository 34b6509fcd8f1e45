"""The models of benchmarks/gpu.py with random weights; `small`: of few layers, for a rehearsal without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LONG = 512  # tokens of Llama
TEXT = 128  # tokens of BERT

Case = tuple[torch.nn.Module, dict[str, torch.Tensor]]
Make = Callable[[int, bool], Case]


def timm_model(name: str, batch: int, **options: Any) -> Case:
    """An image classifier, and images."""
    import timm

    model = timm.create_model(name, pretrained=False, **options)
    return model, {"x": torch.randn(batch, *model.pretrained_cfg["input_size"])}


def transformer(name: str) -> Make:
    """A vision transformer."""
    return lambda batch, small: timm_model(name, batch, **({"depth": 2} if small else {}))


def mobile(name: str) -> Make:
    """A network of convolutions in training form; there is no smaller one of it."""
    return lambda batch, small: timm_model(name, batch)


def bert(batch: int, small: bool) -> Case:
    """BERT-base."""
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=2 if small else 12)
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.randint(0, 30000, (batch, TEXT))}


def llama(batch: int, small: bool) -> Case:
    """A Llama of the shape of Llama 3.2 1B."""
    from transformers import LlamaConfig, LlamaModel

    sizes = (256, 2, 4, 2, 512, 1000, 32) if small else (2048, 16, 32, 8, 8192, 32000, LONG)
    hidden, layers, heads, key_heads, inner, words, length = sizes
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        intermediate_size=inner, vocab_size=words, use_cache=False, head_dim=64,
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": torch.randint(0, words, (batch, length))}


class LoRA(torch.nn.Module):
    """A linear layer with an unmerged adapter of rank 16."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Linear(linear.in_features, 16, bias=False)
        self.up = torch.nn.Linear(16, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer plus its adapter."""
        return self.linear(x) + 2.0 * self.up(self.down(x))


def lora_llama(batch: int, small: bool) -> Case:
    """The Llama with an adapter at every projection."""
    model, inputs = llama(batch, small)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module))
    return model, inputs


MAIN: dict[str, Make] = {
    "vit_b": transformer("vit_base_patch16_224"),
    "deit_s": transformer("deit_small_patch16_224"),
    "bert_base": bert,
    "llama_1b": llama,
}
REWRITTEN: dict[str, Make] = {
    "repvit_training_form": mobile("repvit_m1_1"),
    "mobileone_training_form": mobile("mobileone_s1"),
    "llama_1b_lora_unmerged": lora_llama,
}
ROWS = [f"{name}/{batch}" for name in (*MAIN, *REWRITTEN) for batch in (1, 32)]


def build(row: str, small: bool) -> Case:
    """The module of a row in evaluation mode, the same weights every time, and its inputs by name.

    No bias, scale or statistic has its initial value: passes would drop what adds 0 or multiplies by 1.
    """
    from zoo.randomize import randomize

    name, batch = row.split("/")
    torch.manual_seed(0)
    model, inputs = {**MAIN, **REWRITTEN}[name](int(batch), small)
    return randomize(model).eval(), inputs
