"""The OpenVINO backend for the CPU: the same contract as ONNX Runtime's, for the machines on which it is faster.

The graph is lowered to standard ONNX operators of an opset that OpenVINO's importer reads, in the spellings that it
fuses itself (attention, RMS norm, rotary embedding). The artifact is that ONNX file, which OpenVINO reads as it is, or
OpenVINO's own `.xml` and `.bin`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from xform.backends.base import Artifact, LoadOptions, LowerOptions, Missing, check_compile, check_precision
from xform.backends.onnxruntime import SESSION
from xform.backends.onnxruntime import lower as _lower
from xform.backends.openvino import available as _available
from xform.errors import TargetError, UsageError
from xform.graph import write
from xform.graph.clone import clone, source_opset
from xform.target import Target

if TYPE_CHECKING:
    from xform.backends.openvino.runner import OpenVinoRunner

__all__ = ["OpenVinoArtifact", "OpenVinoBackend"]

_NEWEST_OPSET = 20  # beyond it, operators such as Attention and RMSNormalization are not all in OpenVINO's importer
_DTYPES = frozenset(
    {"FLOAT", "DOUBLE", "FLOAT16", "BOOL", *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))}
)


@dataclass
class OpenVinoArtifact(Artifact):
    """A lowered ONNX model for OpenVINO.

    Attributes:
        model: The graph; its weights are shared with the graph that it was lowered from.
        group: Channels that share a scale in products whose inputs are rounded at run time; 0 for none.
        precision: dtype that floats are computed in, "float32" or "bfloat16".
    """

    model: ir.Model = field(kw_only=True)
    group: int = field(default=0, kw_only=True)
    precision: str = field(default="float32", kw_only=True)

    def save(self, path: Path) -> list[Path]:
        """`.xml` with a `.bin` beside it, or for any other suffix the ONNX file; both are written atomically."""
        if path.suffix != ".xml":
            return write.save(self.model, path)
        from xform.backends.openvino.compile import save_xml

        return save_xml(self.model, path, self.group, self.precision)


class OpenVinoBackend:
    """Runs ONNX graphs on the CPU with OpenVINO."""

    name: ClassVar[str] = "openvino"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)
    suffixes: ClassVar[tuple[str, ...]] = (".onnx", ".xml")
    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16")
    graph_precisions: ClassVar[tuple[str, ...]] = ("float16",)

    def check(self, target: Target, options: LowerOptions) -> None:
        """See `xform.backends.base.Backend.check`."""
        check_precision(self.name, self.precisions, options.precision, "backend='torch_triton'")
        check_compile(self.name, options)
        asked = options.precision == "bfloat16" and not options.compile_only
        missing = _available.missing_bfloat16() if asked else None
        if missing is not None:
            raise TargetError(
                f"this machine does not compute in bfloat16: {missing}",
                hint="leave precision out, or run on a processor with AMX or AVX-512 BF16 (Intel since Sapphire "
                "Rapids, AMD since Zen 4), or give compile_only=True to write the model for one",
            )

    def available(self, target: Target) -> Missing | None:
        """See `xform.backends.base.Backend.available`."""
        return _available.missing(target)

    def lower(self, graph: ir.Model, target: Target, options: LowerOptions) -> OpenVinoArtifact:
        """Lower a copy of `graph`. Raises TargetError where an input or output has a dtype that OpenVINO lacks."""
        from xform.backends.onnxruntime.session import physical_cores
        from xform.backends.openvino.compile import settings_for
        from xform.backends.openvino.dynamic_groups import take_groups

        _refuse_dtypes(graph)
        opset = options.opset or min(source_opset(graph) or _NEWEST_OPSET, _NEWEST_OPSET)
        # norms are kept as one operator: OpenVINO runs MVN for them, and the written-out form slower
        opset = max(opset, 17) if options.opset is None else opset
        graph = clone(graph)
        group, choices = take_groups(graph)
        model, forms = _lower.lower(graph, replace(options, opset=opset, portable=True))
        precision = "bfloat16" if options.precision == "bfloat16" else "float32"
        session = settings_for(target.threads or physical_cores(), group, precision)
        model.metadata_props[SESSION] = json.dumps(session)
        operators = Counter(node.op_type for node in model.graph.all_nodes())
        metadata = {
            "opset": model.opset_imports.get("", 0),
            "source_opset": source_opset(graph),
            "portable": True,
            "domains": sorted({node.domain or "ai.onnx" for node in model.graph.all_nodes()}),
            "lowered": forms,
            "operators": dict(sorted(operators.items())),
            "placement": {"OpenVINO CPU": operators.total()},
            "session": session,
            "precision": options.precision,
        }
        return OpenVinoArtifact(
            self.name,
            target,
            metadata,
            choices=choices,
            notes=_notes(graph),
            model=model,
            group=group,
            precision=precision,
        )

    def load(self, artifact: Artifact, options: LoadOptions) -> OpenVinoRunner:
        """Compile it; the settings are added to the artifact's metadata."""
        # imported here, so that `available` can speak first where openvino is not installed
        from xform.backends.onnxruntime.session import physical_cores
        from xform.backends.openvino.compile import compile_model, settings_for
        from xform.backends.openvino.runner import OpenVinoRunner

        if not isinstance(artifact, OpenVinoArtifact):
            raise UsageError(f"an artifact of backend {artifact.backend!r} cannot be loaded by {self.name!r}")
        threads = options.threads or artifact.target.threads or physical_cores()
        settings = settings_for(threads, artifact.group, artifact.precision)
        artifact.metadata["session"] = settings
        return OpenVinoRunner(compile_model(artifact.model, settings), artifact.model)


def _notes(graph: ir.Model) -> list[str]:
    values = (value for node in graph.graph.all_nodes() for value in node.outputs)
    if any(value.dtype is ir.DataType.DOUBLE for value in values):
        return ["OpenVINO computes float64 in float32; for float64 leave backend out, or use backend='torch_triton'"]
    return []


def _refuse_dtypes(graph: ir.Model) -> None:
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.dtype is None or value.dtype.name not in _DTYPES:
            dtype = "no known dtype" if value.dtype is None else value.dtype.name.lower()
            raise TargetError(
                f"OpenVINO cannot run the graph: {value.name!r} has {dtype}",
                where=value.name or "",
                hint="leave backend out, or use backend='torch_triton', which runs every dtype",
            )
