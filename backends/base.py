"""What a backend is: it lowers a graph to an artifact that stands on its own, and loads that artifact to run it.

A backend reads the graph and the target only. It never sees passes, reports or the user's calling convention: values go
in and come out by name, and the API above it restores the signature of the original model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import onnx_ir as ir

from xform.errors import UsageError
from xform.target import Target


class Missing(NamedTuple):
    """Why a backend cannot be used here.

    Attributes:
        what: What is missing.
        hint: How to get it.
    """

    what: str
    hint: str


@dataclass(frozen=True)
class LowerOptions:
    """How to lower a graph.

    Attributes:
        opset: Default-domain opset of the result; None keeps the source's, or the lowest newer one that the result
            needs.
        portable: Write standard ONNX operators only, so that any ONNX runtime can run the result.
        verbatim: Write the operators of the graph as they are: for a graph that came in and is to stay what it is.
        attention: The first form to try for attention, where the backend has several: "packed" (projections taken in;
            packed tokens by sequence), "multi_head" (one operator on queries, keys and values), "written" (products and
            a softmax).
        precision: dtype that floats are computed in: "float32", "float16" or "bfloat16"; None for the model's own.
        compile: For torch: "off", or torch.compile of the lowered module ("inductor", "max-autotune") where that is
            faster.
        compile_only: The result is not run here, so the device need not be here.
    """

    opset: int | None = None
    portable: bool = False
    verbatim: bool = False
    attention: str = "packed"
    precision: str | None = None
    compile: str = "off"
    compile_only: bool = False


PRECISIONS = ("float32", "float16", "bfloat16")  # what some backend computes floats in


@dataclass(frozen=True)
class LoadOptions:
    """How to load an artifact.

    Attributes:
        threads: Intra-op threads; None takes the target's number, or one per physical core.
    """

    threads: int | None = None


@dataclass(frozen=True)
class Choice:
    """Something that a backend decided by itself, for `explain`.

    Attributes:
        rule: What was decided about: the name of a kernel or a form.
        applied: Whether it is used.
        nodes: Original names of the nodes concerned.
        reason: What was measured, or why it is not used.
        concept: What users ask about ("layer_norm", "attention", ...).
    """

    rule: str
    applied: bool
    nodes: tuple[str, ...] = ()
    reason: str = ""
    concept: str = ""


@dataclass
class Artifact(ABC):
    """What a backend made of a graph.

    Attributes:
        backend: Name of the backend.
        target: What it was lowered for.
        metadata: JSON-ready facts about it: opset, lowered operators, session options, size.
        choices: What the backend decided and nobody has taken into a report yet; a first run can add to it.
        notes: What the user should know of how it computes; they become warnings.
    """

    backend: str
    target: Target
    metadata: dict[str, Any] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list, kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)

    @abstractmethod
    def save(self, path: Path) -> list[Path]:
        """Write it to `path` atomically and return every file written. Raises OutputError."""


class Runner(Protocol):
    """A loaded artifact."""

    @property
    def input_names(self) -> Sequence[str]:
        """Names of the inputs in the order of the graph."""

    @property
    def output_names(self) -> Sequence[str]:
        """Names of the outputs in the order of the graph."""

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """Run once.

        Args:
            feeds: Input name to numpy array or torch tensor (one kind per call), of the declared dtype.

        Returns:
            The outputs in the order of `output_names`: torch tensors if any input was one, else numpy arrays.

        Raises:
            UsageError: A missing or unknown input, or a wrong dtype or rank.
        """

    def close(self) -> None:
        """Release the memory and the threads; the runner cannot be used any more."""


class Backend(Protocol):
    """One way to run graphs. Implementations hold no state.

    Attributes:
        name: What users call it.
        kinds: Kinds of targets that it serves.
        suffixes: Of the files that its artifacts can be saved to; each says a format.
        precisions: Dtypes that it can be asked to compute floats in, where the processor has them.
        graph_precisions: Those of `precisions` that are written into the graph, by the pass `convert_precision`, before
            it is lowered.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[tuple[str, ...]]
    precisions: ClassVar[tuple[str, ...]]
    graph_precisions: ClassVar[tuple[str, ...]]

    def check(self, target: Target, options: LowerOptions) -> None:
        """Refuse what cannot be lowered so, before any work is done.

        Raises:
            UsageError: Options that this backend does not have.
            TargetError: A precision that this machine's processor does not have.
        """

    def available(self, target: Target) -> Missing | None:
        """None if it can be used here for `target`, else what is missing and how to get it."""

    def lower(self, graph: ir.Model, target: Target, options: LowerOptions) -> Artifact:
        """Lower a copy of `graph`. Raises TargetError naming operators and nodes that it cannot run."""

    def load(self, artifact: Artifact, options: LoadOptions) -> Runner:
        """Load an artifact of this backend on this machine."""


def check_precision(name: str, known: Sequence[str], asked: str | None, elsewhere: str) -> None:
    """Refuse a precision that a backend does not have, with a UsageError that names those that it has.

    Args:
        name: The backend.
        elsewhere: Backends that have other ones, as "backend='x' for y", for the hint.
    """
    if asked is not None and asked not in PRECISIONS:
        raise UsageError(f"unknown precision {asked!r}", hint=f"use one of {', '.join(PRECISIONS)}")
    if asked is not None and asked not in known:
        has = f"precision {', '.join(known)}"
        raise UsageError(
            f"backend {name!r} does not compute in precision {asked!r}; it has {has}",
            hint=f"leave `precision` out for the model's own, or choose {elsewhere}",
        )


def check_compile(name: str, options: LowerOptions) -> None:
    """Refuse torch.compile, of a backend that is not torch."""
    if options.compile != "off":
        raise UsageError(f"backend {name!r} takes no `compile`", hint="leave it out, or choose backend='torch_triton'")


def check_names(feeds: Mapping[str, Any], inputs: Sequence[str], required: Sequence[str]) -> None:
    """Every required input is fed, and nothing that is no input; else a UsageError that names the first such one."""
    missing = [name for name in required if name not in feeds]
    unknown = [name for name in feeds if name not in inputs]
    if missing or unknown:
        what = f"the model has no input named {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
        raise UsageError(what, hint=f"its inputs are: {', '.join(inputs) or 'none'}")
