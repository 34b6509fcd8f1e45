"""What every optimized model can be asked."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NoReturn, Self

import onnx_ir as ir

from xform.backends import Artifact, check_suffix
from xform.compilation import Compiled
from xform.errors import UsageError
from xform.graph.atomic import refuse_overwriting
from xform.graph.write import sources
from xform.report.brief import as_html, verdict
from xform.report.explanation import explanation
from xform.report.files import report_path, write_report
from xform.report.schema import Report


class Optimized(ABC):
    """An optimized model.

    Attributes:
        report: What was done, with sizes, errors and times.
        graph: The canonical graph after the passes.
        artifact: The lowered model.
        original: The model that it was made from; None where that was a file or a graph.
    """

    original: Any = None

    @property
    @abstractmethod
    def _compiled(self) -> Compiled:
        """The compilation that questions are about."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""

    @property
    def report(self) -> Report:
        """See the class. Grows when a backend decides something at a first run."""
        self._compiled.note_choices()
        return self._compiled.report

    @property
    def graph(self) -> ir.Model:
        """See the class."""
        return self._compiled.graph

    @property
    def artifact(self) -> Artifact:
        """See the class."""
        return self._compiled.artifact

    def explain(self, concept: str | None = None) -> str:
        """What was done and what was not, and why: everything, or about one concept, pass or rule ("attention")."""
        return explanation(self.report, self.graph, concept)

    def save(self, path: str | os.PathLike[str], *, report: bool = False) -> list[Path]:
        """Write the lowered model, atomically.

        Args:
            path: A file name. The suffix says the format, and must be one that the backend writes.
            report: Write the report beside it too, as `m.report.json` for `m.onnx`.

        Returns:
            Every file written.

        Raises:
            OutputError: The files cannot be written.
            UsageError: The backend does not write such a file, or it is one that the model is read from.
            VerificationError: Weights that the result still reads from the original have changed since it was
                verified.
        """
        self._check_unchanged()
        target = Path(path).absolute()
        check_suffix(target, self.artifact.backend)
        beside = {report_path(target): self.report} if report else {}
        refuse_overwriting([target, *beside], sources(self.graph))
        files = self.artifact.save(target)
        for file, described in beside.items():
            write_report(described, file)
        return [*files, *beside]

    @abstractmethod
    def _check_unchanged(self) -> None:
        """Raise VerificationError where a file would not hold what was verified."""

    def eval(self) -> Self:
        """Itself: it always computes what the model computes in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Refuse: nothing here can be trained. `train(False)` is `eval()`.

        Raises:
            UsageError: `mode` is true.
        """
        if mode:
            raise UsageError(
                "an optimized model cannot be trained: its weights are folded, and it computes no gradients",
                hint="train the module itself, and optimize it again",
            )
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself, where it is on this device and of this dtype already.

        Raises:
            UsageError: Another device or dtype.
        """
        import torch

        # private, but what nn.Module.to reads its many forms of arguments with
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        target = self._device()
        if device is not None and device.type != target:
            raise UsageError(
                f"an optimized model stays on the device that it was made for, {target}; asked for {device}",
                hint=f'optimize for that device: xform.optimize(model, target="{device.type}")',
            )
        if dtype is not None and dtype not in self._float_dtypes():
            name = str(dtype).removeprefix("torch.")
            raise UsageError(
                f"an optimized model keeps its dtypes; asked for {name}",
                hint=f"optimize the module in that dtype: xform.optimize(model.to(torch.{name})), or give precision=",
            )
        return self

    @abstractmethod
    def _device(self) -> str:
        """The kind of device that it runs on."""

    def _float_dtypes(self) -> set[Any]:
        """torch's dtypes of floating-point inputs and outputs."""
        import torch

        names = {
            value.dtype.numpy().name
            for value in (*self.graph.graph.inputs, *self.graph.graph.outputs)
            if value.dtype is not None and value.dtype.is_floating_point()
        }
        return {getattr(torch, name) for name in names if hasattr(torch, name)}

    def __repr__(self) -> str:
        return f"<xform.{type(self).__name__} {self._described()}>"

    def _described(self) -> str:
        report = self.report
        return f"{report.source}: {report.backend} on {report.target}, {verdict(report)}"

    def _repr_html_(self) -> str:
        return as_html(self.report)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UsageError(
            "an optimized model cannot be copied: it holds a loaded runtime session",
            hint="share it, as calls from several threads are safe; or optimize a copy of the original",
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "an optimized model cannot be pickled: it holds a loaded runtime session",
            hint="save it with .save(path) and open it with xform.load(path) where it is needed",
        )
