"""The generator of random graphs: repeatable, broad, and made of what its motifs say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from differential_compare import session
from differential_graphs import CONFIGS, MOTIFS, build, operators
from differential_registry import motif

_ATTEMPTS = 8


def test_a_seed_gives_the_same_graph_and_feeds_each_time() -> None:
    for seed in range(20):
        first, second = build(seed), build(seed)
        assert first.model.SerializeToString() == second.model.SerializeToString()
        for a, b in zip(first.feeds, second.feeds, strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)


@pytest.mark.parametrize("name", sorted(MOTIFS))
def test_every_motif_is_drawn_and_runs(name: str) -> None:
    failures = []
    for attempt in range(_ATTEMPTS):
        case = build(7, only=name, attempt=attempt)
        if name not in case.motifs:
            continue
        try:
            session(case.model).run(None, case.feeds[0])
        except Exception as error:
            failures.append(str(error)[:200])
            continue
        return
    pytest.fail(f"{name}: {failures}")


def test_graphs_hold_more_than_ninety_operators_and_all_opsets() -> None:
    names: set[str] = set()
    opsets, floats = set(), set()
    for seed in range(400):
        model = build(seed).model
        names |= operators(model).keys()
        opsets |= {entry.version for entry in model.opset_import if not entry.domain}
        floats |= {v.type.tensor_type.elem_type for v in model.graph.input}
    assert len(names) >= 90
    assert opsets == set(range(11, 24))
    assert {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE} <= floats


def test_feeds_have_several_sizes_of_dynamic_dims_and_no_rows() -> None:
    sizes = {v.shape[0] for seed in range(60) for f in build(seed).feeds for v in f.values() if v.ndim}
    assert {0, 1, 2, 3} <= sizes


def test_packed_cases_have_a_mask_of_tokens() -> None:
    cases = [build(seed, "packed") for seed in range(20)]
    assert sum(bool(case.tokens) for case in cases) > 5
    assert all(case.tokens in case.feeds[0] for case in cases if case.tokens)


def test_every_configuration_can_be_built() -> None:
    for config in CONFIGS:
        onnx.checker.check_model(build(3, config).model)


def test_two_motifs_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two motifs"):

        @motif(lambda x: True)
        def linear(s: object, x: object) -> None:
            return None
