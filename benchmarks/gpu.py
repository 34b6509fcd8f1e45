"""The torch backend on an NVIDIA GPU, against eager torch and torch.compile.

    python benchmarks/gpu.py --json [--only REGEX]

Without a GPU it says so and ends with `"gpu": null`, exit code 0.

Models in bf16 with random weights, batch 1 and 32: ViT-B, DeiT-S, BERT-base, a Llama of 1B parameters; and, where
rewriting counts most, RepViT and MobileOne in training form and a Llama with unmerged LoRA adapters. Peers are the
module itself, torch.compile, and torch.compile with max-autotune; xform runs with `compile=` off, inductor and max-
autotune and the fastest counts, as it does for the peers. Each contender runs in a process of its own, in turn, and
is timed between CUDA events after warm-up (median of 50 calls). Outputs of all contenders are compared with the
module's in float32.

Kernels: bytes that have to be moved over the time taken, as a share of what a copy of as many bytes reaches.

Figures of the last line: `gpu`, `versions`, `geomean_vs_best_peer` (fastest peer / xform, over ViT to Llama), `table`
{model: {contender: seconds, "ratio": best peer / xform}}, `kernels` {name: share of copy bandwidth}.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

PEERS = ("eager", "compile", "compile-max-autotune")
OURS = ("xform-off", "xform-inductor", "xform-max-autotune")
CALLS = 50
TIME_LIMIT = 1200
LONG = 512  # tokens of Llama
TEXT = 128  # tokens of BERT

Case = tuple[torch.nn.Module, dict[str, torch.Tensor]]


def timm_model(name: str, batch: int) -> Case:
    """An image classifier with random statistics, and images."""
    import timm
    from zoo.randomize import randomize

    model = timm.create_model(name, pretrained=False)
    return randomize(model), {"x": torch.randn(batch, *model.pretrained_cfg["input_size"])}


def bert(batch: int) -> Case:
    """BERT-base."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(), add_pooling_layer=False), {"input_ids": torch.randint(0, 30000, (batch, TEXT))}


def llama(batch: int) -> Case:
    """A Llama of the shape of Llama 3.2 1B."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=32000, use_cache=False, head_dim=64,
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": torch.randint(0, 32000, (batch, LONG))}


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


def lora_llama(batch: int) -> Case:
    """The Llama with an adapter at every projection."""
    model, inputs = llama(batch)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRA(module))
    return model, inputs


MAIN: dict[str, Callable[[int], Case]] = {
    "vit_b": lambda batch: timm_model("vit_base_patch16_224", batch),
    "deit_s": lambda batch: timm_model("deit_small_patch16_224", batch),
    "bert_base": bert,
    "llama_1b": llama,
}
REWRITTEN: dict[str, Callable[[int], Case]] = {
    "repvit_training_form": lambda batch: timm_model("repvit_m1_1", batch),
    "mobileone_training_form": lambda batch: timm_model("mobileone_s1", batch),
    "llama_1b_lora_unmerged": lora_llama,
}
MODELS = {f"{name}/{batch}": (make, batch) for name, make in {**MAIN, **REWRITTEN}.items() for batch in (1, 32)}


def first_tensor(output: Any) -> torch.Tensor:
    """The main result of a call."""
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def contender(kind: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A call of the contender on the GPU."""
    import xform

    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    if kind.startswith("xform"):
        fast = xform.optimize(
            model, target="cuda", inputs=inputs, precision="bfloat16", verify="off", compile=kind.removeprefix("xform-")
        )
        return lambda: fast(**on_gpu)
    half = model.cuda().to(torch.bfloat16)
    cast = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in on_gpu.items()}
    mode = {"eager": None, "compile": "default", "compile-max-autotune": "max-autotune"}[kind]
    call = half if mode is None else torch.compile(half, mode=mode)
    return lambda: call(**cast)


def seconds_of(call: Callable[[], Any]) -> float:
    """The median of many calls between CUDA events."""
    for _ in range(10):
        call()
    found = []
    for _ in range(CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[len(found) // 2]


def work(name: str, kind: str) -> dict[str, Any]:
    """Seconds and error of one contender on one model."""
    from zoo import vision_stub  # noqa: F401 - before timm and transformers

    torch.manual_seed(0)
    make, batch = MODELS[name]
    model, inputs = make(batch)
    model.eval()
    with torch.no_grad():
        want = first_tensor(model.cuda()(**{n: t.cuda() for n, t in inputs.items()})).double().cpu()
        call = contender(kind, model.cpu(), inputs)
        got = first_tensor(call()).double().cpu()
        error = float((got - want).abs().max() / want.abs().max())
        return {"seconds": seconds_of(call), "error": error}


def in_process(*arguments: str) -> dict[str, Any]:
    """A worker of this file in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {TIME_LIMIT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def bandwidth() -> dict[str, float]:
    """Share of the bandwidth of a copy that each kernel reaches, in bf16 on 16384 rows of 4096."""
    from xform.backends.torch_triton.kernels import kernels

    found = kernels()
    shape = (16384, 4096)
    a, b = (torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(2))
    weight = torch.ones(shape[1], device="cuda", dtype=torch.bfloat16)
    size = a.numel() * a.itemsize
    copied = torch.empty_like(a)
    copy = 2 * size / seconds_of(lambda: copied.copy_(a))
    heads = a.reshape(4, 4096, 32, 128).transpose(1, 2)
    tables = torch.randn(1, 4096, 64, device="cuda").to(torch.bfloat16)
    runs: dict[str, tuple[float, Callable[[], Any]]] = {
        "residual_layer_norm": (4, lambda: found["residual_norm"].op(a, b, weight, weight, 1e-5, False)),
        "residual_rms_norm": (4, lambda: found["residual_norm"].op(a, b, weight, None, 1e-5, True)),
        "gated_unit": (3, lambda: found["gated_unit"].op(a, b, "silu")),
        "bias_activation": (2, lambda: found["bias_activation"].op(a, weight, "gelu")),
        "rotary_qk": (4, lambda: found["rotary_qk"].op(heads, heads, tables, tables, False)),
    }
    return {name: round(passes * size / seconds_of(call) / copy, 3) for name, (passes, call) in runs.items()}


def versions() -> dict[str, str]:
    """Of what was measured with."""
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda), "driver": driver}


def best(row: dict[str, Any], kinds: tuple[str, ...]) -> float:
    """The shortest time of these contenders; infinite if all failed."""
    return min((row[kind]["seconds"] for kind in kinds if "seconds" in row[kind]), default=math.inf)


def measure(only: str) -> dict[str, Any]:
    """All figures."""
    table: dict[str, Any] = {}
    for name in MODELS:
        if not re.search(only, name):
            continue
        row = {kind: in_process(name, kind) for kind in (*PEERS, *OURS)}
        row["ratio"] = best(row, PEERS) / best(row, OURS) if best(row, OURS) < math.inf else 0.0
        table[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    ratios = [row["ratio"] for name, row in table.items() if name.split("/")[0] in MAIN]
    positive = ratios and min(ratios) > 0
    return {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "geomean_vs_best_peer": math.exp(sum(map(math.log, ratios)) / len(ratios)) if positive else None,
        "table": table,
        "kernels": in_process("kernels", "bandwidth"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--only", default="", help="only models that match this regular expression")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, kind = arguments.worker
        print(json.dumps(bandwidth() if name == "kernels" else work(name, kind)))
        return 0
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, or torch cannot use it: nothing was measured", file=sys.stderr)
        figures: dict[str, Any] = {"gpu": None, "versions": {"torch": torch.__version__}}
        figures |= {"geomean_vs_best_peer": None, "table": {}, "kernels": {}}
    else:
        figures = measure(arguments.only)
    print(json.dumps(figures) if arguments.json else figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
