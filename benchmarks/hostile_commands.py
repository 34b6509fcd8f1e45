"""Other commands than optimize, on the same kinds of files, and options in places where nobody puts them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from hostile_arguments import zip_bomb
from hostile_case import REFUSED, USAGE, Case, optimize, saved, simple
from hostile_external import as_initializer, external

OTHERS = ("inspect", "explain", "bisect", "bench", "verify", "diff")


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (commands, entries, files_of_options, files_of_inputs, values):
        yield from group()


def _command(name: str, path: Path) -> list[str]:
    return [name, str(path), str(path)] if name in ("verify", "diff") else [name, str(path)]


def commands() -> Iterator[Case]:
    """Files that are no model, or that read others, under every command; an honest model beside them."""

    def passwd(folder: Path) -> Path:
        proto = simple()
        as_initializer(proto, external("t", "/etc/passwd", [8]))
        return saved(folder, proto)

    def link(folder: Path) -> Path:
        (folder / "models" / "w.bin").symlink_to(folder / "outside" / "secret.bin")
        proto = simple()
        as_initializer(proto, external("t", "w.bin", [8]))
        return saved(folder, proto)

    def fifo(folder: Path) -> Path:
        os.mkfifo(folder / "models" / "m.onnx")
        return folder / "models" / "m.onnx"

    def text(folder: Path) -> Path:
        (folder / "models" / "m.onnx").write_text("\x1b[2Jhello")
        return folder / "models" / "m.onnx"

    def folder_of_models(folder: Path) -> Path:
        (folder / "models" / "\x1b[31m\u202e.onnx").write_text("x")
        return folder / "models"

    for what, make in {"passwd": passwd, "link": link, "fifo": fifo, "text": text, "folder": folder_of_models}.items():
        for name in OTHERS:

            def build(folder: Path, make: Callable[[Path], Path] = make, name: str = name) -> list[str]:
                return _command(name, make(folder))

            yield Case(f"command/{name}-{what}", build, frozenset({2, 3}))
    for name in ("verify", "diff", "bench"):

        def second(folder: Path, name: str = name) -> list[str]:
            good = folder / "models" / "good.onnx"
            good.write_bytes(simple().SerializeToString())
            return [name, str(good), str(passwd(folder))]

        yield Case(f"command/{name}-second-model", second, frozenset({3, 7}))


def entries() -> Iterator[Case]:
    """External data whose entries are doubled, at the very end, past the end by overflow, or in the model itself."""
    found: dict[str, tuple[list[tuple[str, str]], list[int], frozenset[int]]] = {
        "location-twice": ([("location", "data.bin"), ("location", "../outside/secret.bin")], [8], REFUSED),
        "location-twice-other-order": ([("location", "../outside/secret.bin"), ("location", "data.bin")], [8], REFUSED),
        "offset-twice": ([("location", "data.bin"), ("offset", "0"), ("offset", "4096")], [8], REFUSED),
        "at-the-end": ([("location", "data.bin"), ("offset", "32")], [8], frozenset({0})),
        "one-past-the-end": ([("location", "data.bin"), ("offset", "33")], [8], REFUSED),
        "empty-at-the-end": ([("location", "data.bin"), ("offset", "64")], [0, 8], frozenset({0, 3})),
        "empty-past-the-end": ([("location", "data.bin"), ("offset", "4096")], [0, 8], REFUSED),
        "offset-wraps": ([("location", "data.bin"), ("offset", str(2**64 - 16)), ("length", "32")], [8], REFUSED),
        "length-wraps": ([("location", "data.bin"), ("offset", "16"), ("length", str(2**64 - 16))], [8], REFUSED),
        "dims-wrap": ([("location", "data.bin")], [2**32, 2**32, 8], REFUSED),
        "offset-plus-sign": ([("location", "data.bin"), ("offset", "+4")], [8], REFUSED),
        "offset-space": ([("location", "data.bin"), ("offset", " 4")], [8], REFUSED),
        "offset-unaligned": ([("location", "data.bin"), ("offset", "3")], [8], frozenset({0, 3})),
        "unknown-key": ([("location", "data.bin"), ("script", "rm")], [8], frozenset({0, 3})),
        "checksum-wrong": ([("location", "data.bin"), ("checksum", "0" * 40)], [8], frozenset({0, 3})),
        "the-model-itself": ([("location", "m.onnx")], [8], frozenset({0, 3})),
        "dot-slash": ([("location", "./data.bin")], [8], frozenset({0})),
        "trailing-slash": ([("location", "data.bin/")], [8], frozenset({0, 3})),
        "through-a-file": ([("location", "data.bin/../data.bin")], [8], REFUSED),
        "upper-case-key": ([("Location", "data.bin")], [8], REFUSED),
    }
    for name, (pairs, dims, expect) in found.items():

        def build(folder: Path, pairs: list[tuple[str, str]] = pairs, dims: list[int] = dims) -> list[str]:
            (folder / "models" / "data.bin").write_bytes(np.ones(16, np.float32).tobytes())
            proto = simple()
            as_initializer(proto, external("t", "", dims))
            tensor = proto.graph.initializer[1]
            del tensor.external_data[:]
            for key, value in pairs:
                tensor.external_data.add(key=key, value=value)
            return optimize(saved(folder, proto))

        allowed = expect | {3} if dims != [8] else expect  # no such bias fits the sum
        yield Case(f"entry/{name}", build, allowed)

    def output_name(folder: Path) -> list[str]:
        """The data file of the input has the name that the output would give its own, in the folder of the output."""
        proto = simple()
        as_initializer(proto, external("t", "out.onnx.data", [8]))
        (folder / "models" / "out.onnx.data").write_bytes(np.ones(8, np.float32).tobytes())
        return ["optimize", str(saved(folder, proto)), "-o", str(folder / "models" / "out.onnx")]

    yield Case("entry/named-like-the-weights-of-the-output", output_name, USAGE)


def files_of_options() -> Iterator[Case]:
    """An option of a pass may name a file, which is read like any other."""
    ranges = ["--passes", "migrate_scales", "--set"]

    def pipe(folder: Path) -> str:
        os.mkfifo(folder / "models" / "r.npz")
        return "r.npz"

    def bomb(folder: Path) -> str:
        (folder / "models" / "r.npz").write_bytes(zip_bomb(1 << 30))
        return "r.npz"

    def shape(folder: Path) -> str:
        np.savez(folder / "models" / "r.npz", **{"\x1b[31m": np.ones(3)})
        return "r.npz"

    kinds: dict[str, Callable[[Path], str]] = {
        "pipe": pipe, "bomb": bomb, "shape": shape, "missing": lambda f: "no.npz", "folder": lambda f: ".",
        "model": lambda f: "m.onnx", "device": lambda f: "/dev/zero", "null": lambda f: "/dev/null",
        "empty": lambda f: "",
    }  # fmt: skip
    for name, make in kinds.items():

        def build(folder: Path, make: Callable[[Path], str] = make) -> list[str]:
            path, given = saved(folder, simple()), make(folder)
            place = str(folder / "models" / given) if given else ""
            return [*optimize(path), *ranges, f"migrate_scales.ranges={place}"]

        yield Case(f"pass-option/{name}", build, frozenset({2, 3}))
    for text in ("approximate_gelu.form=x", "migrate_scales.alpha=nan", "migrate_scales.alpha=1e400",
                 "quantize_static.weight_bits=9", f"migrate_scales.alpha={'9' * 5000}"):  # fmt: skip

        def wrong(folder: Path, text: str = text) -> list[str]:
            return [*optimize(saved(folder, simple())), "--passes", text.partition(".")[0], "--set", text]

        yield Case(f"pass-option/{text[:30]}", wrong, USAGE)


def files_of_inputs() -> Iterator[Case]:
    """Arrays that unpack to much more than the file holds, by themselves or together."""
    for mebibytes in (100, 500):
        for command in ("optimize", "verify", "bisect", "explain", "bench"):

            def build(folder: Path, command: str = command, size: int = mebibytes << 20) -> list[str]:
                (folder / "models" / "x.npz").write_bytes(zip_bomb(size))
                path = saved(folder, simple())
                start = optimize(path) if command == "optimize" else _command(command, path)
                extra = ["--rounds", "1", "--seconds", "0.01"] if command == "bench" else []
                return [*start, "--inputs", str(folder / "models" / "x.npz"), *extra]

            yield Case(f"unpacked/{command}-{mebibytes}", build, frozenset({0, 2, 3}))

    def many(folder: Path) -> list[str]:
        (folder / "models" / "samples").mkdir()
        for number in range(16):
            (folder / "models" / "samples" / f"{number}.npz").write_bytes(zip_bomb(200 << 20))
        return [*optimize(saved(folder, simple())), "--preset", "int8", "--calibration", str(folder / "models/samples")]

    yield Case("unpacked/calibration-folder", many, frozenset({2, 3}))

    def members(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "models" / "x.npz", "w") as archive:
            for number in range(50_000):
                archive.writestr(f"{number}.npy", b"")
        return [*optimize(saved(folder, simple())), "--inputs", str(folder / "models" / "x.npz")]

    yield Case("unpacked/members-50000", members, USAGE)

    def names(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "models" / "x.npz", "w") as archive:
            archive.writestr("\x1b[2J\u202e\n../../x.npy", b"\x93NUMPY")
        return [*optimize(saved(folder, simple())), "--inputs", str(folder / "models" / "x.npz")]

    yield Case("unpacked/names", names, USAGE)


VALUES: dict[str, tuple[list[str], frozenset[int]]] = {
    "limit-digits": (["--limit", "nodes=" + "9" * 5000], USAGE),
    "limit-power": (["--limit", "seconds=1e308"], USAGE),
    "limit-inf": (["--limit", "seconds=inf"], USAGE),
    "limit-largest": (["--limit", "seconds=999999999999999999"], frozenset({0})),
    "limit-memory-largest": (["--limit", "memory=999999999999GiB"], USAGE),
    "limit-memory-tiny": (["--limit", "memory=0.001"], USAGE),
    "limit-memory-one": (["--limit", "memory=1"], frozenset({0, 3})),
    "limit-depth-one": (["--limit", "depth=1"], frozenset({0, 3})),
    "limit-nodes-one": (["--limit", "nodes=1"], frozenset({0, 3})),
    "limit-seconds-tiny": (["--limit", "seconds=0.000000000000000001"], frozenset({0, 3})),
    "limit-fullwidth": (["--limit", "nodes=\uff11\uff10"], frozenset({0, 2})),
    "limit-escape": (["--limit", "\x1b[31m=\x1b[2J"], USAGE),
    "limit-comma": (["--limit", "memory=1GiB,nodes=3"], USAGE),
    "set-escape": (["--set", "\x1b[31m.a=\u202e"], USAGE),
    "passes-megabyte": (["--passes", "x" * 100_000], USAGE),
    "passes-many": (["--passes", ",".join(["fold_constants"] * 2000)], frozenset({0, 2})),
    "passes-empty": (["--passes", ",,,"], frozenset({0, 2})),
    "require-escape": (["--require", "\x1b[31m>=1"], frozenset({2, 4})),
    "require-digits": (["--require", "gelu>=" + "9" * 5000], frozenset({2, 4})),
    "size-digits": (["--size", "batch=" + "9" * 5000], USAGE),
    "size-large": (["--measure", "--size", "batch=999999999999999999"], frozenset({2, 3})),
    "shape-digits": (["--input-shape", "x:" + "9" * 5000], USAGE),
    "shape-large": (["--input-shape", "x:999999999999,8"], frozenset({0, 2, 3})),
    "shape-zero": (["--input-shape", "x:0,8"], frozenset({0, 2})),
    "shape-negative": (["--input-shape", "x:-7,8"], USAGE),
    "shape-escape": (["--input-shape", "\x1b[31m:1,8"], USAGE),
    "shape-rank": (["--input-shape", "x:1,8,1"], USAGE),
    "shape-many": (["--input-shape", "x:" + ",".join(["1"] * 20_000)], USAGE),
    "dynamic-reversed": (["--dynamic", "batch=999999999999999999:1"], USAGE),
    "dynamic-large": (["--dynamic", "batch=1:999999999999999999"], USAGE),
    "dynamic-escape": (["--dynamic", "\x1b[31m=1:2"], USAGE),
    "max-size-digits": (["--max-size", "9" * 5000], USAGE),
    "max-size-zero": (["--max-size", "0"], frozenset({2, 6})),
    "max-error-tiny": (["--max-error", "1e-400"], frozenset({2, 6})),
    "tolerance-digits": (["--tolerance", "1" + "0" * 5000], USAGE),
    "opset-digits": (["--opset", "9" * 5000], USAGE),
    "threads-digits": (["--threads", "9" * 5000], USAGE),
    "report-to-itself": (["--report", "/dev/stdout"], USAGE),
    "report-fd": (["--report", "/proc/self/fd/1"], USAGE),
    "output-fd": (["-o", "/proc/self/fd/1"], USAGE),
    "report-html-escape": (["--report", "\x1b[31m\u202e.html"], frozenset({0, 2})),
    "report-home": (["--report", "~/r.json"], USAGE),
    "output-twice": (["-o", "other.onnx"], USAGE),
    "output-suffix-escape": (["--report", "r.\x1b[31m"], USAGE),
    "target-escape": (["--target", "\x1b[31mcpu"], frozenset({2, 7})),
    "response-file": (["@/etc/passwd"], USAGE),
    "stdin-twice": (["--inputs", "-"], USAGE),
    "unknown-escape": (["--\x1b[31mfrob"], USAGE),
    "argument-escape": (["\x1b[31m\u202ex"], USAGE),
}


def values() -> Iterator[Case]:
    """Values of options that are too long, too large, or meant for a terminal."""
    for name, (extra, expect) in VALUES.items():
        yield Case(f"value/{name}", lambda folder, extra=extra: [*optimize(saved(folder, simple())), *extra], expect)
    others: dict[str, tuple[list[str], frozenset[int]]] = {
        "passes-json": (["passes", "--json"], frozenset({0})),
        "passes-argument": (["passes", "\x1b[31m"], frozenset({0, 2})),
        "doctor": (["doctor"], frozenset({0})),
        "completion-shell": (["--show-completion", "nonsense"], frozenset({0, 1, 2})),
        "command-escape": (["\x1b[31moptimize"], USAGE),
        "command-megabyte": (["x" * 100_000], USAGE),
        "version-and-more": (["--version", "optimize"], frozenset({0})),
        "help-of-nothing": (["nonsense", "--help"], USAGE),
        "empty": ([""], USAGE),
        "inspect-stdin-empty": (["inspect", "-"], REFUSED),
        "optimize-stdin-empty": (["optimize", "-"], REFUSED),
    }
    for name, (arguments, expect) in others.items():
        yield Case(f"value/{name}", lambda folder, arguments=arguments: list(arguments), expect)
