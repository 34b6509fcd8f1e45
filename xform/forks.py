"""Forks: a runtime's threads do not survive one, so what was loaded before is loaded again in the child."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_generation = 0  # forks between the first process and this one


_settled = 0  # the generation that `settle` was called in


def _forked() -> None:
    global _generation
    _generation += 1


def settle() -> None:
    """In a forked child, before torch computes anything: torch's threads are gone too, so it runs on one from now on,
    as in the workers of its DataLoader. With more, it would wait for them for ever.
    """
    global _settled
    if _settled != _generation:
        _settled = _generation
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)


os.register_at_fork(after_in_child=_forked)


class PerProcess(Generic[T]):
    """A value that is made when first asked for, once for all threads, and once more in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value: T | None = None
        self._made_in = _generation

    def get(self, make: Callable[[], T]) -> T:
        """The value; `make` is called where there is none in this process yet."""
        value = self._value
        if value is not None and self._made_in == _generation:
            return value
        if self._made_in != _generation:
            settle()
            self._abandon()
        with self._lock:
            if self._value is None:
                self._value = make()
            return self._value

    def take(self) -> T | None:
        """The value of this process, which is forgotten; None if there is none."""
        if self._made_in != _generation:
            self._abandon()
        with self._lock:
            value, self._value = self._value, None
        return value

    def _abandon(self) -> None:
        """Forget the parent's value without ending it: it would wait for threads that are not there. And its lock,
        which a thread of the parent may have held.
        """
        self._lock, value, self._value, self._made_in = threading.Lock(), self._value, None, _generation
        if value is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
