"""Triton kernels run in the interpreter where there is no GPU; it is chosen when a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
