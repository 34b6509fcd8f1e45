"""Names that a terminal or a file system would obey."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from hostile_case import REFUSED, Case, optimize, saved, simple
from onnx import helper

node = helper.make_node


def all_cases() -> Iterator[Case]:
    """Every case of this file."""
    for group in (names,):
        yield from group()


# Names

NAMES: dict[str, str] = {
    "escape": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "newline": "a\nerror: all is well",
    "return": "a\rb",
    "bell": "\x07",
    "c1": "\x9b31m",
    "backspace": "abc\b\b\bxyz",
    "null": "a\0b",
    "bidi": "\u202eabc",
    "zero-width": "a\u200bb",
    "separator": "a\u2028b",
    "delete": "a\x7fb",
    "markup": "[red]x[/red]",
    "path": "../../outside/owned",
    "percent": "%s%n{0}",
    "emoji": "\U0001f600",
    "space": " ",
    "megabytes": "n" * 10_000_000,
}


def names() -> Iterator[Case]:
    """Names that a terminal or a file system would obey."""
    commands = (["optimize"], ["inspect"], ["explain"], ["verify"], ["diff"], ["bench"], ["bisect"])
    for number, (name, text) in enumerate(NAMES.items()):
        for where in ("node", "value"):
            command = commands[(number + (where == "value") * 3) % len(commands)]

            def build(folder: Path, where: str = where, text: str = text, command: list[str] = command) -> list[str]:
                path = saved(folder, _named(where, text))
                if command == ["optimize"]:
                    return optimize(path)
                if command in (["verify"], ["diff"]):
                    return [*command, str(path), str(path)]
                return [*command, str(path), *(["--rounds", "1"] if command == ["bench"] else [])]

            yield Case(f"name/{where}-{name}", build, frozenset({0, 2, 3, 5}))

        def build_error(folder: Path, text: str = text) -> list[str]:
            proto = _named("node", text)
            proto.graph.node[0].attribute.append(helper.make_attribute("frobnicate", text))
            return optimize(saved(folder, proto))

        yield Case(f"name/error-{name}", build_error, REFUSED)


def _named(where: str, text: str) -> onnx.ModelProto:
    proto = simple()
    if where == "node":
        for number, one in enumerate(proto.graph.node):
            one.name = f"{text}{number}"
        proto.graph.name = text
        return proto
    for one in proto.graph.node:
        one.input[:] = [text if name == "x" else text + name for name in one.input]
        one.output[:] = [text + name for name in one.output]
    for tensor in proto.graph.initializer:
        tensor.name = text + tensor.name
    proto.graph.input[0].name = text
    proto.graph.output[0].name = text + "y"
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = text
    return proto
