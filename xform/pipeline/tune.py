"""Measured choice: where several lowerings compete, the one that runs fastest on this machine.

Each candidate is lowered, saved, and run in a process of its own with the settings of its artifact, which stays as long
as the candidate is in the running; they take turns, and are compared round by round (`xform.report.latency`), but for
those that took several times as long as the fastest when each was tried alone; those that come near the fastest meet
once more, in more rounds, and if another one leads then, a third time, since a machine that others use too has phases
in which one runtime loses more than another. All rounds of those that are left count. The model as it came is always
among them: if nothing is faster, it is what the user gets. A decision is remembered by what the graphs are (without the
numbers in their weights), the machine, the versions of the runtimes, the state of xform's own code and the sizes of the
inputs, so that the same call decides the same without a clock.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from xform.backends import BACKENDS, Artifact, Backend, LowerOptions
from xform.cachefile import CacheFolder
from xform.errors import TargetError, XformError
from xform.graph.fingerprint import fingerprint
from xform.report.environment import Environment, code_fingerprint
from xform.report.latency import MEASURABLE, Deployed, Loaded, Timing, measure
from xform.target import Target
from xform.text import paragraph

TuneMode = Literal["off", "quick", "full"]
MODES: tuple[TuneMode, ...] = ("off", "quick", "full")

INPUT = "input"
_ROUNDS = {"quick": 5, "full": 9}
_FINAL_ROUNDS = {"quick": 9, "full": 25}
_FEWEST_ROUNDS = 5  # however long they take
_HEAT_SECONDS = {"quick": 20.0, "full": 60.0}  # what a heat of slow models may take beyond the fewest rounds
_RUNS = 3  # of a slow model in a round
_SECONDS = {"quick": 0.15, "full": 0.25}  # of one candidate in one round: many short ones agree better than few long
_NEAR = 0.9  # of the best speedup: what is faster than that may be the fastest in truth
_HOPELESS = 2.5  # times as long as the fastest, each alone: not worth a heat
_SAME = 1.01  # a speedup below it is noise: between equals the first one stays
_FORMAT = 5  # of a remembered decision
CACHE = CacheFolder("tuning", "tuning decisions")


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        label: Name in reports.
        graph: What is lowered.
        backend: What lowers it.
        options: How.
    """

    label: str
    graph: ir.Model
    backend: Backend
    options: LowerOptions


@dataclass
class Decision:
    """What was chosen.

    Attributes:
        chosen: Label.
        speedups: How many times as fast as the model as it came each candidate was.
        milliseconds: Median latency of each.
        failed: Why a candidate could not be measured.
        remembered: Whether it was decided in an earlier run.
        key: Under which it is remembered.
    """

    chosen: str
    speedups: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    remembered: bool = False
    key: str = ""

    def describe(self) -> str:
        """One line for a remark."""
        times = ", ".join(f"{label} {ms:.3g} ms" for label, ms in sorted(self.milliseconds.items(), key=lambda i: i[1]))
        return f"chose {self.chosen}{', as remembered' if self.remembered else ''} ({times})"


def candidates(
    captured: ir.Model,
    optimized: ir.Model,
    backend: Backend,
    options: LowerOptions,
    *,
    mode: TuneMode,
    others: Sequence[Backend] = (),
    forms: Mapping[str, ir.Model] | None = None,
    exact: ir.Model | None = None,
) -> list[Candidate]:
    """The lowerings to compare, the default one first and the model as it came last.

    Args:
        others: Further backends, see `competitors`.
        forms: The graph for a backend, by its name, where that is not `optimized`.
        exact: The graph in float, where `optimized` is quantized: it competes too.
    """
    found = [Candidate(backend.name, optimized, backend, options)]
    if mode == "full" and backend.name == "onnxruntime" and not options.portable and _has_attention(optimized):
        for form in ("multi_head", "written"):
            variant = LowerOptions(options.opset, attention=form)
            found.append(Candidate(f"{backend.name}, attention {form}", optimized, backend, variant))
    found += [Candidate(other.name, (forms or {}).get(other.name, optimized), other, options) for other in others]
    if exact is not None:
        found += [Candidate(f"{b.name}, float", exact, b, options) for b in (backend, *others)]
    if backend.name in MEASURABLE:
        found.append(Candidate(INPUT, captured, backend, LowerOptions(options.opset, options.portable, verbatim=True)))
    return found


def competitors(backend: Backend, target: Target, options: LowerOptions) -> list[Backend]:
    """Other backends that serve the target and these options, are installed, and can be measured."""
    if options.portable or options.opset is not None:
        return []
    kinds = [kind() for name, kind in BACKENDS.items() if name != backend.name and name in MEASURABLE]
    return [other for other in kinds if target.kind in other.kinds and other.available(target) is None]


def _has_attention(model: ir.Model) -> bool:
    return any(node.op_type == "Attention" for node in model.graph.all_nodes())


def choose(
    competing: Sequence[Candidate],
    target: Target,
    feeds: Mapping[str, Any],
    mode: TuneMode,
    progress: Callable[[str, int, int], None] | None = None,
    refuse: Callable[[Candidate, Artifact], str] = lambda *_: "",
) -> tuple[Candidate, Artifact, Decision]:
    """The fastest candidate, lowered.

    Args:
        competing: See `candidates`; the first that lowers is taken where nothing differs.
        feeds: Inputs by name to measure with.
        progress: As for `measure`.
        refuse: Says why a lowered candidate is wrong, and so out however fast it is; empty if it is right.

    Raises:
        TargetError: None of them can be lowered and run.
    """
    key = _key(competing, target, feeds, mode)
    known = _recall(key, [c.label for c in competing])
    if known is not None:
        chosen = next(c for c in competing if c.label == known.chosen)
        artifact = chosen.backend.lower(chosen.graph, target, chosen.options)
        if not refuse(chosen, artifact):
            return chosen, artifact, known
    artifacts: dict[str, Artifact] = {}
    decision = Decision("", key=key)
    for candidate in competing:
        try:
            artifact = candidate.backend.lower(candidate.graph, target, candidate.options)
            wrong = refuse(candidate, artifact)
        except XformError as error:
            wrong = error.what
        if wrong:
            decision.failed[candidate.label] = wrong
        else:
            artifacts[candidate.label] = artifact
    met = _measure(artifacts, feeds, mode, decision, progress)
    if not decision.milliseconds:
        reason = next(iter(decision.failed.values()), "there are none")
        raise TargetError(f"none of the lowerings runs here: {reason}", hint="use tune='off' to see the error in full")
    baseline = INPUT if INPUT in met else met[0]
    decision.chosen = _fastest(decision, met, baseline)
    _remember(decision)
    chosen = next(c for c in competing if c.label == decision.chosen)
    return chosen, artifacts[decision.chosen], decision


def _measure(
    artifacts: Mapping[str, Artifact],
    feeds: Mapping[str, Any],
    mode: TuneMode,
    decision: Decision,
    progress: Callable[[str, int, int], None] | None,
) -> list[str]:
    """Fill in the figures; gives the labels of those that met, in their order: figures of one alone say little."""
    with tempfile.TemporaryDirectory(prefix="xform-tune-") as folder, Loaded() as loaded:
        subjects = {}
        for index, (label, artifact) in enumerate(artifacts.items()):
            path = Path(folder, f"{index}.onnx")
            artifact.save(path)
            subjects[label] = Deployed(path, artifact.backend, dict(artifact.metadata.get("session", {})))
        alone = {}
        for label, subject in subjects.items():
            try:
                (alone[label],) = measure([subject], feeds, rounds=1, seconds=0.0, loaded=loaded)
            except TargetError as error:
                decision.failed[label] = error.what
            loaded.keep([subjects[label] for label in _hopeful(alone)])  # no more than needed, as models may be large
        if not alone:
            return []
        _record(decision, alone)
        meeting = _hopeful(alone)
        everyone, seconds = list(meeting), _SECONDS[mode]
        pooled: dict[str, Timing] = {}
        leaders: list[str] = []
        for planned in (_ROUNDS[mode], _FINAL_ROUNDS[mode], _FINAL_ROUNDS[mode]):
            once = sum(max(seconds, _RUNS * decision.milliseconds[label] / 1e3) for label in meeting)
            rounds = max(_FEWEST_ROUNDS, min(planned, int(_HEAT_SECONDS[mode] / once)))
            met = [subjects[label] for label in meeting]
            loaded.keep(met)
            measured = measure(met, feeds, rounds=rounds, seconds=seconds, progress=progress, loaded=loaded)
            heat = dict(zip(meeting, measured, strict=True))
            pooled = {label: pooled[label].followed_by(t) if label in pooled else t for label, t in heat.items()}
            _record(decision, pooled)
            leaders.append(max(heat, key=lambda label: heat[label].speedup_over(heat[meeting[0]])))
            if len(leaders) == 2 and heat[leaders[-1]].speedup_over(heat[leaders[0]]) < _SAME:
                break  # the heats agree, but for noise
            meeting = _near(pooled)
            if len(meeting) < 2:
                break
        return everyone


def _hopeful(alone: Mapping[str, Timing]) -> list[str]:
    """The labels that are not much slower than the fastest, each measured alone; the model as it came always."""
    fastest = min((timing.median_ms for timing in alone.values()), default=0.0)
    return [label for label, t in alone.items() if label == INPUT or t.median_ms <= _HOPELESS * fastest]


def _near(timings: Mapping[str, Timing]) -> list[str]:
    """The labels that come near the fastest one, by their rounds or by their fastest runs: those are quiet moments."""
    reference = next(iter(timings.values()))
    by_rounds = {label: timing.speedup_over(reference) for label, timing in timings.items()}
    by_runs = {label: 1.0 / timing.fastest_ms for label, timing in timings.items()}
    return [label for label in timings if any(by[label] >= _NEAR * max(by.values()) for by in (by_rounds, by_runs))]


def _record(decision: Decision, timings: Mapping[str, Timing]) -> None:
    """Figures of those that met; speedups over the model as it came, by way of the first contender where it is out."""
    reference = INPUT if INPUT in timings else next(iter(timings))
    known = decision.speedups.get(reference, 1.0)
    for label, timing in timings.items():
        decision.milliseconds[label] = round(timing.median_ms, 4)
        decision.speedups[label] = round(known * timing.speedup_over(timings[reference]), 4)


def _fastest(decision: Decision, labels: Sequence[str], baseline: str) -> str:
    """The label with the largest speedup; an earlier one that is as fast but for noise goes first, the input last.

    The model as it came stays where it is as fast as the best: then the rewriting has won nothing.
    """
    speedups = {label: decision.speedups[label] for label in labels if label in decision.speedups}
    best = max(speedups.values())
    if best < 1.0 and baseline in speedups:
        return baseline
    return next(label for label, speedup in speedups.items() if speedup * _SAME >= best)


def _key(competing: Sequence[Candidate], target: Target, feeds: Mapping[str, Any], mode: TuneMode) -> str:
    here = Environment.here()
    graphs = {id(c.graph): c.graph for c in competing}
    prints = {at: fingerprint(graph, weights=False) for at, graph in graphs.items()}
    said = {
        "format": _FORMAT,
        "candidates": [(c.label, c.backend.name, prints[id(c.graph)], asdict(c.options)) for c in competing],
        "target": asdict(target),
        "sizes": {name: list(np.shape(array)) for name, array in feeds.items()},
        "mode": mode,
        "machine": [here.system, here.processor, here.cores, list(here.cpu_features)],
        "versions": {name: here.versions.get(name) for name in MEASURABLE},
        "code": code_fingerprint(),  # the lowering decides what competes
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _recall(key: str, labels: Sequence[str]) -> Decision | None:
    """What is remembered under a key, if it is a decision among these labels."""
    found = CACHE.read(f"{key}.json", lambda data: _problem(data, key, labels))
    if found is None:
        return None
    failed = {label: paragraph(reason, 400) for label, reason in found["failed"].items()}
    return Decision(**{**found, "failed": failed, "remembered": True})


def _remember(decision: Decision) -> None:
    labels = (*decision.milliseconds, *decision.failed)
    CACHE.write(f"{decision.key}.json", lambda _: asdict(decision), lambda data: _problem(data, decision.key, labels))


def _problem(data: Any, key: str, labels: Sequence[str]) -> str | None:
    """Why something read from the cache is not a decision among `labels`; None where it is one."""
    wanted = {one.name for one in fields(Decision)}
    if not isinstance(data, dict) or set(data) != wanted:
        return f"it does not have the fields {', '.join(sorted(wanted))}"
    if data["key"] != key or not isinstance(data["remembered"], bool):
        return "it was written for another key"
    if not isinstance(data["chosen"], str) or data["chosen"] not in labels:
        return "what it chose is not among the candidates"
    for name in ("speedups", "milliseconds", "failed"):
        table = data[name]
        if not isinstance(table, dict) or not set(table) <= set(labels):
            return f"{name!r} is not a table of the candidates"
        kinds = str if name == "failed" else int | float
        if not all(isinstance(one, kinds) and not isinstance(one, bool) for one in table.values()):
            return f"{name!r} holds something of another type"
        if name != "failed" and not all(math.isfinite(one) and one > 0 for one in table.values()):
            return f"{name!r} holds numbers that are not positive"
    return None
