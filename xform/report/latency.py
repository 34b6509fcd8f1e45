"""Latency of models side by side: each in a process of its own, measured in turn.

Two live sessions in one process steal each other's cores through spinning threads (a factor of two was seen), and a
machine's speed drifts, so contenders take turns and are compared round by round.

Figures that are shown side by side come from the same rounds, those in which the machine was neither unusually fast nor
slow (`typical_rounds`), and a ratio is the quotient of the two figures beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from xform.errors import TargetError
from xform.report.schema import LatencyReport

_WORKER = Path(__file__).with_name("latency_worker.py")
MEASURABLE = ("onnxruntime", "openvino")  # backends whose files a process of its own can run
_PAUSE = 0.05  # seconds for the threads of the one before to stop spinning


@dataclass(frozen=True)
class Deployed:
    """A file with what runs it.

    Attributes:
        model: The file.
        backend: "onnxruntime" or "openvino".
        settings: As in the artifact's metadata, "session"; none for the runtime's own defaults.
    """

    model: Path
    backend: str = "onnxruntime"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Latency of one model.

    Attributes:
        model: Its file.
        rounds_ms: Median milliseconds of each round.
        runs: Number of runs in all.
        fastest_ms: The fastest run.
        slow_ms: 90th percentile of the runs of each round, in milliseconds.
    """

    model: Path
    rounds_ms: tuple[float, ...]
    runs: int
    fastest_ms: float
    slow_ms: tuple[float, ...] = ()

    @property
    def median_ms(self) -> float:
        """Median of the rounds' medians."""
        return statistics.median(self.rounds_ms)

    def speedup_over(self, other: Timing) -> float:
        """How many times as fast as `other`: the median over rounds of the ratio within a round."""
        return statistics.median(b / a for a, b in zip(self.rounds_ms, other.rounds_ms, strict=True))

    def followed_by(self, later: Timing) -> Timing:
        """Both together, where the same model was measured once more."""
        rounds, runs = self.rounds_ms + later.rounds_ms, self.runs + later.runs
        fastest, slow = min(self.fastest_ms, later.fastest_ms), self.slow_ms + later.slow_ms
        return Timing(self.model, rounds, runs, fastest, slow)


@dataclass(frozen=True)
class Figures:
    """Latency of one model, comparable with that of the models measured in turn with it.

    Attributes:
        p50_ms: Milliseconds that half of the runs take: the median over typical rounds of the median of a round.
        p90_ms: The same of the 90th percentile.
        times_as_fast: p50_ms of the first model divided by that of this one.
    """

    p50_ms: float
    p90_ms: float
    times_as_fast: float


def typical_rounds(timings: Sequence[Timing]) -> list[int]:
    """The middle half of the rounds, by the time that all models together took in each (their geometric mean)."""
    logs = [sum(math.log(one) for one in ms) for ms in zip(*(t.rounds_ms for t in timings), strict=True)]
    order = sorted(range(len(logs)), key=logs.__getitem__)
    cut = len(order) // 4
    return sorted(order[cut : len(order) - cut])


def figures(timings: Sequence[Timing]) -> list[Figures]:
    """Figures of models that were measured in turn, the first being the baseline."""
    kept = typical_rounds(timings)
    p50 = [statistics.median(t.rounds_ms[i] for i in kept) for t in timings]
    p90 = [statistics.median((t.slow_ms or t.rounds_ms)[i] for i in kept) for t in timings]
    return [Figures(half, slow, p50[0] / half) for half, slow in zip(p50, p90, strict=True)]


def measure(
    models: Sequence[Path | Deployed],
    feeds: Mapping[str, Any],
    *,
    rounds: int = 7,
    seconds: float = 0.3,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    loaded: Loaded | None = None,
) -> list[Timing]:
    """Measure models, each with what runs it: a bare path stands for ONNX Runtime with its default settings.

    Args:
        models: The contenders.
        feeds: Inputs by name, the same for all; a model that lacks one is an error.
        rounds: How often each is measured; the order within a round alternates.
        seconds: How long one measurement runs (at least a few runs).
        threads: Intra-op threads; None for the runtime's default.
        progress: Called with what was measured, how many measurements are done, and how many there are.
        loaded: Keeps the models loaded for further measurements on the same feeds; None lets go of them.

    Raises:
        TargetError: A model could not be loaded or run.
    """
    subjects = [model if isinstance(model, Deployed) else Deployed(model) for model in models]
    for subject in subjects:
        if subject.backend not in MEASURABLE:
            raise TargetError(f"latency of {subject.backend} cannot be measured", hint="leave measuring out")
    with Loaded() if loaded is None else contextlib.nullcontext(loaded) as pool:
        return _take_turns(pool.contenders(subjects, feeds, threads), rounds, seconds, progress)


def compare(before: Path | Deployed, after: Path | Deployed, feeds: Mapping[str, Any], **options: Any) -> LatencyReport:
    """Latency before and after, for a report. Options as for `measure`."""
    timings = measure([before, after], feeds, **options)
    old, new = figures(timings)
    rounds, threads = len(timings[0].rounds_ms), options.get("threads")
    return LatencyReport(old.p50_ms, new.p50_ms, new.times_as_fast, rounds, threads)


def _take_turns(
    workers: Sequence[_Contender], rounds: int, seconds: float, progress: Callable[[str, int, int], None] | None
) -> list[Timing]:
    medians: list[list[float]] = [[] for _ in workers]
    slow: list[list[float]] = [[] for _ in workers]
    everything: list[list[float]] = [[] for _ in workers]
    done = 0
    for number in range(rounds):
        order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
        for index in order:
            time.sleep(_PAUSE)
            times = workers[index].round(seconds)
            medians[index].append(statistics.median(times))
            slow[index].append(float(np.percentile(times, 90)))
            everything[index] += times
            done += 1
            if progress is not None:
                progress(f"measured {workers[index].model.name}", done, rounds * len(workers))
    return [
        Timing(worker.model, tuple(ms), len(runs), min(runs), tuple(p90))
        for worker, ms, p90, runs in zip(workers, medians, slow, everything, strict=True)
    ]


class Loaded:
    """Models that stay loaded between measurements, as starting a process and loading a model take a second each.

    Use as a context manager; all measurements are on the same feeds and threads.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="xform-bench-")
        self._waiting: list[_Contender] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep(())
        self._folder.cleanup()

    def contenders(
        self, subjects: Sequence[Deployed], feeds: Mapping[str, Any], threads: int | None
    ) -> list[_Contender]:
        """A process for each, one that waits or a new one. Raises TargetError."""
        path = Path(self._folder.name, "feeds.npz")
        if not path.exists():
            _write_feeds(path, feeds)
        free = [one for one in self._waiting if one.alive]
        found = []
        for subject in subjects:
            contender = next((one for one in free if one.subject == subject), None)
            if contender is None:
                contender = _Contender(subject, path, list(feeds), threads)
                self._waiting.append(contender)
            else:
                free.remove(contender)
            found.append(contender)
        return found

    def keep(self, subjects: Sequence[Deployed]) -> None:
        """Let go of all models but these."""
        for contender in self._waiting:
            if contender.subject not in subjects:
                contender.close()
        self._waiting = [one for one in self._waiting if one.alive]


def _write_feeds(path: Path, feeds: Mapping[str, Any]) -> None:
    """Arrays by place: an input may have a name that `numpy.savez` or a zip archive has another use for."""
    arrays: dict[str, Any] = {}
    for place, value in enumerate(feeds.values()):
        array = np.asarray(value)
        arrays[str(place)] = array.astype(np.str_) if array.dtype.kind == "O" else array
    np.savez(path, **arrays)


class _Contender:
    """A worker process with one model loaded."""

    def __init__(self, subject: Deployed, feeds: Path, names: list[str], threads: int | None) -> None:
        self.subject = subject
        self.model = subject.model
        # -P keeps the worker's folder off its module path: files there must not shadow installed modules
        command = [sys.executable, "-P", str(_WORKER)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        how = {"backend": subject.backend, "settings": dict(subject.settings)}
        try:
            self._ask({"model": str(subject.model), "feeds": str(feeds), "names": names, "threads": threads, **how})
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def round(self, seconds: float) -> list[float]:
        """Milliseconds of each run of one round."""
        times: list[float] = self._ask({"seconds": seconds})["ms"]
        return times

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            self.close()
            raise TargetError(f"the runtime could not run the model: {answer['error']}", where=str(self.model))
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        text = self._process.stderr.read().strip() if self._process.stderr else ""
        return f"its process ended with status {code}: {text[-400:]}"

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):  # an unsent request to a process that is gone
                    stream.close()
