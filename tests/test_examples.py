"""Examples run. The sentence model is run by `make demo`; here are the quick ones, each in a process of its own."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _run(name: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_pass(tmp_path: Path) -> None:
    text = _run("own_pass.py", tmp_path)
    assert "Mul(%x, 0.125)" in text and "Tanh" in text
    assert (
        "done        multiply_by_root/divide_by_root at scaled, root" in text
    )  # names of the nodes as the model has them
    assert "rolled back wrong at y: output 'y'" in text


def test_gate(tmp_path: Path) -> None:
    text = _run("gate.py", tmp_path)
    assert "1 gelu" in text
    assert "required attention>=1, found 0" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_reparameterize(tmp_path: Path) -> None:
    text = _run("reparameterize.py", tmp_path)
    assert "captured:  2 Add, 3 BatchNormalization, 2 Conv, 1 Relu\n  optimized: 1 Conv, 1 Relu\n" in text
    assert "captured:  2 Add, 3 MatMul, 1 Mul\n  optimized: 1 Add, 1 MatMul\n" in text
    assert "optimized: 2 Conv\n" in text and "left: wide/conv2d_1, point/conv2d: the convolution pads" in text


def test_torch_backend(tmp_path: Path) -> None:
    text = _run("torch_backend.py", tmp_path)
    assert "torch.nn.functional.rms_norm(x, [16], norm_weight" in text
    assert "gradients of 7 parameters" in text


def test_int8_groups(tmp_path: Path) -> None:
    text = _run("int8_groups.py", tmp_path)
    assert text.count("relative error") == 3 and "a scale per 32 channels: relative error 0.0" in text


def test_int8_channels(tmp_path: Path) -> None:
    text = _run("int8_channels.py", tmp_path)
    assert "before int8: scale_channels; error with everything in int8: as it is 0.5" in text
    assert "channels moved around zero" in text.split("channels far from zero")[1].split(";")[0]  # what was applied


def test_cpu_int8(tmp_path: Path) -> None:
    text = _run("cpu_int8.py", tmp_path)
    assert "4 products in int8" in text and "12 operators run on packed tokens" in text


def test_classifier(tmp_path: Path) -> None:
    text = _run("classifier.py", tmp_path)
    assert "scaled_dot_product_attention_3 on 1 of 64 rows" in text
    assert "89.6 million operations, 110.6 with rows that nobody reads" in text


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    runpy.run_path(str(EXAMPLES / "generate.py"), run_name="__main__")  # here: see conftest.py
    text = capsys.readouterr().out
    assert "greedy: the same 16 tokens" in text and "beams: the same 16 tokens" in text
