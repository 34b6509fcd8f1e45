"""What all commands share: common options, and reading arguments.

Heavy packages are imported by the commands, inside their functions: `xform --help` takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from xform.cli.session import Session, session_of
from xform.errors import UsageError
from xform.text import shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Session", "session_of"]

STANDARD = Path("-")  # in place of a file: stdin for a model that is read, stdout for one that is written
MAX_STDIN = 1 << 31  # bytes; one protobuf holds no more

# Panels of --help, in the order in which they are shown
IN = "What goes in"
OUT = "What comes out"
RUN = "What runs"
CHECK = "Verification"
DEMAND = "Demands"
WHERE = "Target"
COMMON = "Common"

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _quiet(context: typer.Context, value: bool) -> None:
    session = context.find_object(Session)
    if session is not None and value:
        session.quiet = True


# main() reads --json and --debug itself, so that they hold for usage errors too; here they are declared and documented
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=COMMON)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=COMMON)]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        help="Print results, warnings and errors only.",
        callback=_quiet,
        expose_value=False,
        rich_help_panel=COMMON,
    ),
]
ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="ONNX file; - reads it from stdin.", show_default=False)
]
TargetText = Annotated[str, typer.Option("--target", help="cpu, or cuda.", rich_help_panel=WHERE)]
BackendName = Annotated[
    str | None, typer.Option("--backend", help="Instead of the target's default backend.", rich_help_panel=WHERE)
]
Preset = Annotated[
    str,
    typer.Option("--preset", help="Named list of passes: exact, or another of `xform passes`.", rich_help_panel=RUN),
]
PassNames = Annotated[
    str | None,
    typer.Option(
        "--passes", help="Passes to run instead of the preset, comma separated, in this order.", rich_help_panel=RUN
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Option of a pass; may be repeated.", rich_help_panel=RUN),
]
InputsPath = Annotated[
    Path | None,
    typer.Option("--inputs", help="Inputs to run on: .npz with one array per input name.", rich_help_panel=IN),
]
CalibrationPath = Annotated[
    Path | None,
    typer.Option(
        "--calibration", help="Inputs that calibrate: .npz as --inputs, or a folder of them.", rich_help_panel=IN
    ),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="auto|NAME=MIN:MAX",
        help="Range of a dynamic dimension; may be repeated.",
        rich_help_panel=IN,
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size", metavar="NAME=N", help="Number for a dynamic dimension; may be repeated.", rich_help_panel=IN
    ),
]
LimitTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=VALUE",
        help="Raise a limit on what the model may ask for: memory or constants (sizes as 16GiB), nodes, depth, "
        "seconds; may be repeated.",
        rich_help_panel=IN,
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance", help="Relative error that verification accepts instead of its table's.", rich_help_panel=CHECK
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the random inputs.", rich_help_panel=CHECK)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        help="Threads of one operator; the runtime's default if absent.",
        rich_help_panel=WHERE,
    ),
]
VerifyMode = Annotated[
    str, typer.Option("--verify", help="each (after every pass), final or off.", rich_help_panel=CHECK)
]


def examples(*lines: str) -> str:
    """Examples for the end of a command's help."""
    return "\n\n".join(["Examples:", *lines])


def model_source(path: Path) -> Path | bytes:
    """What to capture: the file, or with `-` the bytes of stdin. Raises UsageError where stdin is a terminal."""
    if path != STANDARD:
        return path
    if sys.stdin.isatty():
        raise UsageError("- reads the model from stdin, and that is a terminal", hint="xform COMMAND - < model.onnx")
    data = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise UsageError("the model on stdin is larger than one ONNX file can be", hint="give its file")
    return data


def no_standard(path: Path | None, option: str, instead: str) -> None:
    """Refuse `-` where it has no meaning. Raises UsageError."""
    if path == STANDARD:
        raise UsageError(f"{option} takes a file, not -", hint=f"{instead}; a file named - is written ./-")


def in_limits(texts: Sequence[str] | None) -> AbstractContextManager[None]:
    """The limits of `--limit`, in force inside. Raises UsageError."""
    from xform.limits import limited, limits_of

    return limited(limits_of(parse_limits(texts)))


def parse_limits(texts: Sequence[str] | None) -> dict[str, float] | None:
    """`["memory=16GiB", "nodes=1000"]` to {"memory": 17179869184, "nodes": 1000}; nothing to None.

    Raises:
        UsageError: Not of this form, an unknown limit, one given twice, or a value that is not a number above 0.
    """
    from xform.limits import UNITS, limits_of

    limits: dict[str, float] = {}
    for text in texts or ():
        name, given, value = (part.strip() for part in text.partition("="))
        if not given or not value:
            raise UsageError(f"--limit {shown(text)!r} is not a limit", hint="write NAME=VALUE, such as memory=16GiB")
        if name in limits:
            raise UsageError(f"--limit {name} was given twice")
        what = f"--limit {shown(text)!r}"
        limits[name] = parse_size(value, f"{what}: ") if UNITS.get(name) == "bytes" else _number(value, what)
    limits_of(limits)
    return limits or None


def _number(text: str, what: str) -> float:
    match = re.fullmatch(r"\d{1,18}(\.\d{1,18})?", text)
    if match is None:
        raise UsageError(f"{what}: {shown(text)!r} is not a number", hint="write at most 18 digits")
    return float(text) if match[1] else int(text)


def parse_input_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int | str, ...]] | None:
    """`["x:1,3,224,224", "ids:batch,-1"]` to {"x": (1, 3, 224, 224), "ids": ("batch", -1)}; nothing to None.

    Raises:
        UsageError: Not of this form, or an input given twice.
    """
    shapes: dict[str, tuple[int | str, ...]] = {}
    for text in texts or ():
        name, given, dims = text.strip().rpartition(":")  # the last one: a name may hold colons
        parts = [part.strip() for part in dims.split(",")] if dims.strip() else []
        if not given or not name or not all(re.fullmatch(r"-1|\d{1,18}|[A-Za-z_]\w*", part) for part in parts):
            raise UsageError(
                f"--input-shape {shown(text)!r} is not a shape",
                hint="write NAME:DIM,DIM,..., such as x:1,3,224,224 or x:batch,3,224,224",
            )
        if name in shapes:
            raise UsageError(f"--input-shape gives input {shown(name)!r} twice")
        shapes[name] = tuple(part if part[0].isalpha() or part[0] == "_" else int(part) for part in parts)
    return shapes or None


def read_inputs(path: Path | None) -> dict[str, npt.NDArray[Any]] | None:
    """Arrays by input name from an .npz file; None without a path.

    Raises:
        UsageError: The file cannot be read or trusted, or nothing can be learned from its arrays: see `read_npz` and
            `check_useful`.
    """
    from xform.npz import read_npz
    from xform.pipeline.given import check_useful

    if path is None:
        return None
    no_standard(path, "--inputs", "write the arrays to an .npz file")
    arrays = read_npz(path, "the inputs file")
    check_useful(arrays, "the inputs file", str(path))
    return arrays


@contextlib.contextmanager
def given_inputs(path: Path | None) -> Iterator[dict[str, npt.NDArray[Any]] | None]:
    """The arrays of `read_inputs`; inside, the limits are raised by what they earn."""
    from xform.limits import earned_by, limited

    arrays = read_inputs(path)
    with limited(earned_by(arrays)):
        yield arrays


def parse_dynamic(texts: Sequence[str] | None) -> str | dict[str, tuple[int, int]] | None:
    """`["auto"]` to "auto", `["batch=1:8"]` to {"batch": (1, 8)}, nothing to None. Raises UsageError."""
    if not texts:
        return None
    if list(texts) == ["auto"]:
        return "auto"
    ranges: dict[str, tuple[int, int]] = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=(\d{1,18}):(\d{1,18})", text.strip())
        if match is None or not 1 <= int(match[2]) <= int(match[3]):
            raise UsageError(
                f"--dynamic {shown(text)!r} is not a range", hint="write auto, or NAME=MIN:MAX such as batch=1:8"
            )
        if match[1].strip() in ranges:
            raise UsageError(f"--dynamic {shown(match[1].strip())} was given twice")
        ranges[match[1].strip()] = (int(match[2]), int(match[3]))
    return ranges


def parse_sizes(texts: Sequence[str] | None) -> dict[str, int] | None:
    """`["batch=4"]` to {"batch": 4}; nothing to None. Raises UsageError."""
    sizes: dict[str, int] = {}
    for text in texts or ():
        match = re.fullmatch(r"([^=]+)=(\d{1,18})", text.strip())
        if match is None:
            raise UsageError(
                f"--size {shown(text)!r} is not a size of a dimension", hint="write NAME=N, such as batch=4"
            )
        if match[1].strip() in sizes:
            raise UsageError(f"--size {shown(match[1].strip())} was given twice")
        sizes[match[1].strip()] = int(match[2])
    return sizes or None


def parse_size(text: str, what: str = "") -> int:
    """`"50MB"`, `"1.5GiB"`, `"1024"` to bytes. Raises UsageError, its text begun with `what`."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(
            f"{what}{shown(text)!r} is not a size", hint="write bytes, or a number with KB, MB, GB, KiB, MiB or GiB"
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


def verify_mode(text: str) -> Literal["off", "final", "each"]:
    """A mode of verification. Raises UsageError on anything else."""
    modes: dict[str, Literal["off", "final", "each"]] = {"off": "off", "final": "final", "each": "each"}
    if text not in modes:
        raise UsageError(f"--verify {shown(text)!r} is unknown", hint="use each, final or off")
    return modes[text]


def tune_mode(text: str) -> Literal["off", "quick", "full"]:
    """How thoroughly lowerings are timed. Raises UsageError on anything else."""
    modes: dict[str, Literal["off", "quick", "full"]] = {"off": "off", "quick": "quick", "full": "full"}
    if text not in modes:
        raise UsageError(f"--tune {shown(text)!r} is unknown", hint="use off, quick or full")
    return modes[text]


def split_names(text: str | None) -> list[str] | None:
    """`"a, b"` to ["a", "b"]; None stays."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def closest(name: str, known: Iterable[str]) -> str:
    """A hint that names what the user may have meant, or else all that is known."""
    names = sorted(known)
    matches = difflib.get_close_matches(name[:200], names, n=1)
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
    return ", ".join(f"{shown(n)} {a.dtype}[{','.join(map(str, a.shape))}]" for n, a in arrays.items())
