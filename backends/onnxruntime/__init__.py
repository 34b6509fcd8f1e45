"""The ONNX Runtime backend: the default for the CPU."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from xform.backends.base import Artifact, LoadOptions, LowerOptions, Missing, check_compile, check_precision
from xform.backends.onnxruntime import available as _available
from xform.backends.onnxruntime import lower as _lower
from xform.errors import UsageError
from xform.graph import write
from xform.graph.clone import source_opset
from xform.target import Target

if TYPE_CHECKING:
    from xform.backends.onnxruntime.runner import OnnxRuntimeRunner

__all__ = ["OnnxArtifact", "OnnxRuntimeBackend"]

SESSION = "xform.session"  # metadata of a saved model: the settings of the session that it is meant to run in, as JSON


@dataclass
class OnnxArtifact(Artifact):
    """A lowered ONNX model.

    Attributes:
        model: The graph; its weights are shared with the graph that it was lowered from, unless lowering changed them.
    """

    model: ir.Model = field(kw_only=True)

    def save(self, path: Path) -> list[Path]:
        """One `.onnx` file, and a second one with the weights if they exceed 1.9 GB."""
        return write.save(self.model, path)

    def to_bytes(self) -> bytes:
        """The model as one protobuf. Raises UsageError above 1.9 GB."""
        return write.to_bytes(self.model)


class OnnxRuntimeBackend:
    """Runs ONNX graphs on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    kinds: ClassVar[tuple[str, ...]] = ("cpu",)
    suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16")
    graph_precisions: ClassVar[tuple[str, ...]] = ("float16",)

    def check(self, target: Target, options: LowerOptions) -> None:
        """See `xform.backends.base.Backend.check`."""
        check_precision(
            self.name, self.precisions, options.precision, "backend='openvino' or backend='torch_triton' for bfloat16"
        )
        check_compile(self.name, options)

    def available(self, target: Target) -> Missing | None:
        """See `xform.backends.base.Backend.available`."""
        return _available.missing(target)

    def lower(self, graph: ir.Model, target: Target, options: LowerOptions) -> OnnxArtifact:
        """Lower a copy of `graph`; `metadata` says the opset, the domains, and which forms were chosen how often."""
        from xform.backends.onnxruntime.session import SessionSettings, physical_cores

        model, forms = _lower.lower(graph, options)
        session = asdict(SessionSettings(target.threads or physical_cores()))
        model.metadata_props[SESSION] = json.dumps(session)
        operators = Counter(node.op_type for node in model.graph.all_nodes())
        metadata = {
            "opset": model.opset_imports.get("", 0),
            "source_opset": source_opset(graph),
            "portable": options.portable,
            "domains": sorted({node.domain or "ai.onnx" for node in model.graph.all_nodes()}),
            "lowered": forms,
            "operators": dict(sorted(operators.items())),
            "session": session,
            "precision": options.precision,
            "placement": {_available.PROVIDERS[0]: operators.total()},  # one provider, so every node runs there
        }
        return OnnxArtifact(self.name, target, metadata, model=model)

    def load(self, artifact: Artifact, options: LoadOptions) -> OnnxRuntimeRunner:
        """Open a session; its settings are added to the artifact's metadata."""
        # imported here, so that `available` can speak first where onnxruntime is not installed
        from xform.backends.onnxruntime.runner import OnnxRuntimeRunner
        from xform.backends.onnxruntime.session import SessionSettings, open_session, physical_cores

        if not isinstance(artifact, OnnxArtifact):
            raise UsageError(f"an artifact of backend {artifact.backend!r} cannot be loaded by {self.name!r}")
        settings = SessionSettings(options.threads or artifact.target.threads or physical_cores())
        session, weights = open_session(artifact.model, settings)
        artifact.metadata["session"] = asdict(settings)
        return OnnxRuntimeRunner(session, weights, artifact.model)
