"""A gate for a build: optimize an exported model on the command line and hold it to what it must contain.

    python examples/gate.py

It exports a small network, runs `xform optimize` with demands that hold and with one that does not, and shows the exit
codes and what the JSON document says.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def export(path: Path) -> None:
    """A block of a transformer's feed-forward kind, with random weights, as torch.onnx.export writes it."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(
        torch.nn.LayerNorm(32), torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 32)
    )
    torch.nn.init.uniform_(block[0].weight, 0.5, 1.5)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(block.eval(), (torch.randn(4, 32),), dynamo=True, opset_version=18, verbose=False).save(path)


def optimize(model: Path, *demands: str) -> None:
    """Run the command and print how it went."""
    command = [
        sys.executable,
        "-m",
        "xform",
        "optimize",
        str(model),
        "-o",
        str(model.with_suffix(".opt.onnx")),
        "--json",
    ]
    for demand in demands:
        command += ["--require", demand]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    print(f"--require {' --require '.join(demands)}: exit code {done.returncode}")
    if "error" in document:
        print(f"  {document['error']['what']}")
    else:
        report = document["report"]
        found = ", ".join(f"{count} {name}" for name, count in sorted(report["concepts"].items()))
        print(f"  found {found}; relative error {report['verification']['max_rel_error']:.1e}")


def main() -> None:
    """Once with demands that hold, once with one that does not."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "block.onnx")
        export(model)
        optimize(model, "gelu==1", "layer_norm>=1")
        optimize(model, "attention>=1")


if __name__ == "__main__":
    main()
