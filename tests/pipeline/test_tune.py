"""The measured choice: what competes, who wins, what is remembered. No clock: measurements are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import parse

import xform
from xform.backends import LowerOptions, get_backend
from xform.errors import TargetError, UsageError, XformWarning
from xform.pipeline import tune
from xform.report import latency_worker
from xform.report.environment import Environment
from xform.report.latency import Deployed, Timing
from xform.target import Target

CPU = Target("cpu", threads=1)
GRAPH = """g (float[b,4] x) => (float[b,4] y) { e = Div(x, x) y = Add(e, x) }"""
FEEDS = {"x": np.ones((2, 4), np.float32)}


class Clock:
    """Stands in for `measure`: milliseconds by file number, in the order of the candidates."""

    def __init__(self, milliseconds: Sequence[float]) -> None:
        self.milliseconds = milliseconds
        self.calls = 0
        self.broken: set[int] = set()
        self.fastest: dict[int, float] = {}  # runs of those that have one faster than their rounds

    def __call__(self, subjects: Sequence[Deployed], feeds: Mapping[str, Any], **options: Any) -> list[Timing]:
        self.calls += 1
        numbers = [int(subject.model.stem) for subject in subjects]
        if self.broken.intersection(numbers):
            raise TargetError("the runtime could not run the model: no kernel")
        times = [self.milliseconds[number] for number in numbers]
        fastest = [self.fastest.get(number, ms) for number, ms in zip(numbers, times, strict=True)]
        return [Timing(s.model, (ms,) * 3, 3, least) for s, ms, least in zip(subjects, times, fastest, strict=True)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XFORM_CACHE", str(tmp_path))
    yield


def competing(mode: tune.TuneMode = "quick") -> list[tune.Candidate]:
    model = parse(GRAPH)
    return tune.candidates(model, model, get_backend("onnxruntime", CPU), LowerOptions(), mode=mode)


def decide(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> tune.Decision:
    monkeypatch.setattr(tune, "measure", clock)
    return tune.choose(competing(), CPU, FEEDS, "quick")[2]


def test_the_model_as_it_came_competes_and_comes_last() -> None:
    assert [c.label for c in competing()] == ["onnxruntime", "input"]
    assert competing()[-1].options.verbatim


def test_forms_of_attention_compete_where_there_is_one() -> None:
    model = parse("g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention(q, q, q) }")
    backend = get_backend("onnxruntime", CPU)

    def labels(mode: tune.TuneMode, options: LowerOptions) -> list[str]:
        found = tune.candidates(model, model, backend, options, mode=mode)
        return [c.label for c in found]

    forms = ["onnxruntime, attention multi_head", "onnxruntime, attention written"]
    assert labels("full", LowerOptions()) == ["onnxruntime", *forms, "input"]
    assert labels("quick", LowerOptions()) == ["onnxruntime", "input"]
    assert labels("full", LowerOptions(portable=True)) == ["onnxruntime", "input"]


def test_other_backends_compete_unless_one_was_named() -> None:
    pytest.importorskip("openvino")
    model, backend = parse(GRAPH), get_backend("onnxruntime", CPU)

    def labels(options: LowerOptions) -> list[str]:
        others = tune.competitors(backend, CPU, options)
        return [c.label for c in tune.candidates(model, model, backend, options, mode="quick", others=others)]

    assert labels(LowerOptions()) == ["onnxruntime", "openvino", "input"]
    assert labels(LowerOptions(portable=True)) == ["onnxruntime", "input"]
    named = xform.optimize(model, tune="quick", backend="onnxruntime", inputs=FEEDS)
    assert set(named.artifact.metadata["tuning"]["milliseconds"]) == {"onnxruntime", "input"}


def test_where_quantized_each_backend_gets_its_form_and_float_competes() -> None:
    model, other, exact, backend = parse(GRAPH), parse(GRAPH), parse(GRAPH), get_backend("onnxruntime", CPU)
    openvino = get_backend("onnxruntime", CPU)  # stands in for another one
    found = tune.candidates(
        model, model, backend, LowerOptions(), mode="quick", others=[openvino], forms={"onnxruntime": other},
        exact=exact,
    )  # fmt: skip
    assert [c.label for c in found] == ["onnxruntime", "onnxruntime", *["onnxruntime, float"] * 2, "input"]
    assert [c.graph for c in found] == [model, other, exact, exact, model]


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = decide(monkeypatch, Clock([1.0, 2.0]))
    assert decision.chosen == "onnxruntime"
    assert decision.speedups == {"onnxruntime": 2.0, "input": 1.0}
    assert "chose onnxruntime" in decision.describe()


def test_the_input_stays_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, Clock([1.1, 1.0])).chosen == "input"
    assert decide(monkeypatch, Clock([1.001, 1.0])).remembered  # the same question


def test_between_equals_the_default_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, Clock([1.0, 1.0])).chosen == "onnxruntime"


class Heats(Clock):
    """Another clock for every heat."""

    def __init__(self, *heats: Sequence[float]) -> None:
        super().__init__(heats[0])
        self.heats = heats
        self.met: list[list[int]] = []

    def __call__(self, subjects: Sequence[Deployed], feeds: Mapping[str, Any], **options: Any) -> list[Timing]:
        if options.get("seconds"):  # else only whether it runs
            self.milliseconds = self.heats[len(self.met)]
            self.met.append([int(subject.model.stem) for subject in subjects])
        return super().__call__(subjects, feeds, **options)


def test_those_near_the_fastest_meet_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Heats([1.0, 1.05], [1.0, 1.25])
    decision = decide(monkeypatch, clock)
    assert clock.met == [[0, 1], [0, 1]]
    assert decision.chosen == "onnxruntime" and decision.speedups == {"onnxruntime": 1.15, "input": 1.0}  # all rounds


@pytest.mark.parametrize("first", [0.95, 0.5])
def test_where_two_heats_disagree_a_third_one_decides(monkeypatch: pytest.MonkeyPatch, first: float) -> None:
    clock = Heats([1.0, first], [1.0, 1.25], [1.0, 1.25])  # noise made the input look faster at first
    clock.fastest = {0: 0.5, 1: 0.5}  # where it was so much slower, it had quiet moments all the same
    decision = decide(monkeypatch, clock)
    assert clock.met == [[0, 1]] * 3
    assert decision.chosen == "onnxruntime" and decision.speedups == {"onnxruntime": 1.25, "input": 1.0}
    assert decision.milliseconds == {"onnxruntime": 1.0, "input": 1.25}


def test_what_is_clearly_slower_meets_nobody_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention(q, q, q) }")
    backend, options = get_backend("onnxruntime", CPU), LowerOptions()
    clock = Heats([1.0, 0.98, 2.0, 1.6], [0.9, 1.0], [0.9, 1.0])
    monkeypatch.setattr(tune, "measure", clock)
    feeds = {"q": np.ones((1, 2, 3, 4), np.float32)}
    decision = tune.choose(tune.candidates(model, model, backend, options, mode="full"), CPU, feeds, "full")[2]
    assert clock.met == [[0, 1, 2, 3], [0, 1], [0, 1]]
    assert decision.chosen == "onnxruntime"
    # against the input by way of what all heats measured: 1.6 times in the first one
    assert decision.speedups["onnxruntime"] == 1.6
    assert decision.speedups["onnxruntime, attention multi_head"] == pytest.approx(1.6 * 0.9)
    assert decision.speedups["onnxruntime, attention written"] == pytest.approx(0.8)


def test_what_takes_many_times_as_long_alone_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention(q, q, q) }")
    clock = Heats([1.0, 5.0, 1.0, 8.0], [1.0, 5.0, 1.0, 8.0])
    clock.milliseconds = [1.0, 5.0, 1.0, 8.0]
    monkeypatch.setattr(tune, "measure", clock)
    found = tune.candidates(model, model, get_backend("onnxruntime", CPU), LowerOptions(), mode="full")
    decision = tune.choose(found, CPU, {"q": np.ones((1, 2, 3, 4), np.float32)}, "full")[2]
    assert clock.met == [[0, 2, 3], [0, 2]]  # the input always does once
    assert decision.speedups["onnxruntime, attention multi_head"] == pytest.approx(1.6)  # told all the same


def test_what_met_nobody_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed(Heats):
        """The model as it came was disturbed while it ran alone."""

        def __call__(self, subjects: Sequence[Deployed], feeds: Mapping[str, Any], **options: Any) -> list[Timing]:
            if not options.get("seconds"):
                self.milliseconds = [1.0, 3.0, 1.0, 20.0]
            return super().__call__(subjects, feeds, **options)

    model = parse("g (float[1,2,3,4] q) => (float[1,2,3,4] y) { y = Attention(q, q, q) }")
    clock = Disturbed([1.0, 3.0, 1.2, 1.1], [1.0, 3.0, 1.2, 1.1])
    monkeypatch.setattr(tune, "measure", clock)
    found = tune.candidates(model, model, get_backend("onnxruntime", CPU), LowerOptions(), mode="full")
    decision = tune.choose(found, CPU, {"q": np.ones((1, 2, 3, 4), np.float32)}, "full")[2]
    assert clock.met == [[0, 2, 3], [0, 3]]
    assert decision.chosen == "onnxruntime"


@pytest.mark.parametrize(("milliseconds", "rounds"), [(1.0, [9, 25]), (1000.0, [9, 10]), (9000.0, [5, 5])])
def test_slow_models_meet_in_fewer_rounds(
    milliseconds: float, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    clock = Clock([milliseconds, milliseconds])

    def measure(subjects: Sequence[Deployed], feeds: Mapping[str, Any], **options: Any) -> list[Timing]:
        asked.append(options["rounds"])
        return clock(subjects, feeds, **options)

    monkeypatch.setattr(tune, "measure", measure)
    tune.choose(competing(), CPU, FEEDS, "full")
    assert asked == [1, 1, *rounds]


def test_a_round_of_a_slow_model_has_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(latency_worker, "SLOW", 1e9)
    assert len(latency_worker.one_round(lambda: calls.append(0), 0.0)) == 5 and len(calls) == 7
    monkeypatch.setattr(latency_worker, "SLOW", -1.0)
    calls.clear()
    assert len(latency_worker.one_round(lambda: calls.append(0), 0.0)) == 2 and len(calls) == 3


def test_a_decision_is_remembered_and_needs_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([1.0, 2.0])
    first = decide(monkeypatch, clock)
    calls = clock.calls
    again = decide(monkeypatch, clock)
    assert clock.calls == calls and again.remembered and not first.remembered
    assert (again.chosen, again.milliseconds) == (first.chosen, first.milliseconds)


def test_weights_do_not_matter_for_what_is_remembered_but_sizes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(number: float, rows: int) -> str:
        model = parse(
            f"g (float[b,4] x) => (float[b,4] y) <float[4] w = {{{number}, 2.0, 3.0, 4.0}}> {{ y = Add(x, w) }}"
        )
        found = tune.candidates(model, model, get_backend("onnxruntime", CPU), LowerOptions(), mode="quick")
        monkeypatch.setattr(tune, "measure", Clock([1.0, 2.0]))
        return tune.choose(found, CPU, {"x": np.ones((rows, 4), np.float32)}, "quick")[2].key

    assert key(1.0, 2) == key(5.0, 2) != key(1.0, 3)


def test_another_state_of_the_code_or_of_a_runtime_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, Clock([1.0, 2.0]))
    monkeypatch.setattr(tune, "code_fingerprint", lambda: "another lowering")
    assert not decide(monkeypatch, Clock([1.0, 2.0])).remembered
    here = Environment.here()
    for package in ("onnxruntime", "openvino"):
        other = replace(here, versions={**here.versions, package: "1999.1"})
        monkeypatch.setattr(Environment, "here", staticmethod(lambda other=other: other))
        assert not decide(monkeypatch, Clock([1.0, 2.0])).remembered
        assert decide(monkeypatch, Clock([1.0, 2.0])).remembered


def test_the_environment_tells_the_version_of_every_runtime_that_is_installed() -> None:
    here = Environment.here()
    for package in tune.MEASURABLE:
        assert (package in here.versions) == (find_spec(package) is not None)


def entry(**changed: Any) -> dict[str, Any]:
    good = {"chosen": "input", "speedups": {"input": 1.0}, "milliseconds": {"input": 1.0}, "failed": {}}
    return {**good, "remembered": False, "key": KEY, **changed}


KEY = "the key"  # stands for the one of the decision


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2]",
        "null",
        "[" * 100_000,
        "9" * 5000,
        "\xff",
        {},
        entry(more=1),
        entry(key="0" * 32),
        entry(remembered="yes"),
        entry(chosen="no candidate"),
        entry(chosen=["input"]),
        entry(chosen={}),
        entry(milliseconds="abc"),
        entry(milliseconds=None),
        entry(milliseconds={"input": "1.0"}),
        entry(milliseconds={"input": float("nan")}),
        entry(milliseconds={"input": -1.0}),
        entry(milliseconds={"input": True}),
        entry(milliseconds={"\x1b[31mfoo": 1.0}),
        entry(speedups=[1]),
        entry(speedups={"input": float("inf")}),
        entry(failed={"input": 3}),
        entry(failed=["input"]),
    ],
)
def test_a_damaged_memory_is_told_and_measured_again(monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    key = decide(monkeypatch, Clock([1.0, 2.0])).key
    file = tune.CACHE.path / f"{key}.json"
    text = content if isinstance(content, str) else json.dumps(content).replace(KEY, key)
    file.write_bytes(text.encode("latin-1"))
    with pytest.warns(XformWarning, match="tuning decisions in tuning/.* are ignored, and found again"):
        assert not decide(monkeypatch, Clock([1.0, 2.0])).remembered
    assert decide(monkeypatch, Clock([1.0, 2.0])).remembered


def test_what_is_remembered_of_failures_cannot_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    key = decide(monkeypatch, Clock([1.0, 2.0])).key
    file = tune.CACHE.path / f"{key}.json"
    file.write_text(json.dumps(entry(failed={"onnxruntime": "\x1b[31mred"})).replace(KEY, key))
    decision = decide(monkeypatch, Clock([1.0, 2.0]))
    assert decision.remembered and decision.failed == {"onnxruntime": "\\x1b[31mred"}


def test_a_candidate_that_does_not_run_is_told_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([1.0, 2.0])
    clock.broken = {0}
    decision = decide(monkeypatch, clock)
    assert decision.chosen == "input" and "no kernel" in decision.failed["onnxruntime"]
    clock.broken = {0, 1}
    with pytest.raises(TargetError, match="none of the lowerings runs here"):
        tune.choose(competing(), CPU, {"x": np.ones((9, 4), np.float32)}, "quick")


def test_the_result_of_optimize_is_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (float[2,4] x) => (float[2,4] y) { a = Identity(x) b = Identity(a) y = Add(b, x) }")
    monkeypatch.setattr(tune, "measure", Clock([3.0, 3.0, 1.0]))
    kept = xform.optimize(model, "cpu", tune="quick", backend="onnxruntime")
    assert kept.artifact.metadata["tuning"]["chosen"] in ("input", "onnxruntime")
    monkeypatch.setattr(tune, "measure", Clock([3.0, 1.0, 1.0]))
    kept = xform.optimize(model, "cpu", tune="full", backend="onnxruntime")
    assert kept.report.artifact["tuning"]["chosen"] == "input"
    assert any("as it came" in warning for warning in kept.report.warnings)
    np.testing.assert_array_equal(kept(np.ones((2, 4), np.float32))["y"], 2 * np.ones((2, 4)))
    assert [r.rule for r in kept.report.about("tuning")] == ["full"]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="tune must be one of"):
        xform.optimize(parse(GRAPH), tune="fast")  # type: ignore[arg-type]


def test_a_real_measurement_ends_with_a_working_result() -> None:
    result = xform.optimize(parse(GRAPH), "cpu", tune="quick", inputs=FEEDS, backend="onnxruntime")
    assert set(result.artifact.metadata["tuning"]["milliseconds"]) == {"onnxruntime", "input"}
    np.testing.assert_array_equal(result(FEEDS)["y"], 2 * np.ones((2, 4)))


def _refuse_the_default(candidate: tune.Candidate, _: Any) -> str:
    return "wrong" if candidate.label == "onnxruntime" else ""


def test_a_wrong_candidate_is_out_however_fast_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measure", Clock([1.0, 5.0]))
    _, _, decision = tune.choose(competing(), CPU, FEEDS, "quick", None, _refuse_the_default)
    assert decision.chosen == tune.INPUT
    assert decision.failed == {"onnxruntime": "wrong"}


def test_what_was_remembered_is_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide(monkeypatch, Clock([1.0, 5.0])).chosen == "onnxruntime"
    _, _, decision = tune.choose(competing(), CPU, FEEDS, "quick", None, _refuse_the_default)
    assert decision.chosen == tune.INPUT and not decision.remembered


def test_a_fast_wrong_lowering_loses_with_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    from xform.backends.onnxruntime import OnnxRuntimeBackend

    lower = OnnxRuntimeBackend.lower

    def wrong(self: Any, graph: Any, target: Target, options: LowerOptions) -> Any:
        if not options.verbatim:
            graph = parse("g (float[b,4] x) => (float[b,4] y) { e = Div(x, x) y = Sub(e, x) }")
        return lower(self, graph, target, options)

    monkeypatch.setattr(OnnxRuntimeBackend, "lower", wrong)
    monkeypatch.setattr(tune, "measure", Clock([1.0, 5.0]))
    model = parse("g (float[b,4] x) => (float[b,4] y) { e = Mul(x, x) y = Add(e, x) }")
    result = xform.optimize(model, tune="quick", backend="onnxruntime")
    assert result.artifact.metadata["tuning"]["chosen"] == tune.INPUT
    remarks = [r for r in result.report.remarks if r.pass_name == "tune" and r.verdict == "missed"]
    assert remarks and "differ" in remarks[0].reason
