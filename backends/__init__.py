"""The backends, and the choice among them."""

from __future__ import annotations

import os
from pathlib import Path

from xform.backends.base import Artifact, Backend, LoadOptions, LowerOptions, Missing, Runner
from xform.backends.onnxruntime import OnnxRuntimeBackend
from xform.backends.openvino import OpenVinoBackend
from xform.backends.torch_triton import TorchTritonBackend
from xform.errors import TargetError, UsageError
from xform.target import KINDS, Target

BACKENDS: dict[str, type[Backend]] = {b.name: b for b in (OnnxRuntimeBackend, OpenVinoBackend, TorchTritonBackend)}
DEFAULT: dict[str, str] = {"cpu": "onnxruntime", "cuda": "torch_triton"}
FALLBACK: dict[str, str] = {"onnxruntime": "torch_triton"}  # taken where the default one raises a KernelError

__all__ = [
    "BACKENDS",
    "DEFAULT",
    "FALLBACK",
    "Artifact",
    "Backend",
    "LoadOptions",
    "LowerOptions",
    "Missing",
    "Runner",
    "check_suffix",
    "get_backend",
]


def get_backend(name: str | None, target: Target, *, compile_only: bool = False) -> Backend:
    """The backend called `name`, or the default one of the target.

    Args:
        compile_only: The result is not run here, so the device need not be here.

    Raises:
        UsageError: No backend has this name.
        TargetError: This version has no backend for the target, the named one cannot serve it, or it is not installed.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=f"use one of {', '.join(sorted(BACKENDS))}")
    chosen = name or DEFAULT.get(target.kind)
    if chosen is None or target.kind not in BACKENDS[chosen].kinds:
        raise _unserved(name, target)
    backend = BACKENDS[chosen]()
    missing = None if compile_only else backend.available(target)
    if missing is not None:
        without = ", or give compile_only=True to lower without a GPU" if target.kind == "cuda" else ""
        raise TargetError(
            f"backend {chosen!r} is not available for target {target}: {missing.what}", hint=missing.hint + without
        )
    return backend


def _unserved(name: str | None, target: Target) -> TargetError:
    """No backend, or not the one called `name`, makes anything for the target; says which one does."""
    by_target = {kind: DEFAULT[kind] for kind in KINDS if kind in DEFAULT}
    if name is None:
        return TargetError(
            f"no backend serves target {target}",
            hint=f"this version of xform has backends for {', '.join(by_target)}; use one of those",
        )
    hints = [f"target={kind!r}" for kind in BACKENDS[name].kinds]
    hints += [f"backend={by_target[target.kind]!r} for target {target}"] if target.kind in by_target else []
    return TargetError(f"backend {name!r} does not serve target {target}", hint=f"use {', or '.join(hints)}")


def check_suffix(path: Path, backend: str) -> None:
    """Refuse a file name whose suffix says a format that the backend does not write.

    Raises:
        UsageError: Naming the suffixes that it writes, and a backend that writes this one.
    """
    if backend not in BACKENDS or os.path.isdir(path) or path.suffix in BACKENDS[backend].suffixes:
        return  # an unknown backend is told when it is looked up, a folder when it is written to
    others = [name for name, kind in BACKENDS.items() if path.suffix in kind.suffixes]
    also = f", or choose backend={others[0]!r}, which writes {path.suffix}" if others else ""
    raise UsageError(
        f"backend {backend!r} writes no {path.suffix or 'files without a suffix'}",
        where=str(path),
        hint=f"end the name in {' or '.join(BACKENDS[backend].suffixes)}{also}",
    )
