"""The layout of the repository: links, imports, what a wheel and an sdist carry, nothing of one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "patterns", "backends")


def _tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in names.decode().split("\0") if name]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_lead_to_the_top_level(name: str) -> None:
    link = ROOT / "xform" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


def test_no_other_links() -> None:
    links = {path.relative_to(ROOT).as_posix() for path in _tracked() if path.is_symlink()}
    assert links == {f"xform/{name}" for name in LINKED}


def test_nothing_imports_the_bare_names() -> None:
    bare = []
    for path in _tracked():
        if path.suffix != ".py" or path.is_symlink() or not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            bare += [f"{path}: {module}" for module in modules if module.partition(".")[0] in LINKED]
    assert bare == []


def test_passes_are_one_module_whichever_way_they_are_found() -> None:
    import xform.backends
    import xform.passes

    assert xform.passes.__name__ == "xform.passes"
    assert {"passes", "backends", "patterns"}.isdisjoint(sys.modules)


# spelled in pieces, so that this file does not hold what it looks for
MACHINE = re.compile(
    "|".join(["/" + "work/", "/" + "root/", "/" + "home/[a-z]", "/" + r"tmp/[a-z_]+\.", "file" + "://"])
)


def test_no_path_of_one_machine_in_tracked_files() -> None:
    found = []
    for path in _tracked():
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {line.strip()}" for line in text.splitlines() if MACHINE.search(line)]
    assert found == []


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, links kept, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for path in _tracked():
        if not (path.exists() or path.is_symlink()):
            continue
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(os.readlink(path))
        else:
            target.write_bytes(path.read_bytes())
    return copy


def _build(source: Path, hook: str, out: Path) -> Path:
    """Run a PEP 517 hook of setuptools in a process of its own; the archive it made."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.strip().splitlines()[-1]


def _expected() -> set[str]:
    """Every tracked module of the package, by its path under the import name."""
    modules = set()
    for path in _tracked():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py" and path.exists() and name.partition("/")[0] in ("xform", *LINKED):
            modules.add(name if name.startswith("xform/") else f"xform/{name}")
    return modules


def test_wheel_carries_every_module_once(source_copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(_build(source_copy, "build_wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
    modules = {name for name in names if name.endswith(".py")}
    assert modules == _expected()
    assert "xform/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_wheel(source_copy: Path, tmp_path: Path) -> None:
    archive = _build(source_copy, "build_sdist", tmp_path)
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(_build(unpacked, "build_wheel", tmp_path)) as wheel:
        modules = {name for name in wheel.namelist() if name.endswith(".py")}
    assert modules == _expected()
