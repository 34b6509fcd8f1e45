"""One contender of a latency measurement, in a process of its own: run as a script, with one JSON request per line.

It imports NumPy and the runtime only, so that nothing else runs beside the model. The first line of stdin is
{"model": path, "feeds": path of .npz, "names": input names of its arrays, "threads": int or null, "backend": name,
"settings": object}; each further line {"seconds": s} is one round. Each is answered by one JSON line: {"ready": true},
{"ms": [...]} or {"error": text}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], Any]

WARM_UP = 2
MIN_RUNS = 5
SLOW = 0.05  # seconds of a run from which on caches and threads are warm after one, and two say enough


def open_onnxruntime(request: dict[str, Any], feeds: dict[str, Any]) -> Run:
    """A session with ONNX Runtime's own defaults, as a deployment would open it, or with an artifact's settings."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    settings = request.get("settings") or {}
    threads = request["threads"] or settings.get("intra_op_threads")
    if threads is not None:
        options.intra_op_num_threads = threads
    if settings:
        options.inter_op_num_threads = settings["inter_op_threads"]
        options.enable_cpu_mem_arena = settings["cpu_arena"]
        options.enable_mem_pattern = settings["memory_pattern"]
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings["spinning"])))
    session = ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def open_openvino(request: dict[str, Any], feeds: dict[str, Any]) -> Run:
    """A compiled model with the settings of an artifact."""
    import openvino as ov

    settings = dict(request.get("settings") or {"PERFORMANCE_HINT": "LATENCY"})
    if request["threads"] is not None:
        settings["INFERENCE_NUM_THREADS"] = request["threads"]
    compiled = ov.Core().compile_model(request["model"], "CPU", settings)
    ask = compiled.create_infer_request()
    read = {name for port in compiled.inputs for name in port.get_names()}
    # the arrays live as long as this closure does, so the tensors may share their memory
    tensors = {name: ov.Tensor(np.ascontiguousarray(array)) for name, array in feeds.items() if name in read}
    return lambda: ask.infer(tensors, share_outputs=True)


OPENERS = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def one_round(run: Run, seconds: float) -> list[float]:
    """Milliseconds of each run, for about `seconds` and at least a few runs; two of a slow model."""
    start = time.perf_counter()
    run()
    for _ in range(0 if time.perf_counter() - start > SLOW else WARM_UP - 1):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    # the first run may be slow for being the first, the second is not
    while len(times) < (2 if times and times[0] > SLOW * 1e3 else MIN_RUNS) or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Serve requests until stdin closes."""
    run: Run | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if run is None:
                with np.load(request["feeds"], allow_pickle=False) as archive:
                    feeds = {name: archive[str(place)] for place, name in enumerate(request["names"])}
                run = OPENERS[request.get("backend", "onnxruntime")](request, feeds)
                answer = {"ready": True}
            else:
                answer = {"ms": one_round(run, request["seconds"])}
        except Exception as error:  # told to the parent, which raises it
            answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
