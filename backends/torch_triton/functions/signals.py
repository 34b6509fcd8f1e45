"""Fourier transforms and windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def _transformed(
    function: Callable[..., torch.Tensor], signal: torch.Tensor, length: int | None, axis: int
) -> torch.Tensor:
    """A transform along `axis`, of an empty batch too (where torch refuses)."""
    if signal.numel():
        return function(signal, length, axis)
    place = axis % signal.ndim
    empty = [size == 0 and i != place for i, size in enumerate(signal.shape)]
    grown = signal.new_zeros([1 if none else size for none, size in zip(empty, signal.shape, strict=True)])
    return function(grown, length, axis)[tuple(slice(0, 0) if none else slice(None) for none in empty)]


def dft(x: torch.Tensor, length: int | None, axis: int, onesided: bool, inverse: bool) -> torch.Tensor:
    """DFT of [..., 1] real or [..., 2] complex numbers along `axis`; the result is complex, [..., 2].

    An inverse onesided transform gives real numbers, [..., 1].
    """
    axis = axis if axis >= 0 else axis + x.ndim
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    signal = torch.complex(wide[..., 0], wide[..., 1]) if x.shape[-1] == 2 else wide[..., 0]
    if inverse and onesided:
        count = length if length is not None else 2 * (signal.shape[axis] - 1)
        result = _transformed(torch.fft.irfft, signal, count, axis)[..., None]
        return result.to(x.dtype)
    if inverse:
        spectrum = _transformed(torch.fft.ifft, signal, length, axis)
    elif onesided and not signal.is_complex():
        spectrum = _transformed(torch.fft.rfft, signal, length, axis)
    else:
        spectrum = _transformed(torch.fft.fft, signal, length, axis)
        if onesided:
            spectrum = spectrum.narrow(axis, 0, spectrum.shape[axis] // 2 + 1)
    return torch.view_as_real(spectrum).to(x.dtype)


def stft(x: torch.Tensor, step: int, window: torch.Tensor | None, length: int | None, onesided: bool) -> torch.Tensor:
    """STFT of [batch, samples(, 1 or 2)]: [batch, frames, frequencies, 2]."""
    size = length if length is not None else window.shape[0] if window is not None else x.shape[1]
    is_complex = x.ndim == 3 and x.shape[-1] == 2
    signal = torch.complex(x[..., 0], x[..., 1]) if is_complex else x[..., 0] if x.ndim == 3 else x
    frames = signal.unfold(1, size, step)
    if window is not None:
        frames = frames * window
    function = torch.fft.rfft if onesided and not is_complex else torch.fft.fft
    spectrum = _transformed(function, frames, None, -1)
    if onesided and is_complex:
        spectrum = spectrum[..., : size // 2 + 1]
    return torch.view_as_real(spectrum)


def mel_weights(
    bins: int, dft_length: int, rate: int, low: float, high: float, dtype: torch.dtype, like: torch.Tensor | None
) -> torch.Tensor:
    """MelWeightMatrix: triangles [dft_length / 2 + 1, bins] whose edges are evenly spaced in mel.

    Args:
        like: On whose device the result is; None for the CPU, where it is computed.
    """

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    count = dft_length // 2 + 1
    steps = mel(low) + torch.arange(bins + 2, dtype=torch.float64) * ((mel(high) - mel(low)) / (bins + 2))
    hertz = 700 * (10 ** (steps / 2595) - 1)
    places = torch.floor((dft_length + 1) * hertz / rate).to(torch.int64)
    result = torch.zeros(count, bins, dtype=torch.float64)
    for i in range(bins):
        lower, centre, upper = (int(p) for p in places[i : i + 3])
        if centre == lower:
            result[centre, i] = 1
        else:
            rise = torch.arange(lower, centre + 1)
            result[rise, i] = (rise - lower).to(torch.float64) / (centre - lower)
        if upper > centre:
            fall = torch.arange(centre, upper)
            result[fall, i] = (upper - fall).to(torch.float64) / (upper - centre)
    return result.to(dtype=dtype, device=None if like is None else like.device)
