"""The version of xform, apart from the rest so that any part can name it."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "xform-compiler"  # the name `xform` on PyPI is another project's

try:
    __version__ = metadata.version(DISTRIBUTION)
except metadata.PackageNotFoundError:  # a checkout that is run without being installed
    __version__ = "0+unknown"
