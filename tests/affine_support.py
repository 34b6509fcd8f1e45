"""What the tests of merging share: graphs from a body and its constants, run before and after the pass."""

from __future__ import annotations

import numpy as np
from support import parse, rewritten, run

from xform.passes.reparameterize import MergeAffineMaps


def applied(remarks):
    return [r for r in remarks if r.verdict == "applied"]


def missed(remarks):
    return [r for r in remarks if r.verdict == "missed"]


RNG = np.random.default_rng(11)
PASS = MergeAffineMaps()


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def norm(channels, name):
    return {
        f"{name}s": RNG.uniform(0.5, 1.5, channels).astype(np.float32),
        f"{name}b": normal(channels),
        f"{name}m": normal(channels),
        f"{name}v": RNG.uniform(0.5, 1.5, channels).astype(np.float32),
    }


def bn(result, operand, name):
    return f"{result} = BatchNormalization ({operand}, {name}s, {name}b, {name}m, {name}v)"


def declared(constants):
    kinds = {"float32": "float", "float16": "float16", "int64": "int64", "int8": "int8"}
    return ", ".join(
        f"{kinds[str(array.dtype)]}[{','.join(map(str, array.shape))}] {name}" for name, array in constants.items()
    )


def graph(body, constants, x="[2,6,9,8]", y="[2,M,H,W]", extra=""):
    return f"g (float{x} x{extra}, {declared(constants)}) => (float{y} y) {{ {body} }}"


def check(body, constants, shape=(2, 6, 9, 8), y="[2,M,H,W]", feeds=None, **kwargs):
    feeds = feeds or {"x": normal(*shape)}
    written = str(list(shape)).replace(" ", "")
    found = run(parse(graph(body, constants, written, y), constants), feeds)[0].shape
    text = graph(body, constants, written, str(list(found)).replace(" ", ""))
    return rewritten(text, constants, feeds, PASS, **{"rtol": 2e-5, "atol": 2e-5, **kwargs})
