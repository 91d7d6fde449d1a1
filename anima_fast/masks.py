"""Region masks: read from tensors, arrays and image files, and resampled to the token grid.

A mask is a picture-sized map r(y, x) in [0, 1], origin top left, any size. The model sees the picture
as T x Ht x Wt tokens (Anima: 16 pixels a token), so each token i gets one weight w(i) in [0, 1]:

    area      exact mean of r over the part of the picture that the token covers (any size ratio)
    bilinear  r interpolated at the token's centre
    nearest   r of the pixel under the token's centre
    max       largest r of any pixel that the token touches

All but `max` are separable and linear, w = Y r Xᵀ with one small matrix an axis, formed in float64.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import invalid, wrong_type

__all__ = ["MAX_MASK_PIXELS", "RESAMPLE", "load_mask", "resample"]

RESAMPLE = ("area", "bilinear", "nearest", "max")

#: A larger image is refused before it is decoded: 2^28 pixels are 1 GiB as float32.
MAX_MASK_PIXELS = 2**28

# Boundaries of tokens in pixels are sums of fractions; one this close to a pixel edge is on it.
_SNAP = 1e-6


def load_mask(source: Any, name: str = "mask") -> torch.Tensor:
    """One mask as a float32 tensor `[height, width]` in [0, 1], on the CPU.

    Args:
        source: a tensor or array `[H, W]`, `[1, H, W]` or `[1, 1, H, W]` (float in [0, 1], bool, uint8
            with 255 = 1, uint16 with 65535 = 1), a `PIL.Image`, or the path of an image file. Images of
            any mode: colours become luminance, an alpha channel multiplies it, EXIF rotation is applied.
        name: how errors call it.

    Values outside [0, 1] are refused, not clamped: a float mask that runs to 255 is a mistake that clamping
    would turn into an all-white mask. Overshoots below 1e-4 (resampling noise) are clamped.

    Raises:
        TypeError: not a tensor, array, image or path.
        ValueError: wrong rank, empty, NaN or infinite, outside [0, 1], unreadable or too large image.
        FileNotFoundError: the path does not exist.

    Example:
        >>> load_mask(torch.ones(1, 4, 6)).shape
        torch.Size([4, 6])
    """
    if isinstance(source, (str, os.PathLike)):
        mask = _read_image(Path(source), name)
    elif isinstance(source, torch.Tensor):
        mask = _to_unit(source.detach().cpu(), name)
    elif hasattr(source, "getbands"):
        mask = _from_image(source, name)
    elif hasattr(source, "__array__"):
        import numpy as np

        array = np.asarray(source)
        if array.dtype == np.uint16:
            array = array.astype(np.float32) / 65535
        if array.dtype.kind not in "bfiu":
            raise invalid(name, f"an array of type {array.dtype}", "bool, uint8, uint16 or float in [0, 1]")
        mask = _to_unit(torch.from_numpy(np.ascontiguousarray(array)), name)
    else:
        raise wrong_type(name, source, "a tensor, an array, a PIL image or the path of an image file")
    while mask.ndim > 2 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise invalid(name, f"shape {list(mask.shape)}", "[H, W], [1, H, W] or [1, 1, H, W]; one mask a region")
    if mask.numel() == 0:
        raise invalid(name, f"an empty mask of shape {list(mask.shape)}", "at least one pixel")
    if not bool(torch.isfinite(mask).all()):
        raise invalid(name, f"{int((~torch.isfinite(mask)).sum())} NaN or infinite values", "finite values")
    low, high = float(mask.min()), float(mask.max())
    if low < -1e-4 or high > 1 + 1e-4:
        hint = " (divide by 255?)" if 1 < high <= 255 and low >= 0 else ""
        raise invalid(name, f"values from {low:g} to {high:g}", f"[0, 1]{hint}")
    return mask.clamp(0, 1).contiguous()


def _to_unit(mask: torch.Tensor, name: str) -> torch.Tensor:
    """Integer ranges to [0, 1], everything to float32."""
    if mask.dtype == torch.uint8:
        return mask.float() / 255
    if mask.dtype == torch.uint16:
        return mask.float() / 65535
    if mask.dtype == torch.bool or mask.dtype.is_floating_point:
        return mask.float()
    if mask.is_complex():
        raise invalid(name, f"a mask of type {mask.dtype}", "bool, uint8, uint16 or float in [0, 1]")
    return mask.float()  # other integers have no agreed white: the range check lets only 0 and 1 pass


def _read_image(path: Path, name: str) -> torch.Tensor:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file {str(path)!r}")
    try:
        with Image.open(path) as image:
            return _from_image(image, name)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError) as error:
        raise invalid(name, f"{str(path)!r}, which cannot be read ({error})", "a whole image file") from error


def _from_image(image: Any, name: str) -> torch.Tensor:
    """Luminance times alpha of a PIL image."""
    import numpy as np
    from PIL import ImageOps

    if image.width * image.height > MAX_MASK_PIXELS:
        raise invalid(name, f"an image of {image.width} x {image.height} pixels", f"at most {MAX_MASK_PIXELS} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return torch.from_numpy(np.array(image, dtype=np.float32))
    if image.mode.startswith("I"):  # 16-bit greyscale files open as I;16 or I
        return torch.from_numpy(np.array(image).astype(np.float32) / 65535)
    bands = np.array(image.convert("RGBA"), dtype=np.float32) / 255
    luminance = bands[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return torch.from_numpy(np.clip(luminance * bands[..., 3], 0.0, 1.0))


def resample(
    mask: torch.Tensor,
    size: tuple[int, int],
    *,
    canvas: tuple[float, float] | None = None,
    window: Sequence[float] = (0.0, 0.0, 1.0, 1.0),
    method: str = "area",
) -> torch.Tensor:
    """Token weights `[Ht, Wt]` (float64) of one mask `[H, W]`.

    Args:
        size: (Ht, Wt), the token grid.
        canvas: the picture's extent in tokens, at most `size`; the rest of the grid is padding and repeats
            the last token that sees the picture. Default: the whole grid.
        window: (top, left, bottom, right), the part of the mask that the canvas shows, as fractions of it.
        method: one of `RESAMPLE`.
    """
    canvas = canvas or (float(size[0]), float(size[1]))
    rows = _intervals(size[0], canvas[0], window[0], window[2], mask.shape[0])
    columns = _intervals(size[1], canvas[1], window[1], window[3], mask.shape[1])
    mask = mask.double()
    if method == "max":
        return _max_over(_max_over(mask, rows).T, columns).T.contiguous()
    kernel = {"area": _area, "bilinear": _bilinear, "nearest": _nearest}[method]
    return (kernel(rows, mask.shape[0]) @ mask @ kernel(columns, mask.shape[1]).T).clamp(0, 1)


def _intervals(tokens: int, canvas: float, first: float, last: float, pixels: int) -> torch.Tensor:
    """`[tokens, 2]`: where each token begins and ends on one axis of the mask, in pixels."""
    edge = torch.arange(tokens + 1, dtype=torch.float64) / canvas
    edge = (first + (last - first) * edge).clamp(max=last) * pixels
    edge = torch.where((edge - edge.round()).abs() < _SNAP, edge.round(), edge)
    begin, end = edge[:-1].clone(), edge[1:].clone()
    seen = int((end - begin > _SNAP).sum())  # tokens past the canvas repeat the last one that sees it
    begin[seen:], end[seen:] = begin[seen - 1].item(), end[seen - 1].item()
    return torch.stack([begin, end], dim=1)


def _area(intervals: torch.Tensor, pixels: int) -> torch.Tensor:
    left = torch.arange(pixels, dtype=torch.float64)
    overlap = torch.minimum(intervals[:, 1:], left + 1) - torch.maximum(intervals[:, :1], left)
    overlap = overlap.clamp(min=0)
    return overlap / overlap.sum(dim=1, keepdim=True)


def _bilinear(intervals: torch.Tensor, pixels: int) -> torch.Tensor:
    centre = (intervals.mean(dim=1) - 0.5).clamp(0, pixels - 1)
    return (1 - (centre[:, None] - torch.arange(pixels, dtype=torch.float64)).abs()).clamp(min=0)


def _nearest(intervals: torch.Tensor, pixels: int) -> torch.Tensor:
    index = (intervals.mean(dim=1) + _SNAP).floor().long().clamp(0, pixels - 1)
    return torch.nn.functional.one_hot(index, pixels).double()


def _max_over(values: torch.Tensor, intervals: torch.Tensor) -> torch.Tensor:
    """Largest row of `values` within each interval of rows."""
    begin = intervals[:, 0].floor().long().tolist()
    end = intervals[:, 1].ceil().long().tolist()
    return torch.stack([values[b : max(e, b + 1)].amax(dim=0) for b, e in zip(begin, end, strict=True)])
