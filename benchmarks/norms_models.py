"""The models of benchmarks/norms.py: small transformers and timm architectures with random weights, and traps.

Norm scales, norm shifts, biases, class tokens and position embeddings are drawn anew: initialized to ones and zeros
they would hide a mean that is left in the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from zoo import vision_stub  # noqa: F401

import timm  # isort: skip
import transformers  # isort: skip

VOCABULARY, HIDDEN, LAYERS, HEADS = 97, 32, 2, 4


class Call(torch.nn.Module):
    """Calls a model with named tensors and returns one of its outputs."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], output: int | str = 0) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.output = output

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        result = self.model(**dict(zip(self.names, tensors, strict=True)))
        value: torch.Tensor = result[self.output] if isinstance(self.output, str) else result[0]
        return value


@dataclass(frozen=True)
class Case:
    """One architecture and what the theory says about it.

    Attributes:
        name: For the JSON line.
        make: Gives the module, in float32.
        inputs: Gives example inputs for a seed.
        layer_norms: How many the architecture has.
        expected_left: How many of them cannot become RMSNormalization, for the reasons in `why`.
        why: Which ones, and why.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    layer_norms: int
    expected_left: int = 0
    why: str = ""


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Draw every vector, class token and position embedding anew, in place; weights get a mean as well."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                gain = name.endswith(("weight", "gamma", "lambda1", "layer_scale_parameter"))
                parameter.copy_((1.0 if gain else 0.2) + 0.3 * noise)
            elif any(part in name for part in ("token", "pos", "embed")):
                parameter.copy_(0.1 + 0.3 * noise)
            else:
                parameter.add_(0.02)
    return module.eval()


def images(size: int, channels: int = 3) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """A batch of two images."""
    return lambda seed: (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed)),)


def tokens(length: int = 9) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """A batch of two sequences of token ids."""
    return lambda seed: (_ids(seed, length),)


def _ids(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length), generator=torch.Generator().manual_seed(seed))


def _clip_inputs(seed: int) -> tuple[torch.Tensor, ...]:
    ids = _ids(seed, 9)
    ids[:, -1] = VOCABULARY - 1  # the end token, where the text tower reads
    return ids, images(32)(seed)[0]


def _whisper_inputs(seed: int) -> tuple[torch.Tensor, ...]:
    sound = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(seed))
    return sound, _ids(seed, 7)


def _hf(kind: Any, config: Any, names: tuple[str, ...], output: int | str = 0) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        settings = config()
        settings.return_dict = True
        return randomize(Call(kind(settings), names, output))

    return make


def _timm(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return randomize(timm.create_model(name, num_classes=10, **options))

    return make


def _vit(kind: str) -> Any:
    return getattr(transformers, kind)(
        image_size=32, patch_size=8, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=32, use_cache=False
    )


def _opt(dtype: str = "") -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=64,
        max_position_embeddings=32, word_embed_proj_dim=HIDDEN, do_layer_norm_before=True, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _clip() -> Any:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
    }  # fmt: skip
    vision = {
        "image_size": 32, "patch_size": 8, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "intermediate_size": 64,
    }  # fmt: skip
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def _whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, num_mel_bins=16,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=20, max_target_positions=32, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


def _swin() -> Any:
    return transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=10
    )


def _convnext() -> Any:
    return transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[16, 24], depths=[2, 2], layer_scale_init_value=0.1, num_labels=10
    )


def _bert() -> Any:
    return transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=64, max_position_embeddings=32, num_labels=10,
    )  # fmt: skip


SWIN_LEFT = (
    "patch merging joins the channels of four tokens, so stage 1 (2 per block, and the merging's own) keeps its means"
)
CONVNEXT_LEFT = "depthwise convolutions read the stream and write what the norms of the blocks read"
_TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": HIDDEN, "depth": LAYERS, "num_heads": HEADS}
_TIMM_SWIN = {
    "img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)
}  # fmt: skip


def cases() -> list[Case]:
    """All models of the benchmark; counts are of the architecture, not of what the pass happens to do."""
    t, pixels = transformers, ("pixel_values",)
    blocks = 2 * LAYERS + 1
    return [
        Case("vit", _hf(t.ViTForImageClassification, lambda: _vit("ViTConfig"), pixels), images(32), blocks),
        Case(
            "deit", _hf(t.DeiTForImageClassificationWithTeacher, lambda: _vit("DeiTConfig"), pixels), images(32), blocks
        ),
        Case("gpt2", _hf(t.GPT2LMHeadModel, _gpt2, ("input_ids",)), tokens(), blocks),
        Case("opt", _hf(t.OPTForCausalLM, _opt, ("input_ids",)), tokens(), blocks),
        Case(
            "clip", _hf(t.CLIPModel, _clip, ("input_ids", "pixel_values"), "logits_per_image"), _clip_inputs,
            2 * blocks + 1,
        ),
        Case(
            "whisper", _hf(t.WhisperForConditionalGeneration, _whisper, ("input_features", "decoder_input_ids")),
            _whisper_inputs, blocks + 3 * LAYERS + 1,
        ),
        Case("swin", _hf(t.SwinForImageClassification, _swin, pixels), images(64), 11, 5, SWIN_LEFT),
        Case("convnext", _hf(t.ConvNextForImageClassification, _convnext, pixels), images(32), 7, 6, CONVNEXT_LEFT),
        Case("timm_vit_layer_scale", _timm("vit_tiny_patch16_224", **_TIMM_VIT, init_values=0.1), images(32), blocks),
        Case(
            "timm_vit_mean_pooled", _timm("vit_tiny_patch16_224", **_TIMM_VIT, global_pool="avg"), images(32), blocks
        ),
        Case("timm_deit", _timm("deit_tiny_distilled_patch16_224", **_TIMM_VIT), images(32), blocks),
        Case("timm_swin", _timm("swin_tiny_patch4_window7_224", **_TIMM_SWIN), images(64), 11, 5, SWIN_LEFT),
        Case(
            "timm_convnext", _timm("convnext_atto", depths=(2, 1, 1, 1), dims=(16, 16, 24, 24)), images(64), 10, 9,
            CONVNEXT_LEFT,
        ),
    ]  # fmt: skip


# Traps: models whose streams must be refused, or handled with care


class Block(torch.nn.Module):
    """A pre-norm block with a feed-forward part, and optionally a gate per channel between it and the sum."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.up = torch.nn.Linear(HIDDEN, 64)
        self.down = torch.nn.Linear(64, HIDDEN)
        self.gate = torch.nn.Linear(HIDDEN, HIDDEN) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        written: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(normed)))
        if self.gate is not None:
            written = written * torch.sigmoid(self.gate(normed))
        return x + written


class Trap(torch.nn.Module):
    """Embedding, two blocks, and a head: "pooled" reads the raw stream, "tied" multiplies by the embedding's table."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = torch.nn.ModuleList(Block(kind == "gated") for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        if self.kind == "pooled":
            return torch.cat([self.head(x.mean(dim=1)), self.head(self.norm(x)[:, 0])], dim=-1)
        if self.kind == "tied":  # the table as it stands, on the left: a transposed copy of it would be tied no more
            return torch.matmul(self.embedding.weight, self.norm(x).transpose(1, 2))
        result: torch.Tensor = self.head(self.norm(x))
        return result


def _trap(kind: str) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return randomize(Trap(kind))

    return make


def traps() -> list[Case]:
    """BERT and three constructed traps. `why` is text that the reason must contain."""
    return [
        Case(
            "bert", _hf(transformers.BertForSequenceClassification, _bert, ("input_ids",)), tokens(), blocks_of_bert(),
            2 * LAYERS, "post-norm",
        ),
        Case("pooled_stream", _trap("pooled"), tokens(), LAYERS + 1, LAYERS + 1, "sees its mean"),
        Case("gated_writer", _trap("gated"), tokens(), LAYERS + 1, LAYERS + 1, "Mul"),
        Case("tied_embedding", _trap("tied"), tokens(), LAYERS + 1, 0, "keeps the original"),
    ]  # fmt: skip


def blocks_of_bert() -> int:
    """Two per layer, and that of the embeddings: the only one whose operand is a sum of constants' rows."""
    return 2 * LAYERS + 1
