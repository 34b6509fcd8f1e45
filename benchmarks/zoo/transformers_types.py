"""Small transformers models from configs, one per model type: encoders, decoders, encoder-decoders, vision, audio.

Weights are random. Every entry builds the model in evaluation mode with the arguments of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# isort: off
import zoo.vision_stub  # noqa: F401  transformers imports torchvision where it is installed
import transformers as hf
# isort: on

from zoo.randomize import randomize

Case = tuple[torch.nn.Module, dict[str, Any]]

VOCABULARY, HIDDEN, LAYERS, HEADS, INNER = 97, 32, 2, 4, 64
BATCH, LENGTH, SOURCE = 2, 9, 11
_BASIC = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _mask(length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    mask[0, length - 3 :] = 0
    return mask


def _pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(2))


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _text(model: Callable[..., torch.nn.Module], config: Callable[..., Any], **options: Any) -> Callable[[], Case]:
    """An encoder of padded token ids."""

    def make() -> Case:
        return model(config(**{**_BASIC, **_SPECIAL, **options})), {"input_ids": _ids(), "attention_mask": _mask()}

    return make


def _decoder(
    model: Callable[..., torch.nn.Module], config: Callable[..., Any], use_cache: bool, **options: Any
) -> Callable[[], Case]:
    """A decoder of token ids that returns its key/value cache, or not."""

    def make() -> Case:
        return model(config(**{**_BASIC, **_SPECIAL, **options})), {"input_ids": _ids(), "use_cache": use_cache}

    return make


def _decoder_step(
    model: Callable[..., torch.nn.Module], config: Callable[..., Any], **options: Any
) -> Callable[[], Case]:
    """A decoder that reads one more token after a cached prefix."""

    def make() -> Case:
        decoder = randomize(model(config(**{**_BASIC, **_SPECIAL, **options})).eval())
        with torch.no_grad():
            past = decoder(input_ids=_ids(), use_cache=True).past_key_values
        return decoder, {"input_ids": _ids(1), "past_key_values": past, "use_cache": True}

    return make


def _seq2seq(model: Callable[..., torch.nn.Module], config: Callable[..., Any], **options: Any) -> Callable[[], Case]:
    """Source ids with padding, and target ids."""

    def make() -> Case:
        inputs = {"input_ids": _ids(SOURCE), "attention_mask": _mask(SOURCE), "decoder_input_ids": _ids()}
        return model(config(**{"vocab_size": VOCABULARY, **_SPECIAL, "decoder_start_token_id": 0, **options})), inputs

    return make


def _vision(model: Callable[..., torch.nn.Module], config: Callable[..., Any], **options: Any) -> Callable[[], Case]:
    """A vision model on 32 x 32 images."""

    def make() -> Case:
        return model(config(**options)), {"pixel_values": _pixels(options.get("image_size", 32))}

    return make


_VIT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 32,
    "patch_size": 8,
}
_BART = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}
_T5 = {"d_model": HIDDEN, "d_kv": 8, "num_heads": HEADS, "d_ff": INNER, "num_layers": LAYERS}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_WAVE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": VOCABULARY,
}


def _clip() -> Case:
    text = {**_BASIC, **_SPECIAL, "projection_dim": 16}
    config = hf.CLIPConfig(text_config=text, vision_config={**_VIT, "projection_dim": 16}, projection_dim=16)
    inputs = {"input_ids": _ids(), "attention_mask": _mask(), "pixel_values": _pixels()}
    return hf.CLIPModel(config), inputs


def _siglip() -> Case:
    config = hf.SiglipConfig(text_config={**_BASIC, **_SPECIAL}, vision_config=_VIT)
    return hf.SiglipModel(config), {"input_ids": _ids(), "pixel_values": _pixels()}


def _whisper() -> Case:
    config = hf.WhisperConfig(
        **_BART, **_SPECIAL, vocab_size=VOCABULARY, num_mel_bins=16, max_source_positions=24, decoder_start_token_id=1
    )
    return hf.WhisperModel(config), {"input_features": _floats(BATCH, 16, 48), "decoder_input_ids": _ids()}


def _wave(model: Callable[..., torch.nn.Module], config: Callable[..., Any]) -> Callable[[], Case]:
    def make() -> Case:
        return model(config(**_WAVE)), {"input_values": _floats(BATCH, 800)}

    return make


def _ast() -> Case:
    config = hf.ASTConfig(**{k: v for k, v in _VIT.items() if k != "image_size"}, max_length=64, num_mel_bins=16)
    return hf.ASTModel(config), {"input_values": _floats(BATCH, 64, 16)}


def _segformer() -> Case:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16
    )
    return hf.SegformerForSemanticSegmentation(config), {"pixel_values": _pixels(64)}


TYPES: dict[str, Callable[[], Case]] = {
    # encoders
    "albert": _text(hf.AlbertModel, hf.AlbertConfig, embedding_size=16),
    "bert": _text(hf.BertModel, hf.BertConfig),
    "convbert": _text(hf.ConvBertModel, hf.ConvBertConfig, embedding_size=HIDDEN),
    "deberta-v2": _text(
        hf.DebertaV2Model, hf.DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    ),
    "distilbert": _text(
        hf.DistilBertModel, hf.DistilBertConfig, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INNER
    ),
    "electra": _text(hf.ElectraModel, hf.ElectraConfig, embedding_size=16),
    "modernbert": _text(hf.ModernBertModel, hf.ModernBertConfig, local_attention=8, cls_token_id=1, sep_token_id=2),
    "mpnet": _text(hf.MPNetModel, hf.MPNetConfig),
    "roberta": _text(hf.RobertaModel, hf.RobertaConfig),
    # decoders, with and without a cache
    "bloom": _decoder(hf.BloomForCausalLM, hf.BloomConfig, True, n_layer=LAYERS, n_head=HEADS),
    "falcon": _decoder(hf.FalconForCausalLM, hf.FalconConfig, False),
    "gemma2": _decoder(hf.Gemma2ForCausalLM, hf.Gemma2Config, True, **_GROUPED, sliding_window=4),
    "gpt2": _decoder(hf.GPT2LMHeadModel, hf.GPT2Config, False, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "gpt2 with past": _decoder_step(hf.GPT2LMHeadModel, hf.GPT2Config, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "gpt_neox": _decoder(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, True),
    "llama": _decoder(hf.LlamaForCausalLM, hf.LlamaConfig, False, **_GROUPED),
    "llama with past": _decoder_step(hf.LlamaForCausalLM, hf.LlamaConfig, **_GROUPED),
    "mamba": _decoder(hf.MambaForCausalLM, hf.MambaConfig, False, state_size=8),
    "mistral": _decoder(hf.MistralForCausalLM, hf.MistralConfig, True, **_GROUPED, sliding_window=4),
    "opt": _decoder(
        hf.OPTForCausalLM, hf.OPTConfig, True, word_embed_proj_dim=HIDDEN, ffn_dim=INNER, max_position_embeddings=64
    ),
    "phi": _decoder(hf.PhiForCausalLM, hf.PhiConfig, True),
    "qwen2": _decoder(hf.Qwen2ForCausalLM, hf.Qwen2Config, True, num_key_value_heads=2),
    "qwen3": _decoder(hf.Qwen3ForCausalLM, hf.Qwen3Config, True, **_GROUPED),
    # encoder-decoders
    "bart": _seq2seq(hf.BartModel, hf.BartConfig, **_BART),
    "m2m_100": _seq2seq(hf.M2M100Model, hf.M2M100Config, **_BART),
    "marian": _seq2seq(hf.MarianModel, hf.MarianConfig, **_BART),
    "mt5": _seq2seq(hf.MT5Model, hf.MT5Config, **_T5),
    "t5": _seq2seq(hf.T5ForConditionalGeneration, hf.T5Config, **_T5),
    # vision, and vision with text
    "clip": _clip,
    "convnext": _vision(hf.ConvNextModel, hf.ConvNextConfig, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    "deit": _vision(hf.DeiTModel, hf.DeiTConfig, **_VIT),
    "dinov2": _vision(hf.Dinov2Model, hf.Dinov2Config, **_VIT),
    "segformer": _segformer,
    "siglip": _siglip,
    "swin": _vision(
        hf.SwinModel,
        hf.SwinConfig,
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
    ),
    "vit": _vision(hf.ViTModel, hf.ViTConfig, **_VIT),
    # audio
    "audio-spectrogram-transformer": _ast,
    "hubert": _wave(hf.HubertModel, hf.HubertConfig),
    "wav2vec2": _wave(hf.Wav2Vec2Model, hf.Wav2Vec2Config),
    "whisper": _whisper,
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of this type with random weights in evaluation mode, and the keyword arguments of a call."""
    torch.manual_seed(0)
    model, inputs = TYPES[name]()
    return randomize(model).eval(), inputs
