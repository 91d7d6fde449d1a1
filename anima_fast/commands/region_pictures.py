"""Pictures of regions: masks over the canvas with a legend, the same on the token grid, and one weight map a region.

Colours mix by weight: a point shows Σ w_r c_r / max(1, Σ w_r) over a background that shows through by 1 - Σ w_r. What
no region covers stays background, with diagonal lines.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..masks import resample
from ..plan import RegionPlan

__all__ = ["colours", "overlay", "token_grid_preview", "weight_map"]

Colour = tuple[int, int, int]
#: name, colour (None: no swatch), figures of one line of the legend
Line = tuple[str, Colour | None, str]

_PALETTE = ("4f8ef7", "f2994a", "3fb68b", "e05c7a", "a06ee1", "e8c547", "3cc2d4", "b98c6a")
_BACKGROUND, _HATCH, _PAPER = (36, 39, 46), (66, 71, 82), (250, 250, 251)
_INK, _MUTED, _RULE = (28, 31, 38), (108, 114, 127), (226, 228, 233)
_LONG_SIDE = 1024
_MARGIN = 36
_LEGEND = 380

# Anchors of a dark-to-light map whose lightness rises evenly (as matplotlib's magma).
_MAP = bytes.fromhex("000004 281159 651a80 9d2e7f d44868 f57d59 fec286 fcfdbf")


def colours(count: int) -> list[Colour]:
    """`count` colours that differ: eight chosen ones, then hues a golden angle apart."""
    chosen = [tuple(bytes.fromhex(code)) for code in _PALETTE[:count]]
    for i in range(len(chosen), count):
        rgb = colorsys.hls_to_rgb(i * 0.381966 % 1, 0.6, 0.62)
        chosen.append(tuple(round(255 * x) for x in rgb))
    return [(r, g, b) for r, g, b in chosen]


def overlay(
    plan: RegionPlan,
    names: Sequence[str],
    size: tuple[int, int],
    weights: torch.Tensor,
    legend: Sequence[Line],
    title: str,
) -> Image.Image:
    """The masks over a canvas of `size` (width, height) pixels, outlined at half weight and named, with a legend.

    weights: `[R, Ht, Wt]` on the token grid; names are placed by them.
    """
    width, height = _fit(size)
    masks = torch.stack([resample(mask, (height, width), method="bilinear") for mask in plan.masks])
    picture = _mix(masks.numpy(), colours(len(names)))
    for mask in masks.numpy():
        inside = mask > 0.5
        edge = np.zeros_like(inside)
        edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
        edge[1:] |= inside[1:] != inside[:-1]
        edge[1:] |= edge[:-1].copy()  # two pixels wide
        edge[:, 1:] |= edge[:, :-1].copy()
        picture[edge] = 0.25 * picture[edge] + 0.75 * 255
    image = Image.fromarray(picture.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    font = _font(26 if len(names) <= 8 else 19)
    room = int(1.5 * width / (1 + math.sqrt(len(names))))
    for name, weight in zip(names, weights, strict=True):
        if float(weight.max()) > 0:
            row, column = _deepest(weight)
            text = _shortened(name, font, room)
            half = font.getlength(text) / 2 + 6
            x = min(max((column + 0.5) * width / weight.shape[1], half), width - half)
            y = min(max((row + 0.5) * height / weight.shape[0], 20), height - 20)
            draw.text((x, y), text, fill="white", font=font, anchor="mm", stroke_width=3, stroke_fill=_BACKGROUND)
    return _with_legend(image, title, legend)


def token_grid_preview(weights: torch.Tensor, legend: Sequence[Line], title: str) -> Image.Image:
    """The token grid as the model sees it: a cell a token, lines every eight. weights `[R, Ht, Wt]`."""
    _, rows, columns = weights.shape
    cell = max(4, _LONG_SIDE // max(rows, columns))
    mixed = _mix(weights.numpy(), colours(len(weights)), hatch=False)
    image = Image.fromarray(mixed.round().astype(np.uint8)).resize(
        (columns * cell, rows * cell), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(image)
    uncovered = weights.sum(dim=0) <= 1e-3
    for row, column in uncovered.nonzero().tolist():
        x, y = column * cell, row * cell
        draw.line((x, y + cell - 1, x + cell - 1, y), fill=_HATCH)
    draw = ImageDraw.Draw(image, "RGBA")
    for number in range(columns + 1):
        strong = number % 8 == 0
        draw.line((number * cell, 0, number * cell, image.height), (*_BACKGROUND, 190 if strong else 90), 1 + strong)
    for number in range(rows + 1):
        strong = number % 8 == 0
        draw.line((0, number * cell, image.width, number * cell), (*_BACKGROUND, 190 if strong else 90), 1 + strong)
    return _with_legend(image, title, legend)


def weight_map(weight: torch.Tensor, name: str, figures: str) -> Image.Image:
    """One region's weight on the token grid `[Ht, Wt]`, dark 0 to light 1, with its scale."""
    rows, columns = weight.shape
    cell = max(4, _LONG_SIDE // max(rows, columns))
    flat = weight.clamp(0, 1).numpy()
    image = Image.fromarray(_mapped(flat)).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)
    top, bar = 92, 132
    sheet = Image.new("RGB", (image.width + 2 * _MARGIN + bar, image.height + top + _MARGIN), _PAPER)
    sheet.paste(image, (_MARGIN, top))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 24), name, fill=_INK, font=_font(28))
    draw.text((_MARGIN, 60), figures, fill=_MUTED, font=_font(17))
    scale = Image.fromarray(_mapped(np.linspace(1, 0, image.height)[:, None].repeat(26, 1)))
    left = _MARGIN + image.width + 30
    sheet.paste(scale, (left, top))
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - value) * (image.height - 1)
        draw.line((left + 26, y, left + 32, y), fill=_MUTED)
        draw.text((left + 38, y), f"{value:g}", fill=_MUTED, font=_font(16), anchor="lm")
    return sheet


def _with_legend(image: Image.Image, title: str, legend: Sequence[Line]) -> Image.Image:
    line = 66
    height = max(image.height, 70 + line * len(legend))
    sheet = Image.new("RGB", (image.width + _LEGEND + 3 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    sheet.paste(image, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(sheet)
    x, y = image.width + 2 * _MARGIN, _MARGIN
    draw.text((x, y), title, fill=_INK, font=_font(24))
    y += 46
    draw.line((x, y, x + _LEGEND, y), fill=_RULE, width=2)
    y += 20
    for name, colour, figures in legend:
        outline = _RULE if colour is None else colour
        draw.rounded_rectangle((x, y + 4, x + 30, y + 34), radius=7, fill=colour, outline=outline, width=2)
        draw.text((x + 46, y), _shortened(name, _font(21), _LEGEND - 46), fill=_INK, font=_font(21))
        draw.text((x + 46, y + 27), figures, fill=_MUTED, font=_font(16))
        y += line
    return sheet


def _mix(weights: np.ndarray, chosen: Sequence[Colour], hatch: bool = True) -> np.ndarray:
    """Colours by weight over the background, `[height, width, 3]` in 0 … 255."""
    total = weights.sum(axis=0)
    colour = np.tensordot(weights, np.array(chosen, dtype=np.float64).reshape(-1, 3), axes=(0, 0))
    colour /= np.maximum(1, total)[..., None]
    background = np.empty((*total.shape, 3))
    background[:] = _BACKGROUND
    if hatch:
        y, x = np.indices(total.shape)
        background[(x + y) % 14 < 2] = _HATCH
    shows = np.clip(1 - total, 0, 1)[..., None]
    mixed: np.ndarray = colour + shows * background
    return mixed


def _mapped(values: np.ndarray) -> np.ndarray:
    anchors = np.frombuffer(_MAP, dtype=np.uint8).reshape(-1, 3)
    position = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(values, position, anchors[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def _deepest(weight: torch.Tensor) -> tuple[int, int]:
    """The token furthest inside a region, which is where its name goes (a ring's centre is not in the ring)."""
    depth = torch.zeros_like(weight)
    inside = (weight > 0.5 * weight.max()).double()[None, None]
    while bool(inside.any()):
        depth += inside[0, 0]
        inside = -torch.nn.functional.max_pool2d(torch.nn.functional.pad(-inside, (1, 1, 1, 1)), 3, stride=1)
    # Among equals the most central one: strips are as deep all along.
    best = (depth == depth.max()).nonzero().double()
    nearest = (best - best.mean(dim=0)).square().sum(dim=1).argmin()
    row, column = best[nearest].long().tolist()
    return row, column


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = _LONG_SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    short = text
    while len(short) > 1 and font.getlength(short) > width:
        short = short[:-2] + "…"
    return short


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
