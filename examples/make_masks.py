"""The example masks, from formulas: `python examples/make_masks.py` writes examples/masks/*.png anew, bit by bit the
same.

    left, right                        1024 x 1024   a split with a soft edge
    top_left … bottom_right            1024 x 1024   four panels with edges drawn by hand
    figure, surround                   1024 x 1024   a standing figure and all around it
    knight, dragon, castle             832 x 1216    soft brush strokes in an alpha channel; bare canvas between
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).parent / "masks"


def canvas(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of pixel centres, 0 to 1 along the shorter side."""
    short = min(width, height)
    y, x = np.mgrid[0:height, 0:width]
    return (y + 0.5) / short, (x + 0.5) / short


def smooth(distance: np.ndarray, feather: float) -> np.ndarray:
    """0 outside, 1 inside, with a smooth ramp of the given width around distance 0."""
    t = np.clip(distance / feather + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def wobble(at: np.ndarray, seed: int, size: float) -> np.ndarray:
    """A hand's unsteadiness along one coordinate: a few random sines."""
    random = np.random.default_rng(seed)
    waves = [random.normal() * np.sin(f * at * 2 * np.pi + random.uniform(0, 6.3)) / f for f in (1, 2, 3, 5, 8, 13)]
    return size * np.sum(waves, axis=0)


def stroke(y: np.ndarray, x: np.ndarray, seed: int, points: list[tuple[float, float, float]]) -> np.ndarray:
    """Soft dabs (y, x, radius) of a brush, merged as paint does, with uneven edges and a grainy falloff."""
    left = np.ones_like(x)
    for number, (cy, cx, radius) in enumerate(points):
        angle = np.arctan2(y - cy, x - cx)
        edge = radius * (1 + wobble(angle / (2 * np.pi), seed + number, 0.07))
        left *= 1 - smooth(edge - np.hypot(y - cy, x - cx), 0.7 * radius)
    return 1 - left


def grey(name: str, mask: np.ndarray) -> None:
    Image.fromarray((255 * mask).round().astype(np.uint8)).save(OUT / f"{name}.png", optimize=True)


def alpha(name: str, mask: np.ndarray) -> None:
    """White paint on a transparent layer, as editors export it."""
    pixels = np.full((*mask.shape, 2), 255, dtype=np.uint8)
    pixels[..., 1] = (255 * mask).round().astype(np.uint8)
    Image.fromarray(pixels).save(OUT / f"{name}.png", optimize=True)


def main() -> None:
    OUT.mkdir(exist_ok=True)

    y, x = canvas(1024, 1024)
    left = smooth(0.5 - x, 0.08)
    grey("left", left)
    grey("right", 1 - left)

    top = smooth(0.5 + wobble(x, 1, 0.015) - y, 0.05)
    first = smooth(0.5 + wobble(y, 2, 0.015) - x, 0.05)
    for row, upper in (("top", top), ("bottom", 1 - top)):
        for column, side in (("left", first), ("right", 1 - first)):
            grey(f"{row}_{column}", upper * side)

    body = [(0.24, 0.5, 0.11), (0.42, 0.5, 0.16), (0.58, 0.49, 0.17), (0.76, 0.5, 0.18), (0.93, 0.5, 0.2)]
    figure = stroke(y, x, 11, body)
    grey("figure", figure)
    grey("surround", 1 - figure)

    y, x = canvas(832, 1216)
    alpha("knight", stroke(y, x, 21, [(0.86, 0.3, 0.13), (1.05, 0.28, 0.19), (1.25, 0.3, 0.2), (1.0, 0.48, 0.1)]))
    alpha("dragon", stroke(y, x, 31, [(0.62, 0.72, 0.24), (0.8, 0.62, 0.2), (0.48, 0.5, 0.15), (0.95, 0.78, 0.18)]))
    alpha("castle", stroke(y, x, 41, [(0.22, 0.22, 0.15), (0.34, 0.3, 0.18), (0.2, 0.42, 0.12), (0.38, 0.12, 0.14)]))


if __name__ == "__main__":
    main()
