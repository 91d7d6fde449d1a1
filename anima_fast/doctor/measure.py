"""Is it a picture or noise, and are its halves alike? Numbers of a decoded picture or of a latent.

Power spectrum, averaged over rings of equal width in log frequency (4 an octave), of the picture at one sample a
latent pixel (8 x 8 pixels: below that, the VAE makes smooth texture of any latent):

    flatness = geometric mean / arithmetic mean of the rings' power      1 for white noise
    slope    = d log power / d log frequency                             0 for white noise, about -2 for photographs
                                                                         and drawings (Field 1987; power ~ 1/f^2)
    fine     = share of the variance that lies below 8 x 8 pixels        0.98 for white pixel noise
    halves   = how far the left half's blocks are from the right half's, in standard deviations of a block (the
               largest of mean R, G, B and log contrast over 8 x 8 blocks; Cohen's d)

A flatness depends on how many octaves there are, so the limits are exponents: that of a spectrum f^-0.7 on the very
same rings is where noise begins, that of f^-1.2 where pictures end; what lies between, or too near by the standard
error of the slope (small pictures), is "unclear". Half-finished denoising lies there.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import invalid

__all__ = ["CELL", "Measures", "decode", "difference", "latent_array", "latent_picture", "measure", "to_json"]

Array = npt.NDArray[np.float64]

#: Pixels of a picture that are one latent pixel, each way.
CELL = 8

#: Exponents of the power law where noise begins and pictures end. Real pictures have 1.5 to 3.
NOISE, PICTURE = 0.7, 1.2

#: A contrast below 2 of 255 is no picture: NaN comes out of ComfyUI as black.
BLANK = 2 / 255

#: More of the variance than this below 8 x 8 pixels is texture without content; line art has up to a third.
FINE = 0.6

#: 32 blocks a side have a standard error of 0.25, so noise of one kind reaches this once in thousands of pictures.
HALVES = 1.0

_BLOCKS = 8

#: With fewer latent pixels a side there is little over an octave to tell a slope by: everything is "unclear".
_LEAST = 12


@dataclasses.dataclass(frozen=True)
class Measures:
    """See the module's text. `kind` is "picture", "noise", "blank" or "unclear"."""

    kind: str
    width: int
    height: int
    flatness: float
    noise_above: float  # this size's flatness of f^-NOISE and f^-PICTURE
    picture_below: float
    slope: float
    slope_error: float
    fine: float
    contrast: float
    left: tuple[float, float]  # mean, contrast
    right: tuple[float, float]
    halves: float

    @property
    def halves_differ(self) -> bool:
        return self.halves > HALVES


def measure(planes: npt.ArrayLike, cell: int = CELL) -> Measures:
    """The numbers of `planes`.

    Args:
        planes: `[channels, height, width]`: a picture of values 0 … 1 (`decode`), or a latent (`latent_array`).
        cell: samples of it that are one latent pixel: 8 for pictures, 1 for latents.

    Raises ValueError if it is smaller than 8 x 8 latent pixels.
    """
    array = np.asarray(planes, dtype=np.float64)
    if array.ndim != 3 or min(array.shape[1:]) < 8 * cell:
        raise invalid("picture", f"shape {list(array.shape)}", f"[channels, at least {8 * cell}, at least {8 * cell}]")
    height, width = array.shape[1:]
    finite = bool(np.isfinite(array).all())
    array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    coarse = _shrink(array, cell)
    # Latent channels have scales of their own, those of a picture have not.
    frequency, power = _rings(
        coarse / np.maximum(coarse.std(axis=(1, 2), keepdims=True), 1e-12) if cell == 1 else coarse
    )
    noise_above, picture_below = (_flatness(frequency**-exponent) for exponent in (NOISE, PICTURE))
    contrast = float(array.std(axis=(1, 2)).mean())
    half = width // 2
    left, right = array[:, :, :half], array[:, :, width - half :]
    cut = array[:, : coarse.shape[1] * cell, : coarse.shape[2] * cell]
    whole = float(cut.var(axis=(1, 2)).mean())
    fine = max(0.0, 1 - float(coarse.var(axis=(1, 2)).mean()) / whole) if whole > 0 else 0.0
    blank = not finite or contrast < BLANK or not power.any()
    flatness = 1.0 if not power.any() else _flatness(power)
    slope, error = _slope(frequency, power) if power.all() else (0.0, 0.0)
    if blank:
        kind = "blank"
    elif min(coarse.shape[1:]) < _LEAST:
        kind = "unclear"
    elif flatness > noise_above or (slope - error > -NOISE and flatness > picture_below):  # a chequerboard is not flat
        kind = "noise"
    elif slope + error < -PICTURE and flatness < picture_below and fine < FINE:
        kind = "picture"
    else:
        kind = "unclear"
    return Measures(
        kind=kind,
        width=width,
        height=height,
        flatness=flatness,
        noise_above=noise_above,
        picture_below=picture_below,
        slope=slope,
        slope_error=error,
        fine=fine,
        contrast=contrast,
        left=(float(left.mean()), float(left.std(axis=(1, 2)).mean())),
        right=(float(right.mean()), float(right.std(axis=(1, 2)).mean())),
        halves=_halves(array),
    )


def decode(data: bytes) -> Array:
    """`[3, height, width]`, 0 … 1, of an image file. Raises ValueError if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGBA").convert("RGB"), dtype=np.float64) / 255
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise invalid("picture", f"a file that cannot be read ({error})", "an image") from error
    return np.moveaxis(pixels, 2, 0)


def latent_array(data: bytes) -> Array:
    """`[channels, height, width]` of the first latent (and frame) in a file of ComfyUI's SaveLatent."""
    from safetensors.torch import load

    try:
        latent = load(data)["latent_tensor"].double()
    except Exception as error:  # safetensors raises its own, by what is broken
        raise invalid("latent", f"a file that cannot be read ({error})", "what SaveLatent wrote") from error
    return np.asarray(latent[0] if latent.ndim == 4 else latent[0, :, 0])


def latent_picture(latent: npt.ArrayLike) -> bytes:
    """A PNG of a latent's first three channels, each from its 1st to its 99th percentile: shapes, no colours."""
    from PIL import Image

    planes = np.nan_to_num(np.asarray(latent, dtype=np.float64)[:3])
    low, high = (np.percentile(planes, q, axis=(1, 2), keepdims=True) for q in (1, 99))
    pixels = np.clip((planes - low) / np.maximum(high - low, 1e-12), 0, 1) * 255
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels.astype(np.uint8), 0, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def difference(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Root mean square of a - b; None if they are not of one size."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.sqrt(np.mean((first - second) ** 2))) if first.shape == second.shape else None


def _shrink(array: Array, cell: int) -> Array:
    """The mean of each cell x cell samples; an incomplete last cell is left out."""
    channels, height, width = array.shape
    rows, columns = height // cell, width // cell
    cut = array[:, : rows * cell, : columns * cell]
    return np.asarray(cut.reshape(channels, rows, cell, columns, cell).mean(axis=(2, 4)))


def _rings(array: Array) -> tuple[Array, Array]:
    """Frequencies in cycles a sample and the mean power there.

    Each quadrant loses its mean: noise whose halves differ, as regions make them, is noise still. The window keeps a
    picture's edges, where left and right do not fit together, out of the spectrum.
    """
    height, width = array.shape[1:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    centred = array.copy()
    for rows in (slice(None, height // 2), slice(height // 2, None)):
        for columns in (slice(None, width // 2), slice(width // 2, None)):
            centred[:, rows, columns] -= centred[:, rows, columns].mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centred * window)) ** 2).mean(0)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    lowest = 1.5 / min(height, width)  # below, there is the window
    count = max(3, round(4 * np.log2(0.5 / lowest)))
    edges = np.geomspace(lowest, 0.5, count + 1)
    ring = np.searchsorted(edges, f.ravel(), side="right")
    members = np.bincount(ring, minlength=count + 2)[1 : count + 1]
    sums = np.bincount(ring, power.ravel(), minlength=count + 2)[1 : count + 1]
    where = np.bincount(ring, f.ravel(), minlength=count + 2)[1 : count + 1]
    full = members > 0
    return where[full] / members[full], sums[full] / members[full]


def _flatness(power: Array) -> float:
    lowest = power.max() * 1e-12  # one empty ring is not perfect order
    return float(np.exp(np.mean(np.log(np.maximum(power, lowest)))) / power.mean())


def _slope(frequency: Array, power: Array) -> tuple[float, float]:
    """The slope of the least-squares line through the logarithms, and its standard error."""
    x, y = np.log(frequency), np.log(power)
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    return slope, float(np.sqrt(((y - slope * x) ** 2).sum() / max(1, len(x) - 2) / (x @ x)))


def _halves(array: Array) -> float:
    height, width = array.shape[1:]
    rows, columns = height // _BLOCKS, width // _BLOCKS
    blocks = array[:, : rows * _BLOCKS, : columns * _BLOCKS].reshape(-1, _BLOCKS, rows, _BLOCKS, columns)
    contrast = np.log(blocks.std(axis=(2, 4)).mean(0) + 1e-6)
    largest = 0.0
    for values in (*blocks.mean(axis=(2, 4)), contrast):
        left, right = values[:, : _BLOCKS // 2], values[:, _BLOCKS // 2 :]
        spread = np.sqrt((left.var(ddof=1) + right.var(ddof=1)) / 2)
        if spread > 0:
            largest = max(largest, abs(float(left.mean() - right.mean())) / float(spread))
    return largest


def to_json(measures: Measures) -> dict[str, Any]:
    """Plain values, rounded as far as they mean something."""
    return {name: _rounded(value) for name, value in dataclasses.asdict(measures).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value
