"""Exit codes, errors, --json and --debug, whichever the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from xform import errors
from xform.cli.common import session_of


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["optimize"],
        ["optimize", "m.onnx", "--no-such-option"],
        ["optimize", "m.onnx", "--opset", "new"],
        ["optimize", "m.onnx", "--max-latency-ratio", "-1"],
        ["verify", "one.onnx"],
        [],
    ],
)
def test_usage_errors_end_with_2_and_say_where_help_is(xform: Callable[..., object], arguments: list[str]) -> None:
    run = xform(*arguments)
    assert run.code == 2
    assert "--help" in run.err
    assert "Traceback" not in run.err


def test_usage_errors_obey_json(xform: Callable[..., object]) -> None:
    run = xform("nonsense", "--json")
    assert run.json["exit_code"] == 2
    assert run.json["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.OutputError, 2),
        (errors.ModelError, 3),
        (errors.CaptureError, 3),
        (errors.RequirementError, 4),
        (errors.VerificationError, 5),
        (errors.BudgetError, 6),
        (errors.TargetError, 7),
    ],
)
def test_deliberate_errors_have_their_codes(
    xform: Callable[..., object], monkeypatch: pytest.MonkeyPatch, error: type[errors.XformError], code: int
) -> None:
    _doctor_raises(monkeypatch, error("what [it] was", where=["here"], hint="do this"))
    run = xform("doctor", "--json")
    assert run.code == code
    assert run.json["error"] == {"kind": error.__name__, "what": "what [it] was", "where": ["here"], "hint": "do this"}
    assert "what [it] was" in run.err and "here" in run.err and "do this" in run.err
    assert "Traceback" not in run.err


def test_an_unexpected_error_is_one_line_unless_debugging(
    xform: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _doctor_raises(monkeypatch, ZeroDivisionError("oh\nno"))
    run = xform("doctor")
    assert run.code == 1
    assert run.err.strip().count("\n") == 0
    assert "ZeroDivisionError: oh" in run.err and "--debug" in run.err
    debug = xform("doctor", "--debug")
    assert debug.code == 1
    assert "Traceback" in debug.err and "_doctor_raises" not in debug.out


def test_ctrl_c_ends_with_130(xform: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    _doctor_raises(monkeypatch, KeyboardInterrupt())
    assert xform("doctor").code == 130


def test_a_command_that_is_terminated_says_so_in_its_document() -> None:
    code = (
        "import os, signal, sys, time, xform.cli, xform.cli.doctor\n"
        "def terminated(context):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(10)\n"
        "xform.cli.doctor.session_of = terminated\n"
        "sys.exit(xform.cli.main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == 143
    assert document["error"]["kind"] == "terminated"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("arguments", ["inspect {}", "inspect {} --json", "optimize {} -o -", "passes"])
def test_a_full_disk_is_an_output_error(mlp: Path, arguments: str) -> None:
    command = [sys.executable, "-m", "xform", *arguments.format(mlp).split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=_environment())
    assert done.returncode == 2
    assert "stdout cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def _doctor_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raising(context: object) -> None:
        raise error

    monkeypatch.setattr("xform.cli.doctor.session_of", raising)


def test_what_libraries_print_stays_out_of_the_document(
    xform: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(context: object) -> object:
        print("chatter")
        return session_of(context)

    monkeypatch.setattr("xform.cli.doctor.session_of", noisy)
    run = xform("doctor", "--json")
    assert run.json["exit_code"] == 0
    assert "chatter" in run.err


def test_stdout_is_restored(xform: Callable[..., object]) -> None:
    before = sys.stdout
    xform("doctor", "--json")
    assert sys.stdout is before


def test_help_needs_no_torch_and_is_quick() -> None:
    code = (
        "import sys, xform.cli; code = xform.cli.main(['optimize', '--help']);"
        "assert code == 0; assert not {'torch', 'onnxruntime', 'onnx_ir'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    assert "--require" in done.stdout


def test_python_m_xform_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xform", "--version"], capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0
    assert done.stdout.startswith("xform 0.")


def test_a_closed_pipe_is_no_error(mlp: Path) -> None:
    command = f"{sys.executable} -m xform inspect {mlp} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "0"
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [("optimize {0} --max-size 1B --report r.json --verbose", 6), ("optimize {0} --require attention", 4)],
)
def test_a_closed_pipe_does_not_hide_how_a_command_ended(mlp: Path, tmp_path: Path, arguments: str, code: int) -> None:
    """Both streams have a reader that has gone before anything is written."""
    command = [sys.executable, "-u", "-m", "xform", *arguments.format(mlp).split()]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=writer, env=_environment(), cwd=tmp_path, check=False)
    os.close(writer)
    assert done.returncode == code
    assert (tmp_path / "r.json").exists() == ("--report" in arguments)


def test_interrupting_a_real_run_ends_with_130_and_leaves_nothing(mlp: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xform", "bench", str(mlp), str(mlp), "--rounds", "1000", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignore"
    )
    try:
        deadline = time.monotonic() + 120
        while not psutil.Process(process.pid).children():  # it measures once its workers are there
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert json.loads(out)["exit_code"] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100"}
