"""One hostile case: how its folder is made, the command that is run on it, and the exit codes that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

REFUSED = frozenset({3})
USAGE = frozenset({2})


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: Class and name: "external/absolute".
        build: Fills a folder and gives the arguments of the command. The folder has `models` (which may be read),
            `work` (where the command runs and may write), and `outside` (canaries that nothing may read).
        expect: Exit codes that are right.
        poison: Run the command once, change the folder by this, and judge a second run.
    """

    name: str
    build: Callable[[Path], list[str]]
    expect: frozenset[int]
    poison: Callable[[Path], None] | None = None


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    """The model as a file in the folder of models."""
    path = folder / "models" / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def optimize(path: Path) -> list[str]:
    """Arguments that optimize a model into the folder of the run."""
    return ["optimize", str(path), "-o", "out.onnx"]
