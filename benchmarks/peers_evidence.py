"""The evidence of benchmarks/peers.py beside its table: accuracy of int8, and padding-free execution.

    python benchmarks/peers_evidence.py [--work build/peers]        (peers.py runs it too)

int8: cosine of MiniLM-L6's sentence embeddings to fp32 on 500 real sentences and whether nearest neighbours agree, on
ONNX Runtime and on OpenVINO, whose forms differ (the worse one counts), and a small vision transformer trained here on
scikit-learn's digits. Padding: MiniLM-L6, 16 sentences of mixed lengths, packed against padded, both by xform, in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_models import MODELS, as_tensors, built, example, export, minilm, sentences, tokenize

SENTENCES = 500
BATCH = 20  # sentences
EPOCHS = 40


def log(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def embeddings(run: Any, texts: list[str]) -> Any:
    """[sentences, 384], normalized: the mean over tokens."""
    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenize(texts[start : start + BATCH], padding=True)
        hidden = run(as_tensors(batch)).detach().numpy()
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


def sentence_accuracy(backends: Sequence[str] = ("onnxruntime", "openvino")) -> dict[str, Any]:
    """Cosine and neighbours of int8 embeddings, the worse of two backends; calibrated on other sentences."""
    import xform

    module = minilm().eval()
    texts = sentences(SENTENCES + 3 * BATCH)
    calibration = [
        as_tensors(tokenize(texts[SENTENCES + i * BATCH : SENTENCES + (i + 1) * BATCH], padding=True)) for i in range(3)
    ]
    texts = texts[:SENTENCES]
    pair = as_tensors(tokenize(texts[:2], padding=True))
    with torch.no_grad():
        exact = embeddings(lambda batch: module(**batch), texts)
    found: dict[str, dict[str, float]] = {}
    for backend in backends:
        fast = xform.optimize(
            module, preset="int8", inputs=pair, dynamic="auto", calibration=calibration, backend=backend
        )
        quantized = embeddings(lambda batch, fast=fast: fast(**batch), texts)
        cosine = (exact * quantized).sum(1)
        alike = [e @ e.T - 2 * np.eye(len(e)) for e in (exact, quantized)]
        same = float((alike[0].argmax(1) == alike[1].argmax(1)).mean())
        log("  " + next(line for line in fast.explain("int8").splitlines() if "sensitivity" in line).strip())
        found[backend] = {
            "minilm_cosine": round(float(cosine.mean()), 5),
            "minilm_cosine_min": round(float(cosine.min()), 5),
            "minilm_neighbours": round(same, 4),
        }
    worst = {key: min(one[key] for one in found.values()) for key in found[backends[0]]}
    return {**worst, "minilm_by_backend": found, "minilm_sentences": len(texts)}


class DigitsViT(torch.nn.Module):
    """A vision transformer for 8 x 8 images: 16 patches of 2 x 2, 4 layers of 96."""

    def __init__(self, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(1, width, 2, 2)
        self.positions = torch.nn.Parameter(torch.randn(1, 16, width) * 0.02)
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10] of images [batch, 1, 8, 8]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        result: torch.Tensor = self.head(self.layers(tokens).mean(1))
        return result


def digits_accuracy() -> dict[str, float]:
    """Points of accuracy that int8 loses on held-out digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    import xform

    data = load_digits()
    images = (data.images[:, None] / 8 - 1).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(images, data.target, test_size=0.4, random_state=0)
    torch.manual_seed(0)
    model, x, y = DigitsViT(), torch.from_numpy(train_x), torch.from_numpy(train_y)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, EPOCHS * -(-len(x) // 64))
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    held_out = torch.from_numpy(test_x)
    samples = list(x[:128].split(32))
    fast = xform.optimize(model, preset="int8", inputs=held_out[:8], dynamic="auto", calibration=samples)
    with torch.no_grad():
        exact = float((model(held_out).argmax(1).numpy() == test_y).mean())
    quantized = float((fast(held_out).argmax(1).numpy() == test_y).mean())
    return {
        "digits_fp32": round(100 * exact, 2),
        "digits_int8": round(100 * quantized, 2),
        "digits_drop_points": round(100 * (exact - quantized), 2),
    }


def padding_free(work: Path, threads: int) -> dict[str, float]:
    """Speed and error of packed MiniLM on 16 sentences of mixed lengths."""
    import xform
    from xform.report.latency import measure

    model = MODELS["minilm-mixed"]
    feeds = example(model, model.batches[0])
    folder = work / f"{model.name}-{model.batches[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "export.onnx"
    if not source.exists():
        export(built(model), feeds, source)
    padded = xform.optimize(source, inputs=feeds, backend="onnxruntime")
    packed = xform.optimize(source, inputs=feeds, backend="onnxruntime", padding="packed")
    mask = feeds["attention_mask"][..., None]
    (expected,), (found,) = padded(feeds).values(), packed(feeds).values()
    files = [padded.save(folder / "padded.onnx")[0], packed.save(folder / "packed.onnx")[0]]
    for one in (padded, packed):
        one._compiled.close()  # its threads must not spin while the workers run
    before, after = measure(files, feeds, rounds=7, seconds=1.0, threads=threads)
    return {
        "speedup": round(after.speedup_over(before), 3),
        "max_err": float(np.abs((expected - found) * mask).max() / np.abs(expected).max()),
        "pads": float(np.abs(found * (1 - mask)).max()),
        "mean_length": round(float(mask.mean()), 3),
        "padded_ms": round(before.median_ms, 2),
        "packed_ms": round(after.median_ms, 2),
    }


def evidence(work: Path, threads: int) -> dict[str, dict[str, Any]]:
    """All of it, by key of the last line of peers.py."""
    log("int8: sentences")
    int8 = sentence_accuracy()
    log(f"  {int8}\nint8: digits")
    int8 |= digits_accuracy()
    log(f"  {int8}\npadding-free")
    packed = padding_free(work, threads)
    log(f"  {packed}")
    return {"int8": int8, "padding_free": packed}


def main() -> None:
    """Print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/peers"))
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    from xform.backends.onnxruntime.session import physical_cores

    print(json.dumps(evidence(options.work, options.threads or physical_cores())))


if __name__ == "__main__":
    main()
