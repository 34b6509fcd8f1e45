"""Requirements and budgets."""

from __future__ import annotations

import pytest

from xform.cli.common import parse_size
from xform.cli.demands import Budgets, Requirement, check_requirements, parse_requirement
from xform.errors import BudgetError, RequirementError, UsageError
from xform.report.schema import LatencyReport
from xform.rewrite.remarks import Remark


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attention>=12", Requirement("attention", ">=", 12)),
        (" attention >= 12 ", Requirement("attention", ">=", 12)),
        ("attention", Requirement("attention", ">=", 1)),
        ("batch_norm==0", Requirement("batch_norm", "==", 0)),
        ("Transpose<3", Requirement("Transpose", "<", 3)),
        ("ai.onnx.Conv>=2", Requirement("Conv", ">=", 2)),
        ("ai.onnx.ml.Scaler==0", Requirement("ai.onnx.ml.Scaler", "==", 0)),
        ("com.microsoft.FusedMatMul=2", Requirement("com.microsoft.FusedMatMul", "=", 2)),
    ],
)
def test_forms_of_a_requirement(text: str, expected: Requirement) -> None:
    assert parse_requirement(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "ai.onnx.Kernel",
        "attention>=x",
        "attention>=-1",
        ">=1",
        "attention=>2",
        "attention>=1 gelu",
        "",
        "gelu>=" + "9" * 5000,
    ],
)
def test_what_is_no_requirement(text: str) -> None:
    with pytest.raises(UsageError):
        parse_requirement(text)


def test_a_misspelt_name_is_refused_since_it_would_never_or_always_hold() -> None:
    with pytest.raises(UsageError, match="did you mean 'attention'"):
        parse_requirement("atention==0")


@pytest.mark.parametrize(
    ("comparison", "met"),
    [(">=", True), ("<=", True), ("==", True), ("=", True), ("!=", False), (">", False), ("<", False)],
)
def test_comparisons(comparison: str, met: bool) -> None:
    assert Requirement("gelu", comparison, 2).met({"gelu": 2}) is met


def test_what_does_not_occur_counts_zero() -> None:
    assert Requirement("gelu", "==", 0).met({})


def test_an_unmet_requirement_names_counts_and_what_was_nearly_matched() -> None:
    remarks = [
        Remark("raise_attention", "sdpa", "missed", ("layer.0",), "mask of rank 5", "attention"),
        Remark("raise_attention", "sdpa", "missed", ("layer.1",), "mask of rank 5", "attention"),
        Remark("raise_gelu", "erf", "missed", ("other",), "not asked about", "gelu"),
    ]
    demands = [parse_requirement("attention>=12"), parse_requirement("gelu")]
    with pytest.raises(RequirementError) as caught:
        check_requirements(demands, {"attention": 10, "gelu": 1}, remarks)
    text = str(caught.value)
    assert "required attention>=12, found 10" in text
    assert "2 x raise_attention/sdpa: mask of rank 5 (at layer.0; layer.1)" in text
    assert "not asked about" not in text and "gelu" not in text


def test_met_requirements_are_reported() -> None:
    assert check_requirements([parse_requirement("gelu>=2")], {"gelu": 3}, []) == [
        {"require": "gelu>=2", "found": 3, "met": True}
    ]


@pytest.mark.parametrize(
    ("text", "count"), [("1024", 1024), ("1kB", 1000), ("1.5 MiB", 1572864), ("2GB", 2 * 10**9), ("10b", 10)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1", "1 TBx", "1,5MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_budgets_within() -> None:
    Budgets(1.0, 100, 1e-5).check(size=100, latency=LatencyReport(1.0, 1.0, 1.0, 3), error=1e-5)
    Budgets().check(size=None, latency=None, error=None)


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        (Budgets(max_size=99), "size 100 B"),
        (Budgets(max_latency_ratio=float("nan")), "latency after/before"),
        (Budgets(max_latency_ratio=0.9), "latency after/before 1.000"),
        (Budgets(max_error=1e-6), "relative error 1.00e-05"),
    ],
)
def test_each_budget_can_be_missed(budgets: Budgets, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        budgets.check(size=100, latency=LatencyReport(1.0, 1.0, 1.0, 3), error=1e-5)


@pytest.mark.parametrize("budgets", [Budgets(max_size=1), Budgets(max_latency_ratio=1), Budgets(max_error=1)])
def test_what_was_not_measured_is_missed(budgets: Budgets) -> None:
    with pytest.raises(BudgetError, match="unknown"):
        budgets.check(size=None, latency=None, error=None)


def test_an_error_that_is_no_number_is_missed() -> None:
    with pytest.raises(BudgetError):
        Budgets(max_error=1e-3).check(size=None, latency=None, error=float("nan"))
