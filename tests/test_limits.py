"""Limits name themselves, and hold for the thread that put them in force."""

import threading

import numpy as np
import pytest

from xform import LimitError, UsageError, limits


def test_past_a_limit_the_error_names_it_and_how_to_raise_it() -> None:
    limits.check("nodes", limits.Limits().nodes, "the model")
    with pytest.raises(LimitError) as caught:
        limits.check("nodes", limits.Limits().nodes + 1, "the model", where="f/g")
    assert caught.value.limit == "nodes" and caught.value.exit_code == 3
    assert "limits={'nodes': N}" in str(caught.value) and "f/g" in str(caught.value)


def test_limits_hold_inside_and_for_one_thread() -> None:
    seen = []
    with limits.limited(limits.limits_of({"memory": 10})):
        with pytest.raises(LimitError):
            limits.check("memory", 11, "a constant")
        thread = threading.Thread(target=lambda: seen.append(limits.current()))
        thread.start()
        thread.join()
    assert seen == [limits.Limits()] and limits.current() == limits.Limits()


@pytest.mark.parametrize(
    ("given", "word"),
    [({"memroy": 1}, "did you mean 'memory'"), ({"memory": -1}, "above 0"), ({"memory": True}, "above 0"), (7, "dict")]
    + [({"seconds": number}, "at most 2") for number in (float("inf"), float("nan"), 1e300, 10**400)],
)
def test_wrong_limits_are_usage_errors(given: object, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        limits.limits_of(given)  # type: ignore[arg-type]


def test_inputs_that_the_user_gave_earn_memory_however_large_they_are() -> None:
    batch, base = np.zeros((64, 3, 224, 224), np.float32), limits.Limits().memory
    assert limits.earned_by({"x": batch}).memory == base + 16 * batch.nbytes
    assert limits.earned_by([{"x": batch[:1]}, {"x": batch}]).memory == base + 16 * batch.nbytes
    assert limits.earned_by(None) == limits.Limits()
    with limits.limited(limits.limits_of({"memory": 10})):
        assert limits.earned_by({"x": np.zeros(1)}).memory == 10 + 16 * 8


def test_a_compressed_file_earns_what_it_holds_and_not_what_it_unpacks_to() -> None:
    arrays, base = {"x": np.zeros((1000, 1000), np.float32)}, limits.Limits().memory
    assert limits.earned_by(limits.Unpacked(arrays, 5000)).memory == base + 16 * 5000
    assert limits.earned_by([limits.Unpacked(arrays, 10**9)]).memory == base + 16 * arrays["x"].nbytes
