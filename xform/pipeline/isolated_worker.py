"""Runs one ONNX file for another process, so that a crash of the runtime ends this process only.

    python isolated_worker.py model.onnx THREADS [FOLDER of its external data, if that is another than its own]

Reads lines "INPUTS.npz OUTPUTS.npz" (tab between) from stdin, and answers each with "ok" or "error MESSAGE" on stdout;
the first answer says whether the model loaded. Imports nothing of xform, to start quickly. Arrays are named by place:
"3" is the fourth value, "3.1" the second element of a sequence there. No pickle is read or written.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime as ort


def pack(values: list[Any]) -> dict[str, Any]:
    """Values by place, for np.savez; None (an absent optional) has no entry, an empty sequence one of its own."""
    arrays: dict[str, Any] = {}
    for place, value in enumerate(values):
        if isinstance(value, list | tuple):
            arrays[f"{place}.length"] = np.array(len(value))
            arrays.update({f"{place}.{index}": _writable(element) for index, element in enumerate(value)})
        elif value is not None:
            arrays[str(place)] = _writable(value)
    return arrays


def unpack(arrays: Any, count: int) -> list[Any]:
    """The inverse of `pack` for `count` values."""
    values: list[Any] = []
    for place in range(count):
        if f"{place}.length" in arrays:
            length = int(arrays[f"{place}.length"])
            values.append([_readable(arrays[f"{place}.{index}"]) for index in range(length)])
        else:
            values.append(_readable(arrays[str(place)]) if str(place) in arrays else None)
    return values


def _writable(value: Any) -> Any:
    array = np.asarray(value)
    return array.astype(np.str_) if array.dtype.kind == "O" else array


def _readable(array: Any) -> Any:
    return array.astype(object) if array.dtype.kind == "U" else array


def _answer(text: str) -> None:
    sys.stdout.write(" ".join(text.split()) + "\n")
    sys.stdout.flush()


def serve(path: str, threads: int, folder: str = "") -> None:
    """Load the file and answer until stdin ends."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_reuse = False  # planning it is quadratic where sizes are unknown; values are freed either way
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    model: str | bytes = path
    if folder:  # which counts for what is not loaded from a file
        with open(path, "rb") as file:
            model = file.read()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        _answer(f"error {error}")
        return
    names = [value.name for value in session.get_inputs()]
    _answer("ok")
    for line in sys.stdin:
        source, _, destination = line.rstrip("\n").partition("\t")
        try:
            with np.load(source, allow_pickle=False) as arrays:
                feeds = dict(zip(names, unpack(arrays, len(names)), strict=True))
            results = session.run(None, {name: value for name, value in feeds.items() if value is not None})
            np.savez(destination, **pack(results))
        except Exception as error:
            _answer(f"error {error}")
        else:
            _answer("ok")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
