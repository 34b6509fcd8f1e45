"""Files that are no model, or a broken one."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import REFUSED, Case, optimize, simple
from hostile_invalid import invalid
from onnx import helper

node = helper.make_node


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (wrong_kinds, damaged, invalid_models):
        yield from group()


# Files of other kinds, and damaged ones


def wrong_kinds() -> Iterator[Case]:
    """What is not an ONNX model."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(1))
    contents: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello",
        "html": b"<html></html>",
        "json": b'{"a": 1}',
        "zeros": b"\0" * 1000,
        "ones": b"\xff" * 1000,
        "gzip": gzip.compress(simple().SerializeToString()),
        "pickle": pickle.dumps(_Evil()),
        "zip": archive.getvalue(),
        "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "graph-only": simple().graph.SerializeToString(),
        "tensor-only": simple().graph.initializer[0].SerializeToString(),
        "safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "ort": b"\0\0\0\0ORTM" + b"\0" * 64,
        "escape": b"\x1b[2J\x1b]0;owned\x07",
    }
    for name, data in contents.items():

        def build(folder: Path, data: bytes = data) -> list[str]:
            path = folder / "models" / "m.onnx"
            path.write_bytes(data)
            return optimize(path)

        yield Case(f"kind/{name}", build, REFUSED)
    for name, make in {"folder": os.mkdir, "fifo": os.mkfifo}.items():

        def build_node(folder: Path, make: Callable[[Path], None] = make) -> list[str]:  # type: ignore[assignment]
            make(folder / "models" / "m.onnx")
            return optimize(folder / "models" / "m.onnx")

        yield Case(f"kind/{name}", build_node, frozenset({2, 3}))
    for name, path in {"dev-null": "/dev/null", "dev-zero": "/dev/zero", "missing": "missing.onnx"}.items():
        yield Case(f"kind/{name}", lambda folder, path=path: optimize(Path(path)), frozenset({2, 3}))


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def damaged() -> Iterator[Case]:
    """Truncated and bit-flipped models: refused, or (where the flip changes a weight) done."""
    data = simple().SerializeToString()
    for number, length in enumerate(np.linspace(1, len(data) - 1, 24).astype(int)):

        def build(folder: Path, length: int = int(length)) -> list[str]:
            path = folder / "models" / "m.onnx"
            path.write_bytes(data[:length])
            return optimize(path)

        yield Case(f"truncated/{number}", build, REFUSED)
    rng = np.random.default_rng(7)
    for number in range(48):
        flips = rng.integers(0, len(data) * 8, size=1 + number % 4)

        def build_flips(folder: Path, flips: Any = flips) -> list[str]:
            changed = bytearray(data)
            for bit in flips:
                changed[bit // 8] ^= 1 << int(bit % 8)
            path = folder / "models" / "m.onnx"
            path.write_bytes(changed)
            return optimize(path)

        # a flipped bit may leave a model that is fine, that computes infinities, or that is none
        yield Case(f"flipped/{number}", build_flips, frozenset({0, 3, 5, 7}))


def invalid_models() -> Iterator[Case]:
    """Every model of `hostile_invalid`, verified or not."""
    for number, (name, proto) in enumerate(invalid()):
        verify = "off" if number % 3 else "final"
        expect = frozenset({0, 3}) if name == "graphs/output-listed-twice" else REFUSED
        data = proto.SerializeToString()

        def build(folder: Path, data: bytes = data, verify: str = verify) -> list[str]:
            path = folder / "models" / "m.onnx"
            path.write_bytes(data)
            return [*optimize(path), "--verify", verify]

        yield Case(f"invalid/{name}", build, expect)
