"""Keeping torch's own talk out of the user's terminal and log while a module is captured; errors are raised anyway.

Only this thread's talk: what other threads print or log meanwhile goes where it always goes.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_EXPORTERS = ("torch.onnx", "onnxscript")


class _Deaf:
    """A stream that drops what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of this thread's on stdout, stderr, in warnings, or in the logs of torch and its exporter, inside."""
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    # a filter of a logger does not see what its children log, one of a handler does
    loggers = [logger for name, logger in logging.root.manager.loggerDict.items() if name.split(".")[0] == "torch"]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}  # or a placeholder
    exporters = [logging.getLogger(name) for name in _EXPORTERS]
    levels = [logger.level for logger in exporters]
    streams = (sys.stdout, sys.stderr)
    try:
        for handler in handlers:
            handler.addFilter(of_others)
        for logger in exporters:
            logger.setLevel(logging.CRITICAL)
        sys.stdout, sys.stderr = _Deaf(sys.stdout), _Deaf(sys.stderr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout, sys.stderr = streams
        for handler in handlers:
            handler.removeFilter(of_others)
        for logger, level in zip(exporters, levels, strict=True):
            logger.setLevel(level)
