"""Is OpenVINO here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from xform.backends.base import Missing
from xform.target import Target

INSTALL = 'pip install "xform-compiler[openvino]"'


def missing(target: Target) -> Missing | None:
    """None if OpenVINO can serve the target, else what is missing with the command that installs it."""
    if importlib.util.find_spec("openvino") is None:
        return Missing("the package openvino is not installed", INSTALL)
    import openvino

    devices = openvino.Core().available_devices
    if "CPU" not in devices:
        return Missing(f"this build of openvino has no CPU device, only {', '.join(devices) or 'none'}", INSTALL)
    return None


_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")  # as /proc/cpuinfo calls them; the last one on Arm


def missing_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """None if the processor multiplies bfloat16, else what it lacks; OpenVINO would emulate it, slower than float32."""
    import openvino

    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        return f"OpenVINO finds {', '.join(sorted(capabilities))} here, not BF16"
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return None  # no such list on this system: OpenVINO's word counts
    return None if words.intersection(_BFLOAT16) else f"the processor has none of {', '.join(_BFLOAT16)}"
