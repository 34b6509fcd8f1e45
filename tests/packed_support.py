"""What the tests of attention among packed tokens share: a block with a key-padding mask, and patterns of padding."""

from __future__ import annotations

B, S, C, H = 3, 6, 8, 2  # sequences, positions, channels, heads
TOGETHER = "qkv = MatMul(x, wqkv) q, k, v = Split <axis = 2, num_outputs = 3> (qkv)"
# @mask makes `bias`, @projections make q, k and v
BLOCK = """
    valid = Cast <to = 9> (mask) keys = Unsqueeze(valid, axes) @mask @projections
    qr = Reshape(q, heads) qh = Transpose <perm = [0, 2, 1, 3]> (qr)
    kr = Reshape(k, heads) kh = Transpose <perm = [0, 2, 1, 3]> (kr)
    vr = Reshape(v, heads) vh = Transpose <perm = [0, 2, 1, 3]> (vr)
    a = Attention(qh, kh, vh, bias) at = Transpose <perm = [0, 2, 1, 3]> (a) ar = Reshape(at, merged)
    o = MatMul(ar, wo) z = Add(x, o) there = Unsqueeze(valid, last) y = Where(there, z, zero)"""
PADDING = {
    "right": [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1] * 6],
    "holes": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]],
    "none": [[1] * 6] * 3,
    "empty": [[0] * 6, [1, 1, 0, 0, 0, 0], [0] * 6],
}
