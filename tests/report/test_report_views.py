"""The report for the terminal and as HTML."""

from __future__ import annotations

import html.parser
import io
from pathlib import Path

import pytest
from report_sample import make_report
from rich.console import Console

from xform.errors import OutputError
from xform.report.files import write_report
from xform.report.html import to_html
from xform.report.schema import Report, VerificationReport
from xform.report.terminal import change, facts, findings, place_list, report_view
from xform.rewrite.remarks import Remark


@pytest.fixture
def report() -> Report:
    return make_report()


def _printed(report: Report, **options: bool) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report_view(report, **options))
    return console.export_text()


def test_terminal_tells_what_was_done_and_why_not(report: Report) -> None:
    text = _printed(report)
    assert "fold" in text and "10 -> 6" in text
    assert "padded with <zeros>" in text and "c2, b2; c3" in text
    assert "rolled back: output y differs" in text
    assert "2.00 times as fast" in text
    assert "yes on 2 random inputs, largest relative error 2.0e-06" in text
    assert "2 x linear: Gemm" in text and "CPUExecutionProvider: 6 nodes" in text
    assert "warning: weights hold NaN" in text


def test_terminal_hides_idle_passes_but_counts_them(report: Report) -> None:
    assert "idle" not in _printed(report)
    assert "1 more pass run found nothing to do" in _printed(report)
    assert "idle" in _printed(report, verbose=True)


def test_brackets_in_names_are_no_markup(report: Report) -> None:
    report.remarks.append(Remark("fold", "r", "missed", ("node[bold]",), "shape [2, 3] and [/red]"))
    text = _printed(report)
    assert "node[bold]" in text and "shape [2, 3] and [/red]" in text


def test_findings_group_equal_reasons(report: Report) -> None:
    missed = findings(r for r in report.remarks if r.verdict == "missed")
    assert [(f.rule, f.count, f.places) for f in missed] == [("fold/conv", 2, (("c2", "b2"), ("c3",)))]


def test_unverified_is_not_called_verified(report: Report) -> None:
    report.verification = VerificationReport("final", None, reason="the model is random")
    assert dict(facts(report))["verified"] == "no (the model is random)"
    report.verification = VerificationReport("final", False, reason="y is off", cases=1)
    assert dict(facts(report))["verified"].startswith("FAILED: y is off")


def test_change_and_place_list() -> None:
    assert change(1000, 1000) == "1,000"
    assert change(5, 3) == "5 -> 3"
    assert change(None, None) == "unknown"
    assert place_list([("a", "b", "c"), ("d",), (), ("e",)], brief=True) == "a, b, ...; d; and 1 more"
    assert place_list([("a", "b", "c"), (), ("d",)], brief=False) == "a, b, c\nd"


class _Tags(html.parser.HTMLParser):
    """Checks that tags are balanced and collects text and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_balanced_self_contained_and_escaped(report: Report) -> None:
    tags = _Tags()
    tags.feed(to_html(report))
    assert tags.open == []
    assert tags.sources == []
    assert "padded with <zeros>" in tags.text
    assert "output y differs" in tags.text and "CPUExecutionProvider" in tags.text


def test_files_by_suffix(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "r.json")
    write_report(report, tmp_path / "r.html")
    assert (tmp_path / "r.json").read_text().startswith('{\n  "schema"')
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json"]


def test_unwritable_place_is_an_output_error(report: Report, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder"):
        write_report(report, tmp_path / "absent" / "r.json")
