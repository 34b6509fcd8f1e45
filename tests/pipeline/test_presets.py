"""Presets resolve to passes; wrong names are told with the closest right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from xform.errors import UsageError
from xform.pipeline import presets
from xform.rewrite.passes import RewritePass


@dataclass(frozen=True)
class Sample(RewritePass):
    name: ClassVar[str] = "sample_pass"
    limit: int = 3

    def rules(self) -> Sequence[object]:
        return []


def test_every_preset_resolves():
    for name, passes in presets.PRESETS.items():
        assert [one.name for one in presets.resolve(name)] == list(passes)
        assert all(one.fidelity == "exact" for one in presets.resolve(name)) or name != "exact"


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(presets, "PASSES", {"sample_pass": Sample})
    monkeypatch.setattr(presets, "PRESETS", {"exact": ("sample_pass", "sample_pass")})


@pytest.mark.usefixtures("registry")
def test_preset():
    assert presets.resolve("exact") == [Sample(), Sample()]


@pytest.mark.usefixtures("registry")
def test_passes_in_place_of_the_preset():
    assert presets.resolve("exact", passes=["sample_pass"]) == [Sample()]
    assert presets.resolve("exact", passes=[Sample(5)]) == [Sample(5)]
    assert presets.resolve("exact", passes=[]) == []


@pytest.mark.usefixtures("registry")
def test_options():
    assert presets.resolve(passes=["sample_pass"], options={"sample_pass": {"limit": 7}}) == [Sample(7)]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        ({"preset": "exakt"}, "unknown preset 'exakt'", "did you mean 'exact'"),
        ({"passes": ["sample_pas"]}, "unknown pass 'sample_pas'", "did you mean 'sample_pass'"),
        ({"passes": ["zzz"]}, "unknown pass 'zzz'", "known: sample_pass"),
        ({"options": {"sample_pass": {"limt": 1}}}, "no option 'limt'", "did you mean 'limit'"),
        ({"options": {"other": {}}}, "does not run", "known"),
    ],
)
def test_wrong_names(arguments, what, hint):
    with pytest.raises(UsageError, match=what) as caught:
        presets.resolve(**arguments)
    assert hint in str(caught.value)
