"""Options and their help: groups, -h, completion, -q, -, suffixes, options given twice."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer.main
from cli_support import Run
from onnx import TensorProto, helper

import xform as package
from xform.cli import _build_app
from xform.cli.common import parse_input_shapes, parse_limits
from xform.cli.spelling import OPTIONS
from xform.errors import UsageError

CLI = Callable[..., Run]
COMMANDS = ["optimize", "inspect", "explain", "verify", "bisect", "diff", "bench", "passes", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_short_help_with_groups_and_examples(xform: CLI, command: str) -> None:
    run = xform(command, "-h")
    assert run.code == 0 and run.err == ""
    assert run.out == xform(command, "--help").out
    assert "Examples:" in run.out and f"xform {command}" in run.out
    assert "Common" in run.out and "--quiet" in run.out
    assert xform("-h").code == 0


def test_the_options_of_optimize_are_in_groups_by_what_they_are_for(xform: CLI) -> None:
    out = xform("optimize", "--help").out
    groups = ["What comes out", "What goes in", "What runs", "Verification", "Demands", "Target", "Common"]
    places = [out.index(f"─ {group} ") for group in groups]
    assert places == sorted(places)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_a_shell_and_completes(shell: str) -> None:
    command = [sys.executable, "-m", "xform", "completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    own = {"bash": "COMPREPLY", "zsh": "#compdef xform", "fish": "complete --command xform"}
    assert "_XFORM_COMPLETE" in done.stdout and own[shell] in done.stdout
    if shell == "bash":
        asked = {
            **os.environ,
            "_XFORM_COMPLETE": "complete_bash",
            "COMP_WORDS": "xform optimize --pre",
            "COMP_CWORD": "2",
        }
        done = subprocess.run(command[:3], capture_output=True, text=True, timeout=120, env=asked)
        assert done.stdout.split() == ["--preset", "--precision"] or set(done.stdout.split()) == {
            "--preset",
            "--precision",
        }


def test_completion_for_an_unknown_shell_is_refused(xform: CLI) -> None:
    run = xform("completion", "tcsh")
    assert run.code == 2 and "no completion for the shell 'tcsh'" in run.err and "bash" in run.err


def test_every_option_of_optimize_is_a_parameter_of_the_api() -> None:
    """Options and parameters differ in what only a command line needs, and in nothing else."""
    command = typer.main.get_command(_build_app()).commands["optimize"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    parameters = inspect.signature(package.optimize).parameters
    assert {OPTIONS[name] for name in parameters if OPTIONS[name]} <= options
    ours = {"--output", "--report", "--verbose", "--set", "--size", "--require", "--measure", "--quiet", "--json"}
    budgets = {"--max-latency-ratio", "--max-size", "--max-error"}
    parameters_as_options = {OPTIONS[name] for name in parameters}
    assert options <= parameters_as_options | ours | budgets | {"--debug", "--help"}


def test_quiet_leaves_results_warnings_and_errors(xform: CLI, mlp: Path) -> None:
    assert xform("optimize", mlp, "-o", "out.onnx", "-q").err == ""
    assert xform("verify", mlp, "out.onnx", "--quiet").out.strip().endswith("equal within tolerance")
    run = xform("inspect", mlp, "--quiet")
    assert run.err == "" and run.out.startswith("graph mlp")
    assert "error: " in xform("inspect", "absent.onnx", "-q").err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--report", "a.json", "--report", "b.json"),
        ("-o", "a.onnx", "-o", "b.onnx"),
        ("-o", "a.onnx", "--output", "b.onnx"),
        ("--preset", "exact", "--preset", "int8"),
        ("--inputs=a.npz", "--inputs=b.npz"),
    ],
)
def test_an_option_given_twice_is_refused(xform: CLI, mlp: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = xform("optimize", mlp, *arguments)
    assert run.code == 2 and "twice" in run.err and "--" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]


def test_options_that_are_lists_may_be_repeated(xform: CLI, mlp: Path) -> None:
    run = xform("optimize", mlp, "--require", "silu>=1", "--require", "attention==0", "-v", "-v", "--verify", "off")
    assert run.code == 0, run.err


@pytest.mark.parametrize("name", ["m.pt", "m.xml", "m.pt2", "m.safetensors", "m", "m.onnx.gz", "m.ONNX"])
def test_an_output_of_another_format_is_refused_before_any_work(xform: CLI, mlp: Path, name: str) -> None:
    run = xform("optimize", mlp, "-o", name)
    assert run.code == 2 and ".onnx" in run.err and "wrote" not in run.err
    if name in ("m.xml", "m.pt2", "m.safetensors"):
        assert "--backend" in run.err


@pytest.mark.parametrize("name", ["r.txt", "r", "r.onnx", "r.yaml"])
def test_a_report_of_another_format_is_refused(xform: CLI, mlp: Path, tmp_path: Path, name: str) -> None:
    run = xform("optimize", mlp, "--report", name)
    assert run.code == 2 and ".json or .html" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]


def test_a_model_comes_from_stdin_and_goes_to_stdout(mlp: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xform", "optimize", "-", "-o", "-", "--verify", "off", "-q"]
    done = subprocess.run(command, input=mlp.read_bytes(), capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    model = onnx.load_from_string(done.stdout)
    assert [value.name for value in model.graph.output] == ["y"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("optimize", "-", "--measure"),
        ("optimize", "mlp.onnx", "-o", "-", "--json"),
        ("optimize", "mlp.onnx", "--report", "-"),
        ("optimize", "mlp.onnx", "--inputs", "-"),
        ("optimize", "mlp.onnx", "--calibration", "-", "--preset", "int8"),
        ("verify", "mlp.onnx", "-"),
        ("diff", "mlp.onnx", "-"),
        ("bench", "-"),
    ],
)
def test_where_a_dash_means_nothing_it_is_refused(xform: CLI, mlp: Path, arguments: tuple[str, ...]) -> None:
    run = xform(*arguments)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err and "-" in run.err


@pytest.mark.parametrize("command", [("verify", "mlp.onnx", "mlp.onnx"), ("bisect", "mlp.onnx"), ("bench", "mlp.onnx")])
def test_a_negative_seed_ends_with_2(xform: CLI, mlp: Path, command: tuple[str, ...]) -> None:
    run = xform(*command, "--seed", "-1")
    assert run.code == 2 and "--seed" in run.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("optimize", "mlp.onnx", "-o", "x" * 300 + ".onnx"),
        ("optimize", "mlp.onnx", "--dynamic", "batch=0:4"),
        ("optimize", "mlp.onnx", "--tolerance", "nan"),
        ("optimize", "mlp.onnx", "--max-error", "nan"),
        ("bench", "mlp.onnx", "--threads", "100000"),
        ("explain", "mlp.onnx", ""),
    ],
)
def test_values_that_mean_nothing_end_with_2(xform: CLI, mlp: Path, arguments: tuple[str, ...]) -> None:
    run = xform(*arguments)
    assert run.code == 2, run.err
    assert len(run.err) < 1500


class TestLimits:
    def test_values_with_units(self) -> None:
        assert parse_limits(["memory=16GiB", "constants=5MB", "nodes=1000", "seconds=2.5"]) == {
            "memory": 16 * 2**30,
            "constants": 5 * 10**6,
            "nodes": 1000,
            "seconds": 2.5,
        }
        assert parse_limits(None) is None

    @pytest.mark.parametrize("text", ["memory", "memory=", "=1", "memory=much", "nodes=1GiB", "nodes=0", "tokens=5"])
    def test_bad_ones_end_with_2(self, xform: CLI, mlp: Path, text: str) -> None:
        run = xform("inspect", mlp, "--limit", text)
        assert run.code == 2 and "limit" in run.err

    def test_twice_the_same_is_refused(self) -> None:
        with pytest.raises(UsageError, match="twice"):
            parse_limits(["nodes=1", "nodes=2"])

    def test_they_hold_for_what_the_command_reads(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 8), np.float32))
        run = xform("verify", mlp, mlp, "--inputs", "x.npz", "--limit", "memory=1kB")
        assert run.code in (2, 3) and "--limit memory=" in run.err
        run = xform("optimize", mlp, "--inputs", "x.npz", "--limit", "memory=1kB")
        assert run.code in (2, 3) and "--limit memory=" in run.err
        assert xform("optimize", mlp, "--limit", "memory=1GiB", "--threads", "1", "--input-shape", "x:2,8").code == 0

    @pytest.mark.parametrize("command", ["verify", "explain", "bisect", "optimize"])
    def test_given_inputs_raise_them_in_every_command(self, xform: CLI, tmp_path: Path, command: str) -> None:
        """A run that takes more than the limit, and less than what the inputs earn."""
        node = helper.make_node("Relu", ["x"], ["y"])
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1000]) for name in "xy"]
        graph = helper.make_graph([node], "g", values[:1], values[1:])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "m.onnx")
        rng = np.random.default_rng(3)
        np.savez(tmp_path / "x.npz", x=rng.standard_normal((10_000, 1000)).astype(np.float32))
        models = ["m.onnx", "m.onnx"] if command == "verify" else ["m.onnx"]
        run = xform(command, *models, "--inputs", "x.npz", "--limit", "memory=10MB")
        assert run.code == 0, run.err


class TestInputShapes:
    def test_numbers_and_names(self) -> None:
        assert parse_input_shapes(["x:1,3,224,224", "a:b:batch, 8"]) == {"x": (1, 3, 224, 224), "a:b": ("batch", 8)}
        assert parse_input_shapes(["scalar:", "y:-1,4"]) == {"scalar": (), "y": (-1, 4)}
        assert parse_input_shapes(None) is None

    @pytest.mark.parametrize("text", ["x", ":1,2", "x:1,,2", "x:-2", "x:1.5", "x:1x2"])
    def test_bad_ones_end_with_2(self, xform: CLI, mlp: Path, text: str) -> None:
        run = xform("optimize", mlp, "--input-shape", text)
        assert run.code == 2 and "x:1,3,224,224" in run.err

    def test_one_input_twice_is_refused(self) -> None:
        with pytest.raises(UsageError, match="twice"):
            parse_input_shapes(["x:1", "x:2"])


class TestStreams:
    """What was asked for is on stdout, the rest on stderr."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ("explain", "mlp.onnx", "silu"),
            ("explain", "mlp.onnx"),
            ("verify", "mlp.onnx", "mlp.onnx"),
            ("diff", "mlp.onnx", "mlp.onnx"),
            ("bisect", "mlp.onnx"),
            ("passes",),
            ("doctor",),
        ],
    )
    def test_results_are_on_stdout_alone(self, xform: CLI, mlp: Path, arguments: tuple[str, ...]) -> None:
        run = xform(*arguments)
        assert run.code == 0
        assert run.out.strip() and run.err == ""

    def test_lines_on_stdout_are_whole(self, xform: CLI, mlp: Path) -> None:
        model = onnx.load(mlp)
        for node in model.graph.node:
            node.name = f"{node.name}/{'deep/' * 15}end"
        onnx.save(model, mlp)
        lines = xform("explain", mlp).out.splitlines()
        assert any(line.count(f"{'deep/' * 15}end") == 2 for line in lines)

    def test_differences_and_culprits_are_results_and_the_error_is_not(self, xform: CLI, mlp: Path) -> None:
        model = onnx.load(mlp)
        model.graph.node[-1].input[0] = "b"
        onnx.save(model, "other.onnx")
        run = xform("verify", mlp, "other.onnx")
        assert run.code == 5 and "differs" in run.out and "error: " in run.err

    def test_the_report_of_optimize_is_beside_the_result(self, xform: CLI, mlp: Path) -> None:
        run = xform("optimize", mlp, "-o", "out.onnx")
        assert run.out == "" and "verified" in run.err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["optimize", "MODEL", "--size", "bacth=3"], 2, "no dynamic dimension named 'bacth'"),
        (["inspect", "MODEL", "--counts", "--size", "bacth=3"], 2, "no dynamic dimension named 'bacth'"),
        (["inspect", "MODEL", "--nodes"], 2, "--nodes says nothing without --counts"),
        (["inspect", "MODEL", "--size", "batch=3"], 2, "--size says nothing without --counts"),
        (["bench", "MODEL", "missing.onnx"], 3, "there is no such model file"),
        (["optimize", "MODEL", "--precision", "fp16"], 2, "use one of float32, float16, bfloat16"),
        (
            ["optimize", "MODEL", "--precision", "bfloat16"],
            2,
            "leave --precision out for the model's own, or choose --b",
        ),
        (["optimize", "MODEL", "--padding", "tight"], 2, "--padding tight is unknown"),
        (["optimize", "MODEL", "--tolerance", "-1"], 2, "--tolerance must be a number >= 0"),
        (["optimize", "MODEL", "--calibration", "x.npz"], 2, "--calibration was given, but every pass is exact"),
        (
            ["optimize", "MODEL", "--target", "cuda", "--backend", "openvino"],
            7,
            "or --backend torch_triton for",
        ),
    ],
)
def test_what_would_say_nothing_is_refused_in_the_spelling_of_the_command_line(
    xform: CLI, mlp: Path, arguments: list[str], code: int, told: str
) -> None:
    run = xform(*(str(mlp) if argument == "MODEL" else argument for argument in arguments))
    assert run.code == code and told in run.err, run.err


def test_explain_takes_the_data_and_the_backend_of_an_int8_run(xform: CLI, mlp: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))
    assert xform("explain", mlp, "int8").out.startswith("int8: 0 in the result; no pass touched it")
    options = ["--preset", "int8", "--calibration", tmp_path / "data.npz"]
    run = xform("explain", mlp, "int8", *options)
    assert run.code == 0 and "RANDOM" not in run.err and "too small to pay" in run.out
    assert "static: nothing in int8" in xform("explain", mlp, "int8", *options, "--backend", "openvino").out
    assert xform("bisect", mlp, *options).code == 0
    found = xform("explain", mlp, "reparameterization", "--json").json["found"]
    assert found == {"reparameterization": None}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dynamic", "n=1:4", "--dynamic", "n=2:8"], "--dynamic n"),
        (["--size", "n=1", "--size", " n =1"], "--size n"),
        (["--set", "fold_constants.input_limit=1", "--set", "fold_constants.input_limit=2"], "input_limit"),
    ],
)
def test_what_is_given_twice_is_refused(xform: CLI, mlp: Path, arguments: list[str], named: str) -> None:
    run = xform("optimize", mlp, *arguments)
    assert run.code == 2 and named in run.err and "given twice" in run.err


@pytest.mark.parametrize("arguments", [["--measure"], ["--max-latency-ratio", "2"]])
def test_what_cannot_be_measured_is_refused_before_any_work(xform: CLI, mlp: Path, arguments: list[str]) -> None:
    run = xform("optimize", mlp, "--backend", "torch_triton", *arguments)
    assert run.code == 2 and "not of torch_triton" in run.err and "verified" not in run.err


def test_two_views_of_a_model_are_shown_one_at_a_time(xform: CLI, mlp: Path) -> None:
    run = xform("inspect", mlp, "--streams", "--counts")
    assert run.code == 2 and "--streams" in run.err and "--counts" in run.err


def test_inputs_and_outputs_in_another_order_are_a_difference(xform: CLI, tmp_path: Path) -> None:
    def write(name: str, outputs: list[str]) -> Path:
        nodes = [helper.make_node("Relu", ["x"], ["a"], name="one"), helper.make_node("Neg", ["x"], ["b"], name="two")]
        value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("x", *outputs)]
        model = helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]), ir_version=8)
        model.opset_import[0].version = 17
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    first, second = write("first.onnx", ["a", "b"]), write("second.onnx", ["b", "a"])
    run = xform("diff", first, second, "--json")
    assert run.code == 0 and run.json["same"] is False
    assert run.json["interface"] == ["outputs in another order: a, b -> b, a"]
    assert xform("diff", first, first, "--json").json["same"] is True
