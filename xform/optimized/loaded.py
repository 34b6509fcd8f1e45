"""Opening what `save` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from xform.backends import Artifact, LoadOptions, LowerOptions, Runner, get_backend
from xform.backends.onnxruntime import OnnxArtifact
from xform.capture.onnx_file import read_onnx
from xform.compilation import Compiled
from xform.errors import ModelError, UsageError
from xform.forks import PerProcess
from xform.optimized.base import Optimized
from xform.optimized.graph import run_by_name
from xform.report.brief import verdict
from xform.report.concepts import ALIASES
from xform.report.explanation import explanation
from xform.report.files import report_path
from xform.report.read import read_report
from xform.report.schema import Report
from xform.target import Target
from xform.text import shown


class _Opened(Artifact):
    """A file in a runtime's own format, of which there is no graph here."""

    def save(self, path: Path) -> list[Path]:
        """Refuse: the file is there already."""
        raise UsageError("it is a file already", hint="copy the file")


class LoadedModel(Optimized):
    """A saved model, opened again.

    Call it with arrays or tensors in the order of the inputs, by name, or with one dict of names; it returns a dict of
    output name to array (tensor, if an input was one). The calling convention of a torch module is not in the file.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, artifact: Artifact, load: Callable[[], Runner]) -> None:
        self.path = path
        self._artifact = artifact
        self._load = load
        self._runner: PerProcess[Runner] = PerProcess()
        self._report: Report | None = None

    @property
    def _compiled(self) -> Compiled:
        raise UsageError("a file holds the lowered model only", hint="ask the object that xform.optimize returned")

    @property
    def artifact(self) -> Artifact:
        """See the class."""
        return self._artifact

    @property
    def graph(self) -> ir.Model:
        """The lowered graph.

        Raises:
            UsageError: The file holds compiled code and no graph.
        """
        model: ir.Model | None = getattr(self._artifact, "model", None)
        if model is None:
            raise UsageError(f"a {self.path.suffix} file holds no graph", hint="save it as .onnx too")
        return model

    @property
    def report(self) -> Report:
        """The report beside the file, as `save(path, report=True)` writes it.

        Raises:
            UsageError: There is none.
        """
        if self._report is None:
            beside = report_path(self.path)
            if not beside.is_file():
                raise UsageError("there is no report beside the file", where=str(beside), hint="save with report=True")
            self._report = read_report(beside)
        return self._report

    def explain(self, concept: str | None = None) -> str:
        """See the class; from the report alone, as a lowered graph has other operators than the rewritten one."""
        nothing = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
        text = explanation(self.report, nothing, concept)
        if concept is None:
            return text
        name = ALIASES.get(concept, concept)
        _, *remarks = text.split("\n")
        return "\n".join([f"{shown(name)}: {self.report.concepts.get(name, 0)} in the result", *remarks])

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run it.

        Raises:
            UsageError: Inputs that are missing or unknown, or of another dtype or rank than declared.
        """
        return run_by_name(self._runner.get(self._load), args, kwargs)

    def _check_unchanged(self) -> None:
        """The file is what there is."""

    def _device(self) -> str:
        return self._artifact.target.kind

    def _described(self) -> str:
        try:
            known = f", {verdict(self.report)}"
        except (UsageError, ModelError):
            known = ", no report beside it"
        return f"{self.path.name}: {self._artifact.backend} on {self._artifact.target}{known}"

    def _repr_html_(self) -> str | None:  # type: ignore[override]
        try:
            return super()._repr_html_()
        except (UsageError, ModelError):
            return None


def load(path: str | os.PathLike[str], target: str | Target = "cpu") -> LoadedModel:
    """Open a model that `save` wrote.

    Args:
        path: `.onnx` is run by ONNX Runtime, `.xml` by OpenVINO, `.safetensors` and `.pt2` by torch. A `.pt2` package
            is compiled code: open only those that you trust.
        target: Where it runs.

    Raises:
        UsageError: The suffix is none of these, or there is no such file.
        ModelError: The file cannot be read.
        TargetError: The runtime is not installed, or refuses the model.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"a path is needed, not a {type(path).__name__}", hint='for example xform.load("model.onnx")')
    file = Path(path)
    opener = _OPENERS.get(file.suffix.lower())
    if opener is None:
        raise UsageError(
            f"{file.suffix or 'a name without a suffix'} is not a format that xform writes",
            where=str(file),
            hint=f"give one of {', '.join(_OPENERS)}",
        )
    if not file.is_file():
        raise UsageError("there is no such file", where=str(file))
    loaded = opener(file, Target.parse(target))
    loaded._runner.get(loaded._load)  # what is wrong with the file is told now
    return loaded


def _open_onnx(path: Path, target: Target) -> LoadedModel:
    backend = get_backend("onnxruntime", target)
    artifact = OnnxArtifact(backend.name, target, model=read_onnx(path))
    return LoadedModel(path, artifact, lambda: backend.load(artifact, LoadOptions()))


def _open_xml(path: Path, target: Target) -> LoadedModel:
    backend = get_backend("openvino", target)
    from xform.backends.openvino.compile import load_xml

    return LoadedModel(path, _Opened(backend.name, target), lambda: load_xml(path, target.threads))


def _open_state(path: Path, target: Target) -> LoadedModel:
    backend = get_backend("torch_triton", target)
    from xform.backends.torch_triton.state import load_state

    artifact = backend.lower(load_state(path), target, LowerOptions())
    return LoadedModel(path, artifact, lambda: backend.load(artifact, LoadOptions()))


def _open_package(path: Path, target: Target) -> LoadedModel:
    backend = get_backend("torch_triton", target)
    from xform.backends.torch_triton.package import PackageRunner

    return LoadedModel(path, _Opened(backend.name, target), lambda: PackageRunner(path))


_OPENERS: dict[str, Callable[[Path, Target], LoadedModel]] = {
    ".onnx": _open_onnx,
    ".xml": _open_xml,
    ".safetensors": _open_state,
    ".pt2": _open_package,
}
