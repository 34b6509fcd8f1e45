"""The machine and the versions that a report was made with."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "xform-compiler",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "numpy",
    "transformers",
    "triton",
    "apache-tvm",
)
CPU_FEATURES = (
    "sse4_2",
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)


@dataclass(frozen=True)
class Environment:
    """Where something was measured.

    Attributes:
        versions: Installed packages that matter and their versions; absent ones are left out.
        python: Version of the interpreter.
        system: Operating system and machine, "Linux-x86_64".
        processor: Name of the CPU as the system tells it; empty if it does not.
        cores: CPU cores that this process may use.
        cpu_features: Instruction sets that decide about speed.
    """

    versions: dict[str, str]
    python: str
    system: str
    processor: str
    cores: int
    cpu_features: tuple[str, ...]

    @staticmethod
    def here() -> Environment:
        """This process's machine and packages."""
        name, features = processor()
        return Environment(
            installed(PACKAGES),
            platform.python_version(),
            f"{platform.system()}-{platform.machine()}",
            name,
            usable_cores(),
            features,
        )


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of `packages` that are installed."""
    return {package: version for package in packages if (version := _version(package)) is not None}


@cache  # reading a package's metadata takes ten milliseconds, and every run asks
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache  # some twenty milliseconds
def code_fingerprint(package: Path = Path(__file__).parents[1]) -> str:
    """32 hexadecimal digits of all Python sources in a folder, by default of xform itself.

    A version names a release; this also tells the states of a working tree apart.
    """
    digest = hashlib.sha256()
    for folder, inner, names in os.walk(package, followlinks=True):  # parts of xform are links in a checkout
        inner.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                source = Path(folder, name)
                for part in (str(source.relative_to(package)).encode(), source.read_bytes()):
                    digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def usable_cores() -> int:
    """Number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """Name and relevant instruction sets of the CPU; on systems without /proc only the name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor(), ()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.processor()), tuple(f for f in CPU_FEATURES if f in flags)
