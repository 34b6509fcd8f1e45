"""Hints are worded in Python's spelling and shown in the command line's."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import xform
from xform.cli.spelling import OPTIONS, in_cli_spelling

SOURCES = [
    path
    for path in Path(xform.__file__).parent.resolve().parent.glob("[xpb]*/**/*.py")
    if path.parts[-2] != "cli" and "benchmarks" not in path.parts
]


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("give verify='off' to write it", "give --verify off to write it"),
        ('use tune="off"', "use --tune off"),
        ("widen `tolerance`", "widen --tolerance"),
        ("give calibration= (an .npz)", "give --calibration (an .npz)"),
        ("give compile_only=True to lower", "give --compile-only to lower"),
        ("choose backend='torch_triton'", "choose --backend torch_triton"),
        ("limits={'memory': 17179869184}", "--limit memory=17179869184"),
        ("limits={'memory': N}", "--limit memory=N"),
        ('use None, "auto", or dynamic={"batch": (1, 8)}', 'use None, "auto", or --dynamic batch=1:8'),
        ("input_shapes={'x': (1, 3, 224, 224)}", "--input-shape x:1,3,224,224"),
        ("passes=['raise_gelu', 'fuse']", "--passes raise_gelu,fuse"),
        ("dynamic='sometimes' is not known", "--dynamic sometimes is not known"),
        ("mode=cubic, x.passes=3, nodes=4, a==verify", "mode=cubic, x.passes=3, nodes=4, a==verify"),
        ("--limit memory=4, --set p.target=1", "--limit memory=4, --set p.target=1"),
    ],
)
def test_parameters_become_options(python: str, shell: str) -> None:
    assert in_cli_spelling(python) == shell
    assert in_cli_spelling(shell) == shell


def test_every_parameter_of_optimize_is_known() -> None:
    missing = set(inspect.signature(xform.optimize).parameters) - set(OPTIONS)
    assert missing == set()


def _told(tree: ast.AST) -> list[str]:
    """Every text in a call that makes an error or a warning, with N where a value is put in."""
    texts = []
    for call in ast.walk(tree):
        name = getattr(getattr(call, "func", None), "id", getattr(getattr(call, "func", None), "attr", ""))
        if isinstance(call, ast.Call) and (name.endswith(("Error", "Warning")) or name in ("tell", "warn", "append")):
            for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
                for node in ast.walk(argument):
                    if isinstance(node, ast.JoinedStr):
                        parts = [p.value if isinstance(p, ast.Constant) else "N" for p in node.values]
                        texts.append("".join(map(str, parts)))
                    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                        texts.append(node.value)
    return texts


def test_no_hint_of_the_code_base_keeps_the_spelling_of_python() -> None:
    names = "|".join(name for name, option in OPTIONS.items() if option)
    left = re.compile(rf"(?<![\w.\-])({names})=|`({names})`")
    kept, translated = [], 0
    for source in SOURCES:
        for text in _told(ast.parse(source.read_text())):
            shown = in_cli_spelling(text)
            translated += shown != text
            # an option of the command line may itself be written with "=" after it
            kept += [f"{source.name}: {shown}"] * bool(left.search(re.sub(r"--limit \w+=", "", shown)))
    assert translated >= 10  # the search looks where the hints are
    assert kept == []
