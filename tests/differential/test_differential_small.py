"""A few random graphs in every configuration; `benchmarks/differential.py` runs thousands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).parents[2] / "benchmarks" / "differential.py"
GRAPHS = 140


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(RUNNER), "--json", "--graphs", str(GRAPHS), "--no-planted"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode in (0, 1), finished.stderr[-2000:]
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def test_no_graph_is_computed_wrongly(figures: dict[str, Any]) -> None:
    assert figures["wrong"] == 0, figures["failing"]


def test_no_graph_crashes(figures: dict[str, Any]) -> None:
    assert figures["crashed"] == 0, figures["failing"]


def test_a_second_run_changes_no_graph(figures: dict[str, Any]) -> None:
    assert figures["not_idempotent"] == 0, figures["failing"]


def test_every_configuration_is_tried(figures: dict[str, Any]) -> None:
    from differential_graphs import CONFIGS

    assert set(figures["configs"]) == set(CONFIGS)
    assert sum(one["graphs"] for one in figures["configs"].values()) == figures["graphs"]


def test_most_graphs_run_and_most_of_them_are_rewritten(figures: dict[str, Any]) -> None:
    assert figures["graphs"] == GRAPHS
    assert figures["invalid"] < GRAPHS / 5
    assert figures["fired"] > 0.8 * figures["graphs"]
    assert figures["operators"] >= 80
