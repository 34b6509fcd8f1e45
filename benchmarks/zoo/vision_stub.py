"""Let torchvision import beside a CPU build of torch.

torchvision's published wheels are compiled for CUDA; beside a CPU torch their operator library does not load, and the
Python package then stops at operators that it expects to be declared. Declaring the schemas first is enough: no
architecture of the zoo runs them. Import this module before timm, torchvision or transformers.
"""

from __future__ import annotations

import importlib.util

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor a, Tensor b, float c) -> Tensor",
)

# The registration lives as long as this object does.
library: torch.library.Library | None = None
if (
    torch.version.cuda is None  # beside a CUDA build the library loads, and declares them itself
    and importlib.util.find_spec("torchvision") is not None
    and not hasattr(torch.ops.torchvision, "nms")
):
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in _SCHEMAS:
        library.define(_schema)
