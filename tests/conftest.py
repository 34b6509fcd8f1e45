"""Set-up of every test process."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes run side by side; read when torch is imported

import torch

if (
    torch.version.cuda is None
    and importlib.util.find_spec("torchvision") is not None
    and not hasattr(torch.ops.torchvision, "nms")
):
    # transformers and timm import torchvision, whose wheels are built for CUDA: beside a CPU torch its own operators
    # are missing, and declaring them is all that the import wants
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
