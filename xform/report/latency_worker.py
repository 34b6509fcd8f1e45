"""One contender of a latency measurement, in a process of its own: run as a script, with one JSON request per line.

It imports ONNX Runtime and NumPy only, so that nothing else runs beside the model. The first line of stdin is
{"model": path, "feeds": path of .npz, "threads": int or null}; each further line {"seconds": s} is one round. Each is
answered by one JSON line: {"ready": true}, {"ms": [...]} or {"error": text}.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort

WARM_UP = 2
MIN_RUNS = 5


def open_session(model: str, threads: int | None) -> Any:
    """A session with ONNX Runtime's own defaults, as a deployment would open it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def one_round(session: Any, feeds: dict[str, Any], seconds: float) -> list[float]:
    """Milliseconds of each run, for about `seconds` and at least a few runs."""
    for _ in range(WARM_UP):
        session.run(None, feeds)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MIN_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Serve requests until stdin closes."""
    session, feeds = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if session is None:
                session = open_session(request["model"], request["threads"])
                with np.load(request["feeds"], allow_pickle=False) as archive:
                    feeds = {name: archive[name] for name in archive.files}
                answer = {"ready": True}
            else:
                answer = {"ms": one_round(session, feeds, request["seconds"])}
        except Exception as error:  # told to the parent, which raises it
            answer = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
