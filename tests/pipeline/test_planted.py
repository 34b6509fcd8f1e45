"""Every planted mistake is detected with verification as it is by default."""

from __future__ import annotations

import pytest

from benchmarks.planted import PLANTS, run_planted, verdict
from benchmarks.planted_edits import Plant, bypass


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_mistake_is_detected(plant: Plant) -> None:
    assert verdict(plant, seed=1) == "detected"


def test_enough_kinds_of_mistakes_are_planted() -> None:
    assert len({plant.kind for plant in PLANTS}) >= 25
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)


def test_a_mistake_that_changes_nothing_is_not_counted_as_detected() -> None:
    plant = Plant(
        "identity", "none", "g (float[b,4] x) => (float[b,4] y) { a = Identity(x) y = Relu(a) }", bypass("Identity")
    )
    assert verdict(plant) == "missed"
    assert run_planted(plants=[plant]) == (1, 0)
