"""Replaying a recorded CUDA graph instead of launching each kernel.

A recorded graph reads and writes fixed memory. So a call copies its inputs into buffers of their own, replays, and
gives out copies of the outputs:

- two inputs that share memory get two buffers, so it does not matter how the caller's tensors overlap;
- an output that is a view of an input, of a weight, or of memory that the next replay overwrites is a copy like all
  others, so what the caller holds never changes, and writing into it changes nothing here;
- weights are read where they are: a weight that is written in place counts in the next replay.

There is one recording for each combination of shapes, dtypes and strides; the least recently used ones are dropped.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Module = Callable[..., Sequence[Any]]
Recorder = Callable[[Module, Sequence[Any]], tuple[Callable[[], None], Sequence[Any]]]
_WARM_UP = 3
_MAX_RECORDINGS = 8


class Replayer:
    """A module that is recorded at the first call with inputs of a shape, and replayed after.

    Args:
        module: Gives a tuple of tensors; free of side effects.
        record: Records a call on given buffers: a function that replays it, and the outputs that it writes.
    """

    def __init__(self, module: Module, record: Recorder | None = None) -> None:
        self._module = module
        self._record = record or record_cuda_graph
        self._recordings: OrderedDict[Hashable, tuple[list[Any], Callable[[], None], Sequence[Any]]] = OrderedDict()
        self.refused: str | None = None

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run it. A module that cannot be recorded runs as it is from then on; `refused` says why."""
        if self.refused is not None:
            return tuple(self._module(*inputs))
        key = tuple(_key(value) for value in inputs)
        if key not in self._recordings:
            buffers = [_buffer(value) for value in inputs]
            try:
                replay, outputs = self._record(self._module, buffers)
            except RuntimeError as error:  # it waits for the device or allocates in a way that cannot be recorded
                self.refused = _first_cause(error)
                return tuple(self._module(*inputs))
            self._recordings[key] = (buffers, replay, outputs)
            while len(self._recordings) > _MAX_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        buffers, replay, outputs = self._recordings[key]
        for buffer, value in zip(buffers, inputs, strict=True):
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(value)
        replay()
        return tuple(output.clone() if isinstance(output, torch.Tensor) else output for output in outputs)


def _key(value: Any) -> Hashable:
    return (value.shape, value.dtype, value.stride()) if isinstance(value, torch.Tensor) else value


def _buffer(value: Any) -> Any:
    """Memory of its own, dense even where `value` repeats elements."""
    return torch.clone(value, memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value


def _first_cause(error: BaseException) -> str:
    """What began it: closing a capture that was spoilt raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__


def record_cuda_graph(module: Module, buffers: Sequence[Any]) -> tuple[Callable[[], None], Sequence[Any]]:
    """Record a call on the current device, after a few calls on a stream of its own that warm up libraries.

    Raises:
        RuntimeError: The module waits for the device or does something else that cannot be recorded.
    """
    here = torch.cuda.current_stream()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            module(*buffers)
        _run_without_waiting(module, buffers)
    here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = module(*buffers)
    finally:
        torch.cuda.set_stream(here)  # where a capture fails, torch leaves its stream the current one
    return graph.replay, outputs


def _run_without_waiting(module: Module, buffers: Sequence[Any]) -> None:
    """Run it where waiting for the device is an error: found here it spoils nothing, in a capture it would."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        module(*buffers)
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know all operations that wait; the capture knows the rest
        torch.cuda.set_sync_debug_mode(mode)
