"""The report as data: strict JSON, stable schema, nothing lost."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from report_sample import make_report

from xform.report.environment import Environment, code_fingerprint, installed, processor
from xform.report.schema import SCHEMA, LatencyReport, PassReport, Report, Size, VerificationReport, plain
from xform.rewrite.remarks import Remark


def test_json_is_strict_and_names_its_schema_first() -> None:
    document = json.loads(make_report().to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert next(iter(document)) == "schema"
    assert document["schema"] == SCHEMA == "xform.report/1"
    assert document["passes"][2]["max_rel_error"] == "inf"


def test_json_holds_every_field_of_every_part() -> None:
    document = json.loads(make_report().to_json())
    for kind, found in (
        (Report, document),
        (PassReport, document["passes"][0]),
        (Size, document["before"]),
        (VerificationReport, document["verification"]),
        (LatencyReport, document["latency"]),
        (Environment, document["environment"]),
        (Remark, document["remarks"][0]),
    ):
        assert {field.name for field in dataclasses.fields(kind)} == set(found)
    assert document["remarks"][1]["nodes"] == ["c2", "b2"]
    assert document["remarks"][0]["cost_before"]["nodes"] == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32(1.5), 1.5),
        (np.int64(3), 3),
        ((1, {"a": None}), [1, {"a": None}]),
        (True, True),
        (b"x".decode(), "x"),
    ],
)
def test_plain(value: object, expected: object) -> None:
    assert plain(value) == expected


def test_about_finds_by_concept_pass_and_rule() -> None:
    report = make_report()
    assert len(report.about("batch_norm")) == 3
    assert len(report.about("bad")) == 1
    assert report.about("norm") == []


def test_environment_is_of_this_process() -> None:
    here = Environment.here()
    assert here.cores >= 1
    assert here.versions["torch"] and here.versions["onnxruntime"]
    assert installed(("no-such-package",)) == {}


def test_code_fingerprint_tells_states_of_the_sources_apart(tmp_path: Path) -> None:
    def of(name: str, sources: dict[str, str]) -> str:
        for path, text in sources.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return code_fingerprint(tmp_path / name)

    first = of("first", {"a.py": "1", "b/c.py": "2"})
    assert first == of("same", {"a.py": "1", "b/c.py": "2", "b/c.pyc": "3"})
    assert len({first, of("text", {"a.py": "1", "b/c.py": "4"}), of("name", {"a.py": "1", "b/d.py": "2"})}) == 3
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.py").write_text("1")
    (tmp_path / "linked" / "b").symlink_to(tmp_path / "first" / "b")
    assert code_fingerprint(tmp_path / "linked") == first  # as a checkout has it


def test_processor_reads_features(tmp_path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Fast CPU\nflags\t\t: sse4_2 avx2 avx512_vnni foo\n")
    assert processor(cpuinfo) == ("Fast CPU", ("sse4_2", "avx2", "avx512_vnni"))
    assert processor(tmp_path / "absent")[1] == ()
