"""What all commands share: the session (where output goes), common options, and reading arguments.

Human output goes to stderr; stdout carries one JSON document with `--json`, or the text that was asked for (a dump).
Heavy packages are imported by the commands, inside their functions: `xform --help` takes a fraction of a second.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console

from xform.errors import UsageError, XformError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_WIDTH_OF_LOGS = 140  # characters a line where stderr is no terminal
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Session:
    """One invocation of the command line.

    Attributes:
        json: Whether stdout carries one JSON document.
        debug: Whether errors come with a traceback.
        document: The JSON document so far; a failing command may have filled it before it failed.
        stderr: Where human output goes.
    """

    def __init__(self, *, json: bool = False, debug: bool = False) -> None:
        self.json = json
        self.debug = debug
        self.document: dict[str, Any] = {}
        width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_LOGS
        self.stderr = Console(stderr=True, highlight=False, width=width)
        self._stdout: TextIO = sys.stdout
        if json:  # what libraries print must not get into the document
            sys.stdout = sys.stderr

    def say(self, text: object = "", **style: Any) -> None:
        """Print for humans, on stderr; `text` may be any rich renderable, and plain text is never taken for markup."""
        self.stderr.print(text, markup=False, **style)

    def write(self, text: str) -> None:
        """Write the text that the command was asked for to stdout."""
        self._stdout.write(text if text.endswith("\n") else text + "\n")

    def fail(self, error: XformError) -> int:
        """Tell of a deliberate error and return its exit code."""
        code = type(error).exit_code
        self.document["error"] = {
            "kind": type(error).__name__,
            "what": error.what,
            "where": list(error.where),
            "hint": error.hint,
        }
        self.say(f"error: {error}", style="red", soft_wrap=True)
        return code

    def finish(self, code: int) -> None:
        """Print the document, if one was asked for, and give stdout back."""
        sys.stdout = self._stdout
        if self.json:
            from xform.report.schema import plain

            json.dump(plain({**self.document, "exit_code": code}), self._stdout, indent=2, allow_nan=False)
            self._stdout.write("\n")
        self._stdout.flush()


def session_of(context: typer.Context) -> Session:
    """The session of a command's context."""
    session = context.find_object(Session)
    if session is None:
        raise RuntimeError("a command ran outside main()")
    return session


# main() reads these two itself, so that they hold for usage errors too; here they are declared and documented
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.", show_default=False)]
TargetText = Annotated[str, typer.Option("--target", help="cpu, cuda, edge or edge:<arch>.")]
Preset = Annotated[str, typer.Option("--preset", help="Named list of passes: exact, or another of `xform passes`.")]
PassNames = Annotated[
    str | None, typer.Option("--passes", help="Passes to run instead of the preset, comma separated, in this order.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Option of a pass; may be repeated.")
]
InputsPath = Annotated[
    Path | None, typer.Option("--inputs", help="Inputs to verify on: .npz with one array per input name.")
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option("--dynamic", metavar="auto|NAME=MIN:MAX", help="Range of a dynamic dimension; may be repeated."),
]
Sizes = Annotated[
    list[str] | None, typer.Option("--size", metavar="NAME=N", help="Number for a dynamic dimension; may be repeated.")
]
ToleranceOption = Annotated[
    float | None, typer.Option("--tolerance", help="Relative error that verification accepts instead of its table's.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the random inputs.")]
VerifyMode = Annotated[str, typer.Option("--verify", help="each (after every pass), final or off.")]


def read_inputs(path: Path | None) -> dict[str, npt.NDArray[Any]] | None:
    """Arrays by input name from an .npz file; None without a path.

    Raises:
        UsageError: The file is missing, is no .npz, or holds pickled objects (which are never loaded).
    """
    import numpy as np

    if path is None:
        return None
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UsageError("inputs are no .npz archive", where=str(path), hint=_NPZ_HINT)
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"inputs could not be read: {first_line(error)}", where=str(path), hint=_NPZ_HINT) from error


_NPZ_HINT = "write them with numpy.savez(path, input_name=array, ...)"


def parse_dynamic(texts: Sequence[str] | None) -> str | dict[str, tuple[int, int]] | None:
    """`["auto"]` to "auto", `["batch=1:8"]` to {"batch": (1, 8)}, nothing to None. Raises UsageError."""
    if not texts:
        return None
    if list(texts) == ["auto"]:
        return "auto"
    ranges: dict[str, tuple[int, int]] = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=(\d+):(\d+)", text.strip())
        if match is None or int(match[2]) > int(match[3]):
            raise UsageError(f"--dynamic {text!r} is no range", hint="write auto, or NAME=MIN:MAX such as batch=1:8")
        ranges[match[1].strip()] = (int(match[2]), int(match[3]))
    return ranges


def parse_sizes(texts: Sequence[str] | None) -> dict[str, int] | None:
    """`["batch=4"]` to {"batch": 4}; nothing to None. Raises UsageError."""
    sizes: dict[str, int] = {}
    for text in texts or ():
        match = re.fullmatch(r"([^=]+)=(\d+)", text.strip())
        if match is None:
            raise UsageError(f"--size {text!r} is no size of a dimension", hint="write NAME=N, such as batch=4")
        sizes[match[1].strip()] = int(match[2])
    return sizes or None


def parse_size(text: str) -> int:
    """`"50MB"`, `"1.5GiB"`, `"1024"` to bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is no size", hint="write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def verify_mode(text: str) -> Literal["off", "final", "each"]:
    """A mode of verification. Raises UsageError on anything else."""
    modes: dict[str, Literal["off", "final", "each"]] = {"off": "off", "final": "final", "each": "each"}
    if text not in modes:
        raise UsageError(f"--verify {text!r} is unknown", hint="use each, final or off")
    return modes[text]


def tune_mode(text: str) -> Literal["off", "quick", "full"]:
    """How thoroughly lowerings are timed. Raises UsageError on anything else."""
    modes: dict[str, Literal["off", "quick", "full"]] = {"off": "off", "quick": "quick", "full": "full"}
    if text not in modes:
        raise UsageError(f"--tune {text!r} is unknown", hint="use off, quick or full")
    return modes[text]


def split_names(text: str | None) -> list[str] | None:
    """`"a, b"` to ["a", "b"]; None stays."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def closest(name: str, known: Iterable[str]) -> str:
    """A hint that names what the user may have meant, or else all that is known."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]!r}?" if matches else f"known are {', '.join(names)}"


def human_bytes(count: int) -> str:
    """`1234567` to "1.23 MB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """`{"x": array}` to "x float32[2,3]"."""
    return ", ".join(f"{n} {a.dtype}[{','.join(map(str, a.shape))}]" for n, a in arrays.items())
