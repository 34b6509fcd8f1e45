"""Fixtures of the command line: a way to run commands, and a model to run them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Run, save_mlp

from xform.cli import main


@pytest.fixture
def xform(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run a command line in the temporary folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    """See `save_mlp`."""
    return save_mlp(tmp_path / "mlp.onnx")


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have COLUMNS set, which decides how lines are folded."""
    monkeypatch.delenv("COLUMNS", raising=False)
