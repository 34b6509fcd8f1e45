"""The torch backend: graphs as torch modules, with Triton kernels on NVIDIA GPUs, and a second oracle on the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from xform.backends.base import PRECISIONS, Artifact, LoadOptions, LowerOptions, Missing
from xform.backends.torch_triton import available as _available
from xform.errors import TargetError, UsageError
from xform.graph import write
from xform.graph.clone import clone, source_opset
from xform.target import Target

if TYPE_CHECKING:
    from xform.backends.torch_triton.runner import TorchRunner

__all__ = ["COMPILE_MODES", "PRECISIONS", "TorchArtifact", "TorchTritonBackend"]

COMPILE_MODES = ("off", "inductor", "max-autotune")


@dataclass
class TorchArtifact(Artifact):
    """A graph that torch runs.

    Attributes:
        model: The graph; its weights are shared with the graph that it was lowered from.
        module: The same as a `torch.fx.GraphModule`; `print_readable()` shows it. Inputs in the order of the graph.
        precision: dtype that floats are computed in, None for their own.
        compile: How the module is run: as it is ("off"), or through torch.compile ("inductor", "max-autotune").
        examples: Inputs that it has run on, by name; what an exported file is traced with.
    """

    model: ir.Model = field(kw_only=True)
    module: Any = field(kw_only=True)
    precision: str | None = field(kw_only=True, default=None)
    compile: str = field(kw_only=True, default="off")
    examples: dict[str, Any] = field(kw_only=True, default_factory=dict)

    def save(self, path: Path) -> list[Path]:
        """Write it by the suffix of `path`.

        `.pt2`: an AOTInductor package, compiled for this machine's processor or GPU, that torch loads without xform.
        `.safetensors`: weights and graph in one file, which `state.load_state` reads. Otherwise: the ONNX graph.

        Raises:
            OutputError: It cannot be written.
            TargetError: There is no C++ compiler, or the module cannot be traced.
        """
        from xform.backends.torch_triton import package, state

        if path.suffix == ".pt2":
            return package.save_package(self, path)
        if path.suffix == ".safetensors":
            return state.save_state(self.model, path)
        return write.save(self.model, path)


class TorchTritonBackend:
    """Runs graphs with torch."""

    name: ClassVar[str] = "torch_triton"
    kinds: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    suffixes: ClassVar[tuple[str, ...]] = (".onnx", ".pt2", ".safetensors")
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    graph_precisions: ClassVar[tuple[str, ...]] = ()

    def check(self, target: Target, options: LowerOptions) -> None:
        """See `xform.backends.base.Backend.check`."""
        _check(options)

    def available(self, target: Target) -> Missing | None:
        """See `xform.backends.base.Backend.available`."""
        return _available.missing(target)

    def lower(self, graph: ir.Model, target: Target, options: LowerOptions) -> TorchArtifact:
        """Lower a copy of `graph`.

        Raises:
            TargetError: Operators that cannot be written in torch, all of them by name.
            UsageError: An unknown precision or compile mode, or an opset, which torch modules do not have.
        """
        from xform.backends.torch_triton.choose import settled
        from xform.backends.torch_triton.fuse import counts, fuse
        from xform.backends.torch_triton.lower import to_torch

        _check(options)
        precision = None if options.precision in (None, "float32") else options.precision
        model = clone(graph)
        module = to_torch(model, dtype=_dtype(precision), cast_outputs=True)
        found = fuse(module) if target.kind == "cuda" else []
        operators = Counter(node.op_type for node in model.graph.all_nodes())
        metadata: dict[str, Any] = {
            "opset": model.opset_imports.get("", 0),
            "source_opset": source_opset(graph),
            "portable": False,
            "domains": sorted({node.domain or "ai.onnx" for node in model.graph.all_nodes()}),
            "lowered": counts(found),
            "operators": dict(sorted(operators.items())),
            "placement": {f"torch {target.kind}": operators.total()},
            "precision": options.precision,
            "compile": options.compile,
            "threads": target.threads,
        }
        return TorchArtifact(
            self.name, target, metadata, model=model, module=module, precision=precision, compile=options.compile,
            choices=settled(found, runs_here=not options.compile_only),
        )  # fmt: skip

    def load(self, artifact: Artifact, options: LoadOptions) -> TorchRunner:
        """Put the module on its device. Raises TargetError where that is missing."""
        from xform.backends.torch_triton.runner import TorchRunner

        if not isinstance(artifact, TorchArtifact):
            raise UsageError(f"an artifact of backend {artifact.backend!r} cannot be loaded by {self.name!r}")
        missing = self.available(artifact.target)
        if missing is not None:
            raise TargetError(
                f"what was made for target {artifact.target} does not run here: {missing.what}",
                hint=f"run it on a machine that has one, or {missing.hint}",
            )
        return TorchRunner(artifact)


def _check(options: LowerOptions) -> None:
    if options.precision is not None and options.precision not in PRECISIONS:
        raise UsageError(f"unknown precision {options.precision!r}", hint=f"use one of {', '.join(PRECISIONS)}")
    if options.compile not in COMPILE_MODES:
        raise UsageError(f"unknown compile mode {options.compile!r}", hint=f"use one of {', '.join(COMPILE_MODES)}")
    if options.opset is not None or options.portable:
        raise UsageError(
            "a torch module has no opset and no portable form",
            hint="leave `opset` and `portable` out, or choose backend='onnxruntime'",
        )


def _dtype(precision: str | None) -> Any:
    import torch

    return None if precision is None else getattr(torch, precision)
