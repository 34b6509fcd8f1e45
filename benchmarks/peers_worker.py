"""One contender of benchmarks/peers.py, in a process of its own: a script that reads one JSON request per line.

The first request is what to load: {"kind": "onnxruntime" | "openvino" | "inductor", "model": file, or name for
inductor, "feeds": path of .npz, "settings": of the artifact, "threads": n}. Each further one, {"seconds": s}, is one
round. Answers: {"ready": true}, {"ms": [...]} or {"error": text}. {"output": path} runs once and writes the outputs
there. The runtimes are opened as `xform bench` opens them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], list[Any]]
WORKER = (
    Path(__file__).parent.parent / "xform" / "report" / "latency_worker.py"
)  # a script: importing xform takes seconds


def open_runtime(request: dict[str, Any], feeds: dict[str, Any]) -> Run:
    """A session of ONNX Runtime or a compiled OpenVINO model, as xform's own worker opens it."""
    import onnx

    worker = runpy.run_path(str(WORKER))
    if request["kind"] == "onnxruntime":  # OpenVINO's opener leaves out what the model does not read
        wanted = {value.name for value in onnx.load(request["model"], load_external_data=False).graph.input}
        feeds = {name: array for name, array in feeds.items() if name in wanted}
    ask = worker["OPENERS"][request["kind"]](request, feeds)

    def run() -> list[Any]:
        outputs = ask()
        return list(outputs.values() if hasattr(outputs, "values") else outputs)

    return run


def open_inductor(request: dict[str, Any], feeds: dict[str, Any]) -> Run:
    """torch.compile with weights frozen into the generated code."""
    import torch
    import torch._inductor.config as inductor
    from peers_models import MODELS, as_tensors, built

    torch.set_num_threads(request["threads"])
    inductor.freezing = True
    module = torch.compile(built(MODELS[request["model"]]))
    tensors = as_tensors(feeds)

    def run() -> list[Any]:
        with torch.no_grad():
            return [module(**tensors).numpy()]

    run()
    return run


OPENERS = {"onnxruntime": open_runtime, "openvino": open_runtime, "inductor": open_inductor}


def main() -> None:
    """Serve requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    run: Run | None = None
    one_round = runpy.run_path(str(WORKER))["one_round"]
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if run is None:
                with np.load(request["feeds"], allow_pickle=False) as archive:
                    feeds = {name: archive[name] for name in archive.files}
                run = OPENERS[request["kind"]](request, feeds)
                answer = {"ready": True}
            elif "output" in request:
                np.savez(request["output"], *[np.array(a) for a in run()])
                answer = {"written": True}
            else:
                answer = {"ms": one_round(run, request["seconds"])}
        except Exception as error:  # told to the parent, which puts it into the table
            answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
