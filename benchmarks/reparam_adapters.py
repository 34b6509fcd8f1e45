"""Adapters for benchmarks/reparam.py: PEFT's on small transformers, and plain modules; all captured unmerged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# isort: off
import zoo.vision_stub  # noqa: F401  must come before transformers
import peft
# isort: on

import numpy as np
import torch
import transformers as hf
from reparam_graphs import REPARAMETERIZE, relative_error, rerun_changes
from reparam_plain import PLAIN
from torch import nn
from zoo.float64 import evaluate
from zoo.randomize import randomize

import xform
from xform.capture import capture_torch
from xform.pipeline.manager import run_pipeline
from xform.pipeline.presets import resolve

Inputs = dict[str, torch.Tensor]

RANK, ALPHA = 4, 12  # a scale of 3 (6 where it is alpha / sqrt(rank)): an adapter that counts
KINDS = ("lora", "rslora", "dora", "loha", "lokr", "lokr_decomposed", "ia3")
BASES = ("llama", "vit", "bert", "vit_wide")
CONV1D_KINDS = ("lora", "rslora", "dora", "ia3")  # those that peft can put on GPT-2's Conv1D


@dataclass(frozen=True)
class Case:
    """One adapter to measure.

    Attributes:
        adapted: Module with the adapter.
        base: The same without: its optimized graph has the number of nodes to reach. None where the adapter is to be
            left as it is, with a remark.
        inputs: Arguments by keyword.
    """

    adapted: nn.Module
    base: nn.Module | None
    inputs: Inputs


def names() -> list[str]:
    """All adapters: `<kind>/<base>` for PEFT, `<name>` for plain modules."""
    return [*(f"{k}/{base}" for k in KINDS for base in BASES), *(f"{k}/gpt2" for k in CONV1D_KINDS), *PLAIN]


def build(name: str) -> Case:
    """A case with random weights in evaluation mode and float32."""
    torch.manual_seed(0)
    kind, _, base = name.partition("/")
    if not base:
        adapted, plain, x = PLAIN[kind]()
        randomize(adapted).eval()
        return Case(adapted, None if plain is None else randomize(plain).eval(), {"x": x})
    module, inputs, targets, feedforward = _BASES[base]()
    randomize(module).eval()
    adapted = peft.get_peft_model(copy.deepcopy(module), _config(kind, targets, feedforward))
    return Case(_shaken(adapted).eval(), module, inputs)


def measure(name: str) -> dict[str, Any]:
    """Figures of one adapter."""
    torch.set_num_threads(1)
    case = build(name)
    wide = _double(copy.deepcopy(case.adapted))
    wide_inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    with torch.no_grad():
        expected = _leaves(wide(**wide_inputs))

    captured = capture_torch(wide, (), wide_inputs)
    result = run_pipeline(captured.model, resolve("exact"), verify="off")
    feeds = {n: t.numpy() for n, t in captured.flatten((), wide_inputs).items()}
    exact = evaluate(captured.model, feeds)
    figures: dict[str, Any] = {"rel_err_fp64": relative_error(evaluate(result.model, feeds), exact)}
    figures["rel_err_fp64_capture"] = relative_error(exact, expected)

    optimized = _optimized(case.adapted, case.inputs)
    with torch.no_grad():
        figures["rel_err_fp32"] = relative_error(_leaves(optimized(**case.inputs)), expected)
    report = optimized.report
    figures["nodes"] = len(list(optimized.graph.graph))
    figures["rewrite_seconds"] = sum(p.seconds for p in report.passes if p.name in REPARAMETERIZE)
    figures["rolled_back"] = [p.name for p in report.passes if p.status == "rolled_back"]
    figures["rerun_changes"] = rerun_changes(optimized.graph)
    figures["left"] = case.base is None
    if case.base is not None:
        figures["nodes_base"] = len(list(_optimized(case.base, case.inputs).graph.graph))
        with torch.no_grad():
            figures["effect"] = relative_error(_leaves(case.base.double()(**wide_inputs)), expected)
    else:
        figures["nodes_base"] = figures["nodes"]
        figures["remarks"] = [
            r.reason for r in report.remarks if r.verdict == "missed" and r.pass_name in REPARAMETERIZE
        ]
    return figures


def _optimized(module: nn.Module, inputs: Inputs) -> Any:
    return xform.optimize(module, inputs=((), inputs), verify="off")


def _leaves(result: Any) -> list[np.ndarray]:
    from torch.utils import _pytree as pytree

    values = list(result.values()) if isinstance(result, dict) else pytree.tree_leaves(result)
    return [v.numpy() for v in values if isinstance(v, torch.Tensor)]


def _double(module: nn.Module) -> nn.Module:
    """In float64 throughout: transformers' own RMSNorm computes in float32 whatever its operand is."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, hf.models.llama.modeling_llama.LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return module.double()


@torch.no_grad()
def _shaken(module: nn.Module) -> nn.Module:
    """Give every adapter weight a value of its own: fresh ones add nothing (B = 0, factors of 1)."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if not any(key in name for key in ("lora_", "hada_", "lokr_", "ia3_")):
            continue
        noise = torch.rand(parameter.shape, generator=generator)
        if "magnitude" in name or "ia3_" in name:
            parameter.mul_(0.7 + 0.6 * noise)
        else:
            parameter.copy_((noise - 0.5) * min(0.3, 3 * parameter.shape[-1] ** -0.5))
    return module


def _config(kind: str, targets: list[str], feedforward: list[str]) -> peft.PeftConfig:
    common = {"target_modules": targets}
    match kind:
        case "lora" | "rslora" | "dora":
            options = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
            return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options, **common)
        case "loha":
            return peft.LoHaConfig(r=RANK, alpha=ALPHA, **common)
        case "lokr" | "lokr_decomposed":
            return peft.LoKrConfig(r=2, alpha=6, decompose_both=kind != "lokr", **common)
        case "ia3":
            return peft.IA3Config(feedforward_modules=feedforward, **common)
    raise ValueError(kind)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_BaseCase = tuple[nn.Module, Inputs, list[str], list[str]]


def _ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(2))


def _llama() -> _BaseCase:
    model = hf.LlamaModel(hf.LlamaConfig(**_SMALL, vocab_size=64, num_key_value_heads=2, use_cache=False))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return model, {"input_ids": _ids()}, projections, ["down_proj"]


def _vit(**options: Any) -> _BaseCase:
    model = hf.ViTModel(hf.ViTConfig(**{**_SMALL, "image_size": 32, "patch_size": 8, **options}))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model, {"pixel_values": pixels}, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], ["fc1", "fc2"]


def _bert() -> _BaseCase:
    model = hf.BertModel(hf.BertConfig(**_SMALL, vocab_size=64))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    feedforward = ["intermediate.dense", "output.dense"]
    targets = ["query", "key", "value", *feedforward]
    return model, {"input_ids": _ids(), "attention_mask": mask}, targets, feedforward


def _gpt2() -> _BaseCase:
    """Its products are Conv1D: weights stored as [in, out], multiplied by rows between two views."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 16, "vocab_size": 64}
    config = hf.GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2)
    return hf.GPT2Model(config), {"input_ids": _ids()}, ["c_attn", "c_proj", "c_fc"], ["c_fc"]


_BASES: dict[str, Callable[[], _BaseCase]] = {
    "llama": _llama,
    "vit": _vit,
    "bert": _bert,
    "gpt2": _gpt2,
    # as wide as ViT-B: weights that general constant folding does not touch
    "vit_wide": lambda: _vit(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=3072),
}
