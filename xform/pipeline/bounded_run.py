"""Runs of a model that end: in time and in memory, whatever the model asks for.

Time: a thread sets ONNX Runtime's `terminate` flag, which it reads between nodes and between the rounds of a Loop.
Memory: a model that brings little runs in one arena of a fixed size, so that an allocation beyond it fails at once and
nothing is ever touched. For a model that brings more, the process is watched while it runs, and shapes are looked at
before. See `xform.limits` for what a model is allowed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from xform import limits
from xform.graph import dims
from xform.graph.values import display_name, shape_of

ARENA_BYTES = int(limits.Limits().memory) + (64 << 20)
FED_BYTES = 16 << 20  # of the inputs of one run, that count as brought
_ARENA_FULL = "is smaller than requested bytes"  # how the arena says so
_POLL_S = 0.02
_STATUS = Path("/proc/self/statm")
_PAGE = 4096
_RUNNING = threading.Lock()  # all runs in the arena share its bytes, so they take turns
_REGISTERING = threading.Lock()
_registered: list[bool] = []  # whether this process has the arena; empty until somebody asked


def share_arena(options: Any, brought: int) -> bool:
    """Let a session that is made with `options` allocate in the arena; False where it is allowed more than that.

    Args:
        options: onnxruntime SessionOptions.
        brought: Bytes of the model's weights.
    """
    if limits.allowed("memory", brought) > ARENA_BYTES or not _register():
        return False
    options.add_session_config_entry("session.use_env_allocators", "1")
    return True


def _register() -> bool:
    with _REGISTERING:
        if not _registered:
            info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            config = ort.OrtArenaCfg({"max_mem": ARENA_BYTES, "arena_extend_strategy": 1})
            try:
                ort.create_and_register_allocator(info, config)
                _registered.append(True)
            except Exception:  # the program that we are part of has registered one of its own: its sizes are not ours
                _registered.append(False)
        return _registered[0]


def run_bounded(session: Any, feeds: Mapping[str, Any], brought: int, in_arena: bool) -> list[Any]:
    """Outputs of an ONNX Runtime session, in order.

    Args:
        brought: Bytes of the model's weights; what is fed counts besides.
        in_arena: What `share_arena` said of the session.

    Raises:
        LimitError: `seconds` or `memory`.
    """
    brought += fed_bytes(feeds)
    options = ort.RunOptions()
    if not in_arena:
        return _watched(session, feeds, options, brought, watch_memory=True)
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    with _RUNNING:
        try:
            return _watched(session, feeds, options, brought, watch_memory=False)
        except Exception as error:
            if _ARENA_FULL in str(error):
                raise limits.exceeded("memory", "a run of the model needs more memory", brought=brought) from error
            raise


def fed_bytes(feeds: Mapping[str, Any]) -> int:
    """What inputs count for: their bytes, up to a limit, because a model declares how large its random inputs are."""
    return min(sum(value.nbytes for value in feeds.values() if isinstance(value, np.ndarray)), FED_BYTES)


def _watched(session: Any, feeds: Mapping[str, Any], options: Any, brought: int, *, watch_memory: bool) -> list[Any]:
    done = threading.Event()
    passed: list[str] = []
    seconds, memory = limits.allowed("seconds", brought), limits.allowed("memory", brought)

    def watch() -> None:
        end, start = time.monotonic() + seconds, _resident()
        while not done.wait(_POLL_S):
            if time.monotonic() > end:
                passed.append("seconds")
            elif watch_memory and _resident() - start > memory:
                passed.append("memory")
            if passed:
                options.terminate = True
                return

    watcher = threading.Thread(target=watch, name="xform-limits", daemon=True)
    watcher.start()
    try:
        results: list[Any] = session.run(None, feeds, options)
        return results
    except Exception as error:
        if passed:
            what = {"seconds": "a run of the model does not end", "memory": "a run of the model needs more memory"}
            raise limits.exceeded(passed[0], what[passed[0]], brought=brought) from error
        raise
    finally:
        done.set()
        watcher.join()


def _resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int(_STATUS.read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def check_sizes(model: ir.Model, shapes: Mapping[str, Sequence[int]], brought: int) -> None:
    """Refuse a run in which one value alone is larger than the model is allowed.

    Args:
        shapes: Of the inputs that are going to be fed, by name.
        brought: Bytes of weights and inputs.

    Raises:
        LimitError: `memory`, with the name of the node that computes the value.
    """
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, size in zip(shape_of(value) or (), shapes.get(value.name or "", ()), strict=False):
            if isinstance(dim, str):
                sizes[dim] = size
    parsed: dict[str, int | None] = {}
    for node in model.graph:
        for value in node.outputs:
            needed = _bytes(value, sizes, parsed)
            if needed is not None:
                where = f"{display_name(node)} ({node.op_type})"
                limits.check("memory", needed, f"the value '{value.name}'", where=where, brought=brought)


def _bytes(value: ir.Value, sizes: Mapping[str, int], parsed: dict[str, int | None]) -> int | None:
    shape = shape_of(value)
    if shape is None or value.dtype is None or value.dtype is ir.DataType.STRING:
        return None
    numbers = []
    for dim in shape:
        if isinstance(dim, str) and dim not in parsed:
            expression = dims.parse(dim)
            known = not isinstance(expression, int) and dims.symbols(expression) <= sizes.keys()
            parsed[dim] = dims.evaluate(expression, sizes) if known else None
        number = parsed[dim] if isinstance(dim, str) else dim
        if number is None:
            return None
        numbers.append(number)
    return prod(numbers) * max(value.dtype.bitwidth, 8) // 8
