"""What the result will run on. Passes read a `Target`, never a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xform.errors import UsageError

KINDS = ("cpu", "cuda", "edge")


@dataclass(frozen=True)
class Target:
    """Description of the machine that the optimized model is for.

    Attributes:
        kind: "cpu", "cuda" or "edge".
        arch: Instruction set for edge targets ("x86_64", "aarch64", ...); None means this machine's.
        threads: Number of intra-op threads; None means one per physical core.
    """

    kind: str = "cpu"
    arch: str | None = None
    threads: int | None = None

    def with_threads(self, threads: int | None) -> Target:
        """The target with a number of threads; None leaves it as it is. Raises UsageError on what is not a number."""
        if threads is None:
            return self
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise UsageError(f"threads must be a whole number from 1 on, not {threads!r}")
        if self.threads is not None and self.threads != threads:
            raise UsageError(f"threads={threads} was given, and a target with {self.threads} threads")
        return replace(self, threads=threads)

    @staticmethod
    def parse(text: str | Target) -> Target:
        """`"cpu"`, `"cuda"`, `"edge:aarch64"` to a Target. Raises UsageError on anything else."""
        if isinstance(text, Target):
            return text
        kind, _, arch = text.partition(":")
        if kind not in KINDS:
            raise UsageError(f"unknown target {text!r}", hint="use cpu or cuda")
        if arch and kind != "edge":
            raise UsageError(f"target {kind!r} takes no architecture, got {text!r}", hint="use edge:<arch>")
        return Target(kind, arch or None)

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind
