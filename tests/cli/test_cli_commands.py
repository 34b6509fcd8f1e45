"""Every command on small models: what it tells, what it writes, how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_support import Run, save_mlp

from xform import __version__ as package_version

CLI = Callable[..., Run]


class TestInspect:
    def test_the_dump_is_on_stdout_and_the_summary_on_stderr(self, xform: CLI, mlp: Path) -> None:
        run = xform("inspect", mlp)
        assert run.code == 0
        assert run.out.startswith("graph mlp(%x: f32[batch,8])")
        assert "/fc1/MatMul" in run.out
        assert "fingerprint" in run.err and "1 silu" in run.err

    def test_json_has_interface_operators_and_fingerprint(self, xform: CLI, mlp: Path) -> None:
        document = xform("inspect", mlp, "--json").json
        assert document["opset"] == 17
        assert document["inputs"][0] == {"name": "x", "dtype": "FLOAT", "shape": ["batch", 8], "type": "f32[batch,8]"}
        assert document["operators"]["MatMul"] == 2
        assert document["parameters"] == 8 * 16 + 16 + 16 * 4
        assert len(document["fingerprint"]) == 64

    def test_counts_take_sizes_of_dynamic_dims(self, xform: CLI, mlp: Path) -> None:
        one = xform("inspect", mlp, "--counts", "--json").json["counts"]
        four = xform("inspect", mlp, "--counts", "--json", "--size", "batch=4").json["counts"]
        assert one["flops"] > 2 * (8 * 16 + 16 * 4)
        assert four["flops"] == 4 * one["flops"]
        assert one["assumed"] == ["batch"] and four["assumed"] == []

    def test_counts_for_humans_name_operators_and_nodes(self, xform: CLI, mlp: Path) -> None:
        run = xform("inspect", mlp, "--counts", "--nodes")
        assert "MatMul" in run.out and "/fc2/MatMul" in run.out and "total" in run.out
        assert "MatMul" not in run.err

    @pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"\xff" * 100])
    def test_a_damaged_file_ends_with_3(self, xform: CLI, mlp: Path, damage: Callable[[bytes], bytes]) -> None:
        mlp.write_bytes(damage(mlp.read_bytes()))
        run = xform("inspect", mlp)
        assert run.code == 3
        assert "Traceback" not in run.err and "mlp.onnx" in run.err

    def test_a_missing_file_ends_with_3(self, xform: CLI) -> None:
        assert xform("inspect", "absent.onnx").code == 3


class TestVerify:
    def test_equal_models(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        other = save_mlp(tmp_path / "other.onnx", identity=True)
        run = xform("verify", mlp, other, "--json")
        assert run.code == 0
        assert run.json["state"] == "ok"
        assert len({row["inputs"] for row in run.json["outputs"]}) >= 2  # several sizes of the dynamic dim

    def test_different_models_end_with_5_and_the_error(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        other = save_mlp(tmp_path / "other.onnx", weight=1.01)
        run = xform("verify", mlp, other, "--json")
        assert run.code == 5
        assert 0.005 < run.json["max_rel_error"] < 0.05
        assert xform("verify", mlp, other, "--tolerance", "0.1").code == 0

    def test_given_inputs_are_used(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", x=np.zeros((7, 8), np.float32))
        run = xform("verify", mlp, mlp, "--inputs", "x.npz", "--json")
        assert run.code == 0
        assert all(row["inputs"].startswith(("given", "derived")) for row in run.json["outputs"])

    def test_an_unknown_input_name_ends_with_2(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", z=np.zeros((7, 8), np.float32))
        run = xform("verify", mlp, mlp, "--inputs", "x.npz")
        assert run.code == 2
        assert "z" in run.err

    def test_another_interface_ends_with_5(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        model = onnx.load(mlp)
        model.graph.output[0].name = model.graph.node[-1].output[0] = "z"
        onnx.save(model, tmp_path / "other.onnx")
        run = xform("verify", mlp, "other.onnx")
        assert run.code == 5
        assert "interfaces differ" in run.err


class TestDiff:
    def test_the_same_graph(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        shutil.copy(mlp, tmp_path / "copy.onnx")
        run = xform("diff", mlp, "copy.onnx", "--json")
        assert run.code == 0 and run.json["same"] is True

    def test_operators_nodes_and_text(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        other = save_mlp(tmp_path / "other.onnx", identity=True, hidden=32)
        document = xform("diff", mlp, other, "--json").json
        assert document["same"] is False
        assert document["operators"] == {"Identity": [0, 1]}
        assert document["added"] == [{"name": "/id", "op": "Identity"}]
        assert document["removed"] == []
        assert [entry["name"] for entry in document["changed"]] == ["/fc2/MatMul"]
        assert document["parameters"] == [8 * 16 + 16 + 16 * 4, 8 * 32 + 32 + 32 * 4]
        text = xform("diff", mlp, other, "--text").out
        assert any(line.startswith("+") and "Identity" in line for line in text.splitlines())

    def test_interface_changes_are_told(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        model = onnx.load(mlp)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        onnx.save(model, tmp_path / "static.onnx")
        document = xform("diff", mlp, "static.onnx", "--json").json
        assert document["interface"][0] == "input x: f32[batch,8] -> f32[3,8]"


class TestBench:
    def test_models_are_compared_with_the_first(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        larger = save_mlp(tmp_path / "larger.onnx", hidden=4096)
        options = ("--rounds", "3", "--seconds", "0.02", "--threads", "1", "--size", "batch=64", "--json")
        document = xform("bench", larger, mlp, *options).json
        first, second = document["models"]
        assert first["speedup"] == 1.0
        assert second["speedup"] > 2
        assert len(first["rounds_ms"]) == 3
        assert document["inputs"] == {"x": {"dtype": "float32", "shape": [64, 8]}}

    def test_a_model_that_does_not_load_ends_with_7(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"no model")
        run = xform("bench", mlp, "bad.onnx", "--rounds", "1")
        assert run.code == 7 and "bad.onnx" in run.err


class TestPassesAndDoctor:
    def test_every_pass_is_listed_with_fidelity_and_purpose(self, xform: CLI) -> None:
        from xform.passes import PASSES

        document = xform("passes", "--json").json
        assert [entry["name"] for entry in document["passes"]] == list(PASSES)
        assert all(entry["fidelity"] in ("exact", "approximate", "trained") for entry in document["passes"])
        assert all(entry["doc"] for entry in document["passes"])
        assert set(document["presets"]["exact"]) <= set(PASSES)

    def test_doctor_knows_this_machine(self, xform: CLI) -> None:
        document = xform("doctor", "--json").json
        assert document["environment"]["versions"]["onnxruntime"]
        here = {"target": "cpu", "available": True, "missing": None, "hint": None}
        assert here in document["backends"]["onnxruntime"]

    def test_doctor_says_what_to_do_about_what_is_missing_without_options_of_other_commands(
        self, xform: CLI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.backends.cuda.is_built", lambda: False)
        found = xform("doctor", "--json").json["backends"]["torch_triton"]
        (cuda,) = (one for one in found if one["target"] == "cuda")
        assert "build without CUDA" in cuda["missing"] and "pytorch.org" in cuda["hint"]
        told = xform("doctor").out
        assert "what to do: install a CUDA build of torch" in told
        assert "compile_only" not in told and "--compile" not in told

    def test_tables_for_humans_go_to_stdout(self, xform: CLI) -> None:
        for command in ("passes", "doctor"):
            run = xform(command)
            assert run.err == "" and len(run.out.splitlines()) > 5


class TestOptimize:
    def test_model_and_report_are_written_and_told(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        before = mlp.read_bytes()
        run = xform("optimize", mlp, "-o", "out.onnx", "--report", "report.json", "--json")
        assert run.code == 0, run.err
        assert mlp.read_bytes() == before
        assert run.json["files"] == [str(tmp_path / "out.onnx")]
        written = json.loads((tmp_path / "report.json").read_text())
        assert written["schema"] == "xform.report/1" and written["preset"] == "exact"
        assert written["verification"]["passed"] is True
        assert run.json["report"] == written
        model = onnx.load(tmp_path / "out.onnx")
        assert model.opset_import[0].version == 17
        assert (model.producer_name, model.producer_version) == ("xform", package_version)
        assert xform("verify", mlp, "out.onnx").code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.onnx", "out.onnx", "report.json"]

    def test_without_output_nothing_is_written(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        run = xform("optimize", mlp)
        assert run.code == 0
        assert "give -o" in run.err and run.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["mlp.onnx"]

    def test_an_opset_is_obeyed(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        assert xform("optimize", mlp, "-o", "out.onnx", "--opset", "13", "--portable").code == 0
        model = onnx.load(tmp_path / "out.onnx")
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 13}

    def test_met_requirements_are_in_the_document(self, xform: CLI, mlp: Path) -> None:
        run = xform("optimize", mlp, "--require", "silu>=1", "--require", "attention==0", "--json")
        assert run.code == 0
        assert [entry["met"] for entry in run.json["requirements"]] == [True, True]

    def test_an_unmet_requirement_ends_with_4_and_writes_no_model(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        run = xform("optimize", mlp, "-o", "out.onnx", "--report", "r.json", "--require", "attention>=1", "--json")
        assert run.code == 4
        assert "found 0" in run.err
        assert run.json["requirements"] == [{"require": "attention>=1", "found": 0, "met": False}]
        assert not (tmp_path / "out.onnx").exists()
        assert (tmp_path / "r.json").exists()

    def test_a_missed_size_budget_ends_with_6_and_writes_no_model(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        assert xform("optimize", mlp, "-o", "out.onnx", "--max-size", "10B").code == 6
        assert not (tmp_path / "out.onnx").exists()
        assert xform("optimize", mlp, "-o", "out.onnx", "--max-size", "10MB").code == 0

    def test_latency_is_measured_and_budgeted(self, xform: CLI, mlp: Path) -> None:
        run = xform("optimize", mlp, "--max-latency-ratio", "0.001", "--size", "batch=4", "--json")
        assert run.code == 6
        assert run.json["report"]["latency"]["rounds"] > 0
        assert "latency after/before" in run.json["error"]["what"]

    def test_an_error_budget_needs_verification(self, xform: CLI, mlp: Path) -> None:
        assert xform("optimize", mlp, "--max-error", "1e-3").code == 0
        run = xform("optimize", mlp, "--max-error", "1e-3", "--verify", "off")
        assert run.code == 6 and "nothing was compared" in run.err

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--preset", "exakt"],
            ["--passes", "no_such_pass"],
            ["--set", "raise_gelu.no_such_option=1"],
            ["--verify", "sometimes"],
            ["--backend", "no_such_backend"],
            ["--target", "abacus"],
            ["--require", "atention"],
            ["--max-size", "big"],
            ["--inputs", "absent.npz"],
            ["--dynamic", "batch"],
            ["--tolerance", "-1"],
        ],
    )
    def test_bad_arguments_end_with_2(self, xform: CLI, mlp: Path, arguments: list[str]) -> None:
        run = xform("optimize", mlp, *arguments)
        assert run.code == 2, run.err
        assert "Traceback" not in run.err

    def test_a_target_without_backend_ends_with_7(self, xform: CLI, mlp: Path) -> None:
        assert xform("optimize", mlp, "--target", "cuda").code == 7

    def test_the_input_is_never_overwritten(self, xform: CLI, mlp: Path, tmp_path: Path) -> None:
        before = mlp.read_bytes()
        (tmp_path / "link.onnx").symlink_to(mlp)
        for output in ("mlp.onnx", "./mlp.onnx", "link.onnx"):
            run = xform("optimize", mlp, "-o", output)
            assert run.code == 2 and "overwrite the input" in run.err
        assert xform("optimize", mlp, "--report", "mlp.onnx").code == 2
        assert mlp.read_bytes() == before

    def test_an_output_that_cannot_be_written_ends_with_2_before_any_work(self, xform: CLI, mlp: Path) -> None:
        run = xform("optimize", mlp, "-o", "absent/out.onnx")
        assert run.code == 2
        assert "absent" in run.err and "verified" not in run.err


class TestExplainAndBisect:
    def test_explain_tells_about_one_concept(self, xform: CLI, mlp: Path) -> None:
        document = xform("explain", mlp, "silu", "--json").json
        assert document["found"] == {"silu": 1}
        assert all("silu" in (r["concept"], r["rule"], r["pass_name"], *r["touches"]) for r in document["remarks"])

    def test_explain_of_an_unknown_concept_ends_with_2(self, xform: CLI, mlp: Path) -> None:
        run = xform("explain", mlp, "atention")
        assert run.code == 2 and "did you mean 'attention'" in run.err

    def test_bisect_finds_nothing_in_good_passes(self, xform: CLI, mlp: Path) -> None:
        run = xform("bisect", mlp, "--json")
        assert run.code == 0
        assert run.json["bad_pass"] is None
