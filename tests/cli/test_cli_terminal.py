"""No control character of a model, a file name, an option or a library reaches the terminal, in any command."""

from __future__ import annotations

import io
import logging
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_support import Run
from onnx import TensorProto, helper, numpy_helper
from rich.text import Text

from xform.cli.common import session_of
from xform.cli.console import Escaping, console_of, printed
from xform.errors import XformWarning
from xform.report.terminal import plain_table
from xform.tell import tell

CLI = Callable[..., Run]
EVIL = "\x1b[2J\x1b]0;owned\x07\r\n\x9b31m‮\x00\x7f‏[/red]"


def _evil_model(path: Path, *, long: bool = False) -> Path:
    """Every name that a user can choose, evil; optionally of a megabyte."""
    evil = EVIL + ("A" * 60_000 if long else "")  # longer ones are refused
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", [f"x{evil}", f"w{evil}"], ["h"], name=f"product{evil}"),
        helper.make_node("BatchNormalization", ["h", *(f"{p}{evil}" for p in "smbv")], ["n"], name=f"norm{evil}"),
        helper.make_node("Sigmoid", ["n"], ["s"], name=f"gate{evil}"),
        helper.make_node("Mul", ["n", "s"], [f"y{evil}"], name=f"silu{evil}"),
    ]
    weights = [numpy_helper.from_array(rng.standard_normal((8, 4)).astype(np.float32), f"w{evil}")]
    weights += [numpy_helper.from_array(rng.uniform(0.5, 2, 4).astype(np.float32), f"{p}{evil}") for p in "smbv"]
    graph = helper.make_graph(
        nodes,
        f"graph{evil}",
        [helper.make_tensor_value_info(f"x{evil}", TensorProto.FLOAT, [f"batch{evil}", 8])],
        [helper.make_tensor_value_info(f"y{evil}", TensorProto.FLOAT, [f"batch{evil}", 4])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def _is_safe(text: str) -> bool:
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp") for c in text)


COMMANDS = [
    ("optimize", "evil.onnx", "--verbose"),
    ("optimize", "evil.onnx", "--require", "attention>=1"),
    ("inspect", "evil.onnx"),
    ("inspect", "evil.onnx", "--counts", "--nodes"),
    ("inspect", "evil.onnx", "--streams"),
    ("explain", "evil.onnx"),
    ("explain", "evil.onnx", "batch_norm"),
    ("explain", "evil.onnx", EVIL),
    ("verify", "evil.onnx", "mlp.onnx"),
    ("verify", "evil.onnx", "evil.onnx"),
    ("bisect", "evil.onnx"),
    ("diff", "evil.onnx", "mlp.onnx"),
    ("diff", "evil.onnx", "mlp.onnx", "--text"),
    ("bench", "evil.onnx", "--rounds", "1", "--seconds", "0"),
    ("bench", "evil.onnx", "mlp.onnx", "--rounds", "1", "--seconds", "0"),
    ("inspect", EVIL.replace("\0", "")),
    ("inspect", EVIL.replace("\0", ""), "--debug"),
    ("inspect", "evil.onnx", "--size", EVIL),
    ("inspect", "evil.onnx", f"--{EVIL}"),
    (EVIL,),
    ("optimize", "evil.onnx", "--set", EVIL),
    ("optimize", "evil.onnx", "--passes", EVIL),
    ("optimize", "evil.onnx", "--preset", EVIL),
    ("optimize", "evil.onnx", "--target", EVIL),
    ("optimize", "evil.onnx", "--backend", EVIL),
    ("optimize", "evil.onnx", "--require", EVIL),
    ("optimize", "evil.onnx", "--limit", f"{EVIL}=1"),
    ("optimize", "evil.onnx", "-o", f"no/{EVIL}.onnx".replace("\0", "")),
    ("optimize", "evil.onnx", "--inputs", "evil.npz"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: " ".join(a[:1] + a[2:])[:40].encode("unicode_escape"))
def test_no_command_lets_a_control_character_through(
    xform: CLI, mlp: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    _evil_model(tmp_path / "evil.onnx")
    np.savez(tmp_path / "evil.npz", **{EVIL.replace("\0", "").replace("/", ""): np.zeros((1, 8), np.float32)})
    run = xform(*arguments)
    assert run.code != 1, run.err
    assert _is_safe(run.out) and _is_safe(run.err)
    assert run.out or run.err
    as_json = xform(*arguments, "--json")
    assert as_json.out.isascii() and _is_safe(as_json.out)


def test_a_long_name_is_shortened_wherever_it_is_shown(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    _evil_model(tmp_path / "evil.onnx", long=True)
    for arguments in (
        ("optimize", "evil.onnx", "--verbose", "--report", "r.html"),
        ("inspect", "evil.onnx"),
        ("inspect", "evil.onnx", "--counts", "--nodes"),
        ("inspect", "evil.onnx", "--streams"),
        ("explain", "evil.onnx"),
        ("verify", "evil.onnx", "mlp.onnx"),
        ("diff", "evil.onnx", "mlp.onnx"),
    ):
        run = xform(*arguments)
        assert len(run.out) + len(run.err) < 60_000, arguments
    page = (tmp_path / "r.html").read_text()
    assert len(page) < 60_000 and _is_safe(page)


def test_what_libraries_print_warn_of_and_log_is_escaped(
    xform: CLI, mlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(context: object) -> object:
        session = session_of(context)
        print(f"printed{EVIL}")
        warnings.warn(f"foreign{EVIL}", UserWarning, stacklevel=1)
        logging.getLogger("elsewhere").warning("logged%s", EVIL)
        return session

    monkeypatch.setattr("xform.cli.doctor.session_of", noisy)
    run = xform("doctor")
    assert run.code == 0
    assert "printed" in run.err and "foreign" in run.err and "printed" not in run.out
    assert _is_safe(run.err)


def test_a_traceback_is_escaped(xform: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(context: object) -> object:
        raise ZeroDivisionError(EVIL)

    monkeypatch.setattr("xform.cli.doctor.session_of", failing)
    run = xform("doctor", "--debug")
    assert run.code == 1 and "Traceback" in run.err
    assert _is_safe(run.err)


def test_a_terminal_gets_colors_and_nothing_else() -> None:
    file = io.StringIO()
    console = console_of(file, folded=True)
    console._force_terminal, console._color_system = True, None
    table = plain_table()
    table.add_column("name")
    table.add_row(f"plain{EVIL}")
    table.add_row(Text(f"text{EVIL}", style="red"))
    console.print(table)
    console.print(Text(EVIL))
    assert _is_safe(file.getvalue())
    assert "[/red]" in file.getvalue()  # never taken for markup


def test_escaping_streams_pass_on_the_rest() -> None:
    file = io.StringIO()
    stream = Escaping(file)
    assert stream.write("a\n\tb\x1b") == 5
    assert file.getvalue() == "a\n\tb\\x1b"
    assert not stream.isatty() and stream.writable()


def test_lines_for_a_pipe_are_neither_folded_nor_padded() -> None:
    table = plain_table()
    table.add_column("a")
    table.add_column("b")
    table.add_row("x" * 180, "y")
    table.add_row("z", "")
    lines = printed(console_of(io.StringIO(), folded=False), table).splitlines()
    assert lines[1].split() == ["x" * 180, "y"]
    assert lines[2] == "z"


def test_a_warning_is_shown_once(xform: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(context: object) -> object:
        session = session_of(context)
        for _ in range(2):
            tell("random data; give calibration= before relying on it")
        session.warn("random data; give calibration= before relying on it")
        return session

    monkeypatch.setattr("xform.cli.doctor.session_of", warning)
    run = xform("doctor")
    assert run.err == "warning: random data; give --calibration before relying on it\n"
    with pytest.warns(XformWarning):  # the command line leaves Python's own way as it was
        tell("later")


def test_warnings_of_the_report_are_shown_once(xform: CLI, mlp: Path) -> None:
    model = onnx.load(mlp)
    array = numpy_helper.to_array(model.graph.initializer[1]).copy()
    array[3] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(array, "fc1.bias"))
    onnx.save(model, mlp)
    run = xform("optimize", mlp)
    lines = [line for line in run.err.splitlines() if line.startswith("warning: ")]
    assert any("NaN" in line for line in lines)
    assert len(lines) == len(set(lines))
