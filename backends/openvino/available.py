"""Is OpenVINO here."""

from __future__ import annotations

import importlib.util

from xform.target import Target

INSTALL = 'pip install "xform-compiler[openvino]"'


def missing(target: Target) -> str | None:
    """None if OpenVINO can serve the target, else what is missing with the command that installs it."""
    if importlib.util.find_spec("openvino") is None:
        return f"the package openvino is not installed\n  what to do: {INSTALL}"
    import openvino

    devices = openvino.Core().available_devices
    if "CPU" not in devices:
        return f"this build of openvino has no CPU device, only {', '.join(devices) or 'none'}\n  what to do: {INSTALL}"
    return None
