"""Running a graph in a process of its own, for models of unknown origin.

A malformed model can make a runtime crash or never return. In a child process that is one more reason why a model could
not be run. It costs about half a second and a copy of the weights on disk for each session, so it is off unless asked
for: `with isolated_runtime(): ...` turns it on for everything that verifies inside.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx

from xform.pipeline import isolated_worker

DEFAULT_TIMEOUT_S = 120.0

_timeout: ContextVar[float | None] = ContextVar("xform_isolated_timeout", default=None)


class ChildError(Exception):
    """The child refused, crashed or did not answer; the message says which."""


@contextmanager
def isolated_runtime(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[None]:
    """Run every graph of this context in a child process, and give up on one that does not answer in time.

    Args:
        timeout_s: Seconds for loading and for every single run.
    """
    token = _timeout.set(timeout_s)
    try:
        yield
    finally:
        _timeout.reset(token)


def isolation_timeout() -> float | None:
    """Seconds that a child has for an answer; None where isolation is off."""
    return _timeout.get()


class Child:
    """A process that has one graph loaded.

    Args:
        proto: The graph.
        lent: Arrays for the initializers that it leaves out, by name.
        threads: Intra-op threads.
        timeout_s: Seconds for every single run.
        load_timeout_s: Seconds for loading; `timeout_s` if it is not given.
        folder: Where its external data lies; None where it has none.

    Raises:
        ChildError: It does not load the graph.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        lent: Mapping[str, Any],
        threads: int,
        timeout_s: float,
        folder: Path | None = None,
        load_timeout_s: float | None = None,
    ) -> None:
        self._timeout_s = timeout_s if load_timeout_s is None else load_timeout_s
        self._data = folder
        self._folder = tempfile.TemporaryDirectory(prefix="xform-")
        self._names = _input_names(proto)
        self._outputs = len(proto.graph.output)
        self._process: subprocess.Popen[str] | None = None
        try:
            path = Path(self._folder.name) / "model.onnx"
            _write(proto, lent, path)
            self._process = self._start(path, threads)
            self._answers = _read_lines(self._process)
            self._expect_ok()
            self._timeout_s = timeout_s
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Outputs in graph order.

        Raises:
            ChildError: The runtime failed, crashed or did not answer in time.
        """
        unknown = [name for name in feeds if name not in self._names]
        if unknown:
            raise ChildError(f"the graph has no input {unknown[0]!r}")
        source, destination = (Path(self._folder.name) / name for name in ("inputs.npz", "outputs.npz"))
        np.savez(source, **isolated_worker.pack([feeds.get(name) for name in self._names]))
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(f"{source}\t{destination}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._crashed()
        self._expect_ok()
        with np.load(destination, allow_pickle=False) as arrays:
            return isolated_worker.unpack(arrays, self._outputs)

    def close(self) -> None:
        """End the process and remove its files."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # unsent requests to a process that is gone
                        stream.close()
            self._process = None
        self._folder.cleanup()

    def _start(self, path: Path, threads: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONFAULTHANDLER": "0"}
        return subprocess.Popen(
            [sys.executable, isolated_worker.__file__, str(path), str(threads), str(self._data or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def _expect_ok(self) -> None:
        try:
            line = self._answers.get(timeout=self._timeout_s)
        except queue.Empty:
            raise ChildError(f"no answer within {self._timeout_s:g} s") from None
        if line is None:
            self._crashed()
        if line != "ok":
            raise ChildError(line.removeprefix("error "))

    def _crashed(self) -> NoReturn:
        assert self._process is not None
        code = self._process.wait()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ChildError(f"the runtime crashed ({cause})")


def _read_lines(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """The child's answers as they come; None at its end."""
    answers: queue.Queue[str | None] = queue.Queue()
    stream = process.stdout
    assert stream is not None

    def pump() -> None:
        for line in stream:
            answers.put(line.rstrip("\n"))
        answers.put(None)

    threading.Thread(target=pump, daemon=True).start()
    return answers


def _input_names(proto: onnx.ModelProto) -> list[str]:
    initialized = {tensor.name for tensor in proto.graph.initializer}
    return [value.name for value in proto.graph.input if value.name not in initialized]


def _write(proto: onnx.ModelProto, lent: Mapping[str, Any], path: Path) -> None:
    """The graph with its lent initializers in a data file beside it."""
    with path.with_suffix(".data").open("wb") as data:
        for tensor in proto.graph.initializer:
            if tensor.name in lent:
                offset = data.tell()
                data.write(memoryview(lent[tensor.name]).cast("B"))
                del tensor.external_data[:]
                for key, value in (("location", f"{path.stem}.data"), ("offset", offset)):
                    tensor.external_data.add(key=key, value=str(value))
                tensor.external_data.add(key="length", value=str(data.tell() - offset))
    path.write_bytes(proto.SerializeToString())
