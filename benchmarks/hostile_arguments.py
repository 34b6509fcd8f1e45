"""Arguments that mean harm: outputs over inputs, files that lie about themselves, values that no option has."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile_case import USAGE, Case, optimize, saved, simple

Build = Callable[[Path], list[str]]


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (overwriting, unwritable, options, inputs, calibration, caches, outputs):
        yield from group()


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **(arrays or {"x": np.ones((2, 8), "f")}))
    return path


def _with_weights(folder: Path) -> Path:
    path = folder / "models" / "m.onnx"
    onnx.save(simple(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


# Outputs over what the run reads


def overwriting() -> Iterator[Case]:
    """`-o` and `--report` on a file that the run reads: under its name, through a link, in another spelling."""
    targets: dict[str, Callable[[Path], Path]] = {
        "model": lambda f: f / "models" / "m.onnx",
        "weights": lambda f: f / "models" / "w.bin",
        "inputs": lambda f: f / "models" / "x.npz",
        "calibration": lambda f: f / "models" / "samples" / "a.npz",
    }
    spellings: dict[str, Callable[[Path, Path], Path]] = {
        "same": lambda f, t: t,
        "dots": lambda f, t: t.parent / ".." / t.parent.name / t.name,
        "link": _link,
        "relative": lambda f, t: Path(os.path.relpath(t, f / "work")),
        "linked-folder": _folder_link,
    }
    for what, target in targets.items():
        for how, spell in spellings.items():
            for option in ("-o", "--report"):

                def build(
                    folder: Path, target: Any = target, spell: Any = spell, option: str = option, what: str = what
                ) -> list[str]:
                    model = _with_weights(folder)
                    _npz(folder / "models" / "x.npz")
                    (folder / "models" / "samples").mkdir()
                    _npz(folder / "models" / "samples" / "a.npz")
                    arguments = ["optimize", str(model), option, str(spell(folder, target(folder)))]
                    if what == "inputs":
                        arguments += ["--inputs", str(folder / "models" / "x.npz")]
                    if what == "calibration":
                        arguments += ["--preset", "int8", "--calibration", str(folder / "models" / "samples")]
                    return arguments

                yield Case(f"overwrite/{what}-{how}-{option.strip('-')}", build, USAGE)
    same = {
        "output-is-report": ["-o", "out.onnx", "--report", "out.onnx"],
        "output-is-report-dots": ["-o", "out.json", "--report", "./out.json"],
    }
    for name, arguments in same.items():
        yield Case(
            f"overwrite/{name}", lambda f, a=arguments: ["optimize", str(saved(f, simple())), *a], USAGE
        )  # fmt: skip


def _link(folder: Path, target: Path) -> Path:
    link = folder / "work" / f"link{target.suffix}"
    link.symlink_to(target)
    return link


def _folder_link(folder: Path, target: Path) -> Path:
    (folder / "work" / "there").symlink_to(target.parent)
    return folder / "work" / "there" / target.name


def unwritable() -> Iterator[Case]:
    """Where nothing can be written."""
    places: dict[str, str] = {
        "no-folder": "nowhere/out.onnx",
        "folder": "folder",
        "below-a-file": "file/out.onnx",
        "dev-full": "/dev/full",
        "dev-null-below": "/dev/null/out.onnx",
        "proc": "/proc/out.onnx",
        "sys": "/sys/out.onnx",
        "long": "x" * 300 + ".onnx",
        "empty": "",
        "null": "a\0b.onnx",
        "slash": "folder/",
    }
    for name, place in places.items():
        for option in ("-o", "--report"):
            if name == "null":
                continue  # a process cannot be given such an argument

            def build(folder: Path, place: str = place, option: str = option) -> list[str]:
                (folder / "work" / "folder").mkdir()
                (folder / "work" / "file").write_text("x")
                return ["optimize", str(saved(folder, simple())), option, place]

            yield Case(f"unwritable/{name}-{option.strip('-')}", build, USAGE)


def outputs() -> Iterator[Case]:
    """Links and pipes where the result goes. A link that the user names is followed, as `cp` does; others are not."""

    def canary(folder: Path) -> list[str]:
        (folder / "work" / "real.onnx").write_text("old")
        (folder / "work" / "out.onnx").symlink_to("real.onnx")
        return optimize(saved(folder, simple()))

    def report(folder: Path) -> list[str]:
        (folder / "work" / "real.json").write_text("old")
        (folder / "work" / "r.json").symlink_to("real.json")
        return [*optimize(saved(folder, simple())), "--report", "r.json"]

    def data(folder: Path) -> list[str]:
        (folder / "work" / "out.onnx.data").symlink_to(folder / "outside" / "secret.bin")
        return optimize(saved(folder, simple()))

    def fifo(folder: Path) -> list[str]:
        os.mkfifo(folder / "work" / "out.onnx")
        return optimize(saved(folder, simple()))

    for name, build in {"link": canary, "report-link": report, "data-link": data, "fifo": fifo}.items():
        yield Case(f"output/{name}", build, frozenset({0, 2}))


# Options

WRONG: dict[str, list[str]] = {
    "--target": ["", "toaster", "cuda:banana", "edge:", "cpu;rm"],
    "--preset": ["", "exactly", "../exact"],
    "--passes": ["nonsense", "raise_gelu,nonsense", "__import__"],
    "--set": ["raise_gelu", "nonsense.option=1", "fold_constants.input_limit=abc", "a.b.c=1", "=", "x=1"],
    "--backend": ["", "nonsense", "onnxruntime2"],
    "--inputs": ["missing.npz", "/etc/hostname", ".", ""],
    "--calibration": ["missing.npz"],
    "--dynamic": ["batch", "batch=", "batch=0:0", "batch=8:1", "nothing=1:2", "batch=-1:4", "batch=1:99999999999999"],
    "--verify": ["", "never", "Final"],
    "--tolerance": ["-1", "abc", "nan", "inf", ""],
    "--opset": ["0", "-1", "9999", "abc", "1.5"],
    "--precision": ["float128", "", "int8"],
    "--compile": ["yes", ""],
    "--require": ["gelu>=abc", ">=1", "gelu>=-1"],
    "--max-latency-ratio": ["-1", "abc", "nan"],
    "--max-size": ["-1", "big", "10 parsecs", ""],
    "--max-error": ["-1", "abc", "nan"],
    "--tune": ["yes", ""],
    "--padding": ["full", ""],
    "--size": ["batch", "batch=abc", "batch=-1"],
    "--limit": ["memory", "nonsense=1", "memory=-1", "memory=abc", "seconds=0", "=1"],
    "--frobnicate": ["1"],
}
OTHERS: dict[str, list[str]] = {
    "verify-seed": ["verify", "MODEL", "MODEL", "--seed", "-1"],
    "verify-fidelity": ["verify", "MODEL", "MODEL", "--fidelity", "very"],
    "verify-one": ["verify", "MODEL"],
    "verify-missing": ["verify", "MODEL", "missing.onnx"],
    "bench-rounds": ["bench", "MODEL", "--rounds", "0"],
    "bench-seconds": ["bench", "MODEL", "--seconds", "-1"],
    "bench-threads": ["bench", "MODEL", "--threads", "0"],
    "bench-none": ["bench"],
    "bench-size": ["bench", "MODEL", "--size", "nothing=3"],
    "inspect-size": ["inspect", "MODEL", "--counts", "--size", "batch=x"],
    "inspect-missing": ["inspect", "missing.onnx"],
    "diff-one": ["diff", "MODEL"],
    "diff-missing": ["diff", "MODEL", "missing.onnx"],
    "explain-concept": ["explain", "MODEL", "nonsense"],
    "explain-preset": ["explain", "MODEL", "--preset", "nonsense"],
    "bisect-seed": ["bisect", "MODEL", "--seed", "-1"],
    "bisect-passes": ["bisect", "MODEL", "--passes", "nonsense"],
    "command": ["frobnicate"],
    "no-model": ["optimize"],
    "option-without-value": ["optimize", "MODEL", "-o"],
    "report-suffix": ["optimize", "MODEL", "--report", "r.exe"],
}


def options() -> Iterator[Case]:
    """Wrong values of every option. Missing files count as usage, or as a model that cannot be read."""
    for option, values in WRONG.items():
        for number, value in enumerate(values):

            def build(folder: Path, option: str = option, value: str = value) -> list[str]:
                extra = ["--preset", "int8"] if option == "--calibration" else []
                return [*optimize(saved(folder, simple())), *extra, option, value]

            allowed = frozenset({2, 7}) if option == "--target" else USAGE
            yield Case(f"option/{option.strip('-')}-{number}", build, allowed)
    for name, arguments in OTHERS.items():

        def build_other(folder: Path, arguments: list[str] = arguments) -> list[str]:
            path = str(saved(folder, simple()))
            return [path if word == "MODEL" else word for word in arguments]

        yield Case(f"option/{name}", build_other, frozenset({2, 3}) if "missing" in name else USAGE)


# Files of arrays


def _lying(shape: str, data: bytes = b"\0" * 64, dtype: str = "<f4") -> bytes:
    """An .npz whose array header says what is not so."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    padded = header + " " * (63 - (10 + len(header)) % 64) + "\n"
    array = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + data
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", array)
    return file.getvalue()


def zip_bomb(size: int) -> bytes:
    """An .npz with `x` of [size / 32, 8] zeros, a thousandth of that."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({size // 4 // 8}, 8), }}"
    padded = header + " " * (63 - (10 + len(header)) % 64) + "\n"
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode())
        for _ in range(size >> 20):
            entry.write(b"\0" * (1 << 20))
    return file.getvalue()


def _saved_arrays(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _good() -> Any:
    return np.ones((2, 8), "f")


FILES: dict[str, Callable[[], bytes]] = {
    "huge-header": lambda: _lying("(1099511627776, 8)"),
    "short-data": lambda: _lying("(4, 8)"),
    "negative-shape": lambda: _lying("(-1, 8)"),
    "nonsense-shape": lambda: _lying("(open('/etc/passwd'),)"),
    "object-dtype": lambda: _lying("(2, 8)", dtype="|O"),
    "objects": lambda: _saved_arrays(x=np.array([{"a": 1}], dtype=object)),
    "strings": lambda: _saved_arrays(x=np.array([["a"] * 8])),
    "booleans": lambda: _saved_arrays(x=np.ones((2, 8), bool)),
    "complex": lambda: _saved_arrays(x=_good().astype("c8")),
    "rank": lambda: _saved_arrays(x=np.ones(8, "f")),
    "fixed-dim": lambda: _saved_arrays(x=np.ones((2, 9), "f")),
    "unknown-name": lambda: _saved_arrays(x=_good(), z=_good()),
    "missing-name": lambda: _saved_arrays(z=_good()),
    "no-arrays": lambda: _saved_arrays(),
    "not-a-zip": lambda: b"hello",
    "truncated": lambda: _saved_arrays(x=_good())[:-40],
    "empty-file": lambda: b"",
}


def inputs() -> Iterator[Case]:
    """`--inputs` that are not what the model takes."""
    for name in FILES:
        for command in ("optimize", "verify", "bench"):

            def build(folder: Path, name: str = name, command: str = command) -> list[str]:
                path, model = folder / "models" / "x.npz", saved(folder, simple())
                path.write_bytes(FILES[name]())
                start = {"optimize": optimize(model), "verify": ["verify", str(model), str(model)],
                         "bench": ["bench", str(model), "--rounds", "1", "--seconds", "0.01"]}[command]  # fmt: skip
                return [*start, "--inputs", str(path)]

            yield Case(f"inputs/{name}-{command}", build, USAGE)

    def bomb(folder: Path) -> list[str]:
        path = folder / "models" / "x.npz"
        path.write_bytes(zip_bomb(3 << 30))
        return [*optimize(saved(folder, simple())), "--inputs", str(path)]

    yield Case("inputs/zip-bomb", bomb, frozenset({2, 3}))
    for name, value in {"nan": np.nan, "inf": np.inf}.items():

        def build_value(folder: Path, value: float = value) -> list[str]:
            path = _npz(folder / "models" / "x.npz", x=np.full((2, 8), value, "f"))
            return [*optimize(saved(folder, simple())), "--inputs", str(path)]

        yield Case(f"inputs/{name}", build_value, frozenset({0, 2}))


def calibration() -> Iterator[Case]:
    """`--calibration` that tells nothing about the data."""
    for name in FILES:

        def build(folder: Path, name: str = name) -> list[str]:
            path = folder / "models" / "c.npz"
            path.write_bytes(FILES[name]())
            return [*optimize(saved(folder, simple())), "--preset", "int8", "--calibration", str(path)]

        allowed = frozenset({0}) if name == "unknown-name" else USAGE  # a tokenizer gives more than a model reads
        yield Case(f"calibration/{name}", build, allowed)
    arrays = {
        "nan": np.full((2, 8), np.nan, "f"),
        "inf": np.full((2, 8), np.inf, "f"),
        "no-rows": np.zeros((0, 8), "f"),
        "float64": np.ones((2, 8), "d"),
    }
    for name, array in arrays.items():

        def build_values(folder: Path, array: Any = array) -> list[str]:
            path = _npz(folder / "models" / "c.npz", x=array)
            return [*optimize(saved(folder, simple())), "--preset", "int8", "--calibration", str(path)]

        yield Case(f"calibration/{name}", build_values, USAGE)

    def empty(folder: Path) -> list[str]:
        (folder / "models" / "samples").mkdir()
        return [*optimize(saved(folder, simple())), "--preset", "int8", "--calibration", str(folder / "models/samples")]

    def text(folder: Path) -> list[str]:
        (folder / "models" / "samples").mkdir()
        (folder / "models" / "samples" / "a.npz").write_text("hello")
        return [*optimize(saved(folder, simple())), "--preset", "int8", "--calibration", str(folder / "models/samples")]

    def fifo(folder: Path) -> list[str]:
        os.mkfifo(folder / "models" / "c.npz")
        return [*optimize(saved(folder, simple())), "--preset", "int8", "--calibration", str(folder / "models/c.npz")]

    for name, make in {"empty-folder": empty, "folder-of-text": text, "fifo": fifo}.items():
        yield Case(f"calibration/{name}", make, USAGE)


# Caches


def caches() -> Iterator[Case]:
    """A tuning cache that others have written into: ignored, and nothing is written through its links."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "text": b"hello",
        "list": b"[]",
        "null": b"null",
        "deep": b"[" * 100_000,
        "deep-closed": b"[" * 5000 + b"]" * 5000,
        "wrong-types": json.dumps({"winner": 7, "seconds": "x", "choices": None}).encode(),
        "nan": b'{"seconds": NaN}',
        "huge-number": b'{"a": ' + b"9" * 10_000 + b"}",
        "binary": bytes(range(256)),
    }
    for name, data in contents.items():

        def poison(folder: Path, data: bytes = data) -> None:
            for file in _entries(folder):
                file.write_bytes(data)

        yield Case(f"cache/{name}", _tuned, frozenset({0}), poison)

    def linked(folder: Path) -> None:
        for file in _entries(folder):
            file.unlink()
            file.symlink_to(folder / "outside" / "secret.bin")

    def fifos(folder: Path) -> None:
        for file in _entries(folder):
            file.unlink()
            os.mkfifo(file)

    def folders(folder: Path) -> None:
        for file in _entries(folder):
            file.unlink()
            file.mkdir()

    def a_file(folder: Path) -> None:
        shutil.rmtree(folder / "cache")
        (folder / "cache").write_text("x")

    def link_of_folder(folder: Path) -> None:
        shutil.rmtree(folder / "cache")
        (folder / "cache").symlink_to(folder / "outside")

    for name, change in {
        "link": linked, "fifo": fifos, "folders": folders, "file": a_file, "linked-folder": link_of_folder,
    }.items():  # fmt: skip
        yield Case(f"cache/{name}", _tuned, frozenset({0, 2}), change)


def _tuned(folder: Path) -> list[str]:
    return [*optimize(saved(folder, simple())), "--tune", "quick"]


def _entries(folder: Path) -> list[Path]:
    """What the first run has left in its cache."""
    found = list((folder / "cache").rglob("*.json"))
    if not found:
        raise RuntimeError("the run left nothing in its cache, so there is nothing to poison")
    return found
