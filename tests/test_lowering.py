"""What a runtime does with a lowered graph is compared with the original: refused where it is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.support import parse
from xform.backends import LowerOptions
from xform.compilation import Request
from xform.lowering import judge_artifact
from xform.pipeline.verify import Verifier


class Runtime:
    """Runs y = x + x, off by a factor on rows of large numbers, or on all."""

    input_names: Sequence[str] = ("x",)
    output_names: Sequence[str] = ("y",)

    def __init__(self, off: float, from_size: float) -> None:
        self.off, self.from_size = off, from_size

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        x = feeds["x"]
        large = x.size and abs(x).max() >= self.from_size
        return [(x + x) * (1 + self.off if large else 1)]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("off", "from_size", "state"),
    [(5e-4, 50.0, "ok"), (0.5, 50.0, "failed"), (5e-4, 0.0, "failed"), (0.0, 0.0, "ok")],
)
def test_small_differences_on_extreme_values_alone_are_told(off: float, from_size: float, state: str) -> None:
    model = parse("g (float[N,16] x) => (float[N,16] y) { y = Add(x, x) }")
    request = Request.of("cpu", "exact", None, None, None, None, "final", False, LowerOptions(), None)
    verdict = judge_artifact(Runtime(off, from_size), model, Verifier(model), request)
    assert verdict.state == state
    assert any("extreme values" in note for note in verdict.notes) == (state == "ok" and off > 0)
