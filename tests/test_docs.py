"""What the documents say is so: code runs, options exist, links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import onnx_ir as ir
import pytest
import typer.main
from support import floats, parse, run

import xform
from xform.cli import _build_app
from xform.passes import PASSES
from xform.pipeline.presets import PRESETS
from xform.rewrite.passes import Pass, PassContext

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def _code(document: str) -> str:
    """The first Python block of a document, without the indentation of a list item."""
    match = re.search(r"^( *)```python\n(.*?)^ *```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    assert match is not None
    return re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE)


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(_code("README.md"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.report.json"]
    assert tuple(names["y"].shape) == (4, 8)  # type: ignore[attr-defined]


def test_the_pass_of_the_contributing_guide_works() -> None:
    names: dict[str, object] = {}
    exec(_code("CONTRIBUTING.md"), names)
    kind = names["SimplifyLogarithms"]
    assert isinstance(kind, type) and issubclass(kind, Pass)
    model: ir.Model = parse("g (float[3] x) => (float[3] y) { e = Exp(x) l = Log(e) y = Neg(l) }")
    feeds = {"x": floats(3)}
    before = run(model, feeds)
    assert kind().run(model, PassContext())
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert abs(run(model, feeds)[0] - before[0]).max() < 1e-6


def test_every_option_of_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    group = typer.main.get_command(_build_app())
    missing = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        if section is None:
            assert name in text
            continue
        for parameter in command.params:
            for option in parameter.opts:
                common = option in ("--json", "--debug", "--quiet", "--help")
                if option.startswith("--") and not common and option not in section[1]:
                    missing.append(f"{name} {option}")
    assert missing == []


def test_every_parameter_of_optimize_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in inspect.signature(xform.optimize).parameters if f"| `{name}` |" not in text]
    assert missing == ["model"]  # the sentence above the table


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    broken = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert broken == []


def test_presets_name_passes_that_exist() -> None:
    for names in PRESETS.values():
        assert set(names) <= set(PASSES)


def test_benchmarks_and_examples_that_documents_name_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"(?:benchmarks|examples)/\w+\.py", document.read_text()):
            assert (ROOT / name).is_file(), f"{document.name} names {name}"
