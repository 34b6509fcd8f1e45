"""Draw the last line of benchmarks/peers.py: `python benchmarks/peers_plot.py result.json performance.svg`.

One group of bars per model: how many times as fast as ONNX Runtime on the export each contender is. Plain SVG, so that
nothing has to be installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = {
    "xform": "#1b6ca8", "xform-padded": "#6fa8d0", "xform-int8": "#0b3c5d",
    "ort": "#999999", "ort-transformers": "#bbbbbb",
    "onnxscript": "#d0c3a0",
    "onnxslim": "#c9d6a3", "inductor": "#e0a080", "openvino": "#9b7bb8", "ort-int8": "#666666",
    "openvino-int8": "#5d3f7a",
}  # fmt: skip
BAR, GAP, ROW, LEFT, SCALE = 9, 10, 16, 170, 180.0  # pixels; SCALE is the width of a ratio of 1


def draw(table: dict[str, dict[str, float]]) -> str:
    """The SVG text."""
    parts: list[str] = []
    y, widest = 40.0, 1.0
    for model, contenders in table.items():
        base = contenders.get("ort")
        if not base:
            continue
        parts.append(f'<text x="4" y="{y + ROW:.0f}" font-size="12">{escape(model)}</text>')
        for name in (n for n in COLOURS if n in contenders):
            ratio = base / contenders[name]
            widest = max(widest, ratio)
            width = ratio * SCALE
            parts.append(
                f'<rect x="{LEFT}" y="{y:.0f}" width="{width:.1f}" height="{BAR - 1}" fill="{COLOURS[name]}"/>'
            )
            parts.append(
                f'<text x="{LEFT + width + 4:.1f}" y="{y + BAR - 2:.0f}" font-size="8">{name} {ratio:.2f}</text>'
            )
            y += BAR
        y += GAP
    line = f'<line x1="{LEFT + SCALE}" y1="34" x2="{LEFT + SCALE}" y2="{y:.0f}" stroke="#000" stroke-dasharray="3 3"/>'
    title = '<text x="4" y="20" font-size="14">Times as fast as ONNX Runtime on the export (longer is better)</text>'
    width = LEFT + widest * SCALE + 120
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y + 10:.0f}" font-family="sans-serif">'
    )
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, background, title, line, *parts, "</svg>"]) + "\n"


def main() -> None:
    """Read the last line of a file, write the picture."""
    lines = Path(sys.argv[1]).read_text().strip().splitlines()
    Path(sys.argv[2]).write_text(draw(json.loads(lines[-1])["table"]))


if __name__ == "__main__":
    main()
