"""Where channels of images lie in memory: first, as ONNX has them, or last, as tensor cores read them.

cuDNN's kernels for half precision want channels last (NHWC) and else convert around each convolution. torch computes a
convolution channels last if its weight or its input is, and what follows it element by element keeps that. So the
weights alone decide for a whole module. A module whose convolutions alternate with flattened tokens may lose by it, and
one in float32 may too: both are timed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from xform.backends.base import Choice
from xform.backends.torch_triton.choose import GAIN
from xform.backends.torch_triton.kernels.common import is_call, origins


class Layouts:
    """The two layouts of the weights [M, C / group, kH, kW] of a module's two-dimensional convolutions.

    Weights of convolutions in branches and loops come in as arguments and are left as they are.

    Attributes:
        nodes: Original names of those convolutions; empty where there is nothing to choose.
    """

    def __init__(self, module: GraphModule) -> None:
        found: dict[int, torch.Tensor] = {}
        nodes: list[str] = []
        for node in module.graph.nodes:
            if is_call(node, F.conv2d) and node.args[1].op == "get_attr":
                weight = operator.attrgetter(str(node.args[1].target))(module)
                found[id(weight)] = weight
                nodes += origins(node)
        self._weights = list(found.values())
        self.nodes = tuple(dict.fromkeys(nodes))

    def choose(self, seconds: Callable[[], float]) -> dict[str, Any] | None:
        """Keep the weights as they are, or channels last if that is faster.

        Args:
            seconds: Of one call of the module with its weights as they are now.

        Returns:
            The chosen layout, "contiguous" or "channels_last", and the seconds of both; None without convolutions.
        """
        if not self._weights:
            return None
        before = [weight.data for weight in self._weights]
        first = seconds()
        for weight in self._weights:
            # unlike contiguous(), this sets the strides of 1x1 kernels too, by which torch takes its decision
            weight.data = weight.data.to(memory_format=torch.channels_last)
        last = seconds()
        gains = first >= last * GAIN
        if not gains:
            for weight, data in zip(self._weights, before, strict=True):
                weight.data = data
        chosen = "channels_last" if gains else "contiguous"
        return {"chosen": chosen, "seconds": {"contiguous": first, "channels_last": last}}

    def as_choice(self, measured: dict[str, Any]) -> Choice:
        """What `choose` decided, for `explain`."""
        first, last = (f"{1e6 * measured['seconds'][key]:.1f} us" for key in ("contiguous", "channels_last"))
        applied = measured["chosen"] == "channels_last"
        gain = "" if applied else ", which gains nothing: they stay first"
        reason = f"the module takes {last} with channels last, {first} with channels first{gain}"
        return Choice("channels_last", applied, self.nodes, reason, "conv")
