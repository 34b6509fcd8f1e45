"""The model families of benchmarks/raising.py: small transformers models with random weights, and how to export them.

Every model is a wrapper that takes tensors and returns one tensor, so that both exporters of torch accept it. Norm
scales, norm shifts and biases are randomized: initialized to one and zero they would hide folding mistakes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from zoo import vision_stub  # noqa: F401  transformers looks for torchvision when a model is made

Sizes = Mapping[str, int]
Arrays = dict[str, npt.NDArray[Any]]

VOCABULARY = 97
HIDDEN = 32
LAYERS = 2


@dataclass(frozen=True)
class Family:
    """One architecture with what raising must find in it.

    Attributes:
        name: The family's name.
        make: Builds the wrapped module for an attention implementation ("eager" or "sdpa").
        inputs: Input name -> symbolic shape; a str dim is dynamic and looked up in the sizes.
        sizes: Two assignments of the dynamic dims; the first is the one that is exported.
        expected: Concept -> number of semantic operators that canonicalization must leave in the graph.
    """

    name: str
    make: Callable[[str], torch.nn.Module]
    inputs: Mapping[str, tuple[int | str, ...]]
    sizes: Sequence[Sizes]
    expected: Mapping[str, int]
    dynamic: frozenset[str] = field(default=frozenset({"batch", "seq"}))

    def arrays(self, sizes: Sizes, seed: int = 0) -> Arrays:
        """Random inputs: token ids, an attention mask, or floats, as the name says.

        The first row of the mask is padded on the right for even seeds and on the left for odd ones: in a causal
        decoder, padding on the left leaves queries without any key.
        """
        rng = np.random.default_rng(seed)
        arrays: Arrays = {}
        for name, dims in self.inputs.items():
            shape = tuple(d if isinstance(d, int) else sizes[d] for d in dims)
            if name.endswith("ids"):
                arrays[name] = rng.integers(1, VOCABULARY, shape, dtype=np.int64)
            elif name.endswith("mask"):
                mask = np.ones(shape, np.int64)
                mask[0, slice(0, 2) if seed % 2 else slice(-2, None)] = 0
                arrays[name] = mask
            else:
                arrays[name] = rng.standard_normal(shape, dtype=np.float32)
        return arrays


class Call(torch.nn.Module):
    """Calls a transformers model with named tensors and returns its first output."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str], **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.fixed = fixed

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(
            **dict(zip(self.names, tensors, strict=True)), **self.fixed, return_dict=False
        )[0]
        return output


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Draw every vector parameter (biases, norm scales and shifts) anew, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def _call(
    make: Callable[[Any], torch.nn.Module],
    config: Callable[[], Any],
    names: Sequence[str],
    part: str = "",
    **fixed: Any,
) -> Callable[[str], torch.nn.Module]:
    def build(attention: str) -> torch.nn.Module:
        torch.manual_seed(0)
        settings = config()
        settings._attn_implementation = attention
        model = make(settings)
        if part:
            model = model.get_submodule(part)
        return Call(randomize(model), names, **fixed)

    return build


def _t5_config() -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, use_cache=False
    )


def _whisper_config() -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, num_mel_bins=16,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=20, max_target_positions=32, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


TEXT = {"input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq")}
TEXT_SIZES = ({"batch": 2, "seq": 7}, {"batch": 3, "seq": 12})
BATCH_SIZES = ({"batch": 2}, {"batch": 3})
CROSS_SIZES = ({"batch": 2, "seq": 7, "source": 9}, {"batch": 3, "seq": 12, "source": 5})
BATCH = frozenset({"batch"})
CROSS = frozenset({"batch", "seq", "source"})


def families() -> list[Family]:
    """All families of the benchmark."""
    t = transformers
    ids_mask = ["input_ids", "attention_mask"]
    return [
        Family(
            "bert",
            _call(
                t.BertModel,
                lambda: t.BertConfig(
                    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
                    intermediate_size=64, max_position_embeddings=32,
                ),
                ids_mask,
            ),
            TEXT, TEXT_SIZES, {"attention": LAYERS, "layer_norm": 2 * LAYERS + 1, "gelu": LAYERS},
        ),
        Family(
            "distilbert",
            _call(
                t.DistilBertModel,
                lambda: t.DistilBertConfig(
                    vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=4, hidden_dim=64,
                    max_position_embeddings=32,
                ),
                ids_mask,
            ),
            TEXT, TEXT_SIZES, {"attention": LAYERS, "layer_norm": 2 * LAYERS + 1, "gelu": LAYERS},
        ),
        Family(
            "vit",
            _call(
                t.ViTModel,
                lambda: t.ViTConfig(
                    image_size=32, patch_size=8, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
                    intermediate_size=64,
                ),
                ["pixel_values"],
            ),
            {"pixel_values": ("batch", 3, 32, 32)}, BATCH_SIZES,
            {"attention": LAYERS, "layer_norm": 2 * LAYERS + 1, "gelu": LAYERS}, BATCH,
        ),
        Family(
            "swin",
            _call(
                t.SwinModel,
                lambda: t.SwinConfig(
                    image_size=64, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
                ),
                ["pixel_values"],
            ),
            {"pixel_values": ("batch", 3, 64, 64)}, BATCH_SIZES,
            {"attention": 4, "layer_norm": 11, "gelu": 4}, BATCH,
        ),
        Family(
            "gpt2",
            _call(
                t.GPT2Model,
                lambda: t.GPT2Config(
                    vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=32, use_cache=False,
                ),
                ids_mask, use_cache=False,
            ),
            TEXT, TEXT_SIZES, {"attention": LAYERS, "layer_norm": 2 * LAYERS + 1, "gelu_tanh": LAYERS},
        ),
        Family(
            "llama",
            _call(
                t.LlamaModel,
                lambda: t.LlamaConfig(
                    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32, use_cache=False,
                ),
                ids_mask, use_cache=False,
            ),
            TEXT, TEXT_SIZES,
            {"attention": LAYERS, "rms_norm": 2 * LAYERS + 1, "silu": LAYERS, "rotary": 2 * LAYERS},
        ),
        Family(
            "t5_encoder",
            _call(t.T5EncoderModel, _t5_config, ids_mask),
            TEXT, TEXT_SIZES, {"attention": LAYERS, "rms_norm": 2 * LAYERS + 1, "relu": LAYERS},
        ),
        Family(
            "t5_decoder",
            _call(
                t.T5Model, _t5_config, ["input_ids", "encoder_hidden_states", "encoder_attention_mask"], "decoder",
                use_cache=False,
            ),
            {
                "input_ids": ("batch", "seq"),
                "encoder_hidden_states": ("batch", "source", HIDDEN),
                "encoder_attention_mask": ("batch", "source"),
            },
            CROSS_SIZES, {"attention": 2 * LAYERS, "rms_norm": 3 * LAYERS + 1, "relu": LAYERS}, CROSS,
        ),
        Family(
            "clip_text",
            _call(
                t.CLIPTextModel,
                lambda: t.CLIPTextConfig(
                    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
                    intermediate_size=64, max_position_embeddings=32, hidden_act="gelu",
                    pad_token_id=0, bos_token_id=1, eos_token_id=2,
                ),
                ids_mask,
            ),
            TEXT, TEXT_SIZES, {"attention": LAYERS, "layer_norm": 2 * LAYERS + 1, "gelu": LAYERS},
        ),
        Family(
            "whisper_encoder",
            _call(t.WhisperModel, _whisper_config, ["input_features"], "encoder"),
            {"input_features": ("batch", 16, 40)}, BATCH_SIZES,
            {"attention": LAYERS, "layer_norm": 2 * LAYERS + 1, "gelu": LAYERS + 2}, BATCH,
        ),
        Family(
            "whisper_decoder",
            _call(
                t.WhisperModel, _whisper_config, ["input_ids", "attention_mask", "encoder_hidden_states"], "decoder",
                use_cache=False,
            ),
            {**TEXT, "encoder_hidden_states": ("batch", 20, HIDDEN)},
            TEXT_SIZES, {"attention": 2 * LAYERS, "layer_norm": 3 * LAYERS + 1, "gelu": LAYERS},
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """How one export went: the dims that stayed dynamic, and the reasons why stronger attempts failed."""

    dynamic: bool
    decomposed: bool
    failures: tuple[str, ...]


def export(family: Family, exporter: str, opset: int, attention: str, path: Path) -> Exported:
    """Write one ONNX file, trying dynamic axes, then static ones, then decompositions before the export.

    Raises:
        RuntimeError: No attempt worked; the message carries each attempt's error.
    """
    module = family.make(attention)
    sample = tuple(torch.from_numpy(a) for a in family.arrays(family.sizes[0]).values())
    attempts = [(True, False), (True, True), (False, False), (False, True)] if exporter == "dynamo" else [
        (True, False), (False, False)
    ]  # fmt: skip
    failures: list[str] = []
    for dynamic, decomposed in attempts:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                if exporter == "dynamo":
                    _dynamo(family, module, sample, opset, path, dynamic, decomposed)
                else:
                    _torchscript(family, module, sample, opset, path, dynamic)
            return Exported(dynamic, decomposed, tuple(failures))
        except Exception as error:
            failures.append(f"dynamic={dynamic} decomposed={decomposed}: {type(error).__name__}: {str(error)[:300]}")
    raise RuntimeError("; ".join(failures))


def _torchscript(
    family: Family, module: torch.nn.Module, sample: tuple[torch.Tensor, ...], opset: int, path: Path, dynamic: bool
) -> None:
    axes = {
        name: {i: d for i, d in enumerate(dims) if isinstance(d, str) and d in family.dynamic}
        for name, dims in family.inputs.items()
    }
    torch.onnx.export(
        module, sample, str(path), dynamo=False, opset_version=opset, input_names=list(family.inputs),
        output_names=["output"], dynamic_axes=axes if dynamic else None,
    )  # fmt: skip


def _dynamo(
    family: Family,
    module: torch.nn.Module,
    sample: tuple[torch.Tensor, ...],
    opset: int,
    path: Path,
    dynamic: bool,
    decomposed: bool,
) -> None:
    symbols = {d: torch.export.Dim(d, min=2, max=32) for d in sorted(family.dynamic)}
    shapes = tuple(
        {i: symbols[d] for i, d in enumerate(dims) if isinstance(d, str) and d in symbols}
        for dims in family.inputs.values()
    )
    # The wrapper takes its tensors through *tensors, so the shapes are given as one tuple for it.
    program: Any = torch.export.export(module, sample, dynamic_shapes=(shapes,) if dynamic else None, strict=False)
    if decomposed:
        program = program.run_decompositions()
    torch.onnx.export(
        program, dynamo=True, opset_version=opset, input_names=list(family.inputs), output_names=["output"],
        verbose=False, optimize=True,
    ).save(str(path))  # fmt: skip
