"""Latency: every contender in a process of its own, measured in turn."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest

from xform.errors import TargetError
from xform.report import latency
from xform.report.latency import Deployed, Loaded, Timing, compare, figures, measure, typical_rounds


def _model(path: Path, products: int) -> Path:
    """`products` products of a 256 x 256 matrix in a row."""
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32) / 16
    names = ["x", *[f"h{i}" for i in range(products - 1)], "y"]
    nodes = [onnx.helper.make_node("MatMul", [a, "w"], [b]) for a, b in itertools.pairwise(names)]
    dims = [256, 256]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, dims)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


FEEDS = {"x": np.ones((256, 256), np.float32)}


def test_the_smaller_model_is_found_faster(tmp_path: Path) -> None:
    large, small = _model(tmp_path / "large.onnx", 12), _model(tmp_path / "small.onnx", 2)
    steps: list[tuple[int, int]] = []
    report = compare(
        large,
        small,
        FEEDS,
        rounds=3,
        seconds=0.02,
        threads=1,
        progress=lambda _, done, total: steps.append((done, total)),
    )
    assert report.speedup > 1.5
    assert report.before_ms > report.after_ms > 0
    assert (report.rounds, report.threads) == (3, 1)
    assert steps == [(i, 6) for i in range(1, 7)]


def test_a_model_that_does_not_load_is_named(tmp_path: Path) -> None:
    good, bad = _model(tmp_path / "good.onnx", 1), tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    with pytest.raises(TargetError, match=r"bad\.onnx"):
        measure([good, bad], FEEDS, rounds=1, seconds=0)


def test_inputs_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="could not run"):
        measure([_model(tmp_path / "m.onnx", 1)], {"z": FEEDS["x"]}, rounds=1, seconds=0)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "../x", "a b", ""])
def test_an_input_may_have_any_name(tmp_path: Path, name: str) -> None:
    model = onnx.load(_model(tmp_path / "m.onnx", 1))
    name = name or "x" * 300
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    onnx.save(model, tmp_path / "m.onnx")
    (timing,) = measure([tmp_path / "m.onnx"], {name: FEEDS["x"]}, rounds=1, seconds=0)
    assert timing.runs >= 2


def test_what_is_loaded_stays_until_it_is_let_go(tmp_path: Path) -> None:
    first, second = (Deployed(_model(tmp_path / f"{n}.onnx", n)) for n in (1, 2))
    with Loaded() as loaded:
        contenders = loaded.contenders([first, second], FEEDS, 1)
        assert len(measure([second], FEEDS, rounds=1, seconds=0, threads=1, loaded=loaded)) == 1
        assert loaded.contenders([second, first], FEEDS, 1) == contenders[::-1]
        loaded.keep([second])
        assert [one.alive for one in contenders] == [False, True]
        again, other = loaded.contenders([second, second], FEEDS, 1)  # one model twice takes two processes
        assert again is contenders[1] and other not in contenders and other.alive
    assert not contenders[1].alive and not other.alive


def test_speedup_is_taken_within_rounds() -> None:
    drifting = Timing(Path("a"), (1.0, 2.0, 4.0), 3, 1.0)
    twice = Timing(Path("b"), (2.0, 4.0, 8.0), 3, 2.0)
    assert drifting.speedup_over(twice) == 2.0
    assert drifting.median_ms == 2.0


def test_figures_come_from_the_same_rounds_and_their_quotient_is_the_ratio() -> None:
    """A machine that is slow in some rounds: medians of all rounds would compare a slow round with a fast one."""
    slow = (100.0, 100.0, 195.0, 195.0, 195.0, 100.0, 195.0)
    before = Timing(Path("a"), slow, 7, 100.0, tuple(2 * ms for ms in slow))
    after = Timing(Path("b"), tuple(ms / 1.2 for ms in slow), 7, 80.0)
    old, new = figures([before, after])
    assert old.times_as_fast == 1.0
    assert new.times_as_fast == pytest.approx(1.2)
    assert old.p50_ms / new.p50_ms == new.times_as_fast
    assert old.p90_ms == 2 * old.p50_ms


def test_typical_rounds_are_the_middle_half_by_the_time_of_all_models() -> None:
    first = Timing(Path("a"), (1.0, 9.0, 2.0, 3.0), 4, 1.0)
    second = Timing(Path("b"), (1.0, 9.0, 2.0, 3.0), 4, 1.0)
    assert typical_rounds([first, second]) == [2, 3]
    assert typical_rounds([Timing(Path("a"), (1.0,), 1, 1.0)]) == [0]


def test_what_compare_reports_is_consistent(tmp_path: Path) -> None:
    model = _model(tmp_path / "m.onnx", 2)
    report = compare(model, model, FEEDS, rounds=5, seconds=0, threads=1)
    assert report.speedup == report.before_ms / report.after_ms


def test_a_worker_that_was_killed_is_an_error_of_the_target(tmp_path: Path) -> None:
    """Its unsent request must not come up again as a broken pipe, which a command takes for a reader that has gone."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    np.savez(tmp_path / "feeds.npz", **{"0": np.ones(2, np.float32)})
    worker = latency._Contender(Deployed(path), tmp_path / "feeds.npz", ["x"], 1)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(TargetError, match="its process ended with status -9"):
        worker._ask({"seconds": 0.01, "runs": 1})
